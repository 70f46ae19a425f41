"""Sightings: what listings showed, and what became of it.

``states.SIGHTING_TRANSITIONS`` says which state may follow which. All writes of
sightings are here, but for a new epoch's (``record``) and what an operator asks for
(``requests``). Writes of a poll begin with the fence, so a worker that lost its
lease writes nothing. Statements for a batch are constant in number.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import bulk, captures, leases
from archiver.db.bulk import FETCH_ROWS
from archiver.db.captures import Provable
from archiver.db.tables import sighting
from archiver.model import Claim, Resolved, Segment, SightingKey, What
from archiver.policy import UNHEEDED_REQUESTS, UNHEEDED_RETRY_SECONDS, quarantine_retry_seconds
from archiver.states import SightingState


class Known(NamedTuple):
    """What the database holds of one sighting."""

    state: SightingState
    sha256: bytes | None
    first_seen_at: datetime
    attempts: int
    retry_at: datetime | None
    delete_attempts: int
    delete_retry_at: datetime | None
    delete_requested: bool


_KNOWN = (
    sighting.c.uidl,
    sighting.c.size,
    sighting.c.content,
    sighting.c.state,
    sighting.c.sha256,
    sighting.c.first_seen_at,
    sighting.c.attempts,
    sighting.c.retry_at,
    sighting.c.delete_attempts,
    sighting.c.delete_retry_at,
    sighting.c.delete_requested_at,
)


# Worded once: to put a statement together costs more than to run it for a few rows.
_ORDER = (sighting.c.uidl, sighting.c.size, sighting.c.content)
_OF_MAILBOX = (
    sighting.c.account_id == sa.bindparam("of_account"),
    sighting.c.epoch == sa.bindparam("of_epoch"),
)
_PRESENT = sa.select(*_KNOWN).where(*_OF_MAILBOX, sighting.c.absent_at.is_(None)).order_by(*_ORDER)
_FIRST_PRESENT = _PRESENT.limit(sa.literal_column(str(FETCH_ROWS)))
_ABSENT_QUARANTINED = sa.select(*_KNOWN).where(
    *_OF_MAILBOX, sighting.c.state == sa.literal_column("'quarantined'"), sighting.c.absent_at.is_not(None)
)


_STATES = {state.value: state for state in SightingState}


def _known(row: Any) -> tuple[SightingKey, Known]:
    *key, state, sha256, seen_at, attempts, retry_at, delete_attempts, delete_retry_at, requested_at = row
    requested = requested_at is not None
    retries = attempts, retry_at, delete_attempts, delete_retry_at
    known = Known(_STATES[state], sha256, seen_at, *retries, requested)
    return SightingKey(*key), known


def present(
    connection: Connection,
    account_id: str,
    epoch: int,
    *,
    after: SightingKey | None = None,
) -> Iterator[tuple[SightingKey, Known]]:
    """What the last listing showed, in the order of its keys, after ``after``.

    The first thousand are read at once, which is all of a small mailbox; the rest is
    streamed, which takes PostgreSQL three statements. Read all of it within one
    transaction, so that both parts are of one state. Bytes are ordered as by memcmp on
    both databases.
    """
    of_mailbox = {"of_account": account_id, "of_epoch": epoch}
    if after is None:
        first = connection.execute(_FIRST_PRESENT, of_mailbox).all()
        known = list(map(_known, first))
        yield from known
        if len(known) < FETCH_ROWS:
            return
        after = known[-1][0]
    rest = _PRESENT.where(sa.tuple_(*_ORDER) > sa.tuple_(*after)).execution_options(yield_per=FETCH_ROWS)
    yield from map(_known, connection.execute(rest, of_mailbox))


def is_any_present(connection: Connection, account_id: str, epoch: int, uidls: Sequence[bytes]) -> bool:
    """Whether one of these UIDLs is that of a message that was on the server before."""
    query = sa.select(sighting.c.uidl).where(
        sighting.c.account_id == account_id,
        sighting.c.epoch == epoch,
        sighting.c.uidl.in_(uidls),
        sighting.c.absent_at.is_(None),
    )
    return connection.execute(query.limit(1)).first() is not None


def absent_quarantined(connection: Connection, account_id: str, epoch: int) -> dict[SightingKey, Known]:
    """Messages in quarantine that are not listed any more. Their next retry stays, should they come back."""
    rows = connection.execute(_ABSENT_QUARANTINED, {"of_account": account_id, "of_epoch": epoch})
    return dict(map(_known, rows))


def provable(
    connection: Connection, account_id: str, epoch: int, uidls: Sequence[bytes]
) -> dict[SightingKey, Provable]:
    """The capture behind each listed sighting whose UIDL is one of these and identifies it."""
    dialect = connection.dialect.name
    found = connection.execute(
        _captured(dialect), {"b_account_id": account_id, "b_epoch": epoch, "uidls": uidls}
    ).all()
    digests = list({row.sha256 for row in found})
    behind = {row.sha256: row for row in captures.by_digest(connection, account_id, digests)}
    return {SightingKey(row.uidl, row.size): behind[row.sha256] for row in found if row.sha256 in behind}


@cache
def _captured(dialect: str) -> sa.Select[Any]:
    present = sa.select(sighting.c.uidl, sighting.c.size, sighting.c.sha256).where(
        sighting.c.account_id == sa.bindparam("b_account_id"),
        sighting.c.epoch == sa.bindparam("b_epoch"),
        sighting.c.content == b"",
        sighting.c.state == "captured",
        sighting.c.absent_at.is_(None),
    )
    return bulk.look_up(dialect, present, sighting.c.uidl, "uidls")


def listed_again(
    connection: Connection, claim: Claim, epoch: int, sightings: Sequence[SightingKey], at: datetime
) -> None:
    """A listing shows messages that had been absent, or whose deletion was requested.

    If they disappear later without another request, that is not reported as our
    deletion. A deletion that the server confirmed and did not make, again and again,
    is requested again a day later.
    """
    leases.fence(connection, claim)
    later = at + timedelta(seconds=UNHEEDED_RETRY_SECONDS)
    _change(connection, _LISTED_AGAIN, claim.account_id, epoch, sightings, b_at=later)


def died_in_transit(
    connection: Connection, claim: Claim, epoch: int, key: SightingKey, *, attempts: int, at: datetime
) -> None:
    """Record that fetching this message has cost a connection, for the ``attempts``-th time."""
    leases.fence(connection, claim)
    row = _row(claim.account_id, epoch, key, at, state=SightingState.PENDING, attempts=attempts)
    _write(connection, [row])


def deletions_requested(
    connection: Connection, claim: Claim, epoch: int, sightings: Sequence[SightingKey], at: datetime
) -> None:
    """Record, before any DELE is sent, that the deletion of these is about to be requested."""
    leases.fence(connection, claim)
    _change(connection, _REQUESTED, claim.account_id, epoch, sightings, b_at=at)


def deletion_put_off(
    connection: Connection, claim: Claim, epoch: int, key: SightingKey, at: datetime
) -> None:
    """Reading a message again before its deletion has cost the connection: leave it for a day."""
    leases.fence(connection, claim)
    until = at + timedelta(seconds=UNHEEDED_RETRY_SECONDS)
    _change(connection, _PUT_OFF, claim.account_id, epoch, [key], b_at=until)


def resolve(connection: Connection, written: Segment) -> None:
    """Apply a journal segment's lines: what was captured, recognised or quarantined, and what is absent."""
    _keep_former_contents(connection, written)
    resolved = [line for line in written.lines if line.what in _RESOLVED_AS]
    _write(connection, [_row_of_line(written, line) for line in resolved])
    absent = [line.sighting for line in written.lines if line.what in _ABSENCES]
    _change(connection, _ABSENT, written.account_id, written.epoch, absent, b_at=written.written_at)


_RESOLVED_AS = {
    What.CAPTURED: SightingState.CAPTURED,
    What.KNOWN: SightingState.CAPTURED,
    What.QUARANTINED: SightingState.QUARANTINED,
}
_ABSENCES = frozenset({What.DELETED, What.GONE})


def _row_of_line(written: Segment, line: Resolved) -> dict[str, Any]:
    state = _RESOLVED_AS[line.what]
    return _row(
        written.account_id,
        written.epoch,
        line.sighting,
        line.resolved_at,
        state=state,
        sha256=line.sha256,
        attempts=line.attempts if state is SightingState.QUARANTINED else 0,
        reason=line.reason,
    )


def _keep_former_contents(connection: Connection, written: Segment) -> None:
    """Where a UIDL now names another message, keep the sighting of the former one by its content.

    Some servers start counting again when a mailbox is recreated (Cyrus), and two
    messages may have one size. The row by UIDL is then the new message's, and the
    former one is not on the server any more.
    """
    archived = (line for line in written.lines if _RESOLVED_AS.get(line.what) is SightingState.CAPTURED)
    lines = {line.sighting: line.sha256 for line in archived if not line.sighting.content}
    if not lines:
        return
    rows = connection.execute(
        _contents_by_uidl(connection.dialect.name),
        {
            "b_account_id": written.account_id,
            "b_epoch": written.epoch,
            "uidls": list({key.uidl for key in lines}),
        },
    )
    former = [
        row._asdict() for row in rows if lines.get(SightingKey(row.uidl, row.size)) not in (None, row.sha256)
    ]
    if not former:
        return
    kept = [
        row | {"content": row["sha256"], "absent_at": row["absent_at"] or written.written_at}
        for row in former
    ]
    _NEW_SIGHTINGS.run(connection, kept)
    keys = [SightingKey(row["uidl"], row["size"]) for row in former]
    _change(connection, _REMOVED, written.account_id, written.epoch, keys)


def _row(
    account_id: str,
    epoch: int,
    key: SightingKey,
    at: datetime,
    *,
    state: SightingState,
    sha256: bytes | None = None,
    attempts: int,
    reason: str | None = None,
) -> dict[str, Any]:
    retry_at = None
    if state is SightingState.QUARANTINED:
        retry_at = at + timedelta(seconds=quarantine_retry_seconds(attempts))
    return {
        "account_id": account_id,
        "epoch": epoch,
        "uidl": key.uidl,
        "size": key.size,
        "content": key.content,
        "state": state.value,
        "sha256": sha256,
        "first_seen_at": at,
        "attempts": attempts,
        "retry_at": retry_at,
        "reason": reason,
    }


def _write(connection: Connection, rows: Iterable[dict[str, Any]]) -> None:
    by_key: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["uidl"], row["size"], row["content"]
        if key in by_key:
            # Equal messages without a UIDL of their own are one sighting, first seen with the first of them.
            row["first_seen_at"] = by_key[key]["first_seen_at"]
        by_key[key] = row
    if by_key:
        _WRITTEN.run(connection, list(by_key.values()))


def _change(
    connection: Connection,
    change: bulk.ForRows,
    account_id: str,
    epoch: int,
    sightings: Iterable[SightingKey],
    **values: Any,
) -> None:
    rows = [{"b_uidl": key.uidl, "b_size": key.size, "b_content": key.content} for key in sightings]
    if rows:
        change.run(connection, rows, b_account_id=account_id, b_epoch=epoch, **values)


# Made once: composing a statement costs more than running it.

_ACCOUNT_ID = sa.bindparam("b_account_id", type_=sa.Text())
_EPOCH = sa.bindparam("b_epoch", type_=sa.Integer())
_AT = sa.bindparam("b_at", type_=sighting.c.absent_at.type)


def _or_replace(insert: Any) -> Any:
    """What a segment says now replaces what was known; when the message was first seen stays."""
    replaced = ("state", "sha256", "attempts", "retry_at", "reason")
    return insert.on_conflict_do_update(
        index_elements=["account_id", "epoch", "uidl", "size", "content"],
        set_={name: insert.excluded[name] for name in replaced}
        | dict.fromkeys(("delete_requested_at", "delete_retry_at", "absent_at"), sa.null())
        | {"delete_attempts": 0},
    )


@cache
def _contents_by_uidl(dialect: str) -> sa.Select[Any]:
    by_uidl = sa.select(sighting).where(
        sighting.c.account_id == _ACCOUNT_ID,
        sighting.c.epoch == _EPOCH,
        sighting.c.content == b"",
        sighting.c.sha256.is_not(None),
    )
    return bulk.look_up(dialect, by_uidl, sighting.c.uidl, "uidls")


_NEW_SIGHTINGS = bulk.insert(sighting, sighting.c.keys(), lambda insert: insert.on_conflict_do_nothing())
_WRITTEN = bulk.insert(
    sighting,
    (
        "account_id",
        "epoch",
        "uidl",
        "size",
        "content",
        "state",
        "sha256",
        "first_seen_at",
        "attempts",
        "retry_at",
        "reason",
    ),
    _or_replace,
)


def _by_key(change: sa.Update | sa.Delete) -> bulk.ForRows:
    def worded(dialect: str, row: bulk.Values) -> sa.Update | sa.Delete:
        return change.where(
            sighting.c.account_id == _ACCOUNT_ID,
            sighting.c.epoch == _EPOCH,
            sighting.c.uidl == row["b_uidl"],
            sighting.c.size == row["b_size"],
            sighting.c.content == row["b_content"],
            bulk.one_of_all(dialect, sighting.c.uidl, "b_uidl"),
        )

    key = (sighting.c.uidl, sighting.c.size, sighting.c.content)
    return bulk.ForRows({f"b_{column.name}": column.type for column in key}, worded)


_ABSENT = _by_key(sa.update(sighting).values(absent_at=_AT))
_REMOVED = _by_key(sa.delete(sighting))
_REQUESTED = _by_key(sa.update(sighting).values(delete_requested_at=_AT))
_PUT_OFF = _by_key(sa.update(sighting).values(delete_retry_at=_AT))
_UNHEEDED = sa.and_(
    sighting.c.delete_requested_at.is_not(None), sighting.c.delete_attempts >= UNHEEDED_REQUESTS
)
_LISTED_AGAIN = _by_key(
    sa.update(sighting).values(
        absent_at=sa.null(),
        delete_requested_at=sa.null(),
        delete_retry_at=sa.case((_UNHEEDED, _AT), else_=sighting.c.delete_retry_at),
    )
)

"""What polls write: segments taken in, tries counted, deletions asked for.

Every function takes the connection of a transaction and begins with the fence,
so a worker that lost its lease writes nothing. Statements per call are
constant: rows go in by the batch.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import bulk, reads, schedule
from archiver.db.tables import account, capture, event, journal, lease, mailbox, sighting
from archiver.errors import IntegrityError
from archiver.model import (
    Claim,
    Resolved,
    Segment,
    SightingKey,
    What,
    capture_id,
    message_key,
    uidl_text,
)
from archiver.policy import UNHEEDED_REQUESTS, UNHEEDED_RETRY_SECONDS, quarantine_retry_seconds, why_suspended

FEED_LOCK = 0x61726368
"""The advisory lock that orders the feed on PostgreSQL: "arch" in ASCII."""


def segment(connection: Connection, claim: Claim, written: Segment, digest: bytes) -> None:
    """Take a journal segment in: captures, sightings, journal head and feed events, all or nothing.

    Taking the same segment in again changes nothing. Raises LeaseLost, or
    IntegrityError when the segment does not follow the one that the database
    knows. A segment of a new epoch begins it.
    """
    schedule.fence(connection, claim)
    head = connection.execute(_HEAD, {"b_account_id": written.account_id}).one()
    if (head.sequence, head.digest) == (written.sequence, digest):
        return
    if (head.sequence + 1, head.digest) != (written.sequence, written.previous):
        raise IntegrityError(
            f"journal segment {written.sequence} of account {written.account_name} does not follow "
            f"segment {head.sequence}, which the database has"
        )
    connection.execute(
        _ADVANCE,
        {
            "b_account_id": written.account_id,
            "sequence": written.sequence,
            "digest": digest,
            "written_at": written.written_at,
        },
    )
    if written.epoch < head.epoch:
        raise IntegrityError(
            f"journal segment {written.sequence} of account {written.account_name} is of epoch "
            f"{written.epoch}, and epoch {head.epoch} has begun"
        )
    if written.epoch > head.epoch:
        _begin_epoch(connection, written)
    captured = [line for line in written.lines if line.what is What.CAPTURED]
    if captured:
        _NEW_CAPTURES.run(connection, [_capture_row(written, line) for line in captured])
        _count(connection, written.account_id, captured)
    _keep_former_contents(connection, written)
    _upsert_sightings(
        connection, [_resolved_row(written, line) for line in written.lines if line.what in _STATES]
    )
    _change(
        connection,
        _ABSENT,
        written.account_id,
        written.epoch,
        [line.sighting for line in written.lines if line.what in _ABSENCES],
        b_at=written.written_at,
    )
    events = [
        _event_row(written, line) for line in written.lines if line.what in (What.CAPTURED, What.QUARANTINED)
    ]
    if written.epoch > head.epoch:
        events.insert(0, _epoch_row(written))
    publish(connection, events)


def still_there(
    connection: Connection, claim: Claim, epoch: int, sightings: Sequence[SightingKey], at: datetime
) -> None:
    """A listing shows messages whose deletion was asked for, or that had been absent: neither is so any more.

    If they vanish later without our asking again, it is not told as our doing.
    A deletion that was to no avail so often, although the server took it, is
    asked for a day later.
    """
    schedule.fence(connection, claim)
    later = at + timedelta(seconds=UNHEEDED_RETRY_SECONDS)
    _change(connection, _STILL_THERE, claim.account_id, epoch, sightings, b_at=later)


def retry_quarantined(connection: Connection, account_id: str, at: datetime, uidl: bytes | None) -> int:
    """Have what is set aside, of that UIDL or all of it, tried again at the next poll. Returns how many."""
    wanted = [sighting.c.account_id == account_id, sighting.c.absent_at.is_(None)]
    if uidl is not None:
        wanted.append(sighting.c.uidl == uidl)
    distrust(connection, account_id)
    found = connection.execute(
        sa.update(sighting).where(*wanted, sighting.c.state == "quarantined").values(retry_at=at)
    )
    return found.rowcount


def fetch_again(connection: Connection, account_id: str, uidl: bytes) -> int:
    """Have a captured message that is still there fetched and put into the store at the next poll.

    That mends an object which the store lost: the same content has the same
    key, and one that is there is left as it is. Till then it is not deleted. The
    row keeps its digest, so that another content under this id does not hide
    the former one. Those known by their content are fetched at every poll anyway.
    """
    distrust(connection, account_id)
    found = connection.execute(
        sa.update(sighting)
        .where(
            sighting.c.account_id == account_id,
            sighting.c.uidl == uidl,
            sighting.c.content == b"",
            sighting.c.state == "captured",
            sighting.c.absent_at.is_(None),
        )
        .values(state="pending")
    )
    return found.rowcount


def allow_deletion(connection: Connection, account_id: str) -> None:
    """An operator has looked: the account's deletion policy is in force again."""
    distrust(connection, account_id)
    connection.execute(sa.update(account).where(account.c.id == account_id).values(deletion_suspended=None))


def distrust(connection: Connection, account_id: str) -> None:
    """Have the next poll that begins list the mailbox, whatever it looks like to one that goes on now."""
    # The lease first, as an ending does: none is claimed or given back until this is committed.
    schedule.ask_again(connection, account_id)
    connection.execute(
        sa.update(mailbox).where(mailbox.c.account_id == account_id).values(trusted_until=None)
    )


def died_in_transit(
    connection: Connection, claim: Claim, epoch: int, key: SightingKey, *, attempts: int, at: datetime
) -> None:
    """Note that a connection died over this message once more: for the ``attempts``-th time."""
    schedule.fence(connection, claim)
    row = _sighting_row(claim.account_id, epoch, key, at, state="pending", attempts=attempts)
    _upsert_sightings(connection, [row])


def deletions_requested(
    connection: Connection, claim: Claim, epoch: int, sightings: Sequence[SightingKey], at: datetime
) -> None:
    """Note, before any DELE is sent, that these are about to be deleted by us."""
    schedule.fence(connection, claim)
    _change(connection, _REQUESTED, claim.account_id, epoch, sightings, b_at=at)


def deletion_put_off(
    connection: Connection, claim: Claim, epoch: int, key: SightingKey, at: datetime
) -> None:
    """A message that is to be deleted could not be read again, and cost the connection: a day later, then."""
    schedule.fence(connection, claim)
    until = at + timedelta(seconds=UNHEEDED_RETRY_SECONDS)
    _change(connection, _PUT_OFF, claim.account_id, epoch, [key], b_at=until)


def recount(connection: Connection, account_id: str) -> bool:
    """Have what is counted of an account's captures be what is there; false where it was so already.

    Nobody records a capture meanwhile: that wants the lease's row, too.
    """
    connection.execute(
        sa.select(lease.c.token).where(lease.c.account_id == account_id).with_for_update()
    ).one()
    captures, captured_bytes = reads.count_again(connection, account_id)
    if (captures, captured_bytes) == reads.counted(connection, account_id):
        return False
    connection.execute(
        sa.update(mailbox)
        .where(mailbox.c.account_id == account_id)
        .values(captures=captures, captured_bytes=captured_bytes)
    )
    return True


def publish(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Append to the feed, so that a reader who has seen a position has seen all before it.

    A sequence gives numbers at the insert, but a reader sees them at the
    commit, and those can come in another order: the reader would pass an
    event by for ever. So on PostgreSQL writers take turns, from here to their
    commit, which is why this is a transaction's last step. SQLite has one
    writer anyway.
    """
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(FEED_LOCK)))
    _NEW_EVENTS.run(connection, rows)


_STATES = {
    What.CAPTURED: "captured",
    What.KNOWN: "captured",
    What.QUARANTINED: "quarantined",
}
_HELD = frozenset({What.CAPTURED, What.KNOWN})
_ABSENCES = frozenset({What.DELETED, What.GONE})

# One for all, because json.dumps would make a new one for each event.
_document = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def _begin_epoch(connection: Connection, written: Segment) -> None:
    """The mailbox was renumbered: nothing that the old ids named is told of any more.

    Whether those messages are still there is not known by them, so nothing is
    said to be gone; and nothing is deleted until somebody has looked.
    """
    connection.execute(
        sa.update(account)
        .where(account.c.id == written.account_id)
        .values(epoch=written.epoch, deletion_suspended=why_suspended(written.epoch, written.written_at))
    )
    connection.execute(
        sa.update(sighting)
        .where(
            sighting.c.account_id == written.account_id,
            sighting.c.epoch != written.epoch,
            sighting.c.absent_at.is_(None),
        )
        .values(absent_at=written.written_at)
    )
    distrust(connection, written.account_id)


def _keep_former_contents(connection: Connection, written: Segment) -> None:
    """Where an id was given again to another message, the former one's sighting is kept by its content.

    Some servers count from the start when a mailbox is made anew (Cyrus), and
    two messages may have one size. The row by id is then the new message's,
    and the former one is not on the server any more.
    """
    held = (line for line in written.lines if line.what in _HELD)
    lines = {line.sighting: line.sha256 for line in held if not line.sighting.content}
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


def _capture_row(written: Segment, line: Resolved) -> dict[str, Any]:
    return {
        "account_id": written.account_id,
        "sha256": line.sha256,
        "size": line.size,
        "epoch": written.epoch,
        "uidl": line.sighting.uidl,
        "captured_at": line.resolved_at,
        "version_id": line.version_id,
        "token": written.token,
        "sequence": written.sequence,
    }


def _count(connection: Connection, account_id: str, captured: list[Resolved]) -> None:
    captured_bytes = sum(line.size or 0 for line in captured)
    connection.execute(
        _COUNT, {"b_account_id": account_id, "b_captures": len(captured), "b_bytes": captured_bytes}
    )


def _resolved_row(written: Segment, line: Resolved) -> dict[str, Any]:
    return _sighting_row(
        written.account_id,
        written.epoch,
        line.sighting,
        line.resolved_at,
        state=_STATES[line.what],
        sha256=line.sha256,
        attempts=0 if line.what in _HELD else line.attempts,
        reason=line.reason,
    )


def _sighting_row(
    account_id: str,
    epoch: int,
    key: SightingKey,
    at: datetime,
    *,
    state: str,
    sha256: bytes | None = None,
    attempts: int,
    reason: str | None = None,
) -> dict[str, Any]:
    retry_at = None
    if state == "quarantined":
        retry_at = at + timedelta(seconds=quarantine_retry_seconds(attempts))
    return {
        "account_id": account_id,
        "epoch": epoch,
        "uidl": key.uidl,
        "size": key.size,
        "content": key.content,
        "state": state,
        "sha256": sha256,
        "first_seen_at": at,
        "attempts": attempts,
        "retry_at": retry_at,
        "reason": reason,
    }


def _event_row(written: Segment, line: Resolved) -> dict[str, Any]:
    body: dict[str, Any] = {
        "account": written.account_name,
        "account_id": written.account_id,
        "uidl": uidl_text(line.sighting.uidl),
        "epoch": written.epoch,
        "token": written.token,
        "segment": written.sequence,
    }
    if line.sha256 is not None:
        body |= {
            "capture": capture_id(written.account_id, line.sha256),
            "sha256": line.sha256.hex(),
            "size": line.size,
            "key": message_key(written.account_id, line.sha256),
            "version_id": line.version_id,
        }
    if line.reason is not None:
        body["reason"] = line.reason
    return {
        "kind": line.what.value,
        "account_id": written.account_id,
        "at": line.resolved_at,
        "body": _document(body),
    }


def _epoch_row(written: Segment) -> dict[str, Any]:
    body = {
        "account": written.account_name,
        "account_id": written.account_id,
        "epoch": written.epoch,
        "token": written.token,
        "segment": written.sequence,
        "listed": written.listing_count,
    }
    return {
        "kind": "epoch_began",
        "account_id": written.account_id,
        "at": written.written_at,
        "body": _document(body),
    }


def _upsert_sightings(connection: Connection, rows: Iterable[dict[str, Any]]) -> None:
    by_key: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["uidl"], row["size"], row["content"]
        if key in by_key:
            # Equal messages without an id of their own are one sighting, seen first by the first of them.
            row["first_seen_at"] = by_key[key]["first_seen_at"]
        by_key[key] = row
    if by_key:
        _RESOLVED.run(connection, list(by_key.values()))


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


# Worded once: to put a statement together costs more than to run it.

_ACCOUNT_ID = sa.bindparam("b_account_id", type_=sa.Text())
_EPOCH = sa.bindparam("b_epoch", type_=sa.Integer())
_AT = sa.bindparam("b_at", type_=sighting.c.absent_at.type)

_HEAD = (
    sa.select(journal.c.sequence, journal.c.digest, account.c.epoch)
    .join(account, account.c.id == journal.c.account_id)
    .where(journal.c.account_id == _ACCOUNT_ID)
)
_ADVANCE = sa.update(journal).where(journal.c.account_id == _ACCOUNT_ID)
_COUNT = (
    sa.update(mailbox)
    .where(mailbox.c.account_id == _ACCOUNT_ID)
    .values(
        captures=mailbox.c.captures + sa.bindparam("b_captures", type_=sa.BigInteger()),
        captured_bytes=mailbox.c.captured_bytes + sa.bindparam("b_bytes", type_=sa.BigInteger()),
    )
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


def _or_replace(insert: Any) -> Any:
    """What is told of a sighting now is what holds; when it was seen first stays."""
    told = ("state", "sha256", "attempts", "retry_at", "reason")
    return insert.on_conflict_do_update(
        index_elements=["account_id", "epoch", "uidl", "size", "content"],
        set_={name: insert.excluded[name] for name in told}
        | dict.fromkeys(("delete_requested_at", "delete_retry_at", "absent_at"), sa.null())
        | {"delete_attempts": 0},
    )


def _or_leave(insert: Any) -> Any:
    return insert.on_conflict_do_nothing()


_NEW_CAPTURES = bulk.insert(capture, capture.c.keys(), _or_leave)
_NEW_SIGHTINGS = bulk.insert(sighting, sighting.c.keys(), _or_leave)
_NEW_EVENTS = bulk.insert(event, ("kind", "account_id", "at", "body"))
_RESOLVED = bulk.insert(
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
_STILL_THERE = _by_key(
    sa.update(sighting).values(
        absent_at=sa.null(),
        delete_requested_at=sa.null(),
        delete_retry_at=sa.case((_UNHEEDED, _AT), else_=sighting.c.delete_retry_at),
    )
)

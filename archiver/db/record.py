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
from archiver.policy import UNHEEDED_REQUESTS, UNHEEDED_RETRY_SECONDS, quarantine_retry_seconds, why_held

FEED_LOCK = 0x61726368
"""The advisory lock that orders the feed on PostgreSQL: "arch" in ASCII."""


def segment(connection: Connection, claim: Claim, written: Segment, digest: bytes) -> None:
    """Take a journal segment in: captures, sightings, journal head and feed events, all or nothing.

    Taking the same segment in again changes nothing. Raises LeaseLost, or
    IntegrityError when the segment does not follow the one that the database
    knows. A segment of a new epoch begins it.
    """
    schedule.fence(connection, claim)
    head = connection.execute(
        sa.select(journal.c.sequence, journal.c.digest, account.c.epoch)
        .join(account, account.c.id == journal.c.account_id)
        .where(journal.c.account_id == written.account_id)
    ).one()
    if (head.sequence, head.digest) == (written.sequence, digest):
        return
    if (head.sequence + 1, head.digest) != (written.sequence, written.previous):
        raise IntegrityError(
            f"journal segment {written.sequence} of account {written.account_name} does not follow "
            f"segment {head.sequence}, which the database has"
        )
    connection.execute(
        sa.update(journal)
        .where(journal.c.account_id == written.account_id)
        .values(sequence=written.sequence, digest=digest, written_at=written.written_at)
    )
    if written.epoch < head.epoch:
        raise IntegrityError(
            f"journal segment {written.sequence} of account {written.account_name} is of epoch "
            f"{written.epoch}, and epoch {head.epoch} has begun"
        )
    if written.epoch > head.epoch:
        _begin_epoch(connection, written)
    captured = [line for line in written.lines if line.what is What.CAPTURED]
    _insert(connection, capture, [_capture_row(written, line) for line in captured])
    _count(connection, written.account_id, captured)
    _keep_former_contents(connection, written)
    _upsert_sightings(
        connection,
        written.account_id,
        written.epoch,
        [_sighting_values(line) for line in written.lines if line.what in _STATES],
    )
    _mark_absent(connection, written, [line for line in written.lines if line.what in _ABSENCES])
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
    requested = sighting.c.delete_requested_at.is_not(None)
    later = at + timedelta(seconds=UNHEEDED_RETRY_SECONDS)
    again = sa.and_(requested, sighting.c.attempts >= UNHEEDED_REQUESTS)
    _by_key(
        connection,
        sa.update(sighting).values(
            absent_at=None,
            delete_requested_at=None,
            retry_at=sa.case(
                (again, sa.bindparam("b_later", later, type_=sighting.c.retry_at.type)),
                else_=sighting.c.retry_at,
            ),
        ),
        claim.account_id,
        epoch,
        sightings,
    )


def retry_quarantined(connection: Connection, account_id: str, at: datetime, uidl: bytes | None) -> int:
    """Have what is set aside, of that UIDL or all of it, tried again at the next poll. Returns how many."""
    wanted = [sighting.c.account_id == account_id, sighting.c.absent_at.is_(None)]
    if uidl is not None:
        wanted.append(sighting.c.uidl == uidl)
    found = connection.execute(
        sa.update(sighting).where(*wanted, sighting.c.state == "quarantined").values(retry_at=at)
    )
    distrust(connection, account_id)
    return found.rowcount


def fetch_again(connection: Connection, account_id: str, uidl: bytes) -> int:
    """Have a captured message that is still there fetched and put into the store at the next poll.

    That mends an object which the store lost: the same content has the same
    key, and one that is there is left as it is. Till then it is not deleted. The
    row keeps its digest, so that another content under this id does not hide
    the former one. Those known by their content are fetched at every poll anyway.
    """
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
    distrust(connection, account_id)
    return found.rowcount


def allow_deletion(connection: Connection, account_id: str) -> None:
    """An operator has looked: the account's deletion policy is in force again."""
    connection.execute(sa.update(account).where(account.c.id == account_id).values(deletion_hold=None))
    distrust(connection, account_id)


def distrust(connection: Connection, account_id: str) -> None:
    """Have the next poll list the mailbox, whatever it looked like last."""
    connection.execute(
        sa.update(mailbox).where(mailbox.c.account_id == account_id).values(trusted_until=None)
    )


def died_in_transit(
    connection: Connection, claim: Claim, epoch: int, key: SightingKey, *, attempts: int, at: datetime
) -> None:
    """Note that a connection died over this message once more: for the ``attempts``-th time."""
    schedule.fence(connection, claim)
    _upsert_sightings(
        connection,
        claim.account_id,
        epoch,
        [{"key": key, "at": at, "state": "pending", "sha256": None, "attempts": attempts, "reason": None}],
    )


def deletions_requested(
    connection: Connection, claim: Claim, epoch: int, sightings: Sequence[SightingKey], at: datetime
) -> None:
    """Note, before any DELE is sent, that these are about to be deleted by us."""
    schedule.fence(connection, claim)
    _by_key(
        connection, sa.update(sighting).values(delete_requested_at=at), claim.account_id, epoch, sightings
    )


def deletion_put_off(
    connection: Connection, claim: Claim, epoch: int, key: SightingKey, at: datetime
) -> None:
    """A message that is to be deleted could not be read again, and cost the connection: a day later, then."""
    schedule.fence(connection, claim)
    until = at + timedelta(seconds=UNHEEDED_RETRY_SECONDS)
    _by_key(connection, sa.update(sighting).values(retry_at=until), claim.account_id, epoch, [key])


def recount(connection: Connection, account_id: str) -> bool:
    """Have what is counted of an account's captures be what is there; false where it was so already.

    Nobody records a capture meanwhile: that wants the lease's row, too.
    """
    connection.execute(
        sa.select(lease.c.token).where(lease.c.account_id == account_id).with_for_update()
    ).one()
    captures, octets = reads.count_again(connection, account_id)
    if (captures, octets) == reads.counted(connection, account_id):
        return False
    connection.execute(
        sa.update(mailbox).where(mailbox.c.account_id == account_id).values(captures=captures, octets=octets)
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
    bulk.execute(connection, _insert_events(connection.dialect.name), rows)


_STATES = {
    What.CAPTURED: "captured",
    What.KNOWN: "captured",
    What.QUARANTINED: "quarantined",
}
_HELD = frozenset({What.CAPTURED, What.KNOWN})
_ABSENCES = frozenset({What.DELETED, What.GONE})


def _begin_epoch(connection: Connection, written: Segment) -> None:
    """The mailbox was renumbered: nothing that the old ids named is told of any more.

    Whether those messages are still there is not known by them, so nothing is
    said to be gone; and nothing is deleted until somebody has looked.
    """
    connection.execute(
        sa.update(account)
        .where(account.c.id == written.account_id)
        .values(epoch=written.epoch, deletion_hold=why_held(written.epoch, written.written_at))
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
        sa.select(sighting).where(
            sighting.c.account_id == written.account_id,
            sighting.c.epoch == written.epoch,
            sighting.c.uidl.in_({key.uidl for key in lines}),
            sighting.c.content == b"",
            sighting.c.sha256.is_not(None),
        )
    )
    former = [
        row._asdict() for row in rows if lines.get(SightingKey(row.uidl, row.size)) not in (None, row.sha256)
    ]
    _insert(
        connection,
        sighting,
        [
            row | {"content": row["sha256"], "absent_at": row["absent_at"] or written.written_at}
            for row in former
        ],
    )
    _by_key(
        connection,
        sa.delete(sighting),
        written.account_id,
        written.epoch,
        [SightingKey(row["uidl"], row["size"]) for row in former],
    )


def _capture_row(written: Segment, line: Resolved) -> dict[str, Any]:
    return {
        "account_id": written.account_id,
        "sha256": line.sha256,
        "octets": line.octets,
        "epoch": written.epoch,
        "uidl": line.sighting.uidl,
        "captured_at": line.at,
        "version_id": line.version_id,
        "token": written.token,
        "sequence": written.sequence,
    }


def _count(connection: Connection, account_id: str, captured: list[Resolved]) -> None:
    if captured:
        connection.execute(
            sa.update(mailbox)
            .where(mailbox.c.account_id == account_id)
            .values(
                captures=mailbox.c.captures + len(captured),
                octets=mailbox.c.octets + sum(line.octets or 0 for line in captured),
            )
        )


def _sighting_values(line: Resolved) -> dict[str, Any]:
    return {
        "key": line.sighting,
        "at": line.at,
        "state": _STATES[line.what],
        "sha256": line.sha256,
        # The tries that it took are the journal's; see SightingRow for what is counted from here on.
        "attempts": 0 if line.what in _HELD else line.attempts,
        "reason": line.reason,
    }


def _event_row(written: Segment, line: Resolved) -> dict[str, Any]:
    body: dict[str, Any] = {
        "account": written.account_name,
        "account_id": written.account_id,
        "uidl": uidl_text(line.sighting.uidl),
        "epoch": written.epoch,
        "poll": written.token,
        "segment": written.sequence,
    }
    if line.sha256 is not None:
        body |= {
            "capture": capture_id(written.account_id, line.sha256),
            "sha256": line.sha256.hex(),
            "size": line.octets,
            "key": message_key(written.account_id, line.sha256),
            "version_id": line.version_id,
        }
    if line.reason is not None:
        body["reason"] = line.reason
    return {
        "kind": line.what.value,
        "account_id": written.account_id,
        "at": line.at,
        "body": json.dumps(body, separators=(",", ":")),
    }


def _epoch_row(written: Segment) -> dict[str, Any]:
    body = {
        "account": written.account_name,
        "account_id": written.account_id,
        "epoch": written.epoch,
        "poll": written.token,
        "segment": written.sequence,
        "listed": written.listing_count,
    }
    return {
        "kind": "epoch",
        "account_id": written.account_id,
        "at": written.written_at,
        "body": json.dumps(body, separators=(",", ":")),
    }


def _insert(connection: Connection, into: sa.Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        bulk.execute(connection, _insert_new(connection.dialect.name, into, tuple(rows[0])), rows)


@cache
def _insert_new(dialect: str, into: sa.Table, names: tuple[str, ...]) -> Any:
    return bulk.insert(dialect, into, names).on_conflict_do_nothing()


@cache
def _insert_events(dialect: str) -> Any:
    return bulk.insert(dialect, event, ("kind", "account_id", "at", "body"))


def _upsert_sightings(
    connection: Connection,
    account_id: str,
    epoch: int,
    values: list[dict[str, Any]],
) -> None:
    if not values:
        return
    rows: dict[SightingKey, dict[str, Any]] = {}
    for value in values:
        key: SightingKey = value["key"]
        retry_at = None
        if value["state"] == "quarantined":
            retry_at = value["at"] + timedelta(seconds=quarantine_retry_seconds(value["attempts"]))
        # Equal messages without an id of their own are one sighting, seen first by the first of them.
        first_seen_at = rows[key]["first_seen_at"] if key in rows else value["at"]
        rows[key] = {
            "account_id": account_id,
            "epoch": epoch,
            "uidl": key.uidl,
            "size": key.size,
            "content": key.content,
            "state": value["state"],
            "sha256": value["sha256"],
            "first_seen_at": first_seen_at,
            "attempts": value["attempts"],
            "retry_at": retry_at,
            "reason": value["reason"],
        }
    names = tuple(next(iter(rows.values())))
    bulk.execute(connection, _upsert(connection.dialect.name, names), list(rows.values()))


@cache
def _upsert(dialect: str, names: tuple[str, ...]) -> Any:
    statement = bulk.insert(dialect, sighting, names)
    new = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=["account_id", "epoch", "uidl", "size", "content"],
        set_={
            "state": new.state,
            "sha256": new.sha256,
            "attempts": new.attempts,
            "retry_at": new.retry_at,
            "reason": new.reason,
            "delete_requested_at": sa.null(),
            "absent_at": sa.null(),
        },
    )


def _mark_absent(connection: Connection, written: Segment, lines: list[Resolved]) -> None:
    _by_key(
        connection,
        sa.update(sighting).values(absent_at=written.written_at),
        written.account_id,
        written.epoch,
        [line.sighting for line in lines],
    )


def _by_key(
    connection: Connection,
    statement: sa.Update | sa.Delete,
    account_id: str,
    epoch: int,
    sightings: Iterable[SightingKey],
) -> None:
    parameters = [{"b_uidl": key.uidl, "b_size": key.size, "b_content": key.content} for key in sightings]
    if parameters:
        which = sa.and_(
            sighting.c.account_id == account_id,
            sighting.c.epoch == epoch,
            sighting.c.uidl == sa.bindparam("b_uidl"),
            sighting.c.size == sa.bindparam("b_size"),
            sighting.c.content == sa.bindparam("b_content"),
        )
        connection.execute(statement.where(which), parameters)

"""What polls write: segments taken in, tries counted, deletions asked for, reports kept.

Every function takes the connection of a transaction and begins with the fence,
so a worker that lost its lease writes nothing. Statements per call are
constant: rows go in by the batch.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from archiver.db import schedule
from archiver.db.tables import account, capture, event, journal, mailbox, poll, sighting
from archiver.errors import IntegrityError
from archiver.model import (
    Claim,
    PollReport,
    Resolved,
    Segment,
    SightingKey,
    What,
    capture_id,
    message_key,
    uidl_text,
)
from archiver.policy import NextPoll, quarantine_retry_seconds

FEED_LOCK = 0x61726368
"""The advisory lock that orders the feed on PostgreSQL: "arch" in ASCII."""


def segment(connection: Connection, claim: Claim, written: Segment, digest: bytes) -> None:
    """Take a journal segment in: captures, sightings, journal head and feed events, all or nothing.

    Taking the same segment in again changes nothing. Raises LeaseLost, or
    IntegrityError when the segment does not follow the one that the database
    knows.
    """
    schedule.fence(connection, claim)
    head = connection.execute(
        sa.select(journal.c.sequence, journal.c.digest).where(journal.c.account_id == written.account_id)
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
    captured = [line for line in written.lines if line.what is What.CAPTURED]
    _insert(connection, capture, [_capture_row(written, line) for line in captured])
    _count(connection, written.account_id, captured)
    _upsert_sightings(
        connection,
        written.account_id,
        written.epoch,
        [_sighting_values(line) for line in written.lines if line.what in _STATES],
    )
    _mark_absent(connection, written, [line for line in written.lines if line.what in _ABSENCES])
    publish(
        connection,
        [
            _event_row(written, line)
            for line in written.lines
            if line.what in (What.CAPTURED, What.QUARANTINED)
        ],
    )


def present_again(connection: Connection, claim: Claim, epoch: int, sightings: Sequence[SightingKey]) -> None:
    """A listing shows messages once more that had been absent."""
    schedule.fence(connection, claim)
    _by_key(
        connection,
        sa.update(sighting).values(absent_at=None, delete_requested_at=None),
        claim.account_id,
        epoch,
        sightings,
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


def poll_ended(
    connection: Connection,
    claim: Claim,
    report: PollReport,
    following: NextPoll,
    *,
    ended_at: datetime,
    pipelining_broke: bool = False,
    disproved: str | None = None,
) -> None:
    """Keep the report and release the lease, in one transaction.

    ``pipelining_broke`` has the account polled one command at a time from now
    on: some servers announce PIPELINING and trip over it. A report that is
    kept already was committed by a transaction whose answer was lost.
    """
    kept = sa.select(poll.c.token).where(poll.c.account_id == claim.account_id, poll.c.token == claim.token)
    if connection.execute(kept).first() is not None:
        return
    schedule.fence(connection, claim)
    if pipelining_broke:
        connection.execute(
            sa.update(account).where(account.c.id == claim.account_id).values(pipelining=False)
        )
    _insert(
        connection,
        poll,
        [
            {
                "account_id": claim.account_id,
                "token": claim.token,
                "ended_at": ended_at,
                "seconds": report.seconds,
                "outcome": report.outcome,
                "listed": report.listed,
                "new": report.new,
                "known": report.known,
                "quarantined": report.quarantined,
                "to_come": report.to_come,
                "delete_requested": report.delete_requested,
                "octets": report.octets,
                "error": report.error,
            }
        ],
    )
    schedule.release(connection, claim, following, recover=report.journal_uncertain, disproved=disproved)


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
    connection.execute(sa.insert(event), rows)


_STATES = {
    What.CAPTURED: "captured",
    What.KNOWN: "captured",
    What.QUARANTINED: "quarantined",
}
_ABSENCES = frozenset({What.DELETED, What.GONE})


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
        "attempts": line.attempts,
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


def _insert(connection: Connection, into: sa.Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(_dialect_insert(connection, into).on_conflict_do_nothing(), rows)


def _dialect_insert(connection: Connection, into: sa.Table) -> Any:
    # ON CONFLICT has one spelling and two constructs.
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(into)


def _upsert_sightings(
    connection: Connection,
    account_id: str,
    epoch: int,
    values: list[dict[str, Any]],
) -> None:
    if not values:
        return
    rows = []
    for value in values:
        key: SightingKey = value["key"]
        retry_at = None
        if value["state"] == "quarantined":
            retry_at = value["at"] + timedelta(seconds=quarantine_retry_seconds(value["attempts"]))
        rows.append(
            {
                "account_id": account_id,
                "epoch": epoch,
                "uidl": key.uidl,
                "size": key.size,
                "content": key.content,
                "state": value["state"],
                "sha256": value["sha256"],
                "first_seen_at": value["at"],
                "attempts": value["attempts"],
                "retry_at": retry_at,
                "reason": value["reason"],
            }
        )
    statement = _dialect_insert(connection, sighting)
    new = statement.excluded
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["account_id", "epoch", "uidl", "size", "content"],
            set_={
                "state": new.state,
                "sha256": new.sha256,
                "attempts": new.attempts,
                "retry_at": new.retry_at,
                "reason": new.reason,
                "delete_requested_at": None,
                "absent_at": None,
            },
        ),
        rows,
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
    statement: sa.Update,
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

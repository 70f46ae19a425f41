"""What polls and people ask of the database. Reads only; rows come out as values or plain mappings."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db.tables import account, capture, event, journal, lease, poll, sighting
from archiver.model import JournalHead, SightingKey

FETCH_ROWS = 1_000
LOOKUP_ROWS = 200
"""UIDLs in one look-up: few enough for a plan by index, many enough that round trips do not count."""


class Known(NamedTuple):
    """What the database holds of one sighting."""

    state: str
    sha256: bytes | None
    first_seen_at: datetime
    attempts: int
    retry_at: datetime | None
    delete_requested: bool


class Held(NamedTuple):
    """What the database holds of one capture."""

    captured_at: datetime
    octets: int


_KNOWN = (
    sighting.c.uidl,
    sighting.c.size,
    sighting.c.content,
    sighting.c.state,
    sighting.c.sha256,
    sighting.c.first_seen_at,
    sighting.c.attempts,
    sighting.c.retry_at,
    sighting.c.delete_requested_at,
)


def _known(row: Any) -> tuple[SightingKey, Known]:
    key = SightingKey(row.uidl, row.size, row.content)
    requested = row.delete_requested_at is not None
    return key, Known(row.state, row.sha256, row.first_seen_at, row.attempts, row.retry_at, requested)


def journal_head(connection: Connection, account_id: str) -> JournalHead:
    """Where the account's journal stands, as far as the database knows."""
    row = connection.execute(
        sa.select(journal.c.sequence, journal.c.digest).where(journal.c.account_id == account_id)
    ).one()
    return JournalHead(row.sequence, row.digest)


def present_sightings(
    connection: Connection, account_id: str, epoch: int
) -> Iterator[tuple[SightingKey, Known]]:
    """What was on the server when it was listed last, streamed."""
    rows = connection.execution_options(yield_per=FETCH_ROWS).execute(
        sa.select(*_KNOWN).where(
            sighting.c.account_id == account_id, sighting.c.epoch == epoch, sighting.c.absent_at.is_(None)
        )
    )
    return (_known(row) for row in rows)


def absent_sightings(
    connection: Connection, account_id: str, epoch: int, uidls: Sequence[bytes]
) -> dict[SightingKey, Known]:
    """Which of these UIDLs the database knows from earlier, although they were gone since."""
    absent = sa.and_(
        sighting.c.account_id == account_id, sighting.c.epoch == epoch, sighting.c.absent_at.is_not(None)
    )
    if connection.execute(sa.select(sa.literal(1)).where(absent).limit(1)).first() is None:
        return {}
    found: dict[SightingKey, Known] = {}
    for start in range(0, len(uidls), LOOKUP_ROWS):
        rows = connection.execute(
            sa.select(*_KNOWN).where(absent, sighting.c.uidl.in_(uidls[start : start + LOOKUP_ROWS]))
        )
        found.update(map(_known, rows))
    return found


def held(connection: Connection, account_id: str, digests: Sequence[bytes]) -> dict[bytes, Held]:
    """Which of these contents the account has captured already."""
    found: dict[bytes, Held] = {}
    for start in range(0, len(digests), LOOKUP_ROWS):
        rows = connection.execute(
            sa.select(capture.c.sha256, capture.c.captured_at, capture.c.octets).where(
                capture.c.account_id == account_id,
                capture.c.sha256.in_(digests[start : start + LOOKUP_ROWS]),
            )
        )
        found.update((row.sha256, Held(row.captured_at, row.octets)) for row in rows)
    return found


def captures(
    connection: Connection, *, account_id: str | None = None, limit: int | None = None, newest: bool = False
) -> Iterator[Any]:
    """Captures with the name of their account, in the order of capture, streamed."""
    order = (capture.c.captured_at, capture.c.account_id, capture.c.sha256)
    query = sa.select(capture, account.c.name.label("account_name")).join(
        account, account.c.id == capture.c.account_id
    )
    if account_id is not None:
        query = query.where(capture.c.account_id == account_id)
    query = query.order_by(*((column.desc() for column in order) if newest else order)).limit(limit)
    yield from connection.execution_options(yield_per=FETCH_ROWS).execute(query)


def find_captures(
    connection: Connection, *, sha256_from: bytes, sha256_to: bytes, account_id: str | None
) -> list[Any]:
    """Captures whose digest lies in this range, both ends included; a few are enough to tell ambiguity."""
    query = (
        sa.select(capture, account.c.name.label("account_name"))
        .join(account, account.c.id == capture.c.account_id)
        .where(capture.c.sha256 >= sha256_from, capture.c.sha256 <= sha256_to)
        .limit(3)
    )
    if account_id is not None:
        query = query.where(capture.c.account_id == account_id)
    return list(connection.execute(query))


def capture_digests(connection: Connection, account_id: str) -> Iterator[bytes]:
    """The digest of every capture of an account, streamed."""
    rows = connection.execution_options(yield_per=FETCH_ROWS).execute(
        sa.select(capture.c.sha256).where(capture.c.account_id == account_id)
    )
    return (row.sha256 for row in rows)


def quarantined(connection: Connection, account_id: str) -> list[Any]:
    """The messages of an account that are set aside, with reason and next try; also those gone since."""
    return list(
        connection.execute(
            sa.select(sighting)
            .where(sighting.c.account_id == account_id, sighting.c.state == "quarantined")
            .order_by(sighting.c.first_seen_at)
        )
    )


def polls(connection: Connection, account_id: str, limit: int) -> list[Any]:
    """The last polls of an account, the newest first."""
    return list(
        connection.execute(
            sa.select(poll).where(poll.c.account_id == account_id).order_by(poll.c.token.desc()).limit(limit)
        )
    )


def account_states(connection: Connection, account_ids: Sequence[str] | None = None) -> list[Any]:
    """Each account with its schedule, its archive and its last polls, ordered by name.

    ``to_come`` is of the last poll that got a listing; ``outcome``, ``error``
    and ``ended_at`` of the last poll of all. ``quarantined`` are those that the
    server still shows: of the others there is nothing left to get.
    """
    archived = (
        sa.select(
            capture.c.account_id,
            sa.func.count().label("captures"),
            sa.func.sum(capture.c.octets).label("octets"),
        )
        .group_by(capture.c.account_id)
        .subquery()
    )
    aside = (
        sa.select(sighting.c.account_id, sa.func.count().label("quarantined"))
        .where(sighting.c.state == "quarantined", sighting.c.absent_at.is_(None))
        .group_by(sighting.c.account_id)
        .subquery()
    )
    last = _last_poll(poll.c.token > 0)
    listed = _last_poll(poll.c.listed.is_not(None))
    query = (
        sa.select(
            account,
            lease.c.due_at,
            lease.c.owner,
            lease.c.failures,
            lease.c.refusals,
            sa.func.coalesce(archived.c.captures, 0).label("captures"),
            sa.func.coalesce(archived.c.octets, 0).label("octets"),
            sa.func.coalesce(aside.c.quarantined, 0).label("quarantined"),
            last.c.outcome,
            last.c.error,
            last.c.ended_at,
            listed.c.listed,
            sa.func.coalesce(listed.c.to_come, 0).label("to_come"),
        )
        .join(lease, lease.c.account_id == account.c.id)
        .outerjoin(archived, archived.c.account_id == account.c.id)
        .outerjoin(aside, aside.c.account_id == account.c.id)
        .outerjoin(last, last.c.account_id == account.c.id)
        .outerjoin(listed, listed.c.account_id == account.c.id)
        .order_by(account.c.name)
    )
    if account_ids is not None:
        query = query.where(account.c.id.in_(account_ids))
    return list(connection.execute(query))


def _last_poll(wanted: sa.ColumnElement[bool]) -> sa.Subquery:
    newest = (
        sa.select(poll.c.account_id, sa.func.max(poll.c.token).label("token"))
        .where(wanted)
        .group_by(poll.c.account_id)
        .subquery()
    )
    return (
        sa.select(poll)
        .join(newest, sa.and_(newest.c.account_id == poll.c.account_id, newest.c.token == poll.c.token))
        .subquery()
    )


def events(connection: Connection, *, after: int, limit: int) -> list[Any]:
    """The feed behind a position, in order."""
    return list(
        connection.execute(
            sa.select(event).where(event.c.position > after).order_by(event.c.position).limit(limit)
        )
    )


class Standing(NamedTuple):
    """How all accounts stand together. ``overdue_seconds`` is of the one that waits longest."""

    accounts: dict[str, int]
    quarantined: int
    overdue_seconds: float


def standing(connection: Connection, now: datetime) -> Standing:
    """How all accounts stand together: how many are ok, failing and paused, and what waits."""
    paused = account.c.paused_reason.is_not(None)
    failing = sa.and_(~paused, lease.c.failures + lease.c.refusals > 0)
    row = connection.execute(
        sa.select(
            sa.func.count().label("all"),
            sa.func.count().filter(paused).label("paused"),
            sa.func.count().filter(failing).label("failing"),
            sa.func.min(lease.c.due_at).label("due_at"),
        )
        .select_from(account)
        .join(lease, lease.c.account_id == account.c.id)
        .where(account.c.removed_at.is_(None))
    ).one()
    quarantined = connection.execute(
        sa.select(sa.func.count())
        .select_from(sighting)
        .where(sighting.c.state == "quarantined", sighting.c.absent_at.is_(None))
    ).scalar_one()
    ok = row.all - row.paused - row.failing
    overdue = 0.0 if row.due_at is None else max(0.0, (now - row.due_at).total_seconds())
    return Standing({"ok": ok, "failing": row.failing, "paused": row.paused}, quarantined, overdue)

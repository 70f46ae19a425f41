"""What people ask of accounts: their state, their last polls, what needs attention. Reads only.

Nothing here counts messages, so no question grows with the archive.
"""

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db.account_columns import account_of
from archiver.db.tables import account, host, lease, mailbox, poll, sighting
from archiver.errors import Outcome
from archiver.model import Account, Counts
from archiver.states import AccountState, SightingState


class Quarantined(NamedTuple):
    """A message in quarantine. ``absent_at`` is set when the server does not list it any more."""

    uidl: bytes
    size: int
    reason: str | None
    attempts: int
    first_seen_at: datetime
    retry_at: datetime | None
    absent_at: datetime | None


def quarantined(connection: Connection, account_id: str) -> list[Quarantined]:
    """The messages of an account that are in quarantine, those gone since included."""
    of_message = sighting.c
    query = (
        sa.select(
            of_message.uidl,
            of_message.size,
            of_message.reason,
            of_message.attempts,
            of_message.first_seen_at,
            of_message.retry_at,
            of_message.absent_at,
        )
        .where(of_message.account_id == account_id, of_message.state == SightingState.QUARANTINED)
        .order_by(of_message.first_seen_at)
    )
    return [Quarantined(*row) for row in connection.execute(query)]


class PastPoll(NamedTuple):
    """A poll that ended."""

    counts: Counts
    token: int
    ended_at: datetime
    seconds: float
    outcome: Outcome
    listed: int | None
    to_come: int | None
    glanced: bool
    error: str | None


def polls(connection: Connection, account_id: str, limit: int) -> list[PastPoll]:
    """The last polls of an account, the newest first."""
    _, *others = PastPoll._fields
    columns = [poll.c[name] for name in (*others, *Counts.names())]
    query = (
        sa.select(*columns).where(poll.c.account_id == account_id).order_by(poll.c.token.desc()).limit(limit)
    )
    return [PastPoll(Counts.of(row), *row[: len(others)]) for row in connection.execute(query)]


class Due(NamedTuple):
    """What an account's schedule stands at."""

    due_at: datetime | None
    """None if it is not polled by schedule."""
    interval_seconds: float | None
    """The present interval, if it adapts."""
    failures: int
    queued: bool
    """Whether it is due and waits for a session at its host."""
    day: date | None
    """The last day (UTC) on which it fetched anything."""
    day_bytes: int | None
    """What it fetched on that day."""


def due(connection: Connection, account_id: str) -> Due:
    """What the account's schedule stands at."""
    row = connection.execute(
        sa.select(
            lease.c.due_at,
            lease.c.interval_seconds,
            lease.c.failures,
            lease.c.queued,
            mailbox.c.day,
            mailbox.c.day_bytes,
        )
        # An older release, which may run beside this one, adds accounts without a mailbox.
        .outerjoin(mailbox, mailbox.c.account_id == lease.c.account_id)
        .where(lease.c.account_id == account_id)
    ).one()
    return Due(row.due_at, row.interval_seconds, row.failures, bool(row.queued), row.day, row.day_bytes)


class AccountStatus(NamedTuple):
    """An account with its schedule, its archive, its mailbox and its last poll.

    ``listed``, ``to_come`` and ``quarantined`` are of the last listing; ``outcome``,
    ``error`` and ``ended_at`` of the last poll, listing or not.
    """

    account: Account
    due_at: datetime | None
    owner: str | None
    failures: int
    refusals: int
    looked_at: datetime | None
    late_at: datetime | None
    captures: int
    captured_bytes: int
    listed_at: datetime | None
    listed: int | None
    quarantined: int
    to_come: int
    outcome: Outcome | None
    error: str | None
    ended_at: datetime | None

    @property
    def is_failing(self) -> bool:
        """Whether the last poll failed."""
        return self.failures + self.refusals > 0


def account_states(connection: Connection, account_ids: Sequence[str] | None = None) -> list[AccountStatus]:
    """These accounts, or all, by name; removed ones too."""
    query = _states().order_by(account.c.name)
    if account_ids is not None:
        query = query.where(account.c.id.in_(account_ids))
    return [_status(row) for row in connection.execute(query)]


def need_attention(
    connection: Connection, now: datetime, *, lost: Sequence[str], limit: int | None
) -> list[AccountStatus]:
    """The accounts that need attention, the worst first.

    Those that lost messages (``lost`` names them) come first, then those that wait for
    an operator, fail, have deletion suspended, have messages in quarantine, are late;
    last those that were paused by hand.
    """
    troubles = [account.c.id.in_(lost), *_troubles(now)]
    worst = sa.case(*((wanted, number) for number, wanted in enumerate(troubles)), else_=None)
    query = _states().where(account.c.removed_at.is_(None), worst.is_not(None))
    return [_status(row) for row in connection.execute(query.order_by(worst, account.c.name).limit(limit))]


def added_at(connection: Connection, account_id: str) -> datetime:
    """When an account was first added."""
    at: datetime = connection.execute(
        sa.select(account.c.created_at).where(account.c.id == account_id)
    ).scalar_one()
    return at


def _states() -> sa.Select[Any]:
    # The newest poll is at the end of its account's part of the key: no need to read them all.
    newest = poll.alias("newest")
    token = (
        sa.select(sa.func.max(newest.c.token)).where(newest.c.account_id == account.c.id).scalar_subquery()
    )
    return (
        sa.select(account, *(column.label(f"of_{name}") for name, column in _STATUS.items()))
        .join(lease, lease.c.account_id == account.c.id)
        .join(mailbox, mailbox.c.account_id == account.c.id)
        .outerjoin(poll, sa.and_(poll.c.account_id == account.c.id, poll.c.token == token))
    )


_STATUS: dict[str, sa.ColumnElement[Any]] = {
    **{name: lease.c[name] for name in ("due_at", "owner", "failures", "refusals", "looked_at", "late_at")},
    **{
        name: mailbox.c[name]
        for name in ("captures", "captured_bytes", "listed_at", "listed", "quarantined", "to_come")
    },
    **{name: poll.c[name] for name in ("outcome", "error", "ended_at")},
}


def _status(row: Any) -> AccountStatus:
    return AccountStatus(account_of(row), **{name: getattr(row, f"of_{name}") for name in _STATUS})


_PAUSED = account.c.state != AccountState.ACTIVE
_FAILING = sa.and_(~_PAUSED, lease.c.failures + lease.c.refusals > 0)


def _troubles(now: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        account.c.state == AccountState.WAITING,
        _FAILING,
        account.c.deletion_suspended.is_not(None),
        mailbox.c.quarantined > 0,
        lease.c.late_at < now,
        _PAUSED,
    )


class Overview(NamedTuple):
    """All accounts together: by state, their messages, and what needs attention."""

    accounts: dict[str, int]
    """Number of accounts by word: ok, failing, paused (by hand, or waiting)."""
    quarantined: int
    overdue_seconds: float
    """By how much the most overdue account is late."""
    captures: int = 0
    """Messages in the archive, of removed accounts too."""
    captured_bytes: int = 0
    """Their size."""
    to_come: int = 0
    """Messages that were listed and are neither archived nor in quarantine."""
    never_polled: int = 0
    waiting: int = 0
    """Accounts that wait for an operator."""
    deletion_suspended: int = 0
    """Accounts whose deletion is suspended."""
    late: int = 0
    """Accounts without a successful poll for longer than scheduled."""
    hosts: int = 0
    """Mail hosts in trouble."""
    concerned: int = 0
    """Accounts with any of these troubles."""


def overview(connection: Connection, now: datetime) -> Overview:
    """All accounts together, in one pass over their narrow rows."""
    active = account.c.removed_at.is_(None)
    waiting, failing, suspended, _, late, paused = _troubles(now)

    def number(*wanted: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.count().filter(active, *wanted)

    row = connection.execute(
        sa.select(
            number().label("all"),
            number(paused).label("paused"),
            number(failing).label("failing"),
            number(waiting).label("waiting"),
            number(suspended).label("deletion_suspended"),
            number(late).label("late"),
            number(sa.or_(*_troubles(now))).label("concerned"),
            number(lease.c.token == 0).label("never_polled"),
            sa.func.coalesce(sa.func.sum(mailbox.c.captures), 0).label("captures"),
            sa.func.coalesce(sa.func.sum(mailbox.c.captured_bytes), 0).label("captured_bytes"),
            sa.func.coalesce(sa.func.sum(mailbox.c.to_come).filter(active), 0).label("to_come"),
            sa.func.coalesce(sa.func.sum(mailbox.c.quarantined).filter(active), 0).label("quarantined"),
            sa.func.min(lease.c.due_at).filter(active).label("due_at"),
        )
        .select_from(account)
        .join(lease, lease.c.account_id == account.c.id)
        .join(mailbox, mailbox.c.account_id == account.c.id)
    ).one()
    return Overview(
        accounts={
            "ok": row.all - row.paused - row.failing,
            "failing": row.failing,
            "paused": row.paused,
        },
        quarantined=int(row.quarantined),
        overdue_seconds=0.0 if row.due_at is None else max(0.0, (now - row.due_at).total_seconds()),
        captures=int(row.captures),
        captured_bytes=int(row.captured_bytes),
        to_come=int(row.to_come),
        never_polled=row.never_polled,
        waiting=row.waiting,
        deletion_suspended=row.deletion_suspended,
        late=row.late,
        concerned=row.concerned,
        hosts=connection.execute(sa.select(sa.func.count()).select_from(host)).scalar_one(),
    )

"""All accounts together, and each account's days: what is accounted for, and what needs attention.

Owns the facts that ``archiver status``, ``archiver account show`` and HTTP
report, and their form as JSON. Promises that no question counts messages, and
that no answer grows with the number of accounts unless all are requested.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy.engine import Connection

from archiver.db import history, hosts
from archiver.db import overview as reads
from archiver.db.history import Day, Gap
from archiver.states import AccountState

LOOK_BACK_DAYS = 7
"""Days for which losses and gaps are counted by default: longer than a long weekend."""

SHOWN = 20
"""Accounts, and mail hosts, that are named by default."""

NAMED_LOSSES = 1_000
"""Accounts with losses that are named at most. The number of losses always includes all accounts."""


@dataclass(frozen=True, slots=True)
class Concern:
    """An account that needs attention, and why: the worst first."""

    account: str
    troubles: tuple[str, ...]
    reason: str | None
    looked_at: datetime | None
    polled_at: datetime | None
    quarantined: int
    lost: int


@dataclass(frozen=True, slots=True)
class Overview:
    """All accounts together. ``lost`` and ``gaps`` (those that ended) count from ``since`` on."""

    standing: reads.Overview
    since: date
    lost: int
    gaps: int
    concerns: list[Concern]
    hosts: list[hosts.Trouble]
    days: list[Day] | None

    @property
    def needs_operator(self) -> bool:
        """Whether something needs an operator."""
        standing = self.standing
        return bool(
            standing.accounts["failing"]
            or standing.waiting
            or standing.quarantined
            or standing.deletion_suspended
        )


@dataclass(frozen=True, slots=True)
class Ledger:
    """An account's days, and the gaps among them."""

    days: list[Day]
    gaps: list[Gap]
    lost_ever: int
    now: datetime

    def gap_seconds(self, day: date) -> float:
        """How long, on that day so far, a successful poll was overdue."""
        return history.gap_seconds(self.gaps, day, self.now)


def overview(
    connection: Connection, now: datetime, *, days: int | None = None, limit: int | None = SHOWN
) -> Overview:
    """All accounts at this moment; with ``days``, also the totals of the last ``days`` days.

    Names up to ``limit`` accounts and hosts that need attention, or all of them.
    """
    today = now.astimezone(UTC).date()
    since = today - timedelta(days=(days or LOOK_BACK_DAYS) - 1)
    lost = history.losses(connection, since)
    most = sorted(lost, key=lambda account_id: (-lost[account_id], account_id))
    rows = reads.need_attention(
        connection, now, lost=most[: NAMED_LOSSES if limit is None else limit], limit=limit
    )
    return Overview(
        standing=reads.overview(connection, now),
        since=since,
        lost=sum(lost.values()),
        gaps=history.ended_gaps(connection, history.begin(since)),
        concerns=[_concern(row, now, lost.get(row.account.id, 0)) for row in rows],
        hosts=hosts.troubles(connection, limit=limit),
        days=None if days is None else history.days_of_all(connection, since, today),
    )


def ledger(connection: Connection, account_id: str, now: datetime, *, days: int) -> Ledger:
    """The last ``days`` days of an account, including today, but no day before it was added."""
    today = now.astimezone(UTC).date()
    first = today - timedelta(days=days - 1)
    added = reads.added_at(connection, account_id).date()
    first = min(max(first, added), today)
    return Ledger(
        days=history.days(connection, account_id, first, today),
        gaps=history.gaps(connection, account_id, history.begin(first), now),
        lost_ever=history.lost(connection, account_id),
        now=now,
    )


def _concern(row: reads.AccountStatus, now: datetime, lost: int) -> Concern:
    account = row.account
    troubles = {
        "lost messages": lost > 0,
        "paused": account.state is AccountState.PAUSED,
        "waiting": account.state is AccountState.WAITING,
        "failing": row.is_failing and account.state is AccountState.ACTIVE,
        "deletion suspended": account.deletion_suspended is not None,
        "quarantine": row.quarantined > 0,
        "not looked into": row.late_at is not None and row.late_at < now,
    }
    return Concern(
        account=account.name,
        troubles=tuple(name for name, found in troubles.items() if found),
        reason=account.state_reason or (row.error if row.is_failing else None) or account.deletion_suspended,
        looked_at=row.looked_at,
        polled_at=row.ended_at,
        quarantined=row.quarantined,
        lost=lost,
    )


# As JSON, for the command line and HTTP. Fields are only ever added.


def overview_json(found: Overview, *, deletion_forbidden: bool) -> dict[str, Any]:
    """``deletion_forbidden`` is a setting: nothing is deleted, whatever the accounts' policies."""
    standing = found.standing
    return {
        "accounts": sum(standing.accounts.values()),
        "captures": standing.captures,
        "bytes": standing.captured_bytes,
        "unaccounted": standing.to_come,
        "quarantined": standing.quarantined,
        "failing": standing.accounts["failing"],
        "paused": standing.accounts["paused"],
        "never_polled": standing.never_polled,
        "waiting": standing.waiting,
        "deletion_suspended": standing.deletion_suspended,
        "deletion_forbidden": deletion_forbidden,
        "late": standing.late,
        "failing_hosts": standing.hosts,
        "since": found.since.isoformat(),
        "lost": found.lost,
        "gaps": found.gaps,
        "attention": [_concern_json(concern) for concern in found.concerns],
        "hosts": [_host_json(row) for row in found.hosts],
    } | ({} if found.days is None else {"days": [day_json(day) for day in found.days]})


def ledger_json(found: Ledger) -> dict[str, Any]:
    return {
        "lost": found.lost_ever,
        "days": [day_json(day) | {"gap_seconds": round(found.gap_seconds(day.day), 3)} for day in found.days],
        "gaps": gaps_json(found.gaps),
    }


def day_json(day: Day) -> dict[str, Any]:
    return {
        "day": day.day.isoformat(),
        "polls": day.polls,
        "failed": day.failed,
        "looks": day.looks,
        "listed": day.listed,
        "archived": day.archived,
        "quarantined": day.quarantined,
        "to_come": day.to_come,
        **{name: getattr(day, name) for name in history.FLOWS if name != "fetched_bytes"},
        "bytes": day.fetched_bytes,
        "seconds": round(day.seconds, 3),
        "first_look_at": _iso(day.first_look_at),
        "last_look_at": _iso(day.last_look_at),
    }


def gaps_json(gaps: Iterable[Gap]) -> list[dict[str, Any]]:
    return [{"from": _iso(gap.since), "to": _iso(gap.until)} for gap in gaps]


def _concern_json(concern: Concern) -> dict[str, Any]:
    return {
        "account": concern.account,
        "troubles": list(concern.troubles),
        "reason": concern.reason,
        "looked_at": _iso(concern.looked_at),
        "last_poll_at": _iso(concern.polled_at),
        "quarantined": concern.quarantined,
        "lost": concern.lost,
    }


def _host_json(row: hosts.Trouble) -> dict[str, Any]:
    return {
        "host": row.host,
        "failures": row.failures,
        "failing_since": _iso(row.failing_since),
        "retry_at": _iso(row.retry_at),
        "error": row.error,
    }


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()

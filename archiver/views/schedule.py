"""An account's schedule at one moment: when it is polled next, what it may fetch, and why it waits."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy.engine import Connection

from archiver.db import hosts, overview
from archiver.db.hosts import Trouble
from archiver.model import Account, mail_host
from archiver.states import AccountState
from archiver.timetable import Timetable


class Waits(StrEnum):
    """Why an account is not polled now, although it is active."""

    HOST_FAILING = "host_failing"
    """Its host fails for many accounts, and is tried with one of them."""
    BLACKOUT = "blackout"
    """Its blackout window has begun."""
    NO_SESSION = "no_session"
    """It is due, and its host has as many sessions as it may have."""
    BACKING_OFF = "backing_off"
    """Its last polls failed."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """An account's schedule at one moment."""

    account: Account
    due_at: datetime | None
    """None if it is not polled by schedule: it is paused, waiting or removed."""
    interval_seconds: float | None
    """The present interval, if it adapts and the account was polled."""
    failures: int
    """Polls that failed since the last successful one."""
    trouble: Trouble | None
    """Its host's, if that fails."""
    waits: Waits | None
    waits_until: datetime | None
    """When the reason ends or is tried, if that is known."""
    fetched_today: int
    """Bytes, of this day (UTC)."""
    day_bytes: int | None
    """How many bytes it may fetch in a day: the account's own limit, or the service's."""


def schedule(connection: Connection, account: Account, now: datetime, day_bytes: int | None) -> Schedule:
    """How the account's schedule stands. ``day_bytes`` is the service's limit."""
    row = overview.due(connection, account.id)
    troubles = hosts.troubles(connection, mail_host(account.url))
    trouble = troubles[0] if troubles else None
    waits, until = _waits(account, now, row, trouble)
    return Schedule(
        account,
        row.due_at,
        row.interval_seconds,
        row.failures,
        trouble,
        waits,
        until,
        (row.day_bytes or 0) if row.day == now.astimezone(UTC).date() else 0,
        account.day_bytes or day_bytes,
    )


def _waits(
    account: Account, now: datetime, row: overview.Due, trouble: Trouble | None
) -> tuple[Waits | None, datetime | None]:
    if account.state is not AccountState.ACTIVE:
        return None, None
    if trouble is not None and trouble.retry_at is not None:
        return Waits.HOST_FAILING, max(trouble.retry_at, now)
    blackout_until = _blackout_until(account, now)
    if blackout_until is not None:
        return Waits.BLACKOUT, blackout_until
    if row.queued:
        return Waits.NO_SESSION, None
    if row.failures and row.due_at is not None and row.due_at > now:
        return Waits.BACKING_OFF, row.due_at
    return None, None


def _blackout_until(account: Account, now: datetime) -> datetime | None:
    try:
        return Timetable.of(account).blackout_ends(now)
    except ValueError:
        # The database may hold a time zone that this machine does not know.
        return None


def schedule_json(found: Schedule) -> dict[str, Any]:
    """The schedule's state; its settings are the account's."""
    return {
        "interval_now_seconds": found.interval_seconds,
        "day_bytes": found.day_bytes,
        "fetched_today": found.fetched_today,
        "waits_because": found.waits,
        "waits_until": found.waits_until,
    }

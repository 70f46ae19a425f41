"""What people are told of an account's schedule: when it is polled, why not now, and what it may fetch."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from archiver.cli.output import ago, one_line, size
from archiver.states import AccountState

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from archiver.db.hosts import Trouble
    from archiver.model import Account


@dataclass(frozen=True, slots=True)
class ScheduleShown:
    """An account's schedule at one moment."""

    account: "Account"
    now: datetime
    due_at: datetime | None
    stands_at: float | None
    failures: int
    queued: bool
    trouble: "Trouble | None"
    blackout_until: datetime | None
    fetched_today: int
    day_bytes: int | None

    @classmethod
    def of(cls, connection: "Connection", account: "Account", now: datetime, day_bytes: int | None) -> Self:
        import sqlalchemy as sa

        from archiver.db import hosts
        from archiver.db.tables import lease, mailbox
        from archiver.model import mail_host
        from archiver.timetable import Timetable

        row = connection.execute(
            sa.select(lease, mailbox.c.day, mailbox.c.day_bytes)
            .outerjoin(mailbox, mailbox.c.account_id == lease.c.account_id)
            .where(lease.c.account_id == account.id)
        ).one()
        troubles = hosts.troubles(connection, mail_host(account.url))
        try:
            blackout_until = Timetable.of(account).blackout_ends(now)
        except ValueError:
            blackout_until = None
        return cls(
            account,
            now,
            row.due_at,
            row.interval_seconds,
            row.failures,
            bool(row.queued),
            troubles[0] if troubles else None,
            blackout_until,
            row.day_bytes if row.day == now.astimezone(UTC).date() else 0,
            account.day_bytes or day_bytes,
        )

    def as_json(self) -> dict[str, Any]:
        account = self.account
        return {
            "cron": account.cron,
            "time_zone": account.time_zone,
            "interval_max_seconds": account.interval_max_seconds,
            "interval_now_seconds": self.stands_at,
            "blackout": account.blackout or None,
            "day_bytes": self.day_bytes,
            "fetched_today": self.fetched_today,
            "waits_because": self.waits_because(),
        }

    def lines(self) -> list[str]:
        account = self.account
        if account.cron is not None:
            how = f"polled at {account.cron!r} in {account.time_zone}"
        elif account.interval_max_seconds is None:
            how = f"polled every {account.interval_seconds:g} s"
        else:
            how = (
                f"polled every {account.interval_seconds:g} to {account.interval_max_seconds:g} s: "
                + self._where_it_stands()
            )
        lines = [how]
        if account.blackout:
            lines.append(f"not polled {account.blackout} ({account.time_zone})")
        if self.day_bytes is not None:
            lines.append(f"fetched today (UTC): {size(self.fetched_today)} of {size(self.day_bytes)}")
        because = self.waits_because()
        return lines if because is None else [*lines, f"waits because {because}"]

    def _where_it_stands(self) -> str:
        if self.stands_at is None:
            return "not polled yet"
        why = "mail came" if self.stands_at <= self.account.interval_seconds else "no mail came"
        return f"{self.stands_at:g} s at present, since {why}"

    def waits_because(self) -> str | None:
        """Why it is not polled although it may be due; None where nothing keeps it."""
        trouble = self.trouble
        if self.account.state is not AccountState.ACTIVE:
            return None
        if trouble is not None and trouble.retry_at is not None:
            return (
                f"its host {trouble.host} fails since {ago(trouble.failing_since, self.now)} "
                f"({trouble.failures} polls could not begin: {one_line(trouble.error or '')}); "
                f"tried again {ago(max(trouble.retry_at, self.now), self.now)}"
            )
        if self.blackout_until is not None:
            return f"it is not to be polled before {self.blackout_until:%Y-%m-%d %H:%M} UTC"
        if self.queued:
            return "its host has as many sessions as it may have at once"
        if self.failures and self.due_at is not None and self.due_at > self.now:
            return f"{self.failures} polls failed; again {ago(self.due_at, self.now)}"
        return None

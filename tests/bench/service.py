"""The real service under the clock: ``archiver run``, whose accounts fall due when a turn says so.

Owns the process from its start to its end, and what its accounts' rows must say
for that: nobody is due but while ``polled`` measures. What came of each poll is
read from the archive's own table of polls, so that the service does its usual
work and no other, and a turn that did something else than it claims is refused.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from archiver.db import Database, now
from archiver.db.tables import account, lease, mailbox
from archiver.db.tables import poll as poll_table
from tests.bench.machine import BenchError, Cost, cpu_seconds_of, machine_cpu_seconds, peak_bytes_of
from tests.harness.cli import Running, cli, wait_for

_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 120.0
_STOP_SECONDS = 30.0
_LOOKS = 3
"""Within so many polls a mailbox that nobody touches must be one that need not be listed."""

AT_ONCE_SECONDS = 0.0001
"""An interval after which an account is due again when its poll has ended."""
ONCE_SECONDS = 3600.0
"""An interval that no turn outlasts."""


class Service:
    """``archiver run`` that is ready, with nobody due. Made by ``service``."""

    def __init__(
        self, running: Running, database: Database, interval_seconds: float, start_seconds: float
    ) -> None:
        self._running = running
        self._database = database
        self._interval_seconds = interval_seconds
        self._start_seconds = start_seconds

    def settle(self) -> None:
        """Poll each account until all of them were found to be unchanged without a listing."""
        for _ in range(_LOOKS):
            if all(row.glanced for row in self._polls(self._accounts())[1]):
                return
        raise BenchError(f"after {_LOOKS} polls there are mailboxes that are listed still")

    def distrust(self) -> None:
        """Have the next poll of each account list its mailbox whole, as one does every few hours."""
        self._write(lambda _: sa.update(mailbox).values(trusted_until=None))

    def polled(self, polls: int | None = None) -> Cost:
        """Have all accounts due at once, and wait for so many polls: one of each, if nobody says more.

        Seconds are from the first poll's begin to the moment when the database
        shows the last one ended. The second at most that the service's clock
        lets pass before the first is not in them, but its CPU is.
        """
        machine, cpu = machine_cpu_seconds(), cpu_seconds_of(self._running.pid)
        ended_at, rows = self._polls(polls or self._accounts())
        cpu, machine = cpu_seconds_of(self._running.pid) - cpu, machine_cpu_seconds() - machine
        # A poll may have begun in the moment between the last look and its answer.
        ended_at = max(ended_at, *(row.ended_at for row in rows))
        began_at = min(row.ended_at - timedelta(seconds=row.seconds) for row in rows)
        return Cost(
            seconds=(ended_at - began_at).total_seconds(),
            client_cpu_seconds=cpu,
            machine_cpu_seconds=machine,
            peak_bytes=peak_bytes_of(self._running.pid),
            start_seconds=self._start_seconds,
            told={
                "polls": len(rows),
                "accounts": len({row.account_id for row in rows}),
                "glanced": sum(row.glanced for row in rows),
                "listed": sum(row.listed or 0 for row in rows),
                "new": sum(row.new for row in rows),
            },
        )

    def _accounts(self) -> int:
        with self._database.reading() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(account)).scalar_one())

    def _polls(self, count: int) -> tuple[datetime, Sequence[Any]]:
        """When so many had ended, and all that there were. Nobody is due, and nobody polled, at the end."""
        before = self._ended()
        self._write(lambda _: sa.update(account).values(interval_seconds=self._interval_seconds))
        self._write(lambda connection: sa.update(lease).values(due_at=now(connection)))
        wait_for(
            lambda: self._ended() >= before + count,
            f"{count} polls",
            seconds=_PATIENCE_SECONDS,
            every_seconds=_LOOK_SECONDS,
        )
        ended_at = datetime.now(UTC)
        # Whose poll goes on is due again when it ends; the next one has this interval.
        self._write(lambda _: sa.update(account).values(interval_seconds=ONCE_SECONDS))
        wait_for(self._nobody_is_polled, "nobody polled", every_seconds=_LOOK_SECONDS)
        self._write(lambda _: sa.update(lease).values(due_at=None))
        with self._database.reading() as connection:
            newest = sa.select(poll_table).order_by(poll_table.c.ended_at.desc(), poll_table.c.token.desc())
            rows = connection.execute(newest.limit(self._ended() - before)).all()
        if failed := [row for row in rows if row.outcome != "ok"]:
            raise BenchError(f"{len(failed)} of {len(rows)} polls failed: {failed[0].error}")
        return ended_at, rows

    def _ended(self) -> int:
        with self._database.reading() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(poll_table)).scalar_one())

    def _nobody_is_polled(self) -> bool:
        with self._database.reading() as connection:
            held = sa.select(lease.c.account_id).where(lease.c.owner.is_not(None)).limit(1)
            return connection.execute(held).first() is None

    def _write(self, statement: Callable[[Any], sa.Update]) -> None:
        self._database.transact(lambda connection: connection.execute(statement(connection)))


@contextmanager
def service(
    environment: dict[str, str], place: Path, *, url: str, password: str, polls: int, interval_seconds: float
) -> Iterator[Service]:
    """The service of an archive whose accounts exist, polling so many at once; stopped in good order.

    ``url`` is where each account's mailbox is, with {} for its name.
    """
    secret = place / "secret"
    secret.write_text(password)
    database = Database(environment["ARCHIVER_DATABASE_URL"])
    try:
        _prepare(database, url, f"file:{secret}", interval_seconds)
        settings = environment | {
            "ARCHIVER_WORKERS": str(polls),
            "ARCHIVER_HOST_SESSIONS": str(polls),
            "ARCHIVER_RAMP_SECONDS": "0",
        }
        with cli(place / "service", settings) as commands:
            running = commands.start("run")
            wait_for(lambda: running.has_ended or running.log("service.started"), "the service's start")
            if running.has_ended:
                raise BenchError(f"archiver run ended: {running.wait()}")
            yield Service(running, database, interval_seconds, time.monotonic() - running.started_at)
            running.terminate()
            if (code := running.wait(_STOP_SECONDS).code) != 0:
                raise BenchError(f"archiver run ended with code {code}")
    finally:
        database.close()


def _prepare(database: Database, url: str, secret: str, interval_seconds: float) -> None:
    """Accounts as the service is to find them: it reads their passwords itself, and nobody is due."""
    before, after = url.split("{}")

    def change(connection: sa.Connection) -> None:
        connection.execute(
            sa.update(account).values(
                url=sa.literal(before).concat(account.c.name).concat(after),
                secret_reference=secret,
                interval_seconds=interval_seconds,
            )
        )
        connection.execute(sa.update(lease).values(due_at=None))

    database.transact(change)

"""Many mailboxes and the real service: what a poll costs, who waits for whom, what it keeps in memory.

Run it by ``python -m tests.bench.fleet accounts|far|fairness|memory|soak``. A real
``archiver run`` polls a server that does no work of its own; PostgreSQL is
real, and the store is a directory. CPU is that of the processes themselves.

``accounts``: mailboxes in which next to nothing is new, a thousand and a
hundred thousand by turns, as fast as they go.
``far``: two thousand mailboxes with nothing new, whose server takes a fifth of a
second for each answer; with 64, 256 and 1,024 at once.
``fairness``: how late a thousand mailboxes are polled, alone and beside one with
200,000 messages to fetch and ten that hang.
``memory``: three hundred polls at once, each in the middle of its messages.
``soak``: full load for as long as is asked for, and how the memory goes.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psycopg
from rich.console import Console
from rich.table import Table

from archiver.db import Database, migrate
from tests.bench.machine import cpu_seconds_of
from tests.harness.cli import Cli, Running, cli, wait_for
from tests.harness.many_mailboxes import PASSWORD, ManyMailboxes, many_mailboxes
from tests.harness.postgres import Postgres, postgres

_LATE_EVERY_SECONDS = 0.1


class Cost(NamedTuple):
    """What a span of time held: polls, and the CPU that the service and PostgreSQL spent on them."""

    polls: int
    seconds: float
    service_ms: float
    database_ms: float

    @property
    def rate(self) -> float:
        return self.polls / self.seconds


@dataclass(frozen=True, slots=True)
class Fleet:
    """The parts of a bench."""

    place: Path
    mail: ManyMailboxes
    server: Postgres

    @contextmanager
    def service(self, database_url: str, **settings: object) -> Iterator[tuple[Cli, Running]]:
        """``archiver run`` on this database, stopped in good order."""
        place = Path(tempfile.mkdtemp(dir=self.place))
        environment = {
            "ARCHIVER_DATABASE_URL": database_url,
            "ARCHIVER_STORE_URL": f"file:{place / 'store'}",
            "ARCHIVER_LOG_LEVEL": "warning",
            "BENCH_PASSWORD": PASSWORD,
            "MALLOC_ARENA_MAX": "2",  # as in the image
            **{f"ARCHIVER_{name.upper()}": str(value) for name, value in settings.items()},
        }
        with cli(place / "cli", environment) as commands:
            running = commands.start("run")
            yield commands, running
            running.terminate()
            running.wait(60)

    def database(self, name: str, users: Iterable[str], interval_seconds: float) -> str:
        """A new database with an account, due now, for each of these users; returns its URL."""
        url = self.server.create_database(name)
        database = Database(url)
        migrate.upgrade(database)
        database.close()
        self.add(url, users, interval_seconds)
        return url

    def add(self, url: str, users: Iterable[str], interval_seconds: float) -> None:
        """Add accounts by the thousands."""
        with psycopg.connect(url) as connection:
            columns = "id, name, url, tls, secret, delete_policy, interval_seconds, epoch, "
            columns += "tls_pins, tls_minimum, created_at"
            with connection.cursor().copy(f"COPY account ({columns}) FROM STDIN") as copy:
                for user in users:
                    fields = (self.mail.url(user), "none", "env:BENCH_PASSWORD", "never", interval_seconds)
                    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                    copy.write_row((os.urandom(8).hex(), user, *fields, 1, "", "1.2", now))
            connection.execute(
                "INSERT INTO lease (account_id, due_at, token, recover, failures, refusals, host) "
                "SELECT id, now(), 0, false, 0, 0, split_part(split_part(url, '@', 2), ':', 1) FROM account "
                "WHERE id NOT IN (SELECT account_id FROM lease)"
            )
            connection.execute(
                "INSERT INTO journal (account_id, sequence, digest, written_at) "
                "SELECT id, 0, decode(repeat('00', 32), 'hex'), now() FROM account "
                "WHERE id NOT IN (SELECT account_id FROM journal)"
            )
            connection.execute(
                "INSERT INTO mailbox (account_id, captures, captured_bytes, quarantined, to_come, day_bytes) "
                "SELECT id, 0, 0, 0, 0, 0 FROM account WHERE id NOT IN (SELECT account_id FROM mailbox)"
            )
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("ANALYZE")

    def polls(self) -> int:
        return int(self.mail.counts()["commands"].get("QUIT", 0))

    def wait_for_polls(self, count: int) -> None:
        """Until so many polls have ended from now on."""
        before = self.polls()
        wait_for(lambda: self.polls() >= before + count, f"{count} polls", seconds=600)

    def cost(self, running: Running, seconds: float) -> Cost:
        """What the service and PostgreSQL do in so many seconds from now."""
        polls, began = self.polls(), time.monotonic()
        service, database = cpu_seconds_of(running.pid), cpu_seconds_of(self.server.pid)
        time.sleep(seconds)
        spent = time.monotonic() - began
        return Cost(
            self.polls() - polls,
            spent,
            (cpu_seconds_of(running.pid) - service) * 1000,
            (cpu_seconds_of(self.server.pid) - database) * 1000,
        )


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def accounts(fleet: Fleet, console: Console, seconds: float) -> None:
    """A thousand and a hundred thousand accounts by turns; one mailbox in a hundred has something new."""
    costs: dict[int, list[Cost]] = {1_000: [], 100_000: []}
    urls = {}
    for count in costs:
        users = (f"{'grow' if n % 100 == 0 else 'keep'}-{count}x{n}-0-2000" for n in range(count))
        urls[count] = fleet.database(f"fleet_{count}", users, 0.001)
        with psycopg.connect(urls[count]) as connection:
            # As if each had been listed, and found empty, a moment ago.
            connection.execute(
                "UPDATE mailbox SET listed_at = now(), listed = 0, stat_count = 0, stat_size = 0, "
                "trusted_until = now() + interval '3 hours'"
            )
    for turn in range(3):
        for count, found in costs.items():
            with fleet.service(urls[count], host_sessions=64) as (_, running):
                fleet.wait_for_polls(500)
                listed = fleet.mail.counts()["commands"].get("LIST", 0)
                cost = fleet.cost(running, seconds)
                listed = fleet.mail.counts()["commands"].get("LIST", 0) - listed
                if listed > cost.polls / 10:
                    raise RuntimeError(
                        f"{listed} of {cost.polls} mailboxes were listed: they looked unchanged"
                    )
            if turn:  # the first one warms up
                found.append(cost)
    table = Table("accounts", "polls/s", "service, ms CPU each", "PostgreSQL, ms CPU each")
    for count, found in costs.items():
        table.add_row(
            f"{count:,}",
            f"{statistics.median(cost.rate for cost in found):.0f}",
            f"{statistics.median(cost.service_ms / cost.polls for cost in found):.2f}",
            f"{statistics.median(cost.database_ms / cost.polls for cost in found):.2f}",
        )
    console.print(table)


def far(fleet: Fleet, console: Console, seconds: float) -> None:
    """How many polls at once a process can have, and what they cost it."""
    users = [f"far-{n}-3-2000" for n in range(2_000)]
    url = fleet.database("far", users, 0.001)
    table = Table("at once", "polls/s", "cores of the service", "ms CPU each", "PostgreSQL, ms", "most MB")
    for workers in (64, 256, 1_024):
        with fleet.service(url, workers=workers, host_sessions=workers, ramp_seconds=1) as (_, running):
            fleet.wait_for_polls(2 * len(users))  # each was listed, and looked at
            cost = fleet.cost(running, seconds)
            peak = running.peak_resident_bytes() or 0
        table.add_row(
            f"{workers:,}",
            f"{cost.rate:.0f}",
            f"{cost.service_ms / 1000 / cost.seconds:.2f}",
            f"{cost.service_ms / cost.polls:.2f}",
            f"{cost.database_ms / cost.polls:.2f}",
            f"{peak / 1e6:.0f}",
        )
    console.print(table)


def fairness(fleet: Fleet, console: Console, seconds: float) -> None:
    """How late others are polled, before and after trouble moves in."""
    url = fleet.database("fair", (f"keep-{n}-3-2000" for n in range(1_000)), 20.0)
    table = Table("a thousand mailboxes", "polls", "late on average, s", "latest, s")
    with fleet.service(url, host_sessions=64, interval_seconds=20) as _:
        fleet.wait_for_polls(2_000)
        table.add_row("alone", *_late(fleet, url, seconds))
        trouble = ["keep-huge-200000-2000", *(f"hang-{n}-0-0" for n in range(10))]
        fleet.add(url, trouble, 20.0)
        time.sleep(5)
        table.add_row("beside 200,000 messages and ten that hang", *_late(fleet, url, seconds))
    console.print(table)


def _late(fleet: Fleet, url: str, seconds: float) -> tuple[str, str, str]:
    """How late the quiet mailboxes are polled: by Little's law, from how many wait at any moment."""
    waiting: list[int] = []
    latest = 0.0
    before, began = fleet.polls(), time.monotonic()
    query = (
        "SELECT count(*), coalesce(extract(epoch FROM max(now() - due_at)), 0) FROM lease "
        "JOIN account ON account.id = account_id "
        "WHERE due_at <= now() AND owner IS NULL AND name LIKE 'keep-%' AND name NOT LIKE 'keep-huge-%'"
    )
    with psycopg.connect(url, autocommit=True) as connection:
        while time.monotonic() < began + seconds:
            row = connection.execute(query).fetchone()
            if row is None:
                raise RuntimeError("no answer")
            waiting.append(row[0])
            latest = max(latest, float(row[1]))
            time.sleep(_LATE_EVERY_SECONDS)
    polls = fleet.polls() - before
    mean = statistics.mean(waiting) * (time.monotonic() - began) / max(polls, 1)
    return f"{polls}", f"{mean:.2f}", f"{latest:.2f}"


def memory(fleet: Fleet, console: Console, seconds: float) -> None:
    """Three hundred polls at once, each of a mailbox that takes longer than the measurement."""
    url = fleet.database("memory", (f"slow-{n}-1000-80000" for n in range(300)), 300.0)
    with fleet.service(url, workers=300, host_sessions=1_000, ramp_seconds=1, database_connections=20) as (
        _,
        running,
    ):
        wait_for(lambda: fleet.mail.counts()["commands"].get("PASS", 0) >= 300, "300 sessions", seconds=120)
        time.sleep(seconds)
        peak = running.peak_resident_bytes() or 0
        logins = len(fleet.mail.counts()["logins"])
    console.print(f"{logins} polls at once, each in the middle of its messages: at most {peak / 1e6:.0f} MB")


def soak(fleet: Fleet, console: Console, seconds: float) -> None:
    """Full load, and the memory at the end of each twentieth of the time.

    Half of the mailboxes have a new message each time, and none gets larger:
    that would take more memory by right.
    """
    users = (f"{'roll' if n % 2 else 'keep'}-{n}-5-20000" for n in range(1_000))
    url = fleet.database("soak", users, 0.1)
    with fleet.service(url, host_sessions=64) as (_, running):
        began, before = time.monotonic(), fleet.polls()
        for _ in range(20):
            time.sleep(seconds / 20)
            passed, polls = time.monotonic() - began, fleet.polls() - before
            console.print(f"{passed:6.0f} s {polls:9,} polls {_resident_mb(running.pid):7.1f} MB resident")


_BENCHES = {"accounts": accounts, "far": far, "fairness": fairness, "memory": memory, "soak": soak}
_SECONDS = {"accounts": 20.0, "far": 20.0, "fairness": 120.0, "memory": 60.0, "soak": 3600.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=_BENCHES)
    parser.add_argument("--seconds", type=float, help="of each measurement")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="archiver-fleet-", ignore_cleanup_errors=True) as name:
        place = Path(name)
        place.chmod(0o755)
        with many_mailboxes(place / "mail.log") as mail, postgres(place / "pg") as server:
            seconds = asked.seconds or _SECONDS[asked.what]
            _BENCHES[asked.what](Fleet(place, mail, server), Console(width=100), seconds)


if __name__ == "__main__":
    main()

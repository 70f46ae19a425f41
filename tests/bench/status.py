"""What status costs at a hundred thousand accounts, on SQLite and on PostgreSQL.

Run it by ``python -m tests.bench.status [ACCOUNTS]``. Each account has a week of
days that were added up, and ten polls of today that were not yet; one in a
thousand fails. The functions are those that commands, HTTP and metrics call.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from archiver.db import Database, history, migrate, overview
from archiver.db.tables import account, lease, mailbox, poll, poll_day
from archiver.views import status as view
from tests.harness.postgres import postgres

_ACCOUNTS, _POLLS, _COUNTED, _DAYS = 100_000, 10, 1_000, 7
_ROUNDS, _AT_ONCE = 5, 5_000


def fill(database: Database, count: int, now: datetime) -> None:
    for start in range(0, count, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, count))
        database.transact(partial(_add_accounts, numbers=numbers, now=now))
    database.transact(partial(_add_history, now=now))
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")


def _add_accounts(connection: sa.Connection, numbers: range, now: datetime) -> None:
    accounts = [
        {
            "id": f"{number:016x}",
            "name": f"account {number}",
            "url": f"pop3s://user{number}@mail{number % 500}.example.com",
            "tls": "implicit",
            "secret": "env:P",
            "delete_policy": "never",
            "interval_seconds": 300.0,
            "pipelining": True,
            "epoch": 1,
            "tls_pins": "",
            "tls_minimum": "1.2",
            "created_at": now - timedelta(days=30),
        }
        for number in numbers
    ]
    leases = [
        {
            "account_id": f"{number:016x}",
            "due_at": now + timedelta(seconds=number % 300),
            "token": _COUNTED + _POLLS,
            "recover": False,
            "failures": int(number % 1_000 == 0),
            "refusals": 0,
            "looked_at": now - timedelta(seconds=300),
            "late_at": now + timedelta(seconds=-1 if number % 1_000 == 0 else 300),
        }
        for number in numbers
    ]
    connection.execute(sa.insert(account), accounts)
    connection.execute(sa.insert(lease), leases)


def _add_history(connection: sa.Connection, now: datetime) -> None:
    """The same for each account, but that nothing is listed where polls fail; made where the rows are."""
    well = lease.c.failures == 0
    counts = {"new": 3, "delete_requested": 0, "fetched_bytes": 150_000}
    shown = {"listed": 20, "quarantined": 0, "to_come": 0}
    _for_each_account(
        connection,
        mailbox,
        shown | {"captures": 1_000, "captured_bytes": 50_000_000, "day_bytes": 0, "counted": _COUNTED},
    )
    for index in range(_POLLS):
        ended_at = max(history.begin(now.date()), now - timedelta(seconds=300 * (_POLLS - index)))
        once = {"token": _COUNTED + 1 + index, "ended_at": ended_at, "seconds": 0.1, "known": 17}
        outcome = {
            "outcome": sa.case((well, "ok"), else_="try_later"),
            "listed": sa.case((well, 20)),
            "to_come": sa.case((well, 0)),
        }
        _for_each_account(connection, poll, counts | shown | once | outcome)
    for back in range(1, _DAYS):
        times = {"day": now.date() - timedelta(days=back), "polls": 288, "failed": 0, "looks": 288}
        gone = {"deleted": 0, "gone": 0, "lost": lease.c.failures, "archived": 20, "seconds": 30.0}
        _for_each_account(connection, poll_day, counts | shown | times | gone)


def _for_each_account(connection: sa.Connection, into: sa.Table, values: dict[str, Any]) -> None:
    columns = [
        value if isinstance(value, sa.ColumnElement) else sa.literal(value, into.c[name].type)
        for name, value in values.items()
    ]
    connection.execute(
        sa.insert(into).from_select(
            ["account_id", *values],
            sa.select(lease.c.account_id, *columns).order_by(lease.c.account_id),
            include_defaults=False,
        )
    )


def measure(database: Database, count: int, now: datetime) -> dict[str, float]:
    one = f"{count // 2:016x}"
    questions: dict[str, Callable[[sa.Connection], object]] = {
        "metrics (standing)": lambda connection: overview.overview(connection, now),
        "status": lambda connection: view.overview(connection, now),
        f"status --days {_DAYS}": lambda connection: view.overview(connection, now, days=_DAYS),
        "status --all": lambda connection: view.overview(connection, now, limit=None),
        "account show: state": lambda connection: overview.account_states(connection, [one]),
        "account show: days": lambda connection: view.ledger(connection, one, now, days=30),
        "account list": overview.account_states,
    }
    found: dict[str, float] = {}
    for name, question in questions.items():
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            with database.reading() as connection:
                question(connection)
            times.append(time.perf_counter() - began)
        found[name] = statistics.median(times)
    began = time.perf_counter()
    done = history.tidy(database, now=now, keep_days=30)
    found[f"tidy, {done.counted} polls"] = time.perf_counter() - began
    began = time.perf_counter()
    history.tidy(database, now=now, keep_days=30)
    found["tidy, nothing to do"] = time.perf_counter() - began
    return found


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else _ACCOUNTS
    now = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="archiver-bench-", ignore_cleanup_errors=True) as name:
        place = Path(name)
        place.chmod(0o755)
        with postgres(place / "pg") as server:
            urls = {
                "SQLite": f"sqlite:///{place / 'archiver.db'}",
                "PostgreSQL": server.create_database("bench"),
            }
            for kind, url in urls.items():
                database = Database(url)
                migrate.upgrade(database)
                fill(database, count, now)
                for what, seconds in measure(database, count, now).items():
                    sys.stdout.write(f"{kind:11} {count} accounts  {what:24} {seconds * 1000:9.1f} ms\n")
                    sys.stdout.flush()
                database.close()


if __name__ == "__main__":
    main()

"""What the database's hot statements cost in a hundred million rows, beside a million.

Run it by ``python -m tests.bench.scale DIRECTORY [--sightings N]``. It makes two
databases in one PostgreSQL, kept in DIRECTORY so that a second run only
measures: the rows are synthetic, the schema is that of the migrations, and each
account's rows lie scattered as years of polls leave them. Then the functions
that polls call take turns on both. Each works on as many accounts as the small
database has, once before the clock runs: it is the cost of depth that is
measured, not that of a disk which has to fetch what nobody asked for in weeks.
A hundred million rows take about 30 GB and half an hour to make.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psycopg
import sqlalchemy as sa
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from archiver.db import Database, captures, migrate, record, sightings
from archiver.db.before import before_poll
from archiver.model import Claim, Resolved, Segment, ServerRecord, SightingKey, What
from tests.harness.postgres import Postgres

_SIGHTINGS_EACH = 1_000
_PRESENT_EACH = 50
_CAPTURES_EACH = 100
_SMALL_ACCOUNTS = 1_000
_BATCH, _ROUNDS, _CALLS = 10, 7, 300
_LOADERS = 2

_SETTINGS = {
    "shared_buffers": "4GB",
    "maintenance_work_mem": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "max_parallel_maintenance_workers": "0",
}

_ACCOUNTS = """
INSERT INTO account (id, name, url, tls, secret, delete_policy, interval_seconds, epoch,
                     tls_pins, tls_minimum, created_at)
SELECT substr(md5(n::text), 1, 16), 'mailbox-' || n, 'pop3s://user' || n || '@mail' || n % 500 || '.example',
       'implicit', 'env:NONE', 'never', 300, 1, '', '1.2', now()
FROM generate_series(1, {accounts}) AS n;
INSERT INTO lease (account_id, due_at, token, recover, failures, refusals, host)
SELECT id, now() + random() * interval '300 s', 1, false, 0, 0, split_part(url, '@', 2) FROM account;
INSERT INTO journal (account_id, sequence, digest, written_at)
SELECT id, 0, decode(repeat('00', 32), 'hex'), now() FROM account;
INSERT INTO mailbox (account_id, captures, captured_bytes, quarantined, to_come, day_bytes)
SELECT id, 0, 0, 0, 0, 0 FROM account;
"""
_SIGHTING = """
INSERT INTO sighting (account_id, epoch, uidl, size, content, state, sha256, first_seen_at, attempts,
                      absent_at)
SELECT id, 1, convert_to(lpad(to_hex({n}), 8, '0') || substr(id, 1, 8), 'UTF8'), 1000 + {n}, '', 'captured',
       sha256(convert_to(id || {n}, 'UTF8')), now() - ({each} - {n}) * interval '1 hour', 0,
       CASE WHEN {n} <= {each} - {present} THEN now() END
FROM account
"""
_CAPTURE = """
INSERT INTO capture (account_id, sha256, size, epoch, uidl, captured_at, token, sequence)
SELECT id, sha256(convert_to(id || {n}, 'UTF8')), 1000 + {n}, 1,
       convert_to(lpad(to_hex({n}), 8, '0') || substr(id, 1, 8), 'UTF8'),
       now() - ({each} - {n}) * interval '1 hour', 1, 1
FROM account
"""


class Sized(NamedTuple):
    """A database of the bench, and the accounts that the measurements turn to."""

    database: Database
    url: str
    accounts: list[str]


def build(server: Postgres, name: str, accounts: int) -> str:
    """The URL of a database with so many accounts and their rows, made unless it is there."""
    with psycopg.connect(server.url) as connection:
        there = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone()
    if there:
        return server.database_url(name)
    url = server.create_database(f"{name}_unfinished")
    database = Database(url)
    migrate.upgrade(database)
    database.close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_ACCOUNTS.format(accounts=accounts))
        # Indexes are made once, after the rows.
        made_later = list(_indexes(connection))
        for drop, _ in made_later:
            connection.execute(drop)
    rows = [_CAPTURE.format(n=n, each=_CAPTURES_EACH) for n in range(1, _CAPTURES_EACH + 1)]
    rows += [
        _SIGHTING.format(n=n, each=_SIGHTINGS_EACH, present=_PRESENT_EACH)
        for n in range(1, _SIGHTINGS_EACH + 1)
    ]
    _run(url, name, rows)
    _run(url, f"{name}: indexes", [make for _, make in made_later] + ["ANALYZE"], loaders=1)
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name}_unfinished RENAME TO {name}")
    return server.database_url(name)


def _indexes(connection: psycopg.Connection) -> Iterator[tuple[str, str]]:
    """How to drop, and to make again, each index of the two large tables."""
    for parent in ("capture", "sighting"):
        key = connection.execute(
            "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE conrelid = %s::regclass AND contype = 'p'",
            (parent,),
        ).fetchone()
        if key is None:
            raise RuntimeError(f"{parent} has no primary key")
        yield (
            f"ALTER TABLE {parent} DROP CONSTRAINT {key[0]}",
            f"ALTER TABLE {parent} ADD CONSTRAINT {key[0]} {key[1]}",
        )
        others = connection.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = %s AND indexname <> %s",
            (parent, key[0]),
        )
        for index, definition in others.fetchall():
            yield f"DROP INDEX {index}", definition.replace(" ON ONLY ", " ON ")


def _run(url: str, what: str, statements: list[str], loaders: int = _LOADERS) -> None:
    def run(statement: str) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement)

    with Progress() as progress, ThreadPoolExecutor(loaders) as pool:
        for _ in progress.track(pool.map(run, statements), total=len(statements), description=what):
            pass


def measure(sized: Sized, chance: random.Random) -> dict[str, Callable[[int], object]]:
    """The hot statements, by name: each a call that turns to the ``n``-th account."""
    database, accounts = sized.database, sized.accounts
    tokens = dict.fromkeys(accounts, 1)
    sequences = dict.fromkeys(accounts, 0)
    digests = {account: bytes(32) for account in accounts}
    with psycopg.connect(sized.url) as connection:
        for account, sequence, digest in connection.execute(
            "SELECT account_id, sequence, digest FROM journal"
        ).fetchall():
            if account in sequences:
                sequences[account], digests[account] = sequence, bytes(digest)

    def present(n: int) -> None:
        with database.reading() as connection:
            found = sum(1 for _ in sightings.present(connection, accounts[n], 1))
        if found < _PRESENT_EACH:
            raise RuntimeError(f"{found} present sightings")

    def before(n: int) -> None:
        with database.reading() as connection:
            before_poll(connection, accounts[n])

    def held(n: int) -> None:
        with database.reading() as connection:
            captures.contents(connection, accounts[n], [chance.randbytes(32) for _ in range(_BATCH)])

    def insert(n: int) -> None:
        account = accounts[n]
        sequences[account] += 1
        digest = chance.randbytes(32)
        segment = _segment(account, sequences[account], digests[account], chance)
        claim = Claim(account, tokens[account], recover=False)
        database.transact(lambda connection: record.segment(connection, claim, segment, digest))
        digests[account] = digest

    return {
        f"what is present of an account ({_PRESENT_EACH} rows)": present,
        "what a poll begins with": before,
        f"which of {_BATCH} contents are held": held,
        f"a segment of {_BATCH} captures recorded": insert,
    }


def _segment(account: str, sequence: int, previous: bytes, chance: random.Random) -> Segment:
    now = datetime.now(UTC)
    lines = tuple(
        Resolved(What.CAPTURED, SightingKey(chance.randbytes(8), 2_000), now, chance.randbytes(32), 2_000)
        for _ in range(_BATCH)
    )
    server = ServerRecord("mail.example", 995, "", None, None, None, None)
    return Segment(
        account, account, "pop3s://mail.example", 1, sequence, previous, 1, now, server, 0, bytes(32), lines
    )


def compare(small: Sized, large: Sized, console: Console) -> None:
    """Both by turns, and a table of the medians."""
    chance = random.Random(5)
    table = Table("what one call costs, in ms", "a million", "all", "ratio", title="median of the rounds")
    tasks = zip(measure(small, chance).items(), measure(large, chance).items(), strict=True)
    for (what, on_small), (_, on_large) in tasks:
        figures: dict[int, list[float]] = {0: [], 1: []}
        for turn in range(_ROUNDS + 1):
            for which, call in enumerate((on_small, on_large)):
                began = time.perf_counter()
                for n in range(_CALLS):
                    call(n)
                if turn > 0:  # the first one warms up
                    figures[which].append((time.perf_counter() - began) * 1000 / _CALLS)
        few, many = (statistics.median(figures[which]) for which in (0, 1))
        table.add_row(what, f"{few:.3f}", f"{many:.3f}", f"{many / few:.2f}")
    console.print(table)


@contextmanager
def opened(url: str) -> Iterator[Sized]:
    """The database, and a sample of its accounts, the same at each run."""
    database = Database(url)
    try:
        with database.reading() as connection:
            ids = [row.id for row in connection.execute(sa.text("SELECT id FROM account ORDER BY id"))]
        yield Sized(database, url, random.Random(7).sample(ids, min(len(ids), _CALLS)))
    finally:
        database.close()


def main() -> None:
    """Build what is missing, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sightings", type=int, default=100_000_000)
    parser.add_argument("--build-only", action="store_true", help="make the rows, and measure another time")
    asked = parser.parse_args()
    server = Postgres(asked.directory, _SETTINGS)
    server.start()
    try:
        accounts = asked.sightings // _SIGHTINGS_EACH
        urls = build(server, "small", _SMALL_ACCOUNTS), build(server, f"rows_{asked.sightings}", accounts)
        if not asked.build_only:
            with opened(urls[0]) as small, opened(urls[1]) as large:
                compare(small, large, Console(width=100))
    finally:
        server.stop()


if __name__ == "__main__":
    main()

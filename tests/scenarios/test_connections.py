"""What a connection to PostgreSQL keeps of statements, how many rows go in by one, and what its end costs."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver import db
from archiver.db import PREPARED_AFTER, Database, bulk, migrate
from archiver.db.captures import CapturedContent, contents
from archiver.db.tables import capture, event
from archiver.errors import TryLater
from tests.conftest import require
from tests.harness import pgbouncer as harness_pgbouncer
from tests.harness.postgres import Postgres

ASKED = sa.text("SELECT CAST(:n AS integer) + 1")
PROCESS = sa.text("SELECT pg_backend_pid()")
PREPARED = sa.text("SELECT count(*) FROM pg_prepared_statements")
AT = datetime(2026, 3, 4, 5, 6, 7, 890_123, tzinfo=UTC)


@contextmanager
def opened(url: str, pool_size: int = 1) -> Iterator[Database]:
    database = Database(url, pool_size=pool_size)
    try:
        yield database
    finally:
        database.close()


def read(database: Database, statement: sa.TextClause, **values: Any) -> int:
    with database.reading() as connection:
        return int(connection.execute(statement, values).scalar_one())


def test_a_plan_is_kept_over_readings_and_transactions(postgres_url: str) -> None:
    with opened(postgres_url) as database:
        before = read(database, PREPARED)
        for n in range(PREPARED_AFTER):
            assert read(database, ASKED, n=n) == n + 1
            assert database.transact(lambda connection: connection.execute(ASKED, {"n": 6}).scalar()) == 7
        assert read(database, PREPARED) > before


def end_session(database: Database, url: str) -> None:
    """End the server's side of the one connection that lies in the pool."""
    process = read(database, PROCESS)
    with psycopg.connect(url, autocommit=True) as other:
        assert other.execute("SELECT pg_terminate_backend(%s, 10000)", (process,)).fetchone() == (True,)


def test_a_connection_that_died_while_it_rested_is_replaced(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "IDLE_SECONDS", 0.0)
    with opened(postgres_url) as database:
        end_session(database, postgres_url)
        assert read(database, ASKED, n=1) == 2


def test_a_connection_that_died_just_now_costs_no_transaction(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not asked whether it lives: the transaction is tried again, and a reader is told to."""
    monkeypatch.setattr(db, "IDLE_SECONDS", math.inf)
    with opened(postgres_url) as database:
        end_session(database, postgres_url)
        assert database.transact(lambda connection: connection.execute(ASKED, {"n": 6}).scalar()) == 7
        end_session(database, postgres_url)
        with pytest.raises(TryLater):
            read(database, ASKED, n=1)
        assert read(database, ASKED, n=1) == 2


@pytest.mark.pgbouncer
def test_behind_pgbouncer_nothing_is_prepared(
    postgres: Postgres, postgres_url: str, server_directory: Path
) -> None:
    require(harness_pgbouncer.unavailable())
    with harness_pgbouncer.pgbouncer(server_directory / "pooled", postgres) as port:
        name = urlsplit(postgres_url).path
        with opened(f"postgresql://postgres@127.0.0.1:{port}{name}", pool_size=8) as database:
            turns = range(8 * (PREPARED_AFTER + 1))
            with ThreadPoolExecutor(8) as threads:
                answers = list(threads.map(lambda n: read(database, ASKED, n=n), turns))
            assert answers == [n + 1 for n in turns]
            assert {read(database, PREPARED) for _ in range(harness_pgbouncer.CONNECTIONS)} == {0}


def test_rows_come_out_as_they_went_in(database_url: str) -> None:
    body = "quotes ' \" and \\ and \u00e4 \N{GRINNING FACE}\n\t, \\x41, {}, :name, %s"
    events = [{"kind": "k", "account_id": "a", "at": AT, "body": f"{n}{body}"} for n in range(3)]
    octets = bytes(range(256))
    captures = [
        {
            "account_id": "a",
            "sha256": bytes([n]) * 32,
            "size": 2**40 + n,
            "epoch": 1,
            "uidl": octets,
            "captured_at": AT,
            "version_id": None if n else body,
            "token": n,
            "sequence": 1,
        }
        for n in (0, 1, 1)
    ]

    def write(connection: Connection) -> None:
        bulk.insert(event, tuple(events[0])).run(connection, events)
        bulk.insert(capture, tuple(captures[0]), lambda it: it.on_conflict_do_nothing()).run(
            connection, captures
        )

    with opened(database_url) as database:
        migrate.upgrade(database)
        database.transact(write)
        with database.reading() as connection:
            columns = [event.c[name] for name in events[0]]
            kept = connection.execute(sa.select(*columns).order_by(event.c.position)).mappings().all()
            assert [dict(row) for row in kept] == events
            found = connection.execute(sa.select(capture).order_by(capture.c.token)).mappings().all()
            assert [dict(row) for row in found] == captures[:2]
            digests = [bytes([n]) * 32 for n in range(256)]
            held = {digests[n]: CapturedContent(AT, 2**40 + n) for n in (0, 1)}
            assert contents(connection, "a", digests) == held
            assert contents(connection, "a", digests[1:2]) == {digests[1]: held[digests[1]]}
            assert contents(connection, "a", []) == contents(connection, "b", digests) == {}


def test_a_list_of_any_length_is_one_parameter(database_url: str) -> None:
    names = ["a", "b ' \" \\", "\u00e4,{}"]
    with opened(database_url) as database, database.reading() as connection:
        texts = sa.union_all(*(sa.select(sa.literal(name).label("name")) for name in names)).subquery()
        within = bulk.among(connection.dialect.name, texts.c.name, "wanted")
        statement = sa.select(texts.c.name).where(within)
        for wanted in ([], names[1:2], names, [*names, "another"]):
            found = connection.execute(statement, {"wanted": wanted}).scalars().all()
            assert set(found) == set(wanted) & set(names)

"""The way up on a PostgreSQL that is at work: writers go on, and what is broken off is taken up again."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from archiver.db import Database, migrate
from archiver.db.tables import metadata
from tests.conftest import require
from tests.harness import pgbouncer as harness_pgbouncer
from tests.harness.postgres import Postgres
from tests.scenarios.story import Death

ACCOUNTS = 2_500
"""More than are filled in at once."""

LIVE = "0003"
"""The last schema beside which the first release can work. What follows renames columns."""

SEEN_BY_EACH = 4
POLLED = 2_000
"""Of which the writers poll so many, again and again."""

SITTER = 1
"""The account that somebody has in a transaction which takes long."""

ROUNDS_OF_A_SITTING = 3
"""As often writers come through, while the sitter keeps a lock from whoever wants it for himself."""

WRITER_WAITS = "SET lock_timeout = '20s'"
"""Far longer than any lock may keep a writer; without it, it would wait for ever."""


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    """A database as the first release left it, with accounts, sightings, captures and polls."""
    database = Database(postgres_url, sleep=lambda _: None)
    config = migrate.alembic_config()

    def begin(connection: sa.Connection) -> None:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        _fill(connection)

    with closing(database):
        database.transact(begin)
        yield database


def _fill(connection: sa.Connection) -> None:
    accounts = f"generate_series(1, {ACCOUNTS}) AS n"
    sightings = f"{accounts} CROSS JOIN generate_series(1, {SEEN_BY_EACH}) AS m"
    for statement in (
        (
            "INSERT INTO account (id, name, url, tls, secret, delete_policy, interval_seconds, pipelining, "
            "epoch, "
            "tls_pins, tls_minimum, created_at) SELECT lpad(n::text, 16, '0'), 'a' || n, "
            "'pop3s://u' || n || '@H' || mod(n, 50) || '.example', 'implicit', 'env:X', 'never', 300, "
            "true, 1, '', "
            f"'1.2', now() FROM {accounts}"
        ),
        (
            "INSERT INTO lease (account_id, due_at, token, recover, failures, refusals) "
            f"SELECT lpad(n::text, 16, '0'), now(), 1, false, mod(n, 2), 0 FROM {accounts}"
        ),
        (
            "INSERT INTO sighting (account_id, epoch, uidl, size, content, state, sha256, first_seen_at, "
            "attempts) "
            "SELECT lpad(n::text, 16, '0'), 1, m::text::bytea, 9, '', 'captured', sha256(m::text::bytea), "
            "now(), 1 "
            f"FROM {sightings}"
        ),
        (
            "INSERT INTO capture (account_id, sha256, octets, epoch, uidl, captured_at, token, sequence) "
            "SELECT lpad(n::text, 16, '0'), sha256(m::text::bytea), 9, 1, m::text::bytea, now(), 1, 1 "
            f"FROM {sightings} WHERE n > 10"
        ),
        (
            "INSERT INTO poll (account_id, token, ended_at, seconds, outcome, listed, new, known, "
            "quarantined, "
            "to_come, delete_requested, octets) SELECT lpad(n::text, 16, '0'), m, now() - m * interval '1 "
            "hour', 1, "
            f"'ok', 4, 0, 4 - m, m, 0, 0, 0 FROM {accounts} CROSS JOIN generate_series(1, 2) AS m WHERE n "
            f"> 10"
        ),
    ):
        connection.exec_driver_sql(statement)


def _poll(connection: psycopg.Connection[Any], number: int, token: int) -> None:
    """What a poll of the first release writes, in short."""
    key = {"id": f"{number:016}", "uidl": b"new %d" % token, "token": token}
    for statement in (
        "UPDATE lease SET token = token + 1, due_at = now() WHERE account_id = %(id)s",
        "UPDATE account SET paused_reason = NULL WHERE id = %(id)s",
        (
            "INSERT INTO capture (account_id, sha256, octets, epoch, uidl, captured_at, token, sequence) "
            "VALUES (%(id)s, sha256(%(uidl)s), 9, 1, %(uidl)s, now(), 1, 1) ON CONFLICT DO NOTHING"
        ),
        (
            "INSERT INTO sighting (account_id, epoch, uidl, size, content, state, first_seen_at, attempts) "
            "VALUES (%(id)s, 1, %(uidl)s, 9, '', 'captured', now(), 1) ON CONFLICT DO NOTHING"
        ),
        (
            "INSERT INTO poll (account_id, token, ended_at, seconds, outcome, new, known, quarantined, "
            "delete_requested, octets) VALUES (%(id)s, %(token)s, now(), 1, 'ok', 1, 0, 0, 0, 9)"
        ),
    ):
        connection.execute(statement, key)


def _url(database: Database) -> str:
    return database.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


class Writers:
    """The service of the first release: it polls one account after the other, until it is told to stop."""

    def __init__(self, database: Database) -> None:
        self._url = _url(database)
        self._round = threading.Condition()
        self._stopping = False
        self.rounds = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()

    def wait_for(self, rounds: int) -> None:
        """Returns when so many more are done, or when it is over."""
        with self._round:
            wanted = self.rounds + rounds
            self._round.wait_for(lambda: self.rounds >= wanted or not self._thread.is_alive() or self.error)

    def _run(self) -> None:
        try:
            with psycopg.connect(self._url) as connection:
                connection.execute(WRITER_WAITS)
                connection.commit()
                while not self._stopping:
                    with connection.transaction():
                        _poll(connection, SITTER + 1 + self.rounds % POLLED, 100 + self.rounds)
                    with self._round:
                        self.rounds += 1
                        self._round.notify_all()
        except BaseException as error:  # noqa: BLE001 - the test raises it
            with self._round:
                self.error = error
                self._round.notify_all()


@contextmanager
def _before_each(database: Database, look: Callable[[str, psycopg.Connection[Any]], None]) -> Iterator[None]:
    """``look`` is called before each statement that the migration sends."""

    def listen(_: object, cursor: Any, statement: str, *__: object) -> None:
        look(statement, cursor.connection)

    sa.event.listen(database.engine, "before_cursor_execute", listen)
    try:
        yield
    finally:
        sa.event.remove(database.engine, "before_cursor_execute", listen)


def _assert_whole(database: Database, like: Database) -> None:
    """The schema is what the models say, all of it is in force, and the rows say what they said before."""
    assert migrate.upgrade(database) == (LIVE, migrate.latest())
    with database.reading() as connection:
        options = {
            "include_name": lambda name, kind, _: kind != "table" or not re.search(r"_\d\d$", name or "")
        }
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
        ask = connection.exec_driver_sql
        assert ask("SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid").all() == []
        assert (
            ask("SELECT count(*) FROM lease WHERE host NOT LIKE 'h%%.example' OR late_at IS NULL").scalar()
            == 0
        )
        assert ask("SELECT count(*), count(listed_at) FROM mailbox").one() == (ACCOUNTS, ACCOUNTS - 10)
        shown = "SELECT captures, captured_bytes, listed, quarantined FROM mailbox WHERE account_id = '%016d'"
        assert ask(shown % (ACCOUNTS - 1)).one() == (SEEN_BY_EACH, 9 * SEEN_BY_EACH, 4, 2)
        assert _indexes(connection) == _indexes_of(like)


def _indexes_of(database: Database) -> list[Any]:
    with database.reading() as connection:
        return _indexes(connection)


def _indexes(connection: sa.Connection) -> list[Any]:
    """All, but for the names of those on parts."""
    return list(
        connection.exec_driver_sql(
            "SELECT tablename, regexp_replace(indexdef, 'INDEX \\S+ ON', 'INDEX ON') FROM pg_indexes "
            "WHERE schemaname = 'public' ORDER BY 1, 2"
        ).all()
    )


@pytest.fixture
def fresh(postgres: Postgres, postgres_url: str) -> Iterator[Database]:
    """A database that began with this release."""
    name = postgres_url.rpartition("/")[2] + "_fresh"
    with closing(Database(postgres.create_database(name))) as database:
        migrate.upgrade(database)
        yield database
    postgres.drop_database(name)


def test_writers_go_on_while_the_schema_changes(database: Database, fresh: Database) -> None:
    """Whatever the migration wants to lock, somebody has it, and stays until others came through."""
    sitting: list[threading.Thread] = []
    sat_before: set[str] = set()

    def sit(statement: str, connection: psycopg.Connection[Any]) -> None:
        locks = _locks(asking, connection.info.backend_pid)
        if locks & {"ShareLock", "ShareRowExclusiveLock", "AccessExclusiveLock"}:
            # All writers wait at this moment: nothing may be done that takes longer with more rows.
            assert not re.match(r"INSERT|UPDATE|DELETE|ANALYZE|CREATE.* INDEX (?!\w+ ON ONLY)", statement)
        if (
            locks
            or statement in sat_before
            or re.match(r"SET|SHOW|SELECT(?!.* FOR UPDATE)", statement, re.DOTALL | re.IGNORECASE)
        ):
            return
        sat_before.add(statement)
        if sitting:
            sitting.pop().join()
        sitter = psycopg.connect(_url(database))
        _poll(sitter, SITTER, 1_000 + len(sat_before))

        def stay() -> None:
            writers.wait_for(ROUNDS_OF_A_SITTING)
            sitter.commit()
            sitter.close()

        sitting.append(threading.Thread(target=stay))
        sitting[0].start()

    with (
        psycopg.connect(_url(database), autocommit=True) as asking,
        Writers(database) as writers,
        _before_each(database, sit),
    ):
        migrate.upgrade(database, LIVE)
        writers.wait_for(ROUNDS_OF_A_SITTING)
    for thread in sitting:
        thread.join()
    assert writers.error is None
    assert {"LOCK TABLE account", "LOCK TABLE lease", "LOCK TABLE poll", "LOCK TABLE sighting"} <= {
        " ".join(statement.split()[:3]) for statement in sat_before
    }
    _assert_whole(database, fresh)


def _locks(asking: psycopg.Connection[Any], process: int) -> set[str]:
    """What a process has locked of our tables, other than to read them."""
    return {
        mode
        for (mode,) in asking.execute(
            "SELECT mode FROM pg_locks JOIN pg_class ON pg_class.oid = relation WHERE pid = %s AND granted "
            "AND relnamespace = 'public'::regnamespace AND mode <> 'AccessShareLock'",
            [process],
        )
    }


def test_what_was_broken_off_is_taken_up_again(database: Database, fresh: Database) -> None:
    """Killed before one statement, and before one that lies a few further on, until nothing is left to do."""
    left = 0

    def die(_: str, __: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Death

    killed = 0
    with _before_each(database, die):
        while True:
            left = 20 + 12 * killed
            try:
                migrate.upgrade(database, LIVE)
            except Death:
                killed += 1
            else:
                break
    assert killed > 10
    _assert_whole(database, fresh)


def test_an_index_whose_build_was_ended_is_built_anew(
    database: Database, fresh: Database, postgres: Postgres
) -> None:
    """The server ends the session in the middle of a build, and leaves an index that nobody uses."""
    left_behind: list[str] = []
    reader = psycopg.connect(_url(database))

    def look(_: float) -> None:
        """Between one attempt and the next."""
        with psycopg.connect(_url(database)) as connection:
            left_behind.extend(
                name
                for (name,) in connection.execute(
                    "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
                )
            )
        reader.close()

    def read_on(statement: str, _: object) -> None:
        # A build waits for everybody who sees an older state.
        if "CONCURRENTLY ix_sighting_by_uidl_07" in statement and not left_behind:
            reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            reader.execute("SELECT count(*) FROM sighting_00")
            threading.Thread(target=end).start()

    def end() -> None:
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            while not connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%uidl_07 %' "
                "AND wait_event = 'virtualxid'"
            ).fetchall():
                pass

    with closing(Database(_url(database), sleep=look)) as migrated, _before_each(migrated, read_on):
        migrate.upgrade(migrated, LIVE)
    assert set(left_behind) == {"ix_sighting_by_uidl", "ix_sighting_by_uidl_07"}
    _assert_whole(database, fresh)


def test_the_only_connection_there_may_be_is_enough(database: Database, fresh: Database) -> None:
    """The service's limit of connections does not keep the schema from being changed."""
    alone = Database(_url(database), pool_size=1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: migrate.upgrade(alone, LIVE), range(2)))
    alone.close()
    _assert_whole(database, fresh)


@pytest.mark.pgbouncer
def test_the_way_up_leads_through_pgbouncer(
    database: Database, fresh: Database, postgres: Postgres, server_directory: Path
) -> None:
    """In transaction mode, where nothing that belongs to a session stays with it."""
    require(harness_pgbouncer.unavailable())
    with harness_pgbouncer.pgbouncer(server_directory / "pgbouncer-of-migrations", postgres) as port:
        through = [Database(str(database.engine.url.set(port=port))) for _ in range(3)]
        with ThreadPoolExecutor(len(through)) as pool:
            list(pool.map(lambda each: migrate.upgrade(each, LIVE), through))
        for each in through:
            each.close()
    _assert_whole(database, fresh)

"""The schema: the migrations make what the tables say, and no other schema is touched."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from archiver.db import Database, migrate
from archiver.db.tables import event, metadata
from archiver.errors import OperatorNeeded, TryLater, UsageError

PARTITIONS = 32


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url, sleep=lambda _: None)
    yield database
    database.close()


def set_version(database: Database, version: str) -> None:
    database.transact(
        lambda connection: connection.execute(
            sa.text("UPDATE alembic_version SET version_num = :version"), {"version": version}
        )
    )


def is_partition(name: str | None) -> bool:
    stem, _, number = (name or "").rpartition("_")
    return stem in {"capture", "sighting"} and number.isdigit()


def test_the_migrations_make_what_the_tables_say(database: Database) -> None:
    assert migrate.upgrade(database) == (None, migrate.latest())
    with database.reading() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "include_name": lambda name, kind, _: kind != "table" or not is_partition(name),
            },
        )
        # Alembic does not know that an index is for one kind of database only.
        missing = {(what, index.name) for what, index in compare_metadata(context, metadata)}
        assert missing == ({("add_index", "ix_capture_sha256")} if database.is_sqlite else set())
    assert migrate.upgrade(database) == (migrate.latest(), migrate.latest())


def test_captures_and_sightings_are_partitioned(postgres_url: str) -> None:
    database = Database(postgres_url)
    migrate.upgrade(database)
    with database.reading() as connection:
        names = set(
            connection.execute(
                sa.text(
                    "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
                    "WHERE c.relkind = 'r'"
                )
            ).scalars()
        )
        options = connection.execute(
            sa.text("SELECT reloptions FROM pg_class WHERE relname = 'lease'")
        ).scalar_one()
    database.close()
    assert names == {
        f"{table}_{number:02d}" for table in ("capture", "sighting") for number in range(PARTITIONS)
    }
    assert "fillfactor=70" in options


def test_several_processes_may_upgrade_at_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    start = threading.Barrier(len(databases))

    def upgrade(database: Database) -> tuple[str | None, str]:
        start.wait(20)
        return migrate.upgrade(database)

    with ThreadPoolExecutor(len(databases)) as pool:
        results = list(pool.map(upgrade, databases))
    assert {after for _, after in results} == {migrate.latest()}
    assert migrate.current(databases[0]) == migrate.latest()
    for database in databases:
        database.close()


def test_a_newer_schema_is_refused_and_not_touched(database: Database) -> None:
    migrate.upgrade(database)
    set_version(database, "9999")
    for step in (migrate.ensure, migrate.upgrade):
        with pytest.raises(migrate.WrongSchema, match="newer"):
            step(database)
    assert migrate.current(database) == "9999"
    assert issubclass(migrate.WrongSchema, UsageError)


def test_only_an_empty_sqlite_database_is_brought_up_by_itself(database: Database) -> None:
    if database.is_sqlite:
        migrate.ensure(database)
        assert migrate.current(database) == migrate.latest()
    else:
        with pytest.raises(migrate.WrongSchema, match="no schema") as caught:
            migrate.ensure(database)
        assert caught.value.hint == "run: archiver db upgrade"
        assert migrate.current(database) is None


# One state.


def test_a_reader_sees_one_state_while_others_write(database: Database) -> None:
    migrate.upgrade(database)
    count = sa.text("SELECT count(*) FROM event")

    def write(connection: sa.Connection) -> None:
        row = {"kind": "k", "account_id": "a", "at": datetime.now(UTC), "body": "{}"}
        connection.execute(sa.insert(event), row)

    with database.reading() as connection:
        before = connection.execute(count).scalar_one()
        database.transact(write)
        assert connection.execute(count).scalar_one() == before == 0
    with database.reading() as connection:
        assert connection.execute(count).scalar_one() == 1
    # And the next transaction on that connection is one like any other.
    database.transact(write)


# Errors of drivers, translated.


def test_a_file_that_is_no_database_needs_an_operator(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    path = database.path
    assert path is not None
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    for step in (migrate.current, migrate.ensure, migrate.upgrade):
        with pytest.raises(OperatorNeeded, match="not a database"):
            step(database)
    database.close()


def test_a_new_folder_is_nobody_elses_business(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'archive' / 'archiver.db'}")
    migrate.upgrade(database)
    database.close()
    # A group may read it if the umask says so, which commands set (ARCHIVER_FILE_GROUP_READ).
    assert (tmp_path / "archive").stat().st_mode & 0o027 == 0


def test_a_folder_that_cannot_be_made_needs_an_operator() -> None:
    database = Database("sqlite:////proc/nowhere/archiver.db")
    with pytest.raises(OperatorNeeded):
        migrate.upgrade(database)
    database.close()


def test_a_database_that_is_away_is_tried_again_and_then_given_up(postgres_url: str) -> None:
    waits: list[float] = []
    away = Database("postgresql://postgres@127.0.0.1:1/nothing", sleep=waits.append)
    with pytest.raises(TryLater):
        away.transact(lambda connection: connection.execute(sa.text("SELECT 1")))
    assert len(waits) == 3
    nowhere = Database(f"{postgres_url}_of_nobody", sleep=waits.append)
    with pytest.raises(OperatorNeeded, match="does not exist"):
        nowhere.transact(lambda connection: connection.execute(sa.text("SELECT 1")))
    assert len(waits) == 3
    away.close()
    nowhere.close()


@pytest.mark.parametrize(
    ("sqlstate", "expected"),
    [
        ("40001", TryLater),
        ("57P05", TryLater),
        ("25006", TryLater),
        ("23505", TryLater),
        ("42501", OperatorNeeded),
    ],
)
def test_what_postgresql_says_decides(postgres_url: str, sqlstate: str, expected: type[Exception]) -> None:
    attempts: list[int] = []
    database = Database(postgres_url, sleep=lambda _: None)

    def work(connection: sa.Connection) -> None:
        attempts.append(1)
        connection.execute(
            sa.text(f"DO $$ BEGIN RAISE EXCEPTION 'told to' USING ERRCODE = '{sqlstate}'; END $$")
        )

    with pytest.raises(expected):
        database.transact(work)
    assert len(attempts) == (4 if expected is TryLater else 1)
    database.close()


def test_a_server_that_was_made_read_only_stays_so_after_a_reader(postgres_url: str) -> None:
    """Pooled connections are used again: what a reader asked for must not become what a writer gets."""
    database = Database(postgres_url, pool_size=1, sleep=lambda _: None)

    def forbid_writing(connection: sa.Connection) -> None:
        connection.execute(sa.text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))

    database.transact(forbid_writing)
    with database.reading() as connection:
        connection.execute(sa.text("SELECT 1"))

    with pytest.raises(TryLater, match="read-only transaction"):
        database.transact(lambda connection: connection.execute(sa.text("CREATE TABLE here (body TEXT)")))
    database.close()


def test_a_mistake_of_ours_is_not_hidden_and_tells_nothing_of_the_rows(database: Database) -> None:
    def work(connection: sa.Connection) -> None:
        connection.execute(sa.text("CREATE TABLE here (body TEXT CHECK (body = 'x'))"))
        columns = "(body)" if database.is_sqlite else "(nobody)"
        connection.execute(sa.text(f"INSERT INTO here {columns} VALUES (:body)"), {"body": "confidential"})

    with pytest.raises(sa.exc.DBAPIError) as caught:
        database.transact(work)
    assert "confidential" not in f"{caught.value} {caught.value!r}"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:sesame@host/name",
        "postgresql://me@host/name?password=sesame",
    ],
)
def test_a_database_never_tells_its_password(url: str) -> None:
    database = Database(url)
    assert "sesame" not in str(database)
    assert "sesame" not in repr(database)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://me:sesame@host/name",
        "postgresql://me:sesame@one:5432,other:5432/name",
        "sesame",
        "",
        "http://me:sesame@x",
        "sqlite://",
        "sqlite:///:memory:",
    ],
)
def test_other_urls_are_wrong_use_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Database(url)
    assert "sesame" not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"

"""Schema changes while workers use the database: no writer waits for longer than a moment.

For migrations only, within ``changes``. On a PostgreSQL with accounts, each change
is committed by itself. So an interrupted migration can be repeated, and skips
columns, tables and indexes that exist already. Tables are locked only for changes
that take a moment. A change that does not get its lock soon gives up and tries
again, because all others queue behind the one that waits. Indexes are built while
workers write.

On SQLite, which has one writer, and in a database without accounts, everything
happens in the migration's own transaction.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.exc import DBAPIError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

LOCK_WAIT_MILLISECONDS = 1_000
"""The longest time that polls wait, each time that a change asks for a lock."""

BETWEEN_TRIES_SECONDS = (0.2, 2.0)
"""Time for polls that had to wait to catch up."""

GIVE_UP_AFTER_SECONDS = 300.0
"""For one lock, in each attempt of ``transact``. After that, some session keeps the table locked."""

_IN_THE_WAY = frozenset({"55P03", "57014", "40P01"})
"""lock_not_available, query_canceled (by our own time limit), and deadlock_detected."""


@contextmanager
def changes() -> Iterator["Changes"]:
    """All changes of a migration. Whether they are made beside workers is decided here, once."""
    if not _in_use(op.get_bind()):
        yield Changes(live=False)
        return
    with op.get_context().autocommit_block():
        yield Changes(live=True)


class Changes:
    """What a migration may do. Each method may be repeated."""

    def __init__(self, *, live: bool) -> None:
        self._live = live

    def add_columns(self, table: str, *columns: sa.Column[Any]) -> None:
        """Add columns with a constant default or without one, so that no row is rewritten."""
        there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}
        missing = [column for column in columns if column.name not in there]
        if missing:
            with self._locked(f"TABLE {table} IN ACCESS EXCLUSIVE MODE"):
                for column in missing:
                    op.add_column(table, column)

    def rename_columns(self, table: str, **names: str) -> None:
        """Rename columns, from former name to new. A process with the former names cannot write then."""
        there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}
        with self._locked(f"TABLE {table} IN ACCESS EXCLUSIVE MODE"):
            for former, name in names.items():
                if former in there:
                    op.execute(f"ALTER TABLE {table} RENAME COLUMN {former} TO {name}")

    def drop_column(self, table: str, name: str) -> None:
        if name in {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}:
            with self._locked(f"TABLE {table} IN ACCESS EXCLUSIVE MODE"):
                op.execute(f"ALTER TABLE {table} DROP COLUMN {name}")

    def create_table(self, name: str, *elements: sa.schema.SchemaItem, **options: Any) -> None:
        """Create a table. Its foreign keys, if it has any, are to ``account``."""
        if not sa.inspect(op.get_bind()).has_table(name):
            with self._locked("TABLE account IN SHARE ROW EXCLUSIVE MODE"):
                op.create_table(name, *elements, **options)

    def create_index(
        self, name: str, table: str, *columns: str, where: str | None = None, unique: bool = False
    ) -> None:
        """Create an index. On a partitioned table, each part gets one, named after the part's number."""
        form = f"({', '.join(columns)})" + (f" WHERE {where}" if where else "")
        parts = _parts(table) if self._live else []
        if not parts:
            self._build(name, table, form, unique=unique)
            return
        # The index of the whole table cannot be built beside writers, but those of its parts can. So it is
        # created empty, and the indexes of the parts are attached.
        # https://www.postgresql.org/docs/current/ddl-partitioning.html#DDL-PARTITIONING-DECLARATIVE-MAINTENANCE
        if _is_valid(name) is None:
            with self._locked(f"TABLE ONLY {table} IN SHARE MODE"):
                op.execute(f"CREATE INDEX {name} ON ONLY {table} {form}")
        for part in parts:
            of_part = name + part.removeprefix(table)
            if not _is_attached(of_part):
                self._build(of_part, part, form)
                with self._locked(f"TABLE {part} IN ACCESS EXCLUSIVE MODE"):
                    op.execute(f"ALTER INDEX {name} ATTACH PARTITION {of_part}")

    def drop_index(self, name: str, table: str) -> None:
        if not self._live:
            op.drop_index(name, table)
        elif not _parts(table):
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
        elif _is_valid(name) is not None:
            with self._locked(f"TABLE {table} IN ACCESS EXCLUSIVE MODE"):
                op.execute(f"DROP INDEX {name}")

    def rows(self, which: sa.Select[Any]) -> AbstractContextManager[None]:
        """A block that has these rows locked, some hundred at a time, and commits at its end."""
        return self._transaction(lambda: op.get_bind().execute(which.with_for_update()), "lock_timeout")

    def analyze(self, *tables: str) -> None:
        """Update the statistics of tables whose columns were filled, so that plans know them at once."""
        for table in tables if self._live else ():
            op.execute(f"ANALYZE {table}")

    def _build(self, name: str, table: str, form: str, *, unique: bool = False) -> None:
        kind = "UNIQUE INDEX" if unique else "INDEX"
        if not self._live:
            op.execute(f"CREATE {kind} {name} ON {table} {form}")
            return
        valid = _is_valid(name)
        if valid is False:
            # An interrupted build left it behind: writers maintain it, and no reader uses it.
            op.execute(f"DROP INDEX CONCURRENTLY {name}")
        if not valid:
            op.execute(f"CREATE {kind} CONCURRENTLY {name} ON {table} {form}")

    def _locked(self, what: str) -> AbstractContextManager[None]:
        # The locks of a table and of its parts are taken one after the other. The limit is for all together.
        return self._transaction(lambda: op.execute(f"LOCK {what}"), "statement_timeout")

    @contextmanager
    def _transaction(self, lock: Callable[[], object], limit: str) -> Iterator[None]:
        """A transaction that begins with this lock. Taking the lock is repeated, the rest runs once."""
        if not self._live:
            yield
            return
        # For SQLAlchemy this connection commits by itself, because an index build needs that.
        driver: Any = op.get_bind().connection.driver_connection
        patiently = Retrying(
            retry=retry_if_exception(_was_in_the_way),
            wait=wait_random(*BETWEEN_TRIES_SECONDS),
            stop=stop_after_delay(GIVE_UP_AFTER_SECONDS),
            reraise=True,
        )
        with ExitStack() as transaction:
            for attempt in patiently:
                with attempt, ExitStack() as this:
                    this.enter_context(driver.transaction())
                    op.execute(f"SET LOCAL {limit} = {LOCK_WAIT_MILLISECONDS}")
                    lock()
                    op.execute(f"SET LOCAL {limit} TO DEFAULT")
                    transaction.enter_context(this.pop_all())
            yield


def _in_use(connection: sa.Connection) -> bool:
    if connection.dialect.name != "postgresql":
        return False
    return bool(connection.execute(sa.text("SELECT EXISTS (SELECT FROM account)")).scalar())


def _was_in_the_way(error: BaseException) -> bool:
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _IN_THE_WAY


def _parts(table: str) -> list[str]:
    return list(
        _ask(
            "SELECT inhrelid::regclass::text FROM pg_inherits "
            "WHERE inhparent = to_regclass(:name) ORDER BY 1",
            table,
        ).scalars()
    )


def _is_valid(index: str) -> bool | None:
    """Whether the index is complete. None if it does not exist."""
    found: bool | None = _ask(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)", index
    ).scalar()
    return found


def _is_attached(index: str) -> bool:
    return bool(
        _ask("SELECT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass(:name))", index).scalar()
    )


def _ask(question: str, name: str) -> sa.CursorResult[Any]:
    return op.get_bind().execute(sa.text(question), {"name": name})

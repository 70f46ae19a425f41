"""Changes of the schema while others work with it: nobody who writes waits for longer than a moment.

For the migrations alone, within ``changes``. On a PostgreSQL with accounts
each change is committed by itself, so a migration that was broken off is begun
again, and finds what it did: columns, tables and indexes that are there are
left alone. Tables are locked only for what is done in a moment, and who cannot
have a lock soon lets go and comes again, since all others queue up behind the
one that waits. Indexes are built beside the writers.

On SQLite, which has one writer, and in a database without accounts, all of this
happens at once, in the migration's own transaction.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.exc import DBAPIError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

LOCK_WAIT_MILLISECONDS = 1_000
"""As long as polls wait at worst, each time that a lock is asked for."""

BETWEEN_TRIES_SECONDS = (0.2, 2.0)
"""In which the polls that were held up catch up."""

GIVE_UP_AFTER_SECONDS = 300.0
"""For one lock, and for each of the attempts of ``transact``: then somebody has the table for good."""

_IN_THE_WAY = frozenset({"55P03", "57014", "40P01"})
"""lock_not_available, query_canceled (by our own time limit), deadlock_detected."""


@contextmanager
def changes() -> Iterator["Changes"]:
    """The changes of a migration, all of them. Whether they are made live is decided here, once."""
    if not _in_use(op.get_bind()):
        yield Changes(live=False)
        return
    with op.get_context().autocommit_block():
        yield Changes(live=True)


class Changes:
    """What a migration may do. Each of these may be repeated."""

    def __init__(self, *, live: bool) -> None:
        self._live = live

    def add_columns(self, table: str, *columns: sa.Column[Any]) -> None:
        """With a constant default or none, so that no row is rewritten."""
        there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(table)}
        missing = [column for column in columns if column.name not in there]
        if missing:
            with self._locked(f"TABLE {table} IN ACCESS EXCLUSIVE MODE"):
                for column in missing:
                    op.add_column(table, column)

    def rename_columns(self, table: str, **names: str) -> None:
        """Former name to new name. A process that knows the former names cannot write from here on."""
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
        """One whose foreign keys, if it has any, are to ``account``."""
        if not sa.inspect(op.get_bind()).has_table(name):
            with self._locked("TABLE account IN SHARE ROW EXCLUSIVE MODE"):
                op.create_table(name, *elements, **options)

    def create_index(
        self, name: str, table: str, *columns: str, where: str | None = None, unique: bool = False
    ) -> None:
        """On a partitioned table, one on each part, called after the part's number."""
        form = f"({', '.join(columns)})" + (f" WHERE {where}" if where else "")
        parts = _parts(table) if self._live else []
        if not parts:
            self._build(name, table, form, unique=unique)
            return
        # The whole cannot be built beside writers, its parts can: it is made of none, and takes them on.
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
        """A block that has these rows locked, and is committed at its end: for some hundred at a time."""
        return self._transaction(lambda: op.get_bind().execute(which.with_for_update()), "lock_timeout")

    def analyze(self, *tables: str) -> None:
        """Have plans know of columns that were filled, before the statistics come by that way."""
        for table in tables if self._live else ():
            op.execute(f"ANALYZE {table}")

    def _build(self, name: str, table: str, form: str, *, unique: bool = False) -> None:
        kind = "UNIQUE INDEX" if unique else "INDEX"
        if not self._live:
            op.execute(f"CREATE {kind} {name} ON {table} {form}")
            return
        valid = _is_valid(name)
        if valid is False:
            # Left behind by a build that was broken off: writers keep it up, and no reader uses it.
            op.execute(f"DROP INDEX CONCURRENTLY {name}")
        if not valid:
            op.execute(f"CREATE {kind} CONCURRENTLY {name} ON {table} {form}")

    def _locked(self, what: str) -> AbstractContextManager[None]:
        # Locks of a table and of its parts are waited for one by one: the limit is for all of them.
        return self._transaction(lambda: op.execute(f"LOCK {what}"), "statement_timeout")

    @contextmanager
    def _transaction(self, lock: Callable[[], object], limit: str) -> Iterator[None]:
        """A transaction that begins with this lock; it is asked for until it is had, the rest runs once."""
        if not self._live:
            yield
            return
        # SQLAlchemy sees a connection that commits by itself, which an index build must have.
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
    """None where there is none."""
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

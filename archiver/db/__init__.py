"""The database: SQLite for one machine, PostgreSQL for many, behind one unit of work.

This package owns connections, transactions and the schema. It promises that
``transact`` either did everything or nothing, and that a passing fault is
repeated here and nowhere else; so the work handed to it may run twice, and
must end in the same state when it does. Errors of drivers come out as
``TryLater`` or ``OperatorNeeded``. No connection is held outside a block.

``schedule`` has the leases, ``record`` what polls write, ``reads`` what people
and polls ask, ``accounts`` the accounts, ``migrate`` the schema's versions.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from archiver.errors import ArchiverError, OperatorNeeded, TryLater, UsageError

__all__ = ["Database"]

T = TypeVar("T")

SQLITE_BUSY_SECONDS = 30.0
TRANSACTION_ATTEMPTS = 4
RETRY_WAIT_CAP_SECONDS = 5.0

_PASSING_SQLSTATES = frozenset({"40001", "40P01", "53300", "55P03", "57P01", "57P02", "57P03"})
"""Serialization failure, deadlock, too many connections, lock not available, shutdown, crash, starting up:
https://www.postgresql.org/docs/current/errcodes-appendix.html"""


class Database:
    """A database by its URL: ``sqlite:///path`` or ``postgresql://user@host/name``.

    Raises UsageError for any other URL, or when the driver is not installed.
    Does not connect before it must.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = _parse(url)
        self._sleep = sleep
        self.engine = _create_engine(self._url, pool_size)

    @property
    def is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database; None for one in memory and for PostgreSQL."""
        if self.is_sqlite and self._url.database not in (None, "", ":memory:"):
            return Path(str(self._url.database))
        return None

    def __str__(self) -> str:
        return self._url.render_as_string(hide_password=True)

    def transact(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction that commits when it returns and rolls back when it raises.

        Passing faults (a lost connection, a deadlock, a busy file) run it
        again, with jittered waits; since a connection can be lost after a
        commit that worked, ``work`` must tolerate to find its own traces.
        Raises TryLater when the fault lasts, OperatorNeeded for what waiting
        does not mend, and whatever ``work`` raises.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(TryLater),
            stop=stop_after_attempt(TRANSACTION_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.1, max=RETRY_WAIT_CAP_SECONDS),
            sleep=self._sleep,
            reraise=True,
        )
        result: T = retrying(self._attempt, work)
        return result

    def _attempt(self, work: Callable[[Connection], T]) -> T:
        with _translated(str(self)), self.engine.begin() as connection:
            return work(connection)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state and writes nothing. Raises TryLater or OperatorNeeded."""
        with _translated(str(self)), self.engine.connect() as connection:
            yield connection.execution_options(sqlite_begin="BEGIN")

    def close(self) -> None:
        self.engine.dispose()


def now(connection: Connection) -> sa.ColumnElement[Any]:
    """The database's own time: of clocks that may differ, only one decides about leases.

    SQLite's clock is this machine's, and its columns hold ISO text.
    """
    if connection.dialect.name == "sqlite":
        return sa.literal_column("strftime('%Y-%m-%d %H:%M:%f000', 'now')")
    return sa.func.now()


def later(connection: Connection, seconds: float) -> sa.ColumnElement[Any]:
    """The database's own time, so many seconds on."""
    if connection.dialect.name == "sqlite":
        return sa.func.strftime("%Y-%m-%d %H:%M:%f000", "now", f"{seconds:+.3f} seconds")
    return sa.func.now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def _parse(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError:
        raise UsageError(
            "the database URL cannot be read",
            hint="ARCHIVER_DATABASE_URL is sqlite:///path or postgresql://user@host/name",
        ) from None
    match url.drivername:
        case "sqlite" | "sqlite+pysqlite":
            return url.set(drivername="sqlite+pysqlite")
        case "postgresql" | "postgres" | "postgresql+psycopg":
            return url.set(drivername="postgresql+psycopg")
        case other:
            raise UsageError(
                f"no database of the kind {other!r} is supported",
                hint="ARCHIVER_DATABASE_URL is sqlite:///path or postgresql://user@host/name",
            )


def _create_engine(url: URL, pool_size: int) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(url, connect_args={"timeout": SQLITE_BUSY_SECONDS})
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        return sa.create_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=30.0,
            pool_pre_ping=True,
            # Behind PgBouncer in transaction mode a prepared statement may be
            # another connection's.
            connect_args={"prepare_threshold": None, "connect_timeout": 10, "application_name": "archiver"},
        )
    except ModuleNotFoundError as error:
        raise UsageError(
            "the driver for PostgreSQL is not installed", hint="pip install 'archiver[postgres]'"
        ) from error


def _set_up_sqlite(connection: Any, _record: object) -> None:
    # The driver would begin transactions by itself, and late; see _begin_sqlite.
    connection.isolation_level = None
    cursor = connection.cursor()
    # FULL, because a capture is only durable when the log is on the disk:
    # https://www.sqlite.org/pragma.html#pragma_synchronous
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock at once: one that starts as a reader can find at
    # its first write that it is too late, and no waiting helps then.
    begin = connection.get_execution_options().get("sqlite_begin", "BEGIN IMMEDIATE")
    connection.exec_driver_sql(begin)


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except ArchiverError:
        raise
    except PoolTimeout as error:
        raise TryLater(f"no connection to {name} became free in time") from error
    except (OperationalError, InterfaceError) as error:
        raise _classified(error, name) from error
    except DBAPIError as error:
        if error.connection_invalidated or getattr(error.orig, "sqlstate", None) in _PASSING_SQLSTATES:
            raise TryLater(f"database {name}: {_one_line(error)}") from error
        raise


def _classified(error: DBAPIError, name: str) -> ArchiverError:
    message = f"database {name}: {_one_line(error)}"
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate is not None:
        if sqlstate in _PASSING_SQLSTATES or sqlstate[:2] in ("08", "53"):
            return TryLater(message)
        return OperatorNeeded(message)
    text = str(error.orig)
    if "unable to open database file" in text or "readonly" in text or "not a database" in text:
        return OperatorNeeded(message, hint="is the path right, and may this user write there?")
    if any(words in text for words in ("password authentication", "does not exist", "no pg_hba.conf")):
        return OperatorNeeded(message, hint="check ARCHIVER_DATABASE_URL")
    return TryLater(message)


def _one_line(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())

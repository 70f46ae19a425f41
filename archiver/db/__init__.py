"""The database: SQLite for one machine, PostgreSQL for many, behind one unit of work.

This package owns connections, transactions and the schema. It promises that
``transact`` does everything or nothing, and that work is retried after a passing
fault here and nowhere else. So the work may run twice, and must end in the same
state when it does. Errors of drivers come out as ``TryLater`` or
``OperatorNeeded``. No connection is kept outside a block.

The modules by subject:

- ``accounts``
- when accounts are polled: ``claims``, ``leases``, ``hosts``, ``schedule``
- where polls begin and end: ``before``, ``endings``
- what polls find: ``record``, ``sightings``, ``captures``, ``events``
- what operators ask for, and see: ``requests``, ``history``, ``overview``
- the schema: ``tables``, ``migrate``, ``live``
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from archiver.db import bulk
from archiver.errors import ArchiverError, OperatorNeeded, TryLater, UsageError

__all__ = ["Database"]

T = TypeVar("T")

SQLITE_BUSY_SECONDS = 30.0
TRANSACTION_ATTEMPTS = 4
RETRY_WAIT_CAP_SECONDS = 5.0
IDLE_SECONDS = 1.0
"""A PostgreSQL connection that was idle for this long is checked before use, which costs a round trip."""
PREPARED_AFTER = 5
"""Times that a PostgreSQL connection runs a statement before it keeps the plan: psycopg's own choice."""

_PASSING_SQLSTATES = frozenset({"08", "40", "53", "55", "57", "58", "25006", "25P03", "23505"})
"""Errors after which the work is retried.

The classes are: connection; rollback, for serialization and deadlocks; resources; locks; shutdown and time
limits; system. 25006 comes from a standby that is read-only until it takes over. 25P03 comes from a session
that was idle for too long. 23505 means that another transaction inserted the same key at the same moment:
when the work looks again, it finds it. https://www.postgresql.org/docs/current/errcodes-appendix.html"""

_LASTING_SQLSTATES = frozenset({"28", "3D", "42501", "XX"})
"""Refused login, no such database, insufficient privilege, corruption."""

_OF_THE_DISK = ("SQLITE_FULL", "SQLITE_IOERR")

_NO_TABLE = "42P01"
"""An undefined table: there is no schema yet."""

_LASTING_WORDS = (
    "unable to open database file",
    "readonly",
    "password authentication",
    "does not exist",
    "no pg_hba.conf",
)
"""For errors without a SQLSTATE: of SQLite, and of a connection that PostgreSQL refused."""


class Database:
    """A database, by its URL: ``sqlite:///path`` or ``postgresql://user@host/name``.

    Raises UsageError for any other URL, or if the driver is not installed. It
    connects when it is first used.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = _parse(url)
        # The part after the question mark is left out, because it may contain a password, too.
        shown = self._url.set(drivername=self._url.get_backend_name(), query={})
        self._name = shown.render_as_string(hide_password=True)
        self._retrying = Retrying(
            retry=retry_if_exception_type(TryLater),
            stop=stop_after_attempt(TRANSACTION_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.1, max=RETRY_WAIT_CAP_SECONDS),
            sleep=sleep,
            reraise=True,
        )
        self.engine = _create_engine(self._url, pool_size)

    @property
    def is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database. None for one in memory, and for PostgreSQL."""
        if self.is_sqlite and self._url.database not in (None, "", ":memory:"):
            return Path(str(self._url.database))
        return None

    @property
    def exists(self) -> bool:
        """Whether connecting would not create it: false for SQLite while its file is missing."""
        return self.path is None or self.path.exists()

    def __str__(self) -> str:
        return self._name

    def transact(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction that commits when it returns and rolls back when it raises.

        After a passing fault (a lost connection, a deadlock, a busy file) it runs
        again, after a jittered wait. A connection can be lost after a commit that
        worked, so ``work`` must expect to find its own results. Raises TryLater if
        the fault lasts, OperatorNeeded for faults that an operator must fix, and
        what ``work`` raises.
        """
        result: T = self._retrying(self._attempt, work)
        return result

    def _attempt(self, work: Callable[[Connection], T]) -> T:
        with _translated(self._name), self.engine.begin() as connection:
            return work(connection)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state and writes nothing. Raises TryLater or OperatorNeeded."""
        with _translated(self._name), self.engine.connect() as connection:
            connection.execution_options(**(_READING_SQLITE if self.is_sqlite else _READING))
            # It ends with a commit, because at a rollback the driver forgets prepared statements.
            with connection.begin():
                yield connection

    def close(self) -> None:
        self.engine.dispose()


def now(connection: Connection) -> sa.ColumnElement[Any]:
    """The database's own time: clocks may differ, and only one may decide about leases.

    SQLite uses this machine's clock, and its columns contain ISO text.
    """
    if connection.dialect.name == "sqlite":
        return sa.literal_column("strftime('%Y-%m-%d %H:%M:%f000', 'now')")
    return sa.func.now()


def later(connection: Connection, seconds: float) -> sa.ColumnElement[Any]:
    """The database's own time, this many seconds from now."""
    return seconds_on(connection.dialect.name, seconds)


def seconds_on(dialect: str, seconds: float | sa.ColumnElement[float]) -> sa.ColumnElement[Any]:
    """The same for a statement that is built before there is a connection, for this dialect."""
    if dialect == "sqlite":
        return sa.func.strftime(
            "%Y-%m-%d %H:%M:%f000", "now", sa.func.printf("%+.3f seconds", seconds, type_=sa.Text())
        )
    years_to_minutes = 6 * [sa.literal_column("0", sa.Integer())]
    return sa.func.now() + sa.func.make_interval(*years_to_minutes, seconds)


def _parse(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # ValueError: a port that is not a number, as in host:1,other:2
        raise UsageError(
            "the database URL cannot be read",
            hint="ARCHIVER_DATABASE_URL is sqlite:///path or postgresql://user@host/name; for several hosts "
            "postgresql://user@/name?host=one,other&port=5432,5432&target_session_attrs=read-write",
        ) from None
    match url.drivername:
        case "sqlite" | "sqlite+pysqlite" if url.database in (None, "", ":memory:"):
            raise UsageError(
                "a database in memory would be a separate one for each thread, and lost at the end",
                hint="ARCHIVER_DATABASE_URL is sqlite:///path",
            )
        case "sqlite" | "sqlite+pysqlite":
            return url.set(drivername="sqlite+pysqlite")
        case "postgresql" | "postgres" | "postgresql+psycopg":
            return url.set(drivername="postgresql+psycopg")
        case other:
            raise UsageError(
                f"no database of the kind {other!r} is supported",
                hint="ARCHIVER_DATABASE_URL is sqlite:///path or postgresql://user@host/name",
            )


_POSTGRESQL: dict[str, Any] = {
    "application_name": "archiver",
    "connect_timeout": 10,
    "prepare_threshold": None,
    # With these, a server that disappears silently is noticed within a minute
    # instead of two hours: https://www.postgresql.org/docs/current/libpq-connect.html
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}


# Without these, each statement on PostgreSQL would see another state, and
# SQLite would take the writer's lock.
_READING: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
_READING_SQLITE: dict[str, Any] = {"sqlite_begin": "BEGIN"}


def _create_engine(url: URL, pool_size: int) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": SQLITE_BUSY_SECONDS})
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        engine = sa.create_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=30.0,
            # Errors end up in logs, and the values describe people's mail.
            hide_parameters=True,
            connect_args=_POSTGRESQL,
        )
    except ModuleNotFoundError as error:
        raise UsageError(
            "the driver for PostgreSQL is not installed", hint="pip install 'archiver[postgres]'"
        ) from error
    sa.event.listen(engine, "connect", _prepare_if_direct)
    sa.event.listen(engine, "checkin", _let_server_decide)
    sa.event.listen(engine, "checkin", _note_use)
    sa.event.listen(engine, "checkout", partial(_see_that_it_lives, engine))
    return engine


def _note_use(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info[_USED_AT] = time.monotonic()


def _see_that_it_lives(
    engine: Engine, connection: Any, record: ConnectionPoolEntry, _proxy: PoolProxiedConnection
) -> None:
    """Check a connection that was idle.

    If a connection dies after the check, ``transact`` retries, and a reader gets the
    error of any passing fault.
    """
    if time.monotonic() - record.info.get(_USED_AT, math.inf) < IDLE_SECONDS:
        return
    try:
        engine.dialect.do_ping(connection)
    except engine.dialect.loaded_dbapi.Error as error:
        raise DisconnectionError from error  # the pool takes another


_USED_AT = "archiver_used_at"


def _prepare_if_direct(connection: Any, _record: object) -> None:
    """Let the server keep plans, if this connects to the server itself.

    A claim takes longer to plan than to run. But behind PgBouncer in transaction
    mode, a prepared statement is on the connection that its transaction happened
    to use. A proxy is recognised by the process number for cancelling queries:
    it gives out numbers of its own.
    """
    with connection.cursor() as cursor:
        (process,) = cursor.execute("SELECT pg_backend_pid()").fetchone()
    connection.rollback()
    if process == connection.info.backend_pid:
        connection.prepare_threshold = PREPARED_AFTER


def _let_server_decide(connection: Any, _record: object) -> None:
    # After a reader, SQLAlchemy would begin every transaction with READ WRITE. That overrides an operator who
    # made the server read-only, and a standby refuses it with an error that looks like a bug.
    if connection is not None and not connection.closed:
        connection.read_only = None


def _set_up_sqlite(connection: Any, _record: object) -> None:
    # The driver would begin transactions by itself, and too late; see _begin_sqlite.
    connection.isolation_level = None
    cursor = connection.cursor()
    # FULL, because a capture is durable only once the log is on the disk:
    # https://www.sqlite.org/pragma.html#pragma_synchronous
    # The log may grow to 16 MB, four times the default: most pages in it are written again and again, and
    # each checkpoint copies them.
    pragmas = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "wal_autocheckpoint=4000")
    for pragma in pragmas:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
    connection.create_function(bulk.OCTETS, 1, bytes.fromhex, deterministic=True)


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock at once. If it began as a reader, its first write
    # could fail in a way that no wait repairs.
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
    except DBAPIError as error:
        translated = _classified(error, name)
        if translated is None:
            raise
        raise translated from error


def _classified(error: DBAPIError, name: str) -> ArchiverError | None:
    """What a driver's error means. None if it is a bug of the archiver."""
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate is not None:
        names = {sqlstate, sqlstate[:2]}
        lasting = bool(names & _LASTING_SQLSTATES)
        passing = bool(names & _PASSING_SQLSTATES)
    else:
        # For a file that is torn, or not a database, SQLite raises a plain DatabaseError.
        lasting = type(error) is DatabaseError or any(words in str(error.orig) for words in _LASTING_WORDS)
        passing = isinstance(error, OperationalError | InterfaceError)
    message = f"database {name}: {_one_line(error)}"
    if sqlstate == _NO_TABLE:
        return OperatorNeeded(message, hint="run: archiver db upgrade")
    if lasting:
        return OperatorNeeded(message, hint="check ARCHIVER_DATABASE_URL, and the rights of its user")
    return TryLater(message, hint=_disk_hint(error)) if passing or error.connection_invalidated else None


def _disk_hint(error: DBAPIError) -> str | None:
    """For a full disk SQLite reports that it is full, or only "disk I/O error"."""
    found = str(getattr(error.orig, "sqlite_errorname", ""))
    return "check the disk of the database: it may be full" if found.startswith(_OF_THE_DISK) else None


def _one_line(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())

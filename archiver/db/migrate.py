"""The schema's versions: which one a database has, and the upgrade.

The scripts are in ``alembic/`` of the repository and in
``archiver/db/migrations/`` of an installed package.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from archiver.db import Database
from archiver.errors import OperatorNeeded, UsageError

if TYPE_CHECKING:
    from alembic.config import Config

UPGRADE_LOCK = 0x73636865
"""The advisory lock by which one of several processes upgrades: "sche" in ASCII."""

TURN_SECONDS = 0.5
"""Time between two checks of whether the process that upgrades is done."""


class WrongSchema(UsageError):
    """The database has no schema, or an older or newer one than this release needs."""


def latest() -> str:
    """The schema version that this release writes."""
    from alembic.script import ScriptDirectory

    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    if head is None:
        raise RuntimeError("the package contains no migrations")
    return head


def current(database: Database) -> str | None:
    """The schema version that the database has. None if it is empty."""
    from alembic.runtime.migration import MigrationContext

    def look(connection: sa.Connection) -> str | None:
        return MigrationContext.configure(connection).get_current_revision()

    if database.is_sqlite:
        # The first connection switches a new file to WAL mode. If two processes do that
        # at the same moment, SQLite refuses one without waiting: so it is repeated.
        return database.transact(look)
    with database.reading() as connection:
        return look(connection)


def upgrade(database: Database, to: str = "head") -> tuple[str | None, str]:
    """Upgrade the schema to this release's version, or to ``to``. Returns the version before and after.

    If several processes do this at once on PostgreSQL, one works and the others
    wait for it. Workers may continue meanwhile, also those of the previous
    release, unless a script says otherwise. It may be interrupted anywhere, and
    repeated. Raises WrongSchema if the database belongs to a newer release.
    """
    from alembic import command

    _make_folder(database)
    before = current(database)
    _refuse_newer(before)
    config = alembic_config()

    def work(connection: sa.Connection) -> bool:
        if connection.dialect.name == "sqlite":
            config.attributes["connection"] = connection
            command.upgrade(config, to)
            return True
        if not _has_turn(connection):
            return False
        with database.engine.connect() as changing:
            config.attributes["connection"] = changing
            try:
                command.upgrade(config, to)
            except PendingRollbackError as error:
                raise _before(error) from None
        return True

    while not database.transact(work):
        time.sleep(TURN_SECONDS)
    return before, latest() if to == "head" else to


def _before(error: BaseException) -> BaseException:
    """The error that ended the connection. Later errors say only that it has ended."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, DBAPIError):
        found = found.__context__
    return found or error


def _has_turn(connection: sa.Connection) -> bool:
    """Whether this transaction, and no other, may upgrade until it ends.

    The changes are made on another connection, in many transactions. The lock of
    a session would not do, because behind PgBouncer each transaction may be in
    another session. An index build waits for every transaction that sees an older
    state. So no process waits for the lock in a statement, and the transaction
    with the lock sees no state.
    """
    # A statement without parameters uses the simple protocol. With the extended
    # protocol, the transaction would keep its state until its next statement.
    take = sa.text(f"SELECT pg_try_advisory_xact_lock({UPGRADE_LOCK})")
    if not connection.execute(take).scalar():
        return False
    # This transaction is idle meanwhile, for as long as it takes, and blocks no other.
    connection.execute(
        sa.text(
            "SELECT set_config(name, '0', true) FROM pg_settings "
            "WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')"
        )
    )
    # It leaves the pool, whose only connection it may be.
    connection.detach()
    return True


def ensure(database: Database) -> None:
    """Check the schema before anything is changed.

    An empty SQLite database is upgraded automatically, because on one machine no
    deployment does it. Raises WrongSchema for any version but this release's,
    with the command that helps.
    """
    found = current(database) if database.exists else None
    if found == latest():
        return
    if database.is_sqlite and found is None:
        upgrade(database)
        return
    _refuse_newer(found)
    raise WrongSchema(
        f"database {database} has {'no schema' if found is None else f'schema {found}'}, "
        f"and this release needs schema {latest()}",
        hint="run: archiver db upgrade",
    )


def _make_folder(database: Database) -> None:
    if database.path is not None:
        try:
            # The database shows who wrote to whom, so other users may not read it.
            database.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            raise OperatorNeeded(
                f"cannot create the folder of database {database.path}: {error.strerror}"
            ) from error


def _refuse_newer(found: str | None) -> None:
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    if found is None:
        return
    try:
        ScriptDirectory.from_config(alembic_config()).get_revision(found)
    except CommandError:
        raise WrongSchema(
            f"the database has schema {found}, which this release does not know: a newer release made it",
            hint="upgrade archiver, or use another database",
        ) from None


def alembic_config() -> "Config":
    """Where the migrations are: in the repository, or in an installed package."""
    from alembic.config import Config

    installed = Path(__file__).parent / "migrations"
    repository = Path(__file__).parents[2] / "alembic"
    config = Config()
    config.set_main_option("script_location", str(installed if installed.is_dir() else repository))
    return config

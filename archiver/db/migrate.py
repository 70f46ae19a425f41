"""The schema's versions: which one a database has, and the way up.

The scripts lie in ``alembic/`` of the repository and in
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
"""The advisory lock that lets one of many starting processes upgrade: "sche" in ASCII."""

TURN_SECONDS = 0.5
"""Between looks whether the process that upgrades is done."""


class WrongSchema(UsageError):
    """The database has another schema than this release needs: older, newer or none."""


def latest() -> str:
    """The schema version that this release writes."""
    from alembic.script import ScriptDirectory

    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise RuntimeError("the package carries no migrations")
    return head


def current(database: Database) -> str | None:
    """The schema version that the database has; None when it is empty."""
    from alembic.runtime.migration import MigrationContext

    def look(connection: sa.Connection) -> str | None:
        return MigrationContext.configure(connection).get_current_revision()

    if database.is_sqlite:
        # The first to connect puts a new file into WAL mode, and who does so at
        # the same moment is refused at once, without waiting: so it is repeated.
        return database.transact(look)
    with database.reading() as connection:
        return look(connection)


def upgrade(database: Database, to: str = "head") -> tuple[str | None, str]:
    """Bring the schema to this release's version, or an earlier one; returns the version before and after.

    Of several processes that do so at once, on PostgreSQL one works and the
    others wait for it. Workers may go on meanwhile, those of the release
    before this one, too. May be broken off anywhere and begun again. Raises
    WrongSchema when the database belongs to a newer release.
    """
    from alembic import command

    _make_folder(database)
    before = current(database)
    _refuse_newer(before)
    config = _config()

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
    """What ended the connection; all that is tried with it after that says no more than that it has ended."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, DBAPIError):
        found = found.__context__
    return found or error


def _has_turn(connection: sa.Connection) -> bool:
    """Whether this transaction, and nobody else, may upgrade until it ends.

    The changes are made on another connection, and in many transactions; a lock
    of a session would not do, since behind PgBouncer each may be in another
    one. An index build waits for everybody who sees an older state: so nobody
    waits for the lock in a statement, and whoever has it sees none.
    """
    # Without parameters, and so by the simple protocol: one of the other kind
    # keeps what it saw until the next one comes.
    take = sa.text(f"SELECT pg_try_advisory_xact_lock({UPGRADE_LOCK})")
    if not connection.execute(take).scalar():
        return False
    # However long it takes, this transaction is idle meanwhile, and holds nobody up.
    connection.execute(
        sa.text(
            "SELECT set_config(name, '0', true) FROM pg_settings "
            "WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')"
        )
    )
    # Not out of the pool, whose only connection it may be.
    connection.detach()
    return True


def ensure(database: Database) -> None:
    """See that the schema fits before anything is touched.

    An empty SQLite database is brought up by itself: on one machine there is
    nobody else to do it. Raises WrongSchema for any other version than this
    release's, with the command that helps.
    """
    found = current(database) if database.exists else None
    if found == latest():
        return
    if database.is_sqlite and found is None:
        upgrade(database)
        return
    _refuse_newer(found)
    raise WrongSchema(
        f"database {database} has {'no schema' if found is None else f'the schema {found}'} "
        f"and this release needs {latest()}",
        hint="run: archiver db upgrade",
    )


def _make_folder(database: Database) -> None:
    if database.path is not None:
        try:
            # It tells who wrote to whom: nobody else's business.
            database.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OperatorNeeded(
                f"cannot make the folder of database {database.path}: {error.strerror}"
            ) from error


def _refuse_newer(found: str | None) -> None:
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    if found is None:
        return
    try:
        ScriptDirectory.from_config(_config()).get_revision(found)
    except CommandError:
        raise WrongSchema(
            f"the database has the schema {found}, which this release does not know: a newer one made it",
            hint="upgrade archiver, or use another database",
        ) from None


def _config() -> "Config":
    from alembic.config import Config

    installed = Path(__file__).parent / "migrations"
    repository = Path(__file__).parents[2] / "alembic"
    config = Config()
    config.set_main_option("script_location", str(installed if installed.is_dir() else repository))
    return config

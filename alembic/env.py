"""How migrations run: on PostgreSQL each in a transaction of its own, on SQLite all in one.

A migration that changes tables in use goes through ``archiver.db.live``. To write a
new one, set ``ARCHIVER_DATABASE_URL`` to a database of the previous version, and
run ``alembic revision --autogenerate -m "what it does"``.
"""

import os

from alembic import context
from sqlalchemy import Connection

from archiver.db import Database
from archiver.db.tables import metadata


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        # SQLite changes a column by creating the table again.
        render_as_batch=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with Database(os.environ["ARCHIVER_DATABASE_URL"]).engine.connect() as connection:
        run(connection)

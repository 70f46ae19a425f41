"""How migrations run: on PostgreSQL each by itself, on SQLite all in one transaction.

One that changes what others work with goes by ``archiver.db.live``. To write a
new one while developing, have ``ARCHIVER_DATABASE_URL`` name a database of the
version before it, and run ``alembic revision --autogenerate -m "what it does"``.
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
        # SQLite changes a column by making the table anew.
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

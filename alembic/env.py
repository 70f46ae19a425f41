"""How migrations run: in one transaction, on the connection of ``archiver db upgrade``.

To write a new one while developing, have ``ARCHIVER_DATABASE_URL`` name a
database of the version before it, and run
``alembic revision --autogenerate -m "what it does"``.
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
    )
    context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    Database(os.environ["ARCHIVER_DATABASE_URL"]).transact(run)

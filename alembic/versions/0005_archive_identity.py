"""Which archive the database belongs to: the id that its store shows as well."""

import sqlalchemy as sa
from alembic import op

from archiver.db import live

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    with live.changes() as changes:
        changes.create_table(
            "archive",
            sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
            sa.Column("archive_id", sa.Text(), nullable=False),
            sa.PrimaryKeyConstraint("number", name="pk_archive"),
        )


def downgrade() -> None:
    op.drop_table("archive")

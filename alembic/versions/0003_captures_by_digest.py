"""SQLite finds a digest by the key of each account's captures, and needs no index by digest alone.

Workers of a release that knows only 0002 can continue, but their look-ups by
digest then read all captures.
"""

from collections.abc import Callable

from alembic import op

from archiver.db import live

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    _on_sqlite(lambda changes: changes.drop_index("ix_capture_sha256", "capture"))


def downgrade() -> None:
    _on_sqlite(lambda changes: changes.create_index("ix_capture_sha256", "capture", "sha256"))


def _on_sqlite(change: Callable[[live.Changes], None]) -> None:
    if op.get_bind().dialect.name == "sqlite":
        with live.changes() as changes:
            change(changes)

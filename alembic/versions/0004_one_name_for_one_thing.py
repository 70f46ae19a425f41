"""One name for one thing: sizes, references, states; deletion's own counters.

Columns are renamed, so processes of a release that knows only 0003 cannot use
this schema: stop them first. If they run, nothing is lost, but their polls fail
until they are replaced.
"""

import sqlalchemy as sa
from alembic import op

from archiver.db import live
from archiver.db.tables import UtcDateTime

revision = "0004"
down_revision = "0003"

RENAMED = {
    "account": {
        "deletion_hold": "deletion_suspended",
        "day_octets": "day_bytes",
    },
    "lease": {"in_line": "queued"},
    "mailbox": {"octets": "captured_bytes", "stat_octets": "stat_size", "day_octets": "day_bytes"},
    "capture": {"octets": "size"},
    "poll": {"octets": "fetched_bytes"},
    "poll_day": {"octets": "fetched_bytes"},
}
QUEUES = {"well": "failures = 0", "failing": "failures > 0"}


def upgrade() -> None:
    with live.changes() as changes:
        for table, names in RENAMED.items():
            changes.rename_columns(table, **names)
        changes.drop_column("account", "pipelining")
        changes.add_columns("account", sa.Column("state", sa.Text(), nullable=False, server_default="active"))
        changes.add_columns(
            "sighting",
            sa.Column("delete_attempts", sa.Integer(), nullable=False, server_default="0"),
            sa.Column("delete_retry_at", UtcDateTime()),
        )
        for health, failures in QUEUES.items():
            changes.create_index(
                f"ix_lease_queued_{health}", "lease", "host", "due_at", where=f"queued AND {failures}"
            )
            changes.drop_index(f"ix_lease_line_{health}", "lease")
        op.execute(
            """
            UPDATE account SET
                state = CASE
                    WHEN removed_at IS NOT NULL THEN 'removed'
                    WHEN paused_reason = 'paused by hand' THEN 'paused'
                    ELSE 'waiting' END,
                paused_reason = CASE
                    WHEN removed_at IS NOT NULL OR paused_reason = 'paused by hand' THEN NULL
                    ELSE paused_reason END
            WHERE state = 'active' AND (removed_at IS NOT NULL OR paused_reason IS NOT NULL)
            """
        )
        # For an archived message, both columns were about its deletion.
        op.execute(
            """
            UPDATE sighting SET
                delete_attempts = attempts, attempts = 0, delete_retry_at = retry_at, retry_at = NULL
            WHERE state = 'captured' AND (attempts > 0 OR retry_at IS NOT NULL)
            """
        )
        op.execute("UPDATE event SET kind = 'epoch_began' WHERE kind = 'epoch'")


def downgrade() -> None:
    with live.changes() as changes:
        op.execute("UPDATE event SET kind = 'epoch' WHERE kind = 'epoch_began'")
        op.execute(
            """
            UPDATE sighting SET attempts = delete_attempts, retry_at = delete_retry_at
            WHERE state = 'captured' AND (delete_attempts > 0 OR delete_retry_at IS NOT NULL)
            """
        )
        op.execute("UPDATE account SET paused_reason = 'removed' WHERE state = 'removed'")
        op.execute("UPDATE account SET paused_reason = 'paused by hand' WHERE state = 'paused'")
        for health in QUEUES:
            changes.drop_index(f"ix_lease_queued_{health}", "lease")
        for name in ("delete_attempts", "delete_retry_at"):
            changes.drop_column("sighting", name)
        changes.drop_column("account", "state")
        changes.add_columns(
            "account", sa.Column("pipelining", sa.Boolean(), nullable=False, server_default=sa.true())
        )
        for table, names in RENAMED.items():
            changes.rename_columns(table, **{name: former for former, name in names.items()})
        for health, failures in QUEUES.items():
            changes.create_index(
                f"ix_lease_line_{health}", "lease", "host", "due_at", where=f"in_line AND {failures}"
            )

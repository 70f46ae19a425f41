"""The first tables."""

import sqlalchemy as sa
from alembic import op

from archiver.db.tables import UtcDateTime

revision = "0001"
down_revision = None

PARTITIONS = 32
"""Captures and sightings are partitioned by the hash of their account. So each part of a hundred million
rows keeps a size that vacuum and index builds can handle."""

ABSENT = sa.text("absent_at IS NULL")
QUARANTINED = sa.text("state = 'quarantined'")


def upgrade() -> None:
    op.create_table(
        "account",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("tls", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("ca_file", sa.Text()),
        sa.Column("delete_policy", sa.Text(), nullable=False),
        sa.Column("interval_seconds", sa.Float(), nullable=False),
        sa.Column("timeout_seconds", sa.Float()),
        sa.Column("pipelining", sa.Boolean(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("paused_reason", sa.Text()),
        sa.Column("tls_pins", sa.Text(), nullable=False),
        sa.Column("tls_minimum", sa.Text(), nullable=False),
        sa.Column("tls_server_name", sa.Text()),
        sa.Column("client_certificate", sa.Text()),
        sa.Column("client_key", sa.Text()),
        sa.Column("removed_at", UtcDateTime()),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_account"),
        sa.UniqueConstraint("name", name="uq_account_name"),
    )
    op.create_index("ix_account_url", "account", ["url"])
    op.create_table(
        "lease",
        account_id(),
        sa.Column("due_at", UtcDateTime()),
        sa.Column("owner", sa.Text()),
        sa.Column("expires_at", UtcDateTime()),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("recover", sa.Boolean(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("refusals", sa.Integer(), nullable=False),
        of_account("lease"),
        sa.PrimaryKeyConstraint("account_id", name="pk_lease"),
        # Every poll rewrites its row twice. So pages keep room for that, and vacuum
        # does not wait for a fifth of the table.
        postgresql_with={"fillfactor": 70, "autovacuum_vacuum_scale_factor": 0.02},
    )
    op.create_index("ix_lease_due_at", "lease", ["due_at"])
    op.create_table(
        "journal",
        account_id(),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("written_at", UtcDateTime(), nullable=False),
        of_account("journal"),
        sa.PrimaryKeyConstraint("account_id", name="pk_journal"),
    )
    op.create_table(
        "capture",
        account_id(),
        sa.Column("sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("octets", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("uidl", sa.LargeBinary(), nullable=False),
        sa.Column("captured_at", UtcDateTime(), nullable=False),
        sa.Column("version_id", sa.Text()),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("account_id", "sha256", name="pk_capture"),
        postgresql_partition_by="HASH (account_id)",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "sighting",
        account_id(),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("uidl", sa.LargeBinary(), nullable=False),
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("content", sa.LargeBinary(32), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(32)),
        sa.Column("first_seen_at", UtcDateTime(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("retry_at", UtcDateTime()),
        sa.Column("reason", sa.Text()),
        sa.Column("delete_requested_at", UtcDateTime()),
        sa.Column("absent_at", UtcDateTime()),
        sa.PrimaryKeyConstraint("account_id", "epoch", "uidl", "size", "content", name="pk_sighting"),
        postgresql_partition_by="HASH (account_id)",
        sqlite_with_rowid=False,
    )
    if op.get_bind().dialect.name == "postgresql":
        for parent in ("capture", "sighting"):
            for remainder in range(PARTITIONS):
                op.execute(
                    f"CREATE TABLE {parent}_{remainder:02d} PARTITION OF {parent} "
                    f"FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {remainder})"
                )
    op.create_index("ix_capture_account_id_captured_at", "capture", ["account_id", "captured_at"])
    op.create_index("ix_capture_sha256", "capture", ["sha256"])
    op.create_index(
        "ix_sighting_present", "sighting", ["account_id"], postgresql_where=ABSENT, sqlite_where=ABSENT
    )
    op.create_index(
        "ix_sighting_quarantined",
        "sighting",
        ["account_id"],
        postgresql_where=QUARANTINED,
        sqlite_where=QUARANTINED,
    )
    op.create_table(
        "poll",
        account_id(),
        sa.Column("token", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("listed", sa.Integer()),
        sa.Column("new", sa.Integer(), nullable=False),
        sa.Column("known", sa.Integer(), nullable=False),
        sa.Column("quarantined", sa.Integer(), nullable=False),
        sa.Column("to_come", sa.Integer()),
        sa.Column("delete_requested", sa.Integer(), nullable=False),
        sa.Column("octets", sa.BigInteger(), nullable=False),
        sa.Column("error", sa.Text()),
        of_account("poll"),
        sa.PrimaryKeyConstraint("account_id", "token", name="pk_poll"),
    )
    op.create_table(
        "event",
        sa.Column("position", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        account_id(),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("position", name="pk_event"),
        # A position is never assigned twice.
        sqlite_autoincrement=True,
    )


def account_id() -> sa.Column[str]:
    return sa.Column("account_id", sa.String(16), nullable=False)


def of_account(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=f"fk_{table}_account_id_account")

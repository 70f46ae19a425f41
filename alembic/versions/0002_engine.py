"""What a hundred thousand mailboxes need: hosts and slots, schedules, the last look at each mailbox, days.

Workers of a release that knows only 0001 can continue: every new column has a
default, and only an index is removed.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from alembic import op

from archiver.db import live
from archiver.db.tables import UtcDateTime

revision = "0002"
down_revision = "0001"

ROWS_AT_ONCE = 1_000
LATE_SECONDS = 600.0


def upgrade() -> None:
    with live.changes() as changes:
        make_columns_and_tables(changes)
        fill_in(changes)
        make_indexes(changes)


def make_columns_and_tables(changes: live.Changes) -> None:
    changes.add_columns(
        "account",
        sa.Column("cron", sa.Text()),
        sa.Column("time_zone", sa.Text(), nullable=False, server_default="UTC"),
        sa.Column("interval_max_seconds", sa.Float()),
        sa.Column("blackout", sa.Text(), nullable=False, server_default=""),
        sa.Column("day_octets", sa.BigInteger()),
        sa.Column("avoids", sa.Text(), nullable=False, server_default=""),
        sa.Column("deletion_hold", sa.Text()),
    )
    changes.add_columns(
        "lease",
        sa.Column("host", sa.Text(), nullable=False, server_default=""),
        sa.Column("slot", sa.Integer()),
        sa.Column("in_line", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("asked", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("interval_seconds", sa.Float()),
        sa.Column("looked_at", UtcDateTime()),
        sa.Column("late_at", UtcDateTime()),
    )
    changes.add_columns(
        "poll",
        *(
            sa.Column(counted, sa.Integer(), nullable=False, server_default="0")
            for counted in ("deleted", "gone", "lost")
        ),
        sa.Column("glanced", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    changes.create_table(
        "host",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("failing_since", UtcDateTime(), nullable=False),
        sa.Column("retry_at", UtcDateTime()),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("name", name="pk_host"),
    )

    changes.create_table(
        "mailbox",
        sa.Column("account_id", sa.String(16), nullable=False),
        sa.Column("captures", sa.BigInteger(), nullable=False),
        sa.Column("octets", sa.BigInteger(), nullable=False),
        sa.Column("listed_at", UtcDateTime()),
        sa.Column("listed", sa.Integer()),
        sa.Column("quarantined", sa.Integer(), nullable=False),
        sa.Column("to_come", sa.Integer(), nullable=False),
        sa.Column("stat_count", sa.Integer()),
        sa.Column("stat_octets", sa.BigInteger()),
        sa.Column("last_number", sa.Integer()),
        sa.Column("last_uidl", sa.LargeBinary()),
        sa.Column("trusted_until", UtcDateTime()),
        sa.Column("day", sa.Date()),
        sa.Column("day_octets", sa.BigInteger(), nullable=False),
        sa.Column("counted", sa.BigInteger(), nullable=False, server_default="0"),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_mailbox_account_id_account"),
        sa.PrimaryKeyConstraint("account_id", name="pk_mailbox"),
        # This row is rewritten often, like that of the lease.
        postgresql_with={"fillfactor": 70, "autovacuum_vacuum_scale_factor": 0.02},
    )
    changes.create_table(
        "poll_day",
        sa.Column("account_id", sa.String(16), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("polls", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("looks", sa.Integer(), nullable=False),
        sa.Column("listed", sa.Integer()),
        sa.Column("new", sa.Integer(), nullable=False),
        sa.Column("archived", sa.Integer()),
        sa.Column("quarantined", sa.Integer()),
        sa.Column("to_come", sa.Integer()),
        sa.Column("delete_requested", sa.Integer(), nullable=False),
        sa.Column("deleted", sa.Integer(), nullable=False),
        sa.Column("gone", sa.Integer(), nullable=False),
        sa.Column("lost", sa.Integer(), nullable=False),
        sa.Column("octets", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("first_look_at", UtcDateTime()),
        sa.Column("last_look_at", UtcDateTime()),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_poll_day_account_id_account"),
        sa.PrimaryKeyConstraint("account_id", "day", name="pk_poll_day"),
    )
    changes.create_table(
        "gap",
        sa.Column("account_id", sa.String(16), nullable=False),
        sa.Column("began_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_gap_account_id_account"),
        sa.PrimaryKeyConstraint("account_id", "began_at", name="pk_gap"),
    )


def make_indexes(changes: live.Changes) -> None:
    # No two sessions can have one slot of a host, whatever claims do.
    changes.create_index("uq_lease_host_slot", "lease", "host", "slot", unique=True, where="slot IS NOT NULL")
    # Each row is in one of these four. Before, all were in one index by due time.
    for queue, columns, which in (
        ("due", ("due_at",), "slot IS NULL AND NOT in_line"),
        ("line", ("host", "due_at"), "in_line"),
    ):
        for health, failures in (("well", "failures = 0"), ("failing", "failures > 0")):
            changes.create_index(
                f"ix_lease_{queue}_{health}", "lease", *columns, where=f"{which} AND {failures}"
            )
    changes.drop_index("ix_lease_due_at", "lease")
    changes.create_index(
        "ix_sighting_by_uidl",
        "sighting",
        *("account_id", "epoch", "uidl", "size", "content"),
        where="absent_at IS NULL",
    )
    changes.drop_index("ix_sighting_present", "sighting")
    changes.create_index("ix_poll_ended_at", "poll", "ended_at")
    changes.create_index("ix_poll_lost", "poll", "ended_at", where="lost > 0")
    changes.create_index("ix_poll_day_day", "poll_day", "day")
    changes.create_index("ix_poll_day_lost", "poll_day", "day", where="lost > 0")
    changes.create_index("ix_gap_ended_at", "gap", "ended_at")


# The values of the new columns, for some accounts at a time. Each lease row is written once.

shown = ("listed", "quarantined", "to_come")
account = sa.table(
    "account", *map(sa.column, ("id", "url", "interval_seconds")), sa.column("created_at", UtcDateTime())
)
lease = sa.table(
    "lease",
    *map(sa.column, ("account_id", "host")),
    *(sa.column(name, UtcDateTime()) for name in ("looked_at", "late_at")),
)
capture = sa.table("capture", *map(sa.column, ("account_id", "octets")))
poll = sa.table(
    "poll", *map(sa.column, ("account_id", "token", *shown)), sa.column("ended_at", UtcDateTime())
)
mailbox = sa.table(
    "mailbox",
    *map(sa.column, ("account_id", "captures", "octets", "day_octets", *shown)),
    sa.column("listed_at", UtcDateTime()),
)


def fill_in(changes: live.Changes) -> None:
    for rows in pages():
        ids = [row.id for row in rows]
        # Polls lock them in this order, too.
        with changes.rows(
            sa.select(lease.c.account_id).where(lease.c.account_id.in_(ids)).order_by(lease.c.account_id)
        ):
            listings = last_listings(ids)
            fill_in_leases(rows, listings)
            fill_in_mailboxes(rows, listings)
    changes.analyze("lease", "mailbox")


def fill_in_leases(rows: Sequence[Any], listings: dict[str, Any]) -> None:
    """Write the host of each account's URL, and when its mailbox was listed last."""
    looks = {account_id: row.ended_at for account_id, row in listings.items()}
    op.get_bind().execute(
        sa.update(lease)
        .where(lease.c.account_id == sa.bindparam("b_account_id"))
        .values(
            {
                name: sa.bindparam(f"b_{name}", type_=lease.c[name].type)
                for name in ("host", "looked_at", "late_at")
            }
        ),
        [
            {
                "b_account_id": row.id,
                "b_host": urlsplit(row.url).hostname or "",
                "b_looked_at": looks.get(row.id),
                "b_late_at": looks.get(row.id, row.created_at)
                + timedelta(seconds=max(LATE_SECONDS, 2 * row.interval_seconds)),
            }
            for row in rows
        ],
    )


def fill_in_mailboxes(rows: Sequence[Any], listings: dict[str, Any]) -> None:
    """Write the size of each account's archive, and its last listing, as far as its polls show it."""
    connection = op.get_bind()
    ids = [row.id for row in rows]
    held = {
        row.account_id: row
        for row in connection.execute(
            sa.select(
                capture.c.account_id,
                sa.func.count().label("captures"),
                sa.func.sum(capture.c.octets).label("octets"),
            )
            .where(capture.c.account_id.in_(ids))
            .group_by(capture.c.account_id)
        )
    }
    # After an interruption they are counted again, because captures were added meanwhile.
    connection.execute(sa.delete(mailbox).where(mailbox.c.account_id.in_(ids)))
    connection.execute(
        sa.insert(mailbox),
        [
            {
                "account_id": account_id,
                "captures": held[account_id].captures if account_id in held else 0,
                "octets": int(held[account_id].octets) if account_id in held else 0,
                "day_octets": 0,
                "listed_at": listings[account_id].ended_at if account_id in listings else None,
                "listed": listings[account_id].listed if account_id in listings else None,
                "quarantined": listings[account_id].quarantined if account_id in listings else 0,
                "to_come": listings[account_id].to_come if account_id in listings else 0,
            }
            for account_id in ids
        ],
    )


def last_listings(ids: Sequence[str]) -> dict[str, Any]:
    """The newest poll with a listing, by account."""
    newest = (
        sa.select(poll.c.account_id, sa.func.max(poll.c.token).label("token"))
        .where(poll.c.listed.is_not(None), poll.c.account_id.in_(ids))
        .group_by(poll.c.account_id)
        .subquery()
    )
    found = op.get_bind().execute(
        sa.select(poll).join(
            newest, sa.and_(newest.c.account_id == poll.c.account_id, newest.c.token == poll.c.token)
        )
    )
    return {row.account_id: row for row in found}


def pages() -> Iterator[Sequence[Any]]:
    """All accounts, in order."""
    last = ""
    while True:
        rows = (
            op.get_bind()
            .execute(sa.select(account).where(account.c.id > last).order_by(account.c.id).limit(ROWS_AT_ONCE))
            .all()
        )
        if not rows:
            return
        yield rows
        last = rows[-1].id

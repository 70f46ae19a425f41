"""What a hundred thousand mailboxes need: hosts and slots, schedules, what each mailbox showed last, days.

Runs beside a release that knows only 0001: every column that is added has a
default, and nothing is taken away but an index.
"""

from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import urlsplit

import sqlalchemy as sa
from alembic import op

from archiver.db.tables import UtcDateTime

revision = "0002"
down_revision = "0001"

ROWS_AT_ONCE = 1_000
LOOKS = ("looked_at", "late_at")
LATE_SECONDS = 600.0


def upgrade() -> None:
    add("account", sa.Column("cron", sa.Text()))
    add("account", sa.Column("time_zone", sa.Text(), nullable=False, server_default="UTC"))
    add("account", sa.Column("interval_max_seconds", sa.Float()))
    add("account", sa.Column("blackout", sa.Text(), nullable=False, server_default=""))
    add("account", sa.Column("day_octets", sa.BigInteger()))
    add("account", sa.Column("avoids", sa.Text(), nullable=False, server_default=""))
    add("account", sa.Column("deletion_hold", sa.Text()))

    add("lease", sa.Column("host", sa.Text(), nullable=False, server_default=""))
    add("lease", sa.Column("slot", sa.Integer()))
    add("lease", sa.Column("in_line", sa.Boolean(), nullable=False, server_default=sa.false()))
    add("lease", sa.Column("asked", sa.Boolean(), nullable=False, server_default=sa.false()))
    add("lease", sa.Column("interval_seconds", sa.Float()))
    add("lease", sa.Column("looked_at", UtcDateTime()))
    add("lease", sa.Column("late_at", UtcDateTime()))
    fill_in_hosts()
    # Two sessions in one slot of a host cannot be, whoever claims them.
    op.create_index(
        "uq_lease_host_slot",
        "lease",
        ["host", "slot"],
        unique=True,
        postgresql_where=sa.text("slot IS NOT NULL"),
        sqlite_where=sa.text("slot IS NOT NULL"),
    )
    # A row is in one of these four, where it was in one index by its due time before.
    for queue, columns, which in (
        ("due", ["due_at"], "slot IS NULL AND NOT in_line"),
        ("line", ["host", "due_at"], "in_line"),
    ):
        for health, failures in (("well", "failures = 0"), ("failing", "failures > 0")):
            where = sa.text(f"{which} AND {failures}")
            op.create_index(
                f"ix_lease_{queue}_{health}", "lease", columns, postgresql_where=where, sqlite_where=where
            )
    op.drop_index("ix_lease_due_at", "lease")

    op.create_index(
        "ix_sighting_by_uidl",
        "sighting",
        ["account_id", "epoch", "uidl", "size", "content"],
        postgresql_where=sa.text("absent_at IS NULL"),
        sqlite_where=sa.text("absent_at IS NULL"),
    )
    op.drop_index("ix_sighting_present", "sighting")

    op.create_table(
        "host",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("failing_since", UtcDateTime(), nullable=False),
        sa.Column("retry_at", UtcDateTime()),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("name", name="pk_host"),
    )

    op.create_table(
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
        # As the lease's row, this one is rewritten often.
        postgresql_with={"fillfactor": 70, "autovacuum_vacuum_scale_factor": 0.02},
    )
    op.execute(
        "INSERT INTO mailbox (account_id, captures, octets, quarantined, to_come, day_octets) "
        "SELECT account.id, coalesce(held.captures, 0), coalesce(held.octets, 0), 0, 0, 0 FROM account "
        "LEFT JOIN (SELECT account_id, count(*) AS captures, sum(octets) AS octets FROM capture "
        "GROUP BY account_id) AS held ON held.account_id = account.id"
    )
    fill_in_looks()

    for counted in ("deleted", "gone", "lost"):
        add("poll", sa.Column(counted, sa.Integer(), nullable=False, server_default="0"))
    add("poll", sa.Column("glanced", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("ix_poll_ended_at", "poll", ["ended_at"])
    op.create_index(
        "ix_poll_lost",
        "poll",
        ["ended_at"],
        postgresql_where=sa.text("lost > 0"),
        sqlite_where=sa.text("lost > 0"),
    )
    op.create_table(
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
    op.create_index("ix_poll_day_day", "poll_day", ["day"])
    op.create_index(
        "ix_poll_day_lost",
        "poll_day",
        ["day"],
        postgresql_where=sa.text("lost > 0"),
        sqlite_where=sa.text("lost > 0"),
    )
    op.create_table(
        "gap",
        sa.Column("account_id", sa.String(16), nullable=False),
        sa.Column("began_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_gap_account_id_account"),
        sa.PrimaryKeyConstraint("account_id", "began_at", name="pk_gap"),
    )
    op.create_index("ix_gap_ended_at", "gap", ["ended_at"])


def add(table: str, column: sa.Column[object]) -> None:
    op.add_column(table, column)


def fill_in_hosts() -> None:
    """The lease of each account names the host of the account's URL."""
    connection = op.get_bind()
    account = sa.table("account", sa.column("id"), sa.column("url"))
    lease = sa.table("lease", sa.column("account_id"), sa.column("host"))
    update = (
        sa.update(lease)
        .where(lease.c.account_id == sa.bindparam("b_account_id"))
        .values(host=sa.bindparam("b_host"))
    )
    for rows in pages(connection, account):
        connection.execute(
            update, [{"b_account_id": row.id, "b_host": urlsplit(row.url).hostname or ""} for row in rows]
        )


def fill_in_looks() -> None:
    """When each mailbox was listed last, and what it showed then, as far as its polls tell."""
    connection = op.get_bind()
    account = sa.table(
        "account", *map(sa.column, ("id", "interval_seconds")), sa.column("created_at", UtcDateTime())
    )
    poll = sa.table(
        "poll",
        *map(sa.column, ("account_id", "token", "listed", "quarantined", "to_come")),
        sa.column("ended_at", UtcDateTime()),
    )
    lease = sa.table("lease", sa.column("account_id"), *(sa.column(name, UtcDateTime()) for name in LOOKS))
    shown = ("listed", "quarantined", "to_come")
    mailbox = sa.table(
        "mailbox", *map(sa.column, ("account_id", *shown)), sa.column("listed_at", UtcDateTime())
    )
    for rows in pages(connection, account):
        newest = (
            sa.select(poll.c.account_id, sa.func.max(poll.c.token).label("token"))
            .where(poll.c.listed.is_not(None), poll.c.account_id.in_([row.id for row in rows]))
            .group_by(poll.c.account_id)
            .subquery()
        )
        listings = {
            row.account_id: row
            for row in connection.execute(
                sa.select(poll).join(
                    newest, sa.and_(newest.c.account_id == poll.c.account_id, newest.c.token == poll.c.token)
                )
            )
        }
        looks = {row.id: listings[row.id].ended_at for row in rows if row.id in listings}
        connection.execute(
            by_account(lease, *LOOKS),
            [
                {
                    "b_account_id": row.id,
                    "b_looked_at": looks.get(row.id),
                    "b_late_at": looks.get(row.id, row.created_at)
                    + timedelta(seconds=max(LATE_SECONDS, 2 * row.interval_seconds)),
                }
                for row in rows
            ],
        )
        if listings:
            connection.execute(
                by_account(mailbox, "listed_at", *shown),
                [
                    {"b_account_id": account_id, "b_listed_at": row.ended_at}
                    | {f"b_{name}": getattr(row, name) for name in shown}
                    for account_id, row in listings.items()
                ],
            )


def by_account(table: sa.TableClause, *names: str) -> sa.Update:
    """An update of these columns, many accounts at once."""
    return (
        sa.update(table)
        .where(table.c.account_id == sa.bindparam("b_account_id"))
        .values({name: sa.bindparam(f"b_{name}", type_=table.c[name].type) for name in names})
    )


def pages(connection: sa.Connection, account: sa.TableClause) -> Iterator[list[sa.Row[tuple[object, ...]]]]:
    last = ""
    while True:
        rows = list(
            connection.execute(
                sa.select(account).where(account.c.id > last).order_by(account.c.id).limit(ROWS_AT_ONCE)
            )
        )
        if not rows:
            return
        yield rows
        last = str(rows[-1].id)

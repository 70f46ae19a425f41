"""Leases: who may poll an account, until when. One narrow row for each account.

``due_at`` is set to the lease's end when it is claimed, so an account whose worker
died is due again without further action. ``states.LEASE_TRANSITIONS`` says which
state may follow which; ``claims`` makes leases, ``endings`` and ``put_off``
release them, ``schedule`` changes when an account is due.
"""

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import later
from archiver.db.tables import lease
from archiver.errors import LeaseLost
from archiver.model import Claim


def unless_parked(due_at: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """A due time for active accounts only: one that is stopped and polled by name stays not due."""
    return sa.case((lease.c.due_at.is_(None), sa.null()), else_=due_at)


def holder(connection: Connection, account_id: str) -> str | None:
    """The owner of the account's lease, alive or not; None when it is free."""
    return connection.execute(sa.select(lease.c.owner).where(lease.c.account_id == account_id)).scalar()


def is_unsettled(connection: Connection, account_id: str) -> bool:
    """Whether the store may be ahead of the database: a poll is under way, or ended half way."""
    found = connection.execute(
        sa.select(sa.or_(lease.c.owner.is_not(None), lease.c.recover)).where(lease.c.account_id == account_id)
    ).scalar()
    return bool(found)


def doubt_journals(connection: Connection) -> int:
    """Make each account's next poll look for segments that the database lacks; returns how many will."""
    doubted = sa.update(lease).where(lease.c.recover.is_(False)).values(recover=True)
    return connection.execute(doubted).rowcount


def fence(connection: Connection, claim: Claim) -> datetime | None:
    """Lock the lease's row for the rest of this transaction, and check that the claim still stands.

    Returns the time from which the next listing or glance counts as late. Raises
    LeaseLost when a newer token has been given out.
    """
    current = connection.execute(_FENCE, {"b_account_id": claim.account_id}).first()
    if current is None or current.token != claim.token:
        raise LeaseLost(f"account {claim.account_id} is polled by another worker now")
    late_at: datetime | None = current.late_at
    return late_at


_FENCE = (
    sa.select(lease.c.token, lease.c.late_at)
    .where(lease.c.account_id == sa.bindparam("b_account_id"))
    .with_for_update()
)


def renew(connection: Connection, claims: Iterable[Claim], *, lease_seconds: float) -> Collection[Claim]:
    """Heartbeat: extend the leases. Returns the claims that still stand."""
    wanted = {(claim.account_id, claim.token): claim for claim in claims}
    until = later(connection, lease_seconds)
    # In one order everywhere, so that two workers' batches cannot deadlock.
    renewed = (
        sa.select(lease.c.account_id)
        .where(sa.tuple_(lease.c.account_id, lease.c.token).in_(list(wanted)), lease.c.owner.is_not(None))
        .order_by(lease.c.account_id)
        .with_for_update()
        .cte("renewed")
    )
    rows = connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == renewed.c.account_id)
        .values(expires_at=until, due_at=unless_parked(until))
        .returning(lease.c.account_id, lease.c.token)
    )
    return {wanted[row.account_id, row.token] for row in rows}


def put_off(connection: Connection, claim: Claim, after_seconds: float) -> None:
    """Release an account that was not polled, due later. Raises LeaseLost."""
    fence(connection, claim)
    connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == claim.account_id)
        .values(
            owner=None,
            expires_at=None,
            due_at=unless_parked(later(connection, after_seconds)),
            slot=None,
            asked=False,
            recover=claim.recover,
        )
    )

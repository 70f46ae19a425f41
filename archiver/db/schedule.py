"""Leases: who may poll which account, until when, and when it is due.

One narrow row an account. A claim is one statement, so that of any number of
workers each account has one holder; its token only grows, and every later
write names it. ``due_at`` is set to the lease's end at the claim, so an account
whose worker died is due again without anybody's doing. Only the database's
clock decides.
"""

from collections.abc import Collection, Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import later, now
from archiver.db.tables import account, lease
from archiver.errors import LeaseLost
from archiver.model import Claim
from archiver.policy import NextPoll, Setbacks


def claim_due(connection: Connection, *, owner: str, lease_seconds: float, limit: int) -> list[Claim]:
    """Claim up to ``limit`` accounts that are due, the longest overdue first.

    SKIP LOCKED lets workers pass each other by; SQLite has one writer at a time
    and needs none.
    """
    due = (
        sa.select(lease.c.account_id)
        .where(lease.c.due_at <= now(connection))
        .order_by(lease.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    wanted = lease.c.account_id.in_(sa.select(due.c.account_id))
    return _claim(connection, wanted, owner=owner, lease_seconds=lease_seconds)


def claim_account(
    connection: Connection, account_id: str, *, owner: str, lease_seconds: float, take_over: str | None = None
) -> Claim | None:
    """Claim one account whatever its schedule says; None while another holds it.

    ``take_over`` names an owner that is known to be dead: its lease is not
    waited for.
    """
    free = sa.or_(lease.c.owner.is_(None), lease.c.expires_at <= now(connection), lease.c.owner == take_over)
    wanted = sa.and_(lease.c.account_id == account_id, free)
    claims = _claim(connection, wanted, owner=owner, lease_seconds=lease_seconds)
    return claims[0] if claims else None


def _claim(
    connection: Connection, wanted: sa.ColumnElement[bool], *, owner: str, lease_seconds: float
) -> list[Claim]:
    until = later(connection, lease_seconds)
    rows = connection.execute(
        sa.update(lease)
        .where(wanted)
        .values(
            token=lease.c.token + 1,
            owner=owner,
            expires_at=until,
            due_at=_unless_paused(until),
            # Whoever did not release may have left a journal segment that the
            # database has not seen.
            recover=sa.or_(lease.c.recover, lease.c.owner.is_not(None)),
        )
        .returning(lease.c.account_id, lease.c.token, lease.c.recover)
    )
    return [Claim(row.account_id, row.token, bool(row.recover)) for row in rows]


def _unless_paused(due_at: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    # A paused account that somebody polls by name must not fall due when that
    # somebody dies.
    return sa.case((lease.c.due_at.is_(None), sa.null()), else_=due_at)


def holder(connection: Connection, account_id: str) -> str | None:
    """Who holds the account's lease at this moment, alive or not."""
    return connection.execute(sa.select(lease.c.owner).where(lease.c.account_id == account_id)).scalar()


def is_unsettled(connection: Connection, account_id: str) -> bool:
    """Whether the store may have what the database has not yet: a poll goes on, or ended half way."""
    found = connection.execute(
        sa.select(sa.or_(lease.c.owner.is_not(None), lease.c.recover)).where(lease.c.account_id == account_id)
    ).scalar()
    return bool(found)


def fence(connection: Connection, claim: Claim) -> None:
    """Lock the lease's row for the rest of this transaction, and see that the claim still stands.

    Raises LeaseLost when a newer token was given out.
    """
    current = connection.execute(
        sa.select(lease.c.token).where(lease.c.account_id == claim.account_id).with_for_update()
    ).scalar()
    if current != claim.token:
        raise LeaseLost(f"account {claim.account_id} is polled by another worker now")


def renew(connection: Connection, claims: Iterable[Claim], *, lease_seconds: float) -> Collection[Claim]:
    """Heartbeat: extend the leases. Returns the claims that still stand."""
    until = later(connection, lease_seconds)
    held: set[Claim] = set()
    # In one order everywhere, so that two workers' batches cannot deadlock.
    for claim in sorted(claims, key=lambda claim: claim.account_id):
        kept = connection.execute(
            sa.update(lease)
            .where(
                lease.c.account_id == claim.account_id,
                lease.c.token == claim.token,
                lease.c.owner.is_not(None),
            )
            .values(expires_at=until, due_at=_unless_paused(until))
            .returning(lease.c.account_id)
        ).scalar()
        if kept is not None:
            held.add(claim)
    return held


def setbacks(connection: Connection, account_id: str) -> Setbacks:
    """The polls that failed in a row so far."""
    row = connection.execute(
        sa.select(lease.c.failures, lease.c.refusals).where(lease.c.account_id == account_id)
    ).one()
    return Setbacks(row.failures, row.refusals)


def release(
    connection: Connection,
    claim: Claim,
    following: NextPoll,
    *,
    recover: bool,
    disproved: str | None = None,
) -> None:
    """Give the account back, due when ``following`` says. Call within ``fence``.

    An account that an operator paused or removed meanwhile is due no more, and
    for that reason, whatever the poll's outcome. ``disproved`` is the reason of
    a pause that this poll showed to hold no longer.
    """
    found = connection.execute(
        sa.select(account.c.paused_reason).where(account.c.id == claim.account_id)
    ).scalar()
    reason = following.pause_reason if found in (None, disproved) else found
    if reason != found:
        connection.execute(
            sa.update(account).where(account.c.id == claim.account_id).values(paused_reason=reason)
        )
    connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == claim.account_id, lease.c.token == claim.token)
        .values(
            owner=None,
            expires_at=None,
            due_at=None if reason is not None else later(connection, following.after_seconds or 0.0),
            recover=recover,
            failures=following.setbacks.failures,
            refusals=following.setbacks.refusals,
        )
    )


def pause(connection: Connection, account_id: str, reason: str) -> None:
    """Stop polling an account after the poll that may be under way."""
    connection.execute(sa.update(account).where(account.c.id == account_id).values(paused_reason=reason))
    connection.execute(sa.update(lease).where(lease.c.account_id == account_id).values(due_at=None))


def resume(connection: Connection, account_id: str) -> None:
    """Poll an account again, from now on, with its setbacks forgotten."""
    connection.execute(sa.update(account).where(account.c.id == account_id).values(paused_reason=None))
    connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == account_id)
        .values(
            failures=0,
            refusals=0,
            # While somebody holds it, its due time is the lease's end.
            due_at=sa.case((lease.c.owner.is_(None), now(connection)), else_=lease.c.expires_at),
        )
    )

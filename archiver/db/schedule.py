"""When accounts are due, by the decision of a person or a command: stop, resume, poll now, changed."""

from collections.abc import Collection
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import now
from archiver.db.tables import account, lease
from archiver.model import mail_host
from archiver.states import ACCOUNT_TRANSITIONS, AccountState, sources

_ASKED = sa.or_(lease.c.asked, lease.c.owner.is_not(None))


def stop(connection: Connection, account_id: str, state: AccountState, reason: str | None = None) -> None:
    """Stop polling an account, in a state other than active. A poll under way is finished."""
    if _enter(connection, account_id, state, reason):
        connection.execute(
            sa.update(lease).where(lease.c.account_id == account_id).values(due_at=None, queued=False)
        )


def _enter(connection: Connection, account_id: str, state: AccountState, reason: str | None = None) -> bool:
    """Change an account's state, if ``ACCOUNT_TRANSITIONS`` allows that; whether it does."""
    allowed = sources(ACCOUNT_TRANSITIONS, state)
    entered = connection.execute(
        sa.update(account)
        .where(account.c.id == account_id, account.c.state.in_(allowed))
        .values(state=state, state_reason=reason)
    )
    return entered.rowcount > 0


def resume(connection: Connection, account_id: str) -> None:
    """Poll an account again, from now on, with its setbacks forgotten."""
    _enter(connection, account_id, AccountState.ACTIVE)
    connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == account_id)
        .values(
            failures=0,
            refusals=0,
            queued=False,
            # While a worker has it, its due time is the lease's end.
            due_at=sa.case((lease.c.owner.is_(None), now(connection)), else_=lease.c.expires_at),
        )
    )


def ask(connection: Connection, account_ids: Collection[str] | None = None) -> int:
    """Make these accounts due now, or all; returns how many. An account that is not active is left out.

    An overdue account keeps its rank. One that is being polled is due again as
    soon as that poll has ended.
    """
    current = now(connection)
    earlier = sa.case((lease.c.due_at < current, lease.c.due_at), else_=current)
    wanted = sa.true() if account_ids is None else lease.c.account_id.in_(list(account_ids))
    asked = connection.execute(
        sa.update(lease)
        .where(wanted, lease.c.due_at.is_not(None))
        .values(
            due_at=sa.case((lease.c.owner.is_(None), earlier), else_=lease.c.due_at),
            asked=_ASKED,
        )
    )
    return asked.rowcount


def ask_again(connection: Connection, account_id: str) -> None:
    """Have another poll follow the one under way, because what that one began with has changed."""
    connection.execute(sa.update(lease).where(lease.c.account_id == account_id).values(asked=_ASKED))


def reconsider(connection: Connection, account_id: str, url: str, due_at: datetime | None) -> None:
    """Apply a changed account: it is due at its new host at ``due_at`` or, with None, now.

    An account that is being polled is due when that poll has ended; until then its
    session counts at the old host. An account that is not active stays parked.
    """
    connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == account_id, lease.c.slot.is_(None))
        .values(host=mail_host(url), queued=False)
    )
    soon = now(connection) if due_at is None else sa.bindparam("due_at", due_at, type_=lease.c.due_at.type)
    connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == account_id, lease.c.due_at.is_not(None))
        .values(
            due_at=sa.case((lease.c.owner.is_(None), soon), else_=lease.c.due_at),
            asked=_ASKED,
            interval_seconds=None,
        )
    )

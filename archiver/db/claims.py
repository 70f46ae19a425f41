"""Claims: which accounts a worker polls next.

A claim is one statement, so each account has one holder whatever the number of
workers; its token only grows, and every later write names it. Only the
database's clock decides. The statements for many accounts are in
``claims.postgresql.sql`` and ``claims.sqlite.sql``, whole.

A host has a number of session slots, shared by all workers, and a poll takes one.
Claims take turns, so no two choose the same slot; a unique index would refuse the
second. An account that is due and finds no slot is queued at its host. A claim
looks at the first of each queue: it costs the same behind a full host with fifty
thousand accounts due as behind one with none. An account without a holder is in
one of four indexes: due or queued, and in each case those whose last poll failed
apart.
"""

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import later, now
from archiver.db.hosts import DEFAULT_SESSIONS, HostSessions
from archiver.db.leases import unless_parked
from archiver.db.tables import lease
from archiver.model import Claim

CLAIM_LOCK = 0x636C616D
"""The advisory lock by which claims take turns on PostgreSQL: "clam" in ASCII. It ends with its transaction,
so that it works behind PgBouncer in transaction mode."""

QUEUED_AT_ONCE = 5_000
"""Due accounts that are looked at, and queued if need be, in one go."""

LOOK_AHEAD = 4
"""How many times as many accounts as are wanted are looked at: those beyond their host's slots fall out."""

_STATEMENT = re.compile(r"-- name: (\w+)\n(.*?);\n", re.DOTALL)
_COMMENT = re.compile(r"^ *--.*\n", re.MULTILINE)


@cache
def statements(dialect: str) -> Mapping[str, sa.TextClause]:
    """The statements of ``claims.<dialect>.sql``, by name."""
    text = Path(__file__).with_name(f"claims.{dialect}.sql").read_text("utf-8")
    return {name: sa.text(_COMMENT.sub("", statement)) for name, statement in _STATEMENT.findall(text)}


def _run(connection: Connection, name: str, sessions: HostSessions, **values: object) -> sa.CursorResult[Any]:
    of_hosts = {"others": sessions.others, "named": json.dumps(dict(sessions.named))}
    return connection.execute(statements(connection.dialect.name)[name], of_hosts | values)


def _limits(limit: int, failing_limit: int | None) -> dict[str, int]:
    failing_limit = limit if failing_limit is None else failing_limit
    return {"limit": limit, "failing_limit": failing_limit, "looked_at": LOOK_AHEAD * limit}


def claim_due(
    connection: Connection,
    *,
    owner: str,
    lease_seconds: float,
    limit: int,
    failing_limit: int | None = None,
    sessions: HostSessions = DEFAULT_SESSIONS,
    in_turn: bool = False,
) -> list[Claim]:
    """Claim up to ``limit`` accounts that are due and whose host has room, the longest overdue first.

    Of those whose last poll failed it takes at most ``failing_limit``. An expired
    lease keeps its slot, because its worker may be alive, and passes it on. With
    ``in_turn`` the caller has called ``take_turn`` in this transaction.
    """
    if not in_turn:
        take_turn(connection)
    rows = _run(
        connection,
        "claim_due",
        sessions,
        owner=owner,
        lease_seconds=lease_seconds,
        most_of_all=max([sessions.others, *sessions.named.values()]),
        **_limits(limit, failing_limit),
    )
    return [_claim(row) for row in rows]


def count_due(
    connection: Connection,
    *,
    limit: int,
    failing_limit: int | None = None,
    sessions: HostSessions = DEFAULT_SESSIONS,
) -> int:
    """How many accounts a claim with these limits would get."""
    return int(_run(connection, "count_due", sessions, **_limits(limit, failing_limit)).scalar_one())


def queue_at_hosts(connection: Connection, *, sessions: HostSessions = DEFAULT_SESSIONS) -> int:
    """Queue the accounts that are due and for which their host has no room; returns how many.

    Claims do not do this each time: any worker calls it every few seconds. It also
    frees the slot of an account that was stopped while a worker held it and died,
    because no claim will ever take that account.
    """
    connection.execute(
        sa.update(lease)
        .where(lease.c.slot.is_not(None), lease.c.due_at.is_(None), lease.c.expires_at <= now(connection))
        .values(slot=None)
    )
    return len(_run(connection, "queue_at_hosts", sessions, looked_at=QUEUED_AT_ONCE).all())


def hosts_with_queues(connection: Connection, names: Collection[str]) -> set[str]:
    """Which of these hosts have accounts in a queue."""
    return {name for name in names if connection.execute(_HAS_QUEUE, {"name": name}).scalar()}


# Worded like the two indexes that have a host's queue.
_HAS_QUEUE = sa.select(
    sa.or_(
        *(
            sa.exists().where(lease.c.queued, failures, lease.c.host == sa.bindparam("name"))
            for failures in (lease.c.failures == sa.text("0"), lease.c.failures > sa.text("0"))
        )
    )
)


def claim_account(
    connection: Connection,
    account_id: str,
    *,
    owner: str,
    lease_seconds: float,
    take_over: str | None = None,
    sessions: HostSessions = DEFAULT_SESSIONS,
) -> Claim | None:
    """Claim one account whatever its schedule says; None while another holds it, or its host is full.

    ``take_over`` names an owner that is known to be dead: its lease counts as
    expired. The claim is made even while the host is backing off.
    """
    take_turn(connection)
    free = sa.or_(lease.c.owner.is_(None), lease.c.expires_at <= now(connection), lease.c.owner == take_over)
    found = connection.execute(
        sa.select(lease.c.host, lease.c.slot)
        .where(lease.c.account_id == account_id, free)
        .with_for_update(skip_locked=True)
    ).first()
    if found is None:
        return None
    slot = found.slot or _free_slot(connection, found.host, sessions.of(found.host))
    if slot is None:
        return None
    until = later(connection, lease_seconds)
    row = connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == account_id)
        .values(
            token=lease.c.token + 1,
            owner=owner,
            expires_at=until,
            due_at=unless_parked(until),
            recover=sa.or_(lease.c.recover, lease.c.owner.is_not(None)),
            slot=slot,
            queued=False,
            asked=False,
        )
        .returning(lease.c.account_id, lease.c.token, lease.c.recover, lease.c.host, lease.c.failures)
    ).one()
    return _claim(row)


def _free_slot(connection: Connection, name: str, most: int) -> int | None:
    taken = set(
        connection.execute(
            sa.select(lease.c.slot).where(lease.c.host == name, lease.c.slot.is_not(None))
        ).scalars()
    )
    free = (number for number in range(1, most + 1) if number not in taken)
    return next(free, None) if len(taken) < most else None


def take_turn(connection: Connection, *, may_wait: bool = True) -> bool:
    """Wait for the claim that is under way, so that the next statement sees what it took.

    Returns False when there is one and the caller may not wait; with leases locked
    it must not. SQLite has one writer at a time anyway.
    """
    if connection.dialect.name != "postgresql":
        return True
    return connection.execute(_TURN if may_wait else _TURN_AT_ONCE).scalar() is not False


# With a bitmap scan PostgreSQL would read and sort a host's whole queue for its first rows.
_NO_BITMAPS = sa.func.set_config("enable_bitmapscan", "off", sa.true())
_TURN = sa.select(sa.func.pg_advisory_xact_lock(CLAIM_LOCK), _NO_BITMAPS)
_TURN_AT_ONCE = sa.select(sa.func.pg_try_advisory_xact_lock(CLAIM_LOCK), _NO_BITMAPS)


def _claim(row: Any) -> Claim:
    return Claim(row.account_id, row.token, bool(row.recover), host=row.host, failing=row.failures > 0)

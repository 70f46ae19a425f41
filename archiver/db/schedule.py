"""Leases: who may poll which account, until when, and when it is due.

One narrow row an account. A claim is one statement, so that of any number of
workers each account has one holder; its token only grows, and every later
write names it. ``due_at`` is set to the lease's end at the claim, so an account
whose worker died is due again without anybody's doing. Only the database's
clock decides.

A host has so many slots, over all workers, and a poll takes one up. Claims take
turns, so that no two choose the same; a unique index would refuse the second.
What is due and finds no slot is put in line at its host, out of the way: a
claim looks at the first of each line, and costs the same behind a full host
with fifty thousand accounts due as behind one with none. An account that nobody
holds is in one of four indexes: due or in line, and of each those whose last
poll failed apart.

``host`` has a row for each host in trouble, and none for a healthy one. Polls
that could not even begin are counted there; from some number on the host is
closed to all its accounts until a time, and then tried with one poll.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from archiver.db import later, now
from archiver.db.tables import account, host, lease
from archiver.errors import LeaseLost
from archiver.model import Claim, mail_host
from archiver.policy import host_retry_seconds
from archiver.states import ACCOUNT_TRANSITIONS, AccountState, sources

CLAIM_LOCK = 0x636C616D
"""The advisory lock by which claims take turns on PostgreSQL: "clam" in ASCII. It ends with its transaction,
so that it works behind PgBouncer in transaction mode."""

LINED_UP_AT_ONCE = 5_000
"""Accounts that are looked at, and put in line if need be, in one go."""

LOOK_AHEAD = 4
"""How many times as many accounts as are wanted are looked at: those beyond their host's slots fall out."""


@dataclass(frozen=True, slots=True)
class HostSessions:
    """Sessions that a mail host may have at once, over all workers: ``others`` where it is not named."""

    others: int = 20
    named: Mapping[str, int] = field(default_factory=dict)

    def of(self, name: str) -> int:
        return self.named.get(name, self.others)


DEFAULT_SESSIONS = HostSessions()

# The sessions of the moment, and from them and from the hosts in trouble those
# hosts that are not wholly free, with the room that they have: for a new
# session, and for one that takes over from a dead worker.
_TIGHT = """
WITH RECURSIVE
taken AS MATERIALIZED (
    SELECT account_id, host, slot, due_at, failures, expires_at <= {now} AS over
    FROM lease WHERE slot IS NOT NULL
),
tight AS MATERIALIZED (
    SELECT host, min(most) - sum(alive) - sum(dead) AS room, min(most) - sum(alive) AS room_of_dead
    FROM (
        SELECT host, {most_of_taken} AS most,
            CASE WHEN over THEN 0 ELSE 1 END AS alive, CASE WHEN over THEN 1 ELSE 0 END AS dead
        FROM taken
        UNION ALL
        SELECT name, CASE WHEN retry_at > {now} THEN 0 ELSE 1 END, 0, 0 FROM host WHERE retry_at IS NOT NULL
    ) AS sessions
    GROUP BY host
),"""

# The accounts that are due and in no line, the first of each line, and those
# whose lease ran out. Of these as many of each host as it has room for, no more
# than a few of those that failed, and the longest overdue first.
_CHOSEN = """{lines}
candidates AS (
    SELECT * FROM ({due_well}) AS due_well
    UNION ALL SELECT * FROM ({due_failing}) AS due_failing
    UNION ALL SELECT * FROM ({heads_well}) AS heads_well
    UNION ALL SELECT * FROM ({heads_failing}) AS heads_failing
    UNION ALL SELECT account_id, host, due_at, slot, failures > 0 FROM taken WHERE over AND due_at <= {now}
),
placed AS (
    SELECT candidates.*, row_number() OVER (
        PARTITION BY host, slot IS NULL ORDER BY due_at, account_id
    ) AS place
    FROM candidates
),
fitting AS (
    SELECT placed.*, row_number() OVER (PARTITION BY failing ORDER BY due_at, account_id) AS turn
    FROM placed LEFT JOIN tight ON tight.host = placed.host
    WHERE place <= coalesce(CASE WHEN slot IS NULL THEN room ELSE room_of_dead END, {most_of_placed})
),
chosen AS (
    SELECT account_id, host, slot, place FROM fitting
    WHERE NOT failing OR turn <= :failing_limit
    ORDER BY due_at, account_id LIMIT :limit
)"""

_DUE = """
        SELECT account_id, host, due_at, slot, failures > 0 AS failing FROM lease
        WHERE slot IS NULL AND NOT queued AND {failures} AND due_at <= {now}
            AND host NOT IN (SELECT host FROM tight WHERE room <= 0)
        ORDER BY due_at LIMIT {looked_at}"""

# From one host with a line to the next, by the index: those in line are not looked at.
_LINES_POSTGRESQL = """
line_{health}(host) AS (
    SELECT min(host) FROM lease WHERE queued AND {failures}
    UNION ALL
    SELECT (SELECT min(host) FROM lease WHERE queued AND {failures} AND host > line_{health}.host)
    FROM line_{health} WHERE line_{health}.host IS NOT NULL
),"""
_HEADS_POSTGRESQL = """
        SELECT head.* FROM line_{health} AS line
        CROSS JOIN LATERAL (
            SELECT account_id, host, due_at, slot, failures > 0 AS failing FROM lease
            WHERE queued AND {failures} AND host = line.host ORDER BY due_at LIMIT {looked_at}
        ) AS head
        WHERE line.host NOT IN (SELECT host FROM tight WHERE room <= 0)"""

# SQLite knows no LATERAL. Its lines are those of one machine.
_HEADS_SQLITE = """
        SELECT account_id, host, due_at, slot, failing FROM (
            SELECT account_id, host, due_at, slot, failures > 0 AS failing,
                row_number() OVER (PARTITION BY host ORDER BY due_at) AS place
            FROM lease
            WHERE queued AND {failures} AND host NOT IN (SELECT host FROM tight WHERE room <= 0)
        ) AS heads WHERE place <= {looked_at}"""

# Each gets the lowest number that is free. A row that is locked is passed by: it is being changed. Whoever
# did not release may have left a journal segment that the database has not seen.
_CLAIM = """,
number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < :most_of_all),
free AS (
    SELECT host, n, row_number() OVER (PARTITION BY host ORDER BY n) AS place
    FROM (
        SELECT host, max(place) + (SELECT count(*) FROM taken WHERE taken.host = chosen.host) AS last
        FROM chosen WHERE slot IS NULL GROUP BY host
    ) AS wanted JOIN number ON n <= last
    WHERE NOT EXISTS (SELECT 1 FROM taken WHERE taken.host = wanted.host AND taken.slot = n)
),
seated AS (
    SELECT chosen.account_id, coalesce(chosen.slot, free.n) AS slot
    FROM chosen
    JOIN lease ON lease.account_id = chosen.account_id
    LEFT JOIN free ON free.host = chosen.host AND free.place = chosen.place
    WHERE lease.due_at <= {now} AND coalesce(chosen.slot, free.n) IS NOT NULL
    {skip_locked}
)
UPDATE lease SET
    token = token + 1,
    owner = :owner,
    expires_at = {until},
    due_at = {until},
    recover = recover OR owner IS NOT NULL,
    slot = seated.slot,
    queued = false,
    asked = false
FROM seated WHERE lease.account_id = seated.account_id
RETURNING lease.account_id, lease.token, lease.recover, lease.host, lease.failures"""

_COUNT = """
SELECT count(*) FROM chosen"""

_LINE_UP = """
front AS (
    SELECT account_id, host, row_number() OVER (PARTITION BY host ORDER BY due_at, account_id) AS place
    FROM ({front_well}
        UNION ALL {front_failing}
    ) AS due
),
waiting AS (
    SELECT lease.account_id FROM front
    JOIN lease ON lease.account_id = front.account_id
    LEFT JOIN tight ON tight.host = front.host
    WHERE place > coalesce(room, {most_of_front})
        AND lease.slot IS NULL AND NOT lease.queued AND lease.due_at <= {now}
    {skip_locked}
)
UPDATE lease SET queued = true FROM waiting WHERE lease.account_id = waiting.account_id
RETURNING lease.account_id"""

_FRONT = """
        SELECT * FROM (
            SELECT account_id, host, due_at FROM lease
            WHERE slot IS NULL AND NOT queued AND {failures} AND due_at <= {now}
            ORDER BY due_at LIMIT :lined_up
        ) AS front_{health}"""

_SQLITE = {
    "now": "strftime('%Y-%m-%d %H\\:%M\\:%f000', 'now')",
    "until": "strftime('%Y-%m-%d %H\\:%M\\:%f000', 'now', :lease_seconds || ' seconds')",
    "skip_locked": "",
    "lines": "",
    "heads": _HEADS_SQLITE,
}
_POSTGRESQL = {
    "now": "now()",
    "until": "now() + make_interval(secs => :lease_seconds)",
    "skip_locked": "FOR UPDATE OF lease SKIP LOCKED",
    "lines": _LINES_POSTGRESQL,
    "heads": _HEADS_POSTGRESQL,
}
_HEALTH = {"well": ("failures = 0", ":looked_at"), "failing": ("failures > 0", ":failing_limit")}


def _worded(connection: Connection, template: str, sessions: HostSessions) -> sa.TextClause:
    """The statement in the words of this database, with a case for each host that is named."""
    return _in_words_of(connection.dialect.name, template, len(sessions.named))


@cache
def _in_words_of(name: str, template: str, named: int) -> sa.TextClause:
    dialect = _SQLITE if name == "sqlite" else _POSTGRESQL
    words = {name: dialect[name] for name in ("now", "until", "skip_locked")}
    for table in ("taken", "placed", "front"):
        cases = "".join(f" WHEN :name_{n} THEN :most_{n}" for n in range(named))
        most = f"CASE {table}.host{cases} ELSE :others END" if cases else ":others"
        words[f"most_of_{table}"] = f"CAST({most} AS integer)"
    lines = ""
    for health, (failures, looked_at) in _HEALTH.items():
        kind = {"health": health, "failures": failures, "looked_at": looked_at, "now": words["now"]}
        words[f"due_{health}"] = _DUE.format(**kind)
        words[f"heads_{health}"] = dialect["heads"].format(**kind)
        words[f"front_{health}"] = _FRONT.format(**kind)
        lines += dialect["lines"].format(**kind)
    return sa.text(template.format(lines=lines, **words))


def _values(sessions: HostSessions) -> dict[str, Any]:
    values: dict[str, Any] = {"others": sessions.others}
    for n, (name, most) in enumerate(sessions.named.items()):
        values |= {f"name_{n}": name, f"most_{n}": most}
    return values


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

    Of those whose last poll failed it takes ``failing_limit`` at most. A lease
    that ran out keeps its slot, since its worker may live, and hands it on.
    SKIP LOCKED passes by what is being changed; SQLite has one writer at a time
    and needs none. Claims take turns: with ``in_turn`` the caller has taken it.
    """
    if not in_turn:
        take_turn(connection)
    rows = connection.execute(
        _worded(connection, _TIGHT + _CHOSEN + _CLAIM, sessions),
        {
            "owner": owner,
            "lease_seconds": lease_seconds,
            "most_of_all": max([sessions.others, *sessions.named.values()]),
            **_limits(limit, failing_limit),
            **_values(sessions),
        },
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
    statement = _worded(connection, _TIGHT + _CHOSEN + _COUNT, sessions)
    counted = connection.execute(statement, _limits(limit, failing_limit) | _values(sessions)).scalar_one()
    return int(counted)


def queue_at_hosts(connection: Connection, *, sessions: HostSessions = DEFAULT_SESSIONS) -> int:
    """What claims need not do each time; to be called every few seconds, by anybody.

    Accounts that are due, and for which their host has no room, are put in
    line there; returns how many. And an account that was paused while a worker held
    it gives its slot back if that worker died: nobody will claim it.
    """
    connection.execute(
        sa.update(lease)
        .where(lease.c.slot.is_not(None), lease.c.due_at.is_(None), lease.c.expires_at <= now(connection))
        .values(slot=None)
    )
    statement = _worded(connection, _TIGHT + _LINE_UP, sessions)
    return len(connection.execute(statement, {"lined_up": LINED_UP_AT_ONCE} | _values(sessions)).all())


def hosts_with_lines(connection: Connection, names: Collection[str]) -> set[str]:
    """Which of these hosts have accounts in line."""
    return {name for name in names if connection.execute(_HAS_LINE, {"name": name}).scalar()}


# In the words of the two indexes that have a host's line.
_HAS_LINE = sa.select(
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

    ``take_over`` names an owner that is known to be dead: its lease is not
    waited for. That the host is closed does not matter: somebody asked.
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
            due_at=_unless_paused(until),
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
    """Wait for the claim that is under way: the next statement sees what it took. SQLite's writers do so.

    False where there is one, and nobody may wait: with leases locked, nobody should.
    """
    if connection.dialect.name != "postgresql":
        return True
    return connection.execute(_TURN if may_wait else _TURN_AT_ONCE).scalar() is not False


# By a bitmap PostgreSQL would read a host's whole line, and sort it, for the head of it.
_NO_BITMAPS = sa.func.set_config("enable_bitmapscan", "off", sa.true())
_TURN = sa.select(sa.func.pg_advisory_xact_lock(CLAIM_LOCK), _NO_BITMAPS)
_TURN_AT_ONCE = sa.select(sa.func.pg_try_advisory_xact_lock(CLAIM_LOCK), _NO_BITMAPS)


def _claim(row: Any) -> Claim:
    return Claim(row.account_id, row.token, bool(row.recover), host=row.host, failing=row.failures > 0)


def _unless_paused(due_at: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    # A paused account that somebody polls by name must not fall due when that
    # somebody dies.
    return sa.case((lease.c.due_at.is_(None), sa.null()), else_=due_at)


_ASKED = sa.or_(lease.c.asked, lease.c.owner.is_not(None))


def holder(connection: Connection, account_id: str) -> str | None:
    """Who holds the account's lease at this moment, alive or not."""
    return connection.execute(sa.select(lease.c.owner).where(lease.c.account_id == account_id)).scalar()


def is_unsettled(connection: Connection, account_id: str) -> bool:
    """Whether the store may have what the database has not yet: a poll goes on, or ended half way."""
    found = connection.execute(
        sa.select(sa.or_(lease.c.owner.is_not(None), lease.c.recover)).where(lease.c.account_id == account_id)
    ).scalar()
    return bool(found)


def doubt_journals(connection: Connection) -> int:
    """Have each account's next poll look for segments that the database lacks; returns how many do."""
    doubted = sa.update(lease).where(lease.c.recover.is_(False)).values(recover=True)
    return connection.execute(doubted).rowcount


def fence(connection: Connection, claim: Claim) -> datetime | None:
    """Lock the lease's row for the rest of this transaction, and see that the claim still stands.

    Returns since when the next look into the mailbox is late, or will be.
    Raises LeaseLost when a newer token was given out.
    """
    current = connection.execute(_FENCE, {"b_account_id": claim.account_id}).first()
    if current is None or current.token != claim.token:
        raise LeaseLost(f"account {claim.account_id} is polled by another worker now")
    return cast("datetime | None", current.late_at)


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
    held = (
        sa.select(lease.c.account_id)
        .where(sa.tuple_(lease.c.account_id, lease.c.token).in_(list(wanted)), lease.c.owner.is_not(None))
        .order_by(lease.c.account_id)
        .with_for_update()
        .cte("held")
    )
    rows = connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == held.c.account_id)
        .values(expires_at=until, due_at=_unless_paused(until))
        .returning(lease.c.account_id, lease.c.token)
    )
    return {wanted[row.account_id, row.token] for row in rows}


def put_off(connection: Connection, claim: Claim, after_seconds: float) -> None:
    """Give an account back that was not polled, due later. Raises LeaseLost."""
    fence(connection, claim)
    connection.execute(
        sa.update(lease)
        .where(lease.c.account_id == claim.account_id)
        .values(
            owner=None,
            expires_at=None,
            due_at=_unless_paused(later(connection, after_seconds)),
            slot=None,
            asked=False,
            recover=claim.recover,
        )
    )


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
            # While somebody holds it, its due time is the lease's end.
            due_at=sa.case((lease.c.owner.is_(None), now(connection)), else_=lease.c.expires_at),
        )
    )


def ask(connection: Connection, account_ids: Collection[str] | None = None) -> int:
    """Have accounts polled now: these, or all. Returns how many; one that is paused is not.

    One that is overdue keeps its place. One that is being polled is due again
    as soon as that poll has ended.
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
    """What a poll under way began with is so no longer: have another one follow it."""
    connection.execute(sa.update(lease).where(lease.c.account_id == account_id).values(asked=_ASKED))


def reconsider(connection: Connection, account_id: str, url: str, due_at: datetime | None) -> None:
    """An account was changed: it is due at its new host, at that moment or, with None, at once.

    One that is being polled is due when that poll has ended. Its session is
    still with the old host, until the release. One that is paused stays so.
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


class Trouble(NamedTuple):
    """A host that polls could not begin with. ``retry_at`` is null as long as it is not closed."""

    host: str
    failures: int
    failing_since: datetime
    retry_at: datetime | None
    error: str | None


def troubles(connection: Connection, name: str | None = None) -> list[Trouble]:
    """The hosts in trouble, or this one if it is, the longest in trouble first."""
    query = sa.select(host).order_by(host.c.failing_since, host.c.name)
    if name is not None:
        query = query.where(host.c.name == name)
    return [Trouble(*row) for row in connection.execute(query)]


def host_reached(connection: Connection, name: str) -> bool:
    """A poll of this host could begin. Whether that ends a trouble; a healthy host costs no write."""
    return connection.execute(sa.delete(host).where(host.c.name == name)).rowcount > 0


def host_unreached(connection: Connection, name: str, error: str | None, chance: float) -> Trouble | None:
    """A poll of this host could not even begin. Returns what is known of it if it is closed by that.

    Polls that began before it was closed count no more.
    """
    current = now(connection)
    insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(host)
    failures = connection.execute(
        insert.values(name=name, failures=1, failing_since=current, error=error)
        .on_conflict_do_update(
            index_elements=["name"],
            set_={"failures": host.c.failures + 1, "error": error},
            where=sa.or_(host.c.retry_at.is_(None), host.c.retry_at <= current),
        )
        .returning(host.c.failures)
    ).scalar()
    wait_seconds = None if failures is None else host_retry_seconds(failures, chance)
    if wait_seconds is None:
        return None
    row = connection.execute(
        sa.update(host)
        .where(host.c.name == name)
        .values(retry_at=later(connection, wait_seconds))
        .returning(*host.c)
    ).one()
    return Trouble(*row)

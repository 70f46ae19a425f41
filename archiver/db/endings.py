"""The ends of polls: reports kept, leases released, accounts set back, many in one transaction.

Most polls find nothing new, and their end is all that they write. So the ends of
polls that finish at the same moment are written together. The number of
statements does not depend on the number of polls, and each is built once.
Still, each ending stands for itself: if the lease of one was lost, its caller
learns that, and the others are kept. An ending that is written again, because
the answer to its commit was lost, changes nothing.

The clock, randomness and timetables come in as values. ``policy.next_poll``
decides when an account is due again; it is called here because it needs what
only the locked lease row knows.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import bulk, history, hosts, seconds_on
from archiver.db.hosts import Trouble
from archiver.db.tables import account, host, lease, mailbox, poll, sighting
from archiver.model import Claim, PollReport, mail_host
from archiver.policy import NextPoll, Setbacks, late_after_seconds, next_poll
from archiver.states import AccountState
from archiver.timetable import Timetable

Uniform = Callable[[float, float], float]
"""Draws a number between two others, as ``random.uniform`` does."""

Parameters = dict[str, object]
"""The values that a statement takes for one row, by name."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How one poll ended."""

    claim: Claim
    report: PollReport
    ended_at: datetime
    timetable: Timetable
    """The account's calendar, which decides with the report when the account is due again."""
    avoids: tuple[str, ...] = ()
    """What the account's server is known to trip over by now, as ``policy.remembered`` returns it."""
    ends_wait: bool = False
    """Whether the poll proves that an operator fixed what the account was waiting for."""


class Ended(NamedTuple):
    """The result of writing an ending."""

    lease_lost: bool = False
    host: Trouble | bool | None = None
    """A Trouble if the host backs off because of this poll, True if a trouble is over, else None."""


class ScheduleState(NamedTuple):
    """Where an account's schedule stands: polls that failed in a row, and the adaptive interval."""

    setbacks: Setbacks
    interval_seconds: float | None


class _Lease(NamedTuple):
    """A lease's row, locked, before it is released."""

    account_id: str
    token: int
    failures: int
    refusals: int
    interval_seconds: float | None
    late_at: datetime | None
    asked: bool

    @property
    def schedule_state(self) -> ScheduleState:
        return ScheduleState(Setbacks(self.failures, self.refusals), self.interval_seconds)


class _Account(NamedTuple):
    """An account's row, as operators left it."""

    id: str
    url: str
    state: AccountState
    state_reason: str | None
    avoids: str
    troubled: str | None
    """Its host's name, if the host is in trouble."""


_Leases = dict[str, _Lease]
_Accounts = dict[str, _Account]


def write(connection: Connection, endings: Sequence[Ending], *, uniform: Uniform) -> list[Ended]:
    """Keep these reports and release these leases. Returns a result for each, in the same order.

    An account that an operator paused or removed meanwhile is no longer due, and
    for the operator's reason, whatever the poll's outcome. An account that was
    asked for meanwhile is due as soon as its server allows. From here on its host
    is that of its URL, which may have changed since the claim. ``uniform`` spreads
    the moments at which accounts are due and hosts are tried again.
    """
    leases = _fence(connection, endings)
    current = [ending for ending in endings if _is_current(ending, leases)]
    kept = _keep(connection, current)
    fresh = [ending for ending in current if ending.claim in kept]
    # Read behind the fence, so that an operator's change before it is seen.
    accounts = _accounts(connection, fresh)
    _note_gaps(connection, fresh, leases)
    _remember_mailboxes(connection, fresh, leases)
    _count_requests(connection, fresh)
    releases = [_release_row(connection, ending, leases, accounts, uniform) for ending in fresh]
    if releases:
        _RELEASE.run(connection, releases)
    hosts = {ending.claim: _note_host(connection, ending, accounts, uniform) for ending in fresh}
    lost = {ending.claim for ending in endings if not _is_current(ending, leases)}
    lost -= _kept_before(connection, lost)
    return [Ended(ending.claim in lost, hosts.get(ending.claim)) for ending in endings]


def _fence(connection: Connection, endings: Sequence[Ending]) -> _Leases:
    """Lock the leases for the rest of this transaction, in the order that all use: no two can deadlock."""
    rows = connection.execute(_leases(connection.dialect.name), {"ids": _ids(endings)})
    return {row.account_id: _Lease(*row) for row in rows}


def _ids(endings: Sequence[Ending]) -> list[str]:
    return [ending.claim.account_id for ending in endings]


def _is_current(ending: Ending, leases: _Leases) -> bool:
    found = leases.get(ending.claim.account_id)
    return found is not None and found.token == ending.claim.token


def _keep(connection: Connection, endings: list[Ending]) -> set[Claim]:
    """Keep the reports. Returns the claims of those that were not kept before."""
    if not endings:
        return set()
    by_key = {(ending.claim.account_id, ending.claim.token): ending.claim for ending in endings}
    inserted = _NEW_POLLS.run(connection, [_poll_row(each) for each in endings])
    return {by_key[row.account_id, row.token] for row in inserted}


def _kept_before(connection: Connection, claims: set[Claim]) -> set[Claim]:
    """Which of these were kept by a transaction whose answer was lost, before another took the lease."""
    looks = {
        claim: sa.select(poll.c.token).where(
            poll.c.account_id == claim.account_id, poll.c.token == claim.token
        )
        for claim in claims
    }
    return {claim for claim, look in looks.items() if connection.execute(look).first() is not None}


def _poll_row(ending: Ending) -> Parameters:
    report = ending.report
    return {
        "account_id": ending.claim.account_id,
        "token": ending.claim.token,
        "ended_at": ending.ended_at,
        "seconds": report.seconds,
        "outcome": report.outcome,
        "listed": report.listed,
        **asdict(report.counts),
        "to_come": report.to_come,
        "error": report.error,
        "glanced": report.glanced,
    }


def _accounts(connection: Connection, endings: list[Ending]) -> _Accounts:
    if not endings:
        return {}
    rows = connection.execute(_accounts_of(connection.dialect.name), {"ids": _ids(endings)})
    return {row.id: _Account(*row)._replace(state=AccountState(row.state)) for row in rows}


def _note_gaps(connection: Connection, endings: list[Ending], leases: _Leases) -> None:
    for ending in endings:
        began_at = ending.ended_at - timedelta(seconds=ending.report.seconds)
        late_at = leases[ending.claim.account_id].late_at
        if ending.report.listed is not None and late_at is not None and late_at < began_at:
            history.gap_ended(connection, ending.claim.account_id, began_at)


def _remember_mailboxes(connection: Connection, endings: list[Ending], leases: _Leases) -> None:
    """Keep how mailboxes looked, for status and for the next poll. An unchanged mailbox costs nothing."""
    listed = [
        _mailbox_row(each, asked_again=leases[each.claim.account_id].asked)
        for each in endings
        if each.report.listed is not None and not _is_idle(each)
    ]
    if listed:
        connection.execute(_REMEMBER, listed)
    # The glance itself failed: a server that trips over it would do so each time.
    tripped = [each for each in endings if each.report.listed is None and each.report.glanced]
    if tripped:
        connection.execute(_DISTRUST, [{"b_account_id": each.claim.account_id} for each in tripped])
    spent = [_spent_row(each) for each in endings if each.report.counts.fetched_bytes]
    if spent:
        connection.execute(_SPEND, spent)


def _count_requests(connection: Connection, endings: list[Ending]) -> None:
    """Count deletions requested in sessions whose QUIT was answered. The next listing shows their effect."""
    ids = [
        each.claim.account_id
        for each in endings
        if each.report.counts.delete_requested and each.report.outcome == "ok"
    ]
    if ids:
        connection.execute(_COUNT_REQUESTS, {"ids": ids})


def _is_idle(ending: Ending) -> bool:
    return ending.report.glanced and ending.report.outcome == "ok"


def _mailbox_row(ending: Ending, *, asked_again: bool) -> Parameters:
    report = ending.report
    # A poll that was asked for during this one may have a reason that this one could not see.
    look = None if asked_again else report.last_look
    return {
        "b_account_id": ending.claim.account_id,
        "listed_at": ending.ended_at,
        "listed": report.listed,
        "quarantined": report.counts.quarantined,
        "to_come": report.to_come,
        "stat_count": look and look.stat_count,
        "stat_size": look and look.stat_size,
        "last_number": look and look.last_number,
        "last_uidl": look and look.last_uidl,
        "trusted_until": look and look.trusted_until,
    }


def _spent_row(ending: Ending) -> Parameters:
    """Fetched bytes count against the account's budget of this day (UTC)."""
    today = ending.ended_at.astimezone(UTC).date()
    fetched_bytes = ending.report.counts.fetched_bytes
    return {"b_account_id": ending.claim.account_id, "b_today": today, "b_bytes": fetched_bytes}


def _release_row(
    connection: Connection, ending: Ending, leases: _Leases, accounts: _Accounts, uniform: Uniform
) -> Parameters:
    """The lease's next row. Also writes the account's state and quirks, if they have changed."""
    found = accounts[ending.claim.account_id]
    following = _next_poll(ending, leases[ending.claim.account_id].schedule_state, uniform)
    state, reason = found.state, found.state_reason
    if state is AccountState.ACTIVE or (state is AccountState.WAITING and ending.ends_wait):
        reason = following.pause_reason
        state = AccountState.ACTIVE if reason is None else AccountState.WAITING
    avoids = " ".join(ending.avoids)
    if (state, reason, avoids) != (found.state, found.state_reason, found.avoids):
        connection.execute(
            sa.update(account)
            .where(account.c.id == ending.claim.account_id)
            .values(state=state, state_reason=reason, avoids=avoids)
        )
    looked = ending.report.listed is not None
    late_after = timedelta(seconds=late_after_seconds(following.after_seconds))
    return {
        "b_account_id": ending.claim.account_id,
        "b_parked": state is not AccountState.ACTIVE,
        "b_least": following.least_seconds,
        "b_after": following.after_seconds or 0.0,
        "b_recover": ending.report.journal_uncertain,
        "b_failures": following.setbacks.failures,
        "b_refusals": following.setbacks.refusals,
        "b_host": mail_host(found.url),
        "b_interval": following.interval_seconds,
        "b_looked_at": ending.ended_at if looked else None,
        "b_late_at": ending.ended_at + late_after if looked else None,
    }


def _next_poll(ending: Ending, before: ScheduleState, uniform: Uniform) -> NextPoll:
    return next_poll(
        ending.report,
        setbacks=before.setbacks,
        timetable=ending.timetable,
        now=ending.ended_at,
        uniform=uniform,
        stands_at=before.interval_seconds,
    )


def _note_host(
    connection: Connection, ending: Ending, accounts: _Accounts, uniform: Uniform
) -> Trouble | bool | None:
    report, name = ending.report, ending.claim.host
    if report.reached:
        troubled = accounts[ending.claim.account_id].troubled is not None
        return (troubled and hosts.reached(connection, name)) or None
    if report.reached is False and report.outcome == "try_later":
        return hosts.unreached(connection, name, report.error, uniform)
    return None


# Built once: to build a statement costs more than to run it.

_OF_MAILBOX = mailbox.c.account_id == sa.bindparam("b_account_id")
_REMEMBER = (
    sa.update(mailbox)
    .where(_OF_MAILBOX)
    .values(
        {
            column: sa.bindparam(column.name, type_=column.type)
            for column in (
                mailbox.c.listed_at,
                mailbox.c.listed,
                mailbox.c.quarantined,
                mailbox.c.to_come,
                mailbox.c.stat_count,
                mailbox.c.stat_size,
                mailbox.c.last_number,
                mailbox.c.last_uidl,
                mailbox.c.trusted_until,
            )
        }
    )
)
_COUNT_REQUESTS = (
    sa.update(sighting)
    .where(
        sighting.c.account_id.in_(sa.bindparam("ids", expanding=True)),
        sighting.c.absent_at.is_(None),
        sighting.c.delete_requested_at.is_not(None),
    )
    .values(delete_attempts=sighting.c.delete_attempts + 1)
)
_DISTRUST = sa.update(mailbox).where(_OF_MAILBOX).values(trusted_until=None)
_TODAY = sa.bindparam("b_today", type_=mailbox.c.day.type)
_SPEND = (
    sa.update(mailbox)
    .where(_OF_MAILBOX)
    .values(
        day=_TODAY,
        day_bytes=sa.case((mailbox.c.day == _TODAY, mailbox.c.day_bytes), else_=0)
        + sa.bindparam("b_bytes", type_=sa.BigInteger()),
    )
)


@cache
def _leases(dialect: str) -> sa.Select[Any]:
    return (
        sa.select(
            lease.c.account_id,
            lease.c.token,
            lease.c.failures,
            lease.c.refusals,
            lease.c.interval_seconds,
            lease.c.late_at,
            lease.c.asked,
        )
        .where(bulk.among(dialect, lease.c.account_id, "ids"))
        .order_by(lease.c.account_id)
        .with_for_update()
    )


@cache
def _accounts_of(dialect: str) -> sa.Select[Any]:
    troubled = host.c.name.label("troubled")
    return (
        sa.select(
            account.c.id, account.c.url, account.c.state, account.c.state_reason, account.c.avoids, troubled
        )
        .join(lease, lease.c.account_id == account.c.id)
        .outerjoin(host, host.c.name == lease.c.host)
        .where(bulk.among(dialect, account.c.id, "ids"))
    )


_NEW_POLLS = bulk.insert(
    poll,
    poll.c.keys(),
    lambda insert: insert.on_conflict_do_nothing().returning(poll.c.account_id, poll.c.token),
)


def _release(dialect: str, row: bulk.Values) -> sa.Update:
    due_at = sa.case(
        (row["b_parked"], sa.null()),
        (lease.c.asked, seconds_on(dialect, row["b_least"])),
        else_=seconds_on(dialect, row["b_after"]),
    )
    return (
        sa.update(lease)
        .where(
            lease.c.account_id == row["b_account_id"],
            bulk.one_of_all(dialect, lease.c.account_id, "b_account_id"),
        )
        .values(
            owner=sa.null(),
            expires_at=sa.null(),
            due_at=due_at,
            recover=row["b_recover"],
            failures=row["b_failures"],
            refusals=row["b_refusals"],
            host=row["b_host"],
            slot=sa.null(),
            asked=sa.false(),
            interval_seconds=row["b_interval"],
            looked_at=sa.func.coalesce(row["b_looked_at"], lease.c.looked_at),
            late_at=sa.func.coalesce(row["b_late_at"], lease.c.late_at),
        )
    )


_RELEASE = bulk.ForRows(
    {
        "b_account_id": lease.c.account_id.type,
        "b_parked": sa.Boolean(),
        "b_least": sa.Float(),
        "b_after": sa.Float(),
        "b_recover": lease.c.recover.type,
        "b_failures": lease.c.failures.type,
        "b_refusals": lease.c.refusals.type,
        "b_host": lease.c.host.type,
        "b_interval": lease.c.interval_seconds.type,
        "b_looked_at": lease.c.looked_at.type,
        "b_late_at": lease.c.late_at.type,
    },
    _release,
)

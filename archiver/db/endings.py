"""How polls end: their reports are kept and their leases given back, many in one transaction.

Most polls find nothing new, and all that they write is their end. So the ends
of polls that finish at the same moment are written together, by statements
whose number does not depend on how many they are, and which are worded once.
Each ending stands for itself all the same: one whose lease was lost is told
so, and the others are kept. An ending that is written again, because the
answer to its commit was lost, changes nothing.
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
from archiver.policy import NextPoll, Setbacks, late_after_seconds
from archiver.states import AccountState


class ScheduleState(NamedTuple):
    """Where an account's schedule stands: polls that failed in a row, and the adaptive interval."""

    setbacks: Setbacks
    interval_seconds: float | None


@dataclass(frozen=True, slots=True)
class Ending:
    """One poll's end. ``following`` decides when the account is due again, from where its schedule stands.

    ``avoids`` is what is known by now of what the account's server trips over.
    ``ends_wait``: the poll shows that an operator has fixed what the account
    waited for. ``chance``, from 0 to 1, spreads when a host that cannot be reached
    is tried again.
    """

    claim: Claim
    report: PollReport
    ended_at: datetime
    following: Callable[[ScheduleState], NextPoll]
    avoids: tuple[str, ...] = ()
    ends_wait: bool = False
    chance: float = 0.5


class Ended(NamedTuple):
    """What came of an ending: whether its lease was lost, and what it meant for the host.

    ``host`` is a Trouble when the host is closed by it, True when a trouble is
    over, else None.
    """

    lease_lost: bool = False
    host: Trouble | bool | None = None


def write(connection: Connection, endings: Sequence[Ending]) -> list[Ended]:
    """Keep these reports and release these leases; what came of each, in the same order.

    An account that an operator paused or removed meanwhile is due no more, and
    for that reason, whatever the poll's outcome. One that somebody asked for
    meanwhile is due as soon as its server allows. Its host is that of its URL
    from here on, which may be another one since the claim.
    """
    leases = _fence(connection, endings)
    standing = [ending for ending in endings if _stands(ending, leases)]
    kept = _keep(connection, standing)
    fresh = [ending for ending in standing if ending.claim in kept]
    # Only behind the fence: what an operator did before it is seen.
    accounts = _accounts(connection, fresh)
    _note_gaps(connection, fresh, leases)
    _remember_mailboxes(connection, fresh, leases)
    _count_requests(connection, fresh)
    releases = [_released(connection, ending, leases, accounts) for ending in fresh]
    if releases:
        _RELEASE.run(connection, releases)
    hosts = {ending.claim: _tell_of_host(connection, ending, accounts) for ending in fresh}
    lost = {ending.claim for ending in endings if not _stands(ending, leases)}
    lost -= _kept_before(connection, lost)
    return [Ended(ending.claim in lost, hosts.get(ending.claim)) for ending in endings]


def _fence(connection: Connection, endings: Sequence[Ending]) -> dict[str, Any]:
    """The leases, locked for the rest of this transaction, in one order everywhere: no two can deadlock."""
    ids = [ending.claim.account_id for ending in endings]
    return {row.account_id: row for row in connection.execute(_leases(connection.dialect.name), {"ids": ids})}


def _stands(ending: Ending, leases: dict[str, Any]) -> bool:
    row = leases.get(ending.claim.account_id)
    return row is not None and row.token == ending.claim.token


def _keep(connection: Connection, endings: list[Ending]) -> set[Claim]:
    """Keep the reports; the claims of those that were not kept before."""
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


def _poll_row(ending: Ending) -> dict[str, Any]:
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


def _accounts(connection: Connection, endings: list[Ending]) -> dict[str, Any]:
    ids = [ending.claim.account_id for ending in endings]
    if not ids:
        return {}
    return {row.id: row for row in connection.execute(_accounts_of(connection.dialect.name), {"ids": ids})}


def _note_gaps(connection: Connection, endings: list[Ending], leases: dict[str, Any]) -> None:
    for ending in endings:
        began_at = ending.ended_at - timedelta(seconds=ending.report.seconds)
        late_at = leases[ending.claim.account_id].late_at
        if ending.report.listed is not None and late_at is not None and late_at < began_at:
            history.gap_ended(connection, ending.claim.account_id, began_at)


def _remember_mailboxes(connection: Connection, endings: list[Ending], leases: dict[str, Any]) -> None:
    """What mailboxes showed, for status and for the next poll. One that is unchanged costs nothing."""
    listed = [
        _mailbox_row(each, asked_again=leases[each.claim.account_id].asked)
        for each in endings
        if each.report.listed is not None and not _idle(each)
    ]
    if listed:
        connection.execute(_REMEMBER, listed)
    # The look itself failed: a server that trips over it would do so every time.
    tripped = [each for each in endings if each.report.listed is None and each.report.glanced]
    if tripped:
        connection.execute(_DISTRUST, [{"b_account_id": each.claim.account_id} for each in tripped])
    spent = [_spent_row(each) for each in endings if each.report.counts.fetched_bytes]
    if spent:
        connection.execute(_SPEND, spent)


def _count_requests(connection: Connection, endings: list[Ending]) -> None:
    """The deletions that were asked for up to an answered QUIT, and of which the next listing tells."""
    ids = [
        each.claim.account_id
        for each in endings
        if each.report.counts.delete_requested and each.report.outcome == "ok"
    ]
    if ids:
        connection.execute(_COUNT_REQUESTS, {"ids": ids})


def _idle(ending: Ending) -> bool:
    return ending.report.glanced and ending.report.outcome == "ok"


def _mailbox_row(ending: Ending, *, asked_again: bool) -> dict[str, Any]:
    report = ending.report
    # Whoever asked while the poll went on may have had a reason of which it knew nothing.
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


def _spent_row(ending: Ending) -> dict[str, Any]:
    """What was fetched counts against the account's budget of this day (UTC)."""
    today = ending.ended_at.astimezone(UTC).date()
    fetched_bytes = ending.report.counts.fetched_bytes
    return {"b_account_id": ending.claim.account_id, "b_today": today, "b_bytes": fetched_bytes}


def _released(
    connection: Connection, ending: Ending, leases: dict[str, Any], accounts: dict[str, Any]
) -> dict[str, Any]:
    """The lease's row as it is to be; on the way, the account's, where that is another by now."""
    stood, found = leases[ending.claim.account_id], accounts[ending.claim.account_id]
    setbacks = Setbacks(stood.failures, stood.refusals)
    following = ending.following(ScheduleState(setbacks, stood.interval_seconds))
    state, reason = AccountState(found.state), found.state_reason
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
        "b_paused": state is not AccountState.ACTIVE,
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


def _tell_of_host(connection: Connection, ending: Ending, accounts: dict[str, Any]) -> Trouble | bool | None:
    report, name = ending.report, ending.claim.host
    if report.reached:
        troubled = accounts[ending.claim.account_id].troubled is not None
        return (troubled and hosts.reached(connection, name)) or None
    if report.reached is False and report.outcome == "try_later":
        return hosts.unreached(connection, name, report.error, ending.chance)
    return None


# Worded once: to put a statement together costs more than to run it.

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


def _released_row(dialect: str, row: bulk.Values) -> sa.Update:
    due_at = sa.case(
        (row["b_paused"], sa.null()),
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
        "b_paused": sa.Boolean(),
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
    _released_row,
)

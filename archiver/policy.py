"""Decisions, as pure functions over plain values: what to fetch, what may go, when to poll again.

Nothing here reads a clock, draws a random number or touches the world; time
and chance come in as arguments.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from typing import NamedTuple

from archiver.model import NEVER_DELETE, Account, DeletePolicy, PollReport
from archiver.timetable import LONGEST_WAIT_SECONDS, Timetable

BACKOFF_BASE_SECONDS = 30.0
BACKOFF_CAP_SECONDS = 3600.0
"""A server that was away for a night is asked within the hour after it is back."""

OPERATOR_BACKOFF_SECONDS = (300.0, 1800.0, 7200.0)
"""One refused login may be throttling in disguise, so it is tried again, ever more rarely. Then the account
is paused: a server that locks accounts out does so after more, or after faster, attempts than these."""

QUARANTINE_BASE_SECONDS = 3600.0
QUARANTINE_CAP_SECONDS = 7 * 86400.0

UNHEEDED_REQUESTS = 2
UNHEEDED_RETRY_SECONDS = 86400.0

FATAL_ATTEMPTS = 3
"""How often the connection may die over one message before that message is set aside."""

HOST_FAILURES = 5
"""Polls in a row that could not even begin, before a host is closed to all its accounts. Fewer are chance."""

HOST_BACKOFF_CAP_SECONDS = 900.0
"""A host that is back after a night is found out within a quarter of an hour, by one poll."""

HOST_LEAST_SECONDS = 5.0
"""A host that was just found dead is not asked again in the same breath."""

MIDNIGHT_SPREAD_SECONDS = 600.0
BLACKOUT_SPREAD_SECONDS = 60.0
"""Over which the accounts are spread that waited for the same moment."""

LOGIN_DELAY_MARGIN_SECONDS = 5.0
"""Beyond the LOGIN-DELAY of a server (RFC 2449 section 6.5), which counts whole seconds by its own clock."""

INTERVAL_JITTER = 0.1
"""Share of the interval by which due times are spread, so that accounts added together drift apart."""


class DeletionVerdict(StrEnum):
    """What becomes at the next poll of a message that the server still shows, and why."""

    GOES = "goes"
    NEVER = "never"
    FORBIDDEN = "forbidden"
    SUSPENDED = "suspended"
    TOO_YOUNG = "too_young"
    QUARANTINED = "quarantined"
    TO_COME = "to_come"
    NO_ID = "no_id"


def delete_in_force(policy: DeletePolicy, *, suspended: str | None, forbidden: bool) -> DeletePolicy:
    """The deletion policy in force: suspension, and a ban for all accounts, override the account's own."""
    return NEVER_DELETE if forbidden or suspended is not None else policy


def delete_verdict(
    delete: DeletePolicy,
    *,
    state: str,
    by_content: bool,
    captured_at: datetime,
    suspended: str | None,
    forbidden: bool,
    now: datetime,
) -> DeletionVerdict:
    """Whether a message goes at the next poll, or the first reason why it stays."""
    if state != "captured":
        return DeletionVerdict.QUARANTINED if state == "quarantined" else DeletionVerdict.TO_COME
    if delete.after_days is None:
        return DeletionVerdict.NEVER
    if forbidden:
        return DeletionVerdict.FORBIDDEN
    if suspended is not None:
        return DeletionVerdict.SUSPENDED
    if by_content:
        return DeletionVerdict.NO_ID
    return DeletionVerdict.GOES if may_delete(delete, captured_at, now) else DeletionVerdict.TOO_YOUNG


def may_delete(policy: DeletePolicy, captured_at: datetime, now: datetime) -> bool:
    """Whether the account's policy lets a message go that was captured then."""
    return policy.after_days is not None and (now - captured_at) / timedelta(days=1) >= policy.after_days


def deletable_at(policy: DeletePolicy, captured_at: datetime) -> datetime | None:
    """When the policy lets a message go that was captured then; None for never, and for the far future."""
    if policy.after_days is None:
        return None
    try:
        return captured_at + timedelta(days=policy.after_days)
    except OverflowError:
        return None


RENUMBERED_LEAST = 10
"""Fewer ids than these vanish together on an ordinary day, and prove nothing."""

RENUMBERED_FOUND = 0.02
"""Share of the known ids that may still be listed: a server may have kept some, or given some again."""

RENUMBERED_UNKNOWN = 0.5
"""Least number of unknown ids for each known one. Few new messages come while a mailbox is emptied."""

RENUMBERED_KNOWN = 0.5
"""Share of the messages with unknown ids whose content must be in the archive already."""


def may_be_renumbered(*, known: int, found: int, unknown: int) -> bool:
    """Whether a complete listing looks as if the server had given all messages other ids.

    ``known`` ids were listed before and are not expected to be gone. ``found`` of
    them are still listed. ``unknown`` ids are listed for the first time. That alone
    proves nothing: a provider that shows a window of the mailbox (Gmail) looks the
    same. So it is only a suspicion, which ``is_renumbered`` confirms or not.
    """
    return (
        known >= RENUMBERED_LEAST
        and found <= known * RENUMBERED_FOUND
        and unknown >= known * RENUMBERED_UNKNOWN
    )


def is_renumbered(*, fetched: int, known: int) -> bool:
    """Whether the suspicion is right: most of the first messages fetched are held under other ids."""
    return fetched > 0 and known >= fetched * RENUMBERED_KNOWN


def why_suspended(epoch: int, began_at: datetime) -> str:
    """Why nothing of an account is deleted, in words for its operator."""
    return f"the server gave its messages other ids: epoch {epoch} began at {began_at:%Y-%m-%d %H:%M} UTC"


FULL_LISTING_JITTER = 0.25
"""Share of the time by which full listings are spread."""


def trusted_until(
    now: datetime,
    full_listing_seconds: float,
    due_at: Iterable[datetime | None],
    uniform: Callable[[float, float], float],
) -> datetime | None:
    """Until when a mailbox that looks unchanged need not be listed; None when it must be, the next time.

    Never beyond what is due of its messages: a quarantined one's next try, the
    moment from which one may be deleted.
    """
    seconds = min(full_listing_seconds, LONGEST_WAIT_SECONDS)
    latest = now + timedelta(seconds=seconds - uniform(0.0, seconds * FULL_LISTING_JITTER))
    until = min([latest, *(due for due in due_at if due is not None)])
    return until if until > now else None


def is_trusted(until: datetime, now: datetime, full_listing_seconds: float) -> bool:
    """Whether what was remembered of a mailbox is believed still.

    What is to be believed for longer than anything may be was remembered before
    the clock was set back, or the setting was another one.
    """
    return 0 < (until - now).total_seconds() <= full_listing_seconds


def is_worth_increment(*, listed: int, new: int, spared_lines: int, pipelining: bool) -> bool:
    """Whether it costs less to ask for each new message by its number than to list the mailbox again.

    It does if a listing would repeat ``spared_lines`` of the ``listed`` messages for each new one.
    """
    most = INCREMENT_MOST if pipelining else INCREMENT_MOST_SINGLY
    return 0 < new <= most and listed >= new * spared_lines


INCREMENT_MOST = 16
"""Two commands each: as many as are under way at once anyway."""

INCREMENT_MOST_SINGLY = 2
"""Where each command costs a round trip, of which a listing takes two."""


LATE_LEAST_SECONDS = 600.0
"""However often a mailbox is polled: ten minutes without a look are not told as a gap."""


def late_after_seconds(after_seconds: float | None) -> float:
    """How long nobody may look into a mailbox until that is a gap: twice the wait that was planned."""
    return max(LATE_LEAST_SECONDS, 2.0 * (after_seconds or 0.0))


def may_ask_again(*, requested: bool, unheeded: int, retry_at: datetime | None, now: datetime) -> bool:
    """Whether a deletion is asked for in this session; ``requested`` tells that the last one was to no avail.

    A session that ended before its QUIT was answered does not count. A server
    that says +OK to QUIT and deletes nothing (Gmail and GMX obey a setting
    instead) is asked once more, and then once a day: each time the message is
    read again first.
    """
    if requested:
        return unheeded < UNHEEDED_REQUESTS
    return retry_at is None or retry_at <= now


def quarantine_retry_seconds(attempts: int) -> float:
    """How long a message that failed by itself so often is left alone: an hour, doubling, at most a week."""
    return float(min(QUARANTINE_CAP_SECONDS, QUARANTINE_BASE_SECONDS * 2.0 ** (attempts - 1)))


def is_fatal(attempts: int) -> bool:
    """Whether a message has cost so many connections that it is set aside."""
    return attempts >= FATAL_ATTEMPTS


class Setbacks(NamedTuple):
    """Polls that failed in a row: ``failures`` by trouble that passes, ``refusals`` for want of an operator.

    They are counted apart, so that one refused login after a night without
    network is the first refusal, not the last.
    """

    failures: int = 0
    refusals: int = 0


@dataclass(frozen=True, slots=True)
class NextPoll:
    """When an account is due again; None when it waits for an operator, who is told ``pause_reason``.

    Not even somebody who asks for a poll gets one before ``least_seconds``.
    ``interval_seconds`` is where an adaptive interval stands from now on.
    """

    after_seconds: float | None
    setbacks: Setbacks
    pause_reason: str | None = None
    least_seconds: float = 0.0
    interval_seconds: float | None = None


def is_too_early(report: PollReport) -> bool:
    """Whether the server would refuse a login right after this poll, since it wants a longer delay."""
    delay_seconds = report.login_delay_seconds or 0.0
    return delay_seconds > 0 and report.seconds < delay_seconds + LOGIN_DELAY_MARGIN_SECONDS


def next_poll(
    report: PollReport,
    *,
    setbacks: Setbacks,
    timetable: Timetable,
    now: datetime,
    uniform: Callable[[float, float], float],
    stands_at: float | None = None,
) -> NextPoll:
    """Decide when to poll again, by the class of what happened.

    ``stands_at`` is the adaptive interval up to here. A blackout puts off
    whatever is decided until it is over.

    An operator who is needed once the mailbox was listed (or while the journal
    is caught up with) is needed for the store, the spool or the database. No
    account is paused for that: it would be all of them, and each would have to
    be resumed.

    A LOGIN-DELAY that the server announced is a lower bound, whatever happened:
    a login that comes too early is refused, and may count against the account.

    Full jitter (a wait drawn evenly between nothing and the exponential bound)
    spreads accounts that failed together:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    least = report.wait_seconds or 0.0
    if report.login_delay_seconds:
        least = max(least, report.login_delay_seconds + LOGIN_DELAY_MARGIN_SECONDS)
    failures, refusals = setbacks
    outcome = report.outcome
    if outcome == "operator_needed" and (report.listed is not None or report.journal_uncertain):
        outcome = "try_later"
    match outcome:
        case "ok":
            stands_at = timetable.adapted_seconds(stands_at, news=report.counts.new > 0)
            after, again = _after_success(report, timetable, stands_at, now, uniform), Setbacks()
        case "try_later" | "lease_lost":
            bound = min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2.0 ** min(failures, 10))
            after, again = uniform(0.0, bound), Setbacks(failures + 1, refusals)
        case "operator_needed" if refusals < len(OPERATOR_BACKOFF_SECONDS):
            wait = OPERATOR_BACKOFF_SECONDS[refusals]
            after = wait + uniform(0.0, wait * INTERVAL_JITTER)
            again = Setbacks(failures, refusals + 1)
        case _:
            reason = report.error or report.outcome
            return NextPoll(None, Setbacks(failures, refusals + 1), reason, least, stands_at)
    allowed = _allowed_seconds(max(least, after), timetable, now, uniform)
    return NextPoll(allowed, again, None, least, stands_at)


def _after_success(
    report: PollReport,
    timetable: Timetable,
    stands_at: float | None,
    now: datetime,
    uniform: Callable[[float, float], float],
) -> float:
    """What is still to come is fetched at once, behind all that is due; but no more than the day may have."""
    day_is_spent = report.held_back == "day"
    if report.to_come and not day_is_spent:
        return 0.0
    interval_seconds = timetable.interval_seconds if stands_at is None else stands_at
    wait, may_spread = timetable.wait_seconds(now, interval_seconds)
    if may_spread:
        wait += uniform(-wait * INTERVAL_JITTER, wait * INTERVAL_JITTER)
    if day_is_spent:
        tomorrow = datetime.combine(now.astimezone(UTC).date() + timedelta(days=1), time(), UTC)
        # Not on the stroke of midnight, by whoever's clock.
        wait = min(wait, (tomorrow - now).total_seconds() + 60.0 + uniform(0.0, MIDNIGHT_SPREAD_SECONDS))
    return wait


def _allowed_seconds(
    after_seconds: float, timetable: Timetable, now: datetime, uniform: Callable[[float, float], float]
) -> float:
    """The same, or if that moment is in a blackout, soon after its end."""
    ends_at = timetable.blackout_ends(now + timedelta(seconds=after_seconds))
    if ends_at is None:
        return after_seconds
    return (ends_at - now).total_seconds() + uniform(0.0, BLACKOUT_SPREAD_SECONDS)


def host_retry_seconds(failures: int, uniform: Callable[[float, float], float]) -> float | None:
    """How long a host backs off after this many polls in a row that could not begin; None: not at all.

    Full jitter, as for accounts.
    """
    if failures < HOST_FAILURES:
        return None
    doubled = BACKOFF_BASE_SECONDS * 2.0 ** min(failures - HOST_FAILURES, 10)
    return max(HOST_LEAST_SECONDS, uniform(0.0, min(HOST_BACKOFF_CAP_SECONDS, doubled)))


def threads_for_failing(workers: int) -> int:
    """Of a process's threads, how many may be with accounts whose last poll failed.

    Servers that hang hold a thread for minutes; the other half goes on.
    """
    return max(1, workers // 2)


def ramped_up(workers: int, running_seconds: float, ramp_seconds: float) -> int:
    """Polls at once, so long after the start: from one to all, so that a restart is no storm of logins."""
    if running_seconds >= ramp_seconds:
        return workers
    return max(1, int(workers * running_seconds / ramp_seconds))


AVOID_DAYS = 30
"""So long a server is spared what it tripped over. Then it is asked again: servers are mended."""


class Quirk(NamedTuple):
    """What an account's server trips over. ``certain``: beyond chance, in which connections end too."""

    name: str
    since: date
    certain: bool

    @property
    def until(self) -> date:
        """When it is tried again."""
        return self.since + timedelta(days=AVOID_DAYS)

    @property
    def reason(self) -> str:
        """Why it is avoided, for people."""
        return _REASONS.get(self.name, f"the server hung, or hung up, at {self.name}")


_REASONS = {
    "AUTH": "the server hung up at AUTH twice in a row; the login is by USER and PASS, within TLS",
    "PIPELINING": "the server lost its place, or hung up, while several commands were under way",
    "UIDL": "the server hung up at UIDL, which it does not offer; messages are told apart by content",
    "UIDL-N": "the server answered UIDL or LIST for one message in another form than RFC 1939 says",
}


def quirks(avoids: Iterable[str]) -> list[Quirk]:
    """Read ``Account.avoids``: ``CAPA@2026-01-31``, or ``CAPA?@2026-01-31`` for a suspicion."""
    found = []
    for text in avoids:
        name, _, since = text.partition("@")
        found.append(Quirk(name.removesuffix("?"), date.fromisoformat(since), not name.endswith("?")))
    return found


def avoided(account: Account, now: datetime) -> frozenset[str]:
    """What is not asked of the account's server."""
    names = {quirk.name for quirk in quirks(account.avoids) if quirk.certain and now.date() < quirk.until}
    return frozenset(names)


def remembered(avoids: Iterable[str], report: PollReport, now: datetime) -> tuple[str, ...]:
    """``Account.avoids`` after a poll.

    A connection that ends at a command may end there by chance. That it ends
    at the same one again, with no poll in between that went well, is no chance.
    """
    before = {quirk.name: quirk for quirk in quirks(avoids) if now.date() < quirk.until}
    suspects = {name: quirk for name, quirk in before.items() if not quirk.certain}
    certain = {*report.avoid, *(name for name in report.suspect if name in suspects)}
    after = {name: quirk for name, quirk in before.items() if quirk.certain or report.outcome != "ok"}
    after |= {name: Quirk(name, now.date(), certain=False) for name in report.suspect if name not in before}
    after |= {name: Quirk(name, now.date(), certain=True) for name in certain}
    return tuple(
        f"{quirk.name}{'' if quirk.certain else '?'}@{quirk.since.isoformat()}"
        for _, quirk in sorted(after.items())
    )

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
"""After an outage of any length, a server is polled again within an hour."""

OPERATOR_BACKOFF_SECONDS = (300.0, 1800.0, 7200.0)
"""One refused login may be throttling in disguise, so the login is tried again, ever more rarely. Then the
account waits for an operator. Servers that lock accounts do so after more, or faster, attempts than these."""

QUARANTINE_BASE_SECONDS = 3600.0
QUARANTINE_CAP_SECONDS = 7 * 86400.0

UNHEEDED_REQUESTS = 2
UNHEEDED_RETRY_SECONDS = 86400.0

FATAL_ATTEMPTS = 3
"""How often the connection may die over one message before that message is quarantined."""

HOST_FAILURES = 5
"""Polls in a row that could not connect, before all accounts of a host back off. Fewer may be chance."""

HOST_BACKOFF_CAP_SECONDS = 900.0
"""After an outage of any length, one poll finds within a quarter of an hour that the host is back."""

HOST_LEAST_SECONDS = 5.0
"""A host that has just failed is not asked again at once."""

MIDNIGHT_SPREAD_SECONDS = 600.0
BLACKOUT_SPREAD_SECONDS = 60.0
"""Accounts that waited for the same moment are spread over this time."""

LOGIN_DELAY_MARGIN_SECONDS = 5.0
"""Added to a server's LOGIN-DELAY (RFC 2449 section 6.5), which counts whole seconds by its own clock."""

INTERVAL_JITTER = 0.1
"""Share of the interval by which due times are spread, so that accounts added together drift apart."""


class DeletionVerdict(StrEnum):
    """Whether the next poll deletes a message that the server still shows, or the reason why not."""

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
    """Whether the next poll deletes a message, or the first reason why not."""
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
    """Whether the policy allows to delete a message that was captured at this time."""
    return policy.after_days is not None and (now - captured_at) / timedelta(days=1) >= policy.after_days


def deletable_at(policy: DeletePolicy, captured_at: datetime) -> datetime | None:
    """From when on the policy allows to delete such a message; None for never, and for the far future."""
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
    """Whether the suspicion is right: most of the first messages fetched are archived under other ids."""
    return fetched > 0 and known >= fetched * RENUMBERED_KNOWN


def why_suspended(epoch: int, began_at: datetime) -> str:
    """Why deletion is suspended, for the operator."""
    return f"the server gave its messages other ids: epoch {epoch} began at {began_at:%Y-%m-%d %H:%M} UTC"


FULL_LISTING_JITTER = 0.25
"""Share of the time by which full listings are spread."""


def trusted_until(
    now: datetime,
    full_listing_seconds: float,
    due_at: Iterable[datetime | None],
    uniform: Callable[[float, float], float],
) -> datetime | None:
    """Until when a mailbox that looks unchanged need not be listed; None if the next poll must list it.

    ``due_at`` is when its messages need attention: the retry of one in quarantine,
    or the first deletion that the policy allows.
    """
    seconds = min(full_listing_seconds, LONGEST_WAIT_SECONDS)
    latest = now + timedelta(seconds=seconds - uniform(0.0, seconds * FULL_LISTING_JITTER))
    until = min([latest, *(due for due in due_at if due is not None)])
    return until if until > now else None


def is_trusted(until: datetime, now: datetime, full_listing_seconds: float) -> bool:
    """Whether the memory of a mailbox is still trusted.

    A memory that claims more time than the setting allows dates from before the
    clock was set back, or the setting was changed.
    """
    return 0 < (until - now).total_seconds() <= full_listing_seconds


def is_worth_increment(*, listed: int, new: int, spared_lines: int, pipelining: bool) -> bool:
    """Whether it costs less to ask for each new message by its number than to list the mailbox again.

    It does if a listing would repeat ``spared_lines`` of the ``listed`` messages for each new one.
    """
    most = INCREMENT_MOST if pipelining else INCREMENT_MOST_SINGLY
    return 0 < new <= most and listed >= new * spared_lines


INCREMENT_MOST = 16
"""With two commands each, these are as many as the client sends at once."""

INCREMENT_MOST_SINGLY = 2
"""Without pipelining each command costs a round trip; a listing takes two in all."""


LATE_LEAST_SECONDS = 600.0
"""However often a mailbox is polled, ten minutes without a successful poll are no gap."""


def late_after_seconds(after_seconds: float | None) -> float:
    """After how long without a successful poll a gap begins: twice the scheduled wait."""
    return max(LATE_LEAST_SECONDS, 2.0 * (after_seconds or 0.0))


def may_ask_again(*, requested: bool, unheeded: int, retry_at: datetime | None, now: datetime) -> bool:
    """Whether this session asks for a deletion. With ``requested``, the last session asked without success.

    A session that ended before QUIT was answered does not count. Some servers say
    +OK to QUIT and delete nothing: Gmail and GMX follow a setting instead. They are
    asked once more, then once a day. Each time the message is read again first.
    """
    if requested:
        return unheeded < UNHEEDED_REQUESTS
    return retry_at is None or retry_at <= now


def quarantine_retry_seconds(attempts: int) -> float:
    """The wait before a message in quarantine is retried: an hour, doubling, at most a week."""
    return float(min(QUARANTINE_CAP_SECONDS, QUARANTINE_BASE_SECONDS * 2.0 ** (attempts - 1)))


def is_fatal(attempts: int) -> bool:
    """Whether a message has cost enough connections to be quarantined."""
    return attempts >= FATAL_ATTEMPTS


class Setbacks(NamedTuple):
    """Polls in a row that failed.

    The two are counted separately, so that one refused login after a night
    without network is the first refusal, not the last.
    """

    failures: int = 0
    """Failed for a reason that passes by itself."""
    refusals: int = 0
    """Failed for a reason that needs an operator."""


@dataclass(frozen=True, slots=True)
class NextPoll:
    """When an account is due again."""

    after_seconds: float | None
    """None if the account waits for an operator."""
    setbacks: Setbacks
    pause_reason: str | None = None
    """Why it waits."""
    least_seconds: float = 0.0
    """Before this time, even a poll that an operator asks for does not begin."""
    interval_seconds: float | None = None
    """The adaptive interval from now on."""


def is_too_early(report: PollReport) -> bool:
    """Whether the server would refuse a login right after this poll, because it wants a longer delay."""
    delay_seconds = report.login_delay_seconds or 0.0
    return delay_seconds > 0 and report.seconds < delay_seconds + LOGIN_DELAY_MARGIN_SECONDS


def made_progress(report: PollReport) -> bool:
    """Whether a poll that failed later archived, quarantined or settled messages for good.

    Each journal segment holds at least one such message, and none holds a mere request.
    """
    return report.outcome == "try_later" and (report.counts.new > 0 or report.segments > 0)


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

    ``stands_at`` is the adaptive interval so far. A blackout delays the poll until
    its end.

    If an operator is needed after the mailbox was listed, or while the poll
    catches up with the journal, the trouble is with the store, the spool or the
    database. No account is stopped for that: it would be all accounts, and an
    operator would have to resume each.

    A poll that resolved messages before its session broke made progress, which
    is no failure: some providers end every session after 20 messages. The next
    one follows soon, and the setbacks start from zero.

    The server's LOGIN-DELAY is a lower bound in every case: a login that comes too
    early is refused, and may count against the account.

    Full jitter spreads accounts that failed together. It draws the wait evenly
    between nothing and the exponential bound:
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
        case "try_later" if made_progress(report):
            after, again = uniform(0.0, BACKOFF_BASE_SECONDS), Setbacks()
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
    """At once if messages are still to come and the day's budget is not spent; else by the schedule."""
    day_is_spent = report.stopped_by == "day"
    if report.to_come and not day_is_spent:
        return 0.0
    interval_seconds = timetable.interval_seconds if stands_at is None else stands_at
    wait, may_spread = timetable.wait_seconds(now, interval_seconds)
    if may_spread:
        wait += uniform(-wait * INTERVAL_JITTER, wait * INTERVAL_JITTER)
    if day_is_spent:
        tomorrow = datetime.combine(now.astimezone(UTC).date() + timedelta(days=1), time(), UTC)
        # Not exactly at midnight: clocks differ.
        wait = min(wait, (tomorrow - now).total_seconds() + 60.0 + uniform(0.0, MIDNIGHT_SPREAD_SECONDS))
    return wait


def _allowed_seconds(
    after_seconds: float, timetable: Timetable, now: datetime, uniform: Callable[[float, float], float]
) -> float:
    """The same, or soon after the end of the blackout that this moment is in."""
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
    """How many of a process's threads may poll accounts whose last poll failed.

    A server that stalls takes up a thread for minutes. The other half goes on.
    """
    return max(1, workers // 2)


def ramped_up(workers: int, running_seconds: float, ramp_seconds: float) -> int:
    """Polls at once after this running time: from one to all, so that a restart causes no storm of logins."""
    if running_seconds >= ramp_seconds:
        return workers
    return max(1, int(workers * running_seconds / ramp_seconds))


AVOID_DAYS = 30
"""How long a command that failed is avoided. Then it is tried again: servers get fixed."""


class Quirk(NamedTuple):
    """A command or capability that an account's server does not handle."""

    name: str
    since: date
    certain: bool
    """False after one failure, which may be chance: connections end for other reasons, too."""

    @property
    def until(self) -> date:
        """When it is tried again."""
        return self.since + timedelta(days=AVOID_DAYS)

    @property
    def reason(self) -> str:
        """Why it is avoided, for people."""
        return _REASONS.get(self.name, f"the server stalled or disconnected at {self.name}")


_REASONS = {
    "AUTH": "the server disconnected at AUTH twice in a row; the login uses USER and PASS, within TLS",
    "PIPELINING": "the server mixed up answers, or disconnected, while several commands were under way",
    "UIDL": "the server disconnected at UIDL, which it does not offer; messages are known by their content",
    "UIDL-N": "the server answered UIDL or LIST for one message in a form that RFC 1939 does not allow",
}


def quirks(avoids: Iterable[str]) -> list[Quirk]:
    """Read ``Account.avoids``: ``CAPA@2026-01-31``, or ``CAPA?@2026-01-31`` for a suspicion."""
    found = []
    for text in avoids:
        name, _, since = text.partition("@")
        found.append(Quirk(name.removesuffix("?"), date.fromisoformat(since), not name.endswith("?")))
    return found


def avoided(account: Account, now: datetime) -> frozenset[str]:
    """The commands and capabilities that the account's server is not asked for."""
    names = {quirk.name for quirk in quirks(account.avoids) if quirk.certain and now.date() < quirk.until}
    return frozenset(names)


def remembered(avoids: Iterable[str], report: PollReport, now: datetime) -> tuple[str, ...]:
    """``Account.avoids`` after a poll.

    A connection that ends at a command may end there by chance. If it ends at the
    same command again, with no successful poll in between, it is no chance.
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

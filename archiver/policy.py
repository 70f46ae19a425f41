"""Decisions, as pure functions over plain values: what to fetch, what may go, when to poll again.

Nothing here reads a clock, draws a random number or touches the world; time
and chance come in as arguments.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, NamedTuple, Protocol, TypeVar

from archiver.model import UNKNOWN_SIZE, DeletePolicy, PollReport, SightingKey

BACKOFF_BASE_SECONDS = 30.0
BACKOFF_CAP_SECONDS = 3600.0
"""A server that was away for a night is asked within the hour after it is back."""

OPERATOR_BACKOFF_SECONDS = (300.0, 1800.0, 7200.0)
"""One refused login may be throttling in disguise, so it is tried again, ever more rarely. Then the account
is paused: a server that locks accounts out does so after more, or after faster, attempts than these."""

QUARANTINE_BASE_SECONDS = 3600.0
QUARANTINE_CAP_SECONDS = 7 * 86400.0

FATAL_ATTEMPTS = 3
"""How often the connection may die over one message before that message is set aside."""

LONGEST_WAIT_SECONDS = 31 * 86400.0
"""However long an interval was asked for: an account is looked at once a month."""

LOGIN_DELAY_MARGIN_SECONDS = 5.0
"""Beyond the LOGIN-DELAY of a server (RFC 2449 section 6.5), which counts whole seconds by its own clock."""

INTERVAL_JITTER = 0.1
"""Share of the interval by which due times are spread, so that accounts added together drift apart."""


class ListedMessage(Protocol):
    """The part of a listing entry that decisions need."""

    @property
    def uidl(self) -> bytes | None: ...
    @property
    def size(self) -> int | None: ...


E = TypeVar("E", bound=ListedMessage)


@dataclass(frozen=True, slots=True)
class Identified(Generic[E]):
    """A listing entry with the key of its sighting. ``certain`` is false where only content can tell."""

    entry: E
    sighting: SightingKey
    certain: bool


def identify(entries: Iterable[E]) -> list[Identified[E]]:
    """Give every entry of one listing its identity.

    RFC 1939 section 7 lets a server give equal ids to equal messages, and some
    give them to different ones: an id that stands twice in a listing
    identifies nothing, and neither does a missing one.
    """
    entries = list(entries)
    times = Counter(entry.uidl for entry in entries)
    return [
        Identified(
            entry,
            SightingKey(entry.uidl or b"", UNKNOWN_SIZE if entry.size is None else entry.size),
            certain=entry.uidl is not None and times[entry.uidl] == 1,
        )
        for entry in entries
    ]


def may_delete(policy: DeletePolicy, captured_at: datetime, now: datetime) -> bool:
    """Whether the account's policy lets a message go that was captured then."""
    return policy.after_days is not None and (now - captured_at) / timedelta(days=1) >= policy.after_days


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
    """When an account is due again; None when it waits for an operator, who is told ``pause_reason``."""

    after_seconds: float | None
    setbacks: Setbacks
    pause_reason: str | None = None


def is_too_early(report: PollReport) -> bool:
    """Whether the server would refuse a login right after this poll, since it wants a longer delay."""
    delay_seconds = report.login_delay_seconds or 0.0
    return delay_seconds > 0 and report.seconds < delay_seconds + LOGIN_DELAY_MARGIN_SECONDS


def next_poll(
    report: PollReport,
    *,
    setbacks: Setbacks,
    interval_seconds: float,
    uniform: Callable[[float, float], float],
) -> NextPoll:
    """Decide when to poll again, by the class of what happened.

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
    asked = report.wait_seconds or 0.0
    if report.login_delay_seconds:
        asked = max(asked, report.login_delay_seconds + LOGIN_DELAY_MARGIN_SECONDS)
    failures, refusals = setbacks
    interval_seconds = min(interval_seconds, LONGEST_WAIT_SECONDS)
    outcome = report.outcome
    if outcome == "operator_needed" and (report.listed is not None or report.journal_uncertain):
        outcome = "try_later"
    match outcome:
        case "ok" if report.to_come:
            return NextPoll(asked, Setbacks())
        case "ok":
            spread = interval_seconds * INTERVAL_JITTER
            return NextPoll(max(asked, interval_seconds + uniform(-spread, spread)), Setbacks())
        case "try_later" | "lease_lost":
            bound = min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2.0 ** min(failures, 10))
            return NextPoll(max(asked, uniform(0.0, bound)), Setbacks(failures + 1, refusals))
        case "operator_needed" if refusals < len(OPERATOR_BACKOFF_SECONDS):
            wait = OPERATOR_BACKOFF_SECONDS[refusals]
            again = Setbacks(failures, refusals + 1)
            return NextPoll(max(asked, wait + uniform(0.0, wait * INTERVAL_JITTER)), again)
        case _:
            return NextPoll(None, Setbacks(failures, refusals + 1), report.error or report.outcome)

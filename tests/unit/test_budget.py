"""What a poll may still fetch, by the budgets of its session and of the account's day."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from archiver.db.before import BeforePoll
from archiver.model import Account, JournalHead, StoppedBy
from archiver.poll.budget import Spending
from archiver.poll.ports import Budget, Ports

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
ACCOUNT = Account("a", "a", "pop3://a@localhost", "none", "env:NONE")


def spending(
    budget: Budget,
    *,
    spent: int = 0,
    yesterday: bool = False,
    seconds: float = 0.0,
    others_wait: bool = False,
) -> Spending:
    """A poll that began so many seconds ago, of an account that fetched so many bytes on a day."""
    day = (NOW - timedelta(days=yesterday)).date()
    before = BeforePoll(ACCOUNT, JournalHead(0, b""), None, 0, 0, day, spent)
    unused: Any = None
    ports = Ports(
        *(unused,) * 6,
        now=lambda: NOW,
        monotonic=lambda: seconds,
        stopping=lambda: False,
        budget=budget,
        make_room=lambda: others_wait,
    )
    return Spending(before, ports, 0.0)


@pytest.mark.parametrize(
    ("budget", "asked", "why"),
    [
        (Budget(), [1000, 1000], None),
        (Budget(messages=2), [1], None),
        (Budget(messages=2), [1, 1], "session"),
        (Budget(total_bytes=10), [], None),  # one message is always fetched
        (Budget(total_bytes=10), [5], "session"),
        (Budget(day_bytes=10), [], None),
        (Budget(day_bytes=10), [5], "day"),
        (Budget(ends_at=NOW), [], "blackout"),
    ],
)
def test_a_budget_holds_back_what_exceeds_it(budget: Budget, asked: list[int], why: StoppedBy | None) -> None:
    poll = spending(budget)
    for size in asked:
        poll.asked(size)
    assert poll.holds_back(6 if budget.messages is None else None) == why


def test_what_earlier_polls_fetched_counts_on_its_day() -> None:
    assert spending(Budget(day_bytes=10), spent=5).holds_back(6) == "day"
    assert spending(Budget(day_bytes=10), spent=5, yesterday=True).holds_back(60) is None
    poll = spending(Budget(), spent=5)
    poll.fetched(7)
    assert (poll.fetched_bytes, poll.today_bytes) == (7, 12)


def test_a_listing_that_understates_sizes_buys_nothing() -> None:
    poll = spending(Budget(total_bytes=10))
    poll.asked(1)
    poll.fetched(10)
    assert poll.holds_back(1) == "session"


def test_a_long_poll_ends_when_others_wait() -> None:
    assert spending(Budget(), seconds=59.0, others_wait=True).holds_back(1) is None
    assert spending(Budget(), seconds=60.0, others_wait=True).holds_back(1) == "room"
    assert spending(Budget(), seconds=60.0).holds_back(1) is None
    assert spending(Budget(), seconds=1800.0).holds_back(1) == "session"

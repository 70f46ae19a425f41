"""Days, gaps and old polls: whatever is added up, removed or killed, an account's days tell the same."""

import random
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from archiver.db import Database, accounts, claims, endings, history, migrate, overview
from archiver.db.endings import Ending
from archiver.db.history import Day, Gap
from archiver.db.tables import gap, poll, poll_day
from archiver.model import Account, new_account_id
from archiver.timetable import Timetable
from archiver.views import status as view
from tests.harness.reports import poll_report
from tests.harness.scripted_pop3 import MailboxPlay
from tests.machine.process import GatedDatabase
from tests.scenarios.story import Archive, Death, Fuse, message, middle

ADDED = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
INTERVAL = 3600.0


@dataclass
class Log:
    """A database whose polls end when the test says so."""

    database: Database

    def add(self, name: str = "work", at: datetime = ADDED) -> Account:
        identity = new_account_id()
        new = Account(identity, name, f"pop3s://{identity}@mail.example.com", "implicit", "env:P")
        return self.database.transact(lambda connection: accounts.add(connection, new, at))

    def poll(self, account: Account, ended_at: datetime, *, after: float = INTERVAL, **what: Any) -> None:
        """A poll, by the functions that polls call."""
        report = poll_report(account.name, **({"seconds": 5.0} | what))

        def end(connection: sa.Connection) -> None:
            claim = claims.claim_account(connection, account.id, owner="somebody", lease_seconds=60)
            assert claim is not None
            endings.write(connection, [Ending(claim, report, ended_at, Timetable(after))], uniform=middle)

        self.database.transact(end)

    def days(self, account: Account, first: date, last: date) -> list[Day]:
        with self.database.reading() as connection:
            return history.days(connection, account.id, first, last)

    def all_days(self, first: date, last: date) -> list[Day]:
        with self.database.reading() as connection:
            return history.days_of_all(connection, first, last)

    def gaps(self, account: Account, now: datetime, since: datetime = ADDED) -> list[Gap]:
        with self.database.reading() as connection:
            return history.gaps(connection, account.id, since, now)

    def tidy(self, now: datetime, keep_days: int = 30) -> history.Tidied:
        return history.tidy(self.database, now=now, keep_days=keep_days)

    def count(self, table: sa.Table) -> int:
        with self.database.reading() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


@pytest.fixture
def log(database_url: str) -> Iterator[Log]:
    database = Database(database_url, sleep=lambda _: None)
    migrate.upgrade(database)
    yield Log(database)
    database.close()


@pytest.fixture
def log_output() -> Iterator[list[MutableMapping[str, Any]]]:
    with capture_logs() as lines:
        yield lines


def a_month(log: Log, account: Account, seed: int, *, days: int = 10, a_day: int = 4) -> datetime:
    """Polls of some days, whose numbers chance decides; returns when the last one ended."""
    chance = random.Random(seed)
    at, held = ADDED, 0
    for _ in range(days * a_day):
        at += timedelta(seconds=86400 / a_day)
        if chance.random() < 0.2:
            log.poll(account, at, outcome="try_later", error="the server is away")
            continue
        new, lost, aside, to_come = (chance.randrange(limit) for limit in (9, 2, 3, 4))
        log.poll(
            account,
            at,
            listed=new + held + aside + to_come,
            new=new,
            known=held,
            quarantined=aside,
            gone=chance.randrange(2),
            lost=lost,
            fetched_bytes=new * 1000,
        )
        held += new
    return at


def rounded(days: list[Day]) -> list[Day]:
    return [replace(day, seconds=round(day.seconds, 3)) for day in days]


def test_a_days_listing_is_its_last_one_and_all_else_adds_up(log: Log) -> None:
    account = log.add()
    polls: list[dict[str, Any]] = [
        {"listed": 5, "new": 3, "quarantined": 1, "lost": 2, "fetched_bytes": 30},
        {"outcome": "try_later", "error": "no"},
        {"listed": 7, "new": 2, "known": 3, "quarantined": 1, "deleted": 1, "gone": 1, "fetched_bytes": 20},
        {"outcome": "try_later", "error": "no"},
    ]
    for hour, what in enumerate(polls):
        log.poll(account, ADDED + timedelta(hours=hour), **what)
    (day,) = log.days(account, ADDED.date(), ADDED.date())
    assert (day.polls, day.failed, day.looks) == (4, 2, 2)
    assert (day.listed, day.archived, day.quarantined, day.to_come) == (7, 5, 1, 1)
    assert (day.new, day.deleted, day.gone, day.lost, day.fetched_bytes) == (5, 1, 1, 2, 50)
    assert (day.first_look_at, day.last_look_at) == (ADDED, ADDED + timedelta(hours=2))


@pytest.mark.slow
def test_days_tell_the_same_before_and_after_they_are_added_up_and_removed(log: Log) -> None:
    several = [log.add(name) for name in ("one", "two", "three")]
    ends = max(a_month(log, account, seed) for seed, account in enumerate(several))
    first, last = ADDED.date(), ends.date()
    before = [rounded(log.days(account, first, last)) for account in several]
    together = rounded(log.all_days(first, last))

    def told() -> bool:
        return [rounded(log.days(account, first, last)) for account in several] == before and rounded(
            log.all_days(first, last)
        ) == together

    assert log.tidy(ends).counted == 120
    assert told()
    assert log.count(poll) == 120
    done = log.tidy(ends, keep_days=5)
    assert (done.counted, done.whole) == (0, True)
    assert 0 < done.removed < 120
    assert log.count(poll) == 120 - done.removed
    assert told()
    assert log.tidy(ends, keep_days=5) == history.Tidied(0, 0, whole=True)
    # Half of a day is added up, and the other half comes later.
    for account in several:
        log.poll(account, ends + timedelta(minutes=1), listed=1, new=1)
    after = [rounded(log.days(account, first, last)) for account in several]
    assert [days[-1].new for days in after] == [days[-1].new + 1 for days in before]
    assert [(days[-1].listed, days[-1].archived) for days in after] == [(1, 1)] * 3
    assert log.all_days(first, last)[-1].listed == 3
    log.tidy(ends)
    assert [rounded(log.days(account, first, last)) for account in several] == after
    assert sum(day.lost for days in after for day in days) == sum(
        day.lost for day in log.all_days(first, last)
    )


def test_the_days_of_all_are_those_of_each_added_up(log: Log) -> None:
    several = [log.add(name) for name in ("one", "two")]
    ends = max(a_month(log, account, seed) for seed, account in enumerate(several, start=7))
    log.tidy(ends - timedelta(days=3))
    days = zip(*(log.days(account, ADDED.date(), ends.date()) for account in several), strict=True)
    for parts, whole in zip(days, log.all_days(ADDED.date(), ends.date()), strict=True):
        for name in ("polls", "failed", "looks", "new", "gone", "lost", "fetched_bytes"):
            assert getattr(whole, name) == sum(getattr(part, name) for part in parts), name
        for name in ("listed", "archived", "quarantined", "to_come"):
            assert (getattr(whole, name) or 0) == sum(getattr(part, name) or 0 for part in parts), name


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after it"])
@pytest.mark.slow
def test_tidying_up_may_die_anywhere(log: Log, database_url: str, after: bool) -> None:
    several = [log.add(f"account {number}") for number in range(3)]
    ends = max(a_month(log, account, seed, days=5) for seed, account in enumerate(several))
    first, last = ADDED.date(), ends.date()
    before = [rounded(log.days(account, first, last)) for account in several]
    bounds = history.Bounds(accounts=2, polls=7)
    deaths = 0
    for number in range(40):
        mortal = GatedDatabase(database_url, Fuse(number % 11, after=after))
        try:
            history.tidy(mortal, now=ends, keep_days=2, bounds=bounds)
        except Death:
            deaths += 1
        finally:
            mortal.close()
        assert [rounded(log.days(account, first, last)) for account in several] == before
    assert deaths > 10
    history.tidy(log.database, now=ends, keep_days=2, bounds=bounds)
    assert log.count(poll) < 40
    assert [rounded(log.days(account, first, last)) for account in several] == before
    with log.database.reading() as connection:
        stored = connection.execute(sa.select(sa.func.sum(poll_day.c.polls))).scalar_one()
    assert stored == 60


@pytest.mark.slow
def test_many_may_tidy_up_at_once_while_polls_end(log: Log) -> None:
    several = [log.add(f"account {number}") for number in range(4)]
    ends = max(a_month(log, account, seed, days=3) for seed, account in enumerate(several))
    first, last = ADDED.date(), ends.date() + timedelta(days=1)
    bounds = history.Bounds(accounts=1, polls=5)

    def tidy(_: int) -> history.Tidied:
        return history.tidy(log.database, now=ends, keep_days=1, bounds=bounds)

    with ThreadPoolExecutor(4) as pool:
        tidying = [pool.submit(tidy, number) for number in range(12)]
        for number in range(20):
            log.poll(several[number % 4], ends + timedelta(minutes=number), listed=1, new=1)
        done = [one.result() for one in tidying]
    tidy(0)
    assert sum(one.counted for one in done) <= 68
    assert sum(day.polls for account in several for day in log.days(account, first, last)) == 68


def test_the_newest_poll_of_an_account_is_never_removed(log: Log) -> None:
    quiet, busy = log.add("quiet"), log.add("busy")
    log.poll(quiet, ADDED, listed=1, new=1)
    log.poll(quiet, ADDED + timedelta(hours=1), outcome="try_later", error="gone fishing")
    for day in range(100):
        log.poll(busy, ADDED + timedelta(days=day), listed=1, known=1)
    now = ADDED + timedelta(days=100)
    assert log.tidy(now, keep_days=30).removed == 71
    with log.database.reading() as connection:
        shown = {state.account.name: state for state in overview.account_states(connection)}
    assert (shown["quiet"].outcome, shown["quiet"].error) == ("try_later", "gone fishing")
    assert shown["busy"].ended_at == ADDED + timedelta(days=99)


# Gaps.


def test_a_time_in_which_nobody_looked_is_told_from_when_to_when(log: Log) -> None:
    account = log.add()
    looked = ADDED + timedelta(minutes=1)
    log.poll(account, looked, listed=1, new=1)
    assert log.gaps(account, looked + timedelta(seconds=2 * INTERVAL)) == []
    late = looked + timedelta(seconds=2 * INTERVAL + 1)
    assert log.gaps(account, late) == [Gap(looked, None)]
    # A poll that gets no listing ends no gap.
    log.poll(account, late, outcome="try_later", error="the server is away")
    assert log.gaps(account, late + timedelta(days=2)) == [Gap(looked, None)]
    again = looked + timedelta(days=2)
    log.poll(account, again, listed=1, known=1, seconds=60.0)
    closed = Gap(looked, again - timedelta(seconds=60))
    assert log.gaps(account, again) == [closed]
    assert log.gaps(account, again, since=again) == []
    # What is told of a gap outlives the polls.
    log.tidy(again + timedelta(days=400), keep_days=1)
    assert log.gaps(account, again) == [closed]
    gone = [
        history.gap_seconds([closed], day, again) for day in (ADDED.date(), ADDED.date() + timedelta(days=1))
    ]
    assert gone[1] == 86400
    assert gone[0] == (datetime(2026, 3, 2, tzinfo=UTC) - looked).total_seconds()


def test_the_time_before_the_first_listing_is_a_gap_if_it_was_long(log: Log) -> None:
    prompt, slow, never = log.add("prompt"), log.add("slow"), log.add("never")
    log.poll(prompt, ADDED + timedelta(seconds=30), listed=0)
    log.poll(slow, ADDED + timedelta(hours=3), listed=0)
    now = ADDED + timedelta(hours=3, seconds=1)
    assert log.gaps(prompt, ADDED + timedelta(hours=1)) == []
    assert log.gaps(slow, now) == [Gap(ADDED, ADDED + timedelta(hours=3, seconds=-5))]
    assert log.gaps(never, now) == [Gap(ADDED, None)]
    log.database.transact(lambda connection: accounts.remove(connection, never.id, now))
    assert log.gaps(never, now) == []


def test_what_was_planned_decides_what_is_late(log: Log) -> None:
    daily = log.add()
    log.poll(daily, ADDED, listed=0, after=86400.0)
    log.poll(daily, ADDED + timedelta(days=1, hours=20), listed=0, after=60.0)
    # Nobody looks so closely at a mailbox that some minutes tell.
    log.poll(daily, ADDED + timedelta(days=1, hours=20, minutes=9), listed=0, after=60.0)
    log.poll(daily, ADDED + timedelta(days=1, hours=20, minutes=20), listed=0, after=60.0)
    assert log.count(gap) == 1


def test_days_without_a_poll_are_shown_and_those_before_the_account_are_not(log: Log) -> None:
    account = log.add()
    log.poll(account, ADDED + timedelta(minutes=1), listed=2, new=2)
    now = ADDED + timedelta(days=3)
    with log.database.reading() as connection:
        ledger = view.ledger(connection, account.id, now, days=30)
    assert [(day.day.day, day.polls) for day in ledger.days] == [(1, 1), (2, 0), (3, 0), (4, 0)]
    assert [round(ledger.gap_seconds(day.day) / 3600) for day in ledger.days] == [12, 24, 24, 12]


# Losses.


def test_a_loss_is_counted_once_before_and_after_it_is_added_up(log: Log) -> None:
    one, two = log.add("one"), log.add("two")
    log.poll(one, ADDED, listed=1, new=1, lost=2)
    log.poll(two, ADDED, listed=1, new=1)
    for _ in range(2):
        with log.database.reading() as connection:
            assert history.losses(connection, ADDED.date()) == {one.id: 2}
            assert history.losses(connection, ADDED.date() + timedelta(days=1)) == {}
            assert history.lost(connection, one.id) == 2
        log.tidy(ADDED)
    log.poll(one, ADDED + timedelta(hours=1), listed=1, known=1, lost=1)
    with log.database.reading() as connection:
        assert history.losses(connection, ADDED.date()) == {one.id: 3}
        assert history.lost(connection, one.id) == 3


def test_the_service_tidies_up(archive: Archive, log_output: list[MutableMapping[str, Any]]) -> None:
    account = archive.add(archive.serve(MailboxPlay([(b"a", message("a"))])))
    archive.sync(account)
    archive.clock.advance(3 * 86400)
    archive.sync(account)
    worker = archive.worker(history_days=1)
    worker.jobs.run("history")
    (told,) = [line for line in log_output if line["event"] == "history.tidied"]
    # The database may be shared with other stories.
    assert (told["counted"] >= 2, told["removed"] >= 1, told["whole"]) == (True, True, True)
    assert [row.known for row in archive.polls(account)] == [1]
    with archive.database.reading() as connection:
        days = view.ledger(connection, account.id, archive.clock.now(), days=30).days
    assert (sum(day.polls for day in days), sum(day.new for day in days)) == (2, 1)
    worker.stopping.set()
    worker.jobs.run("history")
    assert [line["whole"] for line in log_output if line["event"] == "history.tidied"] == [True, False]

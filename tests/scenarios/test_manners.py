"""Fairness and manners: hosts with a cap, hosts in trouble, accounts that wait, budgets, windows."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from archiver.db import Database, accounts, claims, hosts, leases, schedule
from archiver.db.hosts import HostSessions
from archiver.db.tables import host as host_table
from archiver.db.tables import lease as lease_table
from archiver.db.tables import mailbox as mailbox_table
from archiver.model import Account, Claim, new_account_id
from archiver.policy import HOST_FAILURES
from archiver.poll.ports import Budget, Unwatched
from archiver.states import AccountState
from archiver.worker import Worker
from tests.harness.scripted_pop3 import MailboxPlay
from tests.scenarios.story import LEASE_SECONDS, LONG_AGO, Archive, message, poll_claimed, rest

THREADS = 8
NOW = datetime.now(UTC)


@pytest.fixture
def archive(lone_archive: Archive) -> Archive:
    """Claims see every account of the database, so each story has its own."""
    return lone_archive


def add(archive: Archive, host: str, **settings: Any) -> Account:
    """An account of this host, which nobody ever connects to."""
    identity = new_account_id()
    new = Account(
        identity, f"account {identity}", f"pop3s://{identity}@{host}", "implicit", "env:NONE", **settings
    )
    return archive.database.transact(lambda connection: accounts.add(connection, new, archive.clock.now()))


def add_many(archive: Archive, host: str, count: int) -> list[str]:
    return [add(archive, host).id for _ in range(count)]


def set_lease(archive: Archive, *account_ids: str, **values: Any) -> None:
    archive.execute(sa.update(lease_table).where(lease_table.c.account_id.in_(account_ids)).values(**values))


def claim(archive: Archive, limit: int = 100, *, cap: int = 20, **others: Any) -> list[Claim]:
    sessions = others.pop("sessions", HostSessions(cap))
    return archive.database.transact(
        lambda connection: claims.claim_due(
            connection, owner="w", lease_seconds=LEASE_SECONDS, limit=limit, sessions=sessions, **others
        )
    )


def tidy(archive: Archive, cap: int = 20) -> int:
    return archive.database.transact(
        lambda connection: claims.queue_at_hosts(connection, sessions=HostSessions(cap))
    )


def give_back(archive: Archive, *claims: Claim, after_seconds: float = 3600.0) -> None:
    for one in claims:
        put_off(archive.database, one, after_seconds)


def put_off(database: Database, one: Claim, after_seconds: float) -> None:
    database.transact(lambda connection: leases.put_off(connection, one, after_seconds))


def hosts_of(claimed: list[Claim]) -> Counter[str]:
    return Counter(one.host for one in claimed)


def slots(archive: Archive) -> list[tuple[str, int]]:
    with archive.database.reading() as connection:
        rows = connection.execute(
            sa.select(lease_table.c.host, lease_table.c.slot)
            .where(lease_table.c.slot.is_not(None))
            .order_by(lease_table.c.host, lease_table.c.slot)
        )
        return [(row.host, row.slot) for row in rows]


# A cap of sessions.


def test_a_host_has_as_many_sessions_as_it_may_and_others_are_not_kept_waiting(archive: Archive) -> None:
    full = add_many(archive, "full.example", 30)
    set_lease(archive, *full, due_at=LONG_AGO)
    add_many(archive, "other.example", 5)
    first = claim(archive, 10, cap=4)
    assert hosts_of(first)["full.example"] == 4
    assert hosts_of(first + claim(archive, 10, cap=4)) == {"full.example": 4, "other.example": 4}
    assert slots(archive) == [
        (name, number) for name in ("full.example", "other.example") for number in range(1, 5)
    ]
    assert claim(archive, 10, cap=4) == []
    # A slot that comes free is taken by the next, and it has the same number.
    give_back(archive, first[0])
    assert hosts_of(claim(archive, 10, cap=4)) == {first[0].host: 1}
    assert len(slots(archive)) == 8


@pytest.mark.parametrize("lines_up", [True, False])
def test_the_longest_overdue_of_each_host_come_first_in_line_or_not(
    archive: Archive, *, lines_up: bool
) -> None:
    waiting = add_many(archive, "full.example", 12)
    for number, account_id in enumerate(waiting):
        set_lease(archive, account_id, due_at=LONG_AGO + timedelta(seconds=number))
    held = claim(archive, 3, cap=3)
    assert {one.account_id for one in held} == set(waiting[:3])
    order = []
    while held:
        if lines_up:
            tidy(archive, cap=3)
        give_back(archive, held.pop(0))
        came = claim(archive, 3, cap=3)
        order += [one.account_id for one in came]
        held += came
    assert order == waiting[3:]


def test_what_waits_for_a_host_is_put_in_line_once_and_leaves_it_when_claimed(archive: Archive) -> None:
    add_many(archive, "full.example", 10)
    other = add(archive, "other.example")
    held = claim(archive, 2, cap=2)
    held += claim(archive, 2, cap=2)
    assert tidy(archive, cap=2) == 10 - 2
    assert tidy(archive, cap=2) == 0
    assert not archive.lease(other).queued
    with archive.database.reading() as connection:
        assert claims.hosts_with_queues(connection, {"full.example", "other.example"}) == {"full.example"}
    give_back(archive, *(one for one in held if one.host == "full.example"))
    came = claim(archive, 9, cap=2)
    assert hosts_of(came) == {"full.example": 2}
    assert not any(archive.lease(replace(other, id=one.account_id)).queued for one in came)


def test_a_single_host_may_have_a_cap_of_its_own(archive: Archive) -> None:
    for name in ("few.example", "many.example", "usual.example"):
        add_many(archive, name, 9)
    sessions = HostSessions(3, {"few.example": 1, "many.example": 8})
    assert hosts_of(claim(archive, sessions=sessions)) == {
        "few.example": 1,
        "many.example": 8,
        "usual.example": 3,
    }
    assert claim(archive, sessions=sessions) == []


def test_a_lease_that_ran_out_keeps_its_slot_and_hands_it_on(archive: Archive) -> None:
    add_many(archive, "full.example", 3)
    (dead,) = claim(archive, cap=1)
    set_lease(archive, dead.account_id, due_at=LONG_AGO, expires_at=LONG_AGO)
    # Its worker may live: nobody else gets the slot, and it is no second session.
    (again,) = claim(archive, cap=1)
    assert (again.account_id, again.token, again.recover) == (dead.account_id, 2, True)
    assert slots(archive) == [("full.example", 1)]
    assert claim(archive, cap=1) == []


def test_a_pause_leaks_no_slot_even_if_the_worker_dies(archive: Archive) -> None:
    first, second = add(archive, "full.example"), add(archive, "full.example")
    (held,) = claim(archive, cap=1)
    paused = first if held.account_id == first.id else second
    archive.database.transact(lambda connection: schedule.stop(connection, paused.id, AccountState.PAUSED))
    tidy(archive, cap=1)
    assert claim(archive, cap=1) == []
    set_lease(archive, paused.id, expires_at=LONG_AGO)
    tidy(archive, cap=1)
    assert [one.account_id for one in claim(archive, cap=1)] == [
        {first.id, second.id}.difference({paused.id}).pop()
    ]
    # Resumed, it waits for a slot as any other, and its journal is looked at.
    archive.database.transact(lambda connection: schedule.resume(connection, paused.id))
    set_lease(archive, paused.id, due_at=LONG_AGO)
    assert claim(archive, cap=1) == []
    assert [(one.token, one.recover) for one in claim(archive, cap=2)] == [(2, True)]


def test_an_account_that_moves_while_it_is_polled_keeps_the_old_hosts_slot_until_the_end(
    archive: Archive,
) -> None:
    moving = add(archive, "old.example")
    add_many(archive, "new.example", 1)
    assert len(claim(archive, cap=1)) == 2
    moved = replace(moving, url=f"pop3s://{moving.id}@new.example")
    archive.database.transact(lambda connection: accounts.change(connection, moved, archive.clock.now()))
    assert slots(archive) == [("new.example", 1), ("old.example", 1)]
    assert archive.lease(moving).asked


def test_an_account_that_moves_while_it_waits_waits_at_its_new_host(archive: Archive) -> None:
    add_many(archive, "full.example", 2)
    (held,) = claim(archive, cap=1)
    tidy(archive, cap=1)
    with archive.database.reading() as connection:
        moving = next(a for a in accounts.all_active(connection) if a.id != held.account_id)
    assert archive.lease(moving).queued
    moved = replace(moving, url=f"pop3s://{moving.id}@new.example")
    archive.database.transact(lambda connection: accounts.change(connection, moved, archive.clock.now()))
    assert hosts_of(claim(archive, cap=1)) == {"new.example": 1}


def test_a_poll_by_name_takes_a_slot_or_says_that_there_is_none(archive: Archive) -> None:
    server = archive.serve(MailboxPlay([]))
    account, other = archive.add(server), add(archive, "localhost")
    set_lease(archive, other.id, due_at=LONG_AGO)
    (held,) = claim(archive, 1, cap=1)
    worker = archive.worker(sessions=HostSessions(1))
    (report,) = worker.poll_now([account], lambda _: Unwatched())
    assert report.outcome == "try_later"
    assert "localhost has as many sessions as it may have at once, 1" in str(report.error)
    give_back(archive, held)
    (report,) = worker.poll_now([archive.fresh(account)], lambda _: Unwatched())
    assert report.outcome == "ok"
    assert slots(archive) == []


def test_polls_by_name_of_one_process_wait_for_each_other_at_a_host(archive: Archive) -> None:
    chosen = [archive.add(archive.serve(MailboxPlay([(b"a", message("a"))]))) for _ in range(4)]
    worker = archive.worker(workers=4, sessions=HostSessions(1), sleep=rest)
    reports = worker.poll_now(chosen, lambda _: Unwatched())
    assert [report.outcome for report in reports] == ["ok"] * 4
    assert slots(archive) == []


def test_whatever_many_workers_do_no_cap_is_exceeded_and_no_host_starves(
    postgres_url: str, tmp_path: Path
) -> None:
    """Eight workers claim and release as fast as they can; a watcher counts sessions all the while."""
    cap, rounds = 3, 25
    with Archive(postgres_url, tmp_path) as archive:
        busy = add_many(archive, "busy.example", 200)
        set_lease(archive, *busy, due_at=LONG_AGO)
        few = {name: add_many(archive, name, 4) for name in ("a.example", "b.example")}
        polled: Counter[str] = Counter()
        held: set[str] = set()
        twice: list[str] = []
        lock, done, most = threading.Lock(), threading.Event(), Counter[str]()

        def work(number: int) -> None:
            database = Database(postgres_url, pool_size=1)
            for round_number in range(rounds):
                if round_number % 5 == number % 5:
                    database.transact(lambda c: claims.queue_at_hosts(c, sessions=HostSessions(cap)))
                claimed = database.transact(
                    lambda c: claims.claim_due(
                        c, owner=f"w{number}", lease_seconds=60, limit=2, sessions=HostSessions(cap)
                    )
                )
                with lock:
                    twice.extend(one.account_id for one in claimed if one.account_id in held)
                    held.update(one.account_id for one in claimed)
                    polled.update(one.account_id for one in claimed)
                for one in claimed:
                    with lock:
                        held.discard(one.account_id)
                    put_off(database, one, 0.0)
            database.close()

        def watch() -> None:
            while not done.is_set():
                for name, count in Counter(name for name, _ in slots(archive)).items():
                    most[name] = max(most[name], count)

        with ThreadPoolExecutor(THREADS + 1) as pool:
            watching = pool.submit(watch)
            for working in [pool.submit(work, number) for number in range(THREADS)]:
                working.result()
            done.set()
            watching.result()
        assert twice == []
        assert most["busy.example"] == cap
        assert max(most.values()) == cap
        assert all(polled[account_id] > 0 for ids in few.values() for account_id in ids)


# Hosts in trouble.


def unreached(archive: Archive, name: str, times: int = 1) -> list[Any]:
    return [
        archive.database.transact(lambda c: hosts.unreached(c, name, "timed out", max)) for _ in range(times)
    ]


def reopen(archive: Archive, name: str) -> None:
    """The time is over for which the host was left alone."""
    archive.execute(sa.update(host_table).where(host_table.c.name == name).values(retry_at=LONG_AGO))


def test_a_host_that_cannot_be_reached_is_left_alone_then_tried_by_one(archive: Archive) -> None:
    add_many(archive, "down.example", 8)
    add_many(archive, "up.example", 2)
    assert unreached(archive, "down.example", HOST_FAILURES - 1) == [None] * (HOST_FAILURES - 1)
    (trouble,) = unreached(archive, "down.example")
    assert (trouble.failures, trouble.error) == (HOST_FAILURES, "timed out")
    assert hosts_of(claim(archive)) == {"up.example": 2}
    tidy(archive)
    # Polls that began before it was closed do not prolong that.
    assert unreached(archive, "down.example", 3) == [None] * 3

    reopen(archive, "down.example")
    (probe,) = claim(archive)
    assert claim(archive) == []
    (again,) = unreached(archive, "down.example")
    assert again.failures == HOST_FAILURES + 1
    give_back(archive, probe)
    assert claim(archive) == []

    reopen(archive, "down.example")
    (probe,) = claim(archive)
    assert archive.database.transact(lambda c: hosts.reached(c, "down.example"))
    assert not archive.database.transact(lambda c: hosts.reached(c, "down.example"))
    give_back(archive, probe)
    assert len(claim(archive)) == 6
    with archive.database.reading() as connection:
        assert hosts.troubles(connection) == []


def test_polls_find_out_that_a_host_is_down_and_that_it_is_up(archive: Archive) -> None:
    server = archive.serve(MailboxPlay([(b"a", message("a"))]))
    account = archive.add(server)
    url = f"pop3://{server.endpoint.user}@localhost:1"
    nowhere = archive.ports(connect=lambda account: archive.connect(replace(account, url=url)))
    for _ in range(HOST_FAILURES):
        report = archive.sync(account, nowhere)
        assert (report.outcome, report.reached) == ("try_later", False)
    with archive.database.reading() as connection:
        (trouble,) = hosts.troubles(connection, "localhost")
    assert (trouble.failures, trouble.retry_at is None) == (HOST_FAILURES, False)
    archive.run_out(account)
    set_lease(archive, account.id, owner=None, expires_at=None)
    assert claim(archive) == []
    # Who asks by name is not kept waiting; and what works for one works for all.
    assert archive.sync(account).outcome == "ok"
    with archive.database.reading() as connection:
        assert hosts.troubles(connection) == []


def test_a_refused_login_says_nothing_against_the_host(archive: Archive) -> None:
    account = archive.add(archive.serve(MailboxPlay([], password="another")))
    unreached(archive, "localhost")
    report = archive.sync(account)
    assert (report.outcome, report.reached) == ("operator_needed", True)
    with archive.database.reading() as connection:
        assert hosts.troubles(connection) == []


# Accounts that fail.


def test_accounts_that_fail_leave_threads_for_the_others(archive: Archive) -> None:
    failing = [add(archive, f"bad{number}.example").id for number in range(20)]
    set_lease(archive, *failing, due_at=LONG_AGO, failures=3)
    well = [add(archive, f"good{number}.example").id for number in range(3)]
    worker: Worker = archive.worker(workers=6)
    held = worker.changeovers.claim(6)
    assert sorted(lease.claim.account_id in failing for lease in held) == [False] * 3 + [True] * 3
    assert {lease.claim.account_id for lease in held} >= set(well)
    assert worker.changeovers.claim(3) == []


def test_a_process_begins_with_one_poll(archive: Archive) -> None:
    worker = archive.worker(workers=8, ramp_seconds=8.0)
    seen = []
    for _ in range(5):
        seen.append(worker.changeovers.polls_at_once)
        archive.clock.advance(2.0)
    assert seen == [1, 2, 4, 6, 8]


# Polls that somebody asks for.


def ask(archive: Archive, *chosen: Account) -> int:
    ids = [account.id for account in chosen] or None
    return archive.database.transact(lambda connection: schedule.ask(connection, ids))


def test_an_account_that_is_asked_for_is_due_now(archive: Archive) -> None:
    account, other, paused = (add(archive, "host.example") for _ in range(3))
    archive.database.transact(lambda c: schedule.stop(c, paused.id, AccountState.PAUSED))
    set_lease(archive, account.id, other.id, due_at=NOW + timedelta(days=1), failures=4)
    assert ask(archive, account, paused) == 1
    assert [one.account_id for one in claim(archive)] == [account.id]
    assert ask(archive) == 2
    assert archive.lease(account).asked
    assert not archive.lease(other).asked


def test_an_account_that_is_asked_for_during_its_poll_is_polled_right_after(archive: Archive) -> None:
    account = archive.add(archive.serve(MailboxPlay([])))
    worker = archive.worker()
    held = worker.on_demand.claim(account)
    ask(archive, account)
    poll_claimed(worker, held)
    assert [one.account_id for one in claim(archive)] == [account.id]
    assert not archive.lease(account).asked


# Budgets and slices.


def five() -> MailboxPlay:
    return MailboxPlay([(name.encode(), message(name)) for name in "abcde"])


def poll_once(archive: Archive, account: Account, worker: Worker | None = None, **ports: Any) -> Any:
    """As the service polls. The report is what the database kept of it."""
    worker = worker or archive.worker(archive.ports(**ports))
    archive.run_out(account)
    (lease,) = worker.changeovers.claim(1)
    poll_claimed(worker, lease)
    return archive.polls(account)[-1]


def test_a_session_fetches_no_more_than_its_budget_and_the_next_goes_on(archive: Archive) -> None:
    account = archive.add(archive.serve(five()))
    budget = Budget(messages=2)
    seen = [poll_once(archive, account, budget=budget) for _ in range(3)]
    assert [(row.new, row.to_come) for row in seen] == [(2, 3), (2, 1), (1, 0)]


def test_a_message_larger_than_the_budget_is_fetched_all_the_same(archive: Archive) -> None:
    account = archive.add(archive.serve(five()))
    assert [poll_once(archive, account, budget=Budget(total_bytes=1)).new for _ in range(3)] == [1, 1, 1]


def test_a_backfill_is_due_again_at_once_and_behind_what_was_due_before(archive: Archive) -> None:
    account = archive.add(archive.serve(five()))
    poll_once(archive, account, budget=Budget(messages=2))
    before = add(archive, "other.example")
    set_lease(archive, before.id, due_at=datetime.now(UTC) - timedelta(seconds=5))
    assert [one.account_id for one in claim(archive, 1)] == [before.id]
    assert [one.account_id for one in claim(archive, 1)] == [account.id]


def test_once_the_days_octets_are_spent_the_rest_waits_and_is_told(archive: Archive) -> None:
    octets = len(message("a"))
    account = archive.add(archive.serve(five()), day_bytes=3 * octets)
    first = poll_once(archive, account)
    assert (first.new, first.to_come) == (3, 2)
    assert archive.lease(account).due_at > datetime.now(UTC) + timedelta(seconds=30)
    second = poll_once(archive, account)
    assert (second.new, second.listed, second.to_come) == (0, 5, 2)
    # The next day.
    archive.execute(sa.update(mailbox_table).values(day=datetime(2000, 1, 1).date()))  # noqa: DTZ001
    assert poll_once(archive, account).new == 2


def test_a_long_poll_makes_room_for_one_that_waits_and_a_short_one_does_not(archive: Archive) -> None:
    for slice_seconds, fetched in ((30.0, 5), (0.0, 0)):
        account = archive.add(archive.serve(five()))
        worker = archive.worker(archive.ports(budget=Budget(slice_seconds=slice_seconds)), workers=1)
        archive.run_out(account)
        (lease,) = worker.changeovers.claim(1)
        waiting = add(archive, "other.example")
        assert worker.leases.look_who_waits(0).accounts == (1 if slice_seconds == 0.0 else 0)
        poll_claimed(worker, lease)
        assert archive.polls(account)[-1].new == fetched
        remove(archive, waiting)
        remove(archive, account)


def remove(archive: Archive, account: Account) -> None:
    archive.database.transact(lambda connection: accounts.remove(connection, account.id, NOW))


def test_a_long_poll_makes_room_for_others_of_its_host(archive: Archive) -> None:
    account = archive.add(archive.serve(five()))
    worker = archive.worker(
        archive.ports(budget=Budget(slice_seconds=0.0)), workers=4, sessions=HostSessions(1)
    )
    archive.run_out(account)
    (lease,) = worker.changeovers.claim(1)
    add(archive, "localhost")
    tidy(archive, cap=1)
    assert worker.leases.look_who_waits(3).hosts == {"localhost"}
    poll_claimed(worker, lease)
    assert archive.polls(account)[-1].to_come == 5


# Windows.


def window_from(moment: datetime, minutes: int) -> str:
    return f"{moment:%H:%M}-{moment + timedelta(minutes=minutes):%H:%M}"


def test_a_session_that_runs_into_a_window_stops_at_its_start(archive: Archive) -> None:
    account = archive.add(archive.serve(five()))
    begins = archive.clock.now() + timedelta(minutes=5)
    archive.execute(sa.text("UPDATE account SET blackout = :w").bindparams(w=window_from(begins, 60)))
    looks = iter(range(100))

    def now() -> datetime:
        # A minute a look.
        return archive.clock.now() + timedelta(minutes=next(looks))

    row = poll_once(archive, account, now=now)
    assert 0 < row.to_come < 5


def test_an_account_that_is_due_in_its_window_is_put_off_without_a_session(archive: Archive) -> None:
    server = archive.serve(five())
    account = archive.add(server, blackout=window_from(datetime.now(UTC) - timedelta(minutes=5), 60))
    worker = archive.worker()
    (lease,) = worker.changeovers.claim(1)
    poll_claimed(worker, lease)
    assert (server.connections, archive.polls(account), slots(archive)) == (0, [], [])
    left = (archive.lease(account).due_at - datetime.now(UTC)).total_seconds()
    assert 50 * 60 < left < 56 * 60
    # Who asks in person gets it.
    assert archive.sync(account).counts.new == 5


def test_a_calendar_that_makes_no_sense_here_needs_an_operator(archive: Archive) -> None:
    server = archive.serve(five())
    account = archive.add(server)
    archive.execute(sa.text("UPDATE account SET time_zone = 'Mars/Olympus', cron = '0 6 * * *'"))
    worker = archive.worker()
    (lease,) = worker.changeovers.claim(1)
    poll_claimed(worker, lease)
    (row,) = archive.polls(account)
    assert (row.outcome, server.connections) == ("operator_needed", 0)
    assert "unknown time zone 'Mars/Olympus'" in row.error


def test_an_account_with_a_cron_expression_is_due_when_it_says(archive: Archive) -> None:
    account = archive.add(archive.serve(five()), cron="0 0 1 1 *")
    due_at = archive.lease(account).due_at
    assert (due_at.month, due_at.day, due_at.hour) == (1, 1, 0)
    archive.sync(account)
    again = archive.lease(account).due_at
    assert (again.month, again.day, again.hour, again.minute) == (1, 1, 0, 0)
    changed = replace(archive.fresh(account), cron=None)
    archive.database.transact(lambda c: accounts.change(c, changed, archive.clock.now()))
    assert len(claim(archive)) == 1


def test_an_adaptive_interval_stands_in_the_lease(archive: Archive) -> None:
    play = five()
    account = archive.add(archive.serve(play), interval_seconds=60.0, interval_max_seconds=600.0)
    seen = []
    for new in (None, None, None, b"f"):
        if new is not None:
            play.messages.append((new, message("f")))
        poll_once(archive, account)
        seen.append(archive.lease(account).interval_seconds)
    assert seen == [60, 90, 135, 60]


# Heartbeats.


def test_a_heartbeat_of_many_leases_is_one_statement(archive: Archive) -> None:
    add_many(archive, "host.example", 12)
    held = claim(archive)
    lost = held[0]
    set_lease(archive, lost.account_id, token=lost.token + 1)
    statements: list[str] = []

    def note(_: Any, __: Any, statement: str, *rest: Any) -> None:
        statements.append(statement)

    sa.event.listen(archive.database.engine, "before_cursor_execute", note)
    kept = archive.database.transact(
        lambda connection: leases.renew(connection, held, lease_seconds=LEASE_SECONDS)
    )
    sa.event.remove(archive.database.engine, "before_cursor_execute", note)
    assert kept == set(held[1:])
    assert len([statement for statement in statements if "UPDATE" in statement]) == 1

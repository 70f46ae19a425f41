"""The worker's agenda and its clock, by themselves. Scenarios test what a worker does with them."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime

import pytest

from archiver.db.before import BeforePoll
from archiver.model import Account, Claim, JournalHead, PollReport
from archiver.poll import NEEDS_THREAD, Story
from archiver.worker.changeover import ENDINGS_AT_ONCE, Agenda
from archiver.worker.jobs import Job, Jobs
from archiver.worker.leases import ActiveLease
from archiver.worker.polling import Finished, Polling

THREADS = 4
EACH = 500
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def told(report: PollReport) -> Story:
    yield NEEDS_THREAD
    return report


def finished(number: int) -> Finished:
    account = Account(f"{number:016x}", f"a{number}", f"pop3s://u{number}@h", "implicit", "env:P")
    lease = ActiveLease(Claim(account.id, 1, recover=False), 60.0, lambda: 0.0, 0.0)
    report = PollReport(account.name, "ok")
    return Finished(
        Polling(BeforePoll(account, JournalHead(0, b""), None, 0, 0), lease, told(report)), report
    )


# The agenda.


def test_a_changeover_is_wanted_once_until_it_begins() -> None:
    agenda = Agenda()
    assert [agenda.want(), agenda.want()] == [True, False]
    assert not agenda.begin().is_more
    assert agenda.want()


def test_what_one_changeover_cannot_end_the_next_one_does() -> None:
    agenda, number = Agenda(), ENDINGS_AT_ONCE + 1
    for each in range(number):
        agenda.add(finished(each))
    agenda.want()
    first = agenda.begin()
    assert (len(first.finished), first.is_more) == (ENDINGS_AT_ONCE, True)
    # The thread that began it has the next one done.
    assert not agenda.want()
    second = agenda.begin()
    assert ([each.report.account for each in second.finished], second.is_more) == (["a100"], False)


def test_while_a_thread_waits_to_claim_no_changeover_claims() -> None:
    agenda = Agenda()
    assert not agenda.begin().may_claim
    agenda.serve()
    assert agenda.begin().may_claim
    agenda.claim_begins()
    work = agenda.begin()
    assert (work.serves, work.may_claim, agenda.is_claiming) == (True, False, True)
    agenda.claim_ended()
    assert agenda.begin().may_claim


def test_whatever_threads_do_each_finished_poll_is_ended_once_and_no_wish_is_lost() -> None:
    agenda, wanted, ended = Agenda(), threading.Semaphore(0), list[str]()

    def poll(number: int) -> None:
        for each in range(EACH):
            agenda.add(finished(number * EACH + each))
            if agenda.want():
                wanted.release()

    def change_over() -> None:
        while len(ended) < THREADS * EACH:
            assert wanted.acquire(timeout=20)
            work = agenda.begin()
            ended.extend(each.report.account for each in work.finished)
            if work.is_more:
                wanted.release()

    with ThreadPoolExecutor(THREADS + 1) as pool:
        changing = pool.submit(change_over)
        wait([pool.submit(poll, number) for number in range(THREADS)])
        changing.result()
    assert sorted(ended) == sorted(f"a{number}" for number in range(THREADS * EACH))


# The clock.


def jobs() -> Jobs:
    return Jobs(now=lambda: NOW, uniform=lambda low, _high: low)


def test_a_job_runs_by_hand_while_the_clock_does_not() -> None:
    runs: list[str] = []
    clock = jobs()
    clock.add(Job("one", lambda: runs.append("one"), 60.0))
    clock.add(Job("two", lambda: runs.append("two"), 60.0, jitter_seconds=6.0))
    clock.run("two")
    assert runs == ["two"]
    with pytest.raises(ValueError, match="'one' already"):
        clock.add(Job("one", lambda: None, 1.0))
    with pytest.raises(KeyError):
        clock.run("three")
    clock.close()


def test_a_command_runs_only_the_jobs_that_it_needs() -> None:
    twice, of_service = threading.Semaphore(0), list[str]()
    clock = jobs()
    clock.add(Job("service", lambda: of_service.append("ran"), 0.01))
    clock.add(Job("both", twice.release, 0.01, for_commands=True))
    clock.start(service=False)
    try:
        assert twice.acquire(timeout=20)
        assert twice.acquire(timeout=20)
        assert of_service == []
    finally:
        clock.close()

"""Who may poll what: claims, heartbeats and releases, with others in between."""

import selectors
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from archiver.db import Database, accounts, claims, leases, overview, schedule
from archiver.db.hosts import HostSessions
from archiver.db.tables import account as account_table
from archiver.db.tables import capture as capture_table
from archiver.db.tables import journal as journal_table
from archiver.db.tables import lease as lease_table
from archiver.db.tables import mailbox as mailbox_table
from archiver.db.tables import poll as poll_table
from archiver.db.tables import sighting as sighting_table
from archiver.errors import IntegrityError, LeaseLost, TryLater
from archiver.evidence import journal
from archiver.model import (
    NO_DIGEST,
    Account,
    Claim,
    Counts,
    DeletePolicy,
    PollReport,
    Segment,
    ServerRecord,
    segment_key,
)
from archiver.poll import finish
from archiver.poll import poll as tell_poll
from archiver.poll.ports import Ports, Unwatched
from archiver.pop3.loop import until_ready
from archiver.process import name_owner
from archiver.states import AccountState
from archiver.store.spool import BytesBody
from archiver.worker import Worker
from archiver.worker.leases import ActiveLease
from archiver.worker.polling import Finished
from tests.harness.scripted_pop3 import Channel, MailboxPlay, Send, Talk
from tests.machine.process import GatedDatabase, GatedSession, GatedStore, Uploads
from tests.scenarios.story import (
    LEASE_SECONDS,
    Archive,
    ForgetfulDatabase,
    Fuse,
    Intruder,
    message,
    poll_claimed,
    rest,
)

THREADS = 8


def mailbox(*names: str, **settings: Any) -> MailboxPlay:
    return MailboxPlay([(name.encode(), message(name)) for name in names], **settings)


def claim_due(
    archive: Archive, owner: str = "another", limit: int = 100, *, sessions: int = 1000, **others: Any
) -> list[Claim]:
    return archive.database.transact(
        lambda connection: claims.claim_due(
            connection,
            owner=owner,
            lease_seconds=LEASE_SECONDS,
            limit=limit,
            sessions=HostSessions(sessions),
            **others,
        )
    )


def stop(archive: Archive, account: Account, state: AccountState) -> None:
    reason = "a wrong password" if state is AccountState.WAITING else None
    archive.database.transact(lambda connection: schedule.stop(connection, account.id, state, reason))


def seconds_left(archive: Archive, account: Account) -> float:
    return float((archive.lease(account).expires_at - datetime.now(UTC)).total_seconds())


# Claims.


def test_of_many_workers_each_account_has_one(lone_archive: Archive) -> None:
    archive = lone_archive
    server = archive.serve(mailbox())
    added = {
        archive.add(server, url=f"pop3://user{number}@localhost:{server.port}").id for number in range(60)
    }
    start = threading.Barrier(THREADS)

    def work(number: int) -> list[Claim]:
        start.wait(10)
        mine: list[Claim] = []
        while claims := claim_due(archive, f"worker {number}", limit=3):
            mine += claims
        return mine

    with ThreadPoolExecutor(THREADS) as pool:
        claims = [claim for found in pool.map(work, range(THREADS)) for claim in found]
    assert Counter(claim.account_id for claim in claims) == Counter(added)
    assert {(claim.token, claim.recover) for claim in claims} == {(1, False)}


def test_of_many_who_want_one_account_one_gets_it(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox()))
    start = threading.Barrier(THREADS)

    def work(number: int) -> Claim | None:
        start.wait(10)
        return archive.database.transact(
            lambda connection: claims.claim_account(
                connection, account.id, owner=f"worker {number}", lease_seconds=LEASE_SECONDS
            )
        )

    with ThreadPoolExecutor(THREADS) as pool:
        assert len([claim for claim in pool.map(work, range(THREADS)) if claim is not None]) == 1


def test_a_lease_that_ran_out_is_taken_over_and_its_journal_looked_at(lone_archive: Archive) -> None:
    archive = lone_archive
    account = archive.add(archive.serve(mailbox()))
    (first,) = claim_due(archive)
    assert claim_due(archive) == []
    archive.run_out(account)
    with archive.database.reading() as connection:
        assert overview.overview(connection, datetime.now(UTC)).overdue_seconds > 0
    assert claim_due(archive) == [Claim(account.id, first.token + 1, recover=True)]


def test_the_longest_overdue_comes_first(lone_archive: Archive) -> None:
    archive = lone_archive
    server = archive.serve(mailbox())
    older, newer = (
        archive.add(server, url=f"pop3://user{number}@localhost:{server.port}") for number in (1, 2)
    )
    archive.run_out(older)
    assert [claim.account_id for claim in claim_due(archive, limit=1)] == [older.id]
    assert [claim.account_id for claim in claim_due(archive, limit=1)] == [newer.id]


def test_the_lease_of_a_dead_process_of_this_machine_is_not_waited_for(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox("a")))
    host, namespace, pid, _ = name_owner().split("/")
    archive.claim(account, owner=f"{host}/{namespace}/{pid}/1")
    before = archive.clock.monotonic()
    assert archive.sync(account).outcome == "ok"
    assert archive.clock.monotonic() == before


def test_the_lease_of_another_is_waited_for_and_left_to_it(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox("a")))
    archive.claim(account, owner="elsewhere/1/2/3")
    report = archive.sync(account)
    assert (report.outcome, report.listed) == ("try_later", None)
    assert "elsewhere/1/2/3" in str(report.error)
    assert archive.lease(account).token == 1


# Two that believe they hold the lease.


def eventful() -> MailboxPlay:
    return mailbox("a", "b", "refused", "d", faults={"RETR 3": Send(b"-ERR [SYS/PERM] no\r\n")})


def watched(archive: Archive, fuse: Fuse) -> tuple[Ports, Database]:
    database = GatedDatabase(archive.database.engine.url.render_as_string(hide_password=False), fuse)
    ports = archive.ports(
        # One thing at a time: where a new one comes, nothing of the old one goes on beside it.
        uploads=Uploads(at_once=True),
        store=GatedStore(archive.store, fuse),
        database=database,
        connect=lambda account: GatedSession(archive.connect(account), fuse),
    )
    return ports, database


@pytest.mark.slow
def test_an_old_holder_writes_nothing_more_wherever_a_new_one_comes(archive: Archive) -> None:
    deleting = {"delete": DeletePolicy(0.0)}
    play = eventful()
    account = archive.add(archive.serve(play), **deleting)
    fuse = Fuse()
    ports, database = watched(archive, fuse)
    assert finish(tell_poll(archive.before(account), archive.claim(account), ports)).outcome == "ok"
    database.close()
    archive.run_out(account)
    archive.sync(account)
    expected = archive.state(account, play)
    last_write = max(index for index, name in enumerate(fuse.calls) if name == "db.transact")

    for index, name in enumerate(fuse.calls):
        if name == "db.commit":  # A new one waits there until the old one's transaction has ended.
            continue
        play = eventful()
        account = archive.add(archive.serve(play), **deleting)
        old = archive.claim(account, owner="the old one")
        seen: list[Any] = []

        def come(account: Account = account, seen: list[Any] = seen) -> None:
            archive.run_out(account)
            seen.append(archive.sync(account))
            seen.append((archive.polls(account), archive.captures(account), len(archive.segments(account))))

        ports, database = watched(archive, Intruder(index, come))
        report = finish(tell_poll(archive.before(account), old, ports))
        database.close()
        assert (seen[0].outcome, seen[0].error) == ("ok", None), (index, name)
        after = (archive.polls(account), archive.captures(account), len(archive.segments(account)))
        assert after == seen[1], (index, name, "the old one wrote")
        if index <= last_write:
            assert report.outcome == "lease_lost", (index, name, report)
        archive.sync(account)
        assert archive.state(account, play) == expected, (index, name)
        findings = archive.verify(account)
        assert findings.clean, (index, name, findings.named)


def test_a_segment_that_an_older_poll_wrote_late_is_taken_in_by_the_next(archive: Archive) -> None:
    play = mailbox("a", "b")
    account = archive.add(archive.serve(play), delete=DeletePolicy(0.0))
    old = archive.claim(account)
    archive.run_out(account)
    late = Segment(
        account_id=account.id,
        account_name=account.name,
        account_url=account.url,
        epoch=1,
        sequence=1,
        previous=NO_DIGEST,
        token=old.claim.token,
        written_at=archive.clock.now(),
        server=ServerRecord("localhost", 110, "+OK", None, None, None, None),
        listing_count=0,
        listing_digest=NO_DIGEST,
        lines=(),
    )

    def come() -> None:
        archive.store.put(segment_key(account.id, 1), BytesBody(journal.encode(late)))

    calls: list[str] = []

    class AtTheSegment(Intruder):
        def __init__(self) -> None:
            super().__init__(0, come)

        def passing(self, name: str, *, may_freeze: bool = True) -> Any:
            calls.append(name)
            return super().passing(name) if name == "store.put journal" else Fuse().passing(name)

    ports, database = watched(archive, AtTheSegment())
    report = archive.sync(account, ports)
    database.close()
    assert (report.outcome, report.counts.new, report.counts.delete_requested) == ("try_later", 0, 0)
    assert "earlier poll" in str(report.error)
    assert archive.lease(account).recover
    assert archive.fresh(account).state is AccountState.ACTIVE

    report = archive.sync(account)
    assert (report.outcome, report.counts.new, report.counts.delete_requested) == ("ok", 2, 2)
    assert [segment.token for segment in archive.segments(account)] == [1, 3]
    assert archive.verify(account).clean


def put_back(archive: Archive, account: Account) -> None:
    """Make the database what it was before the account's first poll."""
    for table, values in (
        (lease_table, {"token": 0}),
        (journal_table, {"sequence": 0, "digest": NO_DIGEST}),
        (mailbox_table, {"captures": 0, "captured_bytes": 0}),
    ):
        archive.execute(sa.update(table).where(table.c.account_id == account.id).values(**values))
    for table in (capture_table, sighting_table, poll_table):
        archive.execute(sa.delete(table).where(table.c.account_id == account.id))


def test_a_database_that_was_restored_learns_what_the_journal_has(archive: Archive) -> None:
    play = mailbox()
    account = archive.add(archive.serve(play))
    for _ in range(3):
        archive.sync(account)
    play.messages.append((b"a", message("a")))
    archive.sync(account)
    put_back(archive, account)
    play.messages.append((b"b", message("b")))
    # The number of the segment is taken, by a later token: another worker's, for all that this poll knows.
    assert (
        finish(tell_poll(archive.before(account), archive.claim(account), archive.ports())).outcome
        == "lease_lost"
    )
    archive.run_out(account)
    report = archive.sync(account)
    assert (report.outcome, report.counts.new, report.counts.known) == ("ok", 1, 1)
    assert len(archive.captures(account)) == 2
    assert len(archive.segments(account)) == 2
    assert archive.verify(account).clean


def test_a_database_that_was_restored_catches_up_without_new_mail(archive: Archive) -> None:
    play = mailbox()
    play.messages.append((b"a", message("a")))
    account = archive.add(archive.serve(play))
    archive.sync(account)
    put_back(archive, account)
    play.messages.clear()
    archive.sync(account)
    [finding] = archive.verify(account).named
    assert finding.key == segment_key(account.id, 1)
    assert "archiver db catch-up" in finding.detail

    assert archive.database.transact(leases.doubt_journals) >= 1
    assert archive.database.transact(leases.doubt_journals) == 0
    archive.sync(account)
    assert len(archive.captures(account)) == 1
    assert archive.verify(account).clean


# Heartbeats.


def test_a_heartbeat_extends_the_lease_and_its_absence_ends_the_poll(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox()))
    worker = archive.worker()
    held = worker.on_demand.claim(account)
    archive.run_out(account)
    archive.clock.advance(LEASE_SECONDS * 0.6)
    worker.leases.renew()
    assert seconds_left(archive, account) > LEASE_SECONDS / 2
    archive.clock.advance(LEASE_SECONDS * 0.6)
    held.check()
    archive.clock.advance(LEASE_SECONDS * 0.1)
    with pytest.raises(LeaseLost):
        held.check()


def test_a_heartbeat_tells_a_poll_that_another_has_its_account(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox()))
    worker = archive.worker()
    held = worker.on_demand.claim(account)
    archive.run_out(account)
    # In this very process: the old poll must not live on the new one's renewals.
    again = worker.on_demand.claim(account)
    worker.leases.renew()
    again.check()
    with pytest.raises(LeaseLost):
        held.check()


def test_a_lease_counts_from_when_it_was_asked_for(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox()))

    class Slow(Database):
        def transact(self, work: Callable[[sa.Connection], Any]) -> Any:
            result = super().transact(work)
            archive.clock.advance(LEASE_SECONDS)
            return result

    database = Slow(archive.database.engine.url.render_as_string(hide_password=False))
    held = archive.worker(archive.ports(database=database)).on_demand.claim(account)
    database.close()
    with pytest.raises(LeaseLost):
        held.check()


def test_a_heartbeat_after_the_release_changes_nothing(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox()))
    worker = archive.worker()
    held = worker.on_demand.claim(account)
    poll_claimed(worker, held)
    before = archive.lease(account)
    assert (
        archive.database.transact(
            lambda connection: leases.renew(connection, [held.claim], lease_seconds=LEASE_SECONDS)
        )
        == set()
    )
    assert archive.lease(account) == before


def test_an_account_claimed_again_before_its_thread_let_go_is_renewed(lone_archive: Archive) -> None:
    archive = lone_archive
    account = archive.add(archive.serve(mailbox("a")), interval_seconds=0.0)
    again: list[ActiveLease] = []
    claiming = threading.Event()

    class Eager(Database):
        """As soon as the account is released, the tick claims it again."""

        def transact(self, work: Callable[[sa.Connection], Any]) -> Any:
            result = super().transact(work)
            if not claiming.is_set() and archive.polls(account):
                claiming.set()
                again.extend(worker.changeovers.claim(1))
            return result

    database = Eager(archive.database.engine.url.render_as_string(hide_password=False))
    worker = archive.worker(archive.ports(database=database))
    (first,) = worker.changeovers.claim(1)
    poll_claimed(worker, first)
    assert [lease.claim.token for lease in again] == [2]
    archive.clock.advance(LEASE_SECONDS * 0.6)
    worker.leases.renew()
    archive.clock.advance(LEASE_SECONDS * 0.6)
    again[0].check()
    database.close()


def test_an_account_that_cannot_be_read_is_not_held_for_ever(lone_archive: Archive) -> None:
    archive = lone_archive
    account = archive.add(archive.serve(mailbox("a")))
    worker = archive.worker()
    (held,) = worker.changeovers.claim(1)
    archive.execute(sa.update(account_table).values(delete_policy="of a newer release"))
    assert worker.changeovers.begin([held]) == []
    archive.run_out(account)
    worker.leases.renew()
    assert [claim.token for claim in claim_due(archive)] == [2]


class Panic(BaseException):
    """Some libraries raise what is not even an Exception."""


def panics(_: Account) -> str:
    raise Panic


@pytest.mark.parametrize("wants_a_thread", [False, True])
def test_an_account_whose_poll_breaks_beyond_all_reason_is_not_held_for_ever(
    lone_archive: Archive, wants_a_thread: bool
) -> None:
    archive = lone_archive
    account = archive.add(archive.serve(mailbox("a")))
    worker = archive.worker(archive.ports(password=panics))
    claim = archive.claim(account, owner=worker.terms.owner).claim
    held = worker.leases.take(replace(claim, recover=wants_a_thread), archive.clock.monotonic())
    [ended] = worker.changeovers.begin([held])
    assert isinstance(ended.exception(20), Panic)
    assert len(worker.leases) == 0


def test_an_account_whose_poll_by_name_breaks_beyond_all_reason_is_not_held_for_ever(
    archive: Archive,
) -> None:
    account = archive.add(archive.serve(mailbox("a")))
    worker = archive.worker(archive.ports(password=panics))
    with pytest.raises(Panic):
        worker.poll_now([account], lambda _: Unwatched())
    assert len(worker.leases) == 0


# Changeovers.


def served(archive: Archive, *accounts_due: Account) -> dict[str, int]:
    """How often each was polled, once all were."""
    done = threading.Event()
    for _ in range(200):
        if all(archive.polls(account) for account in accounts_due) or done.wait(0.05):
            break
    return {account.name: len(archive.polls(account)) for account in accounts_due}


def test_the_end_of_a_poll_and_the_claim_for_its_place_are_one_transaction(lone_archive: Archive) -> None:
    archive = lone_archive
    server = archive.serve(mailbox("a"))
    chosen = [archive.add(server, url=f"pop3://user{n}@localhost:{server.port}") for n in range(3)]
    seen: list[tuple[int, int]] = []

    class Seen(Database):
        """Polls that have ended, and polls under way, after each transaction that changes them."""

        def transact(self, work: Callable[[sa.Connection], Any]) -> Any:
            result = super().transact(work)
            with archive.database.reading() as connection:
                ended = connection.execute(sa.select(sa.func.count()).select_from(poll_table)).scalar_one()
                owned = sa.select(sa.func.count()).where(lease_table.c.owner.is_not(None))
                state = ended, connection.execute(owned).scalar_one()
            if state not in seen:
                seen.append(state)
            return result

    database = Seen(archive.database.engine.url.render_as_string(hide_password=False))
    worker = archive.worker(archive.ports(database=database), workers=1)
    worker.changeovers.tick()
    assert set(served(archive, *chosen).values()) == {1}
    worker.changeovers.settle()
    assert seen == [(0, 1), (1, 1), (2, 1), (3, 0)]
    database.close()


def test_ends_do_not_wait_for_a_claim_that_stands_still(postgres_url: str, tmp_path: Path) -> None:
    with Archive(postgres_url, tmp_path) as archive:
        server = archive.serve(mailbox("a"))
        chosen = [archive.add(server, url=f"pop3://user{n}@localhost:{server.port}") for n in range(3)]
        first, second, third = chosen
        worker = archive.worker(workers=2)
        set_due(archive, third, None)
        leases = {lease.claim.account_id: lease for lease in worker.changeovers.claim(2)}
        set_due(archive, third, sa.func.now())
        worker.changeovers.tick()  # no worker is free
        worker.changeovers.settle()
        with archive.database.engine.begin() as another:
            assert claims.take_turn(another, may_wait=False)
            for account in (first, second):
                # The second ends when a claim has been waiting since the first one did.
                worker.changeovers.begin([leases[account.id]])
                assert served(archive, account) == {account.name: 1}
            assert archive.polls(third) == []
        assert served(archive, third) == {third.name: 1}


def test_a_claim_that_waited_for_its_turn_until_the_stop_takes_nothing(
    postgres_url: str, tmp_path: Path
) -> None:
    with Archive(postgres_url, tmp_path) as archive:
        account = archive.add(archive.serve(mailbox("a")))
        worker: Worker = archive.worker()
        with archive.database.engine.begin() as another:
            assert claims.take_turn(another, may_wait=False)
            worker.changeovers.tick()
            worker.changeovers.settle()
            assert is_claiming(worker)
            worker.stopping.set()
        done = threading.Event()
        for _ in range(200):
            if not is_claiming(worker) or done.wait(0.05):
                break
        assert not is_claiming(worker)
        assert archive.lease(account).owner is None


def is_claiming(worker: Worker) -> bool:
    return worker.changeovers.is_claiming


def set_due(archive: Archive, account: Account, due_at: Any) -> None:
    of_it = sa.update(lease_table).where(lease_table.c.account_id == account.id)
    archive.execute(of_it.values(due_at=due_at))


def test_an_end_that_cannot_be_written_takes_no_other_along(lone_archive: Archive) -> None:
    archive = lone_archive
    server = archive.serve(mailbox("a"))
    chosen = [archive.add(server, url=f"pop3://user{n}@localhost:{server.port}") for n in range(3)]
    worker = archive.worker()
    finished = [
        Finished(
            worker.polls.polling(worker.on_demand.claim(account), archive.before(account)),
            PollReport(account.name, "ok"),
        )
        for account in chosen
    ]
    what_no_column_takes: Any = object()
    mistaken = replace(finished[1].report, counts=Counts(quarantined=what_no_column_takes))
    worker.changeovers.change_over([finished[0], finished[1]._replace(report=mistaken), finished[2]], 0)
    assert [len(archive.polls(account)) for account in chosen] == [1, 0, 1]
    assert [archive.lease(account).owner for account in chosen] == [None, worker.terms.owner, None]
    assert len(worker.leases) == 0


def test_an_account_that_cannot_be_read_takes_no_other_along(lone_archive: Archive) -> None:
    archive = lone_archive
    server = archive.serve(mailbox("a"))
    chosen = [archive.add(server, url=f"pop3://user{n}@localhost:{server.port}") for n in range(3)]
    bad = sa.update(account_table).where(account_table.c.id == chosen[1].id)
    archive.execute(bad.values(delete_policy="of a newer release"))
    worker = archive.worker()
    assert len(worker.changeovers.change_over([], 3, may_wait=True)) == 2
    assert set(served(archive, chosen[0], chosen[2]).values()) == {1}
    assert archive.lease(chosen[1]).owner == worker.terms.owner
    worker.changeovers.settle()
    assert len(worker.leases) == 0


# Pauses.


def test_an_account_paused_during_its_poll_is_due_no_more(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox("a")))
    worker = archive.worker()
    held = worker.on_demand.claim(account)
    stop(archive, account, AccountState.PAUSED)
    worker.leases.renew()
    assert archive.lease(account).due_at is None
    assert poll_claimed(worker, held).outcome == "ok"
    lease = archive.lease(account)
    assert (lease.due_at, lease.owner) == (None, None)
    assert archive.fresh(account).state is AccountState.PAUSED


@pytest.mark.parametrize("state", [AccountState.PAUSED, AccountState.REMOVED])
def test_what_an_operator_said_during_a_poll_outlasts_its_bad_end(
    archive: Archive, state: AccountState
) -> None:
    def broken(_: Account) -> str:
        stop(archive, account, state)
        raise IntegrityError("something is wrong")

    account = archive.add(archive.serve(mailbox("a")))
    assert archive.sync(account, archive.ports(password=broken)).outcome == "integrity"
    assert archive.fresh(account).state is state


def test_an_account_resumed_during_its_poll_goes_on(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox("a")))
    stop(archive, account, AccountState.WAITING)
    worker = archive.worker()
    held = worker.on_demand.claim(account)
    archive.database.transact(lambda connection: schedule.resume(connection, account.id))
    assert archive.lease(account).due_at == archive.lease(account).expires_at
    poll_claimed(worker, held)
    assert archive.lease(account).due_at is not None
    assert archive.fresh(account).state is AccountState.ACTIVE


@pytest.mark.parametrize(("state", "goes_on"), [(AccountState.WAITING, True), (AccountState.PAUSED, False)])
def test_a_named_poll_that_works_disproves_trouble_but_not_a_decision(
    archive: Archive, state: AccountState, goes_on: bool
) -> None:
    account = archive.add(archive.serve(mailbox("a")))
    stop(archive, account, state)
    assert archive.sync(account).counts.new == 1
    assert (archive.fresh(account).state is AccountState.ACTIVE) is goes_on
    assert (archive.lease(account).due_at is not None) is goes_on


def test_a_paused_account_whose_named_poll_dies_stays_paused(lone_archive: Archive) -> None:
    archive = lone_archive
    account = archive.add(archive.serve(mailbox("a")))
    stop(archive, account, AccountState.WAITING)
    archive.poll_until_death(account, archive.mortal_ports(Fuse(3)))
    assert claim_due(archive) == []
    report = archive.sync(account)
    assert (report.outcome, report.counts.new) == ("ok", 1)


def test_three_refused_logins_are_waited_for_and_the_fourth_pauses(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox("a", password="another")))
    for refusals in (1, 2, 3):
        assert archive.sync(account).outcome == "operator_needed"
        lease = archive.lease(account)
        assert (lease.refusals, lease.failures) == (refusals, 0)
        assert lease.due_at is not None
    archive.sync(account)
    assert archive.lease(account).due_at is None
    assert "wrong password" in str(archive.fresh(account).state_reason)
    archive.database.transact(lambda connection: schedule.resume(connection, account.id))
    assert archive.lease(account).refusals == 0


# Answers that are lost.


def test_a_database_whose_answers_are_lost_counts_nothing_twice(archive: Archive) -> None:
    url = archive.database.engine.url.render_as_string(hide_password=False)
    database = ForgetfulDatabase(url)
    ports = archive.ports(database=database)
    play = eventful()
    account = archive.add(archive.serve(play), delete=DeletePolicy(0.0))
    assert archive.sync(account, ports).outcome == "ok"
    assert archive.sync(account, ports).outcome == "ok"
    assert [uidl for uidl, _ in play.messages] == [b"refused"]
    # Three deletions that a session asked for, and one message that could not be fetched.
    rows = archive.sightings(account)
    assert [row.delete_attempts if row.state == "captured" else row.attempts for row in rows] == [1] * 4
    assert Counter(event["event"] for event in archive.events(account)) == {"captured": 3, "quarantined": 1}
    assert archive.verify(account).clean

    refused = archive.add(archive.serve(mailbox("a", password="another")))
    assert archive.sync(refused, ports).outcome == "operator_needed"
    assert archive.lease(refused).refusals == 1

    dying = archive.add(archive.serve(mailbox("a", faults={"RETR 1": Send(b"?")})))
    assert archive.sync(dying, ports).outcome == "try_later"
    assert [row.attempts for row in archive.sightings(dying)] == [1]

    new = replace(account, id="0123456789abcdef", name="added twice", url="pop3://other@localhost")
    kept = database.transact(lambda connection: accounts.add(connection, new, archive.clock.now()))
    assert kept == new
    archive.execute(sa.text("DELETE FROM lease WHERE account_id = '0123456789abcdef'"))
    archive.execute(sa.text("DELETE FROM mailbox WHERE account_id = '0123456789abcdef'"))
    archive.execute(sa.text("DELETE FROM journal WHERE account_id = '0123456789abcdef'"))
    archive.execute(sa.delete(account_table).where(account_table.c.id == new.id))
    database.close()


def test_a_release_that_fails_is_left_to_the_end_of_the_lease(archive: Archive) -> None:
    class Away(Database):
        """It goes away when the poll is to be released."""

        def transact(self, work: Callable[[sa.Connection], Any]) -> Any:
            if archive.captures(account):
                raise TryLater("no database")
            return super().transact(work)

    account = archive.add(archive.serve(mailbox("a")))
    database = Away(archive.database.engine.url.render_as_string(hide_password=False))
    worker = archive.worker(archive.ports(database=database))
    (report,) = worker.poll_now([account], lambda _: Unwatched())
    database.close()
    assert report.outcome == "ok"
    assert archive.lease(account).owner == worker.terms.owner
    assert len(worker.leases) == 0
    archive.run_out(account)
    assert archive.sync(account).counts.known == 1


# The end of the process.


def test_ctrl_c_finishes_what_is_under_way_and_begins_nothing(small_archive: Archive) -> None:
    archive = small_archive
    first, second = archive.serve(mailbox("a", "b")), archive.serve(mailbox("c"))
    chosen = [archive.add(first), archive.add(second)]
    stopping = threading.Event()
    ports = archive.ports(stopping=stopping.is_set)
    worker = archive.worker(ports, workers=1, stopping=stopping)

    class Impatient(Unwatched):
        def listed(self, listed: int, to_fetch: int, octets: int | None) -> None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert stopping.wait(10)

    reports = worker.poll_now(chosen, lambda _: Impatient())
    assert [(report.outcome, report.to_come) for report in reports] == [("ok", 2)]
    assert second.connections == 0
    assert archive.lease(chosen[0]).owner is None


def test_a_service_that_is_told_to_stop_drains(small_archive: Archive) -> None:
    archive = small_archive
    drains, stop = threading.Event(), threading.Event()

    def say_goodbye(channel: Channel) -> None:
        assert drains.wait(20)
        channel.send(b"+OK\r\n")

    def look_again(seconds: float) -> None:
        drains.set()
        rest(seconds)

    account = archive.add(archive.serve(mailbox("a", faults={"QUIT": Talk(say_goodbye)})))
    worker = archive.worker(sleep=look_again)
    worker.changeovers.tick()
    worker.changeovers.settle()
    assert len(worker.leases) == 1
    stop.set()
    assert worker.serve(stop, drain_seconds=30.0)
    assert archive.lease(account).owner is None
    assert len(archive.polls(account)) == 1
    worker.changeovers.tick()
    worker.changeovers.settle()
    assert len(worker.leases) == 0


def test_ticks_that_meet_claim_once(lone_archive: Archive) -> None:
    archive = lone_archive
    server = archive.serve(mailbox("a"))
    added = [archive.add(server, url=f"pop3://user{n}@localhost:{server.port}") for n in range(6)]
    worker = archive.worker(workers=2)
    with ThreadPoolExecutor(4) as pool:
        wait([pool.submit(worker.changeovers.tick) for _ in range(8)])
        # Each poll that ends looks for more by itself.
        done = threading.Event()
        for _ in range(200):
            if all(archive.polls(account) for account in added) or done.wait(0.05):
                break
    assert [len(archive.polls(account)) for account in added] == [1] * 6


def test_a_process_whose_database_hangs_is_alive(small_archive: Archive) -> None:
    archive = small_archive
    asked, answer = threading.Event(), threading.Event()

    class Hanging(Database):
        def transact(self, work: Callable[[sa.Connection], Any]) -> Any:
            asked.set()
            answer.wait(20)
            raise TryLater("no answer")

    database = Hanging("sqlite:///nowhere/archiver.db")
    worker = archive.worker(archive.ports(database=database))
    worker.start_clock(claim=True)
    try:
        assert asked.wait(20)
        archive.clock.advance(61)
        assert not worker.alive
        beat = threading.Event()
        for _ in range(400):
            if worker.alive or beat.wait(0.05):
                break
        assert worker.alive
    finally:
        answer.set()
        worker.close()


def test_a_process_whose_sessions_stand_still_is_not_alive(small_archive: Archive) -> None:
    worker, gate = small_archive.worker(), threading.Event()
    worker.polls.loop.begin(gate.wait)
    small_archive.clock.advance(61)
    worker.jobs.run("loop")
    assert not worker.alive
    beat = threading.Event()
    worker.polls.loop.begin(beat.set)
    gate.set()
    assert beat.wait(20)
    assert worker.alive


def test_a_server_that_holds_up_all_sessions_loses_its_own(small_archive: Archive) -> None:
    worker, reads_on, ended = small_archive.worker(), threading.Event(), threading.Event()
    ours, theirs = socket.socketpair()

    def read_for_ever() -> None:
        until_ready(ours.fileno(), selectors.EVENT_READ, 20.0)
        ours.recv(1)
        reads_on.set()
        if not ours.recv(1):
            ended.set()

    with ours, theirs:
        worker.polls.loop.begin(read_for_ever)
        theirs.send(b"!")
        assert reads_on.wait(20)
        assert not ended.is_set()
        worker.polls.check_loop(hold_up_seconds=0.0)
        assert ended.wait(20)

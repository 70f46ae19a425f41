"""Changeovers: the ends of finished polls are written, and others begin in their places.

One transaction writes the ends, claims accounts that are due for the free
workers, and reads what their polls begin with (docs/decisions/0022). This module
owns when that happens, and what one transaction has in it. It promises that an
end which cannot be written affects no other, and that no claim is waited for
while leases are locked.

Threads: ``add``, ``freed``, ``tick``, ``settle`` and ``close`` may be called from
any thread. They leave a note in the ``Agenda``, whose one lock guards it. A
single thread, "changeover", works off the agenda. It lets a thread of polls
claim when another process is claiming at that moment.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from archiver import policy
from archiver.db import claims as claiming
from archiver.db import endings
from archiver.db.before import BeforePoll, before_polls
from archiver.db.endings import Ended, Ending
from archiver.errors import ArchiverError, LeaseLost
from archiver.model import Account, Claim, PollReport
from archiver.poll.ports import Ports
from archiver.timetable import Timetable
from archiver.worker.leases import ActiveLease, Leases, Terms
from archiver.worker.polling import Finished, Polls
from archiver.worker.report import Reporter

GATHER_SECONDS = 0.005
"""How long a finished poll waits for others. With three milliseconds, a poll costs a sixth more CPU; with
ten, there are fewer polls per second."""

ENDINGS_AT_ONCE = 100
"""Ends in one transaction, which has as many leases locked as long as it runs."""


class Work(NamedTuple):
    """What one changeover has to do."""

    finished: list[Finished]
    is_more: bool
    """Whether finished polls are left, for which the caller must have another changeover done."""
    serves: bool
    """Whether this process claims accounts as they fall due."""
    may_claim: bool
    """The same, unless a claim is waiting for its turn already."""


class Agenda:
    """What the next changeover has to do. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._finished: deque[Finished] = deque()
        self._is_wanted = False
        self._is_claiming = False
        self._serves = False

    def __len__(self) -> int:
        with self._lock:
            return len(self._finished)

    def add(self, finished: Finished) -> None:
        """Note that a poll has finished."""
        with self._lock:
            self._finished.append(finished)

    def serve(self) -> None:
        """Claim accounts as they fall due, from now on."""
        with self._lock:
            self._serves = True

    def want(self) -> bool:
        """Want a changeover. True if the caller must have it done: none is wanted yet that has not begun."""
        with self._lock:
            was_wanted, self._is_wanted = self._is_wanted, True
            return not was_wanted

    def begin(self) -> Work:
        """Take what this changeover does. A thread that notes something from now on wants another one."""
        with self._lock:
            count = min(len(self._finished), ENDINGS_AT_ONCE)
            finished = [self._finished.popleft() for _ in range(count)]
            self._is_wanted = is_more = bool(self._finished)
            return Work(finished, is_more, self._serves, self._serves and not self._is_claiming)

    def claim_begins(self) -> None:
        """Note that a thread waits for its turn to claim. Until it is done, no changeover claims."""
        with self._lock:
            self._is_claiming = True

    def claim_ended(self) -> None:
        """Note that this thread is done."""
        with self._lock:
            self._is_claiming = False

    @property
    def is_claiming(self) -> bool:
        """Whether a thread waits for its turn to claim, or claims."""
        with self._lock:
            return self._is_claiming


class Written(NamedTuple):
    """What one transaction did."""

    ended: list[Ended | Exception]
    """For each end what came of it, or why it could not be written."""
    claims: list[Claim] | None
    """The accounts that were claimed. None if it was another transaction's turn to claim."""
    before: Mapping[str, BeforePoll] | None
    """What the new polls begin with, by account. None if that could not be read."""


class Changeovers:
    """The changeovers of this process."""

    def __init__(
        self, ports: Ports, terms: Terms, leases: Leases, polls: Polls, stopping: threading.Event
    ) -> None:
        self._ports = ports
        self._terms = terms
        self._leases = leases
        self._polls = polls
        self._stopping = stopping
        self._report = Reporter()
        self._agenda = Agenda()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="changeover")
        self._made_at = ports.monotonic()

    # In any thread.

    def tick(self) -> None:
        """Let free workers poll accounts that are due, now, and from now on whenever a worker is free."""
        self._agenda.serve()
        self._want()

    def add(self, finished: Finished) -> None:
        """Have this poll's end written, and another poll begin in its place."""
        self._agenda.add(finished)
        self._want()

    def freed(self) -> None:
        """Have another poll begin in the place of an account that was not polled."""
        self._want()

    def settle(self) -> None:
        """Wait until the changeovers are done that are wanted at this moment."""
        self._thread.submit(int).result()

    def close(self) -> None:
        """Begin no other changeover. One that runs is not waited for."""
        self._thread.shutdown(wait=False)

    @property
    def is_claiming(self) -> bool:
        """Whether a thread waits for its turn to claim, or claims."""
        return self._agenda.is_claiming

    @property
    def polls_at_once(self) -> int:
        """How many polls may run at this moment: fewer than there are workers right after the start."""
        running_seconds = self._ports.monotonic() - self._made_at
        return policy.ramped_up(self._terms.workers, running_seconds, self._terms.ramp_seconds)

    def queue_at_hosts(self) -> None:
        """Queue the accounts that are due and find no session at their host."""
        try:
            self._ports.database.transact(
                lambda connection: claiming.queue_at_hosts(connection, sessions=self._terms.sessions)
            )
        except ArchiverError as error:
            self._report.not_claimed(error)

    def _want(self) -> None:
        if self._agenda.want():
            self._thread.submit(self._run)

    # In the thread of changeovers.

    def _run(self) -> None:
        """Do one changeover. A finished poll waits some moments for others: together they cost less."""
        if 0 < len(self._agenda) < len(self._leases):
            self._stopping.wait(GATHER_SECONDS)
        work = self._agenda.begin()
        if work.is_more:
            self._thread.submit(self._run)
        stops = self._stopping.is_set()
        free = 0
        if work.may_claim and not stops:
            free = max(0, self.polls_at_once + len(work.finished) - len(self._leases))
        with self._polls.abandoning([each.polling for each in work.finished]):
            self.change_over(work.finished, free)
        if work.serves and not stops:
            try:
                self._leases.look_who_waits(free)
            except Exception as error:  # noqa: BLE001 - an executor keeps its errors to itself
                self._report.not_claimed(error)

    # In the same thread. A thread of polls claims in its turn, and has no finished polls.

    def change_over(
        self, finished: Sequence[Finished], free: int, *, may_wait: bool = False
    ) -> list[Future[PollReport]]:
        """Write how these polls ended, begin others for up to ``free`` workers, and report the former.

        Returns how the new polls will have ended. If another process is claiming,
        and this thread may not wait for it, a thread of polls waits and claims.
        """
        kept = [each for each in finished if each.report.outcome != "lease_lost"]
        asked_at = self._ports.monotonic()
        try:
            written = self._write(finished, kept, free, may_wait=may_wait)
        except Exception as error:  # noqa: BLE001 - reported for each account
            if kept and len(finished) + free > 1 and not isinstance(error, ArchiverError):
                self._write_singly(finished)
                return []
            written = Written([error for _ in kept], [], None)
            if not kept:
                self._report.not_claimed(error)
        for each in finished:
            self._leases.drop(each.polling.lease)
        leases = [self._leases.take(claim, asked_at) for claim in written.claims or ()]
        begun = self.begin(leases, written.before)
        if written.claims is None:
            self._agenda.claim_begins()
            self._polls.pool.submit(self._claim_in_turn, free)
        ended = dict(zip((each.claim for each in kept), written.ended, strict=True))
        for each in finished:
            report = self._as_written(each, ended.get(each.claim))
            self._report.poll_ended(report, each.claim)
            each.polling.ended.set_result(report)
        return begun

    def claim(self, most: int) -> list[ActiveLease]:
        """Claim up to this many accounts that are due, in turn, and begin no poll."""
        asked_at = self._ports.monotonic()
        claims = self._write([], [], most, may_wait=True).claims or ()
        return [self._leases.take(claim, asked_at) for claim in claims]

    def begin(
        self, leases: Sequence[ActiveLease], before: Mapping[str, BeforePoll] | None = None
    ) -> list[Future[PollReport]]:
        """Begin to poll accounts that are claimed. Returns how each poll will have ended."""
        return self._polls.begin(leases, before, self)

    def _write_singly(self, finished: Sequence[Finished]) -> None:
        """Write each end in a transaction of its own: a bug in one must not affect the others."""
        for each in finished:
            with self._polls.abandoning([each.polling]):
                self.change_over([each], 0)

    def _claim_in_turn(self, free: int) -> None:
        try:
            self.change_over([], free, may_wait=True)
        finally:
            self._agenda.claim_ended()
            self._want()

    def _write(
        self, finished: Sequence[Finished], kept: Sequence[Finished], free: int, *, may_wait: bool
    ) -> Written:
        """Write the ends of the ``kept`` polls, and claim accounts for the workers that are free then."""
        ends = [self._ending(each) for each in kept]
        failing_limit = self._leases.room_for_failing({each.claim for each in finished})

        def work(connection: Connection) -> Written:
            ended: list[Ended | Exception] = []
            if ends:
                ended += endings.write(connection, ends, uniform=self._ports.uniform)
            if free <= 0:
                return Written(ended, [], None)
            if not claiming.take_turn(connection, may_wait=may_wait):
                return Written(ended, None, None)
            if self._stopping.is_set():  # since it began to wait for its turn
                return Written(ended, [], None)
            claims = claiming.claim_due(
                connection,
                owner=self._terms.owner,
                lease_seconds=self._terms.lease_seconds,
                limit=free,
                failing_limit=failing_limit,
                sessions=self._terms.sessions,
                in_turn=True,
            )
            return Written(ended, claims, _read_before(connection, claims))

        return self._ports.database.transact(work) if ends or free > 0 else Written([], [], None)

    def _ending(self, finished: Finished) -> Ending:
        polling, report = finished
        now = self._ports.now()
        return Ending(
            polling.lease.claim,
            report,
            now,
            _timetable(polling.account),
            avoids=policy.remembered(polling.account.avoids, report, now),
            ends_wait=polling.in_person and report.outcome == "ok",
        )

    def _as_written(self, finished: Finished, ended: Ended | Exception | None) -> PollReport:
        """The report of a poll, which is another one if another worker had its lease by then."""
        account, report = finished.polling.account.name, finished.report
        if ended is None:
            return report
        if isinstance(ended, Exception):
            # The lease expires by itself, and its next holder looks at the journal.
            self._report.not_released(account, ended)
            return report
        if ended.lease_lost:
            lost = LeaseLost(f"account {account} is polled by another worker now")
            return replace(report, outcome=lost.outcome, error=str(lost))
        self._report.host(finished.claim.host, ended.host)
        return report


def _read_before(connection: Connection, claims: Sequence[Claim]) -> Mapping[str, BeforePoll] | None:
    try:
        return before_polls(connection, [claim.account_id for claim in claims])
    except SQLAlchemyError:
        raise
    except Exception:  # noqa: BLE001 - after the commit each row is read by itself, and the bad one reported
        return None


def _timetable(account: Account) -> Timetable:
    """The account's timetable; its interval alone if its settings are wrong here. Its poll reports that."""
    try:
        return Timetable.of(account)
    except ValueError:
        return Timetable(account.interval_seconds)

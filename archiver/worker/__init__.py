"""Claims accounts that are due, polls them, and gives them back.

Polls wait for their servers together in one thread, and where there is more to
do than that, each goes on in a thread of its own. Their ends are written by one
thread, which has others begin in their places. The module owns leases while they
are held, the threads, and the end of the process. It promises that an account is
polled by one thread at a time; that a poll whose lease could not be renewed stops
by itself before another may begin; and that whatever happens in one poll ends
that poll only. APScheduler is the clock. What a poll does is ``archiver.poll``'s; when
an account is due again is decided in ``policy.py``.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple

from apscheduler.schedulers.background import BackgroundScheduler
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from archiver import observe, policy, process
from archiver.db import Database, endings, history, hosts, leases
from archiver.db import claims as claiming
from archiver.db.before import BeforePoll, before_poll, before_polls
from archiver.db.endings import Ended, Ending
from archiver.db.hosts import DEFAULT_SESSIONS, HostSessions
from archiver.errors import ArchiverError, LeaseLost, OperatorNeeded, TryLater
from archiver.model import Account, Claim, PollReport, mail_host
from archiver.poll import NEEDS_THREAD, Story, begin, finish, poll
from archiver.poll.ports import Ports, Watch
from archiver.pop3 import Loop
from archiver.timetable import Timetable
from archiver.views.poll import counts_json

TICK_SECONDS = 1.0
LINE_UP_SECONDS = 2.0
GIVE_BACK_SECONDS = 60.0
GATHER_SECONDS = 0.005
"""How long an end waits for others. Three milliseconds cost a sixth more of CPU, ten cost polls a second."""
HOLD_UP_SECONDS = 5.0
"""A session that computes for so long, while all others wait for it, is one with a server that means harm."""
ENDINGS_AT_ONCE = 100
"""In one transaction: it holds as many leases locked, for as long as it takes."""
TIDY_SECONDS = 3600.0
STILL_SECONDS = 60.0
"""A clock that stands still for so long will not go on by itself."""


class ActiveLease:
    """A lease in this process's hands, judged by the monotonic clock, which nobody sets back."""

    def __init__(
        self, claim: Claim, lease_seconds: float, monotonic: Callable[[], float], asked_at: float
    ) -> None:
        self.claim = claim
        self.began_at = asked_at
        self.makes_room = False
        self._lease_seconds = lease_seconds
        self._monotonic = monotonic
        self._renewed_at = asked_at
        self._lost = False

    def renewed(self, asked_at: float) -> None:
        """The database extended it, at the earliest when it was asked."""
        self._renewed_at = asked_at

    def lost(self) -> None:
        """The database gave it to another."""
        self._lost = True

    def check(self) -> None:
        """Raises LeaseLost once two thirds have gone by unrenewed: the rest is for what is under way."""
        if self._lost or self._monotonic() - self._renewed_at > self._lease_seconds * 2 / 3:
            raise LeaseLost(f"the lease of account {self.claim.account_id} could not be renewed in time")


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits while all are busy: accounts for a thread, and at hosts those in line."""

    accounts: int = 0
    hosts: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Polling:
    """A poll under way.

    ``ended`` is done when its end was written, and its place given to whoever
    waits; it is the report as it was told.
    """

    before: BeforePoll
    lease: ActiveLease
    story: Story
    in_person: bool = False
    ended: Future[PollReport] = field(default_factory=Future)

    @property
    def account(self) -> Account:
        """The account as it was when it had been claimed."""
        return self.before.account


class Over(NamedTuple):
    """A poll whose story is told, and whose end is not yet written."""

    polling: Polling
    report: PollReport


class Changeover(NamedTuple):
    """What one transaction did: ends were written, or failed, and accounts claimed in their places.

    ``claims`` is None where none were made, since another transaction was
    making some. ``before`` is what the polls begin with, by account, or None
    where that could not be read.
    """

    ended: list[Ended | Exception]
    claims: list[Claim] | None
    before: Mapping[str, BeforePoll] | None


@dataclass(frozen=True, slots=True)
class Chance:
    """Time and randomness, as arguments."""

    uniform: Callable[[float, float], float]
    sleep: Callable[[float], None] = time.sleep


class Worker:
    """One process's share of the work. Start its clock, then let it ``serve`` or ``poll_now``."""

    def __init__(
        self,
        ports: Ports,
        *,
        lease_seconds: float,
        workers: int,
        chance: Chance,
        stopping: threading.Event,
        owner: str | None = None,
        history_days: int = 30,
        sessions: HostSessions = DEFAULT_SESSIONS,
        ramp_seconds: float = 0.0,
    ) -> None:
        self.ports = ports
        self.database: Database = ports.database
        self.owner = owner or process.name_owner()
        self.lease_seconds = lease_seconds
        self.workers = workers
        self.history_days = history_days
        self.sessions = sessions
        self.ramp_seconds = ramp_seconds
        self.chance = chance
        self.stopping = stopping
        self.log = observe.get_logger()
        self._held: dict[Claim, ActiveLease] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="poll")
        # A poll is in the loop or in a thread, and has one thing done aside at most: it never waits for one.
        self._loop = Loop(self._pool)
        self._over: deque[Over] = deque()
        self._is_wanted = self._is_claiming = self._serves = False
        self._changeovers = ThreadPoolExecutor(1, thread_name_prefix="changeover")
        self._clock = BackgroundScheduler(timezone="UTC")
        self._beat_at = self._made_at = ports.monotonic()
        self._waiting = Waiting()

    # The clock

    def start_clock(self, *, claim: bool) -> None:
        """Renew leases from now on, and, with ``claim``, take accounts as they fall due."""
        every = {"trigger": "interval", "max_instances": 1, "coalesce": True}
        self._clock.add_job(self._see_to_loop, seconds=TICK_SECONDS, **every)
        self._clock.add_job(self._heartbeat, seconds=self.lease_seconds / 4, **every)
        if claim:
            self._clock.add_job(self._tick, seconds=TICK_SECONDS, **every)
            self._clock.add_job(self._line_up, seconds=LINE_UP_SECONDS, **every)
            self._clock.add_job(process.give_back_memory, seconds=GIVE_BACK_SECONDS, **every)
            self._clock.add_job(
                self._tidy,
                seconds=TIDY_SECONDS,
                jitter=TIDY_SECONDS / 10,
                # Processes that were started together do not all try at once.
                next_run_time=self.ports.now()
                + timedelta(seconds=self.chance.uniform(TICK_SECONDS, TIDY_SECONDS / 10)),
                **every,
            )
        self._clock.start()

    def close(self) -> None:
        """Stop the clock and the threads. What still runs is left to the lease's end."""
        if self._clock.running:
            self._clock.shutdown(wait=False)
        self._loop.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._changeovers.shutdown(wait=False)

    @property
    def alive(self) -> bool:
        """Whether clock and loop still go on, whatever the database does: for a liveness probe."""
        return self.ports.monotonic() - self._beat_at < STILL_SECONDS

    def _see_to_loop(self) -> None:
        if self._loop.cut_short(HOLD_UP_SECONDS):
            self.log.warning("session.cut_short", seconds=HOLD_UP_SECONDS)
        self._loop.begin(self._beat)

    def _beat(self) -> None:
        self._beat_at = self.ports.monotonic()

    def _heartbeat(self) -> None:
        held = dict(self._held)
        if not held:
            return
        asked_at = self.ports.monotonic()
        try:
            kept = self.database.transact(
                lambda connection: leases.renew(connection, held, lease_seconds=self.lease_seconds)
            )
        except ArchiverError as error:
            observe.HEARTBEATS_FAILED.inc()
            self.log.warning("lease.renewal_failed", leases=len(held), error=str(error))
            return
        for claim, lease in held.items():
            if claim in kept:
                lease.renewed(asked_at)
            else:
                lease.lost()

    def _tidy(self) -> None:
        """Add polls to their days, and remove old ones: one process at a time, whoever comes first."""
        try:
            done = history.tidy(
                self.database,
                now=self.ports.now(),
                keep_days=self.history_days,
                stopping=self.stopping.is_set,
            )
        except ArchiverError as error:
            self.log.warning("history.not_tidied", error=str(error))
        else:
            self.log.info("history.tidied", counted=done.counted, removed=done.removed, whole=done.whole)

    def _tick(self) -> None:
        """Have free places given to accounts that are due, from now on whenever there are some."""
        self._serves = True
        self._want_changeover()

    def _may_poll(self) -> int:
        running_seconds = self.ports.monotonic() - self._made_at
        return policy.ramped_up(self.workers, running_seconds, self.ramp_seconds)

    def _may_fail(self, over: Sequence[Over]) -> int:
        """How many more accounts whose last poll failed may be taken, once these polls are over."""
        ended = {each.polling.lease.claim for each in over}
        failing = sum(claim.failing for claim in tuple(self._held) if claim not in ended)
        return max(0, policy.threads_for_failing(self.workers) - failing)

    def _begin(
        self, leases: list[ActiveLease], before: Mapping[str, BeforePoll] | None = None
    ) -> list[Future[PollReport]]:
        """Have each of these polls begin; what they begin with is read here, if it was not."""
        if not leases:
            return []
        ids = [lease.claim.account_id for lease in leases]
        try:
            if before is None:
                with self.database.reading() as connection:
                    before = before_polls(connection, ids)
            pollings = [self._polling(lease, before[lease.claim.account_id]) for lease in leases]
        except Exception:
            if len(leases) > 1:
                # One that cannot be read must not take the others along.
                return [future for lease in leases for future in self._begin([lease])]
            # The lease runs out by itself. Held on to, it would be renewed for ever.
            self._let_go(leases[0])
            self.log.exception("poll.not_started", account=ids[0])
            return []
        for polling in pollings:
            with self._abandoned([polling]):
                self._begin_one(polling)
        return [polling.ended for polling in pollings]

    def _polling(self, lease: ActiveLease, before: BeforePoll, watch: Watch | None = None) -> Polling:
        return Polling(before, lease, self._story(before, lease, watch), in_person=watch is not None)

    def _begin_one(self, polling: Polling) -> None:
        blackout_ends_at = _blackout_ends(polling.account, self.ports.now())
        if blackout_ends_at is None:
            self._loop.begin(partial(self._poll_due, polling))
        else:
            self._pool.submit(self._put_off, polling, blackout_ends_at)

    @contextmanager
    def _abandoned(self, pollings: list[Polling]) -> Iterator[None]:
        """What goes wrong here, which nothing should, is logged, and whoever waits for these is told."""
        try:
            yield
        except BaseException as error:  # there are libraries whose panics are no Exception
            for polling in pollings:
                # The lease runs out by itself. Held on to, it would be renewed for ever.
                self._let_go(polling.lease)
                if not polling.ended.done():
                    self.log.exception("poll.abandoned", account=polling.account.name)
                    polling.ended.set_exception(error)

    def _line_up(self) -> None:
        try:
            self.database.transact(
                lambda connection: claiming.queue_at_hosts(connection, sessions=self.sessions)
            )
        except ArchiverError as error:
            self._tell_of_no_claim(error)

    def _tell_of_no_claim(self, error: Exception) -> None:
        mistake = None if isinstance(error, ArchiverError) else error
        self.log.warning("claim.failed", error=str(error), exc_info=mistake)

    def _look_who_waits(self, free: int) -> Waiting:
        """Asked only when a poll has gone on for so long that it could make room for whoever waits."""
        ending_before = self.ports.monotonic() - self.ports.budget.slice_seconds
        long_ones = [lease for lease in tuple(self._held.values()) if lease.began_at <= ending_before]
        if not long_ones:
            return Waiting()
        hosts = {lease.claim.host for lease in long_ones}
        failing_limit = self._may_fail(())
        with self.database.reading() as connection:
            lined = claiming.hosts_with_queues(connection, hosts)
            due = 0
            if free <= 0:
                due = claiming.count_due(
                    connection, limit=self.workers, failing_limit=failing_limit, sessions=self.sessions
                )
        return Waiting(due, frozenset(lined))

    def _make_room(self, lease: ActiveLease) -> bool:
        """Whether this poll, which has gone on for long, is to end now: one for each account that waits."""
        waiting, others = self._waiting, [other for other in tuple(self._held.values()) if other.makes_room]
        at_host = sum(other.claim.host == lease.claim.host for other in others)
        lease.makes_room = lease.makes_room or (
            len(others) < waiting.accounts or (lease.claim.host in waiting.hosts and not at_host)
        )
        return lease.makes_room

    def _hold(self, claim: Claim, asked_at: float) -> ActiveLease:
        # By claim, not by account: one that was released a moment ago may be
        # due and claimed again before its last thread has let it go.
        lease = ActiveLease(claim, self.lease_seconds, self.ports.monotonic, asked_at)
        self._held[claim] = lease
        observe.POLLS_RUNNING.set(len(self._held))
        return lease

    def _let_go(self, lease: ActiveLease) -> None:
        self._held.pop(lease.claim, None)
        observe.POLLS_RUNNING.set(len(self._held))

    # The service

    def serve(self, stop: threading.Event, drain_seconds: float) -> bool:
        """Poll what is due until ``stop`` is set, then drain; true if all polls ended in time.

        To drain is to claim nothing more and let each poll finish the messages
        it has asked for, record them, and QUIT.
        """
        self.log.info("service.started", owner=self.owner, workers=self.workers)
        self.start_clock(claim=True)
        stop.wait()
        self.stopping.set()
        self.log.info("service.draining", polls=len(self._held), seconds=drain_seconds)
        ends_at = self.ports.monotonic() + drain_seconds
        while self._held and self.ports.monotonic() < ends_at:
            self.chance.sleep(0.05)
        left = len(self._held)
        self.log.info("service.stopped", unfinished=left)
        return left == 0

    def _poll_due(self, polling: Polling) -> None:
        """Poll, as far as that is to wait for the server, together with others; what is left has a thread."""
        with self._abandoned([polling]):
            report = begin(polling.story)
            if report is NEEDS_THREAD:
                self._pool.submit(self._poll_on, polling)
            else:
                self._is_over(Over(polling, report))

    def _poll_on(self, polling: Polling) -> None:
        with self._abandoned([polling]):
            self._is_over(Over(polling, finish(polling.story)))

    def _is_over(self, over: Over) -> None:
        self._over.append(over)
        self._want_changeover()

    def _want_changeover(self) -> None:
        """Have one done, unless one is wanted already that has not begun."""
        if not self._is_wanted:
            self._is_wanted = True
            self._changeovers.submit(self._change_over)

    def _change_over(self) -> None:
        """Give the places of polls that are over, and those that are free, to accounts that are due.

        An end is written with those that follow within moments: together they cost far less.
        """
        if 0 < len(self._over) < len(self._held):
            self.stopping.wait(GATHER_SECONDS)
        self._is_wanted = False  # whoever comes from here on wants another one
        over = [self._over.popleft() for _ in range(min(len(self._over), ENDINGS_AT_ONCE))]
        if self._over:
            self._want_changeover()
        serves = self._serves and not self.stopping.is_set()
        may_claim = serves and not self._is_claiming
        free = max(0, self._may_poll() + len(over) - len(self._held)) if may_claim else 0
        with self._abandoned([each.polling for each in over]):
            self._end_and_begin(over, free)
        if serves:
            try:
                self._waiting = self._look_who_waits(free)
            except Exception as error:  # noqa: BLE001 - nobody else would tell of it
                self._tell_of_no_claim(error)

    def _claim_in_turn(self, free: int) -> None:
        try:
            self._end_and_begin([], free, may_wait=True)
        finally:
            self._is_claiming = False
            self._want_changeover()

    def _end_and_begin(
        self, over: list[Over], free: int, *, may_wait: bool = False
    ) -> list[Future[PollReport]]:
        """Write how these polls ended, begin others in up to ``free`` places, and tell of those that ended.

        Returns how those that begin will have ended. Where others are claiming,
        and this thread may not wait for them, another one does.
        """
        kept = [each for each in over if each.report.outcome != "lease_lost"]
        asked_at = self.ports.monotonic()
        try:
            ends, failing_limit = [self._ending(each) for each in kept], self._may_fail(over)
            done = self._transact(ends, free, failing_limit, may_wait=may_wait)
        except Exception as error:  # noqa: BLE001 - each account's is told
            if kept and len(over) + free > 1 and not isinstance(error, ArchiverError):
                # A mistake of ours in one of them must not take the others along.
                for each in over:
                    with self._abandoned([each.polling]):
                        self._end_and_begin([each], 0)
                return []
            done = Changeover([error for _ in kept], [], None)
            if not kept:
                self._tell_of_no_claim(error)
        for each in over:
            self._let_go(each.polling.lease)
        begun = self._begin([self._hold(claim, asked_at) for claim in done.claims or ()], done.before)
        if done.claims is None:
            self._is_claiming = True
            self._pool.submit(self._claim_in_turn, free)
        ended = {each.polling.lease.claim: of_it for each, of_it in zip(kept, done.ended, strict=True)}
        for each in over:
            report = self._as_written(each, ended.get(each.polling.lease.claim))
            self._tell(report, each.polling.lease)
            each.polling.ended.set_result(report)
        return begun

    def _transact(self, ends: list[Ending], free: int, failing_limit: int, *, may_wait: bool) -> Changeover:
        """Write these ends and claim accounts for so many places, of them so many that failed last time."""

        def work(connection: Connection) -> Changeover:
            ended: list[Ended | Exception] = []
            if ends:
                ended += endings.write(connection, ends, uniform=self.chance.uniform)
            if free <= 0:
                return Changeover(ended, [], None)
            if not claiming.take_turn(connection, may_wait=may_wait):
                return Changeover(ended, None, None)
            if self.stopping.is_set():  # while this waited for its turn
                return Changeover(ended, [], None)
            claims = claiming.claim_due(
                connection,
                owner=self.owner,
                lease_seconds=self.lease_seconds,
                limit=free,
                failing_limit=failing_limit,
                sessions=self.sessions,
                in_turn=True,
            )
            return Changeover(ended, claims, _read_before(connection, claims))

        return self.database.transact(work) if ends or free > 0 else Changeover([], [], None)

    def _put_off(self, polling: Polling, until: datetime) -> None:
        """Give an account back that fell due in its blackout: it was asked for, or its worker died."""
        claim, after_seconds = polling.lease.claim, (until - self.ports.now()).total_seconds()
        with self._abandoned([polling]):
            try:
                self.database.transact(lambda connection: leases.put_off(connection, claim, after_seconds))
            except LeaseLost:
                self.log.info("lease.lost", account=polling.account.name)
            except ArchiverError as error:
                # The lease runs out by itself. Held on to, it would be renewed for ever.
                self.log.warning("lease.not_released", account=polling.account.name, error=str(error))
            finally:
                self._let_go(polling.lease)
            self._want_changeover()
            polling.ended.set_result(PollReport(polling.account.name, "ok", held_back="blackout"))

    # The command

    def poll_now(self, chosen: list[Account], watch: Callable[[Account], Watch]) -> list[PollReport]:
        """Poll these accounts at once, whatever their schedule says, until each mailbox is worked off."""
        futures = [self._pool.submit(self._poll_to_the_end, account, watch(account)) for account in chosen]
        try:
            wait(futures)
        except KeyboardInterrupt:
            self.stopping.set()
            wait([future for future in futures if not future.cancel()])
        return [future.result() for future in futures if not future.cancelled()]

    def _poll_to_the_end(self, account: Account, watch: Watch) -> PollReport:
        total: PollReport | None = None
        while True:
            report = self._poll_by_name(account, watch)
            total = report if total is None else _sum(total, report)
            more = (
                report.outcome == "ok" and report.to_come and report.counts.new and report.held_back != "day"
            )
            if not more or self.stopping.is_set() or policy.is_too_early(report):
                return total

    def _poll_by_name(self, account: Account, watch: Watch) -> PollReport:
        try:
            lease = self._wait_for(account)
        except ArchiverError as error:
            return PollReport(account.name, error.outcome, error=str(error), hint=error.hint)
        return self._poll_held(account, lease, watch)

    def _poll_held(self, account: Account, lease: ActiveLease, watch: Watch | None) -> PollReport:
        """Poll in this thread, to the end; in person, if somebody watches."""
        try:
            with self.database.reading() as connection:
                before = before_poll(connection, account.id)
        except Exception as error:
            # The lease runs out by itself. Held on to, it would be renewed for ever.
            self._let_go(lease)
            if isinstance(error, ArchiverError):
                return PollReport(account.name, error.outcome, error=str(error), hint=error.hint)
            self.log.exception("poll.not_started", account=account.id)
            return PollReport(account.name, "try_later", error=f"internal error: {error!r}")
        polling = self._polling(lease, before, watch)
        self._is_over(Over(polling, finish(polling.story)))
        return polling.ended.result()

    def _wait_for(self, account: Account) -> ActiveLease:
        ends_at, left_behind = self._give_up_at(), None
        while True:
            asked_at = self.ports.monotonic()
            claim = self.database.transact(
                partial(
                    claiming.claim_account,
                    account_id=account.id,
                    owner=self.owner,
                    lease_seconds=self.lease_seconds,
                    take_over=left_behind,
                    sessions=self.sessions,
                )
            )
            if claim is not None:
                return self._hold(claim, asked_at)
            with self.database.reading() as connection:
                holder = leases.holder(connection, account.id)
            tried, left_behind = left_behind, holder if self._is_left_behind(holder, account.id) else None
            if left_behind != tried:
                continue
            if holder is None and self._is_at(mail_host(account.url)):
                # The host's sessions are our own: they end, however long they take.
                ends_at = self._give_up_at()
            if self.ports.monotonic() > ends_at or self.stopping.is_set():
                raise self._why_not(account, holder)
            self.chance.sleep(0.2)

    def _give_up_at(self) -> float:
        return self.ports.monotonic() + self.lease_seconds + TICK_SECONDS

    def _is_at(self, host: str) -> bool:
        return any(claim.host == host for claim in tuple(self._held))

    def _why_not(self, account: Account, holder: str | None) -> TryLater:
        if holder is not None:
            return TryLater(
                f"{account.name} is being polled by {holder}",
                hint="it goes on there; look at: archiver status",
            )
        host = mail_host(account.url)
        return TryLater(
            f"{account.name}: {host} has as many sessions as it may have at once, {self.sessions.of(host)}",
            hint="try later, or raise ARCHIVER_HOST_SESSIONS if its operator does not mind",
        )

    def _is_left_behind(self, holder: str | None, account_id: str) -> bool:
        """Whether nobody polls under this lease: its process died, or our own claim's answer was lost."""
        if holder == self.owner:
            return all(claim.account_id != account_id for claim in tuple(self._held))
        return holder is not None and process.is_dead(holder)

    # A poll, for both

    def _story(self, before: BeforePoll, lease: ActiveLease, watch: Watch | None = None) -> Story:
        """The poll's story, which ends in a report whatever goes wrong. Whoever watches asks in person."""
        account = before.account
        try:
            ports = self._ports_for(account, lease, in_person=watch is not None)
            return (yield from poll(before, lease, ports, watch, may_glance=watch is None))
        except OperatorNeeded as error:
            return PollReport(account.name, error.outcome, error=str(error), hint=error.hint)
        except Exception as error:
            # A mistake of ours must not end the thread with the lease in its
            # hand, nor any other account's poll.
            self.log.exception("poll.crashed", account=account.name)
            return PollReport(
                account.name, "try_later", error=f"internal error: {error!r}", journal_uncertain=True
            )

    def _as_written(self, over: Over, ended: Ended | Exception | None) -> PollReport:
        """The report, which is another one where the lease was another's by then."""
        account, claim = over.polling.account, over.polling.lease.claim
        if ended is None:
            return over.report
        if isinstance(ended, Exception):
            # The lease runs out by itself, and its next holder looks at the journal.
            if isinstance(ended, ArchiverError):
                self.log.warning("lease.not_released", account=account.name, error=str(ended))
            else:
                self.log.error("lease.not_released", account=account.name, exc_info=ended)
            return over.report
        lease_lost, host = ended
        if lease_lost:
            lost = LeaseLost(f"account {account.name} is polled by another worker now")
            return replace(over.report, outcome=lost.outcome, error=str(lost))
        if isinstance(host, hosts.Trouble):
            self.log.warning(
                "host.backing_off",
                host=host.host,
                failures=host.failures,
                failing_since=host.failing_since,
                retry_at=host.retry_at,
                error=host.error,
            )
        elif host:
            self.log.info("host.reached", host=claim.host)
        return over.report

    def _ending(self, over: Over) -> Ending:
        polling, report = over
        account, lease, in_person = polling.account, polling.lease, polling.in_person
        now = self.ports.now()
        return Ending(
            lease.claim,
            report,
            now,
            _timetable(account, fall_back=True),
            avoids=policy.remembered(account.avoids, report, now),
            ends_wait=in_person and report.outcome == "ok",
        )

    def _ports_for(self, account: Account, lease: ActiveLease, *, in_person: bool) -> Ports:
        """What this one poll works with. Whoever asks in person has the poll, blackout or not, to its end."""
        timetable = _timetable(account)
        if in_person:
            return self.ports
        ends_at = timetable.blackout_begins(self.ports.now())
        budget = replace(self.ports.budget, ends_at=ends_at)
        return replace(self.ports, budget=budget, make_room=partial(self._make_room, lease))

    def _tell(self, report: PollReport, lease: ActiveLease) -> None:
        observe.POLLS.labels(report.outcome).inc()
        observe.POLL_SECONDS.observe(report.seconds)
        observe.CAPTURED.inc(report.counts.new)
        observe.CAPTURED_BYTES.inc(report.counts.fetched_bytes)
        observe.DELETE_REQUESTED.inc(report.counts.delete_requested)
        observe.LOST.inc(report.counts.lost)
        say = self.log.info if report.outcome == "ok" and not report.warnings else self.log.warning
        if report.outcome == "integrity":
            say = self.log.error
        say(
            "poll.ended",
            account=report.account,
            account_id=lease.claim.account_id,
            token=lease.claim.token,
            outcome=report.outcome,
            listed=report.listed,
            **counts_json(report.counts, report.to_come),
            glanced=report.glanced,
            bytes=report.counts.fetched_bytes,
            segments=report.segments,
            seconds=round(report.seconds, 3),
            implementation=report.implementation,
            warnings=list(report.warnings),
            error=report.error,
            hint=report.hint,
        )


def _blackout_ends(account: Account, now: datetime) -> datetime | None:
    try:
        return Timetable.of(account).blackout_ends(now)
    except ValueError:
        return None  # the poll says what is wrong with it


def _read_before(connection: Connection, claims: Sequence[Claim]) -> Mapping[str, BeforePoll] | None:
    try:
        return before_polls(connection, [claim.account_id for claim in claims])
    except SQLAlchemyError:
        raise
    except Exception:  # noqa: BLE001 - whose row cannot be read is found out one by one, after the commit
        return None


def _timetable(account: Account, *, fall_back: bool = False) -> Timetable:
    """Raises OperatorNeeded for settings that make no sense here; or falls back on the interval alone."""
    try:
        return Timetable.of(account)
    except ValueError as error:
        if fall_back:
            return Timetable(account.interval_seconds)
        raise OperatorNeeded(
            f"{account.name}: {error}", hint=f"mend it: archiver account edit {account.name}"
        ) from None


def _sum(first: PollReport, second: PollReport) -> PollReport:
    """Two polls of one mailbox, as if they had been one."""
    # Of the listing, what the second poll knew or found in quarantine counts once.
    known = max(0, second.counts.known - first.counts.new)
    flows = replace(first.counts, known=0, quarantined=0) + second.counts
    return replace(
        second,
        counts=replace(flows, known=known),
        seconds=first.seconds + second.seconds,
        segments=first.segments + second.segments,
    )

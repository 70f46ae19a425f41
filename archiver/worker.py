"""Claims accounts that are due, polls them in threads, and gives them back.

Owns leases while they are held, the threads, and the end of the process. It
promises that an account is polled by one thread at a time; that a poll whose
lease could not be renewed stops by itself before another may begin; and that
whatever happens in one poll ends that poll only. APScheduler is the clock.
What a poll does is ``poll.py``'s; when an account is due again is decided in
``policy.py``.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from apscheduler.schedulers.background import BackgroundScheduler

from archiver import observe, policy, process
from archiver.db import Database, accounts, record, schedule
from archiver.errors import ArchiverError, LeaseLost, TryLater
from archiver.model import Account, Claim, PollReport
from archiver.poll import Tools, Watch, poll

TICK_SECONDS = 1.0
STILL_SECONDS = 60.0
"""A clock that stands still for so long will not go on by itself."""

PAUSED_BY_HAND = "paused by hand"
"""An account paused so goes on when somebody says so, not when a poll of it happens to work."""


class HeldLease:
    """A lease in this process's hands, judged by the monotonic clock, which nobody sets back."""

    def __init__(
        self, claim: Claim, lease_seconds: float, monotonic: Callable[[], float], asked_at: float
    ) -> None:
        self.claim = claim
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
class Chance:
    """Time and randomness, as arguments."""

    uniform: Callable[[float, float], float]
    sleep: Callable[[float], None] = time.sleep


class Worker:
    """One process's share of the work. Start its clock, then let it ``serve`` or ``poll_now``."""

    def __init__(
        self,
        tools: Tools,
        *,
        lease_seconds: float,
        workers: int,
        chance: Chance,
        stopping: threading.Event,
        owner: str | None = None,
    ) -> None:
        self.tools = tools
        self.database: Database = tools.database
        self.owner = owner or process.name_owner()
        self.lease_seconds = lease_seconds
        self.workers = workers
        self.chance = chance
        self.stopping = stopping
        self.log = observe.get_logger()
        self._held: dict[Claim, HeldLease] = {}
        self._claiming = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="poll")
        self._clock = BackgroundScheduler(timezone="UTC")
        self._beat_at = tools.monotonic()

    # The clock

    def start_clock(self, *, claim: bool) -> None:
        """Renew leases from now on, and, with ``claim``, take accounts as they fall due."""
        every = {"trigger": "interval", "max_instances": 1, "coalesce": True}
        self._clock.add_job(self._beat, seconds=TICK_SECONDS, **every)
        self._clock.add_job(self._heartbeat, seconds=self.lease_seconds / 4, **every)
        if claim:
            self._clock.add_job(self._tick, seconds=TICK_SECONDS, **every)
        self._clock.start()

    def close(self) -> None:
        """Stop the clock and the threads. What still runs is left to the lease's end."""
        if self._clock.running:
            self._clock.shutdown(wait=False)
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the clock still ticks, whatever the database does: for a liveness probe."""
        return self.tools.monotonic() - self._beat_at < STILL_SECONDS

    def _beat(self) -> None:
        self._beat_at = self.tools.monotonic()

    def _heartbeat(self) -> None:
        held = dict(self._held)
        if not held:
            return
        asked_at = self.tools.monotonic()
        try:
            kept = self.database.transact(
                lambda connection: schedule.renew(connection, held, lease_seconds=self.lease_seconds)
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

    def _tick(self) -> None:
        """Fill the free threads with accounts that are due."""
        if not self._claiming.acquire(blocking=False):
            return
        try:
            free = self.workers - len(self._held)
            if self.stopping.is_set() or free <= 0:
                return
            for lease in self._claim_due(free):
                self._pool.submit(self._poll_due, lease)
        except ArchiverError as error:
            self.log.warning("claim.failed", error=str(error))
        finally:
            self._claiming.release()

    def _claim_due(self, free: int) -> list[HeldLease]:
        asked_at = self.tools.monotonic()
        claims = self.database.transact(
            lambda connection: schedule.claim_due(
                connection, owner=self.owner, lease_seconds=self.lease_seconds, limit=free
            )
        )
        return [self._hold(claim, asked_at) for claim in claims]

    def _hold(self, claim: Claim, asked_at: float) -> HeldLease:
        # By claim, not by account: one that was released a moment ago may be
        # due and claimed again before its last thread has let it go.
        lease = HeldLease(claim, self.lease_seconds, self.tools.monotonic, asked_at)
        self._held[claim] = lease
        observe.POLLS_RUNNING.set(len(self._held))
        return lease

    def _let_go(self, lease: HeldLease) -> None:
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
        ends_at = self.tools.monotonic() + drain_seconds
        while self._held and self.tools.monotonic() < ends_at:
            self.chance.sleep(0.05)
        left = len(self._held)
        self.log.info("service.stopped", unfinished=left)
        return left == 0

    def _poll_due(self, lease: HeldLease) -> None:
        try:
            with self.database.reading() as connection:
                account = accounts.by_id(connection, lease.claim.account_id)
            self._poll_held(account, lease, None, disprove=False)
        except Exception:
            # The lease runs out by itself. Held on to, it would be renewed for ever.
            self._let_go(lease)
            self.log.exception("poll.not_started", account=lease.claim.account_id)
        self._tick()

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
            more = report.outcome == "ok" and report.to_come and report.new
            if not more or self.stopping.is_set() or policy.is_too_early(report):
                return total

    def _poll_by_name(self, account: Account, watch: Watch) -> PollReport:
        try:
            lease = self._wait_for(account)
        except ArchiverError as error:
            return PollReport(account.name, error.outcome, error=str(error), hint=error.hint)
        return self._poll_held(account, lease, watch, disprove=True)

    def _wait_for(self, account: Account) -> HeldLease:
        ends_at = self.tools.monotonic() + self.lease_seconds + TICK_SECONDS
        while True:
            with self.database.reading() as connection:
                holder = schedule.holder(connection, account.id)
            asked_at = self.tools.monotonic()
            claim = self.database.transact(
                partial(
                    schedule.claim_account,
                    account_id=account.id,
                    owner=self.owner,
                    lease_seconds=self.lease_seconds,
                    take_over=holder if self._is_left_behind(holder, account.id) else None,
                )
            )
            if claim is not None:
                return self._hold(claim, asked_at)
            if self.tools.monotonic() > ends_at or self.stopping.is_set():
                raise TryLater(
                    f"{account.name} is being polled by {holder}",
                    hint="it goes on there; look at: archiver status",
                )
            self.chance.sleep(0.2)

    def _is_left_behind(self, holder: str | None, account_id: str) -> bool:
        """Whether nobody polls under this lease: its process died, or our own claim's answer was lost."""
        if holder == self.owner:
            return all(claim.account_id != account_id for claim in tuple(self._held))
        return holder is not None and process.is_dead(holder)

    # One poll, for both

    def _poll_held(
        self, account: Account, lease: HeldLease, watch: Watch | None, *, disprove: bool
    ) -> PollReport:
        """Poll and release. Whatever goes wrong ends in the report, the log and the schedule."""
        try:
            report = poll(account, lease, self.tools, watch)
        except Exception as error:
            # A mistake of ours must not end the thread with the lease in its
            # hand, nor any other account's poll.
            self.log.exception("poll.broke", account=account.name)
            report = PollReport(
                account.name, "try_later", error=f"internal error: {error!r}", journal_uncertain=True
            )
        try:
            if report.outcome != "lease_lost":
                self._release(account, lease, report, disprove=disprove)
        except LeaseLost as error:
            report = replace(report, outcome=error.outcome, error=str(error))
        except ArchiverError as error:
            # The lease runs out by itself, and its next holder looks at the journal.
            self.log.warning("lease.not_released", account=account.name, error=str(error))
        except Exception:
            self.log.exception("lease.not_released", account=account.name)
        finally:
            self._let_go(lease)
        self._tell(report, lease)
        return report

    def _release(self, account: Account, lease: HeldLease, report: PollReport, *, disprove: bool) -> None:
        disproved = None
        if disprove and report.outcome == "ok" and account.paused_reason != PAUSED_BY_HAND:
            disproved = account.paused_reason

        def release(connection: Any) -> None:
            following = policy.next_poll(
                report,
                setbacks=schedule.setbacks(connection, account.id),
                interval_seconds=account.interval_seconds,
                uniform=self.chance.uniform,
            )
            record.poll_ended(
                connection,
                lease.claim,
                report,
                following,
                ended_at=self.tools.now(),
                pipelining_broke=report.pipelining_broke,
                disproved=disproved,
            )

        self.database.transact(release)

    def _tell(self, report: PollReport, lease: HeldLease) -> None:
        observe.POLLS.labels(report.outcome).inc()
        observe.POLL_SECONDS.observe(report.seconds)
        observe.CAPTURED.inc(report.new)
        observe.CAPTURED_OCTETS.inc(report.octets)
        observe.DELETE_REQUESTED.inc(report.delete_requested)
        say = self.log.info if report.outcome == "ok" and not report.warnings else self.log.warning
        if report.outcome == "integrity":
            say = self.log.error
        say(
            "poll.ended",
            account=report.account,
            account_id=lease.claim.account_id,
            poll=lease.claim.token,
            outcome=report.outcome,
            listed=report.listed,
            new=report.new,
            known=report.known,
            quarantined=report.quarantined,
            to_come=report.to_come,
            delete_requested=report.delete_requested,
            octets=report.octets,
            segments=report.segments,
            seconds=round(report.seconds, 3),
            implementation=report.implementation,
            warnings=list(report.warnings),
            error=report.error,
            hint=report.hint,
        )


def _sum(first: PollReport, second: PollReport) -> PollReport:
    """Two polls of one mailbox, as if they had been one."""
    return replace(
        second,
        new=first.new + second.new,
        known=max(0, second.known - first.new),
        octets=first.octets + second.octets,
        seconds=first.seconds + second.seconds,
        segments=first.segments + second.segments,
        delete_requested=first.delete_requested + second.delete_requested,
    )

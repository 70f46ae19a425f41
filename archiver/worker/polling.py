"""Runs polls: together in one loop while they wait for their servers, then each in a thread of its own.

Owns the loop and the threads of polls (docs/decisions/0026). It promises that
an error in one poll ends that poll only, and that the lease of a poll which
breaks is not renewed permanently. ``archiver.poll`` has the steps of a poll; how
its end is written is the affair of ``Ends``.

Threads: any thread may call ``Polls``. A poll is in the loop's thread or in one of
the pool, and offloads one thing at most at a time, for which it does not wait in
the pool. So a pool of as many threads as there are polls never runs dry.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import NamedTuple, Protocol

from archiver import observe
from archiver.db import leases as lease_rows
from archiver.db.before import BeforePoll, before_polls
from archiver.errors import ArchiverError, LeaseLost, OperatorNeeded
from archiver.model import Account, Claim, PollReport
from archiver.poll import NEEDS_THREAD, Story, begin, finish, poll
from archiver.poll.ports import Ports, Watch
from archiver.pop3 import Loop
from archiver.timetable import Timetable
from archiver.worker.leases import ActiveLease, Leases

HOLD_UP_SECONDS = 5.0
"""A session that computes for this long, while all others wait, is one with a hostile server."""

STILL_SECONDS = 60.0
"""A loop that has not moved for this long will not move again."""


@dataclass(frozen=True, slots=True)
class Polling:
    """A poll that is under way."""

    before: BeforePoll
    lease: ActiveLease
    story: Story
    in_person: bool = False
    """Whether a person asked for it and watches."""
    ended: Future[PollReport] = field(default_factory=Future)
    """Its report, once its end is written and its worker given to another account."""

    @property
    def account(self) -> Account:
        """The account as it was right after the claim."""
        return self.before.account


class Finished(NamedTuple):
    """A finished poll, whose end is not written yet."""

    polling: Polling
    report: PollReport

    @property
    def claim(self) -> Claim:
        """The claim under which it polled."""
        return self.polling.lease.claim


class Ends(Protocol):
    """Where polls report that they have finished. Any thread may call it."""

    def add(self, finished: Finished) -> None:
        """Have this poll's end written, and another poll begin in its place."""

    def freed(self) -> None:
        """Have another poll begin in the place of an account that was not polled."""


class Polls:
    """The polls of this process."""

    def __init__(self, ports: Ports, leases: Leases, workers: int) -> None:
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="poll")
        self.loop = Loop(self.pool)
        self._ports = ports
        self._leases = leases
        self.log = observe.get_logger()
        self._moved_at = ports.monotonic()

    def begin(
        self, leases: Sequence[ActiveLease], before: Mapping[str, BeforePoll] | None, ends: Ends
    ) -> list[Future[PollReport]]:
        """Begin to poll these accounts. Returns how each poll will have ended.

        ``before`` is what they begin with, by account; without it, that is read here.
        An account that cannot be read is left out, and its lease expires.
        """
        if not leases:
            return []
        ids = [lease.claim.account_id for lease in leases]
        try:
            if before is None:
                with self._ports.database.reading() as connection:
                    before = before_polls(connection, ids)
            pollings = [self.polling(lease, before[lease.claim.account_id]) for lease in leases]
        except Exception:
            if len(leases) > 1:
                # One account that cannot be read must not prevent the others from being polled.
                return [future for lease in leases for future in self.begin([lease], None, ends)]
            self._leases.drop(leases[0])
            self.log.exception("poll.not_started", account=ids[0])
            return []
        for polling in pollings:
            with self.abandoning([polling]):
                self._begin(polling, ends)
        return [polling.ended for polling in pollings]

    def polling(self, lease: ActiveLease, before: BeforePoll, watch: Watch | None = None) -> Polling:
        """A poll that has not begun. With ``watch`` a person asked for it."""
        return Polling(before, lease, self._story(before, lease, watch), in_person=watch is not None)

    @contextmanager
    def abandoning(self, pollings: Sequence[Polling]) -> Iterator[None]:
        """Give up these polls if an error arises here that no code expects: log it, and drop their leases."""
        try:
            yield
        except BaseException as error:  # some libraries panic with what is not an Exception
            for polling in pollings:
                self._leases.drop(polling.lease)
                if not polling.ended.done():
                    self.log.exception("poll.abandoned", account=polling.account.name)
                    polling.ended.set_exception(error)

    def check_loop(self, hold_up_seconds: float = HOLD_UP_SECONDS) -> None:
        """Disconnect a session that delays all others for this long, and see whether the loop moves."""
        if self.loop.cut_short(hold_up_seconds):
            self.log.warning("session.cut_short", seconds=hold_up_seconds)
        self.loop.begin(self._moves)

    @property
    def alive(self) -> bool:
        """Whether the loop has moved recently, since ``check_loop`` is called again and again."""
        return self._ports.monotonic() - self._moved_at < STILL_SECONDS

    def close(self) -> None:
        """End the loop, and begin nothing else. Polls that run in threads are not waited for."""
        self.loop.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _moves(self) -> None:
        self._moved_at = self._ports.monotonic()

    def _begin(self, polling: Polling, ends: Ends) -> None:
        blackout_ends_at = _blackout_ends(polling.account, self._ports.now())
        if blackout_ends_at is None:
            self.loop.begin(partial(self._poll_in_loop, polling, ends))
        else:
            self.pool.submit(self._put_off, polling, blackout_ends_at, ends)

    # In the loop's thread.

    def _poll_in_loop(self, polling: Polling, ends: Ends) -> None:
        with self.abandoning([polling]):
            report = begin(polling.story)
            if report is NEEDS_THREAD:
                self.pool.submit(self._poll_on, polling, ends)
            else:
                ends.add(Finished(polling, report))

    # In a thread of the pool.

    def _poll_on(self, polling: Polling, ends: Ends) -> None:
        with self.abandoning([polling]):
            ends.add(Finished(polling, finish(polling.story)))

    def _put_off(self, polling: Polling, until: datetime, ends: Ends) -> None:
        """Release an account that fell due in its blackout: a person asked for it, or its worker died."""
        claim, after_seconds = polling.lease.claim, (until - self._ports.now()).total_seconds()
        with self.abandoning([polling]):
            try:
                self._ports.database.transact(
                    lambda connection: lease_rows.put_off(connection, claim, after_seconds)
                )
            except LeaseLost:
                self.log.info("lease.lost", account=polling.account.name)
            except ArchiverError as error:
                self.log.warning("lease.not_released", account=polling.account.name, error=str(error))
            finally:
                self._leases.drop(polling.lease)
            ends.freed()
            polling.ended.set_result(PollReport(polling.account.name, "ok", stopped_by="blackout"))

    # In whichever thread the poll is.

    def _story(self, before: BeforePoll, lease: ActiveLease, watch: Watch | None) -> Story:
        """The poll's story, which ends in a report whatever goes wrong."""
        account = before.account
        try:
            ports = self._ports_for(account, lease, in_person=watch is not None)
            return (yield from poll(before, lease, ports, watch, may_glance=watch is None))
        except OperatorNeeded as error:
            return PollReport(account.name, error.outcome, error=str(error), hint=error.hint)
        except Exception as error:
            # A bug must not end the thread while the lease is held, nor another account's poll.
            self.log.exception("poll.crashed", account=account.name)
            return PollReport(
                account.name, "try_later", error=f"internal error: {error!r}", journal_uncertain=True
            )

    def _ports_for(self, account: Account, lease: ActiveLease, *, in_person: bool) -> Ports:
        """What this one poll works with. A poll in person runs to its end, and through a blackout."""
        timetable = timetable_of(account)
        if in_person:
            return self._ports
        ends_at = timetable.blackout_begins(self._ports.now())
        budget = replace(self._ports.budget, ends_at=ends_at)
        return replace(self._ports, budget=budget, make_room=partial(self._leases.should_yield, lease))


def timetable_of(account: Account) -> Timetable:
    """The account's timetable. Raises OperatorNeeded if its settings are wrong here."""
    try:
        return Timetable.of(account)
    except ValueError as error:
        raise OperatorNeeded(
            f"{account.name}: {error}", hint=f"correct it: archiver account edit {account.name}"
        ) from None


def _blackout_ends(account: Account, now: datetime) -> datetime | None:
    try:
        return Timetable.of(account).blackout_ends(now)
    except ValueError:
        return None  # the poll reports what is wrong

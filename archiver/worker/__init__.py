"""Claims accounts that are due, polls them, and releases them.

Owns the parts of a process that polls, and its end. The parts have the promises:

- ``leases``: an account is polled by one thread at a time, and a poll whose lease
  could not be renewed stops by itself before another worker may begin.
- ``polling``: an error in one poll ends that poll only.
- ``changeover``: the ends of polls are written together, and others begin in
  their places.
- ``on_demand``: polls by name, for commands.
- ``jobs``: the clock.

``archiver.poll`` has the steps of a poll. ``policy`` decides when an account is due
again.

Threads, by name:

- **sessions**: the loop, in which polls wait for their servers together.
- **poll**: one for each poll that does more than wait, and for work that a poll
  offloads.
- **changeover**: one, which writes ends and claims.
- APScheduler's, for jobs.
- **MainThread**, which serves: it waits for the signal to stop, then drains.

Everything that one thread hands to another is frozen, or is guarded by the one
lock of its class: ``Leases`` and ``Agenda``.
"""

import threading
import time
from collections.abc import Callable, Sequence

from archiver import observe, process
from archiver.db import history
from archiver.errors import ArchiverError
from archiver.model import Account, PollReport
from archiver.poll.ports import Ports, Watch
from archiver.worker.changeover import Changeovers
from archiver.worker.jobs import Job, Jobs
from archiver.worker.leases import Leases, Terms
from archiver.worker.on_demand import OnDemand
from archiver.worker.polling import Polls

__all__ = ["Terms", "Worker"]

TICK_SECONDS = 1.0
QUEUE_SECONDS = 2.0
GIVE_BACK_SECONDS = 60.0
HISTORY_SECONDS = 3600.0
HEARTBEATS = 4
"""Renewals within the length of a lease."""
DRAIN_LOOK_SECONDS = 0.05


class Worker:
    """One process's share of the work. Start its clock, then let it ``serve`` or ``poll_now``.

    Without its clock it does nothing in the background: then call its parts.
    """

    def __init__(
        self,
        ports: Ports,
        terms: Terms,
        *,
        stopping: threading.Event,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.ports = ports
        self.terms = terms
        self.stopping = stopping
        """Set it to end: what is under way is finished, and no account is claimed."""
        self.leases = Leases(
            ports.database, terms, monotonic=ports.monotonic, slice_seconds=ports.budget.slice_seconds
        )
        self.polls = Polls(ports, self.leases, terms.workers)
        self.changeovers = Changeovers(ports, terms, self.leases, self.polls, stopping)
        self.on_demand = OnDemand(
            ports, terms, self.leases, self.polls, self.changeovers, stopping=stopping, sleep=sleep
        )
        self.jobs = Jobs(now=ports.now, uniform=ports.uniform)
        self._sleep = sleep
        self.log = observe.get_logger()
        for job in (
            Job("loop", self.polls.check_loop, TICK_SECONDS, for_commands=True),
            Job("heartbeat", self.leases.renew, terms.lease_seconds / HEARTBEATS, for_commands=True),
            Job("tick", self.changeovers.tick, TICK_SECONDS),
            Job("queues", self.changeovers.queue_at_hosts, QUEUE_SECONDS),
            Job("memory", process.give_back_memory, GIVE_BACK_SECONDS),
            Job("history", self.tidy_history, HISTORY_SECONDS, jitter_seconds=HISTORY_SECONDS / 10),
        ):
            self.jobs.add(job)

    def start_clock(self, *, claim: bool) -> None:
        """Renew leases from now on, and, with ``claim``, poll accounts as they fall due."""
        self.jobs.start(service=claim)

    @property
    def alive(self) -> bool:
        """Whether clock and loop still move, whatever the database does: for a liveness probe."""
        return self.polls.alive

    def serve(self, stop: threading.Event, drain_seconds: float) -> bool:
        """Poll accounts as they fall due until ``stop`` is set, then ``drain``. True if all polls ended."""
        self.log.info("service.started", owner=self.terms.owner, workers=self.terms.workers)
        self.start_clock(claim=True)
        stop.wait()
        return self.drain(drain_seconds)

    def drain(self, seconds: float) -> bool:
        """Claim nothing from now on, and wait for the polls under way. True if all ended in time.

        Each poll finishes the messages that it has asked for, records them, and
        sends QUIT.
        """
        self.stopping.set()
        self.log.info("service.draining", polls=len(self.leases), seconds=seconds)
        ends_at = self.ports.monotonic() + seconds
        while len(self.leases) and self.ports.monotonic() < ends_at:
            self._sleep(DRAIN_LOOK_SECONDS)
        left = len(self.leases)
        self.log.info("service.stopped", unfinished=left)
        return left == 0

    def poll_now(self, chosen: Sequence[Account], watch: Callable[[Account], Watch]) -> list[PollReport]:
        """Poll these accounts at once, whatever their schedule says, until each mailbox is worked off."""
        return self.on_demand.poll(chosen, watch)

    def tidy_history(self) -> None:
        """Add polls to their days, and remove old ones. Of several processes, one at a time does it."""
        try:
            done = history.tidy(
                self.ports.database,
                now=self.ports.now(),
                keep_days=self.terms.history_days,
                stopping=self.stopping.is_set,
            )
        except ArchiverError as error:
            self.log.warning("history.not_tidied", error=str(error))
        else:
            self.log.info("history.tidied", counted=done.counted, removed=done.removed, whole=done.whole)

    def close(self) -> None:
        """Stop clock and threads. The lease of a poll that still runs expires by itself."""
        self.jobs.close()
        self.polls.close()
        self.changeovers.close()

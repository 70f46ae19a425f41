"""The leases in this process's hands: renewed together, counted, and asked to yield when others wait.

Owns which accounts this process may poll at this moment, and who yields. It
promises that a lease which could not be renewed in time ends its poll, before
another worker may have the account. Claiming and releasing are statements of
``archiver.db``; their timing is ``changeover``'s.

Threads: any thread may call ``Leases``, and one lock guards what it keeps. Of an
``ActiveLease``, the heartbeat writes whether it was renewed, and its poll reads that.
"""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from archiver import observe, policy, process
from archiver.db import Database, leases
from archiver.db import claims as claiming
from archiver.db.hosts import DEFAULT_SESSIONS, HostSessions
from archiver.errors import ArchiverError, LeaseLost
from archiver.model import Claim


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms on which this process polls."""

    lease_seconds: float
    """Length of a lease. It is renewed four times within it."""
    workers: int
    """Polls at once."""
    owner: str = field(default_factory=process.name_owner)
    """The name of this process in its leases."""
    sessions: HostSessions = DEFAULT_SESSIONS
    ramp_seconds: float = 0.0
    """Time in which the number of polls at once grows from one to ``workers`` after the start."""
    history_days: int = 30
    """Days for which single polls are kept."""


class ActiveLease:
    """A lease that this process holds. The monotonic clock judges it, because nothing sets that back."""

    def __init__(
        self, claim: Claim, lease_seconds: float, monotonic: Callable[[], float], asked_at: float
    ) -> None:
        self.claim = claim
        self.taken_at = asked_at
        self.yields = False
        """Whether its poll was asked to end for another. ``Leases`` writes it."""
        self._lease_seconds = lease_seconds
        self._monotonic = monotonic
        self._renewed_at = asked_at
        self._is_lost = False

    def renewed(self, asked_at: float) -> None:
        """Note that the database extended it. ``asked_at`` is the earliest moment at which it can have."""
        self._renewed_at = asked_at

    def lost(self) -> None:
        """Note that the database gave it to another worker."""
        self._is_lost = True

    def check(self) -> None:
        """Raise LeaseLost after two thirds of its length without renewal. The rest is for work under way."""
        if self._is_lost or self._monotonic() - self._renewed_at > self._lease_seconds * 2 / 3:
            raise LeaseLost(f"the lease of account {self.claim.account_id} could not be renewed in time")


@dataclass(frozen=True, slots=True)
class Waiting:
    """Accounts that wait while polls go on for long."""

    accounts: int = 0
    """Accounts that this process would claim if it had a free worker."""
    hosts: frozenset[str] = frozenset()
    """Hosts of long polls at which accounts are queued."""


class Leases:
    """The leases that this process holds. Any thread may call any method."""

    def __init__(
        self, database: Database, terms: Terms, *, monotonic: Callable[[], float], slice_seconds: float
    ) -> None:
        self._database = database
        self._terms = terms
        self._monotonic = monotonic
        self._slice_seconds = slice_seconds
        self.log = observe.get_logger()
        self._lock = threading.Lock()
        # By claim, not by account: an account that was released a moment ago may be due and claimed
        # again before its previous thread is done with it.
        self._held: dict[Claim, ActiveLease] = {}
        self._waiting = Waiting()

    def __len__(self) -> int:
        with self._lock:
            return len(self._held)

    def take(self, claim: Claim, asked_at: float) -> ActiveLease:
        """Hold the lease of a claim, and renew it from now on. It counts from when it was asked for."""
        lease = ActiveLease(claim, self._terms.lease_seconds, self._monotonic, asked_at)
        with self._lock:
            self._held[claim] = lease
            observe.POLLS_RUNNING.set(len(self._held))
        return lease

    def drop(self, lease: ActiveLease) -> None:
        """Renew this lease no longer. If the database was not told to release it, it expires by itself."""
        with self._lock:
            self._held.pop(lease.claim, None)
            observe.POLLS_RUNNING.set(len(self._held))

    def renew(self) -> None:
        """Extend all leases, in one statement. A failure is logged, and the next heartbeat tries again."""
        active = {lease.claim: lease for lease in self._all()}
        if not active:
            return
        asked_at = self._monotonic()
        try:
            kept = self._database.transact(
                lambda connection: leases.renew(connection, active, lease_seconds=self._terms.lease_seconds)
            )
        except ArchiverError as error:
            observe.HEARTBEATS_FAILED.inc()
            self.log.warning("lease.renewal_failed", leases=len(active), error=str(error))
            return
        for claim, lease in active.items():
            if claim in kept:
                lease.renewed(asked_at)
            else:
                lease.lost()

    def is_at(self, host: str) -> bool:
        """Whether one of these leases is of an account of this host."""
        return any(lease.claim.host == host for lease in self._all())

    def has(self, account_id: str) -> bool:
        """Whether one of these leases is of this account."""
        return any(lease.claim.account_id == account_id for lease in self._all())

    def room_for_failing(self, ended: Collection[Claim] = ()) -> int:
        """How many more accounts whose last poll failed may be claimed, once the ``ended`` polls are over."""
        failing = sum(lease.claim.failing for lease in self._all() if lease.claim not in ended)
        return max(0, policy.threads_for_failing(self._terms.workers) - failing)

    def look_who_waits(self, free: int) -> Waiting:
        """See for whom long polls should yield. ``free`` workers are left for accounts that are due.

        It asks the database only while some poll has gone on for its whole slice.
        """
        waiting = self._who_waits(free)
        with self._lock:
            self._waiting = waiting
        return waiting

    def _who_waits(self, free: int) -> Waiting:
        taken_before = self._monotonic() - self._slice_seconds
        hosts = {lease.claim.host for lease in self._all() if lease.taken_at <= taken_before}
        if not hosts:
            return Waiting()
        terms, due = self._terms, 0
        with self._database.reading() as connection:
            queued = claiming.hosts_with_queues(connection, hosts)
            if free <= 0:
                due = claiming.count_due(
                    connection,
                    limit=terms.workers,
                    failing_limit=self.room_for_failing(),
                    sessions=terms.sessions,
                )
        return Waiting(due, frozenset(queued))

    def should_yield(self, lease: ActiveLease) -> bool:
        """Whether this poll, which has gone on for its slice, ends now. One yields for each that waits."""
        with self._lock:
            yielding = [other for other in self._held.values() if other.yields]
            at_host = any(other.claim.host == lease.claim.host for other in yielding)
            lease.yields = lease.yields or (
                len(yielding) < self._waiting.accounts
                or (lease.claim.host in self._waiting.hosts and not at_host)
            )
            return lease.yields

    def _all(self) -> list[ActiveLease]:
        with self._lock:
            return list(self._held.values())

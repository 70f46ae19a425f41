"""Polls by name, as ``archiver sync`` wants them: at once, whatever the schedule, until nothing is left.

Owns the wait for an account that another process polls, or for a session of its
host, and the sum of the polls that one mailbox takes. It promises to take over
a lease only if it expired, or if its holder is known to be dead.

Threads: ``poll`` may be called from any thread. Each account has one thread of
the pool from beginning to end.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial

from archiver import observe, policy, process
from archiver.db import claims as claiming
from archiver.db import leases as lease_rows
from archiver.db.before import before_poll
from archiver.errors import ArchiverError, TryLater
from archiver.model import Account, PollReport, mail_host
from archiver.poll import finish
from archiver.poll.ports import Ports, Watch
from archiver.worker.leases import ActiveLease, Leases, Terms
from archiver.worker.polling import Ends, Finished, Polls

AGAIN_SECONDS = 0.2
"""Between two attempts to claim an account."""

MARGIN_SECONDS = 1.0
"""For how much longer than a lease an account is waited for: then one whose worker died has expired."""


class OnDemand:
    """Polls by name in this process."""

    def __init__(
        self,
        ports: Ports,
        terms: Terms,
        leases: Leases,
        polls: Polls,
        ends: Ends,
        *,
        stopping: threading.Event,
        sleep: Callable[[float], None],
    ) -> None:
        self._ports = ports
        self._terms = terms
        self._leases = leases
        self._polls = polls
        self._ends = ends
        self._stopping = stopping
        self._sleep = sleep
        self.log = observe.get_logger()

    def poll(self, chosen: Sequence[Account], watch: Callable[[Account], Watch]) -> list[PollReport]:
        """Poll these accounts until each mailbox is worked off. Returns a report for each.

        At Ctrl+C the polls under way finish what they have asked for, and the
        accounts that have not begun have no report.
        """
        futures = [
            self._polls.pool.submit(self._poll_to_the_end, account, watch(account)) for account in chosen
        ]
        try:
            wait(futures)
        except KeyboardInterrupt:
            self._stopping.set()
            wait([future for future in futures if not future.cancel()])
        return [future.result() for future in futures if not future.cancelled()]

    def claim(self, account: Account) -> ActiveLease:
        """Claim an account, whatever its schedule says.

        Waits while another worker has it, for as long as that worker could be
        dead, and while polls of this process have all sessions of its host.
        Raises TryLater then, and what the database raises.
        """
        ends_at, left_behind = self._give_up_at(), None
        while True:
            asked_at = self._ports.monotonic()
            claim = self._ports.database.transact(
                partial(
                    claiming.claim_account,
                    account_id=account.id,
                    owner=self._terms.owner,
                    lease_seconds=self._terms.lease_seconds,
                    take_over=left_behind,
                    sessions=self._terms.sessions,
                )
            )
            if claim is not None:
                return self._leases.take(claim, asked_at)
            with self._ports.database.reading() as connection:
                holder = lease_rows.holder(connection, account.id)
            tried, left_behind = left_behind, holder if self._is_left_behind(holder, account.id) else None
            if left_behind != tried:
                continue
            if holder is None and self._leases.is_at(mail_host(account.url)):
                # The sessions of the host are those of this process: they end, however long they take.
                ends_at = self._give_up_at()
            if self._ports.monotonic() > ends_at or self._stopping.is_set():
                raise self._why_not(account, holder)
            self._sleep(AGAIN_SECONDS)

    def _poll_to_the_end(self, account: Account, watch: Watch) -> PollReport:
        total: PollReport | None = None
        while True:
            report = self._poll_once(account, watch)
            total = report if total is None else _sum(total, report)
            if not _leaves_more(report) or self._stopping.is_set() or policy.is_too_early(report):
                return total

    def _poll_once(self, account: Account, watch: Watch) -> PollReport:
        try:
            lease = self.claim(account)
        except ArchiverError as error:
            return _failed(account, error)
        try:
            with self._ports.database.reading() as connection:
                before = before_poll(connection, account.id)
        except Exception as error:
            self._leases.drop(lease)
            if isinstance(error, ArchiverError):
                return _failed(account, error)
            self.log.exception("poll.not_started", account=account.id)
            return PollReport(account.name, "try_later", error=f"internal error: {error!r}")
        polling = self._polls.polling(lease, before, watch)
        with self._polls.abandoning([polling]):
            self._ends.add(Finished(polling, finish(polling.story)))
        return polling.ended.result()

    def _give_up_at(self) -> float:
        return self._ports.monotonic() + self._terms.lease_seconds + MARGIN_SECONDS

    def _is_left_behind(self, holder: str | None, account_id: str) -> bool:
        """Whether no poll runs under this lease: its process died, or the answer to our claim was lost."""
        if holder == self._terms.owner:
            return not self._leases.has(account_id)
        return holder is not None and process.is_dead(holder)

    def _why_not(self, account: Account, holder: str | None) -> TryLater:
        if holder is not None:
            return TryLater(
                f"{account.name} is being polled by {holder}",
                hint="that poll goes on; see: archiver status",
            )
        host = mail_host(account.url)
        most = self._terms.sessions.of(host)
        return TryLater(
            f"{account.name}: {host} has as many sessions as it may have at once, {most}",
            hint="try later, or raise ARCHIVER_HOST_SESSIONS if the host's operator agrees",
        )


def _leaves_more(report: PollReport) -> bool:
    """Whether another poll would fetch more: this one did, and left messages that its day has room for."""
    return bool(
        report.outcome == "ok" and report.to_come and report.counts.new and report.stopped_by != "day"
    )


def _failed(account: Account, error: ArchiverError) -> PollReport:
    return PollReport(account.name, error.outcome, error=str(error), hint=error.hint)


def _sum(first: PollReport, second: PollReport) -> PollReport:
    """Two polls of one mailbox, as if they had been one."""
    # Of the listing, messages that the second poll knew or found in quarantine count once.
    known = max(0, second.counts.known - first.counts.new)
    flows = replace(first.counts, known=0, quarantined=0) + second.counts
    return replace(
        second,
        counts=replace(flows, known=known),
        seconds=first.seconds + second.seconds,
        segments=first.segments + second.segments,
    )

"""What a poll's end and the beginning of the next one cost, by how many share a transaction.

Run it by ``python -m tests.bench.changeovers``. A worker does changeovers on a
real SQLite and a real PostgreSQL: so many polls end that found nothing new, and
as many accounts are claimed in their places. Their sessions, which would be the
rest of a poll, do not begin.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from rich.console import Console
from rich.table import Table

from archiver import observe
from archiver.db.before import BeforePoll
from archiver.model import PollReport
from archiver.poll.ports import Ports
from archiver.worker.changeover import Changeovers
from archiver.worker.leases import ActiveLease, Leases, Terms
from archiver.worker.polling import Ends, Finished, Polls
from tests.bench.machine import cpu_seconds_of
from tests.harness.postgres import postgres
from tests.harness.scripted_pop3 import MailboxPlay
from tests.scenarios.story import LEASE_SECONDS, Archive

_AT_ONCE = (2, 4, 16)
_ACCOUNTS = 64
_POLLS = 1_200
_ROUNDS = 5


class _Over(Polls):
    """Polls that are over as soon as they begin."""

    finished: Sequence[Finished] = ()

    def begin(
        self, leases: Sequence[ActiveLease], before: Mapping[str, BeforePoll] | None, ends: Ends
    ) -> list[Future[PollReport]]:
        self.finished = [self._over(lease, (before or {})[lease.claim.account_id]) for lease in leases]
        return []

    def _over(self, lease: ActiveLease, before: BeforePoll) -> Finished:
        report = PollReport(before.account.name, "ok", listed=0, glanced=True, reached=True)
        return Finished(self.polling(lease, before), report)


class _Changing:
    """Changeovers whose polls have no sessions."""

    def __init__(self, ports: Ports) -> None:
        terms = Terms(lease_seconds=LEASE_SECONDS, workers=_ACCOUNTS)
        leases = Leases(ports.database, terms, monotonic=ports.monotonic, slice_seconds=60.0)
        self._polls = _Over(ports, leases, terms.workers)
        self._changeovers = Changeovers(ports, terms, leases, self._polls, threading.Event())

    def change(self, places: int) -> None:
        """End the polls that began last, and begin this many others."""
        self._changeovers.change_over(self._polls.finished, places)
        if len(self._polls.finished) != places:
            raise RuntimeError(f"{len(self._polls.finished)} polls begin, not {places}")

    def close(self) -> None:
        self._polls.close()
        self._changeovers.close()


def _measure(table: Table, name: str, url: str, place: Path, server_pid: int | None) -> None:
    def server_seconds() -> float:
        return 0.0 if server_pid is None else cpu_seconds_of(server_pid)

    place.mkdir()
    with Archive(url, place) as archive:
        server = archive.serve(MailboxPlay([]))
        for number in range(_ACCOUNTS):
            archive.add(server, url=f"pop3://user{number}@localhost:{server.port}", interval_seconds=0.0001)
        for at_once in _AT_ONCE:
            worker = _Changing(archive.ports())
            worker.change(at_once)
            ours, theirs = [], []
            for _ in range(_ROUNDS):
                cpu, of_server = time.process_time(), server_seconds()
                for _ in range(_POLLS // at_once):
                    worker.change(at_once)
                ours.append((time.process_time() - cpu) / _POLLS * 1000)
                theirs.append((server_seconds() - of_server) / _POLLS * 1000)
            table.add_row(
                name, f"{at_once}", f"{statistics.median(ours):.2f}", f"{statistics.median(theirs):.2f}"
            )
            worker.change(0)
            worker.close()


def main() -> None:
    observe.log_quietly()
    table = Table("database", "at once", "ms of CPU a poll", "the server's own")
    with tempfile.TemporaryDirectory(prefix="archiver-changeovers-", ignore_cleanup_errors=True) as name:
        place = Path(name)
        place.chmod(0o755)
        _measure(table, "SQLite", f"sqlite:///{place / 'archiver.db'}", place / "sqlite", None)
        with postgres(place / "pg") as server:
            url = server.create_database("changeovers")
            _measure(table, "PostgreSQL", url, place / "postgres", server.pid)
    Console().print(table)


if __name__ == "__main__":
    main()

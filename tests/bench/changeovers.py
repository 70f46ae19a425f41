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
from types import MappingProxyType

from rich.console import Console
from rich.table import Table

from archiver import observe
from archiver.db.before import BeforePoll
from archiver.model import PollReport
from archiver.worker import ActiveLease, Chance, Over, Worker
from tests.bench.machine import cpu_seconds_of
from tests.harness.postgres import postgres
from tests.harness.scripted_pop3 import MailboxPlay
from tests.scenarios.story import LEASE_SECONDS, Archive

_AT_ONCE = (2, 4, 16)
_ACCOUNTS = 64
_POLLS = 1_200
_ROUNDS = 5


class _Changing(Worker):
    """Its polls are over as soon as they begin."""

    leases: Sequence[ActiveLease] = ()
    before: Mapping[str, BeforePoll] = MappingProxyType({})

    def _begin(
        self, leases: list[ActiveLease], before: Mapping[str, BeforePoll] | None = None
    ) -> list[Future[PollReport]]:
        self.leases, self.before = leases, before or {}
        return []

    def change(self, places: int) -> None:
        """End the polls that began last, and begin others in so many places."""
        over = []
        for lease in self.leases:
            before = self.before[lease.claim.account_id]
            report = PollReport(before.account.name, "ok", listed=0, glanced=True, reached=True)
            over.append(Over(self._polling(lease, before), report))
        self._end_and_begin(over, places)
        if len(self.leases) != places:
            raise RuntimeError(f"{len(self.leases)} polls begin, not {places}")


def _measure(table: Table, name: str, url: str, place: Path, server_pid: int | None) -> None:
    def server_seconds() -> float:
        return 0.0 if server_pid is None else cpu_seconds_of(server_pid)

    place.mkdir()
    with Archive(url, place) as archive:
        server = archive.serve(MailboxPlay([]))
        for number in range(_ACCOUNTS):
            archive.add(server, url=f"pop3://user{number}@localhost:{server.port}", interval_seconds=0.0001)
        for at_once in _AT_ONCE:
            worker = _Changing(
                archive.ports(),
                lease_seconds=LEASE_SECONDS,
                workers=_ACCOUNTS,
                chance=Chance(lambda low, high: (low + high) / 2),
                stopping=threading.Event(),
            )
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

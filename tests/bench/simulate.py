"""Whether a fleet's arithmetic holds: real workers and PostgreSQL, servers that answer without work.

Run it by ``python -m tests.bench.simulate [--mailboxes N] [--interval SECONDS]``.
So many accounts fall due evenly over the interval; of a hundred mailboxes
seven have a message more at each poll, which is 20 a day at a poll every five
minutes. Real ``archiver run`` processes poll a mail server that answers from a
name alone, in clear, and put into a store that forgets. After one interval, in
which every mailbox is polled for the first time, the clock runs: polls,
lateness, CPU of workers and of PostgreSQL, requests, beside what ``cost.py``
says. A shorter interval is a larger fleet with fewer rows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from tests.bench.cost import MEASURED, WORKERS
from tests.bench.idle_store import IdleStore, idle_store
from tests.bench.machine import BenchError, cpu_seconds_of, measured, peak_bytes_of
from tests.harness.many_mailboxes import PASSWORD, ManyMailboxes, many_mailboxes
from tests.harness.postgres import postgres

_GROWING, _OF = 7, 100
_KNOWN_MESSAGES, _MESSAGE_OCTETS = 1, 16_000
_LOOK_SECONDS = 1.0
_UNDER_WAY = 10
_START_SECONDS = 5.0
_PATIENCE_SECONDS = 120.0
_LATE = "SELECT coalesce(max(extract(epoch FROM now() - due_at)), 0) FROM lease WHERE due_at < now()"


class Counters(NamedTuple):
    """What has been used and done so far."""

    at: float
    polls: int
    segments: int
    worker_cpu: float
    database_cpu: float
    puts: int
    messages: int


def simulate(mailboxes: int, interval: float, seconds: float, pods: int, workers: int) -> None:
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="archiver-simulate-")))
        place.chmod(0o755)
        server = stack.enter_context(postgres(place / "postgres"))
        mail = stack.enter_context(many_mailboxes(place / "mail.log"))
        store = stack.enter_context(idle_store())
        url = server.create_database("fleet")
        secret = place / "secret"
        secret.write_text(PASSWORD)
        environment = {
            **store.environment,
            "ARCHIVER_DATABASE_URL": url,
            "ARCHIVER_INTERVAL_SECONDS": str(interval),
            "ARCHIVER_WORKERS": str(workers),
            "ARCHIVER_HOST_SESSIONS": str(workers * pods),
        }
        _fill(environment, mail, mailboxes, interval, secret)
        fleet = stack.enter_context(_running(pods, environment, place))
        database = stack.enter_context(psycopg.connect(url, autocommit=True))
        _first_polls(database, fleet, 2 * interval + _PATIENCE_SECONDS)
        before = _count(database, fleet, server.pid, store)
        late = _watch(database, fleet, seconds)
        after = _count(database, fleet, server.pid, store)
        _tell(before, after, late, mailboxes / interval, [peak_bytes_of(each.pid) for each in fleet])


def _fill(
    environment: dict[str, str], mail: ManyMailboxes, mailboxes: int, interval: float, secret: Path
) -> None:
    grows = [mail.url(f"grow-{{}}-{_KNOWN_MESSAGES}-{_MESSAGE_OCTETS}")] * _GROWING
    keeps = [mail.url(f"keep-{{}}-{_KNOWN_MESSAGES}-{_MESSAGE_OCTETS}")] * (_OF - _GROWING)
    measured(
        "tests.bench.ours",
        "fill",
        environment=environment,
        accounts_count=mailboxes,
        urls=grows + keeps,
        interval_seconds=interval,
        due_after_seconds=_START_SECONDS,
        due_over_seconds=interval,
        secret_reference=f"file:{secret}",
    )


@contextmanager
def _running(
    pods: int, environment: dict[str, str], place: Path
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    processes = []
    try:
        for number in range(pods):
            with (place / f"worker-{number}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "archiver", "run"],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=log,
                        env=os.environ | environment,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _watch(
    database: "psycopg.Connection[tuple[float]]", fleet: list["subprocess.Popen[bytes]"], seconds: float
) -> float:
    """Let them work; returns how late the latest poll was, at any look."""
    ends_at, late = time.monotonic() + seconds, 0.0
    while time.monotonic() < ends_at:
        time.sleep(_LOOK_SECONDS)
        if any(process.poll() is not None for process in fleet):
            raise BenchError("a worker ended")
        [row] = database.execute(_LATE)
        late = max(late, float(row[0]))
    return late


def _first_polls(
    database: "psycopg.Connection[tuple[float]]", fleet: list["subprocess.Popen[bytes]"], seconds: float
) -> None:
    """Wait until every mailbox was polled once, which no poll of a fleet that runs for years resembles."""
    ends_at, left = time.monotonic() + seconds, 1
    while left:
        _watch(database, fleet, _LOOK_SECONDS)
        [row] = database.execute(
            "SELECT count(*) FROM lease WHERE token = 0 OR owner IS NOT NULL AND token = 1"
        )
        left = int(row[0])
        if time.monotonic() > ends_at:
            raise BenchError(f"{left} mailboxes were not polled in {seconds:.0f} s")


def _count(
    database: "psycopg.Connection[tuple[float]]",
    fleet: list["subprocess.Popen[bytes]"],
    postgres_pid: int,
    store: IdleStore,
) -> Counters:
    [row] = database.execute("SELECT (SELECT sum(token) FROM lease), (SELECT sum(sequence) FROM journal)")
    polls, segments = (int(value) for value in row)
    [messages] = database.execute("SELECT count(*) FROM capture")
    puts = store.counts().get("PUT", 0)
    return Counters(
        at=time.monotonic(),
        polls=polls,
        segments=segments,
        worker_cpu=sum(cpu_seconds_of(process.pid) for process in fleet),
        database_cpu=cpu_seconds_of(postgres_pid),
        puts=puts,
        messages=int(messages[0]),
    )


def _tell(before: Counters, after: Counters, late: float, wanted: float, peaks: list[int]) -> None:
    seconds = after.at - before.at
    polls, segments = after.polls - before.polls, after.segments - before.segments
    messages, puts = after.messages - before.messages, after.puts - before.puts
    worker, database = after.worker_cpu - before.worker_cpu, after.database_cpu - before.database_cpu
    costs = MEASURED
    of_messages = messages * costs.message_worker_ms + segments * costs.batch_worker_ms
    by_cost_worker = (polls * costs.poll_worker_ms + of_messages) / 1000 / seconds
    by_cost_database = polls * costs.poll_database_ms + segments * costs.batch_database_ms
    by_cost_database /= 1000 * seconds
    poll_ms, database_ms = worker * 1000 / polls, database * 1000 / polls
    lines = (
        f"polls a second            {polls / seconds:8.1f}   due: {wanted:.1f}",
        f"latest poll, behind       {late:8.1f} s",
        f"messages a second         {messages / seconds:8.2f}",
        f"segments                  {segments:8d}   with messages {messages + segments}, PUTs {puts}",
        f"worker cores              {worker / seconds:8.3f}   by cost.py: {by_cost_worker:.3f}",
        f"PostgreSQL cores          {database / seconds:8.3f}   by cost.py: {by_cost_database:.3f}",
        f"worker CPU of a poll      {poll_ms:8.2f} ms, PostgreSQL's {database_ms:.2f} ms",
        f"worker memory             {max(peaks) / 1024**2:8.0f} MiB",
    )
    sys.stdout.write("\n".join(lines) + "\n")
    # What was under way at either end is on one side only.
    if abs(puts - messages - segments) > max(_UNDER_WAY, 0.02 * puts):
        raise BenchError("some PUTs were of neither a message nor a segment")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mailboxes", type=int, default=10_000)
    parser.add_argument("--interval", type=float, default=300.0, help="seconds between polls of one")
    parser.add_argument("--seconds", type=float, default=120.0, help="to measure, after one interval")
    parser.add_argument("--pods", type=int, default=2)
    parser.add_argument("--workers", type=int, default=WORKERS, help="of each pod")
    arguments = parser.parse_args()
    simulate(arguments.mailboxes, arguments.interval, arguments.seconds, arguments.pods, arguments.workers)


if __name__ == "__main__":
    main()

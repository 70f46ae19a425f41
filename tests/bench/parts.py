"""Rows of single parts: the PUT (e), the database (g), how soon a process is there (i)."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial

from archiver.demo import processes
from tests.bench import peers
from tests.bench.contest import Contender, Goal, Measured, Sample, compete
from tests.bench.machine import (
    BenchError,
    Cost,
    cpu_seconds_of,
    machine_cpu_seconds,
    measured,
    peak_bytes_of,
    run,
)
from tests.bench.one_mailbox import check_objects, lean_puts
from tests.bench.stage import BUCKET, CLIENTS, OURS, Archive, Stage

_PUT_THREADS = 8
_BATCH_MESSAGES = 100  # ARCHIVER_BATCH_MESSAGES, as it is when nobody sets it
_READY_SECONDS = 60.0
_LOOK_SECONDS = 0.01


def puts(stage: Stage) -> Measured:
    """Row e."""
    box = stage.corpus.all
    common = {"directory": str(stage.corpus.messages), "count": box.count, "threads": _PUT_THREADS}

    def ours(name: str) -> Sample:
        environment = stage.s3.environment | {"ARCHIVER_STORE_URL": f"s3://{BUCKET}"}
        cost = measured(OURS, "put", environment=environment, prefix=name, **common)
        check_objects(stage, name, box)
        return Sample.of(cost, box.count, box.octets)

    def boto3(name: str) -> Sample:
        cost = measured(
            CLIENTS,
            "boto3",
            environment=stage.s3.environment,
            bucket=BUCKET,
            prefix=name,
            endpoint_url=stage.s3.endpoint_url,
            **common,
        )
        check_objects(stage, name, box)
        return Sample.of(cost, box.count, box.octets)

    def obstore(name: str) -> Sample:
        with lean_puts(stage, name, box.count, _PUT_THREADS) as child:
            child.go()
            cost = child.cost()
        check_objects(stage, name, box)
        return Sample.of(cost, box.count, box.octets)

    def s5cmd(name: str) -> Sample:
        cost = peers.s5cmd(
            stage.peers.there("s5cmd"),
            stage.corpus.messages,
            endpoint_url=stage.s3.endpoint_url,
            target=f"s3://{BUCKET}/{name}/",
            environment=stage.s3.environment,
        )
        check_objects(stage, name, box)
        return Sample.of(cost, box.count, box.octets)

    contest = compete(
        "PUT of the messages to SeaweedFS, plain http",
        "objects",
        [
            Contender("archiver", ours, "SHA-256 checksum, If-None-Match, retries"),
            Contender(
                "obstore",
                obstore,
                "no checksum, no condition",
                missing=None if stage.peers.python else "obstore is not installed",
            ),
            Contender("boto3 put_object", boto3, "SHA-256 checksum, If-None-Match"),
            Contender(
                "s5cmd",
                s5cmd,
                f"from files, {peers.S5CMD_WORKERS} workers, no condition; process start included",
                missing=stage.peers.missing("s5cmd"),
            ),
        ],
        rounds=stage.scale.rounds,
        seconds=90,
        tag="e",
    )
    return Measured(
        [contest],
        (
            Goal("archiver / obstore, 8 threads each", contest.ratio("archiver", "obstore"), 0.85, ">="),
            Goal(
                "archiver / boto3 put_object, 8 threads each",
                contest.ratio("archiver", "boto3 put_object"),
                1.7,
                ">=",
            ),
            Goal("ms of client CPU a PUT", contest.median("archiver", "client_cpu_ms"), 0.5, "<="),
        ),
        (
            (
                "Before the clock starts, the messages are in memory, hashed where a checksum is sent, and "
                "every connection is open. s5cmd starts, opens connections and reads files within its time."
            ),
        ),
    )


def rows(stage: Stage) -> Measured:
    """Row g."""
    batches = stage.scale.batches
    statements: dict[str, dict[str, int]] = {}

    def turn(name: str, make: Callable[[str], Archive], tag: str) -> Sample:
        archive = make(tag)
        before = stage.postgres_cpu_seconds() if archive.directory is None else 0.0
        cost = measured(
            OURS, "record", environment=archive.environment, batches=batches, size=_BATCH_MESSAGES
        )
        used = stage.postgres_cpu_seconds() - before if archive.directory is None else 0.0
        if cost.told["count"] != batches * _BATCH_MESSAGES:
            raise BenchError(f"the database has {cost.told['count']} captures of {batches * _BATCH_MESSAGES}")
        statements[name] = cost.told["statements"]
        return Sample.of(cost, batches * _BATCH_MESSAGES, 0, server_cpu_seconds=used)

    # A bucket is where an archive in PostgreSQL has its objects; none is written here.
    makes = {"SQLite": stage.in_directory, "PostgreSQL": stage.in_bucket}
    contest = compete(
        f"Database work of a backfill, batches of {_BATCH_MESSAGES}",
        "messages",
        [
            Contender(
                name, partial(turn, name, make), "contents looked up; captures, sightings, journal, feed"
            )
            for name, make in makes.items()
        ],
        rounds=min(3, stage.scale.rounds),
        seconds=60,
        tag="g",
    )
    spreads = [max(of.values()) / min(of.values()) for of in statements.values()]
    return Measured(
        [contest],
        (
            Goal("ms of CPU a message, SQLite", contest.median("SQLite", "client_cpu_ms"), 0.03, "<="),
            Goal(
                "ms of client CPU a message, PostgreSQL",
                contest.median("PostgreSQL", "client_cpu_ms"),
                0.05,
                "<=",
            ),
            Goal("statements of a batch of 500 / of a batch of 10", max(spreads), 1.0, "<="),
        ),
        facts={"statements": statements},
    )


def starts(stage: Stage) -> Measured:
    """Row i."""
    in_directory, in_bucket = stage.in_directory("start"), stage.in_bucket("start")
    secret = stage.directory("secret") / "password"
    secret.write_text("secret")
    count = stage.scale.accounts
    for archive in (in_directory, in_bucket):
        measured(
            OURS,
            "fill",
            environment=archive.environment,
            accounts_count=count,
            # Nobody listens there; and none of them is due before the process is ready.
            urls=["pop3://user{}@127.0.0.1:9"],
            interval_seconds=300.0,
            due_after_seconds=3600.0,
            due_over_seconds=300.0,
            secret_reference=f"file:{secret}",
        )

    def help_text(_: str) -> Sample:
        cost = run([sys.executable, "-m", "archiver", "--help"])
        return Sample.of(cost, 1, 0)

    def service(archive: Archive, _: str) -> Sample:
        return Sample.of(_ready(archive), 1, 0)

    contest = compete(
        f"A process, from its start; `run` until it is ready, with {count:,} accounts",
        "starts",
        [
            Contender("archiver --help", help_text),
            Contender("archiver run, SQLite", partial(service, in_directory)),
            Contender("archiver run, PostgreSQL and S3", partial(service, in_bucket)),
        ],
        rounds=stage.scale.rounds,
        seconds=60,
        tag="i",
    )
    help_ms = contest.median("archiver --help", "client_cpu_ms")
    return Measured(
        [contest],
        (
            Goal("seconds of CPU, archiver --help", None if help_ms is None else help_ms / 1000, 0.3, "<="),
            Goal("seconds until ready, SQLite", contest.median("archiver run, SQLite", "seconds"), 2.0, "<="),
            Goal(
                "seconds until ready, PostgreSQL and S3",
                contest.median("archiver run, PostgreSQL and S3", "seconds"),
                2.0,
                "<=",
            ),
        ),
    )


def _ready(archive: Archive) -> Cost:
    """`archiver run` from its start until /readyz says so."""
    [port] = processes.free_ports(1)
    environment = os.environ | archive.environment | {"ARCHIVER_HTTP_LISTEN": f"127.0.0.1:{port}"}
    machine, began = machine_cpu_seconds(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "archiver", "run"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        while not _answers(f"http://127.0.0.1:{port}/readyz"):
            if process.poll() is not None or time.perf_counter() - began > _READY_SECONDS:
                raise BenchError("archiver run did not get ready")
            time.sleep(_LOOK_SECONDS)
        seconds = time.perf_counter() - began
        cpu, peak = cpu_seconds_of(process.pid), peak_bytes_of(process.pid)
        return Cost(seconds, cpu, machine_cpu_seconds() - machine, peak)
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False

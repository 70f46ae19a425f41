"""What a row is played on: the servers, fresh for each row; the mail, which stays; the peers.

A row takes what it needs from a ``Stage`` and leaves nothing running behind.
What it wrote stays until the run ends (see ``disk``).
"""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from archiver.demo import processes
from archiver.demo.dovecot import Dovecot
from tests.bench.contest import Sample
from tests.bench.corpus import PASSWORD, Corpus, Mailbox, Scale
from tests.bench.machine import BenchError, Child, Cost, cpu_seconds_of, measured
from tests.bench.peers import Peers, Server
from tests.bench.proxy import FarLine, far_line
from tests.bench.service import Service, service
from tests.harness.postgres import Postgres, postgres
from tests.harness.seaweedfs import SeaweedFS, seaweedfs

ROUND_TRIP_SECONDS = 0.04
LINE_OCTETS_PER_SECOND = 100e6 / 8
BUCKET = "bench"
POLLS = 16
"""The archiver's at once, and of clients beside it, where nothing else is said."""
OURS, CLIENTS = "tests.bench.ours", "tests.bench.clients"


@dataclass(frozen=True, slots=True)
class Archive:
    """Where the archiver keeps things in one turn or several, as its environment says it."""

    environment: dict[str, str]
    directory: Path | None
    prefix: str


class Stage:
    """Servers and places of one row. Made by ``stage``."""

    def __init__(self, place: Path, scratch: Path, scale: Scale, peers: Peers, stack: ExitStack) -> None:
        self.scale = scale
        self.peers = peers
        self.corpus = Corpus(place, scale)
        self.scratch = scratch
        self._stack = stack
        self._numbers = itertools.count(1)

    @cached_property
    def mail(self) -> Dovecot:
        """Dovecot, on loopback, over TLS; its indexes are on the disk from the first session on."""
        server: Dovecot = self._stack.enter_context(self.corpus.served())
        return server

    @cached_property
    def s3(self) -> SeaweedFS:
        server: SeaweedFS = self._stack.enter_context(seaweedfs(self.scratch / "s3"))
        server.create_bucket(BUCKET)
        return server

    @cached_property
    def postgres(self) -> Postgres:
        server: Postgres = self._stack.enter_context(postgres(self.scratch / "postgres"))
        return server

    @cached_property
    def far(self) -> FarLine:
        """A line of 40 ms round trip and 100 Mbit/s to the mail server."""
        line: FarLine = self._stack.enter_context(
            far_line(
                self.mail.pop3s_port,
                round_trip_seconds=ROUND_TRIP_SECONDS,
                bytes_per_second=LINE_OCTETS_PER_SECOND,
            )
        )
        return line

    @cached_property
    def short(self) -> FarLine:
        """The same process without latency or limit: what it could carry."""
        line: FarLine = self._stack.enter_context(
            far_line(self.mail.pop3s_port, round_trip_seconds=0.0, bytes_per_second=1e12)
        )
        return line

    def postgres_cpu_seconds(self) -> float:
        """What PostgreSQL has used so far, all its processes."""
        return cpu_seconds_of(self.postgres.pid)

    def directory(self, name: str, disk: Path | None = None) -> Path:
        """An empty directory that the servers' user may enter, on the disk of the mail or another one."""
        path = (disk or self.scratch) / f"{name}-{next(self._numbers)}"
        path.mkdir(parents=True)
        processes.give(path)
        return path

    def server(self, line: FarLine | None = None) -> Server:
        """The mail server, near or at the end of a line."""
        return Server(self.mail.pop3s_port if line is None else line.port, self.mail.ca_file)

    def access(self, line: FarLine | None = None) -> dict[str, Any]:
        """The same for a client in Python."""
        server = self.server(line)
        return {"port": server.port, "ca_file": str(server.ca_file), "password": PASSWORD}

    def in_bucket(self, name: str) -> Archive:
        """A new archive in S3 and PostgreSQL."""
        prefix = f"{name}-{next(self._numbers)}"
        database = self.postgres.create_database(prefix.replace("-", "_"))
        environment = {
            **self.s3.environment,
            "ARCHIVER_STORE_URL": f"s3://{BUCKET}/{prefix}",
            "ARCHIVER_DATABASE_URL": database,
        }
        return Archive(environment, None, prefix)

    def in_directory(self, name: str, disk: Path | None = None) -> Archive:
        """A new archive in a directory and SQLite."""
        directory = self.directory(name, disk)
        environment = {
            "ARCHIVER_STORE_URL": f"file:{directory / 'store'}",
            "ARCHIVER_DATABASE_URL": f"sqlite:///{directory / 'archiver.db'}",
        }
        return Archive(environment, directory, "")

    def objects(self, prefix: str) -> list[int]:
        """The sizes of the objects below a prefix of the bucket, as the store tells them."""
        client = self.s3.session().client("s3", endpoint_url=self.s3.endpoint_url)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        sizes = [found["Size"] for page in pages for found in page.get("Contents", ())]
        client.close()
        return sizes

    def archived(self, archive: Archive) -> list[int]:
        """The sizes of the messages that an archive holds, seen from outside."""
        if archive.directory is None:
            return self.objects(f"{archive.prefix}/messages")
        return [file.stat().st_size for file in (archive.directory / "store" / "messages").rglob("*.eml")]

    # Turns that several rows take.

    def bare(
        self, boxes: list[Mailbox], line: FarLine | None = None, *, window: int = 0, threads: int = 1
    ) -> Sample:
        """The bare reader: everything, thrown away."""
        [count] = {box.count for box in boxes}
        cost = measured(
            CLIENTS,
            "download",
            users=[box.user for box in boxes],
            count=count,
            window=window,
            threads=threads,
            **self.access(line),
        )
        return read_whole(cost, boxes)

    def poll(self, archive: Archive, boxes: list[Mailbox], line: FarLine | None = None) -> Sample:
        """The archiver's first poll of these mailboxes, everything stored; the objects are counted."""
        cost = measured(
            OURS,
            "poll",
            environment=archive.environment | {"ARCHIVER_WORKERS": str(POLLS)},
            users=[box.user for box in boxes],
            **self.access(line),
        )
        sample = read_whole(cost, boxes)
        sizes = self.archived(archive)
        if (len(sizes), sum(sizes)) != (sample.units, sample.octets):
            raise BenchError(f"the archive holds {len(sizes)} messages of {sum(sizes)} octets: {sample}")
        return sample

    @contextmanager
    def service(
        self, archive: Archive, line: FarLine | None = None, *, polls: int, interval_seconds: float
    ) -> Iterator[Service]:
        """``archiver run`` on an archive whose accounts exist, near or at the end of a line."""
        with service(
            archive.environment,
            self.directory("service"),
            url=f"pop3s://{{}}@{processes.HOST}:{self.server(line).port}",
            password=PASSWORD,
            polls=polls,
            interval_seconds=interval_seconds,
        ) as running:
            yield running


def read_whole(cost: Cost, boxes: list[Mailbox]) -> Sample:
    """A sample of a client that tells how much it read. Raises BenchError if that was not all."""
    count, octets = sum(box.count for box in boxes), sum(box.octets for box in boxes)
    if cost.told["count"] != count or cost.told["octets"] < octets:
        raise BenchError(f"read {cost.told}, not {count} messages of {octets} octets")
    return Sample.of(cost, count, octets)


def together(*children: Child) -> list[Cost]:
    """The work of several clients at once."""
    for child in children:
        child.go()
    return [child.cost() for child in children]


@contextmanager
def stage(place: Path, scratch: Path, scale: Scale, peers: Peers) -> Iterator[Stage]:
    """A stage with nothing on it, which writes into a new directory of ``scratch``."""
    own = next(path for number in itertools.count(1) if not (path := scratch / str(number)).exists())
    own.mkdir()
    with ExitStack() as stack:
        yield Stage(place, own, scale, peers, stack)

"""Rows of many mailboxes: their first archive (c), and polls of them with nothing new (d), near and far."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench import peers
from tests.bench.contest import Contender, Contest, Goal, Measured, Sample, compete
from tests.bench.corpus import Mailbox
from tests.bench.machine import BenchError, measured
from tests.bench.proxy import FarLine
from tests.bench.service import ONCE_SECONDS
from tests.bench.stage import CLIENTS, POLLS, Archive, Stage

MPOPS = 8
MPOP = f"mpop, {MPOPS} processes"
FAR_POLLS = 64  # what waits for a line costs next to nothing: operators of far servers set it so
IN_DIRECTORY, IN_BUCKET = "archiver, directory and SQLite", "archiver, S3 and PostgreSQL"
_WORK = {IN_DIRECTORY: "directory, journal, SQLite; fsync each", IN_BUCKET: "S3, journal, PostgreSQL"}


def first_archives(stage: Stage) -> Measured:
    """Row c."""
    boxes = stage.corpus.many
    _warm(stage, boxes)
    near = _first(stage, boxes, None, "near", "c")
    few = boxes[: stage.scale.far_mailboxes]
    far = _first(stage, few, stage.far, "40 ms and 100 Mbit/s", "cf")
    line = _bare(POLLS)
    return Measured(
        [near, far],
        (
            Goal(
                "near: archiver in a directory / mpop with 8 processes",
                near.ratio(IN_DIRECTORY, MPOP),
                1.2,
                ">=",
            ),
            Goal(
                "near: archiver in S3 / mpop with 8 processes to files",
                near.ratio(IN_BUCKET, MPOP),
                1.2,
                ">=",
            ),
            Goal("far: archiver in a directory / bare readers", far.ratio(IN_DIRECTORY, line), 0.95, ">="),
            Goal("far: archiver in S3 / bare readers", far.ratio(IN_BUCKET, line), 0.95, ">="),
        ),
        (f"The archiver polls {POLLS} mailboxes at once, and so do the bare readers.",),
    )


def _first(stage: Stage, boxes: list[Mailbox], line: FarLine | None, where: str, tag: str) -> Contest:
    def ours(make: Callable[[str], Archive], name: str) -> Sample:
        return stage.poll(make(name), boxes, line)

    def mpop(name: str) -> Sample:
        directory = stage.directory(name)
        files = peers.mpop_files(directory, stage.server(line), boxes)
        cost = peers.mpop(stage.peers.there("mpop"), files, MPOPS)
        for box in boxes:
            peers.check_maildir("mpop", directory / box.user / "mail", box)
        return Sample.of(cost, sum(box.count for box in boxes), sum(box.octets for box in boxes))

    return compete(
        f"{len(boxes)} mailboxes of {stage.scale.in_each}, {where}",
        "messages",
        [
            Contender(IN_DIRECTORY, partial(ours, stage.in_directory), _WORK[IN_DIRECTORY]),
            Contender(IN_BUCKET, partial(ours, stage.in_bucket), _WORK[IN_BUCKET]),
            Contender(MPOP, mpop, "Maildir, fsync each", missing=stage.peers.missing("mpop")),
            Contender(_bare(POLLS), lambda _: stage.bare(boxes, line, threads=POLLS), "keep nothing"),
        ],
        rounds=min(3, stage.scale.rounds),
        seconds=100,
        tag=tag,
    )


def nothing_new(stage: Stage) -> Measured:
    """Row d. Every contender has fetched everything before, which is not timed."""
    boxes = stage.corpus.many
    _warm(stage, boxes)
    archives = {IN_DIRECTORY: stage.in_directory("idle"), IN_BUCKET: stage.in_bucket("idle")}
    for archive in archives.values():
        stage.poll(archive, boxes)
    known = _Known(stage, boxes, archives, stage.directory("idle-mpop"))
    near = known.compete(None, POLLS, "near", "d")
    far = known.compete(stage.far, FAR_POLLS, "40 ms and 100 Mbit/s", "df")
    return Measured(
        [near, far],
        (
            Goal(
                "near: archiver with SQLite / bare clients, 16 at once",
                near.ratio(IN_DIRECTORY, _bare(POLLS)),
                0.9,
                ">=",
            ),
            Goal(
                "near: archiver with PostgreSQL / bare clients, 16 at once",
                near.ratio(IN_BUCKET, _bare(POLLS)),
                0.9,
                ">=",
            ),
            Goal(
                f"far: archiver with SQLite, {FAR_POLLS} at once / mpop with 8 processes",
                far.ratio(IN_DIRECTORY, MPOP),
                5,
                ">=",
            ),
            Goal(
                f"far: archiver with PostgreSQL, {FAR_POLLS} at once / mpop with 8 processes",
                far.ratio(IN_BUCKET, MPOP),
                5,
                ">=",
            ),
            Goal(
                "ms of CPU of a poll, SQLite, the whole process",
                near.median(IN_DIRECTORY, "client_cpu_ms"),
                1.5,
                "<=",
            ),
            Goal("ms of CPU of a poll, PostgreSQL's own included", _with_database(near), 1.5, "<="),
        ),
        (
            (
                f"Far, ARCHIVER_WORKERS and ARCHIVER_HOST_SESSIONS are {FAR_POLLS}, and the bare client has "
                f"{FAR_POLLS} threads. mpop has {MPOPS} processes in both."
            ),
            (
                "The archiver is `archiver run`, whose accounts are all due at once. It polled each account "
                "before the clock starts, so STAT and the last UIDL show that nothing changed. The others "
                "list. The wait for its clock tick, at most a second, counts for its CPU but not its time."
            ),
        ),
    )


def _with_database(contest: Contest) -> float | None:
    client, server = (
        contest.median(IN_BUCKET, "client_cpu_ms"),
        contest.median(IN_BUCKET, "server_cpu_ms"),
    )
    return None if client is None or server is None else client + server


@dataclass(frozen=True, slots=True)
class _Known:
    """Archives and Maildirs that have all of the mailboxes."""

    stage: Stage
    boxes: list[Mailbox]
    archives: dict[str, Archive]
    maildirs: Path

    def compete(self, line: FarLine | None, polls: int, where: str, tag: str) -> Contest:
        stage = self.stage
        missing = stage.peers.missing("mpop")
        if missing is None and line is None:
            files = peers.mpop_files(self.maildirs, stage.server(), self.boxes)
            peers.mpop(stage.peers.there("mpop"), files, MPOPS)
        return compete(
            f"{len(self.boxes)} mailboxes with nothing new, {where}",
            "mailboxes",
            [
                *(
                    Contender(name, partial(self._ours, name, line, polls), _WORK[name])
                    for name in self.archives
                ),
                Contender(MPOP, partial(self._mpop, line), "its file of UIDLs", missing=missing),
                Contender(_bare(polls), partial(self._bare, line, polls), "UIDL and LIST, remember nothing"),
            ],
            rounds=min(3, stage.scale.rounds),
            seconds=90,
            tag=tag,
        )

    def _ours(self, name: str, line: FarLine | None, polls: int, _: str) -> Sample:
        archive, count = self.archives[name], len(self.boxes)
        with self.stage.service(archive, line, polls=polls, interval_seconds=ONCE_SECONDS) as service:
            service.settle()
            before = self.stage.postgres_cpu_seconds()
            cost = service.polled()
            used = self.stage.postgres_cpu_seconds() - before if archive.directory is None else 0.0
        listed = sum(box.count for box in self.boxes)
        expected = {"polls": count, "accounts": count, "glanced": count, "listed": listed, "new": 0}
        if cost.told != expected:
            raise BenchError(f"the service did {cost.told}, not {expected}")
        return Sample.of(cost, count, 0, server_cpu_seconds=used)

    def _mpop(self, line: FarLine | None, _: str) -> Sample:
        port = self.stage.server(line).port
        files = [self.maildirs / box.user / "mpoprc" for box in self.boxes]
        for file in files:
            lines = file.read_text().splitlines()
            file.write_text(
                "".join(f"port {port}\n" if each.startswith("port ") else f"{each}\n" for each in lines)
            )
        cost = peers.mpop(self.stage.peers.there("mpop"), files, MPOPS)
        for box in self.boxes:
            peers.check_maildir("mpop", self.maildirs / box.user / "mail", box)
        return Sample.of(cost, len(self.boxes), 0)

    def _bare(self, line: FarLine | None, polls: int, _: str) -> Sample:
        cost = measured(CLIENTS, "idle", users=self._users, threads=polls, **self.stage.access(line))
        listed = sum(box.count for box in self.boxes)
        if (cost.told["count"], cost.told["listed"]) != (len(self.boxes), listed):
            raise BenchError(f"saw {cost.told}, not {listed} messages")
        return Sample.of(cost, len(self.boxes), 0)

    @property
    def _users(self) -> list[str]:
        return [box.user for box in self.boxes]


def _bare(threads: int) -> str:
    return f"bare clients, {threads} at once"


def _warm(stage: Stage, boxes: list[Mailbox]) -> None:
    """Dovecot's indexes and the page cache, for all from here on."""
    stage.bare(boxes, threads=MPOPS)

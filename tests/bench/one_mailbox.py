"""Rows of one mailbox: a whole first archive, near (a) and far (b); to a directory (f); a long listing (h);
the POP3 client alone, and its windows (w); the line itself (l)."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.bench import disk, peers
from tests.bench.contest import Contender, Contest, Goal, Measured, Sample, compete
from tests.bench.corpus import Mailbox
from tests.bench.machine import BenchError, Child, file_system, measured
from tests.bench.proxy import FarLine
from tests.bench.service import AT_ONCE_SECONDS, ONCE_SECONDS
from tests.bench.stage import BUCKET, CLIENTS, LINE_OCTETS_PER_SECOND, OURS, Stage, together

BARE, POPLIB = "bare pipelined reader", "poplib loop"
_GLANCES = 10
_ROOM, _JOURNAL = 3, 512 * 1024**2  # octets of disk for each of the mail that either side keeps, and beside
UPLOADS = 16  # ARCHIVER_UPLOADS, as it is when nobody sets it


def backfill(stage: Stage) -> Measured:
    """Row a."""
    box = stage.corpus.all
    stage.bare([box])  # Dovecot's indexes and the page cache are warm for all from here on

    def ours(name: str) -> Sample:
        return stage.poll(stage.in_bucket(name), [box])

    contest = compete(
        "One mailbox, near",
        "messages",
        [
            Contender("archiver", ours, "S3, journal, PostgreSQL; process warm"),
            _mpop_then_s5cmd(stage, box),
            _limits(stage, box),
            Contender(BARE, lambda _: stage.bare([box]), "keeps nothing"),
            _mpop(stage, box, None),
        ],
        rounds=stage.scale.rounds,
        seconds=120,
        tag="a",
    )
    goals = (
        Goal(
            "archiver / (mpop, then s5cmd), messages a second",
            contest.ratio("archiver", "mpop, then s5cmd"),
            1.3,
            ">=",
        ),
        Goal(
            "archiver / the slower of the two limits at once",
            contest.ratio("archiver", "reader and PUTs at once"),
            0.85,
            ">=",
        ),
    )
    return Measured(
        [contest],
        goals,
        (
            (
                "In the archiver's favour: its process runs already, as the service does, while mpop and "
                "s5cmd take some milliseconds to start. The archiver's start has its own column."
            ),
            (
                "In their favour: mpop and s5cmd keep no journal and no hash, and check no checksum. mpop "
                "waits for the disk (fsync) where the archiver waits for the store."
            ),
        ),
    )


def far_backfill(stage: Stage) -> Measured:
    """Row b."""
    box, line = stage.corpus.all, stage.far
    stage.bare([box])

    def ours(name: str) -> Sample:
        return stage.poll(stage.in_bucket(name), [box], line)

    contest = compete(
        "One mailbox, 40 ms and 100 Mbit/s",
        "messages",
        [
            Contender("archiver", ours, "S3, journal, PostgreSQL; process warm"),
            Contender(BARE, lambda _: stage.bare([box], line), "keeps nothing"),
            _mpop(stage, box, line),
            _by_poplib(stage, box, line),
            _getmail(stage, box, line, rounds=1),
            _fetchmail(stage, box, line, rounds=1),
        ],
        rounds=min(3, stage.scale.rounds),
        seconds=1_000,
        tag="b",
    )
    goals = (
        Goal("archiver / bare pipelined reader", contest.ratio("archiver", BARE), 0.95, ">="),
        Goal("archiver / mpop that only writes files", contest.ratio("archiver", "mpop"), 1.0, ">="),
        Goal("archiver / getmail6", contest.ratio("archiver", "getmail6"), 7, ">="),
        Goal("archiver / poplib", contest.ratio("archiver", POPLIB), 7, ">="),
        Goal("archiver / fetchmail", contest.ratio("archiver", "fetchmail"), 12, ">="),
    )
    return Measured([contest], goals)


def to_directory(stage: Stage) -> Measured:
    """Row f. On a machine whose disk has no journal, which is rare, also to one that has."""
    box = stage.corpus.all
    stage.bare([box])
    beside = [
        _fetchmail(stage, box, None),
        _getmail(stage, stage.corpus.few, None),
        Contender(BARE, lambda _: stage.bare([box]), "keeps nothing"),
    ]
    contest = _to_disk(stage, "One mailbox to the disk, near", "f", beside=beside)
    contests, notes = [contest], []
    goals = [_as_fast_as_mpop(contest, "same disk")]
    if file_system(stage.scratch) == disk.WITHOUT_A_JOURNAL:
        try:
            journaled = disk.with_journal(stage.scratch, _ROOM * box.octets * stage.scale.rounds + _JOURNAL)
        except BenchError as error:
            notes.append(f"This disk has no journal, and ext4 with a journal could not be made: {error}.")
        else:
            contests.append(
                _to_disk(stage, "One mailbox to ext4 with a journal, near", "fj", journaled=journaled)
            )
            goals.append(_as_fast_as_mpop(contests[-1], "same ext4 with a journal"))
            notes.append(
                "This machine's disk has no journal, which is rare for a disk with an archive. So the row is "
                "repeated on ext4 with its default options, in a file on that disk."
            )
    return Measured(contests, goals, notes)


def _to_disk(
    stage: Stage,
    title: str,
    tag: str,
    *,
    journaled: Path | None = None,
    beside: Sequence[Contender] = (),
) -> Contest:
    box = stage.corpus.all

    def ours(name: str) -> Sample:
        return stage.poll(stage.in_directory(name, journaled), [box])

    return compete(
        title,
        "messages",
        [
            Contender("archiver", ours, "directory, journal, SQLite; fsync each; process warm"),
            _mpop(stage, box, None, journaled),
            *beside,
        ],
        rounds=stage.scale.rounds,
        seconds=120,
        tag=tag,
    )


def _as_fast_as_mpop(contest: Contest, disk: str) -> Goal:
    return Goal(f"archiver / mpop, {disk}, fsync on both sides", contest.ratio("archiver", "mpop"), 1.0, ">=")


def long_listing(stage: Stage) -> Measured:
    """Row h. In each round one message is delivered; a session that does not count has the server find it."""
    user = stage.corpus.serve_listed(stage.mail)
    listed = int(measured(CLIENTS, "count-only", user=user, **stage.access()).told["listed"])
    archive = stage.in_directory("listed")
    known = measured(OURS, "know", environment=archive.environment, user=user, **stage.access())
    if known.told["count"] != listed:
        raise BenchError(f"the server shows {listed} messages, and {known.told['count']} became known")

    numbers = itertools.count(1)

    def deliver() -> None:
        # Each another one: what is archived already is not new.
        text = b"From: b@contoso.example\r\nSubject: new\r\n\r\n%d\r\n" % next(numbers)
        stage.mail.deliver(user, [text])
        measured(CLIENTS, "count-only", user=user, **stage.access())

    def ours(new: int, _: str, *, whole: bool = False) -> Sample:
        polls = 1 if new else _GLANCES
        interval_seconds = ONCE_SECONDS if new else AT_ONCE_SECONDS
        with stage.service(archive, polls=1, interval_seconds=interval_seconds) as service:
            service.settle()
            if new:
                deliver()
            if whole:
                service.distrust()
            cost = service.polled(polls)
        glanced = 0 if new else cost.told["polls"]
        if (cost.told["new"], cost.told["glanced"]) != (new, glanced) or cost.told["polls"] < polls:
            raise BenchError(f"the service did {cost.told}, not {polls} polls with {new} new")
        return Sample.of(cost, cost.told["polls"], 0)

    def bare(work: str, _: str) -> Sample:
        return Sample.of(measured(CLIENTS, work, user=user, **stage.access()), 1, 0)

    listing, count = "bare listing and one RETR", "bare login, STAT and QUIT"
    contest = compete(
        f"A mailbox of {stage.scale.listed:,} messages that are kept on the server",
        "polls",
        [
            Contender("archiver, one new", partial(ours, 1), "SQLite, directory; lists what came"),
            Contender("archiver, one new, all listed", partial(ours, 1, whole=True), "SQLite, directory"),
            Contender("archiver, nothing new", partial(ours, 0), "SQLite, directory"),
            Contender(listing, partial(bare, "one-of-many"), "UIDL and LIST; keeps nothing"),
            Contender(count, partial(bare, "count-only"), "lists nothing"),
        ],
        rounds=stage.scale.rounds,
        seconds=60,
        tag="h",
    )
    goals = (
        Goal(
            "archiver with one new / bare listing and one RETR, seconds",
            contest.ratio("archiver, one new", listing, "seconds_each"),
            1.3,
            "<=",
        ),
        Goal(
            "archiver with nothing new / bare listing and one RETR, seconds",
            contest.ratio("archiver, nothing new", listing, "seconds_each"),
            0.05,
            "<=",
        ),
        Goal(
            "archiver with nothing new / bare listing and one RETR, client CPU",
            contest.ratio("archiver, nothing new", listing, "client_cpu_ms"),
            0.05,
            "<=",
        ),
    )
    floor, cpu_floor = (contest.ratio(count, listing, figure) for figure in ("seconds_each", "client_cpu_ms"))
    notes = (
        (
            f"A bare login with STAT and QUIT alone takes {floor:.3f} of the bare listing's time here, and "
            f"{cpu_floor:.3f} of its CPU. That is the minimum. Dovecot's own login takes most of the time."
        ),
        (
            f"The archiver is `archiver run`. With nothing new, it polls {_GLANCES} times in sequence, and "
            "STAT and the last UIDL show that nothing changed. With one new message, they show that the "
            "mailbox only grew, and it lists only the new message. At least every four hours it makes a "
            "full listing, which has its own line."
        ),
    )
    return Measured([contest], goals, notes)


def windows(stage: Stage) -> Measured:
    """Row w: the POP3 client alone, which only hashes, and how many RETRs it keeps under way."""
    box, few = stage.corpus.all, stage.corpus.few
    stage.bare([box])
    stage.bare([few])

    def client(box: Mailbox, line: FarLine | None, window: int | None, _: str) -> Sample:
        cost = measured(OURS, "client", user=box.user, window=window, **stage.access(line))
        if (cost.told["count"], cost.told["octets"]) != (box.count, box.octets):
            raise BenchError(f"read {cost.told} of {box}")
        return Sample.of(cost, box.count, box.octets)

    def bare(box: Mailbox, line: FarLine | None, _: str) -> Sample:
        return stage.bare([box], line)

    contests: list[Contest] = []
    goals: list[Goal] = []
    for title, mailbox, line, tag in (
        ("The client alone, near", box, None, "w"),
        (f"The client alone, {few.count} messages, 40 ms and 100 Mbit/s", few, stage.far, "wf"),
    ):
        contest = compete(
            title,
            "messages",
            [
                Contender(BARE, partial(bare, mailbox, line), "keeps nothing, hashes nothing"),
                Contender("archiver.pop3", partial(client, mailbox, line, None), "its own window; SHA-256"),
                *(
                    Contender(
                        f"archiver.pop3, window {window}",
                        partial(client, mailbox, line, window),
                        "SHA-256",
                        rounds=1 if line is not None and window == 1 else None,
                    )
                    for window in stage.scale.windows
                ),
            ],
            rounds=min(3, stage.scale.rounds),
            seconds=60,
            tag=tag,
        )
        contests.append(contest)
        goals.append(Goal(f"{title}: / bare reader", contest.ratio("archiver.pop3", BARE), 0.8, ">="))
    return Measured(contests, goals)


def the_line(stage: Stage) -> Measured:
    """Row l: what the line costs itself, so that nobody takes it for the client."""
    box = stage.corpus.all
    stage.bare([box])

    def through(line: FarLine, _: str) -> Sample:
        before = line.cpu_seconds()
        sample = stage.bare([box], line)
        return replace(sample, server_cpu_seconds=line.cpu_seconds() - before)

    contest = compete(
        "The line that rows b, c and d use",
        "messages",
        [
            Contender("no line", lambda _: stage.bare([box]), "bare reader"),
            Contender("a line without latency or limit", partial(through, stage.short), "bare reader"),
            Contender("40 ms and 100 Mbit/s", partial(through, stage.far), "bare reader", rounds=1),
        ],
        rounds=min(3, stage.scale.rounds),
        seconds=60,
        tag="l",
    )
    carried = contest.samples["40 ms and 100 Mbit/s"][0]
    open_line = contest.samples["a line without latency or limit"]
    most = max(sample.octets / sample.seconds for sample in open_line)
    return Measured(
        [contest],
        (
            Goal(
                "what it carries of 100 Mbit/s, login and TLS included",
                carried.octets / carried.seconds / LINE_OCTETS_PER_SECOND,
                0.9,
                ">=",
            ),
            Goal("what it could carry, in lines of 100 Mbit/s", most / LINE_OCTETS_PER_SECOND, 2.0, ">="),
        ),
    )


def _mpop(stage: Stage, box: Mailbox, line: FarLine | None, on: Path | None = None) -> Contender:
    def turn(name: str) -> Sample:
        directory, program = stage.directory(name, on), stage.peers.there("mpop")
        files = peers.mpop_files(directory, stage.server(line), [box])
        cost = peers.mpop(program, files)
        peers.check_maildir("mpop", directory / box.user / "mail", box)
        return Sample.of(cost, box.count, box.octets)

    return Contender("mpop", turn, "Maildir, fsync each", missing=stage.peers.missing("mpop"))


def _mpop_then_s5cmd(stage: Stage, box: Mailbox) -> Contender:
    def turn(name: str) -> Sample:
        directory = stage.directory(name)
        programs = stage.peers.there("mpop"), stage.peers.there("s5cmd")
        [file] = peers.mpop_files(directory, stage.server(), [box])
        cost = peers.mpop_then_s5cmd(
            programs,
            file,
            endpoint_url=stage.s3.endpoint_url,
            target=f"s3://{BUCKET}/{name}/",
            environment=stage.s3.environment,
        )
        sizes = stage.objects(name)
        if (len(sizes), sum(sizes)) != (box.count, box.lf_bytes):
            raise BenchError(f"the bucket has {len(sizes)} objects of {sum(sizes)} octets")
        return Sample.of(cost, box.count, box.octets)

    return Contender(
        "mpop, then s5cmd", turn, "Maildir, then S3", missing=stage.peers.missing("mpop", "s5cmd")
    )


def _limits(stage: Stage, box: Mailbox) -> Contender:
    """The bare reader and the leanest PUTs at once, each alone at its work: the slower one counts."""

    def turn(name: str) -> Sample:
        reader = Child(
            CLIENTS, "download", users=[box.user], count=box.count, window=0, threads=1, **stage.access()
        )
        writer = lean_puts(stage, name, box.count, UPLOADS)
        with reader, writer:
            costs = together(reader, writer)
        check_objects(stage, name, box)
        slower = max(costs, key=lambda cost: cost.seconds)
        cpu = sum(cost.client_cpu_seconds for cost in costs)
        peak = sum(cost.peak_bytes for cost in costs)
        machine = max(cost.machine_cpu_seconds for cost in costs)
        return Sample(box.count, box.octets, slower.seconds, cpu, machine, peak)

    return Contender(
        "reader and PUTs at once",
        turn,
        f"two processes that know nothing of each other; {UPLOADS} threads of obstore",
        missing=None if stage.peers.python else "obstore is not installed",
    )


def lean_puts(stage: Stage, name: str, count: int, threads: int) -> Child:
    """obstore's PUTs of the corpus, ready to go."""
    if stage.peers.python is None:
        raise BenchError("obstore is not installed")
    return Child(
        CLIENTS,
        "obstore",
        python=stage.peers.python,
        environment=stage.s3.environment,
        directory=str(stage.corpus.messages),
        count=count,
        threads=threads,
        bucket=BUCKET,
        prefix=name,
        endpoint_url=stage.s3.endpoint_url,
    )


def check_objects(stage: Stage, prefix: str, box: Mailbox) -> None:
    """Whether the bucket holds a mailbox's messages, all and whole."""
    sizes = stage.objects(prefix)
    if (len(sizes), sum(sizes)) != (box.count, box.octets):
        raise BenchError(f"the bucket has {len(sizes)} objects of {sum(sizes)} octets, not those of {box}")


def _by_poplib(stage: Stage, box: Mailbox, line: FarLine | None) -> Contender:
    def turn(_: str) -> Sample:
        cost = measured(CLIENTS, "poplib", user=box.user, **stage.access(line))
        if (cost.told["count"], cost.told["octets"]) != (box.count, box.octets):
            raise BenchError(f"read {cost.told} of {box}")
        return Sample.of(cost, box.count, box.octets)

    return Contender(POPLIB, turn, "keeps nothing", rounds=1)


def _getmail(stage: Stage, box: Mailbox, line: FarLine | None, rounds: int | None = None) -> Contender:
    def turn(name: str) -> Sample:
        directory = stage.directory(name)
        cost = peers.getmail(stage.peers.there("getmail"), directory, stage.server(line), box)
        return Sample.of(cost, box.count, box.octets)

    return Contender(
        "getmail6",
        turn,
        f"Maildir; {box.count:,} messages",
        rounds=rounds or stage.scale.slow_rounds,
        missing=stage.peers.missing("getmail"),
    )


def _fetchmail(stage: Stage, box: Mailbox, line: FarLine | None, rounds: int | None = None) -> Contender:
    def turn(name: str) -> Sample:
        directory = stage.directory(name)
        cost = peers.fetchmail(
            stage.peers.there("fetchmail"), directory / "fetchmail", stage.server(line), box
        )
        return Sample.of(cost, box.count, box.octets)

    return Contender(
        "fetchmail",
        turn,
        "one file of BSMTP, no fsync",
        rounds=rounds or stage.scale.slow_rounds,
        missing=stage.peers.missing("fetchmail"),
    )

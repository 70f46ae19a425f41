"""``archiver`` killed by SIGKILL, a thousand times: ``python -m tests.soak.kill --times 1000 --seed 1``.

Real processes poll real mailboxes, by TLS, into PostgreSQL and SeaweedFS, and
delete what they archived, while mail keeps coming. Each is killed at a moment
that chance chooses: some time after its start or its login, or behind a
request that the store was seen to get. After every kill, what the server has
no more must be archived; at the end everything is, once, and ``verify`` finds
nothing.
"""

import argparse
import contextlib
import json
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from archiver.demo.corpus import corpus as generate_corpus
from archiver.demo.dovecot import Dovecot
from tests.conftest import Mailbox
from tests.harness.archive import PREFIX, Archive, Bucket
from tests.harness.cli import Cli, Running, cli
from tests.harness.postgres import postgres
from tests.harness.proxy import Proxy
from tests.harness.seaweedfs import SeaweedFS, seaweedfs
from tests.harness.witness import Witness

BOXES = 3
"""Mailboxes of a lane."""

LANES = 4
"""Sequences of processes that are killed, side by side."""

SERVICE_EVERY = 4
"""Of so many lanes, one kills ``archiver run``; the others kill ``archiver sync``."""

LATENCY_SECONDS = 0.004
"""Each way to the mail server, so that a poll's steps take a while."""

LEASE_SECONDS = 5
"""The shortest that can be set: the next service waits for it."""

BATCH_MESSAGES = 4
FIRST_MESSAGES = 12
DELIVERY_SECONDS = 2.0
"""From one delivery to the next, at most."""

START_SECONDS = 0.6
LATE_SECONDS = 0.06
"""At most, from the request at which a poll is to die until it does: more than a step takes."""

GIVE_UP_SECONDS = 12.0
"""A service may find nothing due, nor anything to do; it is killed all the same."""

SELDOM_SECONDS = 30 * 86400

_REQUEST = re.compile(rb"^(PUT|HEAD) \S+/(messages|journal)/")


class Seen(NamedTuple):
    """What passed between a lane's processes and the servers so far."""

    sessions: int
    messages: int
    segments: int
    looks: int


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill: so many of these since the start, and so much later."""

    of: str
    times: int
    late_seconds: float


@dataclass(slots=True)
class Figures:
    """What came of it. ``steps`` counts kills by what was under way."""

    kills: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    ended_before: int = 0
    delivered: int = 0
    contents: int = 0
    lost: int = 0
    twice: int = 0
    unaccounted: int = 0
    seconds: float = 0.0

    def as_json(self) -> str:
        return json.dumps(
            {name: getattr(self, name) for name in self.__slots__}, default=dict, separators=(", ", ": ")
        )


class Siege:
    """An archive whose processes are killed, ``kills`` of them."""

    def __init__(self, archive: Archive, mail: Dovecot, s3: SeaweedFS, *, kills: int, seed: int) -> None:
        self.archive = archive
        self.mail = mail
        self.s3 = s3
        self.wanted = kills
        self.chance = random.Random(seed)
        self.figures = Figures()
        self.lock = threading.Lock()
        self._contents = list(generate_corpus(60, seed, scale=0.1))
        self._numbers = count(1)

    def run(self, directory: Path, lanes: int) -> Figures:
        """Besiege, then let everything come to rest and judge. Raises AssertionError for a broken promise."""
        began = time.monotonic()
        done = threading.Event()
        with ExitStack() as stack:
            seeds = [self.chance.getrandbits(64) for _ in range(lanes)]
            made = [
                stack.enter_context(_lane(self, directory / f"lane{number}", number, seed))
                for number, seed in enumerate(seeds)
            ]
            boxes = [witness for lane in made for witness in lane.boxes]
            for witness in boxes:
                witness.deliver(self._messages(FIRST_MESSAGES))
            with ThreadPoolExecutor(lanes + 1) as pool:
                post = pool.submit(self._deliver, boxes, self.chance.getrandbits(64), done)
                try:
                    for ended in [pool.submit(lane.besiege) for lane in made]:
                        ended.result()
                finally:
                    done.set()
                post.result()
            self._come_to_rest(made)
            self._judge(boxes)
        self.figures.seconds = round(time.monotonic() - began, 1)
        return self.figures

    def another_kill(self) -> bool:
        """Whether one more is wanted; a lane that fails ends the others, too."""
        with self.lock:
            return self.figures.kills < self.wanted

    def count(self, command: str, step: str | None) -> None:
        with self.lock:
            if step is None:
                self.figures.ended_before += 1
            else:
                self.figures.kills += 1
                self.figures.steps[step] += 1
                self.figures.commands[command] += 1

    def give_up(self) -> None:
        with self.lock:
            self.wanted = 0

    def _messages(self, number: int) -> list[bytes]:
        """So many messages that nobody was sent before."""
        return [
            b"X-Delivery: %d\r\n%b" % (unique := next(self._numbers), self._contents[unique % 60])
            for _ in range(number)
        ]

    def _deliver(self, boxes: list[Witness], seed: int, done: threading.Event) -> None:
        """Mail comes all the time; now and then the same twice."""
        chance = random.Random(seed)
        while not done.wait(chance.uniform(0, DELIVERY_SECONDS)):
            messages = self._messages(chance.randint(1, 6))
            if chance.random() < 0.1:
                messages.append(messages[0])
            chance.choice(boxes).deliver(messages)

    def _come_to_rest(self, lanes: list["Lane"]) -> None:
        """What the first poll asks to be deleted, the second sees to be gone."""
        for lane in lanes:
            for _ in range(2):
                reports = lane.cli.do("sync", *lane.names, "--json").json
                assert {report["outcome"] for report in reports} == {"ok"}, reports
            assert {report["listed"] for report in reports} == {0}, reports

    def _judge(self, boxes: list[Witness]) -> None:
        figures = self.figures
        for witness in boxes:
            wanted = set(witness.delivered)
            figures.delivered += len(witness.delivered)
            figures.contents += len(wanted)
            figures.lost += len(witness.lost())
            for kept in (witness.stored(), witness.journalled()):
                figures.twice += (kept - Counter(wanted)).total()
        summary = self.archive.status()
        figures.unaccounted = summary["unaccounted"]
        for witness in boxes:
            witness.expect_each_once()
            assert witness.on_server() == set()
        assert (figures.lost, figures.twice, figures.unaccounted) == (0, 0, 0)
        self.archive.expect_proved(figures.contents)


class CountingProxy(Proxy):
    """A proxy to the store that counts its requests by verb and kind of object."""

    def __init__(self, target_port: int) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        super().__init__(target_port)

    def keep(self, lines: list[bytes]) -> None:
        for found in filter(None, map(_REQUEST.match, lines)):
            self.requests[found[1].decode(), found[2].decode()] += 1


class Lane:
    """One sequence of processes, each of which is killed; with mailboxes of its own, and seen alone."""

    def __init__(
        self, siege: Siege, runs: Cli, mail: Proxy, store: CountingProxy, number: int, seed: int
    ) -> None:
        self.siege = siege
        self.cli = runs
        self.is_service = number % SERVICE_EVERY == SERVICE_EVERY - 1
        self.chance = random.Random(seed)
        self.boxes: list[Witness] = []
        self._mail = mail
        self._store = store
        self._usual_seconds = 0.3
        for box in range(BOXES):
            self._add(f"lane{number}-{box}")

    @property
    def names(self) -> list[str]:
        return [witness.account for witness in self.boxes]

    def besiege(self) -> None:
        """Start a process, kill it, look; until there were enough."""
        try:
            while self.siege.another_kill():
                self._kill_one()
        except BaseException:
            self.siege.give_up()
            raise

    def _add(self, name: str) -> None:
        server = self.siege.mail
        box = Mailbox(server, name, f"secret of {name}")
        server.add_user(box.user, box.password)
        secret = self.cli.directory / f"password of {name}"
        secret.write_text(f"{box.password}\n")
        url = f"pop3s://{name}@{self._mail.host}:{self._mail.port}"
        access = ("--ca-file", server.ca_file, "--password-file", secret)
        interval = "1" if self.is_service else f"{SELDOM_SECONDS}"
        policy = ("--delete", "after-archived", "--interval", interval)
        assert self.cli.run("account", "add", name, url, *access, *policy).code == 0
        self.boxes.append(Witness(self.siege.archive, box, name))

    def _kill_one(self) -> None:
        moment = self._choose()
        before = self._seen()
        if self.is_service:
            polled = self.boxes
            command: tuple[str, ...] = ("run",)
        else:
            polled = self.chance.sample(self.boxes, self.chance.choice([1, 1, 2]))
            command = ("sync", *(witness.account for witness in polled), "--json")
        running = self.cli.start(*command)
        self._wait(running, moment, before)
        running.kill()
        ended = running.wait()
        after = self._seen()
        if ended.code == -signal.SIGKILL:
            self.siege.count(command[0], self._step(before, after, polled))
        else:
            self.siege.count(command[0], None)
            outcomes = {report["outcome"] for report in ended.json}
            # A service may hold it, or have been killed with it in its hand a moment ago.
            assert ended.code in (0, 1), ended
            assert outcomes <= {"ok", "try_later", "lease_lost"}, ended
        for witness in polled:
            witness.expect_nothing_lost()

    def _choose(self) -> Moment:
        chance = self.chance
        late = chance.uniform(0, LATE_SECONDS)
        return chance.choices(
            [
                Moment("start", 0, chance.uniform(0, START_SECONDS)),
                Moment("sessions", 1, chance.uniform(0, 1.2 * self._usual_seconds)),
                Moment("messages", chance.randint(1, 3 * BATCH_MESSAGES), late / 3),
                Moment("segments", chance.randint(1, 3), late),
                Moment("looks", chance.randint(1, 3 * BATCH_MESSAGES), late),
            ],
            weights=[5, 40, 15, 25, 15],
        )[0]

    def _wait(self, running: Running, moment: Moment, before: Seen) -> None:
        connected_at: float | None = None
        ends_at = time.monotonic() + GIVE_UP_SECONDS
        while not running.has_ended and time.monotonic() < ends_at:
            seen = self._seen()
            if connected_at is None and seen.sessions > before.sessions:
                connected_at = time.monotonic()
            if moment.of == "start" or getattr(seen, moment.of) - getattr(before, moment.of) >= moment.times:
                time.sleep(moment.late_seconds)
                return
            time.sleep(0.002)
        if running.has_ended and connected_at is not None:
            self._usual_seconds += (time.monotonic() - connected_at - self._usual_seconds) / 4

    def _seen(self) -> Seen:
        requests = self._store.requests
        return Seen(
            self._mail.connections,
            requests["PUT", "messages"],
            requests["PUT", "journal"],
            requests["HEAD", "messages"],
        )

    def _step(self, before: Seen, after: Seen, polled: list[Witness]) -> str:
        """What was under way, as far as it can be seen from outside."""
        if after.sessions == before.sessions:
            return "before a session"
        if any(witness.unrecorded_segments() for witness in polled):
            return "between journal and database"
        if any(_asked_to_delete(witness) for witness in polled):
            return "between DELE and the deletion"
        if after.looks > before.looks:
            return "deleting, or after it"
        if any(witness.stored() - witness.journalled() for witness in polled):
            return "between object and journal"
        return "archiving" if after.messages > before.messages else "logging in and listing"


def _asked_to_delete(witness: Witness) -> bool:
    query = (
        f"SELECT sha256 FROM sighting WHERE account_id = '{witness.account_id}'"
        " AND delete_requested_at IS NOT NULL AND absent_at IS NULL"
    )
    asked = {bytes(digest).hex() for (digest,) in witness.archive.rows(query)}
    return bool(asked & witness.on_server())


@contextlib.contextmanager
def _lane(siege: Siege, directory: Path, number: int, seed: int) -> Iterator[Lane]:
    store_port = urlsplit(siege.s3.endpoint_url).port
    assert store_port is not None
    with (
        Proxy(siege.mail.pop3s_port, latency_seconds=LATENCY_SECONDS) as mail,
        CountingProxy(store_port) as store,
    ):
        environment = siege.archive.cli.environment | {
            "ARCHIVER_S3_ENDPOINT_URL": f"http://{store.host}:{store.port}",
            "ARCHIVER_LEASE_SECONDS": f"{LEASE_SECONDS}",
            "ARCHIVER_BATCH_MESSAGES": f"{BATCH_MESSAGES}",
        }
        with cli(directory, environment) as runs:
            yield Lane(siege, runs, mail, store, number, seed)


@contextlib.contextmanager
def grounds(directory: Path) -> Iterator[tuple[Archive, Dovecot, SeaweedFS]]:
    """An empty archive and its servers, for a run by hand."""
    with (
        Dovecot(directory / "dovecot") as mail,
        postgres(directory / "postgres") as database,
        seaweedfs(directory / "seaweedfs") as s3,
    ):
        s3.create_bucket("siege")
        url = database.create_database("siege")
        environment = {
            "ARCHIVER_DATABASE_URL": url,
            "ARCHIVER_STORE_URL": f"s3://siege/{PREFIX}",
            **s3.environment,
        }
        client = s3.session().client("s3", endpoint_url=s3.endpoint_url)
        with contextlib.closing(client), cli(directory / "work", environment) as runs:
            runs.do("db", "upgrade")
            yield Archive(runs, Bucket(client, "siege"), url), mail, s3


def main() -> int:
    """Besiege an archive, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=LANES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="archiver-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        with grounds(directory) as (archive, mail, s3):
            siege = Siege(archive, mail, s3, kills=arguments.times, seed=arguments.seed)
            figures = siege.run(directory / "lanes", arguments.lanes)
    sys.stdout.write(f"{figures.as_json()}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

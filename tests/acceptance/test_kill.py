"""A poll is killed time and again, wherever it happens to be: nothing is lost, nothing is stored twice."""

import math
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from archiver.demo.corpus import corpus as generate_corpus
from archiver.demo.dovecot import Dovecot
from tests.conftest import Mailbox
from tests.harness.archive import Archive, sha256
from tests.harness.cli import Running, wait_for
from tests.harness.proxy import Proxy
from tests.harness.seaweedfs import SeaweedFS
from tests.soak.kill import Siege

pytestmark = pytest.mark.slow

KILLS, SEED = 12, 41

KILLS_OF_A_SIEGE, LANES = 8, 4
FIRST, MORE = 200, 15
"""Messages before the first poll, and delivered before each further one."""

LATENCY_SECONDS = 0.02
"""Each way, between archiver and server: so deletions are under way for a while, too."""

LATE_SECONDS = 0.05
"""At most, from the step at which a poll is to die until it does: more than a step takes."""

NEVER = math.inf

TAKE_OVER_SECONDS = 20.0
"""For a poll to start and send a command: less than half of the default lease of 45 seconds."""

_COMMAND = re.compile(rb"^[A-Z]{4}( \S+)?\r?\n?$")


def test_a_dozen_kills_lose_nothing_and_double_nothing(
    archive: Archive, mailbox: Callable[..., Mailbox]
) -> None:
    chance = random.Random(SEED)
    messages = list(generate_corpus(FIRST + 3 * KILLS * MORE, SEED, scale=0.1))
    box = mailbox(messages[:FIRST])
    delivered = messages[:FIRST]
    with Proxy(box.server.pop3_port, latency_seconds=LATENCY_SECONDS, record=_COMMAND) as seen:
        poll = plain_poll(archive, box, seen)
        archive.cli.environment["ARCHIVER_BATCH_MESSAGES"] = "10"

        kills = 0
        while kills < KILLS:
            archived = set(archive.captured()) if kills else set()
            present = on_server(box)
            to_delete, to_fetch = len(present), len(present - archived)
            # Logging in; a command and an object for each message, and journal segments. Then DELE and QUIT.
            fetching = 5 + to_fetch * 2 + to_fetch // 10
            ending = fetching + to_delete - 1
            steps, segments, late_seconds = chance.choice(
                [
                    (chance.randint(1, fetching), NEVER, chance.uniform(0, LATE_SECONDS)),
                    (NEVER, chance.randint(1, to_fetch // 10), 0),
                    (chance.randint(fetching, ending), NEVER, chance.uniform(0, LATE_SECONDS)),
                    (ending, NEVER, chance.uniform(0, LATE_SECONDS)),
                ]
            )
            before = Progress.of(seen, archive)
            running = archive.cli.start(*poll)
            wait_for(
                partial(has_gone_so_far, running, before, steps, segments, seen, archive),
                "the poll goes on where the killed one stopped, without waiting for its lease",
                seconds=TAKE_OVER_SECONDS,
            )
            time.sleep(late_seconds)
            running.kill()

            code = running.wait().code
            assert code in (0, -signal.SIGKILL)
            kills += code == -signal.SIGKILL
            expect_what_is_gone_to_be_safe(archive, box, delivered)
            more = messages[len(delivered) : len(delivered) + MORE]
            box.deliver(more)
            delivered += more

        for _ in range(2):  # What the first asks to be deleted, the second sees to be gone.
            [report] = archive.cli.do(*poll).json
            assert report["outcome"] == "ok"
        assert report["seconds"] < TAKE_OVER_SECONDS
        assert (report["listed"], box.messages()) == (0, [])
        archive.expect_each_once(delivered)


def test_a_kill_between_journal_and_database_is_made_good(
    archive: Archive, mailbox: Callable[..., Mailbox], corpus: list[bytes]
) -> None:
    box = mailbox(corpus[:25])
    archive.cli.environment["ARCHIVER_BATCH_MESSAGES"] = "10"
    with Proxy(box.server.pop3_port, latency_seconds=5 * LATENCY_SECONDS, record=_COMMAND) as seen:
        poll = plain_poll(archive, box, seen)
        running = archive.cli.start(*poll)
        wait_for(lambda: seen.lines(b"^UIDL"), "it asks what there is")
        with archive.nothing_can_be_recorded():
            wait_for(archive.journalled, "the first batch is in the journal")
            running.kill()
        written = archive.objects.written()
        assert (len(archive.journalled()), archive.captured()) == (10, [])
        assert len(box.messages()) == 25

        [report] = archive.cli.do(*poll).json

    # The ten are known by now; neither they nor their segment are written again.
    assert (report["outcome"], report["new"], report["known"], report["delete_requested"]) == (
        "ok",
        15,
        10,
        25,
    )
    assert archive.objects.written().items() >= written.items()
    archive.expect_each_once(corpus[:25])


def test_commands_and_services_killed_side_by_side_lose_nothing_and_double_nothing(
    in_bucket: Archive, dovecot: Dovecot, s3: SeaweedFS, tmp_path: Path
) -> None:
    """By TLS, while mail keeps coming. The long form is ``tests.soak.kill``."""
    siege = Siege(in_bucket, dovecot, s3, kills=KILLS_OF_A_SIEGE, seed=SEED)
    figures = siege.run(tmp_path / "lanes", LANES)
    assert figures.kills >= KILLS_OF_A_SIEGE
    assert figures.contents == in_bucket.status()["captures"]


def plain_poll(archive: Archive, box: Mailbox, seen: Proxy) -> tuple[str | Path, ...]:
    """A poll in clear text, so that its commands can be seen, which deletes what it archived."""
    url = f"pop3://{box.user}@{seen.host}:{seen.port}"
    secret = ("--password-file", archive.password_file(box))
    return ("sync", url, "--tls", "none", *secret, "--delete", "after-archived", "--json")


class Progress(NamedTuple):
    """How far polls have come, as the server and the store see it."""

    steps: int
    """Commands sent and objects written."""
    segments: int
    """Journal segments written: of the last one the database may not know yet."""

    @classmethod
    def of(cls, seen: Proxy, archive: Archive) -> Self:
        keys = archive.objects.written()
        return cls(len(seen.lines()) + len(keys), sum(key.startswith("journal/") for key in keys))


def has_gone_so_far(
    running: Running, before: Progress, steps: float, segments: float, seen: Proxy, archive: Archive
) -> bool:
    now = Progress.of(seen, archive)
    return (
        now.steps >= before.steps + steps or now.segments >= before.segments + segments or running.has_ended
    )


def on_server(box: Mailbox) -> set[str]:
    """What the server has, while it may still be deleting what a killed session asked for."""
    while True:
        with suppress(FileNotFoundError):
            return set(map(sha256, box.messages()))


def expect_what_is_gone_to_be_safe(archive: Archive, box: Mailbox, delivered: list[bytes]) -> None:
    """Whatever the server has no more is an object, and the journal and the database know of it."""
    gone = set(map(sha256, delivered)) - on_server(box)
    if gone:
        assert gone <= set(archive.captured())
        assert gone <= set(archive.journalled())
        assert gone <= set(archive.stored())

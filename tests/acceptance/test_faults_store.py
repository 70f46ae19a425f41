"""A store that refuses, hangs, loses its answers or lies: nothing goes from the mail server for it.

A real store stands behind an endpoint that misbehaves where a test says so.
What is archived is looked at in the real one.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest

from archiver.demo.corpus import corpus as generate_corpus
from tests.conftest import Mailbox
from tests.harness.archive import PREFIX, Archive, Bucket, sessions
from tests.harness.cli import cli as start_cli
from tests.harness.cli import wait_for
from tests.harness.moody_s3 import (
    Answer,
    Hang,
    LoseAnswer,
    Mood,
    MoodyS3,
    Overwrite,
    Request,
    ResetInBody,
    Trickle,
    Truncate,
    in_good_mood,
)
from tests.harness.seaweedfs import SeaweedFS

pytestmark = pytest.mark.slow

MESSAGES, BATCH, GOOD_PUTS = 24, 8, 10
"""Messages in the mailbox, in a batch; requests to write one that work before the mood comes."""

WINDOW = 32
"""Commands that a poll may have under way beyond the batch that fails."""

WRONG_SHA256 = "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="


@dataclass(frozen=True, slots=True)
class Moody:
    """An archive on this machine whose bucket is behind an endpoint with moods."""

    archive: Archive
    endpoint: MoodyS3

    def poll(self, box: Mailbox) -> dict[str, Any]:
        """Poll once, with deletion on."""
        [report] = self.poll_all([box])
        return report

    def poll_all(self, boxes: list[Mailbox]) -> list[dict[str, Any]]:
        """Poll mailboxes of one password."""
        urls = [box.url for box in boxes]
        access = self.archive.access(boxes[0])
        ended = self.archive.cli.run("sync", *urls, *access, "--delete", "after-archived", "--json")
        assert ended.err == ""
        assert ended.code == (0 if {report["outcome"] for report in ended.json} == {"ok"} else 1)
        return ended.json

    def after_some(self, prefix: str, mood: Mood) -> None:
        """From now on; but the first requests to write a message work."""
        left = GOOD_PUTS

        def choose(request: Request) -> Mood | None:
            nonlocal left
            if request.method != "PUT" or f"/{prefix}/" not in request.key:
                return None
            left -= 1
            return mood if left < 0 else None

        self.endpoint.mood = choose

    def heal(self) -> None:
        self.endpoint.mood = in_good_mood


@pytest.fixture
def moody(tmp_path: Path, s3: SeaweedFS, bucket: str) -> Iterator[Moody]:
    url = f"sqlite:///{tmp_path / 'archiver.db'}"
    client = s3.session().client("s3", endpoint_url=s3.endpoint_url)
    with MoodyS3(s3) as endpoint, closing(client):
        environment = {
            **s3.environment,
            "ARCHIVER_DATABASE_URL": url,
            "ARCHIVER_STORE_URL": f"s3://{bucket}/{PREFIX}",
            "ARCHIVER_S3_ENDPOINT_URL": endpoint.endpoint_url,
            "ARCHIVER_BATCH_MESSAGES": str(BATCH),
        }
        with start_cli(tmp_path / "work", environment) as cli:
            yield Moody(Archive(cli, Bucket(client, bucket), url), endpoint)


@pytest.fixture
def mail() -> list[bytes]:
    return list(generate_corpus(MESSAGES, seed=23, scale=0.2))


class Case(NamedTuple):
    """What a store does to one mailbox's messages, and what the poll says of it."""

    name: str
    mood: Mood
    outcome: str
    word: str


FAILING = [
    Case("slow down", Answer(503, "SlowDown"), "try_later", "SlowDown"),
    Case("retry after", Answer(503, "Wait", {"Retry-After": "1"}), "try_later", "Wait"),
    Case("internal error", Answer(500, "InternalError"), "try_later", "InternalError"),
    Case("a gateway", Answer(502), "try_later", "502"),
    Case("bad digest", Answer(400, "BadDigest"), "try_later", "BadDigest"),
    Case("denied", Answer(403, "AccessDenied"), "operator_needed", "AccessDenied"),
    Case("no bucket", Answer(404, "NoSuchBucket"), "operator_needed", "NoSuchBucket"),
    Case("hangs", Hang(0.5), "try_later", "closed"),
    Case("reset in the body", ResetInBody(50), "try_later", "closed"),
    Case("answer lost", LoseAnswer(), "try_later", "closed"),
]

ODD = [
    Case("trickles", Trickle(0.001), "ok", ""),
    Case("answer truncated", Truncate(), "ok", ""),
    Case("wrong checksum", Overwrite({"x-amz-checksum-sha256": WRONG_SHA256}), "ok", ""),
]
"""The object is there, and the answer says enough."""


def test_a_store_that_fails_in_the_middle_of_polls(moody: Moody, mailbox: Callable[..., Mailbox]) -> None:
    """Each case has a mailbox of its own, and one command polls them all."""
    cases = [*FAILING, *ODD]
    mail = list(generate_corpus(len(cases) * MESSAGES, seed=23, scale=0.2))
    boxes = {
        case.name: mailbox(mail[number * MESSAGES : (number + 1) * MESSAGES], password="the same for all")
        for number, case in enumerate(cases)
    }
    delivered = {name: box.messages() for name, box in boxes.items()}
    moody.endpoint.mood = MoodByMailbox(moody.archive, {boxes[case.name].url: case.mood for case in cases})

    reports = dict(zip(boxes, moody.poll_all(list(boxes.values())), strict=True))

    assert {name: report["outcome"] for name, report in reports.items()} == {
        case.name: case.outcome for case in cases
    }
    for case in FAILING:
        box, report = boxes[case.name], reports[case.name]
        # What came into the store is recorded, and no more; nothing may go in a session that failed.
        assert (report["new"], report["delete_requested"]) == (GOOD_PUTS, 0), case.name
        assert case.word in report["error"]
        assert box.messages() == delivered[case.name]
        # What was fetched for nothing is bounded, however long the store is away.
        [session] = sessions(box, 1)
        assert session.retr <= 3 * BATCH + WINDOW
        # Some servers hide, after QUIT, whatever was fetched.
        assert not session.quit
    assert [case.name for case in ODD if boxes[case.name].messages()] == []

    moody.heal()
    assert {report["outcome"] for report in moody.poll_all(list(boxes.values()))} == {"ok"}
    assert [name for name, box in boxes.items() if box.messages()] == []
    moody.archive.expect_each_once(mail)


class MoodByMailbox:
    """Has a mood of its own for the messages of each mailbox; but the first of its requests work."""

    def __init__(self, archive: Archive, moods: dict[str, Mood]) -> None:
        self._archive = archive
        self._moods = moods
        self._left = dict.fromkeys(moods, GOOD_PUTS)
        self._urls: dict[str, str] = {}

    def __call__(self, request: Request) -> Mood | None:
        if request.method != "PUT" or "/messages/" not in request.key:
            return None
        url = self._url(PurePosixPath(request.key).parts[-3])
        self._left[url] -= 1
        return self._moods[url] if self._left[url] < 0 else None

    def _url(self, account_id: str) -> str:
        if account_id not in self._urls:
            self._urls = {str(found): url for found, url in self._archive.rows("SELECT id, url FROM account")}
        return self._urls[account_id]


def test_a_store_that_says_it_has_what_it_has_not(
    moody: Moody, mailbox: Callable[..., Mailbox], mail: list[bytes]
) -> None:
    box = mailbox(mail)
    moody.after_some("messages", Answer(200))

    report = moody.poll(box)

    # Each object is looked at before its message may go.
    assert (report["outcome"], report["delete_requested"]) == ("integrity", 0)
    assert "missing in the store" in report["error"]
    assert box.messages() == mail
    moody.heal()
    assert moody.poll(box)["outcome"] == "integrity"
    assert box.messages() == mail
    verdict = moody.archive.cli.run("verify", "--json")
    assert (verdict.code, verdict.json[0]["missing"]) == (1, MESSAGES - GOOD_PUTS)


def test_a_store_that_says_it_has_a_segment_of_the_journal_which_it_has_not(
    moody: Moody, mailbox: Callable[..., Mailbox], mail: list[bytes]
) -> None:
    box = mailbox(mail)
    moody.endpoint.mood = lambda request: (
        Answer(200) if request.method == "PUT" and "/journal/" in request.key else None
    )

    report = moody.poll(box)

    assert (report["outcome"], report["delete_requested"]) == ("integrity", 0)
    assert "journal/" in report["error"]
    assert "missing in the store" in report["error"]
    assert box.messages() == mail


def test_an_object_that_is_not_what_it_was_when_it_is_looked_at(
    moody: Moody, mailbox: Callable[..., Mailbox], mail: list[bytes]
) -> None:
    box = mailbox(mail)
    wrong = Overwrite({"x-amz-checksum-sha256": WRONG_SHA256})
    moody.endpoint.mood = lambda request: wrong if request.method == "HEAD" else None

    report = moody.poll(box)

    assert (report["outcome"], report["new"], report["delete_requested"]) == ("integrity", MESSAGES, 0)
    assert box.messages() == mail
    moody.heal()
    assert moody.poll(box)["outcome"] == "ok"
    assert box.messages() == []
    moody.archive.expect_each_once(mail)


def test_a_journal_that_cannot_be_written(
    moody: Moody, mailbox: Callable[..., Mailbox], mail: list[bytes]
) -> None:
    box = mailbox(mail)
    moody.endpoint.mood = lambda request: (
        Answer(503, "SlowDown") if "/journal/" in request.key and request.method == "PUT" else None
    )
    report = moody.poll(box)
    assert (report["outcome"], report["new"], report["delete_requested"]) == ("try_later", 0, 0)
    assert box.messages() == mail
    # Objects that no segment names are no captures; the next poll finds them written already.
    assert moody.archive.captured() == []
    moody.heal()
    assert moody.poll(box)["outcome"] == "ok"
    moody.archive.expect_each_once(mail)


def test_a_store_that_asks_for_patience_is_not_asked_again_before(
    moody: Moody, mailbox: Callable[..., Mailbox], mail: list[bytes]
) -> None:
    box = mailbox(mail)
    moody.after_some("messages", Answer(503, "SlowDown", {"Retry-After": "600"}))
    assert moody.poll(box)["outcome"] == "try_later"
    # No longer than a thread of uploads each had in hand.
    assert moody.endpoint.moods <= MESSAGES
    [(seconds,)] = moody.archive.rows("SELECT (julianday(due_at) - julianday('now')) * 86400 FROM lease")
    assert seconds > 540


def test_a_bucket_that_disappears_from_a_running_service(
    moody: Moody, mailbox: Callable[..., Mailbox], mail: list[bytes]
) -> None:
    archive = moody.archive
    box = mailbox()
    access = archive.access(box)
    archive.cli.run(
        "account", "add", "alice", box.url, *access, "--interval", "1", "--delete", "after-archived"
    )
    service = archive.cli.start("run")
    wait_for(lambda: service.log("poll.ended"), "an empty mailbox is polled")

    bucket = archive.objects
    assert isinstance(bucket, Bucket)
    bucket.client.delete_bucket(Bucket=bucket.name)
    box.deliver(mail)
    wait_for(lambda: service.log("poll.ended")[-1]["outcome"] == "operator_needed", "the bucket is missed")
    assert box.messages() == mail
    # All accounts would have to be resumed one by one, so none is paused.
    assert archive.status()["paused"] == 0

    bucket.client.create_bucket(Bucket=bucket.name)

    def archived() -> bool:
        archive.fall_due()
        return box.messages() == []

    wait_for(archived, "it goes on by itself", seconds=90, every_seconds=0.1)
    service.terminate()
    assert service.wait(30).code == 0
    archive.expect_each_once(mail)


def test_who_may_read_only_is_told_so_before_anything_is_fetched(
    moody: Moody, mailbox: Callable[..., Mailbox], mail: list[bytes], s3: SeaweedFS
) -> None:
    box = mailbox(mail)
    environment = s3.reader_environment
    ended = moody.archive.cli.run("sync", box.url, *moody.archive.access(box), environment=environment)
    assert ended.code == 2
    assert "AccessDenied" in ended.err
    assert "s3:PutObject" in ended.err
    assert box.user not in {session.user for session in box.server.sessions()}

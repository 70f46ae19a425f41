"""What is archived is what the server has: every octet, each message once, and nothing twice."""

import re
from collections.abc import Callable

import pytest

from archiver.demo.corpus import corpus as generate_corpus
from tests.conftest import Mailbox
from tests.harness.archive import Archive, retrieve_all, sessions, sha256
from tests.harness.cli import wait_for
from tests.harness.proxy import Proxy
from tests.harness.seaweedfs import SeaweedFS

pytestmark = pytest.mark.slow

MESSAGES, SEED = 2_000, 19_390_501
HEAVY_BYTES = 300_000_000
MEMORY_BYTES = 200 * 1000 * 1000


def test_two_thousand_messages_are_archived_octet_for_octet(
    archive: Archive, mailbox: Callable[..., Mailbox]
) -> None:
    full = mailbox(generate_corpus(MESSAGES, SEED))

    report = archive.sync(full)
    assert (report["outcome"], report["listed"], report["new"]) == ("ok", MESSAGES, MESSAGES)

    on_server = retrieve_all(full)
    assert report["bytes"] == sum(map(len, on_server.values()))
    listed = {line["uidl"]: line for line in archive.messages()}
    assert listed.keys() == on_server.keys()
    for uidl, content in on_server.items():
        digest, line = sha256(content), listed[uidl]
        assert (line["sha256"], line["size"]) == (digest, len(content))
        assert line["key"].endswith(f"/{digest[:2]}/{digest}.eml")
        assert archive.objects.read(line["key"]) == content
    archive.expect_each_once(list(on_server.values()))


def test_a_second_poll_fetches_and_writes_nothing(
    archive: Archive, mailbox: Callable[..., Mailbox], corpus: list[bytes]
) -> None:
    *first, a, b, c, d, e = corpus
    box = mailbox(first)
    archive.sync(box)
    before = archive.objects.written()

    again = archive.sync(box)

    assert (again["new"], again["known"], again["bytes"]) == (0, len(first), 0)
    polled, polled_again = sessions(box, 2)
    assert (polled.retr, polled_again.retr, polled_again.top) == (len(first), 0, 0)
    assert archive.objects.written() == before

    box.deliver([a, b, c, d, e])
    assert archive.sync(box)["new"] == 5

    assert sessions(box, 3)[-1].retr == 5
    after = archive.objects.written()
    assert {key: after[key] for key in before} == before
    added = sorted(key.partition("/")[0] for key in after.keys() - before.keys())
    assert added == ["journal", *["messages"] * 5]
    archive.expect_each_once(corpus)


def test_a_second_poll_does_not_even_ask_to_write(
    in_bucket: Archive, s3: SeaweedFS, mailbox: Callable[..., Mailbox], corpus: list[bytes]
) -> None:
    box = mailbox(corpus[:50])
    port = int(s3.endpoint_url.rpartition(":")[2])
    with Proxy(port, record=re.compile(rb"^(PUT|POST|DELETE) /\S+ HTTP/1\.1\r?\n?$")) as counted:
        in_bucket.cli.environment["ARCHIVER_S3_ENDPOINT_URL"] = f"http://{counted.host}:{counted.port}"

        def puts(known: int) -> list[str]:
            """Of each PUT, after those known already, what it is for."""
            requests = [line.split()[1].decode() for line in counted.lines(rb"^PUT")[known:]]
            kinds = {"messages", "journal", "archive.json"}
            return sorted(kind for path in requests for kind in kinds & set(path.split("/")))

        in_bucket.sync(box)
        assert puts(0) == ["archive.json", "journal", *["messages"] * 50]
        in_bucket.sync(box)
        assert puts(52) == []
        box.deliver(corpus[50:55])
        in_bucket.sync(box)
        assert puts(52) == ["journal", *["messages"] * 5]


def test_a_message_of_300_mb_passes_through_a_small_process(
    in_bucket: Archive, mailbox: Callable[..., Mailbox]
) -> None:
    line = b"The quick brown fox jumps over the lazy dog, and the archive keeps every octet.\r\n"
    heavy = b"Subject: heavy\r\n\r\n" + b"".join(
        b"%08d %b" % (number, line) for number in range(HEAVY_BYTES // (len(line) + 9) + 1)
    )
    assert len(heavy) > HEAVY_BYTES
    box = mailbox([heavy])

    poll = in_bucket.cli.start("sync", box.url, *in_bucket.access(box), "--json")
    peaks: list[int] = []

    def ended() -> bool:
        peaks.append(poll.peak_resident_bytes() or 0)
        return poll.has_ended

    wait_for(ended, "the end of the poll", seconds=120)
    [report] = poll.wait().json

    assert (report["outcome"], report["new"], report["bytes"]) == ("ok", 1, len(heavy))
    assert 0 < max(peaks) < MEMORY_BYTES
    got = in_bucket.cli.do("message", "get", sha256(heavy))
    assert got.out == heavy

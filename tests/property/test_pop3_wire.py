"""Whatever a server sends, and however it is cut into reads, the client makes the same of it."""

from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from archiver.pop3 import Endpoint, Tls, parse_url
from archiver.pop3.failures import FailureKind, Pop3Error, Stage, classify
from archiver.pop3.wire import BlockEnd, Receiver, Reply, Shape, Status
from tests.harness.listings import listed, slowly_listed
from tests.harness.scripted_pop3 import stuffed

SHAPES = st.lists(st.sampled_from(Shape), min_size=1, max_size=6)
# Octets that matter to framing come up often; the others stand for all the rest.
HOSTILE = st.lists(
    st.sampled_from(
        [
            b"\r",
            b"\n",
            b".",
            b"\r\n",
            b"\r\n.",
            b"\r\n.\r\n",
            b"+OK",
            b"-ERR",
            b"+OK\r\n",
            b"+OK\n",
            b" ",
            b"x",
            b"\0",
        ]
    ),
    max_size=40,
).map(b"".join)
CONTENT = st.lists(
    st.sampled_from([b"\r\n", b"\r", b"\n", b".", b"..", b"a", b"\0", b"\xff", b"+OK", b"\r\n."]), max_size=30
).map(b"".join)

Outcome = tuple[list[Reply | bytes | BlockEnd], FailureKind | None, bytes]


def outcome(reads: Iterable[bytes], shapes: list[Shape]) -> Outcome:
    """Events with adjacent content merged, the failure that ended them, and what was left over."""
    receiver = Receiver(status_line_bytes=20)
    for shape in shapes:
        receiver.expect(shape)
    events: list[Reply | bytes | BlockEnd] = []
    try:
        for read in reads:
            receiver.feed(read)
            while (event := receiver.next_event()) is not None:
                assert event != b""
                if isinstance(event, bytes) and events and isinstance(events[-1], bytes):
                    events[-1] += event
                else:
                    events.append(event)
    except Pop3Error as error:
        return events, error.kind, b""
    return events, None, receiver.surplus


def cut(octets: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(octets) + 1) for place in places), len(octets)]
    return [octets[start:end] for start, end in pairwise(edges)]


@given(HOSTILE, SHAPES, st.lists(st.integers(0, 500), max_size=12))
@example(b"+OK\r\n\r\n.\r\n+OK\r\n", [Shape.BLOCK, Shape.LINE], [6, 7, 8, 9])
@example(b"+OK\n\n.\r\n\n.\n", [Shape.BLOCK], [5, 6, 7])
def test_any_split_of_the_same_octets_gives_the_same_events(
    octets: bytes, shapes: list[Shape], places: list[int]
) -> None:
    whole = outcome([octets], shapes)
    assert outcome(cut(octets, places), shapes) == whole
    assert outcome((octets[i : i + 1] for i in range(len(octets))), shapes) == whole


@given(st.lists(CONTENT, min_size=1, max_size=4), st.lists(st.integers(0, 500), max_size=12))
def test_what_a_server_stuffs_comes_out_unchanged(messages: list[bytes], places: list[int]) -> None:
    sent = b"".join(b"+OK\r\n" + stuffed(message) for message in messages)
    events, failure, surplus = outcome(cut(sent, places), [Shape.BLOCK] * len(messages))
    expected: list[Reply | bytes | BlockEnd] = []
    for message in messages:
        whole = message if not message or message.endswith(b"\r\n") else message + b"\r\n"
        expected += [Reply(Status.OK, b""), *([whole] if whole else []), BlockEnd()]
    assert (events, failure, surplus) == (expected, None, b"")


@given(CONTENT)
def test_no_message_can_end_its_own_response(message: bytes) -> None:
    """What a stranger wrote into a message must never be read as the server's replies."""
    sent = b"+OK\r\n" + stuffed(message) + b"+OK next\r\n"
    events, failure, _ = outcome([sent], [Shape.BLOCK, Shape.LINE])
    assert failure is None
    assert events[-1] == Reply(Status.OK, b"next")


@given(st.binary(max_size=400))
def test_random_octets_give_events_or_one_of_our_errors(octets: bytes) -> None:
    outcome([octets], [Shape.BLOCK, Shape.EXCHANGE, Shape.LINE])


LINES = st.lists(
    st.tuples(
        st.one_of(st.integers(-3, 5).map(lambda n: b"%d" % n), st.binary(max_size=6)),
        st.sampled_from([b"", b" ", b"  ", b"\t"]),
        st.binary(max_size=8),
        st.sampled_from([b"\r\n", b"\n", b" \r\n"]),
    ).map(b"".join),
    max_size=20,
).map(b"".join)


@given(LINES, LINES, st.integers(1, 50))
def test_any_listing_is_read(uidl: bytes, sizes: bytes, piece_bytes: int) -> None:
    listing = listed(uidl, sizes, piece_bytes)
    assert (list(listing.entries), listing.skipped_lines, listing.digest) == slowly_listed(uidl, sizes)
    numbers = [entry.number for entry in listing.entries]
    assert numbers == sorted(set(numbers))
    assert all(number >= 1 for number in numbers)
    assert all(entry.uidl is None or entry.uidl.strip() == entry.uidl != b"" for entry in listing.entries)
    assert listing.skipped_lines <= len(uidl.split(b"\n")) + len(sizes.split(b"\n"))


UIDS = st.lists(st.integers(0x21, 0x7E), min_size=1, max_size=70).map(bytes)


@given(st.dictionaries(st.integers(1, 2**31 - 1), st.tuples(UIDS, st.integers(0, 2**40)), max_size=30))
def test_a_lawful_listing_is_read_whole(messages: dict[int, tuple[bytes, int]]) -> None:
    uidl = b"".join(b"%d %b\r\n" % (number, uid) for number, (uid, _) in messages.items())
    sizes = b"".join(b"%d %d\r\n" % (number, size) for number, (_, size) in messages.items())
    listing = listed(uidl, sizes)
    assert {entry.number: (entry.uidl, entry.size) for entry in listing.entries} == messages
    assert listing.skipped_lines == 0


@given(st.binary(max_size=300), st.sampled_from(Stage))
def test_any_refusal_is_classified(text: bytes, stage: Stage) -> None:
    verdict = classify(text, stage)
    assert verdict.wait_seconds is None or 0 <= verdict.wait_seconds <= 86400
    assert (verdict.kind is FailureKind.POISON) <= (stage is Stage.RETRIEVE)


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60),
    st.sampled_from(["host", "mail.example.com", "127.0.0.1", "::1", "2001:db8::1"]),
    st.integers(1, 65535),
    st.sampled_from(Tls),
    st.sampled_from([None, "PLAIN", "SCRAM-SHA-256", "+APOP", "+LOGIN"]),
)
def test_every_endpoint_survives_its_url(
    user: str, host: str, port: int, tls: Tls, mechanism: str | None
) -> None:
    endpoint = Endpoint(host, port, tls, user, mechanism)
    assert parse_url(endpoint.url, tls) == endpoint


@given(st.text(max_size=80))
def test_any_text_is_a_url_or_a_url_error(text: str) -> None:
    for url in (text, f"pop3s://{text}", f"pop3://me@{text}"):
        with suppress(ValueError):
            endpoint = parse_url(url)
            assert parse_url(endpoint.url, endpoint.tls) == endpoint


@given(st.text(alphabet="abc@/?#[]%;: ", max_size=20))
def test_a_password_in_a_url_is_never_accepted(after: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_url(f"pop3s://me:Xsecret{after}@host")
    assert "Xsecret" not in str(caught.value)

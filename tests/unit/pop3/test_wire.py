"""Framing, by hand-made tables: what the server sends, and what the client must make of it."""

import pytest

from archiver.pop3.failures import FailureKind, Pop3Error
from archiver.pop3.wire import BlockEnd, Event, Receiver, Reply, Shape, Status, command

OK = Reply(Status.OK, b"")


def receive(
    *reads: bytes, shapes: tuple[Shape, ...] = (Shape.BLOCK,), greeting: bytes = b"+OK\r\n"
) -> list[Event]:
    """The events after the greeting, with adjacent content merged."""
    receiver = Receiver()
    receiver.expect(Shape.LINE)
    for shape in shapes:
        receiver.expect(shape)
    events: list[Event] = []
    for read in (greeting, *reads):
        receiver.feed(read)
        while (event := receiver.next_event()) is not None:
            if isinstance(event, bytes) and events and isinstance(events[-1], bytes):
                events[-1] += event
            else:
                events.append(event)
    return events[1:]


FIVE_MEGABYTES = b"x" * 5_000_000

BODIES = {
    "empty message": (b".\r\n", b""),
    "one empty line": (b"\r\n.\r\n", b"\r\n"),
    "one line": (b"a\r\n.\r\n", b"a\r\n"),
    "stuffed dot alone on its line": (b"..\r\n.\r\n", b".\r\n"),
    "stuffed dot on the first line": (b"..a\r\n.\r\n", b".a\r\n"),
    "a dot that was not doubled is dropped all the same": (b"a\r\n.x\r\n.\r\n", b"a\r\nx\r\n"),
    "many dots": (b"....\r\n..\r\n...\r\n.\r\n", b"...\r\n.\r\n..\r\n"),
    "stuffed line as the last one": (b"a\r\n..\r\n.\r\n", b"a\r\n.\r\n"),
    "a dot within a line stays": (b"a.b\r\n.\r\n", b"a.b\r\n"),
    "LF . LF ends nothing": (b"a\n.\nb\r\n.\r\n", b"a\n.\nb\r\n"),
    "LF . CRLF ends nothing": (b"a\n.\r\nb\r\n.\r\n", b"a\n.\r\nb\r\n"),
    "CRLF . LF ends nothing, and its dot is stuffing": (b"a\r\n.\nb\r\n.\r\n", b"a\r\n\nb\r\n"),
    "CR . CR ends nothing": (b"a\r.\rb\r\n.\r\n", b"a\r.\rb\r\n"),
    "LF .. keeps both dots": (b"a\n..b\r\n.\r\n", b"a\n..b\r\n"),
    "bare CR before CRLF": (b"a\r\r\n.\r\n", b"a\r\r\n"),
    "dot and bare CR": (b".\ra\r\n.\r\n", b"\ra\r\n"),
    "dot, CR, CRLF": (b".\r\r\n.\r\n", b"\r\r\n"),
    "NUL": (b"\0a\0\r\n.\r\n", b"\0a\0\r\n"),
    "8-bit": (b"\xff\xfe\r\n.\r\n", b"\xff\xfe\r\n"),
    "what looks like a reply": (b"+OK\r\n-ERR\r\n.\r\n", b"+OK\r\n-ERR\r\n"),
    "five megabytes without a line's end": (FIVE_MEGABYTES + b"\r\n.\r\n", FIVE_MEGABYTES + b"\r\n"),
}


@pytest.mark.parametrize(("sent", "meant"), BODIES.values(), ids=BODIES.keys())
def test_a_message_comes_out_as_it_was_meant(sent: bytes, meant: bytes) -> None:
    expected = [OK, meant, BlockEnd()] if meant else [OK, BlockEnd()]
    assert receive(b"+OK\r\n" + sent) == expected


@pytest.mark.parametrize(
    ("sent", "meant"),
    [case for case in BODIES.values() if len(case[0]) < 100],
    ids=[name for name, case in BODIES.items() if len(case[0]) < 100],
)
def test_octet_by_octet_it_comes_out_the_same(sent: bytes, meant: bytes) -> None:
    octets = b"+OK\r\n" + sent
    assert receive(*(octets[i : i + 1] for i in range(len(octets)))) == receive(octets)


def test_a_message_without_its_final_crlf_has_not_ended() -> None:
    """RFC 1939 section 3: the terminator starts with the CRLF that ends the last line."""
    assert receive(b"+OK\r\nabc.\r\n") == [OK, b"abc.\r\n"]


def test_after_a_terminator_without_lf_more_is_awaited() -> None:
    """Cyrus 3.4 sent ``.CR`` and the LF late or never (cyrus-imapd#4717)."""
    assert receive(b"+OK\r\na\r\n.\r") == [OK, b"a\r\n"]
    assert receive(b"+OK\r\na\r\n.\r", b"\n") == [OK, b"a\r\n", BlockEnd()]


def test_pipelined_replies_come_in_order_out_of_one_read() -> None:
    shapes = (Shape.BLOCK, Shape.BLOCK, Shape.LINE, Shape.BLOCK)
    got = receive(b"+OK a\r\n1\r\n.\r\n-ERR b\r\n+OK c\r\n+OK d\r\n.\r\n", shapes=shapes)
    assert got == [
        Reply(Status.OK, b"a"),
        b"1\r\n",
        BlockEnd(),
        Reply(Status.ERR, b"b"),
        Reply(Status.OK, b"c"),
        Reply(Status.OK, b"d"),
        BlockEnd(),
    ]


def test_a_line_that_ends_in_bare_lf_is_a_status_line() -> None:
    assert receive(b"+OK fine\n", shapes=(Shape.LINE,)) == [Reply(Status.OK, b"fine")]


def test_a_session_whose_every_status_line_ends_in_bare_lf_is_framed_by_lf() -> None:
    assert receive(b"+OK\na\n..b\n.\n", greeting=b"+OK\n") == [OK, b"a\n.b\n", BlockEnd()]


def test_one_crlf_ends_framing_by_lf_for_good() -> None:
    """A message may hold LF . LF; only a server that never says CRLF frames by it."""
    after_crlf_greeting = receive(b"+OK\na\n.\nb\r\n.\r\n", greeting=b"+OK\r\n")
    after_crlf_status = receive(b"+OK\r\na\n.\nb\r\n.\r\n", greeting=b"+OK\n")
    assert after_crlf_greeting == after_crlf_status == [OK, b"a\n.\nb\r\n", BlockEnd()]


STATUS_LINES = {
    "+OK": Reply(Status.OK, b""),
    "+OK ": Reply(Status.OK, b""),
    "+OK text of it": Reply(Status.OK, b"text of it"),
    "+OK\ttabbed": Reply(Status.OK, b"tabbed"),
    "+ok lower": Reply(Status.OK, b"lower"),
    "-ERR": Reply(Status.ERR, b""),
    "-Err [IN-USE] busy": Reply(Status.ERR, b"[IN-USE] busy"),
}


@pytest.mark.parametrize(("line", "reply"), STATUS_LINES.items())
def test_a_status_line_is_read_tolerantly(line: str, reply: Reply) -> None:
    assert receive(line.encode() + b"\r\n", shapes=(Shape.LINE,)) == [reply]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"", FailureKind.PROTOCOL),  # Exchange answers DELE so on big mailboxes (MailKit#1634)
        (b"+ERR Server error", FailureKind.PROTOCOL),  # hMailServer at PASS; poplib logs in with it
        (b"+OKAY", FailureKind.PROTOCOL),
        (b"OK", FailureKind.PROTOCOL),
        (b"* OK IMAP4rev1", FailureKind.PROTOCOL),
        (b"220 smtp ready", FailureKind.PROTOCOL),
        (b"HTTP/1.1 400 Bad Request", FailureKind.PROTOCOL),
        (b"+ challenge", FailureKind.PROTOCOL),
        (b"\x15\x03\x01\x00\x02\x02\x46", FailureKind.OPERATOR),
        (b"\x16\x03\x01", FailureKind.OPERATOR),
    ],
)
def test_what_is_no_status_line_is_refused(line: bytes, kind: FailureKind) -> None:
    with pytest.raises(Pop3Error) as caught:
        receive(line + b"\r\n", shapes=(Shape.LINE,))
    assert caught.value.kind is kind


def test_what_cannot_become_a_status_line_is_refused_before_its_end() -> None:
    with pytest.raises(Pop3Error, match="not a POP3 status line"):
        receive(b"H", shapes=(Shape.LINE,))


@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_a_status_line_has_a_limit(end: bytes) -> None:
    with pytest.raises(Pop3Error, match="longer than 8192 bytes") as caught:
        receive(b"+OK " + b"x" * 8192 + end, shapes=(Shape.LINE,))
    assert caught.value.kind is FailureKind.PROTOCOL


def test_a_challenge_is_read_in_an_exchange_alone() -> None:
    assert receive(b"+ abc\r\n", shapes=(Shape.EXCHANGE,)) == [Reply(Status.CHALLENGE, b"abc")]
    assert receive(b"+\r\n", shapes=(Shape.EXCHANGE,)) == [Reply(Status.CHALLENGE, b"")]


def test_what_answers_no_command_is_surplus() -> None:
    receiver = Receiver()
    receiver.expect(Shape.LINE)
    receiver.feed(b"+OK\r\n-ERR Disconnected for inactivity\r\n")
    assert receiver.next_event() == OK
    assert receiver.next_event() is None
    assert receiver.surplus == b"-ERR Disconnected for inactivity\r\n"


def test_a_command_is_rendered_with_single_spaces_and_crlf() -> None:
    assert command("retr", 5).octets == b"RETR 5\r\n"
    assert command("PASS", " two  spaces ", label="PASS").octets == b"PASS  two  spaces \r\n"


@pytest.mark.parametrize("secret", ["a\r\nDELE 1", "a\nb", "a\rb", "a\0b", "x" * 255, "gar\u00e7on"])
def test_a_command_that_would_break_out_of_its_line_is_never_made(secret: str) -> None:
    """CVE-2025-15367 and its kin."""
    with pytest.raises(Pop3Error) as caught:
        command("PASS", secret, label="PASS")
    assert caught.value.kind is FailureKind.OPERATOR
    assert secret not in str(caught.value)


def test_the_longest_command_line_has_255_octets() -> None:
    assert len(command("PASS", "x" * 248, label="PASS").octets) == 255
    with pytest.raises(Pop3Error, match="longer than 255"):
        command("PASS", "x" * 249, label="PASS")


def test_a_command_with_a_secret_does_not_show_it() -> None:
    assert "hunter2" not in repr(command("PASS", "hunter2", label="PASS"))

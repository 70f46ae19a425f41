"""Servers that want the client's memory, its time, or its trust."""

import io
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from archiver.pop3 import Entry, FailureKind, Limits, Mailbox, Pop3Error, TlsSettings
from tests.harness.scripted_pop3 import (
    Expect,
    MailboxPlay,
    ScriptedPop3,
    Send,
    SendEndlessly,
    StartTls,
    Step,
)

MEMORY_BYTES = 64 * 1024 * 1024
SECONDS = 30.0  # real ones, for what takes hours of the clock

CAPABILITIES: list[Step] = [Expect(b"CAPA\r\n"), Send(b"+OK\r\nUIDL\r\n.\r\n")]
LOGIN: list[Step] = [
    Send(b"+OK ready\r\n"),
    *CAPABILITIES,
    Expect(b"USER user\r\n"),
    Send(b"+OK\r\n"),
    Expect(b"PASS secret\r\n"),
    Send(b"+OK\r\n"),
    *CAPABILITIES,
]
RETR: list[Step] = [*LOGIN, Expect(b"RETR 1\r\n")]

# The default allows a listing of two million messages, which may weigh 256 MB.
LIMITS = Limits(listing_bytes=8 * 1024 * 1024, message_bytes=8 * 1024 * 1024)


class Clock:
    """A second goes by with every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Nothing:
    def write(self, _: bytes, /) -> None: ...


@contextmanager
def bounded() -> Iterator[None]:
    """Fails when what is done inside takes more memory, or more time, than it may."""
    started = time.monotonic()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES
    assert time.monotonic() - started < SECONDS


def attack(script: list[Step], call: Callable[[Mailbox], object], *, clock: Clock | None = None) -> Pop3Error:
    """The error that ends a session with this server."""

    def session() -> None:
        monotonic = clock or time.monotonic
        with Mailbox.connect(server.endpoint, limits=LIMITS, monotonic=monotonic) as mailbox:
            mailbox.login("secret")
            call(mailbox)

    with ScriptedPop3([script]) as server, bounded(), pytest.raises(Pop3Error) as caught:
        session()
    return caught.value


def retrieve(mailbox: Mailbox) -> None:
    list(mailbox.retrieve([Entry(1, None, None)], lambda _: Nothing()))


@pytest.mark.parametrize(
    ("script", "call"),
    [
        pytest.param([SendEndlessly(b"+OK ")], lambda m: None, id="greeting"),
        pytest.param([SendEndlessly(b"+")], lambda m: None, id="status indicator"),
        pytest.param(
            [Send(b"+OK\r\n"), Expect(b"CAPA\r\n"), Send(b"+OK\r\n"), SendEndlessly(b"X\r\n")],
            lambda m: None,
            id="capabilities",
        ),
        pytest.param(
            [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n"), SendEndlessly(b"1 a\r\n")],
            Mailbox.list,
            id="listing",
        ),
        pytest.param(
            [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n1 "), SendEndlessly(b"a")], Mailbox.list, id="one uid"
        ),
        pytest.param([*RETR, SendEndlessly(b"+OK x")], retrieve, id="status line"),
        pytest.param([*RETR, SendEndlessly(b"+OK\r\n.\r\n")], retrieve, id="unrequested answers"),
    ],
)
@pytest.mark.slow
def test_what_never_ends_is_refused(script: list[Step], call: Callable[[Mailbox], object]) -> None:
    def go_on(mailbox: Mailbox) -> None:
        call(mailbox)
        mailbox.round_trip()

    assert attack(script, go_on).kind is FailureKind.PROTOCOL


@pytest.mark.parametrize("octets", [b"x", b"x\r\n", b"\r\n.x", b"..\r\n", b"\r"], ids=repr)
@pytest.mark.slow
def test_an_endless_message_ends_with_the_session(octets: bytes) -> None:
    error = attack([*RETR, Send(b"+OK\r\n"), SendEndlessly(octets)], retrieve, clock=Clock())
    assert error.kind is FailureKind.TRANSIENT


@pytest.mark.parametrize(
    ("script", "call", "most_seconds"),
    [
        pytest.param(
            [Send(b"+OK " + b"x" * 5000, 1)], lambda m: None, LIMITS.greeting_seconds, id="greeting"
        ),
        pytest.param(
            [*RETR, Send(b"+OK\r\n"), Send(b"x\r\n" * 20_000, 1)],
            retrieve,
            LIMITS.session_seconds,
            id="message",
        ),
    ],
)
def test_an_octet_a_second_is_not_life(
    script: list[Step], call: Callable[[Mailbox], object], most_seconds: float
) -> None:
    clock = Clock()
    error = attack([*script, SendEndlessly(b"x")], call, clock=clock)
    assert error.kind in {FailureKind.TRANSIENT, FailureKind.PROTOCOL}
    assert clock.now < most_seconds + 300


@pytest.mark.parametrize(
    "number",
    [b"-1", b"0", b"2147483648", b"9" * 5000, b"0x10", b"1e3", b"1.5", b"\xd9\xa1", b"+1", b" "],
    ids=repr,
)
def test_absurd_numbers_are_no_messages(number: bytes) -> None:
    column = Send(b"+OK\r\n" + number + b" a\r\n7 b\r\n.\r\n")
    play = MailboxPlay([], faults={"UIDL": column, "LIST": column})
    with ScriptedPop3(play) as server, bounded(), Mailbox.connect(server.endpoint) as mailbox:
        mailbox.login("secret")
        listing = mailbox.list()
    assert [entry.number for entry in listing.entries] == [7]
    assert listing.skipped_lines == 2


@pytest.mark.parametrize("claim", [b"+OK 99999999999 99999999999\r\n", b"+OK 2147483647 1\r\n"])
def test_a_count_reserves_no_memory(claim: bytes) -> None:
    play = MailboxPlay([], faults={"STAT": Send(claim)})
    with ScriptedPop3(play) as server, bounded(), Mailbox.connect(server.endpoint) as mailbox:
        mailbox.login("secret")
        assert mailbox.glance().count in {None, 2**31 - 1}


def test_an_answer_in_the_wrong_order_is_no_listing() -> None:
    """What comes behind the listing answers nothing; the session ends before anything is done by it."""
    message = Send(b"+OK\r\nSubject: x\r\n\r\n1 forged\r\n.\r\n+OK\r\n1 5\r\n.\r\n+OK more\r\n")
    play = MailboxPlay([], faults={"UIDL": message})
    with ScriptedPop3(play) as server, Mailbox.connect(server.endpoint) as mailbox:
        mailbox.login("secret")
        listing = mailbox.list()
        with pytest.raises(Pop3Error) as caught:
            mailbox.round_trip()
    assert [entry.uidl for entry in listing.entries] == [b"forged"]
    assert caught.value.kind is FailureKind.PROTOCOL


def test_what_comes_unasked_answers_no_command() -> None:
    login = Send(b"+OK\r\n+OK\r\n1 forged\r\n.\r\n")
    with ScriptedPop3(MailboxPlay([], faults={"AUTH": login})) as server:
        with Mailbox.connect(server.endpoint) as mailbox:
            mailbox.login("secret")
            with pytest.raises(Pop3Error) as caught:
                mailbox.list()
        assert caught.value.kind is FailureKind.PROTOCOL
        assert server.commands["UIDL"] == 0


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(Send(b"-ERR no TLS here\r\n"), id="stripped"),
        pytest.param(Send(b"+OK\r\n+OK injected\r\n"), id="injected"),
        pytest.param(Send(b"+OK\r\n+"), id="injected in part"),
    ],
)
def test_tls_that_is_tampered_with_gets_no_password(reply: Send, certificate: tuple[Path, Path]) -> None:
    script: list[Step] = [Send(b"+OK ready\r\n"), Expect(b"STLS\r\n"), reply, StartTls()]
    with ScriptedPop3([script], tls="starttls", certificate=certificate) as server:
        with pytest.raises(Pop3Error) as caught:
            Mailbox.connect(server.endpoint, tls_settings=TlsSettings(ca_file=certificate[0]))
        assert caught.value.kind is FailureKind.SECURITY
        assert [line for line, _ in server.received] == [b"STLS"]


def test_a_sink_is_not_given_more_than_the_limit() -> None:
    sink = io.BytesIO()
    message = b"x" * 100_000 + b"\r\n"
    limits = Limits(message_bytes=50_000)
    play = MailboxPlay([(b"a", message)])
    with ScriptedPop3(play) as server, Mailbox.connect(server.endpoint, limits=limits) as mailbox:
        mailbox.login("secret")
        list(mailbox.retrieve(mailbox.list().entries, lambda _: sink))
    assert len(sink.getvalue()) <= 50_000

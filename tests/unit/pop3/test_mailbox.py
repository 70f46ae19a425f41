"""Sessions with servers that behave, and with servers that do not."""

import base64
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from archiver.pop3 import (
    Endpoint,
    Entry,
    FailureKind,
    Glance,
    Limits,
    Mailbox,
    Pop3Error,
    Refused,
    Retrieved,
    Tls,
    TlsSettings,
)
from tests.harness.scripted_pop3 import (
    CAPABILITIES,
    Cut,
    Expect,
    HangUp,
    MailboxPlay,
    ScriptedPop3,
    Send,
    SendEndlessly,
    Stall,
    StartTls,
    Step,
    TlsMode,
)

# Long enough for a busy machine where an answer is due, short where silence is what is tested.
PATIENT = Limits()
HASTY = Limits(
    greeting_seconds=0.2, capability_seconds=0.2, login_seconds=0.2, listing_seconds=0.2, idle_seconds=0.2
)

MESSAGES = [
    (b"uid-1", b"Subject: one\r\n\r\nfirst\r\n"),
    (b"uid-2", b".dot\r\n..\r\n.\r\n"),
    (b"uid-3", b""),
    (b"uid-4", b"x" * 200_000 + b"\r\n"),
    (b"uid-5", b"\0\xff\rbare\ncr and lf\r\n"),
]

WITHOUT_PIPELINING = tuple(each for each in CAPABILITIES if each != "PIPELINING")

GREETING: list[Step] = [Send(b"+OK ready\r\n")]
NO_CAPA: list[Step] = [Expect(b"CAPA\r\n"), Send(b"-ERR unknown command\r\n")]
LOGIN: list[Step] = [
    *GREETING,
    *NO_CAPA,
    Expect(b"USER user\r\n"),
    Send(b"+OK\r\n"),
    Expect(b"PASS secret\r\n"),
    Send(b"+OK\r\n"),
    *NO_CAPA,
]
PIPELINED: list[Step] = [
    *GREETING,
    Expect(b"CAPA\r\n"),
    Send(b"+OK\r\nPIPELINING\r\nUIDL\r\n.\r\n"),
    Expect(b"USER user\r\n"),
    Send(b"+OK\r\n"),
    Expect(b"PASS secret\r\n"),
    Send(b"+OK\r\n"),
]


def play(**changes: Any) -> MailboxPlay:
    return replace(MailboxPlay(list(MESSAGES)), **changes)


def logged_in(server: ScriptedPop3, limits: Limits = PATIENT, **options: Any) -> Mailbox:
    mailbox = Mailbox.connect(server.endpoint, limits=limits, **options)
    try:
        mailbox.login("secret")
    except BaseException:
        mailbox.close()
        raise
    return mailbox


def fetch(mailbox: Mailbox) -> list[Retrieved[io.BytesIO] | Refused[io.BytesIO]]:
    return list(mailbox.retrieve(mailbox.list().entries, lambda _: io.BytesIO()))


def content(outcome: Retrieved[io.BytesIO] | Refused[io.BytesIO]) -> bytes:
    assert isinstance(outcome, Retrieved)
    return outcome.sink.getvalue()


def failure_of(call: Callable[[], object]) -> Pop3Error:
    with pytest.raises(Pop3Error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


# A server that behaves.


@pytest.mark.parametrize(
    "capabilities", [CAPABILITIES, WITHOUT_PIPELINING, None], ids=["pipelined", "not", "no CAPA"]
)
@pytest.mark.parametrize("tls", ["implicit", "starttls", "none"])
def test_every_message_arrives_unchanged(
    tls: TlsMode, capabilities: tuple[str, ...] | None, certificate: tuple[Path, Path]
) -> None:
    with ScriptedPop3(play(capabilities=capabilities), tls=tls, certificate=certificate) as server:
        with logged_in(server, tls_settings=TlsSettings(ca_file=certificate[0])) as mailbox:
            listing = mailbox.list()
            got = list(mailbox.retrieve(listing.entries, lambda _: io.BytesIO()))
            mailbox.quit()
            facts = mailbox.facts
        assert [(each.entry.uidl, content(each)) for each in got] == MESSAGES
        assert [entry.size for entry in listing.entries] == [len(content) for _, content in MESSAGES]
        assert listing.has_uidl
        assert facts.pipelining is (capabilities == CAPABILITIES)
        assert (facts.tls_version is None) is (tls == "none")
        assert server.commands["QUIT"] == 1


def test_the_facts_tell_whom_we_spoke_to(certificate: tuple[Path, Path]) -> None:
    greeting = b"+OK \x1b[31mhello\xff\r\n"
    capabilities = (*CAPABILITIES, "LOGIN-DELAY 720")
    with ScriptedPop3(
        play(greeting=greeting, capabilities=capabilities), tls="implicit", certificate=certificate
    ) as server:
        mailbox = logged_in(server, tls_settings=TlsSettings(ca_file=certificate[0]))
        facts = mailbox.facts
        mailbox.close()
    assert facts.host == "localhost"
    assert facts.port == server.port
    assert facts.greeting == "\\x1b[31mhello\\xff"
    assert facts.capabilities == capabilities
    assert facts.tls_version == "TLSv1.3"
    assert facts.certificate_sha256 is not None
    assert len(facts.certificate_sha256) == 64
    assert facts.certificate_not_after is not None
    assert facts.certificate_not_after.tzinfo is not None
    assert facts.mechanism == "PLAIN"
    assert facts.login_delay_seconds == 720
    assert facts.implementation == "scripted"


def test_what_is_deleted_is_gone_after_quit() -> None:
    mail = play()
    with ScriptedPop3(mail) as server, logged_in(server) as mailbox:
        entries = mailbox.list().entries
        assert mailbox.delete(entries[1:3]) == list(entries[1:3])
        mailbox.quit()
    assert [uidl for uidl, _ in mail.messages] == [b"uid-1", b"uid-4", b"uid-5"]


@pytest.mark.parametrize(
    "leave", [lambda mailbox: None, Mailbox.close, lambda mailbox: 1 / 0], ids=["block", "close", "error"]
)
def test_a_session_that_is_left_without_quit_deletes_nothing(leave: Callable[[Mailbox], object]) -> None:
    mail = play()
    with ScriptedPop3(mail) as server:
        with suppress(ZeroDivisionError), logged_in(server) as mailbox:
            assert len(mailbox.delete(mailbox.list().entries)) == 5
            leave(mailbox)
        server.wait_for_end(1)
    assert mail.messages == MESSAGES
    assert server.commands["QUIT"] == 0


def test_a_message_whose_dele_is_refused_is_not_reported() -> None:
    faults = {"DELE 2": Send(b"-ERR no\r\n")}
    with ScriptedPop3(play(faults=faults)) as server, logged_in(server) as mailbox:
        entries = mailbox.list().entries
        assert [entry.number for entry in mailbox.delete(entries)] == [1, 3, 4, 5]


def test_quit_that_is_refused_is_an_error() -> None:
    """RFC 1939 section 6: some of the marked messages were not removed."""
    with ScriptedPop3(play(faults={"QUIT": Send(b"-ERR some left\r\n")})) as server:
        mailbox = logged_in(server)
        assert failure_of(mailbox.quit).kind is FailureKind.TRANSIENT


def test_quit_that_is_not_answered_is_an_error() -> None:
    with ScriptedPop3(play(faults={"QUIT": HangUp()})) as server:
        mailbox = logged_in(server)
        assert "QUIT" in str(failure_of(mailbox.quit))


def test_a_round_trip_can_be_measured() -> None:
    with ScriptedPop3(play()) as server, logged_in(server) as mailbox:
        assert mailbox.round_trip() > 0
        assert server.commands["NOOP"] == 1
        mailbox.quit()


# Wrong use.


def test_a_session_lists_once() -> None:
    """WildDuck renumbers its listings after DELE: a second one would delete the wrong messages."""
    with ScriptedPop3(play()) as server, logged_in(server) as mailbox:
        mailbox.list()
        with pytest.raises(RuntimeError, match="once"):
            mailbox.list()


@pytest.mark.parametrize("capabilities", [CAPABILITIES, WITHOUT_PIPELINING])
def test_while_messages_are_outstanding_nothing_else_is_asked(capabilities: tuple[str, ...]) -> None:
    mail = play(capabilities=capabilities)
    with ScriptedPop3(mail) as server, logged_in(server) as mailbox:
        entries = mailbox.list().entries
        next(iter(mailbox.retrieve(entries, lambda _: io.BytesIO())))
        for call in (mailbox.quit, mailbox.glance, lambda: mailbox.delete(entries)):
            with pytest.raises(RuntimeError, match="still to be read"):
                call()
    assert mail.messages == MESSAGES
    assert server.commands["QUIT"] == 0


def test_a_closed_session_is_of_no_use() -> None:
    with ScriptedPop3(play()) as server:
        mailbox = logged_in(server)
        mailbox.quit()
        with pytest.raises(RuntimeError, match="closed"):
            mailbox.quit()


# Pipelining.


def test_the_window_bounds_what_is_asked_ahead() -> None:
    """The caller can end the supply at any time; what was asked for still comes."""
    messages = [(b"u%d" % n, b"m%d\r\n" % n) for n in range(100)]
    with ScriptedPop3(play(messages=messages)) as server:
        with logged_in(server, Limits(window=8)) as mailbox:
            entries = mailbox.list().entries
            wanted = True
            taken: list[int] = []

            def supply() -> Iterator[Entry]:
                for entry in entries:
                    if not wanted:
                        return
                    taken.append(entry.number)
                    yield entry

            got = []
            for result in mailbox.retrieve(supply(), lambda _: io.BytesIO()):
                got.append(result.entry.number)
                assert len(taken) - len(got) <= 8
                if len(got) == 20:
                    wanted = False
            assert got == taken
            assert 20 <= len(got) <= 28
            mailbox.quit()
        assert server.commands["RETR"] == len(got)


def test_without_pipelining_one_message_is_asked_at_a_time() -> None:
    script = [
        *LOGIN,
        Expect(b"RETR 1\r\n"),
        Send(b"+OK\r\na\r\n.\r\n"),
        Expect(b"RETR 2\r\n"),
        Send(b"+OK\r\nb\r\n.\r\n"),
    ]
    with ScriptedPop3([script]) as server, logged_in(server) as mailbox:
        entries = [Entry(1, None, None), Entry(2, None, None)]
        got = [content(each) for each in mailbox.retrieve(entries, lambda _: io.BytesIO())]
        assert got == [b"a\r\n", b"b\r\n"]


def test_pipelining_can_be_forbidden() -> None:
    """o2.pl lists PIPELINING and disconnects under it (MailKit#174)."""
    with ScriptedPop3(play()) as server, logged_in(server, avoid={"PIPELINING"}) as mailbox:
        assert not mailbox.facts.pipelining
        assert len(fetch(mailbox)) == 5


def test_a_server_may_send_megabytes_before_it_reads_the_next_command() -> None:
    big = b"x" * 4_000_000 + b"\r\n"
    script = [
        *PIPELINED,
        Expect(b"RETR 1\r\n"),
        Send(b"+OK\r\n" + big + b".\r\n"),
        Expect(b"RETR 2\r\nRETR 3\r\n"),
        Send(b"-ERR no\r\n" * 2),
    ]
    with ScriptedPop3([script]) as server, logged_in(server) as mailbox:
        entries = [Entry(n, None, None) for n in (1, 2, 3)]
        first, *others = mailbox.retrieve(entries, lambda _: io.BytesIO())
        assert content(first) == big
        assert [type(other) for other in others] == [Refused, Refused]


def test_capa_is_asked_again_along_with_the_first_look() -> None:
    """One round trip for all. What is announced from then on may be another thing, even nothing."""
    for capa in (b"+OK\r\nPIPELINING\r\nEXPIRE 0\r\n.\r\n", b"+OK\r\nEXPIRE 0\r\n.\r\n", b"-ERR\r\n"):
        glance: list[Step] = [Expect(b"CAPA\r\nSTAT\r\nUIDL 2\r\n"), Send(capa + b"+OK 2 20\r\n+OK 2 b\r\n")]
        listing: list[Step] = [
            Expect(b"CAPA\r\nUIDL\r\nLIST\r\n"),
            Send(capa + b"+OK\r\n1 a\r\n.\r\n+OK\r\n1 9\r\n.\r\n"),
        ]
        with ScriptedPop3([[*PIPELINED, *glance], [*PIPELINED, *listing]]) as server:
            with logged_in(server) as mailbox:
                assert mailbox.facts.expire_days is None
                assert mailbox.glance(2) == Glance(2, 20, b"b")
                assert mailbox.facts.expire_days == (0 if b"EXPIRE" in capa else None)
                assert mailbox.facts.pipelining is (b"PIPELINING" in capa)
            with logged_in(server) as mailbox:
                assert mailbox.list().entries == [Entry(1, b"a", 9)]


def test_the_server_sends_on_while_the_caller_works() -> None:
    """The second message is on its way before the first one is handed over."""
    script = [
        *PIPELINED,
        Expect(b"RETR 1\r\nRETR 2\r\n"),
        Send(b"+OK\r\na\r\n.\r\n"),
        Expect(b"RETR 3\r\n"),
        Send(b"+OK\r\nb\r\n.\r\n+OK\r\nc\r\n.\r\n"),
    ]
    with ScriptedPop3([script]) as server, logged_in(server, Limits(window=2)) as mailbox:
        results = mailbox.retrieve([Entry(n, None, None) for n in (1, 2, 3)], lambda _: io.BytesIO())
        next(results)
        deadline = time.monotonic() + 10
        while server.commands["RETR"] < 3:
            assert time.monotonic() < deadline, "RETR 3 was not sent before message 1 was handed over"
            threading.Event().wait(0.005)
        assert len(list(results)) == 2


# Messages that cannot be had.


def test_a_refused_message_does_not_stop_the_others() -> None:
    """Exchange says this each time of a message that it cannot render."""
    faults = {"RETR 2": Send(b"-ERR message cannot be rendered\r\n")}
    with ScriptedPop3(play(faults=faults)) as server, logged_in(server) as mailbox:
        results = fetch(mailbox)
        mailbox.quit()
    assert [type(each) for each in results] == [Retrieved, Refused, Retrieved, Retrieved, Retrieved]
    assert isinstance(results[1], Refused)
    assert results[1].error.kind is FailureKind.POISON
    assert "RETR 2" in str(results[1].error)
    assert "cannot be rendered" in str(results[1].error)
    assert results[1].sink is None


@pytest.mark.parametrize(
    "text",
    [
        b"Message 2 expunged.",
        b"Download was rate limited. Try again in 15 minutes",
        b"Download exceed",
        b"[SYS/TEMP] later",
    ],
)
def test_a_refusal_that_concerns_the_session_ends_it(text: bytes) -> None:
    mail = play(faults={"RETR 2": Send(b"-ERR " + text + b"\r\n")})
    with ScriptedPop3(mail) as server, logged_in(server) as mailbox:
        results = mailbox.retrieve(mailbox.list().entries, lambda _: io.BytesIO())
        assert next(results).entry.number == 1
        assert failure_of(lambda: next(results)).kind is FailureKind.TRANSIENT
        assert mailbox.in_transit is None, "the message is not to blame"
        assert failure_of(mailbox.quit).kind is FailureKind.TRANSIENT


def test_a_message_over_the_limit_is_drained_and_refused() -> None:
    with ScriptedPop3(play()) as server, logged_in(server, Limits(message_bytes=100_000)) as mailbox:
        results = fetch(mailbox)
        mailbox.quit()
    refused = results[3]
    assert isinstance(refused, Refused)
    assert refused.error.kind is FailureKind.POISON
    assert "200002 bytes" in str(refused.error)
    assert refused.sink is not None
    assert len(refused.sink.getvalue()) <= 100_000
    assert [type(each) for each in results].count(Retrieved) == 4


def test_a_sink_that_fails_ends_the_session_without_quit() -> None:
    class Full:
        def write(self, data: bytes, /) -> None:
            raise OSError("disk full")

    mail = play()
    with ScriptedPop3(mail) as server, logged_in(server) as mailbox:
        with pytest.raises(OSError, match="disk full"):
            list(mailbox.retrieve(mailbox.list().entries, lambda _: Full()))
        with pytest.raises(RuntimeError):
            mailbox.quit()
    assert server.commands["QUIT"] == 0


@pytest.mark.parametrize("capabilities", [CAPABILITIES, WITHOUT_PIPELINING])
@pytest.mark.parametrize("after_bytes", [0, 1, 100_000, 200_002, 200_003, 200_004])
def test_a_connection_that_dies_in_mid_message(after_bytes: int, capabilities: tuple[str, ...]) -> None:
    """A partial message is never taken for a whole one, and it is known which one it was."""
    mail = play(faults={"RETR 4": Cut(after_bytes)}, capabilities=capabilities)
    with ScriptedPop3(mail) as server, logged_in(server) as mailbox:
        results = mailbox.retrieve(mailbox.list().entries, lambda _: io.BytesIO())
        assert [next(results).entry.number for _ in range(3)] == [1, 2, 3]
        error = failure_of(lambda: next(results))
        assert error.kind is FailureKind.TRANSIENT
        assert "RETR 4" in str(error)
        assert "in the middle of a reply" in str(error)
        assert mailbox.in_transit is not None
        assert mailbox.in_transit.number == 4
        assert failure_of(mailbox.quit) is error


def test_a_message_that_was_whole_is_handed_over_though_the_connection_died_behind_it() -> None:
    script = [*LOGIN, Expect(b"RETR 1\r\n"), Send(b"+OK\r\na\r\n.\r\n"), HangUp()]
    with ScriptedPop3([script]) as server, logged_in(server) as mailbox:
        entries = [Entry(1, None, None), Entry(2, None, None)]
        results = mailbox.retrieve(entries, lambda _: io.BytesIO())
        assert content(next(results)) == b"a\r\n"
        assert mailbox.in_transit is None, "between two messages none is to blame"
        assert failure_of(lambda: next(results)).kind is FailureKind.TRANSIENT


def test_a_server_that_stalls_in_mid_message_is_left() -> None:
    """Cyrus 3.4 and Twisted stall so; half a terminator is no terminator."""
    script = [*LOGIN, Expect(b"RETR 1\r\n"), Send(b"+OK\r\na\r\n.\r"), Stall()]
    with ScriptedPop3([script]) as server, logged_in(server, Limits(idle_seconds=0.2)) as mailbox:
        results = mailbox.retrieve([Entry(1, None, None)], lambda _: io.BytesIO())
        error = failure_of(lambda: next(results))
        assert error.kind is FailureKind.TRANSIENT
        assert "nothing came for 0.2 s" in str(error)


# Quirks.


def test_o1_a_reply_sent_twice_is_noticed_before_the_next_command() -> None:
    script = [*LOGIN, Expect(b"NOOP\r\n"), Send(b"+OK\r\n+OK\r\n"), Stall()]
    with ScriptedPop3([script]) as server, logged_in(server) as mailbox:
        mailbox.round_trip()
        error = failure_of(mailbox.glance)
        assert error.kind is FailureKind.PROTOCOL
        assert "unexpected data" in str(error)


def test_d5_a_farewell_for_inactivity_answers_no_command() -> None:
    farewell = Send(b"-ERR Disconnected for inactivity\r\n")
    script = [*LOGIN, Expect(b"NOOP\r\n"), Send(b"+OK\r\n"), farewell, HangUp()]
    with ScriptedPop3([script]) as server:
        mailbox = logged_in(server)
        mailbox.round_trip()
        server.wait_for_end(1)
        error = failure_of(mailbox.glance)
        assert error.kind is FailureKind.TRANSIENT
        assert "Disconnected for inactivity" in str(error)
        assert failure_of(mailbox.quit) is error


def test_m11_an_empty_line_for_a_reply_ends_the_session() -> None:
    """Exchange answers DELE so on big mailboxes (MailKit#1634)."""
    with ScriptedPop3(play(faults={"DELE 2": Send(b"\r\n")})) as server:
        mailbox = logged_in(server)
        entries = mailbox.list().entries
        assert failure_of(lambda: mailbox.delete(entries)).kind is FailureKind.PROTOCOL
        assert failure_of(mailbox.quit).kind is FailureKind.PROTOCOL
    assert server.commands["QUIT"] == 0


def test_h1_plus_err_does_not_log_in() -> None:
    with ScriptedPop3(play(capabilities=None, faults={"PASS": Send(b"+ERR Server error\r\n")})) as server:
        assert failure_of(lambda: logged_in(server)).kind is FailureKind.PROTOCOL


@pytest.mark.parametrize("how", [Stall(), HangUp()], ids=["stalls", "disconnects"])
def test_5_1_a_server_that_cannot_bear_capa_is_called_again_without_it(how: Step) -> None:
    first = [*GREETING, Expect(b"CAPA\r\n"), how]
    second = [
        *GREETING,
        Expect(b"USER user\r\n"),
        Send(b"+OK\r\n"),
        Expect(b"PASS secret\r\n"),
        Send(b"+OK\r\n"),
        Expect(b"QUIT\r\n"),
        Send(b"+OK\r\n"),
    ]
    with (
        ScriptedPop3([first, second]) as server,
        logged_in(server, Limits(capability_seconds=0.2)) as mailbox,
    ):
        mailbox.quit()
        assert server.connections == 2


def test_5_2_uidl_is_tried_though_capa_lacks_it() -> None:
    """AOL, GreenMail."""
    with ScriptedPop3(play(capabilities=("USER",))) as server, logged_in(server) as mailbox:
        listing = mailbox.list()
    assert listing.has_uidl
    assert listing.entries[0].uidl == b"uid-1"


@pytest.mark.parametrize("capabilities", [("USER",), ("USER", "PIPELINING"), None])
def test_a_server_without_uidl_lists_by_number(capabilities: tuple[str, ...] | None) -> None:
    mail = play(capabilities=capabilities, faults={"UIDL": Send(b"-ERR what?\r\n")})
    with ScriptedPop3(mail) as server, logged_in(server) as mailbox:
        listing = mailbox.list()
    assert not listing.has_uidl
    assert [entry.uidl for entry in listing.entries] == [None] * 5


def test_a_server_that_promised_uidl_and_fails_it_is_not_taken_for_one_without() -> None:
    """Else each message would look new."""
    with ScriptedPop3(play(faults={"UIDL": Send(b"-ERR internal error\r\n")})) as server:
        mailbox = logged_in(server)
        assert "UIDL" in str(failure_of(mailbox.list))
        mailbox.close()


def test_a_busy_server_is_not_taken_for_one_without_uidl() -> None:
    mail = play(capabilities=None, faults={"UIDL": Send(b"-ERR mailbox busy\r\n")})
    with ScriptedPop3(mail) as server, logged_in(server) as mailbox:
        assert failure_of(mailbox.list).kind is FailureKind.TRANSIENT


def test_a_server_without_any_listing_is_an_error() -> None:
    faults = {"UIDL": Send(b"-ERR\r\n"), "LIST": Send(b"-ERR\r\n")}
    with ScriptedPop3(play(capabilities=None, faults=faults)) as server, logged_in(server) as mailbox:
        assert failure_of(mailbox.list).kind is FailureKind.PROTOCOL


def test_gm1_odd_capabilities_are_taken_as_they_are() -> None:
    capabilities = ("CAPA", "", "EXPIRENEVER", "X-\xff", "SASL PLAIN", "SASL LOGIN", "sasl plain", "CELERITY")
    with ScriptedPop3(play(capabilities=capabilities)) as server, logged_in(server) as mailbox:
        assert mailbox.facts.capabilities[0] == "EXPIRENEVER"
        assert mailbox.facts.mechanism == "PLAIN"


def test_t1_the_tag_pipeline_is_not_pipelining() -> None:
    with ScriptedPop3(play(capabilities=("PIPELINE", "USER"))) as server, logged_in(server) as mailbox:
        assert not mailbox.facts.pipelining


def test_a_server_that_speaks_bare_lf_is_understood_and_reported() -> None:
    script: list[Step] = [
        Send(b"+OK ready\n"),
        Expect(b"CAPA\r\n"),
        Send(b"-ERR\n"),
        Expect(b"USER user\r\n"),
        Send(b"+OK\n"),
        Expect(b"PASS secret\r\n"),
        Send(b"+OK\n"),
        Expect(b"CAPA\r\n"),
        Send(b"-ERR\n"),
        Expect(b"RETR 1\r\n"),
        Send(b"+OK\na\n..\nb\n.\n"),
    ]
    with ScriptedPop3([script]) as server, logged_in(server) as mailbox:
        (result,) = mailbox.retrieve([Entry(1, None, None)], lambda _: io.BytesIO())
        assert content(result) == b"a\n.\nb\n"
        assert mailbox.facts.bare_lf


@pytest.mark.parametrize("text", [b"-ERR too busy\r\n", b"-ERR [SYS/TEMP] down\r\n", b"-ERR\r\n"])
def test_a_greeting_that_refuses(text: bytes) -> None:
    with ScriptedPop3([[Send(text)]]) as server:
        assert failure_of(lambda: logged_in(server)).kind is FailureKind.TRANSIENT


def test_a_connection_that_ends_before_the_greeting() -> None:
    with ScriptedPop3([[HangUp()]]) as server:
        error = failure_of(lambda: logged_in(server))
    assert error.kind is FailureKind.TRANSIENT
    assert "the greeting" in str(error)


def test_a_port_without_a_server() -> None:
    with ScriptedPop3([[]]) as server:
        endpoint = server.endpoint
    error = failure_of(lambda: Mailbox.connect(endpoint))
    assert error.kind is FailureKind.TRANSIENT
    assert "Connection refused" in str(error)


def test_a_name_that_does_not_exist() -> None:
    error = failure_of(lambda: Mailbox.connect(Endpoint("host.invalid", 110, Tls.NONE, "user")))
    assert error.kind is FailureKind.TRANSIENT
    assert re.search(
        "there is no host 'host.invalid': check|name 'host.invalid' cannot be resolved", str(error)
    )


# Login.


def test_wrong_credentials() -> None:
    with ScriptedPop3(play()) as server, Mailbox.connect(server.endpoint) as mailbox:
        error = failure_of(lambda: mailbox.login("hunter2"))
    assert error.kind is FailureKind.AUTH
    assert "user name or password refused; the server said '[AUTH] wrong password'" in str(error)
    assert "hunter2" not in str(error)
    assert server.commands["AUTH"] == 1, "one refusal, one try: more would lock the account"
    assert server.commands["USER"] == 0


@pytest.mark.parametrize("echo", ["plain", "base64"])
def test_a_server_that_repeats_the_password_does_not_put_it_into_the_error(echo: str) -> None:
    secret = "hunter2-hunter2"
    said = secret.encode() if echo == "plain" else base64.b64encode(b"\0user\0" + secret.encode())
    for line in (b"-ERR password " + said + b" is wrong\r\n", b"PASS " + said + b"\r\n"):
        faults = {"AUTH": Send(line), "PASS": Send(line)}
        for capabilities in (CAPABILITIES, None):
            mail = play(capabilities=capabilities, faults=faults)
            with ScriptedPop3(mail) as server, Mailbox.connect(server.endpoint) as mailbox:
                error = failure_of(lambda: mailbox.login(secret))
            assert said.decode() not in str(error)
            assert "***" in str(error)


@pytest.mark.parametrize(
    ("user", "password"), [("user", "a\r\nDELE 1"), ("a\nb", "secret"), ("user", "a\0b")]
)
@pytest.mark.parametrize("capabilities", [CAPABILITIES, None])
def test_crlf_in_user_or_password_is_refused_before_anything_is_sent(
    user: str, password: str, capabilities: tuple[str, ...] | None
) -> None:
    with ScriptedPop3(play(capabilities=capabilities)) as server:
        endpoint = replace(server.endpoint, user=user)
        with Mailbox.connect(endpoint) as mailbox:
            error = failure_of(lambda: mailbox.login(password))
    assert error.kind is FailureKind.OPERATOR
    assert password not in str(error)
    assert set(server.commands) == {"CAPA"}


def test_5_23_a_long_initial_response_is_sent_in_two_steps() -> None:
    """RFC 5034 section 4: a command has 255 octets; Dovecot resets the connection over more."""
    password = "p" * 300
    with ScriptedPop3(play(password=password)) as server, Mailbox.connect(server.endpoint) as mailbox:
        mailbox.login(password)
        assert server.received[1] == (b"AUTH PLAIN", False)
        assert mailbox.facts.mechanism == "PLAIN"


def test_m2_a_server_that_refuses_the_initial_response_gets_two_steps() -> None:
    token = base64.b64encode(b"\0user\0secret")
    script = [
        *GREETING,
        Expect(b"CAPA\r\n"),
        Send(b"+OK\r\nSASL PLAIN\r\n.\r\n"),
        Expect(b"AUTH PLAIN " + token + b"\r\n"),
        Send(b"-ERR syntax error\r\n"),
        Expect(b"AUTH PLAIN\r\n"),
        Send(b"+\r\n"),
        Expect(token + b"\r\n"),
        Send(b"+OK\r\n"),
        *NO_CAPA,
    ]
    with ScriptedPop3([script]) as server, logged_in(server) as mailbox:
        assert mailbox.facts.mechanism == "PLAIN"


def test_y13_a_mechanism_that_is_offered_and_unknown_gives_way_to_the_next() -> None:
    mail = play(faults={"AUTH": Send(b"-ERR unknown command\r\n")})
    with ScriptedPop3(mail) as server, logged_in(server) as mailbox:
        assert mailbox.facts.mechanism == "USER/PASS"


def test_a_challenge_that_plain_cannot_answer_cancels_the_exchange() -> None:
    token = base64.b64encode(b"\0user\0secret")
    script = [
        *GREETING,
        Expect(b"CAPA\r\n"),
        Send(b"+OK\r\nSASL PLAIN\r\n.\r\n"),
        Expect(b"AUTH PLAIN " + token + b"\r\n"),
        Send(b"+ bW9yZQ==\r\n"),
        Expect(b"*\r\n"),
        Send(b"-ERR cancelled\r\n"),
    ]
    with ScriptedPop3([script]) as server:
        assert failure_of(lambda: logged_in(server)).kind is FailureKind.PROTOCOL


def test_d3b_a_lock_is_transient_and_may_take_its_time() -> None:
    faults = {"AUTH": Send(b"-ERR [IN-USE] Mailbox is locked by another POP3 session.\r\n")}
    with ScriptedPop3(play(faults=faults)) as server:
        assert failure_of(lambda: logged_in(server)).kind is FailureKind.TRANSIENT


def test_y2_a_connection_that_ends_at_the_password_proves_nothing() -> None:
    with ScriptedPop3(play(faults={"AUTH": HangUp()})) as server:
        error = failure_of(lambda: logged_in(server))
    assert error.kind is FailureKind.TRANSIENT
    assert "AUTH PLAIN" in str(error)


def test_the_announced_login_delay_is_the_wait() -> None:
    mail = play(
        capabilities=(*CAPABILITIES, "LOGIN-DELAY 720"), faults={"AUTH": Send(b"-ERR [LOGIN-DELAY]\r\n")}
    )
    with ScriptedPop3(mail) as server:
        assert failure_of(lambda: logged_in(server)).wait_seconds == 720


def test_a_session_logs_in_once() -> None:
    with ScriptedPop3(play()) as server, logged_in(server) as mailbox:
        assert mailbox.facts.mechanism == "PLAIN"
        with pytest.raises(RuntimeError, match="logged in"):
            mailbox.login("secret")


# TLS.


def test_a_server_whose_certificate_is_not_trusted(certificate: tuple[Path, Path]) -> None:
    with ScriptedPop3(play(), tls="implicit", certificate=certificate) as server:
        error = failure_of(lambda: Mailbox.connect(server.endpoint))
    assert error.kind is FailureKind.OPERATOR
    assert "certificate" in str(error)
    assert not server.received


def test_a_certificate_for_another_name(certificate: tuple[Path, Path]) -> None:
    with ScriptedPop3(play(), tls="implicit", certificate=certificate) as server:
        endpoint = replace(
            server.endpoint, host="127.1"
        )  # the same address, by a name that no certificate has
        error = failure_of(
            lambda: Mailbox.connect(endpoint, tls_settings=TlsSettings(ca_file=certificate[0]))
        )
    assert error.kind is FailureKind.OPERATOR
    assert "127.1" in str(error)
    assert "mismatch" in str(error).lower()
    assert not server.received


def test_a_ca_file_that_is_not_there(tmp_path: Path) -> None:
    with ScriptedPop3([[Stall()]]) as server:
        endpoint = replace(server.endpoint, tls=Tls.IMPLICIT)
        error = failure_of(
            lambda: Mailbox.connect(endpoint, tls_settings=TlsSettings(ca_file=tmp_path / "none.pem"))
        )
    assert error.kind is FailureKind.OPERATOR
    assert "none.pem" in str(error)


def test_tls_on_a_port_that_speaks_clear_text() -> None:
    with ScriptedPop3([[*GREETING, Stall()]]) as server:
        endpoint = replace(server.endpoint, tls=Tls.IMPLICIT)
        error = failure_of(lambda: Mailbox.connect(endpoint))
    assert error.kind is FailureKind.OPERATOR
    assert "does not speak TLS on this port; for STARTTLS write pop3://" in str(error)


def test_clear_text_on_a_port_that_speaks_tls_from_the_start(certificate: tuple[Path, Path]) -> None:
    """Such a port waits for the client, so the greeting never comes."""
    with ScriptedPop3(play(), tls="implicit", certificate=certificate) as server:
        for tls in (Tls.STARTTLS, Tls.NONE):
            endpoint = replace(server.endpoint, tls=tls)
            error = failure_of(lambda: Mailbox.connect(endpoint, limits=Limits(greeting_seconds=0.2)))  # noqa: B023
            assert error.kind is FailureKind.TRANSIENT
            assert error.limit == "greeting_seconds"
            assert "use pop3s://" in str(error)


def test_a_greeting_that_stops_in_its_middle_is_no_sign_of_tls() -> None:
    with ScriptedPop3([[Send(b"+OK rea"), Stall()]]) as server:
        error = failure_of(lambda: logged_in(server, Limits(greeting_seconds=0.2)))
    assert error.limit == "greeting_seconds"
    assert "pop3s://" not in str(error)


def test_a_handshake_that_never_ends() -> None:
    with ScriptedPop3([[Stall()]]) as server:
        endpoint = replace(server.endpoint, tls=Tls.IMPLICIT)
        error = failure_of(lambda: Mailbox.connect(endpoint, limits=Limits(connect_seconds=0.2)))
    assert error.kind is FailureKind.TRANSIENT


@pytest.mark.parametrize("answer", [b"-ERR unknown command\r\n", b"-ERR [SYS/TEMP] no TLS today\r\n"])
def test_stls_that_is_refused_or_stripped_never_falls_back(
    answer: bytes, certificate: tuple[Path, Path]
) -> None:
    script = [*GREETING, Expect(b"STLS\r\n"), Send(answer), Stall()]
    with ScriptedPop3([script], tls="starttls", certificate=certificate) as server:
        error = failure_of(
            lambda: Mailbox.connect(server.endpoint, tls_settings=TlsSettings(ca_file=certificate[0]))
        )
    assert error.kind is FailureKind.SECURITY
    assert [line for line, _ in server.received] == [b"STLS"]


@pytest.mark.parametrize("injected", [b"+OK logged in\r\n", b"+", b"\r\n"])
def test_5_14_octets_injected_behind_stls_are_refused(
    injected: bytes, certificate: tuple[Path, Path]
) -> None:
    """CVE-2011-0411 and its kin: even a partial line."""
    script = [*GREETING, Expect(b"STLS\r\n"), Send(b"+OK begin\r\n" + injected), Stall()]
    with ScriptedPop3([script], tls="starttls", certificate=certificate) as server:
        error = failure_of(
            lambda: Mailbox.connect(server.endpoint, tls_settings=TlsSettings(ca_file=certificate[0]))
        )
    assert error.kind is FailureKind.SECURITY
    assert "injected" in str(error)


def test_capabilities_are_those_told_under_tls(certificate: tuple[Path, Path]) -> None:
    script = [
        *GREETING,
        Expect(b"STLS\r\n"),
        Send(b"+OK\r\n"),
        StartTls(),
        Expect(b"CAPA\r\n"),
        Send(b"+OK\r\nUIDL\r\n.\r\n"),
        Stall(),
    ]
    with ScriptedPop3([script], tls="starttls", certificate=certificate) as server:
        with Mailbox.connect(server.endpoint, tls_settings=TlsSettings(ca_file=certificate[0])) as mailbox:
            assert mailbox.facts.capabilities == ("UIDL",)
        assert server.received == [(b"STLS", False), (b"CAPA", True)]


@pytest.mark.parametrize("tls", ["implicit", "starttls"])
@pytest.mark.parametrize("capabilities", [CAPABILITIES, None])
def test_the_password_never_goes_in_clear(
    tls: TlsMode, capabilities: tuple[str, ...] | None, certificate: tuple[Path, Path]
) -> None:
    with ScriptedPop3(play(capabilities=capabilities), tls=tls, certificate=certificate) as server:
        logged_in(server, tls_settings=TlsSettings(ca_file=certificate[0])).close()
    assert {line.split()[0] for line, by_tls in server.received if not by_tls} <= {b"STLS"}
    assert {"AUTH", "PASS"} & set(server.commands)


# Hostile servers: each of these would go on without end.


@pytest.mark.parametrize(
    ("before", "endless", "limits", "call"),
    [
        pytest.param([], b"x", PATIENT, lambda m: None, id="a greeting that is no status line"),
        pytest.param([Send(b"+OK ")], b"x", PATIENT, lambda m: None, id="a greeting without an end"),
        pytest.param(
            [*GREETING, Expect(b"CAPA\r\n"), Send(b"+OK\r\n")],
            b"A\r\n",
            PATIENT,
            lambda m: None,
            id="capabilities",
        ),
        pytest.param(
            [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n")],
            b"1 a\r\n",
            Limits(listing_lines=100_000),
            Mailbox.list,
            id="a listing of many lines",
        ),
        pytest.param(
            [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n1 ")],
            b"a",
            Limits(listing_bytes=1_000_000),
            Mailbox.list,
            id="a listing of one line",
        ),
        pytest.param(
            [*LOGIN, Expect(b"STAT\r\n"), Send(b"+OK ")], b"1", PATIENT, Mailbox.glance, id="a reply"
        ),
    ],
)
def test_an_endless_answer_is_cut_off(
    before: list[Step], endless: bytes, limits: Limits, call: Callable[[Mailbox], object]
) -> None:
    def session() -> None:
        with logged_in(server, limits) as mailbox:
            call(mailbox)

    with ScriptedPop3([[*before, SendEndlessly(endless)]]) as server:
        assert failure_of(session).kind is FailureKind.PROTOCOL


class Clock:
    """Time that passes with every look at it, so that an hour takes no time."""

    def __init__(self, step_seconds: float) -> None:
        self._now = 0.0
        self._step_seconds = step_seconds

    def __call__(self) -> float:
        self._now += self._step_seconds
        return self._now


def test_an_endless_message_ends_with_the_session() -> None:
    """However steadily it drips: octets reset the idle time, never the session's."""
    script = [*LOGIN, Expect(b"RETR 1\r\n"), Send(b"+OK\r\n"), SendEndlessly(b"x" * 70 + b"\r\n")]
    limits = Limits(message_bytes=1_000_000)
    with ScriptedPop3([script]) as server, logged_in(server, limits, monotonic=Clock(1.0)) as mailbox:
        sink = io.BytesIO()
        results = mailbox.retrieve([Entry(1, None, None)], lambda _: sink)
        error = failure_of(lambda: next(results))
        assert error.kind is FailureKind.TRANSIENT
        assert "the time for this step is over" in str(error)
        assert len(sink.getvalue()) <= 1_000_000, "what is over the limit is drained, not kept"
        assert mailbox.in_transit == Entry(1, None, None)


@pytest.mark.parametrize(
    ("script", "call"),
    [
        pytest.param([Stall()], lambda m: None, id="greeting"),
        pytest.param([*GREETING, *NO_CAPA, Expect(b"USER user\r\n"), Stall()], lambda m: None, id="login"),
        pytest.param([*LOGIN, Expect(b"UIDL\r\n"), Stall()], Mailbox.list, id="listing"),
        pytest.param([*LOGIN, Expect(b"STAT\r\n"), Send(b"+O"), Stall()], Mailbox.glance, id="half a reply"),
    ],
)
def test_a_silent_server_is_left(script: list[Step], call: Callable[[Mailbox], object]) -> None:
    def session() -> None:
        with logged_in(server, HASTY) as mailbox:
            call(mailbox)

    with ScriptedPop3([script]) as server:
        error = failure_of(session)
    assert error.kind is FailureKind.TRANSIENT
    assert "timed out" in str(error)

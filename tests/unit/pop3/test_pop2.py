"""POP2: what its bytes mean, and what a session does with a server that lies, stalls or disconnects."""

import io
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archiver.pop3 import (
    Entry,
    FailureKind,
    Limits,
    Mailbox,
    Pop2Mailbox,
    Pop3Error,
    Refused,
    Retrieved,
    Tls,
    TlsSettings,
    UrlError,
    Version,
    connect,
    parse_url,
)
from archiver.pop3.pop2 import Mark, Receiver, Reply
from archiver.pop3.session import Session
from tests.harness.scripted_pop2 import Pop2Play, pop2_endpoint, pop2_server
from tests.harness.scripted_pop3 import Expect, ScriptedPop3, Send, SendEndlessly, Stall, Step

MESSAGES = [b"Subject: one\r\n\r\n.\r\n..\r\n", b"Subject: two\n\nbare\n.\nno end", b"\x00\xff=5\r\n-no\r\n"]


def fetch(session: Session, entries: list[Entry]) -> list[Retrieved[io.BytesIO] | Refused[io.BytesIO]]:
    return list(session.retrieve(entries, lambda _: io.BytesIO()))


def contents(outcomes: list[Retrieved[io.BytesIO] | Refused[io.BytesIO]]) -> list[bytes]:
    return [outcome.sink.getvalue() for outcome in outcomes if isinstance(outcome, Retrieved)]


def opened(play: Pop2Play, server: ScriptedPop3, **limits: Any) -> Pop2Mailbox:
    return Pop2Mailbox(pop2_endpoint(server), limits=Limits(**limits))


# Framing.

REPLIES = {
    b"+ ready\r\n": Reply(Mark.READY, b"ready"),
    b"+\n": Reply(Mark.READY, b""),
    b"- no\r\n": Reply(Mark.REFUSED, b"no"),
    b"#3 messages\r\n": Reply(Mark.COUNT, b"3 messages", 3),
    b"#0\r\n": Reply(Mark.COUNT, b"0", 0),
    b"= 17\r\n": Reply(Mark.LENGTH, b"17", 17),
    b"=9223372036854775807\r\n": Reply(Mark.LENGTH, b"9223372036854775807", 2**63 - 1),
}


@pytest.mark.parametrize(("octets", "reply"), REPLIES.items())
def test_a_reply_is_known_by_its_first_octet(octets: bytes, reply: Reply) -> None:
    receiver = Receiver()
    receiver.feed(octets)
    assert receiver.next_reply() == reply
    assert receiver.next_reply() is None


@pytest.mark.parametrize(
    "octets",
    [
        b"#-1\r\n",
        b"=-1\r\n",
        b"=\r\n",
        b"#\r\n",
        b"=1e9\r\n",
        b"=0x10\r\n",
        b"#2147483648\r\n",
        b"=9223372036854775808\r\n",
        b"=" + b"9" * 4000 + b"\r\n",
        b"= \xb2\r\n",
        b"\r\n",
        b"* OK\r\n",
        b"220 smtp\r\n",
        b"H",
        b"+" + b"x" * 9000,
    ],
)
def test_what_is_no_reply_loses_the_framing(octets: bytes) -> None:
    receiver = Receiver()
    receiver.feed(octets)
    with pytest.raises(Pop3Error) as caught:
        receiver.next_reply()
    assert caught.value.kind is FailureKind.PROTOCOL


def test_tls_where_clear_text_is_due_is_for_the_operator() -> None:
    receiver = Receiver()
    receiver.feed(b"\x15\x03\x01")
    with pytest.raises(Pop3Error) as caught:
        receiver.next_reply()
    assert caught.value.kind is FailureKind.OPERATOR


@given(messages=st.lists(st.binary(min_size=1, max_size=60), max_size=4), data=st.data())
def test_any_split_of_the_octets_gives_the_same_replies_and_contents(
    messages: list[bytes], data: st.DataObject
) -> None:
    """Content is counted: whatever it holds, and however it arrives, it is neither cut nor changed."""
    stream = b"".join(b"=%d\r\n%b" % (len(message), message) for message in messages) + b"+ bye\r\n"
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    receiver = Receiver()

    def wanted(ask: Callable[[], Reply | bytes | None]) -> Reply | bytes:
        while (got := ask()) is None:
            receiver.feed(pieces.pop(0))
        return got

    for message in messages:
        assert wanted(receiver.next_reply) == Reply(Mark.LENGTH, b"%d" % len(message), len(message))
        content = b""
        while len(content) < len(message):
            left = len(message) - len(content)
            got = wanted(partial(receiver.next_content, left))
            assert isinstance(got, bytes)
            content += got
        assert content == message
    assert wanted(receiver.next_reply) == Reply(Mark.READY, b"bye")
    assert not receiver.surplus


# A session that goes well.


def test_a_mailbox_is_read_byte_for_byte_and_kept() -> None:
    play = Pop2Play(list(MESSAGES))
    with pop2_server(play) as server, opened(play, server) as session:
        session.login("secret")
        listing = session.list()
        assert listing.entries == tuple(
            Entry(number, None, len(message)) for number, message in enumerate(MESSAGES, 1)
        )
        assert not listing.has_uidl
        assert session.round_trip() >= 0
        assert contents(fetch(session, list(listing.entries))) == MESSAGES
        assert session.in_transit is None
        facts = session.facts
        session.quit()
        assert (facts.greeting, facts.mechanism) == ("POP2 scripted server ready", "HELO")
        assert server.commands["ACKS"] == len(MESSAGES)
        assert not server.commands.keys() & {"ACKD", "NACK"}
        assert server.received[-1] == (b"QUIT", False)


def test_an_empty_mailbox_has_no_entries() -> None:
    play = Pop2Play([])
    with pop2_server(play) as server, opened(play, server) as session:
        session.login("secret")
        assert session.list().entries == ()
        assert fetch(session, []) == []
        session.quit()


def test_a_number_without_a_message_is_left_out_and_the_others_keep_theirs() -> None:
    play = Pop2Play([b"one", b"", b"three"])
    with pop2_server(play) as server, opened(play, server) as session:
        session.login("secret")
        entries = session.list().entries
        assert [entry.number for entry in entries] == [1, 3]
        assert contents(fetch(session, list(entries))) == [b"one", b"three"]
        session.quit()


def test_a_message_that_went_away_after_the_listing_is_refused_and_the_others_go_on() -> None:
    play = Pop2Play([b"", b"two"])
    with pop2_server(play) as server, opened(play, server) as session:
        session.login("secret")
        gone, there = fetch(session, [Entry(1, None, 5), Entry(2, None, 3)])
        assert isinstance(gone, Refused)
        assert gone.error.kind is FailureKind.POISON
        assert contents([there]) == [b"two"]
        session.quit()


def test_a_message_over_the_limit_is_never_asked_for() -> None:
    play = Pop2Play([b"x" * 101, b"y" * 100], faults={"READ 1": b"=4000000000000 octets\r\n"})
    with pop2_server(play) as server, opened(play, server, message_bytes=100) as session:
        session.login("secret")
        big, small = fetch(session, list(session.list().entries))
        assert isinstance(big, Refused)
        assert (big.error.kind, big.error.limit, big.sink) == (FailureKind.POISON, "message_bytes", None)
        assert contents([small]) == [b"y" * 100]
        session.quit()
        assert server.commands["RETR"] == 1


def test_a_large_message_is_never_in_memory_as_a_whole() -> None:
    class Counting:
        octets = 0

        def write(self, data: bytes, /) -> None:
            self.octets += len(data)

    size = 24 * 1024 * 1024
    play = Pop2Play([b"x" * size])
    with pop2_server(play) as server, opened(play, server) as session:
        session.login("secret")
        entries = session.list().entries
        tracemalloc.start()
        try:
            (outcome,) = session.retrieve(entries, lambda _: Counting())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert outcome.sink is not None
        assert outcome.sink.octets == size
        assert peak < size / 8


def test_a_backslash_in_a_password_is_doubled_and_spaces_are_kept() -> None:
    play = Pop2Play([], password=r"a\\ b")
    with pop2_server(play) as server, opened(play, server) as session:
        session.login(r"a\ b")
        assert server.received == [(b"HELO user a\\\\ b", False)]


def test_nothing_is_ever_deleted() -> None:
    play = Pop2Play(list(MESSAGES))
    with pop2_server(play) as server, opened(play, server) as session:
        session.login("secret")
        entries = session.list().entries
        assert session.delete([]) == []
        with pytest.raises(Pop3Error, match="nothing was deleted") as caught:
            session.delete(entries)
        assert caught.value.kind is FailureKind.OPERATOR
        session.quit()
        assert "ACKD" not in server.commands


def test_tls_from_the_first_octet(certificate: tuple[Path, Path]) -> None:
    script: list[Step] = [Send(b"+ POP2\r\n"), Expect(b"HELO user secret\r\n"), Send(b"#0\r\n")]
    with ScriptedPop3([script], tls="implicit", certificate=certificate) as server:
        endpoint = replace(server.endpoint, version=Version.POP2)
        with Pop2Mailbox(endpoint, tls_settings=TlsSettings(ca_file=certificate[0])) as session:
            session.login("secret")
            assert session.facts.tls_version is not None
    assert server.received == [(b"HELO user secret", True)]


# A session that goes wrong.


@pytest.mark.parametrize(
    ("greeting", "kind"),
    [
        (b"- POP2 server disabled on this system\r\n", FailureKind.OPERATOR),
        (b"- too many connections\r\n", FailureKind.TRANSIENT),
        (b"+OK POP3 ready\r\n", FailureKind.OPERATOR),
        (b"#5\r\n", FailureKind.PROTOCOL),
        (b"220 smtp\r\n", FailureKind.PROTOCOL),
        (b"", FailureKind.TRANSIENT),
    ],
)
def test_a_greeting_that_is_none(greeting: bytes, kind: FailureKind) -> None:
    with ScriptedPop3([[Send(greeting)]]) as server, pytest.raises(Pop3Error) as caught:
        Pop2Mailbox(pop2_endpoint(server))
    assert caught.value.kind is kind


def test_a_pop3_server_is_named_and_so_is_a_pop2_server_for_a_pop3_client() -> None:
    with ScriptedPop3([[Send(b"+OK hello\r\n")]]) as server, pytest.raises(Pop3Error, match="use pop3://"):
        Pop2Mailbox(pop2_endpoint(server))
    with pop2_server(Pop2Play([])) as server, pytest.raises(Pop3Error, match="use pop2://") as caught:
        Mailbox.connect(server.endpoint)
    assert caught.value.kind is FailureKind.OPERATOR


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"- Bad login\r\n", FailureKind.AUTH),
        (b"-\r\n", FailureKind.AUTH),
        (b"- mailbox is locked, try again later\r\n", FailureKind.TRANSIENT),
        (b"- account disabled\r\n", FailureKind.OPERATOR),
        (b"+ welcome\r\n", FailureKind.PROTOCOL),
        (b"=5\r\n", FailureKind.PROTOCOL),
        (b"#-1\r\n", FailureKind.PROTOCOL),
        (b"", FailureKind.TRANSIENT),
    ],
)
def test_a_login_that_fails(answer: bytes, kind: FailureKind) -> None:
    play = Pop2Play([], faults={"HELO": answer})
    with pop2_server(play) as server, opened(play, server) as session:
        with pytest.raises(Pop3Error) as caught:
            session.login("secret")
        assert caught.value.kind is kind
        with pytest.raises(Pop3Error):
            session.round_trip()


@pytest.mark.parametrize(
    ("user", "password"), [("two words", "x"), ("user", ""), ("user", "a\r\nQUIT"), ("user", "\u00fc")]
)
def test_what_no_login_can_carry_is_not_sent(user: str, password: str) -> None:
    with pop2_server(Pop2Play([])) as server:
        endpoint = replace(pop2_endpoint(server), user=user)
        with Pop2Mailbox(endpoint) as session, pytest.raises(Pop3Error) as caught:
            session.login(password)
    assert caught.value.kind is FailureKind.OPERATOR
    assert server.received == []


@pytest.mark.parametrize("password", ["sesame", r"ses\ame"])
def test_a_password_that_the_server_repeats_is_in_no_error(password: str) -> None:
    quoted = password.replace("\\", "\\\\")
    play = Pop2Play([], faults={"HELO": f"- bad password {quoted} or {password}\r\n".encode()})
    with pop2_server(play) as server, opened(play, server) as session:
        with pytest.raises(Pop3Error) as caught:
            session.login(password)
        assert "sesame" not in str(caught.value)
        assert quoted not in str(caught.value)
        assert "***" in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"READ 2": b"#7\r\n"}, FailureKind.PROTOCOL),
        ({"READ 2": b"=-7\r\n"}, FailureKind.PROTOCOL),
        ({"READ 2": b"=99999999999999999999\r\n"}, FailureKind.PROTOCOL),
        ({"READ 2": b"- no such message\r\n"}, FailureKind.PROTOCOL),
        ({"READ 2": b"- server is shutting down, try again\r\n"}, FailureKind.TRANSIENT),
        ({"READ 2": b""}, FailureKind.TRANSIENT),
        ({"READ 2": b"=5\r\n=5\r\n"}, FailureKind.PROTOCOL),
    ],
)
def test_a_listing_that_fails(fault: dict[str, bytes], kind: FailureKind) -> None:
    play = Pop2Play(list(MESSAGES), faults=fault)
    with pop2_server(play) as server, opened(play, server) as session:
        session.login("secret")
        with pytest.raises(Pop3Error) as caught:
            session.list()
        assert caught.value.kind is kind


def test_a_mailbox_with_too_many_messages_is_not_listed() -> None:
    play = Pop2Play([b"x"] * 4)
    with pop2_server(play) as server, opened(play, server, listing_lines=3) as session:
        session.login("secret")
        with pytest.raises(Pop3Error, match="has 4 messages, more than the limit of 3") as caught:
            session.list()
        assert (caught.value.kind, caught.value.limit) == (FailureKind.PROTOCOL, "listing_lines")
        assert "READ" not in server.commands


ENTRY = Entry(1, None, 10)


@pytest.mark.parametrize(
    ("answers", "kind", "blamed"),
    [
        ([b"#10\r\n"], FailureKind.PROTOCOL, True),
        ([b"- cannot read that message\r\n"], FailureKind.TRANSIENT, True),
        ([b"- Autologout; session timed out\r\n"], FailureKind.TRANSIENT, False),
        ([b"=10\r\n", b"123456789"], FailureKind.TRANSIENT, True),  # cut one octet before the end
        ([b"=10\r\n", b"1234567890+ more than promised\r\n"], FailureKind.PROTOCOL, True),
        ([b"=10\r\n", b"1234567890", b"+ thanks\r\n"], FailureKind.PROTOCOL, True),
        ([b"=10\r\n", b"1234567890", b"#2\r\n"], FailureKind.PROTOCOL, True),
        ([b"=10\r\n", b"1234567890", b""], FailureKind.TRANSIENT, True),
    ],
)
def test_a_message_that_is_not_framed_as_promised_is_not_complete(
    answers: list[bytes], kind: FailureKind, blamed: bool
) -> None:
    script: list[Step] = [Send(b"+ POP2\r\n"), Expect(b"HELO user secret\r\n"), Send(b"#1\r\n")]
    for verb, answer in zip((b"READ 1", b"RETR", b"ACKS"), answers, strict=False):
        script += [Expect(verb + b"\r\n"), Send(answer)]
    with ScriptedPop3([script]) as server, Pop2Mailbox(pop2_endpoint(server)) as session:
        session.login("secret")
        with pytest.raises(Pop3Error) as caught:
            fetch(session, [ENTRY])
        assert caught.value.kind is kind
        assert session.in_transit == (ENTRY if blamed else None)


@pytest.mark.parametrize(
    ("step", "limits", "kind", "named"),
    [
        (Stall(), {"idle_seconds": 0.1}, FailureKind.TRANSIENT, "idle_seconds"),
        (Stall(), {"session_seconds": 0.3}, FailureKind.TRANSIENT, "session_seconds"),
        (SendEndlessly(b"+"), {}, FailureKind.PROTOCOL, "status_line_bytes"),
        (SendEndlessly(b"=1\r\n"), {}, FailureKind.PROTOCOL, None),
    ],
)
def test_time_and_memory_are_bounded(
    step: Step, limits: dict[str, Any], kind: FailureKind, named: str | None
) -> None:
    script: list[Step] = [Send(b"+ POP2\r\n"), Expect(b"HELO user secret\r\n"), Send(b"#1\r\n")]
    script += [Expect(b"READ 1\r\n"), step]
    with (
        ScriptedPop3([script]) as server,
        Pop2Mailbox(pop2_endpoint(server), limits=Limits(**limits)) as session,
    ):
        session.login("secret")
        with pytest.raises(Pop3Error) as caught:
            fetch(session, [ENTRY])
        assert (caught.value.kind, caught.value.limit) == (kind, named)


def test_a_greeting_or_a_login_that_never_comes_names_its_limit() -> None:
    with ScriptedPop3([[Stall()]]) as server, pytest.raises(Pop3Error) as caught:
        Pop2Mailbox(pop2_endpoint(server), limits=Limits(greeting_seconds=0.1))
    assert caught.value.limit == "greeting_seconds"
    with ScriptedPop3([[Send(b"+\r\n"), Stall()]]) as server:
        limits = Limits(login_seconds=0.1)
        with Pop2Mailbox(pop2_endpoint(server), limits=limits) as session:
            with pytest.raises(Pop3Error) as caught:
                session.login("secret")
            assert caught.value.limit == "login_seconds"


def test_a_sink_that_fails_ends_the_session_in_its_message() -> None:
    class Full:
        def write(self, data: bytes, /) -> None:
            raise OSError("no space")

    play = Pop2Play(list(MESSAGES))
    with pop2_server(play) as server, opened(play, server) as session:
        session.login("secret")
        with pytest.raises(OSError, match="no space"):
            list(session.retrieve(session.list().entries, lambda _: Full()))
        assert session.in_transit == Entry(1, None, len(MESSAGES[0]))
        with pytest.raises(RuntimeError):
            session.quit()


# Addresses.


@pytest.mark.parametrize("url", ["pop2://me@host", "pop2://a%20b@[::1]:1109", "POP2://me@host:109"])
@pytest.mark.parametrize("tls", [Tls.NONE, Tls.IMPLICIT])
def test_a_pop2_url_comes_back_as_it_was(url: str, tls: Tls) -> None:
    endpoint = parse_url(url, tls)
    assert endpoint.version is Version.POP2
    assert endpoint.tls is tls
    assert endpoint.port == (1109 if "1109" in url else 109)
    assert parse_url(endpoint.url, tls) == endpoint
    assert endpoint.url.startswith("pop2://")


@pytest.mark.parametrize(
    ("url", "tls", "reason"),
    [
        ("pop2://me@host", None, "password crosses the network in clear text: to allow that"),
        ("pop2://me@host", Tls.STARTTLS, "has no TLS"),
        ("pop2://me;AUTH=PLAIN@host", Tls.NONE, "one way to log in"),
        ("pop2://me:secret@host", Tls.NONE, "must not contain a password"),
    ],
)
def test_a_pop2_url_demands_that_clear_text_is_meant(url: str, tls: Tls | None, reason: str) -> None:
    with pytest.raises(UrlError, match=reason):
        parse_url(url, tls)


def test_connect_calls_in_the_version_that_the_endpoint_names() -> None:
    with pop2_server(Pop2Play([])) as server, connect(pop2_endpoint(server)) as session:
        assert isinstance(session, Pop2Mailbox)
    with pytest.raises(Pop3Error, match="no STARTTLS"):
        connect(replace(parse_url("pop2://me@127.0.0.1", Tls.NONE), tls=Tls.STARTTLS))


# Folders.


def test_a_folder_of_the_url_is_opened_in_place_of_the_mailbox() -> None:
    play = Pop2Play([b"of the mailbox\r\n"], folders={"OLD MAIL": list(MESSAGES)})
    with pop2_server(play) as server:
        endpoint = replace(pop2_endpoint(server), folder="OLD MAIL")
        with connect(endpoint) as session:
            session.login("secret")
            assert session.glance() == (len(MESSAGES), None, None)
            assert session.list_from(1, 1) is None
            assert contents(fetch(session, list(session.list().entries))) == MESSAGES
            session.quit()
        assert b"FOLD OLD MAIL" in [line for line, _ in server.received]


def test_a_folder_that_is_not_there_is_empty() -> None:
    with pop2_server(Pop2Play(list(MESSAGES))) as server:
        session = connect(replace(pop2_endpoint(server), folder="NONE"))
        session.login("secret")
        assert session.list().entries == ()
        session.quit()


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("pop2://me@host/OLD", "OLD"),
        ("pop2://me@host:1109/a%2Fb%20c", "a/b c"),
        ("pop2://me@host/", None),
        ("pop2://me@host", None),
    ],
)
def test_the_path_of_a_pop2_url_is_a_folder(url: str, folder: str | None) -> None:
    endpoint = parse_url(url, Tls.NONE)
    assert endpoint.folder == folder
    assert parse_url(endpoint.url, Tls.NONE) == endpoint


@pytest.mark.parametrize("path", ["a%0D%0AQUIT", "%20a", "\u00fc", "x" * 300])
def test_what_cannot_be_a_folder(path: str) -> None:
    with pytest.raises(UrlError):
        parse_url(f"pop2://me@host/{path}", Tls.NONE)

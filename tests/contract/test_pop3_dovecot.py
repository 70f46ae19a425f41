"""The POP3 client against a real Dovecot: what the protocol promises, and what this server does."""

import hashlib
import io
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from archiver.demo.dovecot import Dovecot
from archiver.pop3 import (
    Endpoint,
    FailureKind,
    Limits,
    Mailbox,
    Pop3Error,
    Refused,
    Retrieved,
    Tls,
    TlsSettings,
    parse_url,
)
from tests.conftest import Mailbox as Box

ODD = [
    b"Subject: dots\r\n\r\n.\r\n..\r\n.x\r\nend.\r\n",
    b"Subject: controls\r\n\r\nNUL \0 and bare CR \r in a line\r\n",
    b"Subject: 8-bit\r\n\r\n" + bytes(range(128, 256)) + b"\r\n",
    b"Subject: long\r\n\r\n" + b"x" * 100_000 + b"\r\n",
    b"Subject: looks like replies\r\n\r\n+OK\r\n-ERR\r\n+OK 1 2\r\n",
    b"Subject: empty lines at the end\r\n\r\n\r\n\r\n\r\n",
]


@pytest.fixture(params=list(Tls), ids=lambda tls: tls.value)
def tls(request: pytest.FixtureRequest) -> Tls:
    tls: Tls = request.param
    return tls


def endpoint(box: Box, tls: Tls = Tls.IMPLICIT) -> Endpoint:
    port = box.server.pop3s_port if tls is Tls.IMPLICIT else box.server.pop3_port
    return Endpoint(box.server.host, port, tls, box.user)


def session(box: Box, tls: Tls = Tls.IMPLICIT, **options: Any) -> Mailbox:
    mailbox = Mailbox.connect(endpoint(box, tls), tls_settings=TlsSettings(ca_file=box.ca_file), **options)
    try:
        mailbox.login(box.password)
    except BaseException:
        mailbox.close()
        raise
    return mailbox


def content(outcome: Retrieved[io.BytesIO] | Refused[io.BytesIO]) -> bytes:
    assert isinstance(outcome, Retrieved)
    return outcome.sink.getvalue()


def sink(_: object) -> io.BytesIO:
    return io.BytesIO()


@pytest.mark.parametrize("avoid", [(), ("PIPELINING",)], ids=["pipelined", "one at a time"])
def test_every_message_comes_as_it_was_delivered(
    mailbox: Callable[..., Box], tls: Tls, *, avoid: tuple[str, ...]
) -> None:
    box = mailbox(ODD)
    with session(box, tls, avoid=avoid) as client:
        listing = client.list()
        got = list(client.retrieve(listing.entries, sink))
        client.quit()
    assert [type(each) for each in got] == [Retrieved] * len(ODD)
    assert [content(each) for each in got] == ODD
    assert [entry.size for entry in listing.entries] == [len(message) for message in ODD]


def test_a_whole_corpus_comes_as_it_was_delivered(mailbox: Callable[..., Box], corpus: list[bytes]) -> None:
    class Digest:
        def __init__(self) -> None:
            self.sha256 = hashlib.sha256()

        def write(self, data: bytes, /) -> None:
            self.sha256.update(data)

    box = mailbox(corpus)
    with session(box) as client:
        got = list(client.retrieve(client.list().entries, lambda _: Digest()))
        client.quit()
    retrieved = [each.sink.sha256.digest() for each in got if isinstance(each, Retrieved)]
    assert retrieved == [hashlib.sha256(each).digest() for each in corpus]


def test_the_facts(mailbox: Callable[..., Box], tls: Tls) -> None:
    with session(mailbox(), tls) as client:
        client.glance()
        facts = client.facts
    assert facts.greeting.startswith("Dovecot")
    assert {"UIDL", "PIPELINING"} <= set(facts.capabilities)
    assert not any(line.startswith(("SASL", "STLS")) for line in facts.capabilities), (
        "CAPA was asked after login"
    )
    assert facts.mechanism == "PLAIN"
    assert facts.pipelining
    assert not facts.bare_lf
    assert (facts.tls_version in {"TLSv1.2", "TLSv1.3"}) is (tls is not Tls.NONE)
    assert (facts.certificate_sha256 is None) is (tls is Tls.NONE)


def test_an_address_without_a_name_is_verified_too(mailbox: Callable[..., Box]) -> None:
    box = mailbox(ODD[:1])
    assert box.server.host == "127.0.0.1"
    with session(box) as client:
        assert client.facts.tls_version is not None


def test_an_untrusted_certificate_is_refused(mailbox: Callable[..., Box]) -> None:
    for tls in (Tls.IMPLICIT, Tls.STARTTLS):
        with pytest.raises(Pop3Error) as caught:
            Mailbox.connect(endpoint(mailbox(), tls))
        assert caught.value.kind is FailureKind.OPERATOR


def test_the_url_of_the_mailbox_leads_to_it(mailbox: Callable[..., Box]) -> None:
    box = mailbox(ODD)
    with Mailbox.connect(parse_url(box.url), tls_settings=TlsSettings(ca_file=box.ca_file)) as client:
        client.login(box.password)
        assert client.glance() == (len(ODD), sum(map(len, ODD)), None)
        assert client.round_trip() > 0


def test_uidls_stay_over_sessions(mailbox: Callable[..., Box]) -> None:
    box = mailbox(ODD)
    listings = []
    for _ in range(2):
        with session(box) as client:
            listings.append(client.list())
            client.quit()
    first, second = listings
    assert first == second
    assert first.has_uidl
    assert first.skipped_lines == 0
    assert len({entry.uidl for entry in first.entries}) == len(ODD)


def test_an_empty_mailbox(mailbox: Callable[..., Box]) -> None:
    with session(mailbox()) as client:
        listing = client.list()
        assert listing.entries == ()
        assert listing.has_uidl
        assert list(client.retrieve(listing.entries, sink)) == []
        assert client.delete(()) == []
        client.quit()


def test_dele_and_quit_delete(mailbox: Callable[..., Box], tls: Tls) -> None:
    box = mailbox(ODD)
    with session(box, tls) as client:
        entries = client.list().entries
        assert client.delete(entries[:3]) == list(entries[:3])
        client.quit()
    assert box.messages() == ODD[3:]


def test_a_dropped_connection_deletes_nothing(mailbox: Callable[..., Box], tls: Tls) -> None:
    box = mailbox(ODD)
    ended = len(box.server.sessions())
    with session(box, tls) as client:
        assert len(client.delete(client.list().entries)) == len(ODD)
    logged = box.server.sessions(at_least=ended + 1)[-1]
    assert (logged.user, logged.quit) == (box.user, False)
    assert box.messages() == ODD


def test_a_supply_that_ends_early_leaves_a_session_that_can_quit(mailbox: Callable[..., Box]) -> None:
    box = mailbox([b"Subject: %d\r\n\r\nx\r\n" % number for number in range(100)])
    with session(box, limits=Limits(window=8)) as client:
        got = list(client.retrieve(islice(client.list().entries, 21), sink))
        assert len(got) == 21
        client.quit()


def test_wrong_credentials(mailbox: Callable[..., Box], tls: Tls) -> None:
    box = mailbox()
    with (
        Mailbox.connect(endpoint(box, tls), tls_settings=TlsSettings(ca_file=box.ca_file)) as client,
        pytest.raises(Pop3Error) as caught,
    ):
        client.login("hunter2")
    assert caught.value.kind is FailureKind.AUTH
    assert "hunter2" not in str(caught.value)


def test_the_commands_of_rfc_1939_log_in_too(mailbox: Callable[..., Box]) -> None:
    box = mailbox(ODD)
    target = parse_url(box.url.replace("@", ";AUTH=+LOGIN@", 1))
    with Mailbox.connect(target, tls_settings=TlsSettings(ca_file=box.ca_file)) as client:
        client.login(box.password)
        assert client.facts.mechanism == "USER/PASS"
        assert len(client.list().entries) == len(ODD)


def test_d6_a_password_over_the_command_limit_goes_in_two_steps(dovecot: Dovecot) -> None:
    """Dovecot resets the connection over a longer AUTH line."""
    password = "p" * 400
    dovecot.add_user("long", password)
    with Mailbox.connect(
        parse_url(dovecot.url("long")), tls_settings=TlsSettings(ca_file=dovecot.ca_file)
    ) as client:
        client.login(password)
        assert client.facts.mechanism == "PLAIN"


def test_d6_an_empty_message_comes_as_one_empty_line(mailbox: Callable[..., Box]) -> None:
    with session(mailbox([b""])) as client:
        entries = client.list().entries
        (got,) = client.retrieve(entries, sink)
        assert entries[0].size == 0
        assert content(got) == b"\r\n"


def test_a_dot_that_begins_a_message_is_lost_by_the_server(mailbox: Callable[..., Box]) -> None:
    """Dovecot 2.3 doubles dots behind line ends alone, so the first line's own dot reads as stuffing.

    RFC 1939 section 3 leaves a client no choice; the size in the listing is what tells. Delivery puts
    header fields before anything that a sender wrote, so that no mail from outside begins so.
    """
    message = b".begins with a dot\r\n.and so does this\r\n"
    with session(mailbox([message])) as client:
        entries = client.list().entries
        (got,) = client.retrieve(entries, sink)
    assert content(got) == message[1:]
    assert entries[0].size == len(message)


def test_d3_a_message_that_another_client_removed_ends_the_session_without_blame(
    mailbox: Callable[..., Box],
) -> None:
    box = mailbox([b"Subject: %d\r\n\r\n%b\r\n" % (number, b"x" * 50_000) for number in range(3)])
    with session(box, avoid={"PIPELINING"}) as client:
        entries = client.list().entries
        box.remove(2)
        results = client.retrieve(entries[1:2], sink)
        with pytest.raises(Pop3Error, match="expunged") as caught:
            next(results)
        assert caught.value.kind is FailureKind.TRANSIENT
        assert client.in_transit is None


def test_a_message_over_the_limit_is_refused_and_the_others_come(mailbox: Callable[..., Box]) -> None:
    with session(mailbox(ODD), limits=Limits(message_bytes=50_000)) as client:
        got = list(client.retrieve(client.list().entries, sink))
        client.quit()
    assert [number for number, each in enumerate(got) if isinstance(each, Refused)] == [3]

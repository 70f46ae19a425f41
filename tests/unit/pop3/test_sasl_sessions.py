"""Logins with servers that behave, and with servers that do not: what is said, and what is tried next."""

import base64
import hashlib
import hmac
import json
import logging
import ssl
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from archiver.pop3 import FailureKind, Loop, Mailbox, Pop3Error, TlsSettings
from archiver.pop3.sasl import MOST_ITERATIONS, SCRAM_MECHANISMS
from tests.harness.scram import ScramServer
from tests.harness.scripted_pop3 import Channel, Expect, HangUp, ScriptedPop3, Send, Step, Talk, TlsMode

PASSWORD = "hunter2-hunter2"
TOKEN = "ya29." + "t" * 300
STAMP = b"<1896.697170952@dbc.mtview.ca.us>"
NO_CAPA: list[Step] = [Expect(b"CAPA\r\n"), Send(b"-ERR unknown command\r\n")]
OK = Send(b"+OK\r\n")
REFUSED = Send(b"-ERR [AUTH] Authentication failed.\r\n")


def b64(octets: bytes) -> bytes:
    return base64.b64encode(octets)


def offering(*mechanisms: str, greeting: bytes = b"+OK ready\r\n") -> list[Step]:
    """A greeting and a CAPA."""
    offer = "".join(f" {each}" for each in mechanisms).encode()
    return [Send(greeting), Expect(b"CAPA\r\n"), Send(b"+OK\r\nSASL" + offer + b"\r\n.\r\n")]


@contextmanager
def session(
    script: Sequence[Step],
    *,
    mechanism: str | None = None,
    certificate: tuple[Path, Path] | None = None,
) -> Iterator[tuple[Mailbox, ScriptedPop3]]:
    """A session that is not logged in; by TLS if there is a certificate, else in clear text, as allowed."""
    tls: TlsMode = "implicit" if certificate else "none"
    with ScriptedPop3([script], tls=tls, certificate=certificate) as server:
        endpoint = replace(server.endpoint, mechanism=mechanism)
        settings = TlsSettings(ca_file=certificate[0] if certificate else None)
        with Mailbox.connect(endpoint, tls_settings=settings) as mailbox:
            yield mailbox, server


def logged_in_by(script: Sequence[Step], secret: str = PASSWORD, **options: Any) -> str | None:
    with session(script, **options) as (mailbox, _):
        mailbox.login(secret)
        return mailbox.facts.mechanism


def refusal_of(script: Sequence[Step], secret: str = PASSWORD, **options: Any) -> Pop3Error:
    with session(script, **options) as (mailbox, _), pytest.raises(Pop3Error) as caught:
        mailbox.login(secret)
    shown = str(caught.value)
    assert shown.isprintable()
    assert secret not in shown
    assert mailbox.facts.mechanism is None
    return caught.value


# SCRAM.


def scram(server: ScramServer, *, proof: str = "challenge") -> Talk:
    """The server's side of an exchange. ``proof`` is where its signature comes."""

    def talk(channel: Channel) -> None:
        verb, name, first = channel.line().split(b" ")
        assert (verb, name) == (b"AUTH", server.mechanism.encode())
        channel.send(b"+ " + b64(server.first(base64.b64decode(first))) + b"\r\n")
        signature = server.final(base64.b64decode(channel.line()))
        if proof == "challenge":
            channel.send(b"+ " + b64(signature) + b"\r\n")
            assert channel.line() == b""
            channel.send(b"+OK Logged in.\r\n")
        elif proof == "text":
            channel.send(b"+OK " + b64(signature) + b"\r\n")
        elif proof == "wrong":
            channel.send(b"+ " + b64(b"v=" + b64(b"x" * 32)) + b"\r\n")
            assert channel.line() == b"*"
            channel.send(b"-ERR cancelled\r\n")
        else:
            channel.send(b"+OK Logged in.\r\n")

    return Talk(talk)


@pytest.mark.parametrize("name", [name for name in SCRAM_MECHANISMS if not name.endswith("-PLUS")])
@pytest.mark.parametrize("proof", ["challenge", "text"])
def test_a_server_that_proves_itself_is_believed(name: str, proof: str) -> None:
    script = [*offering(name, "PLAIN"), scram(ScramServer(name, PASSWORD), proof=proof), *NO_CAPA]
    assert logged_in_by(script) == name


@pytest.mark.parametrize("proof", ["wrong", "none"])
def test_a_server_that_does_not_prove_itself_is_not_believed(proof: str) -> None:
    script = [*offering("SCRAM-SHA-256", "PLAIN"), scram(ScramServer("SCRAM-SHA-256", PASSWORD), proof=proof)]
    error = refusal_of(script)
    assert error.kind is FailureKind.SECURITY
    assert "AUTH SCRAM-SHA-256" in str(error)


@pytest.mark.parametrize(
    "lie",
    [{"iterations": 4095}, {"iterations": MOST_ITERATIONS + 1}, {"salt": b""}],
    ids=["few iterations", "many iterations", "no salt"],
)
def test_a_lie_cancels_the_exchange_and_nothing_weaker_is_tried(lie: dict[str, Any]) -> None:
    server = ScramServer("SCRAM-SHA-256", PASSWORD, **lie)

    def talk(channel: Channel) -> None:
        first = base64.b64decode(channel.line().split(b" ")[2])
        channel.send(b"+ " + b64(server.first(first)) + b"\r\n")
        assert channel.line() == b"*"
        channel.send(b"-ERR Authentication cancelled\r\n")

    assert refusal_of([*offering("SCRAM-SHA-256", "PLAIN"), Talk(talk)]).kind is FailureKind.SECURITY


def test_a_success_before_any_challenge_is_not_believed() -> None:
    def talk(channel: Channel) -> None:
        channel.line()
        channel.send(b"+OK Logged in.\r\n")

    assert refusal_of([*offering("SCRAM-SHA-256"), Talk(talk)]).kind is FailureKind.SECURITY


def test_what_a_server_wants_computed_holds_up_no_other_session() -> None:
    """It chooses the iterations, so they are not counted in the thread where sessions wait together."""
    aside: list[str] = []

    class Noting(ThreadPoolExecutor):
        def submit(self, work: Any, /, *arguments: Any, **options: Any) -> "Future[Any]":
            aside.append(getattr(work, "__name__", ""))
            return super().submit(work, *arguments, **options)

    done: Future[str | None] = Future()
    script = [*offering("SCRAM-SHA-256"), scram(ScramServer("SCRAM-SHA-256", PASSWORD)), *NO_CAPA]
    with Noting(1) as threads:
        loop = Loop(threads)
        loop.begin(lambda: done.set_result(logged_in_by(script)))
        assert done.result(30) == "SCRAM-SHA-256"
        loop.close()
    assert "get_client_final" in aside


def test_a_wrong_password_is_asked_once() -> None:
    server = ScramServer("SCRAM-SHA-256", "another password")

    def talk(channel: Channel) -> None:
        first = base64.b64decode(channel.line().split(b" ")[2])
        channel.send(b"+ " + b64(server.first(first)) + b"\r\n")
        with pytest.raises(AssertionError):
            server.final(base64.b64decode(channel.line()))
        channel.send(REFUSED.octets)

    assert (
        refusal_of([*offering("SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN"), Talk(talk)]).kind is FailureKind.AUTH
    )


def refuse_auth(name: bytes, answer: bytes = REFUSED.octets) -> Talk:
    """Refuse an AUTH before any challenge."""

    def talk(channel: Channel) -> None:
        assert channel.line().startswith(b"AUTH " + name + b" ")
        channel.send(answer)

    return Talk(talk)


def test_a_server_that_keeps_nothing_to_check_scram_by_gets_plain() -> None:
    """Dovecot offers SCRAM to all, and refuses it at once to users whose password it keeps otherwise."""
    plain = b64(b"\0user\0" + PASSWORD.encode())
    script = [
        *offering("SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN"),
        refuse_auth(b"SCRAM-SHA-256"),
        Expect(b"AUTH PLAIN " + plain + b"\r\n"),
        OK,
        *NO_CAPA,
    ]
    assert logged_in_by(script) == "PLAIN"


def test_a_busy_server_is_not_asked_in_another_way() -> None:
    busy = b"-ERR [SYS/TEMP] Temporary authentication failure.\r\n"
    error = refusal_of([*offering("SCRAM-SHA-256", "PLAIN"), refuse_auth(b"SCRAM-SHA-256", busy)])
    assert error.kind is FailureKind.TRANSIENT


def test_a_mechanism_that_is_fixed_is_never_replaced() -> None:
    script = [*offering("SCRAM-SHA-256", "PLAIN"), refuse_auth(b"SCRAM-SHA-256")]
    assert refusal_of(script, mechanism="SCRAM-SHA-256").kind is FailureKind.AUTH


def test_y13_scram_that_is_offered_and_unknown_gives_way_to_the_next() -> None:
    def unknown(name: bytes) -> list[Step]:
        """With and without an initial response."""
        two_steps: list[Step] = [Expect(b"AUTH " + name + b"\r\n"), Send(b"-ERR unknown mechanism\r\n")]
        return [refuse_auth(name, b"-ERR unknown mechanism\r\n"), *two_steps]

    script = [
        *offering("SCRAM-SHA-256", "SCRAM-SHA-1", "LOGIN"),
        *unknown(b"SCRAM-SHA-256"),
        *unknown(b"SCRAM-SHA-1"),
        Expect(b"AUTH LOGIN\r\n"),
        Send(b"+ VXNlcm5hbWU6\r\n"),
        Expect(b64(b"user") + b"\r\n"),
        Send(b"+ UGFzc3dvcmQ6\r\n"),
        Expect(b64(PASSWORD.encode()) + b"\r\n"),
        OK,
        *NO_CAPA,
    ]
    assert logged_in_by(script) == "LOGIN"


def test_a_password_that_scram_cannot_carry_goes_by_plain() -> None:
    password = PASSWORD + "\U0001f511"
    script = [
        *offering("SCRAM-SHA-256", "PLAIN"),
        Expect(b"AUTH PLAIN " + b64(b"\0user\0" + password.encode()) + b"\r\n"),
        OK,
        *NO_CAPA,
    ]
    assert logged_in_by(script, password) == "PLAIN"


# Channel binding.


def end_point(certificate: tuple[Path, Path]) -> bytes:
    """RFC 5929 section 4.1 for a certificate that is signed with SHA-256."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate[0].read_text())).digest()


@pytest.mark.parametrize("name", ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS"])
def test_a_channel_is_bound_where_the_server_offers_it(name: str, certificate: tuple[Path, Path]) -> None:
    server = ScramServer(name, PASSWORD, "p=tls-server-end-point", end_point(certificate))
    script = [*offering("PLAIN", name.removesuffix("-PLUS"), name), scram(server), *NO_CAPA]
    assert logged_in_by(script, certificate=certificate) == name


def test_a_server_without_binding_is_told_that_we_could(certificate: tuple[Path, Path]) -> None:
    script = [*offering("SCRAM-SHA-256"), scram(ScramServer("SCRAM-SHA-256", PASSWORD, "y")), *NO_CAPA]
    assert logged_in_by(script, certificate=certificate) == "SCRAM-SHA-256"


def test_binding_that_is_forbidden_by_the_url_is_not_denied(certificate: tuple[Path, Path]) -> None:
    """Flag n: the client does not bind. Flag y would make the server think that its offer was stripped."""
    server = ScramServer("SCRAM-SHA-256", PASSWORD, "n")
    script = [*offering("SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"), scram(server), *NO_CAPA]
    assert logged_in_by(script, mechanism="SCRAM-SHA-256", certificate=certificate) == "SCRAM-SHA-256"


def test_in_clear_there_is_nothing_to_bind_to() -> None:
    script = [
        *offering("SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"),
        scram(ScramServer("SCRAM-SHA-256", PASSWORD)),
        *NO_CAPA,
    ]
    assert logged_in_by(script) == "SCRAM-SHA-256"
    error = refusal_of(offering("SCRAM-SHA-256-PLUS"), mechanism="SCRAM-SHA-256-PLUS")
    assert error.kind is FailureKind.OPERATOR


def test_a_refused_binding_says_what_may_be_behind_it(certificate: tuple[Path, Path]) -> None:
    script = [*offering("SCRAM-SHA-256-PLUS"), refuse_auth(b"SCRAM-SHA-256-PLUS")]
    error = refusal_of(script, mechanism="SCRAM-SHA-256-PLUS", certificate=certificate)
    assert "proxy" in str(error)


# CRAM-MD5, APOP, EXTERNAL.


def test_cram_md5_where_it_is_asked_for() -> None:
    digest = hmac.new(PASSWORD.encode(), STAMP, "md5").hexdigest()
    script = [
        *offering("PLAIN"),
        Expect(b"AUTH CRAM-MD5\r\n"),
        Send(b"+ " + b64(STAMP) + b"\r\n"),
        Expect(b64(b"user " + digest.encode()) + b"\r\n"),
        OK,
        *NO_CAPA,
    ]
    assert logged_in_by(script, mechanism="CRAM-MD5") == "CRAM-MD5"


def test_apop_where_it_is_asked_for(certificate: tuple[Path, Path]) -> None:
    digest = hashlib.md5(STAMP + PASSWORD.encode()).hexdigest().encode()
    script = [
        *offering("PLAIN", greeting=b"+OK ready " + STAMP + b"\r\n"),
        Expect(b"APOP user " + digest + b"\r\n"),
        OK,
        *NO_CAPA,
    ]
    assert logged_in_by(script, mechanism="+APOP") == "APOP"
    assert logged_in_by(script, mechanism="+APOP", certificate=certificate) == "APOP"


def test_apop_is_not_used_unasked() -> None:
    script = [
        Send(b"+OK ready " + STAMP + b"\r\n"),
        *NO_CAPA,
        Expect(b"USER user\r\n"),
        OK,
        Expect(b"PASS " + PASSWORD.encode() + b"\r\n"),
        OK,
        *NO_CAPA,
    ]
    assert logged_in_by(script) == "USER/PASS"


@pytest.mark.parametrize("stamp", [b"", b"<1\xff@host>", b"<1 2@host>"])
def test_cve_2007_1558_apop_with_a_false_stamp_sends_nothing(stamp: bytes) -> None:
    script = offering("PLAIN", greeting=b"+OK ready " + stamp + b"\r\n")
    error = refusal_of(script, mechanism="+APOP")
    assert error.kind is FailureKind.OPERATOR
    assert "the password was not sent" in str(error)


def test_y8_apop_that_is_refused_ends_the_login() -> None:
    digest = hashlib.md5(STAMP + PASSWORD.encode()).hexdigest().encode()
    script = [
        *offering("PLAIN", greeting=b"+OK ready " + STAMP + b"\r\n"),
        Expect(b"APOP user " + digest + b"\r\n"),
        Send(b"-ERR no such thing as " + digest + b"\r\n"),
    ]
    error = refusal_of(script, mechanism="+APOP")
    assert error.kind is FailureKind.AUTH
    assert digest.decode() not in str(error)


def test_external_sends_the_name_and_no_password() -> None:
    script = [*offering(), Expect(b"AUTH EXTERNAL " + b64(b"user") + b"\r\n"), OK, *NO_CAPA]
    assert logged_in_by(script, mechanism="EXTERNAL") == "EXTERNAL"


# OAuth.

XOAUTH2 = b64(f"user=user\1auth=Bearer {TOKEN}\1\1".encode())
XOAUTH2_OPENING: list[Step] = [
    *offering("PLAIN", "XOAUTH2"),
    Expect(b"AUTH XOAUTH2\r\n"),
    Send(b"+ \r\n"),
    Expect(XOAUTH2 + b"\r\n"),
]


def test_m2_an_access_token_goes_in_two_steps() -> None:
    assert logged_in_by([*XOAUTH2_OPENING, OK, *NO_CAPA], TOKEN, mechanism="XOAUTH2") == "XOAUTH2"


def test_m2_so_does_a_short_one() -> None:
    script = [
        *offering("XOAUTH2"),
        Expect(b"AUTH XOAUTH2\r\n"),
        Send(b"+\r\n"),
        Expect(b64(b"user=user\1auth=Bearer t\1\1") + b"\r\n"),
        OK,
        *NO_CAPA,
    ]
    with session(script, mechanism="XOAUTH2") as (mailbox, _):
        mailbox.login("t")
        assert mailbox.facts.mechanism == "XOAUTH2"


@pytest.mark.parametrize(
    ("status", "kind"),
    [("400", FailureKind.AUTH), ("403", FailureKind.OPERATOR), ("500", FailureKind.TRANSIENT)],
)
def test_g13_the_error_challenge_is_answered_by_an_empty_line(status: str, kind: FailureKind) -> None:
    told = json.dumps({"status": status, "schemes": "Bearer", "scope": "https://mail.google.com/"}).encode()
    script = [
        *XOAUTH2_OPENING,
        Send(b"+ " + b64(told) + b"\r\n"),
        Expect(b"\r\n"),
        Send(b"-ERR [AUTH] Username and password not accepted.\r\n"),
    ]
    error = refusal_of(script, TOKEN, mechanism="XOAUTH2")
    assert error.kind is kind
    assert f"refused the access token ({status})" in str(error)
    assert "not accepted" in str(error)


def test_m4_microsoft_refuses_a_token_at_once() -> None:
    said = Send(b"-ERR Logon failure: unknown user name or bad password.\r\n")
    assert refusal_of([*XOAUTH2_OPENING, said], TOKEN, mechanism="XOAUTH2").kind is FailureKind.AUTH


def test_m3_a_long_token_is_named_as_what_may_be_the_reason() -> None:
    token = "t" * 5000
    script = [
        *offering("XOAUTH2"),
        Expect(b"AUTH XOAUTH2\r\n"),
        Send(b"+ \r\n"),
        Expect(b64(f"user=user\1auth=Bearer {token}\1\1".encode()) + b"\r\n"),
        Send(b"-ERR Protocol error. Connection is closed. 10\r\n"),
    ]
    error = refusal_of(script, token, mechanism="XOAUTH2")
    assert error.kind is FailureKind.OPERATOR
    assert "5000 bytes" in str(error)


def test_oauthbearer_and_its_error() -> None:
    def opening(channel: Channel) -> None:
        assert channel.line() == b"AUTH OAUTHBEARER"
        channel.send(b"+ \r\n")
        gs2, host, port, auth, *end = base64.b64decode(channel.line()).split(b"\1")
        assert (gs2, host, end) == (b"n,a=user,", b"host=localhost", [b"", b""])
        assert port.startswith(b"port=")
        assert auth == b"auth=Bearer " + TOKEN.encode()

    script = [*offering("OAUTHBEARER"), Talk(opening)]
    assert logged_in_by([*script, OK, *NO_CAPA], TOKEN, mechanism="OAUTHBEARER") == "OAUTHBEARER"
    told = Send(b"+ " + b64(b'{"status":"invalid_token"}') + b"\r\n")
    refused = [*script, told, Expect(b"AQ==\r\n"), REFUSED]
    assert refusal_of(refused, TOKEN, mechanism="OAUTHBEARER").kind is FailureKind.AUTH


def test_a_password_is_not_taken_for_a_token() -> None:
    """OAuth is used only if the URL names it: an offer of the server is not enough."""
    script = [
        *offering("XOAUTH2", "OAUTHBEARER"),
        Expect(b"USER user\r\n"),
        OK,
        Expect(b"PASS " + PASSWORD.encode() + b"\r\n"),
        OK,
        *NO_CAPA,
    ]
    assert logged_in_by(script) == "USER/PASS"


# What must not be seen.


def repeat_and_refuse(channel: Channel) -> None:
    """A server that repeats what it hears, and refuses it."""
    _, name, *initial = channel.line().split(b" ")
    if name.startswith(b"SCRAM"):
        heard = base64.b64decode(initial[0])
    elif initial:
        heard = initial[0]
    else:
        challenge = {b"CRAM-MD5": STAMP}.get(name, b"")
        channel.send(b"+ " + b64(challenge) + b"\r\n")
        heard = channel.line()
    if name == b"LOGIN":
        channel.send(b"+ UGFzc3dvcmQ6\r\n")
        heard = channel.line()
    told = heard + b" " + base64.b64decode(heard, validate=False) if not name.startswith(b"SCRAM") else heard
    channel.send(b"-ERR [AUTH] I heard " + told.replace(b"\0", b" ") + b" and " + heard + b"\r\n")


@pytest.mark.parametrize(
    "mechanism", ["PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2", "OAUTHBEARER", "SCRAM-SHA-256"]
)
def test_nothing_of_an_exchange_is_seen_in_an_error_or_a_log(
    mechanism: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with session([*offering(mechanism), Talk(repeat_and_refuse)], mechanism=mechanism) as (mailbox, _):
        with pytest.raises(Pop3Error) as caught:
            mailbox.login(PASSWORD)
        shown = repr(mailbox) + repr(mailbox.facts) + caplog.text
    error: BaseException | None = caught.value
    while error is not None:
        shown += str(error) + repr(error)
        error = error.__cause__ or error.__context__
    assert "I heard ***" in shown
    assert PASSWORD not in shown
    for part in (PASSWORD.encode(), STAMP, f"Bearer {PASSWORD}".encode()):
        assert b64(part).decode().rstrip("=")[:-2] not in shown
    assert hmac.new(PASSWORD.encode(), STAMP, "md5").hexdigest() not in shown
    assert ",r=" not in shown


def test_a_connection_that_ends_in_an_exchange_proves_nothing() -> None:
    script = [*offering("CRAM-MD5"), Expect(b"AUTH CRAM-MD5\r\n"), HangUp()]
    assert refusal_of(script, mechanism="CRAM-MD5").kind is FailureKind.TRANSIENT


@pytest.mark.parametrize(
    "mechanism", ["LOGIN", "CRAM-MD5", "XOAUTH2", "OAUTHBEARER", "SCRAM-SHA-1", "EXTERNAL"]
)
def test_challenges_without_end_are_ended(mechanism: str) -> None:
    def talk(channel: Channel) -> None:
        while True:
            channel.line()
            channel.send(b"+ " + b64(STAMP) + b"\r\n")

    error = refusal_of([*offering(mechanism), Talk(talk)], mechanism=mechanism)
    assert error.kind in {FailureKind.PROTOCOL, FailureKind.SECURITY, FailureKind.AUTH}


def test_a_challenge_that_is_not_base64_is_cancelled_and_not_shown() -> None:
    script = [
        *offering("CRAM-MD5"),
        Expect(b"AUTH CRAM-MD5\r\n"),
        Send(b"+ <not base64>\r\n"),
        Expect(b"*\r\n"),
        Send(b"-ERR\r\n"),
    ]
    error = refusal_of(script, mechanism="CRAM-MD5")
    assert error.kind is FailureKind.PROTOCOL
    assert "not base64" in str(error)

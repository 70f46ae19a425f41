"""What CAPA announces and what follows from it (RFC 2449, RFC 6856); the small commands."""

from pathlib import Path
from typing import Any

import pytest

from archiver.pop3 import Mailbox, TlsSettings
from archiver.pop3.capabilities import parse_capabilities
from tests.harness.scripted_pop3 import Expect, HangUp, MailboxPlay, ScriptedPop3, Send, Step

GREETING: list[Step] = [Send(b"+OK ready\r\n"), Expect(b"CAPA\r\n")]
LOGIN: list[Step] = [
    Expect(b"USER user\r\n"),
    Send(b"+OK\r\n"),
    Expect(b"PASS secret\r\n"),
    Send(b"+OK\r\n"),
    Expect(b"CAPA\r\n"),
    Send(b"+OK\r\nUTF8\r\n.\r\n"),
    HangUp(),
]


@pytest.mark.parametrize(
    ("answer", "on"), [(b"+OK UTF8 enabled\r\n", True), (b"-ERR not today\r\n", False)], ids=["yes", "no"]
)
def test_utf8_is_switched_on_before_the_login_where_it_is_offered(answer: bytes, *, on: bool) -> None:
    script = [*GREETING, Send(b"+OK\r\nUTF8\r\n.\r\n"), Expect(b"UTF8\r\n"), Send(answer), *LOGIN]
    with ScriptedPop3([script]) as server, Mailbox.connect(server.endpoint) as mailbox:
        mailbox.login("secret")
        assert mailbox.facts.utf8 is on


def test_it_is_asked_after_starttls(certificate: tuple[Path, Path]) -> None:
    """RFC 6856 section 2.1: after UTF8 there is no STLS."""
    mail = MailboxPlay([], capabilities=("SASL PLAIN", "UTF8"), faults={"UTF8": Send(b"+OK\r\n")})
    with (
        ScriptedPop3(mail, tls="starttls", certificate=certificate) as server,
        Mailbox.connect(server.endpoint, tls_settings=TlsSettings(ca_file=certificate[0])) as mailbox,
    ):
        assert mailbox.facts.utf8
        mailbox.login("secret")
    verbs = [(line.split(b" ")[0], by_tls) for line, by_tls in server.received]
    assert verbs == [(b"STLS", False), (b"CAPA", True), (b"UTF8", True), (b"AUTH", True), (b"CAPA", True)]


@pytest.mark.parametrize("capabilities", [None, ("USER", "SASL PLAIN"), ("USER", "SASL PLAIN", "UTF16")])
def test_it_is_never_asked_unoffered(capabilities: tuple[str, ...] | None) -> None:
    """Some servers disconnect at a verb that they do not know."""
    with (
        ScriptedPop3(MailboxPlay([], capabilities=capabilities)) as server,
        Mailbox.connect(server.endpoint) as mailbox,
    ):
        mailbox.login("secret")
        assert not mailbox.facts.utf8
    assert server.commands["UTF8"] == 0


FOREIGN: dict[str, Any] = {"user": "jürgen", "password": "пароль"}
ACCEPTED = {"UTF8": Send(b"+OK\r\n")}


@pytest.mark.parametrize("capabilities", [None, ("USER",), ("USER", "UTF8"), ("USER", "UTF8 USER")])
def test_a_foreign_name_and_password_go_out_as_utf8(capabilities: tuple[str, ...] | None) -> None:
    mail = MailboxPlay([], capabilities=capabilities, faults=ACCEPTED, **FOREIGN)
    with ScriptedPop3(mail) as server, Mailbox.connect(server.endpoint) as mailbox:
        mailbox.login(FOREIGN["password"])
        assert mailbox.facts.mechanism == "USER/PASS"
    lines = [line for line, _ in server.received]
    assert "USER jürgen".encode() in lines
    assert "PASS пароль".encode() in lines


def test_they_go_out_by_sasl_where_the_server_offers_it() -> None:
    mail = MailboxPlay([], capabilities=("USER", "SASL PLAIN"), **FOREIGN)
    with ScriptedPop3(mail) as server, Mailbox.connect(server.endpoint) as mailbox:
        mailbox.login(FOREIGN["password"])
        assert mailbox.facts.mechanism == "PLAIN"
    assert server.commands["USER"] == 0


def test_they_go_out_by_user_and_pass_where_the_server_forgot_its_mechanism() -> None:
    mail = MailboxPlay(
        [],
        capabilities=("USER", "SASL PLAIN"),
        faults={"AUTH": Send(b"-ERR unknown command\r\n")},
        **FOREIGN,
    )
    with ScriptedPop3(mail) as server, Mailbox.connect(server.endpoint) as mailbox:
        mailbox.login(FOREIGN["password"])
        assert mailbox.facts.mechanism == "USER/PASS"


# What CAPA says of delays and expiry.


@pytest.mark.parametrize(
    ("line", "days"),
    [
        ("EXPIRE 0", 0),
        ("EXPIRE 30", 30),
        ("EXPIRE 5 USER", 5),
        ("EXPIRE NEVER", None),
        ("expire 7", 7),
        ("EXPIRENEVER", None),
        ("EXPIRE", None),
        ("EXPIRE -1", None),
        ("EXPIRE " + "9" * 150, 36500),
    ],
)
def test_expiry(line: str, days: int | None) -> None:
    assert parse_capabilities(f"{line}\r\n".encode()).expire_days == days


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        ("LOGIN-DELAY 720", 720.0),
        ("LOGIN-DELAY 900 USER", 900.0),
        ("LOGIN-DELAY 0", 0.0),
        ("LOGIN-DELAY", None),
    ],
)
def test_login_delay(line: str, seconds: float | None) -> None:
    assert parse_capabilities(f"{line}\r\n".encode()).login_delay_seconds == seconds


def test_a_delay_that_is_the_users_own_is_told_after_the_login() -> None:
    """RFC 2449 section 6.5: USER says that it may differ once it is known who asks."""
    before, after = b"+OK\r\nLOGIN-DELAY 60 USER\r\n.\r\n", b"+OK\r\nLOGIN-DELAY 900\r\nEXPIRE 0\r\n.\r\n"
    script = [*GREETING, Send(before), *LOGIN[:-2], Send(after), HangUp()]
    with ScriptedPop3([script]) as server, Mailbox.connect(server.endpoint) as mailbox:
        assert mailbox.facts.login_delay_seconds == 60
        mailbox.login("secret")
        assert (mailbox.facts.login_delay_seconds, mailbox.facts.expire_days) == (900, 0)

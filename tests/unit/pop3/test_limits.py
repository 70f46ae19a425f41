"""Every limit that a server exceeds is named by the error."""

import io
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from archiver.pop3 import FailureKind, Limits, Mailbox, Pop3Error, Refused
from tests.harness.scripted_pop3 import (
    Expect,
    Fault,
    MailboxPlay,
    ScriptedPop3,
    Send,
    SendEndlessly,
    Stall,
    Step,
)

SHORT_SECONDS = 0.1


def play(**faults: Fault) -> MailboxPlay:
    messages = [(b"uid-%d" % number, b"x" * 1000 + b"\r\n") for number in range(20)]
    return MailboxPlay(messages, faults=faults)


def session(mailbox: Mailbox) -> None:
    mailbox.login("secret")
    for outcome in mailbox.retrieve(mailbox.list().entries, lambda _: io.BytesIO()):
        if isinstance(outcome, Refused):
            raise outcome.error
    mailbox.quit()


CASES: dict[str, tuple[MailboxPlay, dict[str, Any], FailureKind]] = {
    "greeting_seconds": (play(), {}, FailureKind.TRANSIENT),
    "login_seconds": (play(AUTH=Stall()), {}, FailureKind.TRANSIENT),
    "listing_seconds": (play(UIDL=Stall()), {}, FailureKind.TRANSIENT),
    "idle_seconds": (play(RETR=Send(b"+OK\r\nfirst line\r\n")), {}, FailureKind.TRANSIENT),
    "quit_seconds": (play(QUIT=Stall()), {}, FailureKind.TRANSIENT),
    "status_line_bytes": (
        play(UIDL=Send(b"+OK " + b"x" * 600 + b"\r\n")),
        {"status_line_bytes": 512},
        FailureKind.PROTOCOL,
    ),
    "listing_lines": (play(), {"listing_lines": 10}, FailureKind.PROTOCOL),
    "listing_bytes": (play(), {"listing_bytes": 100}, FailureKind.PROTOCOL),
    "message_bytes": (play(), {"message_bytes": 999}, FailureKind.POISON),
}


def failure(call: Callable[[], object]) -> Pop3Error:
    with pytest.raises(Pop3Error) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("name", CASES)
def test_the_error_names_the_limit(name: str) -> None:
    mail, limits, kind = CASES[name]
    if name.endswith("seconds"):
        limits = {name: SHORT_SECONDS}
    script: list[Step] = [Stall()]
    with ScriptedPop3([script] if name == "greeting_seconds" else mail) as server:

        def whole() -> None:
            with Mailbox.connect(server.endpoint, limits=Limits(**limits)) as mailbox:
                session(mailbox)

        error = failure(whole)
    assert (error.limit, error.kind) == (name, kind)


def test_a_server_that_drips_runs_into_the_end_of_the_session() -> None:
    now = iter(range(1000))
    with ScriptedPop3(play(RETR=SendEndlessly(b"+OK\r\n" + b"drip\r\n"))) as server:

        def whole() -> None:
            limits = Limits(session_seconds=40)
            with Mailbox.connect(
                server.endpoint, limits=limits, monotonic=lambda: float(next(now))
            ) as mailbox:
                session(mailbox)

        error = failure(whole)
    assert (error.limit, error.kind) == ("session_seconds", FailureKind.TRANSIENT)


def test_a_handshake_that_does_not_end_is_a_matter_of_connecting() -> None:
    with ScriptedPop3(
        [[Send(b"+OK ready\r\n"), Expect(b"STLS\r\n"), Send(b"+OK\r\n"), Stall()]], tls="starttls"
    ) as server:
        error = failure(
            lambda: Mailbox.connect(server.endpoint, limits=Limits(connect_seconds=SHORT_SECONDS))
        )
    assert error.limit == "connect_seconds"


def test_what_exceeds_no_limit_names_none() -> None:
    with ScriptedPop3(play(UIDL=Send(b"-ERR [SYS/TEMP] later\r\n"))) as server:

        def whole() -> None:
            with Mailbox.connect(server.endpoint) as mailbox:
                session(mailbox)

        assert failure(whole).limit is None


def test_a_case_for_every_limit() -> None:
    elsewhere = {"connect_seconds", "session_seconds"}
    no_error = {"capability_seconds", "window"}  # the session connects again; a window cannot be exceeded
    assert {field.name for field in fields(Limits)} == CASES.keys() | elsewhere | no_error

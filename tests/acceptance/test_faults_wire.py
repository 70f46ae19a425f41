"""The line to the mail server breaks at every step of a session: cut, reset, stalled, or dripping.

Each step has a mailbox, a proxy and an account of its own, and one command
polls them all, so that the limits which end a stall are waited for once. What
the proxy breaks it breaks exactly there: in clear text it sees the step, under
TLS it counts octets.
"""

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, get_args

import pytest

from tests.conftest import Mailbox
from tests.harness.archive import Archive
from tests.harness.proxy import Break, Direction, Proxy

pytestmark = pytest.mark.slow

PASSWORD = "the same for all"
MESSAGES = 3
POINTS = int(os.environ.get("FAULT_POINTS", "8"))
"""Places in a TLS session, evenly spread. FAULT_POINTS=500 takes some minutes."""

LIMITS = {
    f"ARCHIVER_{limit}_SECONDS": "3" for limit in ("CONNECT", "GREETING", "LOGIN", "LISTING", "IDLE", "QUIT")
} | {"ARCHIVER_CAPABILITY_SECONDS": "1", "ARCHIVER_SESSION_SECONDS": "3", "ARCHIVER_WORKERS": "40"}
"""What drips is ended by twice the session's."""

numbers = count(1)


class Step(NamedTuple):
    """A place in a session: up to the end of what looks so, all that goes this way is relayed."""

    name: str
    pattern: bytes
    direction: Direction = "down"
    outcome: str = "try_later"
    login: str = ""
    """What the URL fixes."""


def nth(number: int, pattern: bytes) -> bytes:
    return b"(?:.*?%s){%d}" % (pattern, number)


BODY = rb"\+OK \d+ octets\r\n.*?"
"""As Dovecot announces a message."""

STEPS = [
    Step("connect", rb""),
    Step("greeting", rb"\+OK D"),
    # A server that does not like CAPA is called again, without it.
    Step("CAPA", rb"ready\.\r\n(?=\+OK)", outcome="ok"),
    Step("CAPA, in its answer", rb"\r\nCAPA\r\n", outcome="ok"),
    Step("AUTH", rb"\.\r\n(?=\+OK Log)"),
    Step("AUTH, in its answer", rb"\+OK Log"),
    Step("UIDL, begun", rb"UIDL\r", "up"),
    Step("UIDL", rb"UIDL\r\n", "up"),
    Step("UIDL, in its answer", rb"Logged in\.\r\n.*?\r\n1 \w+\r\n2"),
    Step("LIST, in its answer", rb"\r\n\.\r\n\+OK 3 mess"),
    Step("RETR 1", rb"RETR 1\r\n", "up"),
    Step("RETR 1, in its status line", rb"\+OK \d+ oct"),
    Step("RETR 1, in its body", BODY + rb"the middle"),
    Step("RETR 1, before its last dot", BODY + rb"\r\n(?=\.\r\n)"),
    Step("RETR 2, between two", nth(1, BODY + rb"the end\r\n\.\r\n")),
    Step("RETR 2, in its body", nth(2, BODY + rb"the middle")),
    Step("RETR 3, before its last dot", nth(3, BODY + rb"the end\r\n")),
    Step("DELE 1, begun", rb"DELE 1\r", "up"),
    Step("DELE 1, in its answer", rb"\+OK Marked"),
    Step("DELE 3, in its answer", nth(3, rb"\+OK Marked")),
    Step("QUIT, begun", rb"QUI", "up"),
    Step("QUIT", rb"\+OK Marked[^\n]*\n(?=\+OK Logging)"),
    Step("QUIT, in its answer", rb"\+OK Logging"),
    Step("QUIT, after its answer", rb"\+OK Logging out[^\n]*\n", outcome="ok"),
]

USER_PASS = ";AUTH=+LOGIN"
STEPS += [
    Step("USER, begun", rb"USER", "up", login=USER_PASS),
    Step("USER, in its answer", rb"\r\n\.\r\n\+O", login=USER_PASS),
    Step("PASS, begun", rb"PASS", "up", login=USER_PASS),
    Step("PASS", rb"\+OK\r\n(?=\+OK Log)", login=USER_PASS),
    Step("PASS, in its answer", rb"\+OK Log", login=USER_PASS),
]

STLS_STEPS = [
    Step("STLS", rb"ready\.\r\n(?=\+OK)"),
    Step("STLS, in its answer", rb"\+OK Begin"),
    Step("the handshake", rb"\+OK Begin[^\n]*\n"),
    Step("the handshake, in the client's hello", rb"STLS\r\n.{100}", "up"),
    Step("the handshake, in the server's hello", rb"\+OK Begin[^\n]*\n.{100}"),
]


@dataclass(frozen=True, slots=True)
class Line:
    """One step's mailbox, and the way to it."""

    name: str
    url: str
    box: Mailbox
    proxy: Proxy
    delivered: list[bytes]


class Lines:
    """Mailboxes, each behind a proxy of its own, that one command polls, with deletion on."""

    def __init__(self, archive: Archive, mailbox: Callable[..., Mailbox], stack: ExitStack) -> None:
        self.all: list[Line] = []
        self._archive = archive
        self._mailbox = mailbox
        self._stack = stack
        archive.cli.environment |= LIMITS

    def add(self, name: str, *, scheme: str = "pop3", login: str = "") -> Proxy:
        """One more; gives its proxy, for a fault to be planned."""
        delivered = [letter() for _ in range(MESSAGES)]
        box = self._mailbox(delivered, password=PASSWORD)
        server = box.server
        proxy = self._stack.enter_context(Proxy(server.pop3s_port if scheme == "pop3s" else server.pop3_port))
        url = f"{scheme}://{box.user}{login}@{proxy.host}:{proxy.port}"
        self.all.append(Line(name, url, box, proxy, delivered))
        return proxy

    def poll(self, *options: str, code: int) -> dict[str, dict[str, Any]]:
        """Poll all; gives each one's report."""
        access = self._archive.access(self.all[0].box)
        wanted = access[2:] if "none" in options else access
        urls = [line.url for line in self.all]
        ended = self._archive.cli.run(
            "sync", *urls, *options, *wanted, "--delete", "after-archived", "--json"
        )
        assert (ended.code, ended.err) == (code, "")
        return {line.name: report for line, report in zip(self.all, ended.json, strict=True)}

    def expect_breaks_and_words(self, reports: dict[str, dict[str, Any]]) -> None:
        """Each line broke where it was to, and who failed says where it called and why. Nothing is lost."""
        assert [line.name for line in self.all if line.proxy.breaks != 1] == []
        for line in self.all:
            error = reports[line.name]["error"]
            if error is not None:
                assert f"{line.proxy.host}:{line.proxy.port}" in error, line.name
                assert any(reason in error for reason in REASONS), error
        self.expect_none_lost()

    def expect_none_lost(self) -> None:
        left = [message for line in self.all for message in line.box.messages()]
        self._archive.expect_none_lost(self._delivered(), left)

    def expect_all_done_at_last(self, *options: str) -> None:
        """One poll without faults archives and deletes the rest; nothing was stored twice."""
        reports = self.poll(*options, code=0)
        assert outcomes(reports) == dict.fromkeys(reports, "ok")
        assert [line.name for line in self.all if line.box.messages()] == []
        self._archive.expect_each_once(self._delivered())

    def _delivered(self) -> list[bytes]:
        return [message for line in self.all for message in line.delivered]


@pytest.fixture
def lines(in_directory: Archive, mailbox: Callable[..., Mailbox]) -> Iterator[Lines]:
    with ExitStack() as stack:
        yield Lines(in_directory, mailbox, stack)


@pytest.mark.parametrize("how", get_args(Break))
def test_a_line_that_breaks_at_a_step(lines: Lines, how: Break) -> None:
    for step in STEPS:
        lines.add(step.name, login=step.login).break_at(step.pattern, how, direction=step.direction)

    reports = lines.poll("--tls", "none", code=1)

    assert outcomes(reports) == {step.name: step.outcome for step in STEPS}
    lines.expect_breaks_and_words(reports)
    lines.expect_all_done_at_last("--tls", "none")


@pytest.mark.parametrize("how", ["cut", "stall"])
def test_tls_that_breaks_as_it_starts_or_anywhere(
    lines: Lines, mailbox: Callable[..., Mailbox], how: Break
) -> None:
    for step in STLS_STEPS:
        lines.add(step.name).break_at(step.pattern, how, direction=step.direction)
    for direction, octets in octets_of_a_session(mailbox([letter() for _ in range(MESSAGES)])).items():
        for point in range(POINTS):
            proxy = lines.add(f"{direction} {point} of {POINTS}", scheme="pop3s")
            proxy.break_after(octets * point // POINTS, how, direction=direction)

    reports = lines.poll(code=1)

    assert set(outcomes(reports).values()) <= {"try_later", "ok"}
    done = [line for line in lines.all if reports[line.name]["outcome"] == "ok"]
    # Called again without CAPA, or QUIT was answered before.
    assert [line.name for line in done if line.box.messages()] == []
    assert len(done) < len(lines.all) / 3
    lines.expect_breaks_and_words(reports)
    lines.expect_all_done_at_last()


def test_a_message_in_which_the_line_breaks_time_and_again_is_set_aside(lines: Lines) -> None:
    proxy = lines.add("RETR 2")
    [line] = lines.all
    subject = line.delivered[1].splitlines()[0]

    for _ in range(3):
        proxy.break_at(subject + b"\r\n.*?the middle", "reset")
        assert outcomes(lines.poll("--tls", "none", code=1)) == {"RETR 2": "try_later"}
        lines.expect_none_lost()
    report = lines.poll("--tls", "none", code=0)["RETR 2"]

    # The others are not held up, and it is kept where it is.
    assert (report["known"], report["quarantined"], report["delete_requested"]) == (2, 1, 2)
    assert line.box.messages() == [line.delivered[1]]
    lines.expect_none_lost()


def octets_of_a_session(box: Mailbox) -> dict[Direction, int]:
    """How much TLS sends each way while such a mailbox is emptied, less what varies."""
    with Proxy(box.server.pop3s_port) as proxy:
        trusting = ssl.create_default_context(cafile=box.ca_file)
        with (
            socket.create_connection((proxy.host, proxy.port)) as plain,
            trusting.wrap_socket(plain, server_hostname=proxy.host) as connection,
        ):
            verbs = [f"USER {box.user}", f"PASS {box.password}", "UIDL", "LIST"]
            verbs += [f"{verb} {number}" for verb in ("RETR", "DELE") for number in (1, 2, 3)]
            for verb in (*verbs, "QUIT"):
                connection.sendall(f"{verb}\r\n".encode())
            while connection.recv(65536):
                pass
        return {"up": proxy.bytes_up, "down": proxy.bytes_down}


def outcomes(reports: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: report["outcome"] for name, report in reports.items()}


def letter() -> bytes:
    """A message of its own."""
    return b"Subject: %d\r\n\r\nthe beginning\r\n%sthe middle\r\n%sthe end\r\n" % (
        next(numbers),
        b"0123456789\r\n" * 20,
        b"..\r\n" * 20,
    )


REASONS = ("timed out", "the server closed the connection", "the connection broke", "no connection", "TLS")

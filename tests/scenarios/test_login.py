"""How `account check` tells by what way it logged in, and what could be overheard."""

import base64
from pathlib import Path

import pytest

from tests.harness.scram import ScramServer
from tests.harness.scripted_pop3 import Channel, Expect, MailboxPlay, ScriptedPop3, Send, Step, Talk
from tests.scenarios.test_commands import Commands

PASSWORD = "secret"  # what Commands has in the variable PASSWORD


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def checked(commands: Commands, server: ScriptedPop3) -> tuple[str, str]:
    """The way, and the first advice."""
    url = f"pop3://user@127.0.0.1:{server.port}"
    [told] = commands.json("account", "check", url, "--tls", "none", "--password-env", "PASSWORD")
    return told["mechanism"], told["advice"][0]


def test_a_password_in_clear_is_told(commands: Commands) -> None:
    with ScriptedPop3(MailboxPlay([], password=PASSWORD)) as server:
        mechanism, advice = checked(commands, server)
    assert mechanism == "PLAIN"
    assert advice.startswith("Password and mail cross the network in clear")


def test_by_scram_only_the_mail_is_in_clear(commands: Commands) -> None:
    scram = ScramServer("SCRAM-SHA-256", PASSWORD)

    def log_in(channel: Channel) -> None:
        first = base64.b64decode(channel.line().split(b" ")[2])
        channel.send(b"+ " + base64.b64encode(scram.first(first)) + b"\r\n")
        signature = scram.final(base64.b64decode(channel.line()))
        channel.send(b"+ " + base64.b64encode(signature) + b"\r\n")
        assert channel.line() == b""
        channel.send(b"+OK\r\n")

    empty = Send(b"+OK\r\n.\r\n")
    script: list[Step] = [
        Send(b"+OK ready\r\n"),
        Expect(b"CAPA\r\n"),
        Send(b"+OK\r\nSASL PLAIN SCRAM-SHA-256\r\n.\r\n"),
        Talk(log_in),
        *(step for line in (b"CAPA\r\n", b"UIDL\r\n", b"LIST\r\n") for step in (Expect(line), empty)),
        *(step for line in (b"NOOP\r\n", b"QUIT\r\n") for step in (Expect(line), Send(b"+OK\r\n"))),
    ]
    with ScriptedPop3([script]) as server:
        mechanism, advice = checked(commands, server)
    assert mechanism == "SCRAM-SHA-256"
    assert advice.startswith("Mail crosses the network in clear")

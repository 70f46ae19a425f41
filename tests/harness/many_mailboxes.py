"""A mail server with as many mailboxes as anybody asks for, that does no work.

It answers POP3 in clear from the user's name alone: ``kind-number-messages-octets``
is a mailbox of so many messages of so many octets. ``keep`` never changes;
``grow`` has one message more at each login; ``roll`` has lost its oldest at
each and got a new one; ``hang`` takes the login and never lists; ``slow`` rests
a second in the middle of each message; of ``far`` each answer, from that to USER
on, comes a fifth of a second after its command. What it serves is counted by
user, so that a bench can tell who was polled, and when. It is a process of its
own: its work is not the client's.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from archiver.demo import processes

PASSWORD = "secret"
_COUNTS = "XCOUNTS"
_CAPABILITIES = b"+OK\r\nUIDL\r\nPIPELINING\r\nUSER\r\nRESP-CODES\r\n.\r\n"
_LINE = b"All work and no play makes a dull message, line after line after line.\r\n"
_LINES_AT_ONCE = 2_000
_REST_SECONDS = 1.0
_FAR_SECONDS = 0.2


class _Counts:
    """When each user logged in (seconds of the monotonic clock), and how often each command came."""

    def __init__(self) -> None:
        self.logins: dict[str, list[float]] = defaultdict(list)
        self.commands: dict[str, int] = defaultdict(int)

    def as_json(self) -> bytes:
        return json.dumps({"logins": self.logins, "commands": self.commands}).encode()


class _Mailbox:
    """What a user's name says is in the mailbox."""

    def __init__(self, user: str, logins: int) -> None:
        self.kind, _, messages, octets = user.split("-")
        self.count = int(messages) + (logins if self.kind == "grow" else 0)
        self._gone = logins if self.kind == "roll" else 0
        self.octets = int(octets)
        self._name = user.encode()

    def uidl(self, number: int) -> bytes:
        return b"%016x" % (self._gone + number)

    def message(self, number: int) -> bytes:
        head = b"From: a@mail.example\r\nSubject: %s %d\r\n\r\n" % (self._name, self._gone + number)
        missing = self.octets - len(head)
        lines, rest = divmod(max(missing, 2), len(_LINE))
        return head + _LINE * lines + b"x" * max(rest - 2, 0) + b"\r\n"

    def size(self, number: int) -> int:
        return len(self.message(number))


class _Session(asyncio.Protocol):
    def __init__(self, counts: _Counts) -> None:
        self._counts = counts
        self._rest = b""
        self._user = ""
        self._mailbox: _Mailbox | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._task = asyncio.create_task(self._serve())
        transport.write(b"+OK ready\r\n")

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\r\n")
        for line in lines:
            self._waiting.put_nowait((time.monotonic(), line))

    def connection_lost(self, exc: Exception | None) -> None:
        self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def _serve(self) -> None:
        while True:
            came_at, line = await self._waiting.get()
            verb, _, argument = line.decode("latin-1").partition(" ")
            verb = verb.upper()
            self._counts.commands[verb] += 1
            if self._mailbox is not None and self._mailbox.kind == "hang" and verb not in ("CAPA", "QUIT"):
                continue
            if "far-" in (self._user[:4], argument[:4]):
                await asyncio.sleep(came_at + _FAR_SECONDS - time.monotonic())
            rests = verb == "RETR" and self._mailbox is not None and self._mailbox.kind == "slow"
            for answer in self._answers(verb, argument):
                half = len(answer) // 2 if rests else len(answer)
                self._transport.write(answer[:half])
                if rests:
                    await asyncio.sleep(_REST_SECONDS)
                    self._transport.write(answer[half:])
                await self._writable.wait()
            if verb in ("QUIT", _COUNTS):
                self._transport.close()

    def _answers(self, verb: str, argument: str) -> Iterator[bytes]:
        mailbox = self._mailbox
        match verb:
            case "CAPA":
                yield _CAPABILITIES
            case "USER":
                self._user = argument
                yield b"+OK\r\n"
            case "PASS":
                logins = self._counts.logins[self._user]
                self._mailbox = _Mailbox(self._user, len(logins))
                logins.append(time.monotonic())
                yield b"+OK\r\n"
            case "QUIT":
                yield b"+OK\r\n"
            case x if x == _COUNTS:
                yield self._counts.as_json()
            case _ if mailbox is None:
                yield b"-ERR log in first\r\n"
            case "STAT":
                yield b"+OK %d %d\r\n" % (mailbox.count, mailbox.count * mailbox.octets)
            case "UIDL" if argument:
                yield b"+OK %d %s\r\n" % (int(argument), mailbox.uidl(int(argument)))
            case "UIDL":
                yield from _listing(
                    mailbox.count, lambda number: b"%d %s\r\n" % (number, mailbox.uidl(number))
                )
            case "LIST":
                size = mailbox.size(1) if mailbox.count else 0
                yield from _listing(mailbox.count, lambda number: b"%d %d\r\n" % (number, size))
            case "RETR":
                yield b"+OK\r\n" + mailbox.message(int(argument)) + b".\r\n"
            case _:
                yield b"-ERR unknown command\r\n"


def _listing(count: int, line: Any) -> Iterator[bytes]:
    yield b"+OK\r\n"
    for start in range(1, count + 1, _LINES_AT_ONCE):
        yield b"".join(line(number) for number in range(start, min(start + _LINES_AT_ONCE, count + 1)))
    yield b".\r\n"


class ManyMailboxes:
    """The server, started; ``port`` is where."""

    def __init__(self, port: int) -> None:
        self.host, self.port = processes.HOST, port

    def url(self, user: str) -> str:
        """The URL of a user's mailbox; its account wants ``tls = "none"``."""
        return f"pop3://{user}@{self.host}:{self.port}"

    def counts(self) -> dict[str, Any]:
        """``logins``: for each user the times (monotonic, seconds). ``commands``: how often each came."""
        with (
            socket.create_connection((self.host, self.port), timeout=30) as line,
            line.makefile("rb") as reader,
        ):
            reader.readline()
            line.sendall(f"{_COUNTS}\r\n".encode())
            return dict(json.loads(reader.read()))

    def answers(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=1).close()
        except OSError:
            return False
        return True


@contextmanager
def many_mailboxes(output: Path) -> Iterator[ManyMailboxes]:
    """The server in a process of its own; ``output`` takes what it says. Stopped at the end."""
    (port,) = processes.free_ports(1)
    command = [sys.executable, "-m", "tests.harness.many_mailboxes", str(port)]
    with output.open("ab") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    server = ManyMailboxes(port)
    try:
        processes.wait_until(server.answers, process, output, seconds=30)
        yield server
    finally:
        processes.stop(process, seconds=10)


async def _main(port: int) -> None:
    counts = _Counts()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Session(counts), processes.HOST, port, backlog=1024
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))

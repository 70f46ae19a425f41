"""A POP3 server on loopback that misbehaves on demand.

Owns a listener, a thread for each connection, and the record of what clients
sent. It plays one of two things: an exact script of octets to expect and to
send, or a well-behaved mailbox with faults put in. Promises that ``close``
ends every connection, whatever the client does, and raises what went wrong on
the server's side of a script.
"""

import base64
import contextlib
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from archiver.pop3 import Endpoint, Tls

_HOST = "localhost"
_READ_OCTETS = 65536
_JOIN_SECONDS = 10.0

TlsMode = Literal["implicit", "starttls", "none"]


# What a script is made of.


@dataclass(frozen=True, slots=True)
class Send:
    """Send these octets; with ``split_bytes``, in pieces of that size, each a write of its own."""

    octets: bytes
    split_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Expect:
    """Wait for exactly these octets."""

    octets: bytes


@dataclass(frozen=True, slots=True)
class SendEndlessly:
    """Send this over and over until the client goes away."""

    octets: bytes


@dataclass(frozen=True, slots=True)
class StartTls:
    """The server's side of a handshake."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Say nothing more until the client goes away."""


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close the connection. The end of a script does the same."""


@dataclass(frozen=True, slots=True)
class Talk:
    """Let a function speak, where what is to be said depends on what was heard."""

    talk: Callable[["Channel"], object]


Step = Send | Expect | SendEndlessly | StartTls | Stall | HangUp | Talk


# What a mailbox is made of.


@dataclass(frozen=True, slots=True)
class Cut:
    """Answer a RETR, but close after this many bytes of the (stuffed) message."""

    after_bytes: int


@dataclass(frozen=True, slots=True)
class HangUpIfPipelined:
    """Close where the next command came before this one was answered; otherwise give the right answer."""


Fault = Send | SendEndlessly | Stall | HangUp | Cut | HangUpIfPipelined | Talk
"""Instead of the right answer. After Send the session goes on."""

CAPABILITIES = ("TOP", "UIDL", "USER", "SASL PLAIN", "RESP-CODES", "PIPELINING", "IMPLEMENTATION scripted")


@dataclass(slots=True)
class MailboxPlay:
    """A well-behaved mailbox with ``messages``, pairs of UIDL and content with CRLF.

    ``faults`` maps a whole command line (``RETR 2``) or a verb (``CAPA``) to what
    happens instead of the right answer. What a session deleted before its QUIT
    is gone from ``messages`` afterwards.
    """

    messages: list[tuple[bytes, bytes]]
    user: str = "user"
    password: str = "secret"
    capabilities: Sequence[str] | None = CAPABILITIES
    faults: Mapping[str, Fault] = field(default_factory=dict)
    greeting: bytes = b"+OK scripted server ready\r\n"


class ScriptedPop3:
    """The server. A context manager.

    ``play`` is a mailbox, or a script for each connection in the order of their
    coming; the last one serves all later ones. ``received`` has every command line
    with whether it came by TLS, ``commands`` counts the verbs, ``connections`` the
    connections. ``context`` goes before ``certificate`` where a test wants more of TLS.
    """

    def __init__(
        self,
        play: MailboxPlay | Sequence[Sequence[Step]],
        *,
        tls: TlsMode = "none",
        certificate: tuple[Path, Path] | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.received: list[tuple[bytes, bool]] = []
        self.commands: Counter[str] = Counter()
        self.connections = 0
        self._play = play
        self._tls = tls
        self._context = context or (_server_context(certificate) if certificate else None)
        self._failures: list[BaseException] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._ended = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closing = False
        self._start(self._accept)

    @property
    def endpoint(self) -> Endpoint:
        """What a client needs to log in."""
        user = self._play.user if isinstance(self._play, MailboxPlay) else "user"
        return Endpoint(_HOST, self.port, Tls(self._tls), user)

    def close(self) -> None:
        """End every connection and raise the first failure of a script. May be called again."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
        if self._failures:
            raise self._failures.pop(0)

    def wait_for_end(self, connections: int) -> None:
        """Return when this many connections have come and ended. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended >= connections, _JOIN_SECONDS):
                raise TimeoutError(f"{self._ended} connections ended, not {connections}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._start(self._serve, connection, self.connections)

    def _serve(self, connection: socket.socket, number: int) -> None:
        channel = Channel(self, connection)
        try:
            if self._tls == "implicit":
                channel.start_tls()
            if isinstance(self._play, MailboxPlay):
                _MailboxSession(channel, self._play).run()
            else:
                _run_script(channel, self._play[min(number, len(self._play)) - 1])
        except (OSError, EOFError):
            pass  # the client went away, which is its right
        except BaseException as failure:  # noqa: BLE001 - raised again by close()
            if not self._closing:
                self._failures.append(failure)
        finally:
            channel.close()
            with self._changed:
                self._ended += 1
                self._changed.notify_all()

    def track(self, connection: socket.socket, instead_of: socket.socket | None = None) -> None:
        with self._lock:
            self._open.discard(instead_of or connection)
            self._open.add(connection)

    def forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)

    def note(self, line: bytes, *, by_tls: bool) -> None:
        self.received.append((line, by_tls))
        self.commands[line.split(b" ")[0].decode("ascii", "replace").upper()] += 1

    @property
    def context(self) -> ssl.SSLContext:
        if self._context is None:
            raise AssertionError("TLS needs a certificate")
        return self._context


class Channel:
    """One connection: bytes and lines, in clear text or by TLS."""

    def __init__(self, server: ScriptedPop3, connection: socket.socket) -> None:
        self._server = server
        self._connection = connection
        self._buffer = b""
        server.track(connection)

    @property
    def by_tls(self) -> bool:
        return isinstance(self._connection, ssl.SSLSocket)

    def start_tls(self) -> None:
        clear = self._connection
        wrapped = self._server.context.wrap_socket(clear, server_side=True, do_handshake_on_connect=False)
        self._connection = wrapped
        self._server.track(wrapped, instead_of=clear)
        wrapped.do_handshake()

    def send(self, octets: bytes, split_bytes: int = 0) -> None:
        for start in range(0, len(octets), split_bytes or max(len(octets), 1)):
            self._connection.sendall(octets[start : start + (split_bytes or len(octets))])

    def send_endlessly(self, octets: bytes) -> None:
        piece = octets * max(1, _READ_OCTETS // len(octets))
        while True:
            self._connection.sendall(piece)

    def stall(self) -> None:
        while self._connection.recv(_READ_OCTETS):
            pass

    def expect(self, octets: bytes) -> None:
        while len(self._buffer) < len(octets):
            self._read()
        got, self._buffer = self._buffer[: len(octets)], self._buffer[len(octets) :]
        if got != octets:
            raise AssertionError(f"the client sent {got!r} where {octets!r} was due")
        for line in got.split(b"\r\n")[:-1]:
            self._server.note(line, by_tls=self.by_tls)

    @property
    def has_more(self) -> bool:
        """Whether a whole line came behind the one that was read last."""
        return b"\r\n" in self._buffer

    def line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._read()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        self._server.note(line, by_tls=self.by_tls)
        return line

    def close(self) -> None:
        self._server.forget(self._connection)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self) -> None:
        octets = self._connection.recv(_READ_OCTETS)
        if not octets:
            raise EOFError
        self._buffer += octets


def _server_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def _run_script(channel: Channel, script: Sequence[Step]) -> None:
    for step in script:
        if _play_step(channel, step):
            return


def _play_step(channel: Channel, step: Step) -> bool:
    """Do one step; true when it is the last."""
    match step:
        case Send(octets, split_bytes):
            channel.send(octets, split_bytes)
        case Expect(octets):
            channel.expect(octets)
        case SendEndlessly(octets):
            channel.send_endlessly(octets)
        case StartTls():
            channel.start_tls()
        case Talk(talk):
            talk(channel)
        case Stall():
            channel.stall()
            return True
        case HangUp():
            return True
    return False


def stuffed(message: bytes) -> bytes:
    """A message as a multi-line response sends it: dots doubled, CRLF at its end, the terminator."""
    body = message.replace(b"\r\n.", b"\r\n..")
    body = b"." + body if body.startswith(b".") else body
    return body + (b"" if not body or body.endswith(b"\r\n") else b"\r\n") + b".\r\n"


class _MailboxSession:
    """One session with a mailbox, from the greeting to QUIT."""

    def __init__(self, channel: Channel, play: MailboxPlay) -> None:
        self._channel = channel
        self._play = play
        self._messages = list(play.messages)
        self._deleted: set[int] = set()
        self._user = ""

    def run(self) -> None:
        self._channel.send(self._play.greeting)
        while True:
            line = self._channel.line().decode("utf-8", "replace")
            verb, _, argument = line.partition(" ")
            fault = self._play.faults.get(line) or self._play.faults.get(verb)
            if isinstance(fault, Cut):
                message = self._messages[int(argument) - 1][1]
                self._channel.send(b"+OK\r\n" + stuffed(message)[: fault.after_bytes])
                return
            if isinstance(fault, HangUpIfPipelined):
                if self._channel.has_more:
                    return
                fault = None
            if fault is not None:
                if _play_step(self._channel, fault):
                    return
                continue
            answer = self._answer(verb, argument)
            self._channel.send(answer)
            if verb == "STLS":
                self._channel.start_tls()
            if verb == "QUIT":
                return

    def _answer(self, verb: str, argument: str) -> bytes:
        answers: dict[str, Callable[[str], bytes]] = {
            "CAPA": self._capa,
            "STLS": lambda _: b"+OK begin TLS\r\n",
            "USER": self._user_command,
            "PASS": lambda password: self._login(self._user, password),
            "AUTH": self._auth,
            "NOOP": lambda _: b"+OK\r\n",
            "STAT": self._stat,
            "UIDL": lambda number: self._shown(number, [uidl for uidl, _ in self._messages]),
            "LIST": lambda number: self._shown(number, [b"%d" % len(text) for _, text in self._messages]),
            "RETR": lambda number: b"+OK\r\n" + stuffed(self._messages[int(number) - 1][1]),
            "DELE": self._dele,
            "RSET": self._rset,
            "TOP": self._top,
            "QUIT": self._quit,
        }
        return answers[verb](argument) if verb in answers else b"-ERR unknown command\r\n"

    def _capa(self, _: str) -> bytes:
        if self._play.capabilities is None:
            return b"-ERR unknown command\r\n"
        return "\r\n".join(["+OK", *self._play.capabilities, ".", ""]).encode()

    def _user_command(self, user: str) -> bytes:
        self._user = user
        return b"+OK\r\n"

    def _auth(self, argument: str) -> bytes:
        mechanism, _, response = argument.partition(" ")
        if mechanism != "PLAIN":
            return b"-ERR unknown mechanism\r\n"
        if not response:
            self._channel.send(b"+ \r\n")
            response = self._channel.line().decode()
        _, user, password = base64.b64decode(response).decode().split("\0")
        return self._login(user, password)

    def _login(self, user: str, password: str) -> bytes:
        if (user, password) == (self._play.user, self._play.password):
            return b"+OK logged in\r\n"
        return b"-ERR [AUTH] wrong password\r\n"

    def _stat(self, _: str) -> bytes:
        return b"+OK %d %d\r\n" % (len(self._messages), sum(len(content) for _, content in self._messages))

    def _shown(self, number: str, values: Sequence[bytes]) -> bytes:
        """The value of one message, or those of all."""
        if number and int(number) > len(values):
            return b"-ERR no such message\r\n"
        if number:
            return b"+OK %b %b\r\n" % (number.encode(), values[int(number) - 1])
        lines = [
            b"%d %b\r\n" % (number, value)
            for number, value in enumerate(values, start=1)
            if number not in self._deleted
        ]
        return b"+OK\r\n" + b"".join(lines) + b".\r\n"

    def _dele(self, number: str) -> bytes:
        self._deleted.add(int(number))
        return b"+OK\r\n"

    def _rset(self, _: str) -> bytes:
        self._deleted.clear()
        return b"+OK\r\n"

    def _top(self, argument: str) -> bytes:
        number, lines = map(int, argument.split())
        header, empty, body = self._messages[number - 1][1].partition(b"\r\n\r\n")
        shown = b"".join(line + b"\r\n" for line in body.split(b"\r\n")[:lines])
        return b"+OK\r\n" + stuffed(header + empty + shown)

    def _quit(self, _: str) -> bytes:
        gone = [self._messages[number - 1] for number in self._deleted]
        self._play.messages[:] = [message for message in self._play.messages if message not in gone]
        return b"+OK\r\n"

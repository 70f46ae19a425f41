"""A small POP3 server for machines without Dovecot: correct, in memory, one thread per connection.

Owns two listeners on loopback, POP3S and POP3 with STLS, and the mailboxes of
a few users. Follows RFC 1939 (with UIDL and TOP), 2449 (CAPA, PIPELINING,
response codes), 2595 (STLS), 3206 (AUTH-RESP-CODE) and 5034 (AUTH PLAIN). It
is meant for sample mail and trusted clients on this machine: it bounds a
command's length and a session's idle time, and nothing else.
"""

import base64
import binascii
import contextlib
import hmac
import itertools
import re
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from archiver.demo import SessionLog, processes
from archiver.demo.certificates import self_signed

__all__ = ["Pop3Server"]

# RFC 2449, section 4 allows a command 255 octets; RFC 5034 lets a SASL response be longer.
_COMMAND_OCTETS = 8192
_IDLE_SECONDS = 600.0  # RFC 1939, section 3: at least ten minutes
_SESSION_LOG_SECONDS = 10.0
_BACKLOG = 512
_UNSENT_OCTETS = 256 * 1024
_NUMBER = re.compile(r"[0-9]{1,10}")
_CAPABILITIES = ("TOP", "UIDL", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING", "SASL PLAIN", "USER")


@dataclass(frozen=True, slots=True)
class _Message:
    uidl: str
    content: bytes


@dataclass(slots=True)
class _Mailbox:
    password: str
    messages: list[_Message] = field(default_factory=list)
    # Held by the one session that has this mailbox open (RFC 1939, section 4).
    lock: threading.Lock = field(default_factory=threading.Lock)


class Pop3Server:
    """A running server; implements ``archiver.demo.MailServer``, which documents its methods.

    ``directory`` takes the certificate and is made when it is not there.
    ``users`` gives each one's password.
    """

    host = processes.HOST

    def __init__(self, directory: Path, users: Mapping[str, str] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.ca_file, key = self_signed(directory)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(self.ca_file, key)
        # Mailboxes end with this server; the next one must not use the same UIDLs.
        lifetime = secrets.token_hex(8)
        self._uidls = (f"{lifetime}.{number}" for number in itertools.count(1))
        self._mailboxes: dict[str, _Mailbox] = {}
        self._ended: list[SessionLog] = []
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._listeners = [socket.create_server((self.host, 0), backlog=_BACKLOG) for _ in range(2)]
        self.pop3_port, self.pop3s_port = (listener.getsockname()[1] for listener in self._listeners)
        for user, password in (users or {}).items():
            self.add_user(user, password)
        for listener, implicit_tls in zip(self._listeners, (False, True), strict=True):
            self._spawn(self._accept, listener, implicit_tls)

    def url(self, user: str) -> str:
        return f"pop3s://{quote(user, safe='')}@{self.host}:{self.pop3s_port}"

    def add_user(self, user: str, password: str) -> None:
        with self._changed:
            if user in self._mailboxes or not user or not user.isprintable() or " " in user:
                raise ValueError(f"the user {user!r} exists, or cannot be named in a USER command")
            self._mailboxes[user] = _Mailbox(password)

    def deliver(self, user: str, messages: Iterable[bytes]) -> None:
        for message in messages:
            with self._changed:
                self._mailboxes[user].messages.append(_Message(next(self._uidls), message))

    def messages(self, user: str) -> list[bytes]:
        return [message.content for message in self._snapshot(user)]

    def remove(self, user: str, number: int) -> None:
        if number < 1:
            raise IndexError(number)
        with self._changed:
            del self._mailboxes[user].messages[number - 1]

    def sessions(self, *, at_least: int = 0) -> list[SessionLog]:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._ended) >= at_least, _SESSION_LOG_SECONDS):
                raise TimeoutError(f"{len(self._ended)} sessions have ended, not {at_least}")
            return list(self._ended)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            sockets = [*self._listeners, *self._connections]
        for each in sockets:
            # Wakes the thread that waits on it, which closes it. An SSLSocket's own method would also
            # take TLS away from under that thread.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="pop3d", daemon=True)
        with self._changed:
            self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
            thread.start()

    def _accept(self, listener: socket.socket, implicit_tls: bool) -> None:
        with listener:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if not self._track(connection):
                    return
                self._spawn(self._serve, connection, implicit_tls)

    def _serve(self, connection: socket.socket, implicit_tls: bool) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_IDLE_SECONDS)
        session = _Session(self, connection)
        try:
            if implicit_tls:
                session.start_tls()
            session.run()
        except OSError:
            pass  # the client went away, or speaks no TLS
        finally:
            session.end(quit=False)
            with self._changed:
                self._connections.discard(session.connection)
            session.connection.close()

    def _track(self, connection: socket.socket, instead_of: socket.socket | None = None) -> bool:
        """Remember a connection for ``close``. If that was called, close it and return False."""
        with self._changed:
            if self._closed:
                connection.close()
                return False
            self._connections.add(connection)
            if instead_of is not None:
                self._connections.discard(instead_of)
            return True

    def secured(self, connection: socket.socket) -> ssl.SSLSocket:
        """TLS over a session's connection, which must not be used any more. Raises OSError."""
        wrapped = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        if not self._track(wrapped, instead_of=connection):
            raise ConnectionAbortedError("the server is closing")
        wrapped.do_handshake()
        return wrapped

    def open(self, user: str, password: str) -> list[_Message]:
        """Log in and take the mailbox for one session. Raises _Refused."""
        mailbox = self._mailboxes.get(user)
        offered = password.encode(errors="surrogateescape")
        if mailbox is None or not hmac.compare_digest(mailbox.password.encode(), offered):
            raise _Refused("[AUTH] Authentication failed.")
        if not mailbox.lock.acquire(blocking=False):
            raise _Refused("[IN-USE] Mailbox is locked by another POP3 session.")
        return self._snapshot(user)

    def release(self, log: SessionLog, deleted: set[str]) -> None:
        """End a session that ``open`` began: remove the messages with these UIDLs and unlock the mailbox."""
        with self._changed:
            mailbox = self._mailboxes[log.user]
            mailbox.messages = [each for each in mailbox.messages if each.uidl not in deleted]
            mailbox.lock.release()
            self._ended.append(log)
            self._changed.notify_all()

    def _snapshot(self, user: str) -> list[_Message]:
        with self._changed:
            return list(self._mailboxes[user].messages)


class _Refused(Exception):
    """A command is answered by -ERR and this text."""


class _Session:
    """One connection from its greeting to its end. Answers are sent when no command is left (PIPELINING)."""

    def __init__(self, server: Pop3Server, connection: socket.socket) -> None:
        self.connection = connection
        self._server = server
        self._received = bytearray()
        self._unsent = bytearray()
        self._user: str | None = None
        self._open = False
        self._messages: list[_Message] = []
        self._deleted: set[int] = set()
        self._retr = self._retr_bytes = self._top = 0

    def start_tls(self) -> None:
        self.connection = self._server.secured(self.connection)

    def run(self) -> None:
        """Answer until QUIT, the connection's end, or an endless command. Raises OSError."""
        self._answer("+OK archiver demo ready.")
        while (line := self._line()) is not None:
            word, _, argument = line.partition(" ")
            verb = word.upper()
            try:
                self._command(verb)(argument)
            except _Refused as refusal:
                self._answer(f"-ERR {refusal}")
            if verb == "QUIT":
                break
        self._flush()

    def end(self, *, quit: bool) -> None:  # noqa: A002 - the protocol's word
        """Release the mailbox; deletions take effect after QUIT only (RFC 1939, section 6)."""
        if not self._open or self._user is None:
            return
        self._open = False
        deleted = {self._messages[number - 1].uidl for number in self._deleted} if quit else set()
        log = SessionLog(
            user=self._user,
            quit=quit,
            retr=self._retr,
            retr_bytes=self._retr_bytes,
            top=self._top,
            dele=len(deleted),
            listed=len(self._messages),
        )
        self._server.release(log, deleted)

    def _command(self, verb: str) -> Callable[[str], None]:
        before = {"USER": self._on_user, "PASS": self._on_pass, "AUTH": self._on_auth, "STLS": self._on_stls}
        after = {
            "STAT": self._on_stat,
            "LIST": self._on_list,
            "UIDL": self._on_uidl,
            "RETR": self._on_retr,
            "TOP": self._on_top,
            "DELE": self._on_dele,
            "RSET": self._on_rset,
            "NOOP": self._on_noop,
        }
        always = {"CAPA": self._on_capa, "QUIT": self._on_quit}
        allowed = always | (after if self._open else before)
        if verb not in allowed:
            raise _Refused("Unknown command, or not now.")
        return allowed[verb]

    def _on_capa(self, _: str) -> None:
        tls = isinstance(self.connection, ssl.SSLSocket)
        offered = [*_CAPABILITIES, *([] if tls or self._open else ["STLS"])]
        self._answer("+OK Capability list follows.")
        self._answer_lines("\r\n".join(offered).encode())

    def _on_stls(self, _: str) -> None:
        if isinstance(self.connection, ssl.SSLSocket):
            raise _Refused("TLS is active already.")
        # Commands that arrived with STLS, in clear text, must not count as sent under TLS (CVE-2011-0411).
        self._received.clear()
        self._user = None
        self._answer("+OK Begin TLS negotiation.")
        self._flush()
        self.start_tls()

    def _on_user(self, argument: str) -> None:
        self._user = argument
        self._answer("+OK")

    def _on_pass(self, argument: str) -> None:
        if self._user is None:
            raise _Refused("USER first.")
        self._log_in(self._user, argument)

    def _on_auth(self, argument: str) -> None:
        mechanism, _, response = argument.partition(" ")
        if mechanism.upper() != "PLAIN":
            raise _Refused("Unsupported mechanism.")
        if not response:
            self._answer("+ ")
            response = self._line() or "*"
        try:
            # RFC 4616: authorization identity, authentication identity, password
            _, user, password = base64.b64decode(response, validate=True).decode().split("\0")
        except (binascii.Error, ValueError):
            raise _Refused("Authentication exchange was cancelled or cannot be read.") from None
        self._log_in(user, password)

    def _log_in(self, user: str, password: str) -> None:
        self._messages = self._server.open(user, password)
        self._user, self._open = user, True
        self._answer("+OK Logged in.")

    def _on_stat(self, _: str) -> None:
        sizes = [len(message.content) for _, message in self._left()]
        self._answer(f"+OK {len(sizes)} {sum(sizes)}")

    def _on_list(self, argument: str) -> None:
        self._enumerate(argument, lambda message: str(len(message.content)))

    def _on_uidl(self, argument: str) -> None:
        self._enumerate(argument, lambda message: message.uidl)

    def _enumerate(self, argument: str, shown: Callable[[_Message], str]) -> None:
        if argument:
            number, message = self._message(argument)
            self._answer(f"+OK {number} {shown(message)}")
            return
        self._answer("+OK")
        lines = [f"{number} {shown(message)}\r\n" for number, message in self._left()]
        self._answer_lines("".join(lines).encode())

    def _on_retr(self, argument: str) -> None:
        _, message = self._message(argument)
        self._retr += 1
        self._retr_bytes += self._answer(f"+OK {len(message.content)} octets")
        self._retr_bytes += self._answer_lines(message.content)

    def _on_top(self, argument: str) -> None:
        wanted, _, lines = argument.partition(" ")
        if not _NUMBER.fullmatch(lines):
            raise _Refused("TOP takes a message and a number of lines.")
        _, message = self._message(wanted)
        header, blank, body = message.content.partition(b"\r\n\r\n")
        count = min(int(lines), len(body))
        self._top += 1
        self._answer("+OK")
        self._answer_lines(header + blank + b"\r\n".join(body.split(b"\r\n", count)[:count]))

    def _on_dele(self, argument: str) -> None:
        number, _ = self._message(argument)
        self._deleted.add(number)
        self._answer("+OK Marked to be deleted.")

    def _on_rset(self, _: str) -> None:
        self._deleted.clear()
        self._answer("+OK")

    def _on_noop(self, _: str) -> None:
        self._answer("+OK")

    def _on_quit(self, _: str) -> None:
        self.end(quit=True)
        self._answer("+OK Logging out.")

    def _left(self) -> list[tuple[int, _Message]]:
        numbered = enumerate(self._messages, start=1)
        return [(number, message) for number, message in numbered if number not in self._deleted]

    def _message(self, argument: str) -> tuple[int, _Message]:
        number = int(argument) if _NUMBER.fullmatch(argument) else 0
        if not 1 <= number <= len(self._messages) or number in self._deleted:
            raise _Refused("There's no such message.")
        return number, self._messages[number - 1]

    def _line(self) -> str | None:
        """The next command without its line end; None at the connection's end or for one without an end."""
        while (end := self._received.find(b"\n")) < 0:
            self._flush()
            if len(self._received) > _COMMAND_OCTETS:
                return None
            received = self.connection.recv(_COMMAND_OCTETS)
            if not received:
                return None
            self._received += received
        line = self._received[:end].rstrip(b"\r").decode(errors="surrogateescape")
        del self._received[: end + 1]
        return line

    def _answer(self, line: str) -> int:
        """Queue a line; returns its octets."""
        answer = f"{line}\r\n".encode()
        self._unsent += answer
        return len(answer)

    def _answer_lines(self, content: bytes) -> int:
        """Queue a multi-line answer, dots doubled (RFC 1939, section 3); returns its octets but the end's."""
        stuffed = content.replace(b"\r\n.", b"\r\n..")
        if stuffed.startswith(b"."):
            stuffed = b"." + stuffed
        if stuffed and not stuffed.endswith(b"\r\n"):
            stuffed += b"\r\n"
        self._unsent += stuffed
        self._unsent += b".\r\n"
        # A client that requests everything at once must not make this server hold everything in memory.
        if len(self._unsent) > _UNSENT_OCTETS:
            self._flush()
        return len(stuffed)

    def _flush(self) -> None:
        if self._unsent:
            self.connection.sendall(self._unsent)
            self._unsent.clear()

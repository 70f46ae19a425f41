"""POP2 (RFC 937), the protocol before POP3: its framing, without I/O, and a session.

Owns what differs from POP3: replies known by their first octet (``+`` ready,
``-`` refused and over, ``#`` a count of messages, ``=`` a count of octets),
and messages that are framed by that count alone, without stuffing and without
a terminator. Promises what ``mailbox`` promises, and that no octet of a message
is asked for before its count is known and within the limit. Shares the limits,
the facts, and the outcomes of ``mailbox``.

Nothing names a message but its number, which is good for one session. So an
archive knows these messages by their content, and fetches all of them each
time. It answers each with ACKS (received, keep it). ACKD would delete the
message whose number was just read, but whether that is the one that was
archived nobody can prove beforehand: this client never says it.

The password crosses in clear, in HELO: ``url`` lets nobody do that unasked.
POP2 is lock-step, so nothing is pipelined; one mailbox is open: that of HELO, or
the one that FOLD opens in its place.
"""

import builtins
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Final, Self

from archiver.pop3.failures import FailureKind, Pop3Error, Stage, classify, printable
from archiver.pop3.listing import LARGEST_NUMBER, LARGEST_SIZE, Entry, Listing, SizeColumn, decimal, join
from archiver.pop3.transport import DEFAULT_TLS, TimedOut, TlsSettings, Transport
from archiver.pop3.url import Endpoint, Tls
from archiver.pop3.values import DEFAULT_LIMITS, Glance, Limits, Refused, Retrieved, ServerFacts, SinkT
from archiver.pop3.wire import STATUS_LINE_OCTETS, Command, command

_TLS_RECORD_TYPES: Final = (b"\x15", b"\x16")
_GREETING: Final = "the greeting"


class Mark(Enum):
    """The first octet of a reply, which says what it is."""

    READY = "+"
    """The greeting, and the answer to QUIT."""
    REFUSED = "-"
    """Something is wrong; the server closes the connection."""
    COUNT = "#"
    """How many messages the mailbox holds."""
    LENGTH = "="
    """How many octets the current message has; 0 where there is none."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply line. ``number`` is set for COUNT and LENGTH; ``text`` is what follows the mark."""

    mark: Mark
    text: bytes
    number: int | None = None


class Receiver:
    """Turns the octets that a server sends into reply lines and content, in the order they are asked for.

    ``feed`` it what was read, then call ``next_reply``, or ``next_content`` for
    at most so many octets; None asks for more. Memory is bounded by one read
    plus one line. A Pop3Error means that the framing is lost.
    """

    def __init__(
        self, *, line_octets: int = STATUS_LINE_OCTETS, show: Callable[[bytes], str] = printable
    ) -> None:
        self._line_octets = line_octets
        self._show = show
        self._buffer = b""
        self._position = 0

    @property
    def surplus(self) -> bytes:
        """What has come and was not asked for yet."""
        return self._buffer[self._position :]

    def feed(self, data: bytes) -> None:
        """Take octets from the wire."""
        rest = self.surplus
        self._buffer = rest + data if rest else data
        self._position = 0

    def next_content(self, most: int) -> bytes | None:
        """Octets of a message, ``most`` of them or fewer, as they are; None when there is none yet."""
        content = self._buffer[self._position : self._position + most]
        self._position += len(content)
        return content or None

    def next_reply(self) -> Reply | None:
        """The next reply line, or None while it is incomplete. Raises Pop3Error (PROTOCOL, OPERATOR)."""
        start = self._position
        end = self._buffer.find(b"\n", start)
        if (len(self._buffer) if end < 0 else end + 1) - start > self._line_octets:
            raise Pop3Error(
                FailureKind.PROTOCOL,
                f"a reply is longer than {self._line_octets} octets",
                limit="status_line_octets",
            )
        if end < 0:
            first = self._buffer[start : start + 1]
            if first and first not in _MARKS:  # no need to wait for a line end that may never come
                raise self._not_a_reply(first)
            return None
        self._position = end + 1
        line = self._buffer[start:end].removesuffix(b"\r")
        mark, text = _MARKS.get(line[:1]), line[1:]
        if mark is None:
            raise self._not_a_reply(line)
        if mark not in _LARGEST:
            return Reply(mark, text.strip())
        number = decimal(text.split(None, 1)[0]) if text.strip() else None
        if number is None or number > _LARGEST[mark]:
            raise self._not_a_reply(line)
        return Reply(mark, text.strip(), number)

    def _not_a_reply(self, octets: bytes) -> Pop3Error:
        if octets.startswith(_TLS_RECORD_TYPES):
            return Pop3Error(
                FailureKind.OPERATOR, "the server speaks TLS where clear text was due; use tls implicit"
            )
        return Pop3Error(FailureKind.PROTOCOL, f"not a POP2 reply: {self._show(octets)!r}")


_MARKS: Final = {mark.value.encode(): mark for mark in Mark}
_LARGEST: Final = {Mark.COUNT: LARGEST_NUMBER, Mark.LENGTH: LARGEST_SIZE}


class Pop2Mailbox:
    """A session with one mailbox by POP2, as ``session.Session`` has it; a context manager."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        tls_settings: TlsSettings = DEFAULT_TLS,
        limits: Limits = DEFAULT_LIMITS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect, with TLS from the first octet if the endpoint says so, and read the greeting."""
        self._endpoint = endpoint
        self._limits = limits
        self._monotonic = monotonic
        self._deadline = monotonic() + limits.session_seconds
        self._deadline_limit = "session_seconds"
        self._password = b""
        self._receiver = Receiver(line_octets=limits.status_line_octets, show=self._show)
        self._greeting = ""
        self._count: int | None = None
        self._listed = False
        self._in_transit: Entry | None = None
        self._failure: Pop3Error | None = None
        self._closed = False
        self._busy = False
        with self._named("connect", limit="connect_seconds"):
            if endpoint.tls is Tls.STARTTLS:
                raise Pop3Error(FailureKind.OPERATOR, "POP2 has no STARTTLS; use tls implicit or none")
            self._transport = Transport.connect(
                endpoint.host, endpoint.port, timeout_seconds=limits.connect_seconds, monotonic=monotonic
            )
        try:
            self._open(tls_settings)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def facts(self) -> ServerFacts:
        """What is known of the server by now. POP2 has no capabilities, and HELO is the one way to log in."""
        tls = self._transport.tls
        return ServerFacts(
            host=self._endpoint.host,
            port=self._endpoint.port,
            greeting=self._greeting,
            capabilities=(),
            tls_version=tls.version if tls else None,
            cipher=tls.cipher if tls else None,
            certificate_sha256=tls.certificate_sha256 if tls else None,
            certificate_not_after=tls.certificate_not_after if tls else None,
            mechanism=None if self._count is None else "HELO",
            pipelining=False,
            bare_lf=False,
            login_delay_seconds=None,
            expire_days=None,
            utf8=False,
            implementation=None,
        )

    @property
    def in_transit(self) -> Entry | None:
        """The entry whose message is awaited or being received; stays set when the connection dies there."""
        return self._in_transit

    def login(self, password: str) -> None:
        """HELO, which opens the mailbox, and FOLD where a folder is named.

        Raises Pop3Error: AUTH, TRANSIENT, OPERATOR by the server's words.

        The password is the rest of the line; a backslash in it is doubled, since
        the one server whose source is known (the University of Washington's)
        takes it for a quote. The password is in no error.
        """
        if self._count is not None:
            raise RuntimeError("the session is logged in")
        with self._named("login"):
            asked = self._helo(password)
        count = self._number(asked, Mark.COUNT, Stage.LOGIN, "login_seconds")
        if self._endpoint.folder is not None:
            # A folder that is not there counts as an empty one (RFC 937).
            fold = command("FOLD", self._endpoint.folder)
            count = self._number(fold, Mark.COUNT, Stage.LOGIN, "login_seconds")
        self._count = count

    def _helo(self, password: str) -> Command:
        user = self._endpoint.user
        if not password or not (user + password).isascii() or any(c.isspace() for c in user):
            raise Pop3Error(
                FailureKind.OPERATOR,
                "nothing was sent: HELO takes a user name without spaces and a password, both in ASCII",
            )
        self._password = password.encode("ascii")
        return command("HELO", user, password.replace("\\", "\\\\"), label="HELO")

    def glance(self, number: int | None = None) -> Glance:  # noqa: ARG002 - nothing is known by number
        """The count that the server told at the login. It tells no sum of octets, and has no uids."""
        self._need_life()
        return Glance(self._count, None)

    def list(self) -> Listing:
        """Numbers and sizes, by a READ for each message; a second call is a programming error.

        A number that holds no message (or an empty one, which POP2 cannot tell
        from none) is left out. No message has a uid.
        """
        if self._count is None or self._listed:
            raise RuntimeError("a session logs in, and lists its mailbox once")
        self._listed = True
        if self._count > self._limits.listing_lines:
            reason = (
                f"the mailbox has {self._count} messages, more than the limit of {self._limits.listing_lines}"
            )
            raise self._error(FailureKind.PROTOCOL, "HELO", reason, limit="listing_lines")
        sizes = (
            (number, self._number(command("READ", number), Mark.LENGTH, Stage.LISTING, "listing_seconds"))
            for number in range(1, self._count + 1)
        )
        return join(None, SizeColumn.of((number, size) for number, size in sizes if size))

    def list_from(self, first: int, last: int) -> Listing | None:  # noqa: ARG002 - nothing is known by number
        """None: what came since an earlier session cannot be told where no message has a uid."""
        return None

    def retrieve(
        self, entries: Iterable[Entry], open_sink: Callable[[Entry], SinkT]
    ) -> Iterator[Retrieved[SinkT] | Refused[SinkT]]:
        """Fetch messages one by one, each into the sink that ``open_sink`` gives for it, and keep them.

        A message over ``limits.message_octets`` is refused before it is asked
        for. One is complete only once the server answered ACKS as it must: a
        count that was wrong shows there. Raises Pop3Error for what ends the
        session; every refusal by the server does.
        """
        self._need_life()
        for entry in entries:
            self._in_transit = entry
            try:
                result = self._receive_message(entry, open_sink)
            except BaseException:  # a sink's too: its message is half read
                self.close()
                raise
            self._in_transit = None
            yield result

    def _receive_message(
        self, entry: Entry, open_sink: Callable[[Entry], SinkT]
    ) -> Retrieved[SinkT] | Refused[SinkT]:
        doing = f"READ {entry.number}"
        size = self._number(command("READ", entry.number), Mark.LENGTH, Stage.RETRIEVE, "idle_seconds")
        if not size:
            return Refused(entry, self._error(FailureKind.POISON, doing, "the server has it no more"))
        if size > self._limits.message_octets:
            reason = f"the message has {size} octets, more than the limit of {self._limits.message_octets}"
            return Refused(entry, self._error(FailureKind.POISON, doing, reason, limit="message_octets"))
        sink = open_sink(entry)
        asked = command("RETR")
        self._send(asked)
        with self._fatal(f"RETR of {entry.number}"):
            left = size
            while left:
                content = self._receiver.next_content(left)
                if content is None:
                    self._read("idle_seconds", self._deadline, inside=True)
                    continue
                left -= len(content)
                sink.write(content)
        self._busy = False
        self._number(command("ACKS"), Mark.LENGTH, Stage.RETRIEVE, "idle_seconds")
        return Retrieved(entry, sink)

    def delete(self, entries: Iterable[Entry]) -> builtins.list[Entry]:
        """Deletes nothing, ever: raises Pop3Error (OPERATOR) for any entry, before anything is said."""
        if any(True for _ in entries):
            reason = "nothing was deleted: POP2 knows a message by its number alone, which proves nothing"
            raise self._error(FailureKind.OPERATOR, "ACKD", reason)
        return []

    def round_trip(self) -> float:
        """Seconds that a READ of the current message takes, which moves and marks nothing."""
        started = self._monotonic()
        self._number(command("READ"), Mark.LENGTH, Stage.LISTING, "idle_seconds")
        return self._monotonic() - started

    def quit(self) -> None:
        """End the session in order, and close."""
        asked = command("QUIT")
        try:
            self._deadline = self._monotonic() + self._limits.quit_seconds
            self._deadline_limit = "quit_seconds"
            self._send(asked)
            self._answer(asked.label, Mark.READY, Stage.UPDATE, "quit_seconds")
        finally:
            self.close()

    def close(self) -> None:
        """Drop the connection without QUIT. May be called again."""
        self._closed = True
        self._transport.close()

    def _open(self, tls_settings: TlsSettings) -> None:
        limits = self._limits
        if self._endpoint.tls is Tls.IMPLICIT:
            with self._named("TLS", limit="connect_seconds"):
                self._transport.start_tls(tls_settings, deadline=self._monotonic() + limits.connect_seconds)
        self._busy = True
        greeting = self._answer(_GREETING, Mark.READY, Stage.GREETING, "greeting_seconds")
        self._greeting = printable(greeting.text)
        if greeting.text[:2].upper() == b"OK":
            reason = f"the server speaks POP3, it seems; use pop3://: {self._show(greeting.text)!r}"
            raise self._error(FailureKind.OPERATOR, _GREETING, reason)

    # Commands and replies.

    def _number(self, asked: Command, mark: Mark, stage: Stage, limit: str) -> int:
        """The count that answers a command."""
        self._send(asked)
        number = self._answer(asked.label, mark, stage, limit).number
        return 0 if number is None else number

    def _send(self, asked: Command) -> None:
        self._need_life()
        if self._busy:
            raise RuntimeError("a reply of this session is still to be read")
        with self._fatal(asked.label):
            octets = self._transport.receive_now()
            self._receiver.feed(octets or b"")
            surplus = self._receiver.surplus
            if surplus.startswith(b"-"):
                said = self._show(surplus[1:].strip())
                raise Pop3Error(FailureKind.TRANSIENT, f"the server ended the session: {said!r}")
            if surplus:
                raise Pop3Error(FailureKind.PROTOCOL, f"the server said unasked {self._show(surplus)!r}")
            if octets == b"":
                raise Pop3Error(FailureKind.TRANSIENT, "the server closed the connection")
            self._transport.send(asked.octets)
        self._busy = True

    def _answer(self, doing: str, mark: Mark, stage: Stage, limit: str) -> Reply:
        """The reply that is due. Another mark, or a refusal, ends the session (RFC 937)."""
        with self._fatal(doing):
            deadline = self._deadline
            if stage in {Stage.GREETING, Stage.LOGIN}:
                deadline = min(deadline, self._monotonic() + getattr(self._limits, limit))
            while (reply := self._receiver.next_reply()) is None:
                self._read(limit, deadline, inside=bool(self._receiver.surplus))
            if reply.mark is Mark.REFUSED:
                raise self._refusal(reply.text, stage)
            if reply.mark is not mark:
                said = self._show(reply.mark.value.encode() + reply.text)
                raise Pop3Error(FailureKind.PROTOCOL, f"{mark.value!r} was due, and the server said {said!r}")
        self._busy = False
        return reply

    def _refusal(self, text: bytes, stage: Stage) -> Pop3Error:
        verdict = classify(text, stage)
        kind = verdict.kind
        if kind is FailureKind.POISON:
            # Of this message alone, and yet it ends the session: the caller counts how often one does that.
            kind = FailureKind.TRANSIENT
        else:
            self._in_transit = None
        said = f"the server said {self._show(text)!r}" if text else "the server refused without a word"
        return Pop3Error(kind, said, wait_seconds=verdict.wait_seconds)

    def _read(self, limit: str, deadline: float, *, inside: bool) -> None:
        try:
            octets = self._transport.receive(idle_seconds=getattr(self._limits, limit), deadline=deadline)
        except TimedOut as error:
            whole = error.at_deadline and deadline == self._deadline
            error.limit = self._deadline_limit if whole else limit
            raise
        if not octets:
            where = " in the middle of a reply" if inside else ""
            raise Pop3Error(FailureKind.TRANSIENT, f"the server closed the connection{where}")
        self._receiver.feed(octets)

    def _need_life(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError("the session is closed")

    # Errors.

    @contextmanager
    def _named(self, doing: str, *, limit: str | None = None) -> Iterator[None]:
        """Add what was tried, and where, to an error from below. ``limit`` is what a wait ended by."""
        try:
            yield
        except Pop3Error as error:
            exceeded = limit if isinstance(error, TimedOut) and error.limit is None else error.limit
            raise self._error(error.kind, doing, str(error), error.wait_seconds, exceeded) from error

    @contextmanager
    def _fatal(self, doing: str) -> Iterator[None]:
        """As ``_named``; and the error ends the session."""
        try:
            with self._named(doing):
                yield
        except Pop3Error as error:
            self._failure = error
            self.close()
            raise

    def _show(self, octets: bytes) -> str:
        """The server's octets for people. It may repeat what it was sent: the password is taken out."""
        if self._password:
            for secret in (self._password.replace(b"\\", b"\\\\"), self._password):
                octets = octets.replace(secret, b"***")
        return printable(octets)

    def _error(
        self,
        kind: FailureKind,
        doing: str,
        reason: str,
        wait_seconds: float | None = None,
        limit: str | None = None,
    ) -> Pop3Error:
        message = f"{doing} at {self._endpoint.address}: {reason}"
        return Pop3Error(kind, message, wait_seconds=wait_seconds, limit=limit)

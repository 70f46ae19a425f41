"""POP3 on the wire, without I/O (RFC 1939 section 3, RFC 2449 section 4).

Owns framing: commands become bytes, bytes become events. Promises:

- any split of the same bytes into reads gives the same events;
- memory is bounded by one read plus one status line;
- the content of a multi-line response comes out as the server meant it:
  dot-stuffing is undone, and nothing else changes.

Leaves sockets, time and the meaning of replies to others.

Line ends. A multi-line response ends at CRLF ``.`` CRLF and at nothing else. A
message may contain ``LF . LF``. If that ended the response, a sender could have
the rest of a message read as the server's replies. There is one exception: if
every status line so far, greeting included, ended in a bare LF, then LF frames
the session. The first CRLF ends that for good, and no response changes its
framing midway.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from archiver.pop3.failures import FailureKind, Pop3Error, printable

COMMAND_LINE_BYTES: Final = 255  # with CRLF; RFC 2449 section 4
STATUS_LINE_BYTES: Final = 8192  # RFC 1939 allows 512; real servers talk more

_FORBIDDEN_IN_COMMANDS: Final = frozenset(b"\r\n\0")
_TLS_RECORD_TYPES: Final = (b"\x15", b"\x16")  # alert, handshake: a TLS peer where clear text is due


class Shape(Enum):
    """What may answer a command."""

    LINE = "line"
    """One status line."""
    BLOCK = "block"
    """A status line, and after +OK a multi-line response."""
    EXCHANGE = "exchange"
    """A status line, or a ``+`` challenge (RFC 5034 section 4)."""
    GREETING = "greeting"
    """The first status line, which shows whether the server speaks POP3 at all."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command, ready to be sent."""

    octets: bytes = field(repr=False)
    """The line with its end. It may contain a secret."""
    label: str
    """The command in errors. It never contains a secret."""
    shape: Shape = Shape.LINE


def command(
    verb: str,
    *arguments: str | int,
    shape: Shape = Shape.LINE,
    label: str | None = None,
    utf8: bool = False,
) -> Command:
    """Render a command: the verb in upper case, one space before each argument, CRLF.

    An argument is sent unchanged: the rest of a PASS line is the password,
    spaces included (RFC 1939 section 7). ``label`` defaults to the whole line. Pass
    one if an argument is secret. ``utf8`` allows arguments that are not ASCII
    (user names and passwords). Raises Pop3Error of
    kind OPERATOR, before anything is sent, for CR, LF or NUL in an argument, for
    other non-ASCII, and for a line of more than 255 octets.
    """
    name = verb.upper()
    line = " ".join([name, *map(str, arguments)])
    shown = line if label is None else label
    if not (utf8 or line.isascii()):
        raise Pop3Error(
            FailureKind.OPERATOR,
            f"{name} was not sent: its argument is not ASCII",
        )
    octets = line.encode()
    if not _FORBIDDEN_IN_COMMANDS.isdisjoint(octets):
        raise Pop3Error(FailureKind.OPERATOR, f"{name} was not sent: its argument contains CR, LF or NUL")
    if len(octets) + 2 > COMMAND_LINE_BYTES:
        raise Pop3Error(
            FailureKind.OPERATOR, f"{name} was not sent: the line is longer than {COMMAND_LINE_BYTES} bytes"
        )
    return Command(octets + b"\r\n", shown, shape)


class Status(Enum):
    """The status indicator of a reply."""

    OK = "+OK"
    ERR = "-ERR"
    CHALLENGE = "+"


@dataclass(frozen=True, slots=True)
class Reply:
    """A status line."""

    status: Status
    text: bytes
    """What follows the indicator and one separator, without the line end."""

    @property
    def ok(self) -> bool:
        return self.status is Status.OK


@dataclass(frozen=True, slots=True)
class BlockEnd:
    """The multi-line response that was being received is complete."""


Event = Reply | bytes | BlockEnd
"""A status line; content of a multi-line response, with dot-stuffing undone; its end."""

_BLOCK_END: Final = BlockEnd()


class Receiver:
    """Turns the bytes that a server sends into events, reply by reply, in the order of the commands.

    Call ``expect`` for each command (and for the greeting), ``feed`` with what
    was read, then ``next_event`` until it returns None, which asks for more
    bytes. After a Pop3Error the framing is lost, and the receiver is useless.
    ``show`` renders what errors quote from the server.
    """

    def __init__(
        self,
        *,
        status_line_bytes: int = STATUS_LINE_BYTES,
        show: Callable[[bytes], str] = printable,
    ) -> None:
        self._status_line_bytes = status_line_bytes
        self._show = show
        self._expected: deque[Shape] = deque()
        self._buffer = b""
        self._position = 0
        self._in_block = False
        self._at_line_start = False
        self._line_end = b"\r\n"
        self._bare_lf: bool | None = None

    @property
    def bare_lf(self) -> bool:
        """Whether the server ends every line in a bare LF, so that LF frames this session."""
        return bool(self._bare_lf)

    @property
    def surplus(self) -> bytes:
        """Bytes that answer no command: after STLS an injection, elsewhere a farewell or a lost framing."""
        return b"" if self._expected or self._in_block else self._buffer[self._position :]

    @property
    def in_reply(self) -> bool:
        """Whether a part of the next reply has arrived."""
        return self._in_block or self._position < len(self._buffer)

    def expect(self, shape: Shape) -> None:
        """Announce one more reply, after those announced before."""
        self._expected.append(shape)

    def feed(self, data: bytes) -> None:
        """Take bytes from the wire."""
        rest = self._buffer[self._position :]
        self._buffer = rest + data if rest else data
        self._position = 0

    def next_event(self) -> Event | None:
        """The next event, or None if more bytes are needed. Raises Pop3Error (PROTOCOL, OPERATOR)."""
        if self._in_block:
            return self._next_of_block()
        if not self._expected:
            return None
        line = self._take_status_line()
        if line is None:
            return None
        reply = _parse_status_line(line, challenge_allowed=self._expected[0] is Shape.EXCHANGE)
        if reply is None:
            if self._expected[0] is Shape.GREETING and line[:2] in {b"+", b"+ "}:
                raise Pop3Error(
                    FailureKind.OPERATOR,
                    f"the server seems to speak POP2 (RFC 937); use pop2://: {self._show(line)!r}",
                )
            raise _not_a_status_line(line, self._show(line))
        if self._expected.popleft() is Shape.BLOCK and reply.ok:
            self._in_block = True
            self._at_line_start = True
            self._line_end = b"\n" if self._bare_lf else b"\r\n"
        return reply

    def _take_status_line(self) -> bytes | None:
        start = self._position
        end = self._buffer.find(b"\n", start)
        length = (len(self._buffer) if end < 0 else end + 1) - start
        if length > self._status_line_bytes:
            raise Pop3Error(
                FailureKind.PROTOCOL,
                f"a status line is longer than {self._status_line_bytes} bytes",
                limit="status_line_bytes",
            )
        if end < 0:
            first = self._buffer[start : start + 1]
            if first not in {b"", b"+", b"-"}:  # an error now; the line end may never come
                raise _not_a_status_line(first, printable(first) + "...")
            return None
        self._position = end + 1
        line = self._buffer[start:end]
        if line.endswith(b"\r"):
            self._bare_lf = False
            return line[:-1]
        if self._bare_lf is None:
            self._bare_lf = True
        return line

    def _next_of_block(self) -> Event | None:
        if self._at_line_start and not self._pass_line_start():
            return None
        if not self._in_block:
            return _BLOCK_END
        buffer, start, line_end = self._buffer, self._position, self._line_end
        dot = buffer.find(line_end + b".", start)
        if dot < 0:
            return self._emit(self._content_end(buffer), stuffed=False)
        end = buffer.find(line_end + b"." + line_end, dot)
        if end < 0:
            return self._emit(self._content_end(buffer), stuffed=True)
        self._at_line_start = True  # the terminator itself is read as the next line
        return self._emit(end + len(line_end), stuffed=dot < end)

    def _pass_line_start(self) -> bool:
        """At a line's start: end the block at the terminator, or drop a stuffed dot. False: not known yet."""
        line = self._buffer[self._position : self._position + 3]
        terminator = b"." + self._line_end
        if line.startswith(terminator):
            self._position += len(terminator)
            self._in_block = False
        elif terminator.startswith(line):  # nothing, a dot, or a dot and CR
            return False
        elif line.startswith(b"."):
            self._position += 1
        self._at_line_start = False
        return True

    def _content_end(self, buffer: bytes) -> int:
        """Where the bytes end whose meaning does not depend on those that follow."""
        line_end = self._line_end
        for undecided in (b".\r", b".", b""):
            if buffer.endswith(line_end + undecided, self._position):
                self._at_line_start = True
                return len(buffer) - len(undecided)
        return len(buffer) - (line_end == b"\r\n" and buffer.endswith(b"\r", self._position))

    def _emit(self, end: int, *, stuffed: bool) -> bytes | None:
        content = self._buffer[self._position : end]
        self._position = end
        if stuffed:
            content = content.replace(self._line_end + b".", self._line_end)
        return content or None


def _parse_status_line(line: bytes, *, challenge_allowed: bool) -> Reply | None:
    """Read ``+OK text``, ``-ERR text``, or a challenge; None for anything else.

    The indicator may be in any letter case. A space, a tab or the line's end follows it (RFC 1957).
    """
    for status, indicator in ((Status.OK, b"+OK"), (Status.ERR, b"-ERR")):
        rest = line[len(indicator) :]
        if line[: len(indicator)].upper() == indicator and rest[:1] in {b"", b" ", b"\t"}:
            return Reply(status, rest[1:].rstrip(b"\r"))
    if challenge_allowed and (line == b"+" or line.startswith(b"+ ")):
        return Reply(Status.CHALLENGE, line[2:].strip())
    return None


def _not_a_status_line(octets: bytes, shown: str) -> Pop3Error:
    if octets.startswith(_TLS_RECORD_TYPES):
        return Pop3Error(FailureKind.OPERATOR, "the server speaks TLS from the start: use pop3s://")
    return Pop3Error(FailureKind.PROTOCOL, f"the server sent {shown!r}, which is not a POP3 status line")

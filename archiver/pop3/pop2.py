"""POP2 (RFC 937), the protocol before POP3: its framing, without I/O, and a session.

Owns what differs from POP3. The first byte of a reply says what it is: ``+``
ready, ``-`` refused and over, ``#`` a count of messages, ``=`` a length in
bytes. That length alone frames a message: there is no stuffing and no
terminator. Promises what ``mailbox`` promises. Promises that no byte of a
message is asked for before its length is known and within the limit. Shares the
conversation, the order, the limits, the facts and the outcomes with ``mailbox``.

Only a number names a message, and it is good for one session. So an archive
knows these messages by their content, and fetches all of them each time. It
answers each with ACKS (received, keep it). ACKD would delete the message whose
number was just read, but nothing proves that this is the one that was archived.
So this client never sends ACKD.

HELO sends the password in clear text; ``url`` refuses that unless the operator
asks for it. POP2 is lock-step, so nothing is pipelined. One mailbox is open:
the one of HELO, or the one that FOLD opens in its place.
"""

import builtins
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Final, Self

from archiver.pop3.conversation import Conversation, Terms, Wait
from archiver.pop3.failures import FailureKind, Meaning, Pop3Error, Stage, classify, printable
from archiver.pop3.listing import LARGEST_NUMBER, LARGEST_SIZE, Entry, Listing, SizeColumn, decimal, join
from archiver.pop3.order import Verb
from archiver.pop3.transport import DEFAULT_TLS, TlsSettings
from archiver.pop3.url import Endpoint, Tls
from archiver.pop3.values import DEFAULT_LIMITS, Glance, Limits, Refused, Retrieved, ServerFacts, SinkT
from archiver.pop3.wire import STATUS_LINE_BYTES, Command, command

_TLS_RECORD_TYPES: Final = (b"\x15", b"\x16")
_GREETING: Final = Command(b"", "the greeting")


class Mark(Enum):
    """The first byte of a reply, which says what it is."""

    READY = "+"
    """The greeting, and the answer to QUIT."""
    REFUSED = "-"
    """Something is wrong; the server closes the connection."""
    COUNT = "#"
    """How many messages the mailbox holds."""
    LENGTH = "="
    """How many bytes the current message has; 0 if there is no message."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply line. ``number`` is set for COUNT and LENGTH; ``text`` is what follows the mark."""

    mark: Mark
    text: bytes
    number: int | None = None


class Receiver:
    """Turns the bytes that a server sends into reply lines and content, in the order they are asked for.

    Call ``feed`` with what was read, then ``next_reply`` or ``next_content``.
    None asks for more bytes. Memory is bounded by one read plus one line. After a
    Pop3Error the framing is lost.
    """

    def __init__(
        self, *, line_bytes: int = STATUS_LINE_BYTES, show: Callable[[bytes], str] = printable
    ) -> None:
        self._line_bytes = line_bytes
        self._show = show
        self._buffer = b""
        self._position = 0

    @property
    def surplus(self) -> bytes:
        """The bytes that have arrived and were not taken yet."""
        return self._buffer[self._position :]

    @property
    def in_reply(self) -> bool:
        """Whether a part of the next reply has arrived."""
        return self._position < len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes from the wire."""
        rest = self.surplus
        self._buffer = rest + data if rest else data
        self._position = 0

    def next_content(self, most: int) -> bytes | None:
        """Content of a message, unchanged, ``most`` bytes or fewer; None if nothing has arrived yet."""
        content = self._buffer[self._position : self._position + most]
        self._position += len(content)
        return content or None

    def next_reply(self) -> Reply | None:
        """The next reply line, or None while it is incomplete. Raises Pop3Error (PROTOCOL, OPERATOR)."""
        start = self._position
        end = self._buffer.find(b"\n", start)
        if (len(self._buffer) if end < 0 else end + 1) - start > self._line_bytes:
            raise Pop3Error(
                FailureKind.PROTOCOL,
                f"a reply is longer than {self._line_bytes} bytes",
                limit="status_line_bytes",
            )
        if end < 0:
            first = self._buffer[start : start + 1]
            if first and first not in _MARKS:  # an error now; the line end may never come
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
            return Pop3Error(FailureKind.OPERATOR, "the server speaks TLS from the start: use tls implicit")
        return Pop3Error(
            FailureKind.PROTOCOL, f"the server sent {self._show(octets)!r}, which is not a POP2 reply"
        )


_MARKS: Final = {mark.value.encode(): mark for mark in Mark}
_LARGEST: Final = {Mark.COUNT: LARGEST_NUMBER, Mark.LENGTH: LARGEST_SIZE}


class Pop2Mailbox:
    """A session with one mailbox by POP2, as ``session.Session`` describes it; a context manager."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        tls_settings: TlsSettings = DEFAULT_TLS,
        limits: Limits = DEFAULT_LIMITS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect, with TLS from the first byte if the endpoint says so, and read the greeting."""
        if endpoint.tls is Tls.STARTTLS:
            raise Pop3Error(
                FailureKind.OPERATOR,
                f"connect at {endpoint.address}: POP2 has no STARTTLS; use tls implicit or none",
            )
        self._terms = Terms.begin(endpoint, tls_settings, limits, monotonic)
        self._count: int | None = None
        self._in_transit: Entry | None = None
        new_receiver = partial(Receiver, line_bytes=limits.status_line_bytes, show=self._terms.secrets.show)
        self._talk = Conversation(self._terms, new_receiver, refusal=Mark.REFUSED.value.encode())
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        talk = self._talk
        if self._terms.endpoint.tls is Tls.IMPLICIT:
            talk.start_tls()
        talk.expect(_GREETING)
        greeting = self._reply(Mark.READY, Stage.GREETING, talk.step("greeting_seconds"))
        talk.greeting = greeting.text
        if greeting.text[:2].upper() == b"OK":
            reason = f"the server seems to speak POP3; use pop3://: {talk.show(greeting.text)!r}"
            raise talk.error(FailureKind.OPERATOR, _GREETING.label, reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def facts(self) -> ServerFacts:
        """The facts known so far. POP2 has no capabilities, and HELO is the one way to log in."""
        return replace(self._talk.facts, mechanism=None if self._count is None else "HELO")

    @property
    def in_transit(self) -> Entry | None:
        """The entry whose message is being received; stays set if the connection fails there."""
        return self._in_transit

    def login(self, password: str) -> None:
        """HELO, which opens the mailbox, and FOLD if the endpoint names a folder.

        Raises Pop3Error: AUTH, TRANSIENT or OPERATOR, by the server's words.

        The password is the rest of the line. A backslash in it is doubled: the one
        server whose source is known (the University of Washington's) treats it as
        a quote.
        """
        talk = self._talk
        talk.order.require(Verb.LOGIN)
        with talk.named("login"):
            asked = self._helo(password)
        count = self._number(asked, Mark.COUNT, Stage.LOGIN, talk.step("login_seconds"))
        if self._terms.endpoint.folder is not None:
            # A folder that does not exist counts as an empty one (RFC 937).
            fold = command("FOLD", self._terms.endpoint.folder)
            count = self._number(fold, Mark.COUNT, Stage.LOGIN, talk.step("login_seconds"))
        talk.order.advance(Verb.LOGIN)
        self._count = count

    def _helo(self, password: str) -> Command:
        user = self._terms.endpoint.user
        if not password or not (user + password).isascii() or any(c.isspace() for c in user):
            raise Pop3Error(
                FailureKind.OPERATOR,
                "the password was not sent: HELO takes a user name without spaces and a password, "
                "both in ASCII",
            )
        quoted = password.replace("\\", "\\\\")
        self._terms.secrets.add(quoted.encode("ascii"), password.encode("ascii"))
        return command("HELO", user, quoted, label="HELO")

    def glance(self, number: int | None = None) -> Glance:  # noqa: ARG002 - a number says nothing in POP2
        """The count that the server gave at the login. POP2 has no total size and no uids."""
        self._talk.order.advance(Verb.GLANCE)
        return Glance(self._count, None)

    def list(self) -> Listing:
        """Numbers and sizes, by a READ for each message.

        A number without a message is left out, and so is an empty message, which
        POP2 cannot tell from it. No message has a uid.
        """
        self._talk.order.advance(Verb.LIST)
        count, most = self._count or 0, self._terms.limits.listing_lines
        if count > most:
            reason = f"the mailbox has {count} messages, more than the limit of {most}"
            raise self._talk.error(FailureKind.PROTOCOL, "HELO", reason, limit="listing_lines")
        wait = self._talk.waiting("listing_seconds")
        sizes = (
            (number, self._number(command("READ", number), Mark.LENGTH, Stage.LISTING, wait))
            for number in range(1, count + 1)
        )
        return join(None, SizeColumn.of((number, size) for number, size in sizes if size))

    def list_from(self, first: int, last: int) -> Listing | None:  # noqa: ARG002 - numbers say nothing in POP2
        """None: without uids, new messages cannot be told from old ones."""
        self._talk.order.advance(Verb.LIST_FROM)
        return None

    def retrieve(
        self, entries: Iterable[Entry], open_sink: Callable[[Entry], SinkT]
    ) -> Iterator[Retrieved[SinkT] | Refused[SinkT]]:
        """Fetch messages one by one, each into the sink that ``open_sink`` gives for it, and keep them.

        A message over ``limits.message_bytes`` is refused before it is asked
        for. A message is complete only after the server has answered ACKS as it
        must: a wrong length shows there. Raises Pop3Error for what ends the
        session, and every refusal by the server does.
        """
        self._talk.order.advance(Verb.RETRIEVE)
        for entry in entries:
            self._in_transit = entry
            try:
                result = self._receive_message(entry, open_sink)
            except BaseException as error:  # a sink's too: its message is half read
                self._talk.fail(error)
                raise
            self._in_transit = None
            yield result

    def _receive_message(
        self, entry: Entry, open_sink: Callable[[Entry], SinkT]
    ) -> Retrieved[SinkT] | Refused[SinkT]:
        talk, limit = self._talk, self._terms.limits.message_bytes
        read, wait = command("READ", entry.number), talk.waiting("idle_seconds")
        size = self._number(read, Mark.LENGTH, Stage.RETRIEVE, wait)
        if not size:
            reason = "the server does not have the message any more"
            return Refused(entry, talk.error(FailureKind.POISON, read.label, reason))
        if size > limit:
            reason = f"the message has {size} bytes, more than the limit of {limit}"
            error = talk.error(FailureKind.POISON, read.label, reason, limit="message_bytes")
            return Refused(entry, error)
        sink = open_sink(entry)
        talk.require_quiet()
        talk.send(command("RETR"))
        with talk.named(f"RETR of {entry.number}", fatal=True):
            left = size
            while left:
                content = talk.receiver.next_content(left)
                if content is None:
                    talk.receive(wait, in_reply=True)
                    continue
                left -= len(content)
                sink.write(content)
        talk.outstanding.popleft()
        self._number(command("ACKS"), Mark.LENGTH, Stage.RETRIEVE, wait)
        return Retrieved(entry, sink)

    def delete(self, entries: Iterable[Entry]) -> builtins.list[Entry]:
        """Never delete: raises Pop3Error (OPERATOR) for any entry, before anything is sent."""
        self._talk.order.advance(Verb.DELETE)
        if any(True for _ in entries):
            reason = "nothing was deleted: POP2 knows a message by its number alone, which proves nothing"
            raise self._talk.error(FailureKind.OPERATOR, "ACKD", reason)
        return []

    def round_trip(self) -> float:
        """Seconds that a READ of the current message takes. It moves and marks nothing."""
        self._talk.order.advance(Verb.ROUND_TRIP)
        started = self._terms.monotonic()
        wait = self._talk.waiting("idle_seconds")
        self._number(command("READ"), Mark.LENGTH, Stage.LISTING, wait)
        return self._terms.monotonic() - started

    def quit(self) -> None:
        """End the session in order, and close."""
        self._talk.require_quiet()
        self._talk.order.require(Verb.QUIT)
        try:
            self._talk.send(command("QUIT"))
            self._reply(Mark.READY, Stage.UPDATE, self._talk.last_step("quit_seconds"))
        finally:
            self.close()

    def close(self) -> None:
        """Drop the connection without QUIT. May be called again."""
        self._talk.close()

    # Commands and replies.

    def _number(self, asked: Command, mark: Mark, stage: Stage, wait: Wait) -> int:
        """The count that answers a command."""
        self._talk.require_quiet()
        self._talk.send(asked)
        return self._reply(mark, stage, wait).number or 0

    def _reply(self, mark: Mark, stage: Stage, wait: Wait) -> Reply:
        """The reply that is due. Another mark, or a refusal, ends the session (RFC 937)."""
        talk, due = self._talk, self._talk.outstanding[0]
        with talk.named(due.label, fatal=True):
            while (reply := talk.receiver.next_reply()) is None:
                talk.receive(wait)
            if reply.mark not in {mark, Mark.REFUSED}:
                said = talk.show(reply.mark.value.encode() + reply.text)
                raise Pop3Error(FailureKind.PROTOCOL, f"the server said {said!r} instead of {mark.value!r}")
        if reply.mark is Mark.REFUSED:
            error = talk.refused(due.label, reply.text, self._meaning(reply, stage), proof="password")
            talk.fail(error)
            raise error
        talk.outstanding.popleft()
        return reply

    def _meaning(self, refusal: Reply, stage: Stage) -> Meaning:
        meaning = classify(refusal.text, stage)
        if meaning.kind is FailureKind.POISON:
            # It concerns this message alone, and yet it ends the session. So the message stays in
            # transit, and the caller counts how often one ends a session.
            return replace(meaning, kind=FailureKind.TRANSIENT)
        self._in_transit = None
        return meaning

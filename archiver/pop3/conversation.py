"""Commands to a server and its replies, over one connection. Shared by POP3 and POP2.

Owns the connection, the commands that still wait for a reply, the time that
each step may take, and the text of errors: what was tried, on which server, and
why it failed. Promises that an error ends in one of two ways: the framing is
intact and the session goes on, or the session is closed and every later call
raises the same error. Promises that no secret of the session is in an error.
Leaves the framing of replies to a receiver, and their meaning to the caller.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from archiver.pop3.failures import FailureKind, Meaning, Pop3Error, printable
from archiver.pop3.order import Order
from archiver.pop3.transport import (
    Distrusted,
    PlainText,
    ShownCertificate,
    TimedOut,
    TlsSettings,
    Transport,
)
from archiver.pop3.url import Endpoint
from archiver.pop3.values import Limits, ServerFacts
from archiver.pop3.wire import Command

_MASK: Final = b"***"


class Secrets:
    """What must not be shown. A server may repeat what it was sent, and errors quote servers."""

    def __init__(self) -> None:
        self._hidden: tuple[bytes, ...] = ()

    def add(self, *hidden: bytes) -> None:
        """Hide these from now on, in this order and before those added earlier: the longest first."""
        self._hidden = (*hidden, *self._hidden)

    def show(self, octets: bytes) -> str:
        """The server's bytes for people, with every secret masked."""
        for hidden in self._hidden:
            octets = octets.replace(hidden, _MASK)
        return printable(octets)


class Time(NamedTuple):
    """A span of seconds or a point on the monotonic clock, and the field of ``Limits`` that sets it."""

    seconds: float
    limit: str


class Wait(NamedTuple):
    """How long to wait for a reply."""

    idle: Time
    """The longest time between two reads."""
    until: Time
    """The point after which nothing is read."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What all connections of one session have in common."""

    endpoint: Endpoint
    tls_settings: TlsSettings
    limits: Limits
    monotonic: Callable[[], float]
    deadline: Time
    """When the session must end, except for its QUIT."""
    secrets: Secrets

    @classmethod
    def begin(
        cls, endpoint: Endpoint, tls_settings: TlsSettings, limits: Limits, monotonic: Callable[[], float]
    ) -> "Terms":
        """The terms of a session that begins now."""
        deadline = Time(monotonic() + limits.session_seconds, "session_seconds")
        return cls(endpoint, tls_settings, limits, monotonic, deadline, Secrets())


class Framing(Protocol):
    """A receiver: it turns bytes into replies."""

    def feed(self, data: bytes, /) -> None:
        """Take bytes from the wire."""

    @property
    def surplus(self) -> bytes:
        """Bytes that came without being asked for."""

    @property
    def in_reply(self) -> bool:
        """Whether a part of the next reply has arrived."""


FramingT = TypeVar("FramingT", bound=Framing)


class Conversation(Generic[FramingT]):
    """One connection, and what is said over it. Raises Pop3Error."""

    def __init__(self, terms: Terms, new_receiver: Callable[[], FramingT], *, refusal: bytes) -> None:
        """Connect. ``refusal`` is how a reply begins by which a server refuses, in upper case."""
        self.terms = terms
        self.order = Order()
        self.outstanding: deque[Command] = deque()
        """Commands whose reply is not complete, the oldest first."""
        self.greeting = b""
        """The text of the greeting, as the server sent it."""
        self.is_distrusted = False
        """Whether TLS failed because the certificate did not pass verification."""
        self.receiver = new_receiver()
        self._new_receiver = new_receiver
        self._refusal = refusal
        with self.named("connect", limit="connect_seconds"):
            self._transport = Transport.connect(
                terms.endpoint.host,
                terms.endpoint.port,
                timeout_seconds=terms.limits.connect_seconds,
                monotonic=terms.monotonic,
            )

    def start_tls(self, *, if_plain: str = "") -> None:
        """Make the channel private, as the terms demand. Data from before, in clear text, is dropped.

        ``if_plain`` is the hint for a server that does not speak TLS.
        """
        self.receiver = self._new_receiver()
        _, deadline = self.step("connect_seconds")
        with self.named("TLS", limit=deadline.limit):
            try:
                self._transport.start_tls(self.terms.tls_settings, deadline=deadline.seconds)
            except Distrusted:
                self.is_distrusted = True
                raise
            except PlainText as error:
                raise Pop3Error(error.kind, f"{error}{if_plain}") from error

    def look_at_certificate(self) -> ShownCertificate:
        """The certificate that the server shows, unverified. After it only ``close`` is allowed."""
        _, deadline = self.step("connect_seconds")
        with self.named("TLS", limit=deadline.limit):
            return self._transport.look_at_certificate(self.terms.tls_settings, deadline=deadline.seconds)

    def close(self) -> None:
        """Drop the connection. May be called again."""
        self.order.close()
        self._transport.close()

    @property
    def is_encrypted(self) -> bool:
        """Whether TLS is on."""
        return self._transport.tls is not None

    @property
    def channel_binding(self) -> bytes | None:
        """The ``tls-server-end-point`` of the channel (RFC 5929 section 4.1), or None."""
        return self._transport.server_end_point

    @property
    def facts(self) -> ServerFacts:
        """The facts known from the connection alone."""
        tls = self._transport.tls
        return ServerFacts(
            host=self.terms.endpoint.host,
            port=self.terms.endpoint.port,
            greeting=printable(self.greeting),
            tls_version=tls.version if tls else None,
            cipher=tls.cipher if tls else None,
            certificate_sha256=tls.certificate_sha256 if tls else None,
            certificate_not_after=tls.certificate_not_after if tls else None,
        )

    # Time. ``limit`` is a field of ``Limits``.

    def waiting(self, limit: str) -> Wait:
        """Wait that long between two reads, until the session must end."""
        return Wait(Time(getattr(self.terms.limits, limit), limit), self.terms.deadline)

    def step(self, limit: str) -> Wait:
        """A whole step may take that long, and never goes on after the session must end."""
        whole = self.last_step(limit)
        return Wait(whole.idle, min(whole.until, self.terms.deadline))

    def last_step(self, limit: str) -> Wait:
        """The step that ends the session, which has time of its own."""
        seconds = getattr(self.terms.limits, limit)
        return Wait(Time(seconds, limit), Time(self.terms.monotonic() + seconds, limit))

    # Commands and replies.

    def require_quiet(self) -> None:
        """Raise RuntimeError unless every command has had its reply."""
        self.order.require_open()
        if self.outstanding:
            raise RuntimeError("replies of this session are still to be read")

    def expect(self, *commands: Command) -> None:
        """Announce that the replies to these commands come next."""
        self.outstanding.extend(commands)

    def send(self, *commands: Command) -> None:
        """Send commands in one piece."""
        self.order.require_open()
        if not self.outstanding:
            self._refuse_surplus(commands[0].label)
        self.expect(*commands)
        self._transport.send(b"".join(each.octets for each in commands))

    def receive(self, wait: Wait, *, in_reply: bool | None = None) -> None:
        """Read from the server into the receiver.

        ``in_reply`` says whether the reply has begun, if the receiver cannot know.
        An error holds the reason alone, and the caller must end the session.
        """
        idle, until = wait
        in_reply = self.receiver.in_reply if in_reply is None else in_reply
        try:
            octets = self._transport.receive(idle_seconds=idle.seconds, deadline=until.seconds)
        except TimedOut as error:
            error.limit = (until if error.at_deadline else idle).limit
            raise
        if not octets:
            where = " in the middle of a reply" if in_reply else ""
            raise Pop3Error(FailureKind.TRANSIENT, f"the server closed the connection{where}")
        self.receiver.feed(octets)

    def _refuse_surplus(self, doing: str) -> None:
        """Raise an error for what came unasked, which would be taken for the reply to the next command.

        A server that ends the session by itself may say so in a refusal.
        """
        with self.named(doing, fatal=True):
            octets = self._transport.receive_now()
            if octets:
                self.receiver.feed(octets)
            surplus = self.receiver.surplus
            if surplus[: len(self._refusal)].upper() == self._refusal:
                said = self.show(surplus[len(self._refusal) :].strip())
                raise Pop3Error(FailureKind.TRANSIENT, f"the server ended the session: {said!r}")
            if surplus:
                raise Pop3Error(
                    FailureKind.PROTOCOL, f"the server sent unexpected data: {self.show(surplus)!r}"
                )
            if octets == b"":
                raise Pop3Error(FailureKind.TRANSIENT, "the server closed the connection")

    # Errors.

    @contextmanager
    def named(self, doing: str, *, fatal: bool = False, limit: str | None = None) -> Iterator[None]:
        """Add to an error what was tried and where. A ``fatal`` one ends the session.

        ``limit`` is the limit of a wait that does not name one itself.
        """
        try:
            yield
        except Pop3Error as error:
            exceeded = limit if isinstance(error, TimedOut) and error.limit is None else error.limit
            named = self.error(error.kind, doing, str(error), error.wait_seconds, exceeded)
            if fatal:
                self.fail(named)
            raise named from error

    def fail(self, error: BaseException) -> None:
        """End the session. Every later call raises ``error``, if it is a Pop3Error."""
        self.order.close(error if isinstance(error, Pop3Error) else None)
        self.close()

    def show(self, octets: bytes) -> str:
        """The server's bytes for people, with every secret masked."""
        return self.terms.secrets.show(octets)

    def error(
        self,
        kind: FailureKind,
        doing: str,
        reason: str,
        wait_seconds: float | None = None,
        limit: str | None = None,
    ) -> Pop3Error:
        """An error that says what was tried and where."""
        message = f"{doing} at {self.terms.endpoint.address}: {reason}"
        return Pop3Error(kind, message, wait_seconds=wait_seconds, limit=limit)

    def refused(
        self, doing: str, text: bytes, meaning: Meaning, *, proof: str = "", hint: str = ""
    ) -> Pop3Error:
        """An error for a refusal by the server, which said ``text``.

        ``proof`` is what the server refused along with the user name, at a login.
        """
        said = f"the server said {self.show(text)!r}" if text else "the server refused and gave no reason"
        if meaning.kind is FailureKind.AUTH and proof:
            said = f"user name or {proof} refused; {said}" if text else f"user name or {proof} refused"
        reason = f"{said}; {hint}" if hint else said
        return self.error(meaning.kind, doing, reason, meaning.wait_seconds)

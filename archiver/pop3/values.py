"""What a session takes and gives, by POP3 and POP2 alike: limits, facts of the server, a message's fate."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from archiver.pop3.failures import Pop3Error
from archiver.pop3.listing import Entry
from archiver.pop3.wire import STATUS_LINE_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """How long, and how much, at most. Seconds and bytes."""

    connect_seconds: float = 30
    """For TCP, and again for the TLS handshake."""
    greeting_seconds: float = 60
    """Servers look up names and play for time before they greet."""
    capability_seconds: float = 20
    """Some servers never answer CAPA; the session is then opened anew without it."""
    login_seconds: float = 180
    """Servers wait up to two minutes for another session's lock before they refuse."""
    listing_seconds: float = 300
    """Until a listing begins: a server may first have to read every message for its size."""
    idle_seconds: float = 60
    """Between two octets of anything else."""
    session_seconds: float = 3600
    """From the first octet to the last before QUIT, however steadily the server drips."""
    quit_seconds: float = 300
    """A server rewrites a big mailbox at QUIT before it answers."""
    status_line_bytes: int = STATUS_LINE_BYTES
    listing_lines: int = 750_000
    listing_bytes: int = 32 * 1024 * 1024
    message_bytes: int = 1024 * 1024 * 1024
    """A larger message is refused."""
    window: int = 32
    """Commands outstanding when pipelining, refilled at three quarters. The 24 that are left then are 1.9 MB
    of usual mail (mean 80 KB), more than 100 Mbit/s carries in three round trips of 40 ms; 32 commands are
    under 600 octets, which any socket buffer takes; and no more than 32 messages are still to come when a
    caller stops."""


DEFAULT_LIMITS: Final = Limits()

AVOIDABLE: Final = ("AUTH", "CAPA", "PIPELINING", "STAT", "UIDL", "UIDL-N", "UTF8")
"""Verbs that servers hang up or hang at, and what a session can do without.

UIDL-N is what is asked of one number alone, by UIDL and LIST.
"""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What is known of the server, for the record. Text of the server is escaped and cut."""

    host: str
    port: int
    greeting: str
    capabilities: tuple[str, ...] = ()
    """The lines of the last CAPA, and never those that came in clear text before STLS."""
    tls_version: str | None = None
    """None where the channel is in clear text."""
    cipher: str | None = None
    certificate_sha256: str | None = None
    certificate_not_after: datetime | None = None
    mechanism: str | None = None
    """How the login was done; None before it."""
    pipelining: bool = False
    """Whether commands are pipelined in this session."""
    bare_lf: bool = False
    """Whether the server ends its lines in a bare LF, which frames this session."""
    login_delay_seconds: float | None = None
    """The shortest time between two logins, as CAPA announces it (RFC 2449 section 6.5)."""
    expire_days: int | None = None
    """How long messages stay on the server (section 6.7). 0: until they are read. None: it does not say."""
    utf8: bool = False
    """Whether the session is in UTF8 mode (RFC 6856), in which no message is converted."""
    implementation: str | None = None
    """What the server calls itself."""
    avoid: frozenset[str] = frozenset()
    """What the server was seen to trip over in this session, beyond doubt, as ``connect`` takes it."""
    suspect: frozenset[str] = frozenset()
    """At what it hung or hung up, which may have been chance: worth avoiding if it comes again."""


class Glance(NamedTuple):
    """A look at a mailbox that lists nothing. None: the server did not say, or not so that it could be read.

    ``uidl`` is that of the message whose number was given.
    """

    count: int | None  # type: ignore[assignment]  # nobody counts in this tuple
    size: int | None
    uidl: bytes | None = None


class Sink(Protocol):
    """Where a message's octets go, in order."""

    def write(self, data: bytes, /) -> object:
        """Take all of ``data``."""


SinkT = TypeVar("SinkT", bound=Sink)


@dataclass(frozen=True, slots=True)
class Retrieved(Generic[SinkT]):
    """A message that is complete in its sink."""

    entry: Entry
    sink: SinkT


@dataclass(frozen=True, slots=True)
class Refused(Generic[SinkT]):
    """A message that cannot be had (kind POISON), while the session goes on.

    ``sink`` is set when one was opened: it holds a part, to be thrown away.
    """

    entry: Entry
    error: Pop3Error
    sink: SinkT | None = None

"""What a POP2 or POP3 session takes and returns: limits, facts about the server, outcomes of messages."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from archiver.pop3.failures import Pop3Error
from archiver.pop3.listing import Entry
from archiver.pop3.wire import STATUS_LINE_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest waits and the largest sizes, in seconds and bytes."""

    connect_seconds: float = 30
    """For TCP, and again for the TLS handshake."""
    greeting_seconds: float = 60
    """Servers look up names, and some delay on purpose, before they greet."""
    capability_seconds: float = 20
    """Some servers never answer CAPA. Then the session connects again and leaves it out."""
    login_seconds: float = 180
    """Servers wait up to two minutes for another session's lock before they refuse."""
    listing_seconds: float = 300
    """Until a listing begins: a server may have to read every message first, for its size."""
    idle_seconds: float = 60
    """Between two bytes of anything else."""
    session_seconds: float = 3600
    """From the first byte to the last before QUIT, however steadily the server sends."""
    quit_seconds: float = 300
    """At QUIT a server may rewrite a big mailbox before it answers."""
    status_line_bytes: int = STATUS_LINE_BYTES
    listing_lines: int = 750_000
    listing_bytes: int = 32 * 1024 * 1024
    message_bytes: int = 1024 * 1024 * 1024
    """A larger message is refused."""
    window: int = 32
    """Commands outstanding with pipelining, refilled at three quarters.

    The 24 that are left then stand for 1.9 MB of usual mail (mean 80 KB). That is
    more than 100 Mbit/s carries in three round trips of 40 ms. 32 commands have
    under 600 bytes, which any socket buffer takes. When a caller stops, at most
    32 messages still come.
    """


DEFAULT_LIMITS: Final = Limits()

AVOIDABLE: Final = ("AUTH", "CAPA", "PIPELINING", "STAT", "UIDL", "UIDL-N", "UTF8")
"""Names of commands at which servers stall or disconnect, and which a session can do without.

UIDL-N stands for UIDL and LIST with a message number.
"""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The known facts about a server, for the record. Text of the server is escaped and cut."""

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
    """What the server tripped over in this session, beyond doubt, as ``connect`` takes it."""
    suspect: frozenset[str] = frozenset()
    """Where it stalled or disconnected, which may be chance: avoid it if that happens again."""


class Glance(NamedTuple):
    """A look at a mailbox without a listing. None: the server did not say, or not in a readable form."""

    count: int | None  # type: ignore[assignment]  # it hides tuple.count, which no caller needs
    size: int | None
    """The total size of the messages, in bytes."""
    uidl: bytes | None = None
    """Of the message whose number was given."""


class Sink(Protocol):
    """The destination of a message's bytes, in order."""

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
    """A message that cannot be fetched (kind POISON), while the session goes on."""

    entry: Entry
    error: Pop3Error
    sink: SinkT | None = None
    """Set if a sink was opened. It contains a part of the message, which is useless."""

"""The values that everything else speaks in, frozen, and the keys of objects in the store.

The words are the glossary's (docs/concepts.md). Wire data is bytes here;
``uidl_text`` is the one place where a UIDL becomes text.
"""

import re
import secrets
from dataclasses import astuple, dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from archiver.errors import Outcome
from archiver.states import AccountState

UNKNOWN_SIZE = -1
"""The size of a listing entry for which the server gave none."""

NO_DIGEST = bytes(32)
"""What the first segment of a journal names as its predecessor."""


def new_account_id() -> str:
    """64 random bits in hex: unique among every database that shares a bucket, and harmless in a key."""
    return secrets.token_hex(8)


def mail_host(url: str) -> str:
    """The host of an account's URL, in lower case: what accounts have in common that share its patience."""
    return urlsplit(url).hostname or ""


_MECHANISM = re.compile(r";AUTH=[^@/]*@", re.IGNORECASE)


def message_key(account_id: str, sha256: bytes) -> str:
    """The key comes from account and content alone, so a PUT may be repeated by anyone without harm."""
    digest = sha256.hex()
    return f"messages/{account_id}/{digest[:2]}/{digest}.eml"


def journal_prefix(account_id: str) -> str:
    return f"journal/{account_id}/"


def segment_key(account_id: str, sequence: int) -> str:
    return f"{journal_prefix(account_id)}{sequence:012d}.ndjson"


def capture_id(account_id: str, sha256: bytes) -> str:
    """One account's custody of one content. Never shared between accounts, the same after a rebuild."""
    return f"{account_id}-{sha256.hex()}"


def uidl_text(uidl: bytes) -> str:
    """Each byte as the code point of its number (ISO 8859-1), so that ``uidl_bytes`` restores it exactly."""
    return uidl.decode("latin-1")


def uidl_bytes(text: str) -> bytes:
    """The inverse of ``uidl_text``. Raises UnicodeEncodeError for text that did not come from it."""
    return text.encode("latin-1")


class DeletePolicy(NamedTuple):
    """When a message may be deleted from the mail server: never, or a number of days after its capture.

    ``after-archived`` is zero days. The text form is that of the command line.
    """

    after_days: float | None = None

    @classmethod
    def parse(cls, text: str) -> "DeletePolicy":
        """Raises ValueError with a sentence for the operator."""
        if text == "never":
            return cls(None)
        if text == "after-archived":
            return cls(0.0)
        name, _, days = text.partition("=")
        if name == "after-days" and days.isascii() and days.isdigit():
            return cls(float(days))
        raise ValueError(f"unknown deletion policy {text!r}: use never, after-archived or after-days=N")

    def __str__(self) -> str:
        match self.after_days:
            case None:
                return "never"
            case 0.0:
                return "after-archived"
            case days:
                return f"after-days={days:.0f}"


NEVER_DELETE = DeletePolicy()


@dataclass(frozen=True, slots=True)
class Account:
    """One POP3 login that is archived. What an operator may set is described in ``accounts.fields``."""

    id: str
    name: str
    url: str
    """As ``pop3.Endpoint.url`` writes it."""
    tls: str
    secret_reference: str = field(repr=False)
    """Where the password is, never the password itself."""
    ca_file: str | None = None
    delete: DeletePolicy = NEVER_DELETE
    interval_seconds: float = 300.0
    timeout_seconds: float | None = None
    epoch: int = 1
    state: AccountState = AccountState.ACTIVE
    state_reason: str | None = None
    """Why the account waits for an operator."""
    tls_pins: tuple[str, ...] = ()
    """SHA-256 in hex, in order."""
    tls_minimum: str = "1.2"
    tls_server_name: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None
    cron: str | None = None
    """Takes precedence over the interval; read in ``time_zone``."""
    time_zone: str = "UTC"
    interval_max_seconds: float | None = None
    """With it, the interval adapts itself between ``interval_seconds`` and this."""
    blackout: str = ""
    day_bytes: int | None = None
    """Bytes that may be fetched in a day (UTC)."""
    avoids: tuple[str, ...] = ()
    """Commands and capabilities that the server trips over, as written by ``policy.remembered``."""
    deletion_suspended: str | None = None
    """Why nothing is deleted, whatever the policy, until an operator confirms."""

    @property
    def login(self) -> str:
        """Host, port, user and TLS mode, to which a sealed secret is bound.

        Not the mechanism: it depends on what the server offers.
        """
        return f"{self.tls} {_MECHANISM.sub('@', self.url)}"


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to poll an account, as the database granted it."""

    account_id: str
    token: int
    """Only grows: a write with an older one is refused."""
    recover: bool
    """Whether an earlier holder may have written a journal segment that the database has not seen."""
    host: str = field(default="", compare=False)
    """Where the session counts."""
    failing: bool = field(default=False, compare=False)
    """Whether the last poll failed."""


class SightingKey(NamedTuple):
    """What identifies a message in one epoch of one mailbox.

    ``content`` is empty if the UIDL identifies the message. If the server gave none, or
    the same one to several messages, ``content`` is the SHA-256 of the content, and the
    message must be fetched to be recognised.
    """

    uidl: bytes
    size: int
    content: bytes = b""


class What(StrEnum):
    """How a sighting was resolved; the word of a journal line."""

    CAPTURED = "captured"
    KNOWN = "known"
    QUARANTINED = "quarantined"
    DELETED = "deleted"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Resolved:
    """One line of a journal segment: a sighting and what became of it."""

    what: What
    sighting: SightingKey
    """What the listing showed, its size included."""
    resolved_at: datetime
    sha256: bytes | None = None
    size: int | None = None
    """Size of the content that was read, with ``sha256``; None if it was not read."""
    version_id: str | None = None
    reason: str | None = None
    """Why the message is in quarantine, or why the sighting ended."""
    attempts: int = 0


class JournalHead(NamedTuple):
    """The last segment of an account's journal that the database knows; sequence 0 before the first."""

    sequence: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """What a poll saw of the server, for the record."""

    host: str
    port: int
    greeting: str
    mechanism: str | None
    tls_version: str | None
    cipher: str | None
    certificate_sha256: str | None


@dataclass(frozen=True, slots=True)
class Segment:
    """One object of an account's journal: its place in the chain, where its facts came from, its lines."""

    account_id: str
    account_name: str
    account_url: str
    epoch: int
    sequence: int
    previous: bytes
    token: int
    written_at: datetime
    server: ServerRecord
    listing_count: int
    """Messages in the mailbox."""
    listing_digest: bytes
    """SHA-256 of the listing's lines, from message ``listing_first`` on."""
    lines: tuple[Resolved, ...]
    listing_first: int = 1


StoppedBy = Literal["session", "room", "blackout", "day"]
"""Why a poll ends before all is fetched: its session's budget is spent; others wait for its thread or host; a
blackout of its account begins; the budget of its account's day is spent."""


@dataclass(frozen=True, slots=True)
class LastLook:
    """What a mailbox looked like at its last listing, by which it is recognised as unchanged."""

    stat_count: int
    stat_size: int
    """What STAT said in that session, with ``stat_count``."""
    last_number: int | None
    last_uidl: bytes | None
    """The UIDL of the last message, whose number is ``last_number``."""
    trusted_until: datetime
    """After this, the mailbox is listed however it looks."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a poll counted, as one value: from the poll to its report, its row, its JSON and its log line.

    The names are those of the columns of ``poll``.
    """

    new: int = 0
    """Listed messages that this poll captured."""
    known: int = 0
    """Listed messages that were in the archive already."""
    quarantined: int = 0
    """Listed messages that are in quarantine, each with a reason."""
    delete_requested: int = 0
    """Messages that the server was asked to delete."""
    deleted: int = 0
    """Messages that the server no longer shows because we asked it to delete them."""
    gone: int = 0
    """Archived messages that the server no longer shows, though we did not ask it to delete them."""
    lost: int = 0
    """Messages that disappeared from the server before they were archived."""
    fetched_bytes: int = 0
    """Bytes of the messages that were read from the server."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all counts."""
        return tuple(each.name for each in fields(cls))

    @classmethod
    def of(cls, row: Any) -> Self:
        """The counts of a row that has the columns of ``poll``."""
        return cls(*(getattr(row, name) for name in cls.names()))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(one - two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def resolved(self) -> int:
        """Listed messages that are archived or in quarantine."""
        return self.new + self.known + self.quarantined


@dataclass(frozen=True, slots=True)
class PollReport:
    """What one poll did."""

    account: str
    """The account's name."""
    outcome: Outcome
    listed: int | None = None
    """Messages in the mailbox; None when the poll ended before it had a listing."""
    counts: Counts = Counts()
    seconds: float = 0.0
    glanced: bool = False
    """Whether the mailbox looked unchanged, so that it was not listed."""
    last_look: LastLook | None = None
    """How the next poll recognises the mailbox as unchanged; None if it must list it."""
    error: str | None = None
    hint: str | None = None
    segments: int = 0
    """Journal segments that were written."""
    wait_seconds: float | None = None
    """How long the server asked us to wait."""
    journal_uncertain: bool = False
    """Whether the store may have objects or a journal segment that the database does not know."""
    avoid: tuple[str, ...] = ()
    """Commands and capabilities that the server certainly trips over."""
    suspect: tuple[str, ...] = ()
    """Commands and capabilities that the server may have tripped over."""
    login_delay_seconds: float | None = None
    """The least time that the server wants between two logins."""
    implementation: str | None = None
    warnings: tuple[str, ...] = ()
    """Sentences for the operator."""
    reached: bool | None = None
    """Whether a session began; None if the poll did not try to connect."""
    stopped_by: StoppedBy | None = None
    """Why the poll stopped fetching although messages were left."""

    @property
    def to_come(self) -> int | None:
        """How many listed messages are neither archived nor in quarantine yet."""
        return None if self.listed is None else self.listed - self.counts.resolved

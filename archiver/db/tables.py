"""The tables, the same on SQLite and PostgreSQL.

The bucket is the truth, and the tables are its index: they can be made again from
it, except for accounts, schedules and poll history. ``lease`` is narrow and
separate from ``account``, because every poll rewrites it. Digests and UIDLs are
bytes. Times are aware, in UTC.
"""

from collections.abc import Callable
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any, cast

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
    text,
)
from sqlalchemy import DateTime as SqlDateTime
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel

ACCOUNT_ID_LENGTH = 16
DIGEST_BYTES = 32

SQLModel.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time. SQLite keeps text without the zone: it sorts by time, and is cheap to convert."""

    impl = SqlDateTime(timezone=True)
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[datetime | None], object]:
        return _as_text if dialect.name == "sqlite" else _in_utc

    def result_processor(
        self,
        dialect: Dialect,
        coltype: object,  # noqa: ARG002 - the driver's name of the type makes no difference
    ) -> Callable[[Any], datetime | None]:
        return _from_text if dialect.name == "sqlite" else _in_utc


def _in_utc(value: datetime | None) -> datetime | None:
    if value is None:
        return None
    if value.tzinfo is None:
        raise ValueError("a time without a zone is ambiguous")
    return value.astimezone(UTC)


@lru_cache(maxsize=1_000)  # the time of a message is written to three tables
def _as_text(value: datetime | None) -> str | None:
    in_utc = _in_utc(value)
    return None if in_utc is None else in_utc.isoformat(" ", "microseconds")[: -len("+00:00")]


def _from_text(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(f"{value}+00:00")


def _account_key() -> Column[str]:
    """A part of a primary key that refers to an account."""
    return Column(String(ACCOUNT_ID_LENGTH), ForeignKey("account.id"), primary_key=True)


def _hot_account_key() -> Column[str]:
    """The same without the constraint, for tables that take many rows at once.

    Every transaction that writes there has locked the account's lease row first,
    which proves that the account exists. To check that again for each row would
    cost more than the row.
    """
    return Column(String(ACCOUNT_ID_LENGTH), primary_key=True)


class AccountRow(SQLModel, table=True):
    """One POP3 login that is archived, with its policies. ``model.Account`` describes the columns."""

    __tablename__ = "account"
    # Adding an account looks for its URL, a hundred thousand times for as many accounts.
    __table_args__ = (Index(None, "url"),)

    id: str = Field(sa_column=Column(String(ACCOUNT_ID_LENGTH), primary_key=True))
    name: str = Field(sa_column=Column(Text, nullable=False, unique=True))
    url: str = Field(sa_column=Column(Text, nullable=False))
    tls: str = Field(sa_column=Column(Text, nullable=False))
    # Two columns keep the names that scripts of operators know: a key says what each one is.
    secret_reference: str = Field(
        sa_column=Column("secret", Text, key="secret_reference", nullable=False), repr=False
    )
    ca_file: str | None = Field(default=None, sa_column=Column(Text))
    delete_policy: str = Field(default="never", sa_column=Column(Text, nullable=False))
    interval_seconds: float
    timeout_seconds: float | None = None
    epoch: int = 1
    state: str = Field(default="active", sa_column=Column(Text, nullable=False, server_default="active"))
    state_reason: str | None = Field(
        default=None, sa_column=Column("paused_reason", Text, key="state_reason")
    )
    tls_pins: str = Field(default="", sa_column=Column(Text, nullable=False))
    tls_minimum: str = Field(default="1.2", sa_column=Column(Text, nullable=False))
    tls_server_name: str | None = Field(default=None, sa_column=Column(Text))
    client_certificate: str | None = Field(default=None, sa_column=Column(Text))
    client_key: str | None = Field(default=None, sa_column=Column(Text))
    cron: str | None = Field(default=None, sa_column=Column(Text))
    time_zone: str = Field(default="UTC", sa_column=Column(Text, nullable=False, server_default="UTC"))
    interval_max_seconds: float | None = None
    blackout: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    day_bytes: int | None = Field(default=None, sa_column=Column(BigInteger))
    avoids: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    deletion_suspended: str | None = Field(default=None, sa_column=Column(Text))
    removed_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    created_at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))


class LeaseRow(SQLModel, table=True):
    """Which worker may poll an account, until when, and when the account is due."""

    __tablename__ = "lease"
    __table_args__ = (
        # No two sessions can have one slot of a host, whatever claims do.
        Index(
            "uq_lease_host_slot",
            "host",
            "slot",
            unique=True,
            postgresql_where=text("slot IS NOT NULL"),
            sqlite_where=text("slot IS NOT NULL"),
        ),
        # Every account that is not leased is in one of these four (see ``claims``).
        *(
            Index(
                f"ix_lease_{queue}_{health}",
                *columns,
                postgresql_where=text(where),
                sqlite_where=text(where),
            )
            for queue, columns, which in (
                ("due", ("due_at",), "slot IS NULL AND NOT queued"),
                ("queued", ("host", "due_at"), "queued"),
            )
            for health, failures in (("well", "failures = 0"), ("failing", "failures > 0"))
            for where in (f"{which} AND {failures}",)
        ),
    )

    account_id: str = Field(sa_column=_account_key())
    due_at: datetime | None = Field(sa_column=Column(UtcDateTime))
    """Null while the account is not active. While a worker has the lease, its expiry."""
    owner: str | None = Field(default=None, sa_column=Column(Text))
    """The process that has the lease. Null between polls."""
    expires_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    token: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """The number of the newest lease. It only grows; writes with an older one are refused."""
    recover: bool = False
    """Whether the store may have a journal segment that the database has not seen."""
    failures: int = 0
    """Polls that failed in a row because of trouble that passes."""
    refusals: int = 0
    """Polls that failed in a row because an operator must act."""
    host: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    slot: int | None = None
    """The session slot of the host that a poll uses. A host has as many slots as sessions."""
    queued: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))
    """Whether it is due and waits for a slot. Claims then look for it in its host's queue."""
    looked_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    """The end of the last poll that saw the mailbox."""
    late_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    """From this time on, the next poll that sees the mailbox ends a gap."""
    asked: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))
    """Whether another poll was asked for during this one."""
    interval_seconds: float | None = None
    """The present interval of an adaptive schedule."""


class HostRow(SQLModel, table=True):
    """A mail host at which polls could not even begin. A healthy host has no row."""

    __tablename__ = "host"

    name: str = Field(sa_column=Column(Text, primary_key=True))
    failures: int
    """Polls in a row that could not begin."""
    failing_since: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))
    retry_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    """The host backs off until then. Null while it has failed too rarely for that."""
    error: str | None = Field(default=None, sa_column=Column(Text))


class MailboxRow(SQLModel, table=True):
    """The size of an account's archive, how its mailbox looked last, and what was fetched today."""

    __tablename__ = "mailbox"

    account_id: str = Field(sa_column=_account_key())
    captures: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Counted as captures are recorded, because to count a hundred million rows takes too long."""
    captured_bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    listed_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    """The time of the last listing or incremental listing. The next fields describe the mailbox then."""
    listed: int | None = None
    quarantined: int = 0
    to_come: int = 0
    stat_count: int | None = None
    stat_size: int | None = Field(default=None, sa_column=Column(BigInteger))
    last_number: int | None = None
    last_uidl: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    trusted_until: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    """Until then, a mailbox with the same STAT and the same last UIDL counts as unchanged."""
    day: date | None = None
    """The day (UTC) on which ``day_bytes`` were fetched."""
    day_bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    counted: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    """Polls up to this token are in ``poll_day``."""


class CaptureRow(SQLModel, table=True):
    """One account's custody of one content, with the circumstances of its first sighting."""

    __tablename__ = "capture"
    __table_args__ = (
        Index(None, "account_id", "captured_at"),
        # Operators name a capture by the first digits of its hash. On SQLite, which has fewer accounts, the
        # key finds it in each account: an index would cost a page write for nearly every message.
        Index(None, "sha256").ddl_if(dialect="postgresql"),
        {"sqlite_with_rowid": False, "postgresql_partition_by": "HASH (account_id)"},
    )

    account_id: str = Field(sa_column=_hot_account_key())
    sha256: bytes = Field(sa_column=Column(LargeBinary(DIGEST_BYTES), primary_key=True))
    size: int = Field(sa_column=Column(BigInteger, nullable=False))
    epoch: int
    uidl: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    captured_at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))
    version_id: str | None = Field(default=None, sa_column=Column(Text))
    token: int = Field(sa_column=Column(BigInteger, nullable=False))
    sequence: int = Field(sa_column=Column(BigInteger, nullable=False))


class SightingRow(SQLModel, table=True):
    """A message that a listing showed, and its state."""

    __tablename__ = "sighting"
    __table_args__ = (
        # A poll reads the messages that were on the server last time, ordered by
        # UIDL. Absent messages must not slow that down permanently.
        Index(
            "ix_sighting_by_uidl",
            "account_id",
            "epoch",
            "uidl",
            "size",
            "content",
            postgresql_where=text("absent_at IS NULL"),
            sqlite_where=text("absent_at IS NULL"),
        ),
        # Messages that need an operator are rare, and queried often.
        Index(
            "ix_sighting_quarantined",
            "account_id",
            postgresql_where=text("state = 'quarantined'"),
            sqlite_where=text("state = 'quarantined'"),
        ),
        {"sqlite_with_rowid": False, "postgresql_partition_by": "HASH (account_id)"},
    )

    account_id: str = Field(sa_column=_hot_account_key())
    epoch: int = Field(primary_key=True)
    uidl: bytes = Field(sa_column=Column(LargeBinary, primary_key=True))
    size: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    content: bytes = Field(sa_column=Column(LargeBinary(DIGEST_BYTES), primary_key=True))
    """The digest, if the UIDL does not identify the message: the server showed it twice, or reused it."""
    state: str = Field(sa_column=Column(Text, nullable=False))
    """A ``SightingState``."""
    sha256: bytes | None = Field(default=None, sa_column=Column(LargeBinary(DIGEST_BYTES)))
    first_seen_at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))
    attempts: int = 0
    """Fetches that failed."""
    retry_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    """When the next fetch is due."""
    reason: str | None = Field(default=None, sa_column=Column(Text))
    delete_attempts: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    """Deletions that the server confirmed and did not perform."""
    delete_retry_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    """When the next deletion may be requested."""
    delete_requested_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    absent_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    """When a complete listing no longer showed it."""


class JournalRow(SQLModel, table=True):
    """The last journal segment that the database has recorded."""

    __tablename__ = "journal"

    account_id: str = Field(sa_column=_account_key())
    sequence: int = Field(sa_column=Column(BigInteger, nullable=False))
    digest: bytes = Field(sa_column=Column(LargeBinary(DIGEST_BYTES), nullable=False))
    written_at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))


class PollRow(SQLModel, table=True):
    """A poll that ended, by account and token. ``model.PollReport`` and ``Counts`` describe the columns."""

    __tablename__ = "poll"
    __table_args__ = (
        # History is shown and removed by age.
        Index(None, "ended_at"),
        # Losses are rare, and queried often.
        Index(
            "ix_poll_lost",
            "ended_at",
            postgresql_where=text("lost > 0"),
            sqlite_where=text("lost > 0"),
        ),
    )

    account_id: str = Field(sa_column=_account_key())
    token: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    ended_at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))
    seconds: float
    outcome: str = Field(sa_column=Column(Text, nullable=False))
    listed: int | None = None
    new: int = 0
    known: int = 0
    quarantined: int = 0
    to_come: int | None = None
    delete_requested: int = 0
    fetched_bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    error: str | None = Field(default=None, sa_column=Column(Text))
    deleted: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    gone: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    lost: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    glanced: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))


class PollDayRow(SQLModel, table=True):
    """An account's day (UTC), added up from its polls. It stays when they are removed by age.

    ``listed``, ``archived``, ``quarantined`` and ``to_come`` describe the day's last
    listing, at the end of its poll: the last three add up to ``listed``. All other
    columns cover the whole day.
    """

    __tablename__ = "poll_day"
    __table_args__ = (
        Index(None, "day"),
        Index(
            "ix_poll_day_lost",
            "day",
            postgresql_where=text("lost > 0"),
            sqlite_where=text("lost > 0"),
        ),
    )

    account_id: str = Field(sa_column=_account_key())
    day: date = Field(primary_key=True)
    polls: int
    failed: int
    looks: int
    listed: int | None = None
    new: int
    archived: int | None = None
    quarantined: int | None = None
    to_come: int | None = None
    delete_requested: int
    deleted: int
    gone: int
    lost: int
    fetched_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    seconds: float
    first_look_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    last_look_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))


class GapRow(SQLModel, table=True):
    """A time in which no poll saw a mailbox, and which was longer than scheduled. Kept permanently."""

    __tablename__ = "gap"
    __table_args__ = (Index(None, "ended_at"),)

    account_id: str = Field(sa_column=_account_key())
    began_at: datetime = Field(sa_column=Column(UtcDateTime, primary_key=True))
    ended_at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))


class EventRow(SQLModel, table=True):
    """The feed. A reader that has seen a position has seen every one below it (see ``events.publish``)."""

    __tablename__ = "event"
    __table_args__ = {"sqlite_autoincrement": True}

    # SQLite assigns numbers by itself only in a column of type INTEGER.
    position: int | None = Field(
        default=None,
        sa_column=Column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    )
    kind: str = Field(sa_column=Column(Text, nullable=False))
    account_id: str = Field(sa_column=Column(String(ACCOUNT_ID_LENGTH), nullable=False))
    at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))
    body: str = Field(sa_column=Column(Text, nullable=False))


class ArchiveRow(SQLModel, table=True):
    """Which archive this database belongs to: one row, once the store was seen (``evidence.identity``)."""

    __tablename__ = "archive"

    number: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    archive_id: str = Field(sa_column=Column(Text, nullable=False))


def table(model: type[SQLModel]) -> Table:
    """The Core table behind a model. Hot paths use Core, which costs a third of the ORM."""
    return cast(Table, model.__dict__["__table__"])


metadata: MetaData = SQLModel.metadata
account, lease, host, mailbox, capture, sighting, journal, poll, poll_day, gap, event, archive = (
    table(model)
    for model in (
        AccountRow,
        LeaseRow,
        HostRow,
        MailboxRow,
        CaptureRow,
        SightingRow,
        JournalRow,
        PollRow,
        PollDayRow,
        GapRow,
        EventRow,
        ArchiveRow,
    )
)

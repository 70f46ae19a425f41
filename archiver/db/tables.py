"""The tables, the same on SQLite and PostgreSQL.

The bucket is the truth and these are its index, so that what is here can be
made again from there; except for accounts, schedules and poll history.
``lease`` is narrow and apart from ``account``, because every poll rewrites it.
Digests and UIDLs are bytes. Times are UTC and aware.
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
    """An aware UTC time. SQLite has text, without the zone: to be compared, and cheap to make and to read."""

    impl = SqlDateTime(timezone=True)
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[datetime | None], object]:
        return _as_text if dialect.name == "sqlite" else _in_utc

    def result_processor(
        self,
        dialect: Dialect,
        coltype: object,  # noqa: ARG002 - a driver's name for the type, which makes no difference
    ) -> Callable[[Any], datetime | None]:
        return _from_text if dialect.name == "sqlite" else _in_utc


def _in_utc(value: datetime | None) -> datetime | None:
    if value is None:
        return None
    if value.tzinfo is None:
        raise ValueError("a time without a zone is ambiguous")
    return value.astimezone(UTC)


@lru_cache(maxsize=1_000)  # a message's time goes into three tables
def _as_text(value: datetime | None) -> str | None:
    in_utc = _in_utc(value)
    return None if in_utc is None else in_utc.isoformat(" ", "microseconds")[: -len("+00:00")]


def _from_text(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(f"{value}+00:00")


def _account_key() -> Column[str]:
    """Part of a primary key that points at an account."""
    return Column(String(ACCOUNT_ID_LENGTH), ForeignKey("account.id"), primary_key=True)


def _hot_account_key() -> Column[str]:
    """The same without the constraint, for tables that take many rows at once.

    Every transaction that writes there has locked the account's lease row
    first, which proves the account; checking again for each row would cost
    more than the row.
    """
    return Column(String(ACCOUNT_ID_LENGTH), primary_key=True)


class AccountRow(SQLModel, table=True):
    """One POP3 login that is archived, and the policies it is archived by."""

    __tablename__ = "account"
    # A hundred thousand accounts are added by looking for each one's URL.
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
    """Who may poll an account, until when, and when it is due. ``due_at`` is null while it is paused.

    ``slot`` is the session of its host that a poll takes up, one of as many as
    the host may have at once. ``queued`` marks one that is due and waits for a
    slot: it is looked for at its host, and out of the way of all others.
    ``asked`` is set when somebody wants a poll while one goes on.
    ``interval_seconds`` is where an adaptive schedule stands. ``looked_at`` is
    the end of the last poll that saw what the mailbox holds; the next such one
    is late from ``late_at`` on, when nobody has looked for longer than planned.
    """

    __tablename__ = "lease"
    __table_args__ = (
        # Two sessions in one slot of a host cannot be, whoever claims them.
        Index(
            "uq_lease_host_slot",
            "host",
            "slot",
            unique=True,
            postgresql_where=text("slot IS NOT NULL"),
            sqlite_where=text("slot IS NOT NULL"),
        ),
        # Every account that nobody holds is in one of these four (see ``schedule``).
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
    owner: str | None = Field(default=None, sa_column=Column(Text))
    expires_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    token: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    recover: bool = False
    failures: int = 0
    refusals: int = 0
    host: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    slot: int | None = None
    queued: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))
    looked_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    late_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    asked: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))
    interval_seconds: float | None = None


class HostRow(SQLModel, table=True):
    """A mail host in trouble: polls of it that could not even begin, in a row. A healthy host has no row."""

    __tablename__ = "host"

    name: str = Field(sa_column=Column(Text, primary_key=True))
    failures: int
    failing_since: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))
    retry_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    error: str | None = Field(default=None, sa_column=Column(Text))


class MailboxRow(SQLModel, table=True):
    """What an account holds, what its mailbox showed last, and what was fetched today.

    ``captures`` and ``captured_bytes`` are counted as captures are recorded, so that
    nobody has to count a hundred million rows. The rest is of the last complete
    listing; until ``trusted_until`` a STAT and a last UIDL like those remembered
    stand for it. Polls up to the token ``counted`` are in ``poll_day``.
    """

    __tablename__ = "mailbox"

    account_id: str = Field(sa_column=_account_key())
    captures: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    captured_bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    listed_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    listed: int | None = None
    quarantined: int = 0
    to_come: int = 0
    stat_count: int | None = None
    stat_size: int | None = Field(default=None, sa_column=Column(BigInteger))
    last_number: int | None = None
    last_uidl: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    trusted_until: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    day: date | None = None
    day_bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    counted: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))


class CaptureRow(SQLModel, table=True):
    """One account's custody of one content, with the circumstances of its first sighting."""

    __tablename__ = "capture"
    __table_args__ = (
        Index(None, "account_id", "captured_at"),
        # People name a capture by the first digits of its hash. SQLite has not so many accounts, and looks by
        # the key of each one's captures: an index would have a page written for nearly every message.
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
    """What a listing showed, and what became of it.

    ``state`` is captured, quarantined, or pending (it was tried and is still
    to come). ``absent_at`` is set when a complete listing does not show it any
    more. ``attempts`` counts fetches that failed, and
    ``retry_at`` is when the next one is due; ``delete_attempts`` counts deletions
    that the server confirmed and did not make, and ``delete_retry_at`` is when the
    next one may be requested. ``content`` is set where the UIDL identifies nothing: it stood there
    more than once, or was given again to another message later.
    """

    __tablename__ = "sighting"
    __table_args__ = (
        # A poll reads what was on the server last time, in the order of its
        # UIDLs: what is absent since must not make that slower for ever.
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
        # What needs somebody's attention is rare, and asked for often.
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
    state: str = Field(sa_column=Column(Text, nullable=False))
    sha256: bytes | None = Field(default=None, sa_column=Column(LargeBinary(DIGEST_BYTES)))
    first_seen_at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))
    attempts: int = 0
    retry_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    reason: str | None = Field(default=None, sa_column=Column(Text))
    delete_attempts: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    delete_retry_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    delete_requested_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))
    absent_at: datetime | None = Field(default=None, sa_column=Column(UtcDateTime))


class JournalRow(SQLModel, table=True):
    """The last journal segment that the database has taken in."""

    __tablename__ = "journal"

    account_id: str = Field(sa_column=_account_key())
    sequence: int = Field(sa_column=Column(BigInteger, nullable=False))
    digest: bytes = Field(sa_column=Column(LargeBinary(DIGEST_BYTES), nullable=False))
    written_at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))


class PollRow(SQLModel, table=True):
    """One poll that ended, named by its account and the token of its lease.

    ``deleted`` went by our hand and ``gone`` by another's, both archived;
    ``lost`` went before they were. ``glanced``: the mailbox was seen to be
    unchanged without a listing.
    """

    __tablename__ = "poll"
    __table_args__ = (
        # History is shown and removed by age.
        Index(None, "ended_at"),
        # A loss is rare, and asked for often.
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
    """An account's day (UTC), added up from its polls; what is left of them once they are removed by age.

    ``listed``, ``archived``, ``quarantined`` and ``to_come`` are of the day's last
    listing, by the end of its poll, and the three make ``listed``. All else is of
    the whole day.
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
    """A time in which nobody looked into a mailbox, and longer than it should have been. Kept for good."""

    __tablename__ = "gap"
    __table_args__ = (Index(None, "ended_at"),)

    account_id: str = Field(sa_column=_account_key())
    began_at: datetime = Field(sa_column=Column(UtcDateTime, primary_key=True))
    ended_at: datetime = Field(sa_column=Column(UtcDateTime, nullable=False))


class EventRow(SQLModel, table=True):
    """The feed. A reader that has seen a position has seen every one below it (see ``events.publish``)."""

    __tablename__ = "event"
    __table_args__ = {"sqlite_autoincrement": True}

    # SQLite counts up by itself only in a column of exactly INTEGER.
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
    """The Core table behind a model: the hot paths speak Core, which costs a third of the ORM."""
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

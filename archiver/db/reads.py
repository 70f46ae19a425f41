"""What polls and people ask of the database. Reads only; rows come out as values or plain mappings."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import bulk
from archiver.db.tables import account, capture, event, host, journal, lease, mailbox, poll, sighting
from archiver.model import Account, DeletePolicy, JournalHead, LastLook, SightingKey
from archiver.states import AccountState

FETCH_ROWS = 1_000


class Known(NamedTuple):
    """What the database holds of one sighting."""

    state: str
    sha256: bytes | None
    first_seen_at: datetime
    attempts: int
    retry_at: datetime | None
    delete_attempts: int
    delete_retry_at: datetime | None
    delete_requested: bool


class CapturedContent(NamedTuple):
    """What the database holds of one capture."""

    captured_at: datetime
    size: int


class Provable(NamedTuple):
    """A capture behind a sighting, and the journal segment that names it."""

    sha256: bytes
    captured_at: datetime
    size: int
    sequence: int


class BeforePoll(NamedTuple):
    """What a poll begins with: the account, and where journal and mailbox stand, as far as is known here.

    ``listed`` and ``quarantined`` are of the last listing, by which ``last_look``
    is; it is None where the mailbox must be listed anew. ``day_bytes`` were
    fetched on ``day`` (UTC).
    """

    account: Account
    head: JournalHead
    last_look: LastLook | None
    listed: int
    quarantined: int
    day: date | None = None
    day_bytes: int = 0


_KNOWN = (
    sighting.c.uidl,
    sighting.c.size,
    sighting.c.content,
    sighting.c.state,
    sighting.c.sha256,
    sighting.c.first_seen_at,
    sighting.c.attempts,
    sighting.c.retry_at,
    sighting.c.delete_attempts,
    sighting.c.delete_retry_at,
    sighting.c.delete_requested_at,
)


# Worded once: to put a statement together costs more than to run it for a few rows.
_ORDER = (sighting.c.uidl, sighting.c.size, sighting.c.content)
_OF_MAILBOX = (
    sighting.c.account_id == sa.bindparam("of_account"),
    sighting.c.epoch == sa.bindparam("of_epoch"),
)
_PRESENT = sa.select(*_KNOWN).where(*_OF_MAILBOX, sighting.c.absent_at.is_(None)).order_by(*_ORDER)
_FIRST_PRESENT = _PRESENT.limit(sa.literal_column(str(FETCH_ROWS)))
_ABSENT_QUARANTINED = sa.select(*_KNOWN).where(
    *_OF_MAILBOX, sighting.c.state == sa.literal_column("'quarantined'"), sighting.c.absent_at.is_not(None)
)


def _known(row: Any) -> tuple[SightingKey, Known]:
    *key, state, sha256, seen_at, attempts, retry_at, delete_attempts, delete_retry_at, requested_at = row
    requested = requested_at is not None
    known = Known(state, sha256, seen_at, attempts, retry_at, delete_attempts, delete_retry_at, requested)
    return SightingKey(*key), known


def before_poll(connection: Connection, account_id: str) -> BeforePoll:
    """All that a poll must know before it connects, in one query."""
    return before_polls(connection, [account_id])[account_id]


def before_polls(connection: Connection, account_ids: Sequence[str]) -> dict[str, BeforePoll]:
    """The same for many, by account's id."""
    rows = connection.execute(_of_before(connection.dialect.name), {"ids": account_ids})
    return {row.id: _before(row) for row in rows}


def account_of(row: Any) -> Account:
    """The account that a row with all of its columns is."""
    return Account(
        id=row.id,
        name=row.name,
        url=row.url,
        tls=row.tls,
        secret_reference=row.secret_reference,
        ca_file=row.ca_file,
        delete=DeletePolicy.parse(row.delete_policy),
        interval_seconds=row.interval_seconds,
        timeout_seconds=row.timeout_seconds,
        epoch=row.epoch,
        state=AccountState(row.state),
        state_reason=row.state_reason,
        tls_pins=tuple(row.tls_pins.split()),
        tls_minimum=row.tls_minimum,
        tls_server_name=row.tls_server_name,
        client_certificate=row.client_certificate,
        client_key=row.client_key,
        cron=row.cron,
        time_zone=row.time_zone,
        interval_max_seconds=row.interval_max_seconds,
        blackout=row.blackout,
        day_bytes=row.day_bytes,
        avoids=tuple(row.avoids.split()),
        deletion_suspended=row.deletion_suspended,
    )


def _before(row: Any) -> BeforePoll:
    last_look = None
    if row.trusted_until is not None:
        last_look = LastLook(row.stat_count, row.stat_size, row.last_number, row.last_uidl, row.trusted_until)
    return BeforePoll(
        account_of(row),
        JournalHead(row.sequence, row.digest),
        last_look,
        row.listed or 0,
        row.quarantined or 0,
        row.day,
        row.fetched_bytes or 0,
    )


@cache
def _of_before(dialect: str) -> sa.Select[Any]:
    return (
        sa.select(
            account,
            journal.c.sequence,
            journal.c.digest,
            mailbox.c.listed,
            mailbox.c.quarantined,
            mailbox.c.stat_count,
            mailbox.c.stat_size,
            mailbox.c.last_number,
            mailbox.c.last_uidl,
            mailbox.c.trusted_until,
            mailbox.c.day,
            mailbox.c.day_bytes.label("fetched_bytes"),
        )
        .join(journal, journal.c.account_id == account.c.id)
        # An older release, which may run beside this one, adds accounts without it.
        .outerjoin(mailbox, mailbox.c.account_id == account.c.id)
        .where(bulk.among(dialect, account.c.id, "ids"))
    )


def journal_head(connection: Connection, account_id: str) -> JournalHead:
    """Where the account's journal stands, as far as the database knows."""
    row = connection.execute(
        sa.select(journal.c.sequence, journal.c.digest).where(journal.c.account_id == account_id)
    ).one()
    return JournalHead(row.sequence, row.digest)


def present_sightings(
    connection: Connection,
    account_id: str,
    epoch: int,
    *,
    after: SightingKey | None = None,
) -> Iterator[tuple[SightingKey, Known]]:
    """What was on the server when it was listed last, in the order of its keys, from behind ``after`` on.

    The first of them come at once, and are all that a small mailbox has; to
    stream, as the rest is, takes PostgreSQL three statements. To be read within
    the transaction, one state for both. Octets compare as octets (memcmp) on
    both databases.
    """
    of_mailbox = {"of_account": account_id, "of_epoch": epoch}
    if after is None:
        first = connection.execute(_FIRST_PRESENT, of_mailbox).all()
        known = list(map(_known, first))
        yield from known
        if len(known) < FETCH_ROWS:
            return
        after = known[-1][0]
    rest = _PRESENT.where(sa.tuple_(*_ORDER) > sa.tuple_(*after)).execution_options(yield_per=FETCH_ROWS)
    yield from map(_known, connection.execute(rest, of_mailbox))


def is_any_present(connection: Connection, account_id: str, epoch: int, uidls: Sequence[bytes]) -> bool:
    """Whether one of these few UIDLs is that of a message that was on the server already."""
    query = sa.select(sighting.c.uidl).where(
        sighting.c.account_id == account_id,
        sighting.c.epoch == epoch,
        sighting.c.uidl.in_(uidls),
        sighting.c.absent_at.is_(None),
    )
    return connection.execute(query.limit(1)).first() is not None


def absent_quarantined(connection: Connection, account_id: str, epoch: int) -> dict[SightingKey, Known]:
    """What was set aside and is not shown any more: if it comes back, it is tried no sooner for that."""
    rows = connection.execute(_ABSENT_QUARANTINED, {"of_account": account_id, "of_epoch": epoch})
    return dict(map(_known, rows))


def provable(
    connection: Connection, account_id: str, epoch: int, uidls: Sequence[bytes]
) -> dict[SightingKey, Provable]:
    """The capture behind each present sighting that has one of these UIDLs for itself."""
    dialect = connection.dialect.name
    found = connection.execute(
        _captured(dialect), {"b_account_id": account_id, "b_epoch": epoch, "uidls": uidls}
    ).all()
    digests = list({row.sha256 for row in found})
    behind = {row.sha256: Provable(*row) for row in _captures_of(connection, account_id, digests)}
    return {SightingKey(row.uidl, row.size): behind[row.sha256] for row in found if row.sha256 in behind}


def captured_contents(
    connection: Connection, account_id: str, digests: Sequence[bytes]
) -> dict[bytes, CapturedContent]:
    """Which of these contents the account has captured already."""
    rows = _captures_of(connection, account_id, digests)
    return {row.sha256: CapturedContent(row.captured_at, row.size) for row in rows}


@cache
def _captured(dialect: str) -> sa.Select[Any]:
    present = sa.select(sighting.c.uidl, sighting.c.size, sighting.c.sha256).where(
        sighting.c.account_id == sa.bindparam("b_account_id"),
        sighting.c.epoch == sa.bindparam("b_epoch"),
        sighting.c.content == b"",
        sighting.c.state == "captured",
        sighting.c.absent_at.is_(None),
    )
    return bulk.look_up(dialect, present, sighting.c.uidl, "uidls")


def _captures_of(connection: Connection, account_id: str, digests: Sequence[bytes]) -> Iterable[Any]:
    statement = _by_digest(connection.dialect.name)
    return connection.execute(statement, {"b_account_id": account_id, "digests": digests})


@cache
def _by_digest(dialect: str) -> sa.Select[Any]:
    of_account = sa.select(capture.c.sha256, capture.c.captured_at, capture.c.size, capture.c.sequence).where(
        capture.c.account_id == sa.bindparam("b_account_id")
    )
    return bulk.look_up(dialect, of_account, capture.c.sha256, "digests")


def captures(
    connection: Connection, *, account_id: str | None = None, limit: int | None = None, newest: bool = False
) -> Iterator[Any]:
    """Captures with the name of their account, in the order of capture, streamed."""
    order = (capture.c.captured_at, capture.c.account_id, capture.c.sha256)
    query = sa.select(capture, account.c.name.label("account_name")).join(
        account, account.c.id == capture.c.account_id
    )
    if account_id is not None:
        query = query.where(capture.c.account_id == account_id)
    query = query.order_by(*((column.desc() for column in order) if newest else order)).limit(limit)
    yield from connection.execution_options(yield_per=FETCH_ROWS).execute(query)


def find_captures(
    connection: Connection, *, sha256_from: bytes, sha256_to: bytes, account_id: str | None
) -> list[Any]:
    """Captures whose digest lies in this range, both ends included; a few are enough to tell ambiguity."""
    query = (
        sa.select(capture, account.c.name.label("account_name"))
        .join(account, account.c.id == capture.c.account_id)
        .where(capture.c.sha256 >= sha256_from, capture.c.sha256 <= sha256_to)
        .limit(3)
    )
    if account_id is not None:
        query = query.where(capture.c.account_id == account_id)
    elif connection.dialect.name == "sqlite":
        query = query.where(capture.c.account_id.in_(sa.select(account.c.id)))
    return list(connection.execute(query))


def capture_digests(connection: Connection, account_id: str) -> Iterator[bytes]:
    """The digest of every capture of an account, sorted and streamed."""
    rows = connection.execution_options(yield_per=FETCH_ROWS).execute(
        sa.select(capture.c.sha256).where(capture.c.account_id == account_id).order_by(capture.c.sha256)
    )
    return (row.sha256 for row in rows)


def counted(connection: Connection, account_id: str) -> tuple[int, int]:
    """How many captures an account has, and their bytes, as they were counted one by one."""
    row = connection.execute(
        sa.select(mailbox.c.captures, mailbox.c.captured_bytes).where(mailbox.c.account_id == account_id)
    ).one()
    return int(row.captures), int(row.captured_bytes)


def count_again(connection: Connection, account_id: str) -> tuple[int, int]:
    """The same, from the captures themselves: as slow as there are many."""
    row = connection.execute(
        sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(capture.c.size), 0)).where(
            capture.c.account_id == account_id
        )
    ).one()
    return int(row[0]), int(row[1])


def quarantined(connection: Connection, account_id: str) -> list[Any]:
    """The messages of an account that are set aside, with reason and next try; also those gone since."""
    return list(
        connection.execute(
            sa.select(sighting)
            .where(sighting.c.account_id == account_id, sighting.c.state == "quarantined")
            .order_by(sighting.c.first_seen_at)
        )
    )


def polls(connection: Connection, account_id: str, limit: int) -> list[Any]:
    """The last polls of an account, the newest first."""
    return list(
        connection.execute(
            sa.select(poll).where(poll.c.account_id == account_id).order_by(poll.c.token.desc()).limit(limit)
        )
    )


def account_states(connection: Connection, account_ids: Sequence[str] | None = None) -> list[Any]:
    """Each account with its schedule, its archive, its mailbox and its last poll, ordered by name.

    ``listed``, ``to_come`` and ``quarantined`` are of the last listing;
    ``outcome``, ``error`` and ``ended_at`` of the last poll of all.
    """
    query = _states().order_by(account.c.name)
    if account_ids is not None:
        query = query.where(account.c.id.in_(account_ids))
    return list(connection.execute(query))


def need_attention(
    connection: Connection, now: datetime, *, lost: Sequence[str], limit: int | None
) -> list[Any]:
    """The accounts that somebody should look at, the worst first; rows as of ``account_states``.

    Those that lost messages (``lost`` names them) come first, then what waits
    for an operator, fails, deletes nothing, has messages in quarantine, was not
    looked into; last what was paused by hand.
    """
    troubles = [account.c.id.in_(lost), *_troubles(now)]
    worst = sa.case(*((wanted, number) for number, wanted in enumerate(troubles)), else_=None)
    query = _states().where(account.c.removed_at.is_(None), worst.is_not(None))
    return list(connection.execute(query.order_by(worst, account.c.name).limit(limit)))


def added_at(connection: Connection, account_id: str) -> datetime:
    """When an account was added first."""
    at: datetime = connection.execute(
        sa.select(account.c.created_at).where(account.c.id == account_id)
    ).scalar_one()
    return at


def failing_hosts(connection: Connection, limit: int | None) -> list[Any]:
    """Mail hosts in trouble, the longest first."""
    return list(connection.execute(sa.select(host).order_by(host.c.failing_since, host.c.name).limit(limit)))


def _states() -> sa.Select[Any]:
    # The newest poll by the end of its account's part of the key, not by a look at all of them.
    newest = poll.alias("newest")
    token = (
        sa.select(sa.func.max(newest.c.token)).where(newest.c.account_id == account.c.id).scalar_subquery()
    )
    return (
        sa.select(
            account,
            lease.c.due_at,
            lease.c.owner,
            lease.c.failures,
            lease.c.refusals,
            lease.c.looked_at,
            lease.c.late_at,
            mailbox.c.captures,
            mailbox.c.captured_bytes,
            mailbox.c.listed_at,
            mailbox.c.listed,
            mailbox.c.quarantined,
            mailbox.c.to_come,
            poll.c.outcome,
            poll.c.error,
            poll.c.ended_at,
        )
        .join(lease, lease.c.account_id == account.c.id)
        .join(mailbox, mailbox.c.account_id == account.c.id)
        .outerjoin(poll, sa.and_(poll.c.account_id == account.c.id, poll.c.token == token))
    )


_PAUSED = account.c.state != AccountState.ACTIVE
_FAILING = sa.and_(~_PAUSED, lease.c.failures + lease.c.refusals > 0)


def _troubles(now: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        account.c.state == AccountState.WAITING,
        _FAILING,
        account.c.deletion_suspended.is_not(None),
        mailbox.c.quarantined > 0,
        lease.c.late_at < now,
        _PAUSED,
    )


def events(connection: Connection, *, after: int, limit: int) -> list[Any]:
    """The feed behind a position, in order."""
    return list(
        connection.execute(
            sa.select(event).where(event.c.position > after).order_by(event.c.position).limit(limit)
        )
    )


class Overview(NamedTuple):
    """How all accounts stand together: accounts by state, messages, and what somebody should look at.

    ``waiting`` are paused for an operator's sake, ``deletion_suspended`` delete nothing until
    somebody has looked, into ``late`` nobody has looked for longer than
    planned, and ``concerned`` are all of any trouble; ``hosts`` are mail hosts
    in trouble. ``overdue_seconds`` is of the account that waits longest.
    """

    accounts: dict[str, int]
    quarantined: int
    overdue_seconds: float
    captures: int = 0
    captured_bytes: int = 0
    to_come: int = 0
    never_polled: int = 0
    waiting: int = 0
    deletion_suspended: int = 0
    late: int = 0
    hosts: int = 0
    concerned: int = 0


def overview(connection: Connection, now: datetime) -> Overview:
    """How all accounts stand together, in one pass over their narrow rows: nothing counts messages.

    What removed accounts captured is part of the archive; all else is of the others.
    """
    active = account.c.removed_at.is_(None)
    waiting, failing, suspended, _, late, paused = _troubles(now)

    def number(*wanted: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.count().filter(active, *wanted)

    row = connection.execute(
        sa.select(
            number().label("all"),
            number(paused).label("paused"),
            number(failing).label("failing"),
            number(waiting).label("waiting"),
            number(suspended).label("deletion_suspended"),
            number(late).label("late"),
            number(sa.or_(*_troubles(now))).label("concerned"),
            number(lease.c.token == 0).label("never_polled"),
            sa.func.coalesce(sa.func.sum(mailbox.c.captures), 0).label("captures"),
            sa.func.coalesce(sa.func.sum(mailbox.c.captured_bytes), 0).label("captured_bytes"),
            sa.func.coalesce(sa.func.sum(mailbox.c.to_come).filter(active), 0).label("to_come"),
            sa.func.coalesce(sa.func.sum(mailbox.c.quarantined).filter(active), 0).label("quarantined"),
            sa.func.min(lease.c.due_at).filter(active).label("due_at"),
        )
        .select_from(account)
        .join(lease, lease.c.account_id == account.c.id)
        .join(mailbox, mailbox.c.account_id == account.c.id)
    ).one()
    return Overview(
        accounts={
            "ok": row.all - row.paused - row.failing,
            "failing": row.failing,
            "paused": row.paused,
        },
        quarantined=int(row.quarantined),
        overdue_seconds=0.0 if row.due_at is None else max(0.0, (now - row.due_at).total_seconds()),
        captures=int(row.captures),
        captured_bytes=int(row.captured_bytes),
        to_come=int(row.to_come),
        never_polled=row.never_polled,
        waiting=row.waiting,
        deletion_suspended=row.deletion_suspended,
        late=row.late,
        concerned=row.concerned,
        hosts=connection.execute(sa.select(sa.func.count()).select_from(host)).scalar_one(),
    )

"""The history of polls: days that add up, gaps in which no poll saw a mailbox, and the removal of old polls.

Owns ``poll_day``, ``gap`` and the removal of rows of ``poll``. Days are UTC: once its
polls are removed, a day cannot be recalculated for another time zone. Every poll
counts in exactly one day. Polls up to ``mailbox.counted`` were added to ``poll_day``
in the transaction that moved that mark, and later ones are added in each query.
Only polls that were added are removed, and each account keeps its newest poll,
however old.

One number is enough as a mark: each poll passes the fence, so an account's rows
are written in the order of their tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from archiver.db import Database
from archiver.db.tables import account, gap, lease, mailbox, poll, poll_day
from archiver.model import Counts

TIDY_LOCK = 0x74696479
"""The advisory lock by which one process at a time tidies up: "tidy" in ASCII."""


class Bounds(NamedTuple):
    """How much one transaction adds up or removes, in a fraction of a second: no poll waits for long."""

    accounts: int = 500
    polls: int = 2_000


BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Day:
    """An account's day, or that of many accounts together.

    ``listed``, ``archived``, ``quarantined`` and ``to_come`` describe the last
    listing, at the end of its poll: the last three add up to ``listed``. Without a
    listing they have no value. ``looks`` counts the polls that saw the mailbox.
    """

    day: date
    polls: int = 0
    failed: int = 0
    looks: int = 0
    listed: int | None = None
    new: int = 0
    archived: int | None = None
    quarantined: int | None = None
    to_come: int | None = None
    delete_requested: int = 0
    deleted: int = 0
    gone: int = 0
    lost: int = 0
    fetched_bytes: int = 0
    seconds: float = 0.0
    first_look_at: datetime | None = None
    last_look_at: datetime | None = None

    def then(self, later: "Day") -> "Day":
        """This part of a day and the next one, together."""
        seen = self if later.listed is None else later
        return replace(
            self,
            **{name: getattr(self, name) + getattr(later, name) for name in _SUMS},
            **{name: getattr(seen, name) for name in _STATES},
            first_look_at=self.first_look_at or later.first_look_at,
            last_look_at=later.last_look_at or self.last_look_at,
        )


_STATES = ("listed", "archived", "quarantined", "to_come")
FLOWS = tuple(name for name in Counts.names() if name not in ("known", "quarantined"))
"""The counts of polls that add up to a day's. ``known`` and ``quarantined`` describe one listing."""

_SUMS = ("polls", "failed", "looks", *FLOWS, "seconds")


class Gap(NamedTuple):
    """A time in which no poll saw a mailbox. While it lasts, it has no ``until``."""

    since: datetime
    until: datetime | None


class Tidied(NamedTuple):
    """The result of tidying up. It is not ``whole`` if another process is at it, or if it was stopped."""

    counted: int
    removed: int
    whole: bool


# Written by polls.


def gap_ended(connection: Connection, account_id: str, at: datetime) -> None:
    """Record that a poll saw a mailbox again, after too long a time. Call it within the fence."""
    connection.execute(
        _dialect_insert(connection, gap)
        .from_select(
            ["account_id", "began_at", "ended_at"],
            sa.select(lease.c.account_id, _looked_at(), sa.bindparam("b_at", at, type_=gap.c.ended_at.type))
            .join(account, account.c.id == lease.c.account_id)
            .where(lease.c.account_id == account_id),
        )
        .on_conflict_do_nothing()
    )


# Queries.


def days(connection: Connection, account_id: str, first: date, last: date) -> list[Day]:
    """Each day of an account from ``first`` to ``last``, inclusive. Days without a poll are empty."""
    found = {row.day: _of_row(row) for row in connection.execute(_stored(first, last, account_id))}
    for part in _added_up(connection.execute(_uncounted(first, last, account_id))).values():
        for one in part:
            found[one.day] = found[one.day].then(one) if one.day in found else one
    return _every_day(found, first, last)


def days_of_all(connection: Connection, first: date, last: date) -> list[Day]:
    """Each day of all accounts together. ``listed`` and its parts add up the accounts' last listings."""
    fresh = _fresh(connection, first, last).cte("fresh")
    shown = _last_listings(fresh).cte("shown")
    stored = sa.and_(poll_day.c.day >= first, poll_day.c.day <= last)
    flows = sa.union_all(
        sa.select(poll_day.c.day, *(poll_day.c[name] for name in (*_SUMS, *_LOOKS))).where(stored),
        sa.select(fresh.c.day, *(fresh.c[name] for name in (*_SUMS, *_LOOKS))),
    ).subquery()
    # An account's later listing replaces the one in its stored day. The account's key
    # finds it; otherwise SQLite would compare all rows with all.
    later = sa.exists().where(
        mailbox.c.account_id == poll_day.c.account_id,
        poll.c.account_id == poll_day.c.account_id,
        poll.c.token > mailbox.c.counted,
        poll.c.listed.is_not(None),
        _day(connection) == poll_day.c.day,
    )
    states = sa.union_all(
        sa.select(poll_day.c.day, *(poll_day.c[name] for name in _STATES)).where(stored, ~later),
        sa.select(shown.c.day, *(shown.c[name] for name in _STATES)),
    ).subquery()
    found: dict[date, Day] = {}
    for row in connection.execute(
        sa.select(
            flows.c.day,
            *(sa.func.sum(flows.c[name]).label(name) for name in _SUMS),
            sa.func.min(flows.c.first_look_at).label("first_look_at"),
            sa.func.max(flows.c.last_look_at).label("last_look_at"),
        ).group_by(flows.c.day)
    ):
        found[row.day] = _of_row(row)
    for row in connection.execute(
        sa.select(states.c.day, *(sa.func.sum(states.c[name]).label(name) for name in _STATES)).group_by(
            states.c.day
        )
    ):
        found[row.day] = replace(found[row.day], **{name: _whole(getattr(row, name)) for name in _STATES})
    return _every_day(found, first, last)


def gaps(connection: Connection, account_id: str, since: datetime, now: datetime) -> list[Gap]:
    """The gaps of a mailbox from ``since`` on, in order. The one that still lasts comes last."""
    found = [
        Gap(row.began_at, row.ended_at)
        for row in connection.execute(
            sa.select(gap.c.began_at, gap.c.ended_at)
            .where(gap.c.account_id == account_id, gap.c.ended_at > since)
            .order_by(gap.c.began_at)
        )
    ]
    open_since = connection.execute(
        sa.select(_looked_at())
        .select_from(lease)
        .join(account, account.c.id == lease.c.account_id)
        .where(lease.c.account_id == account_id, lease.c.late_at < now, account.c.removed_at.is_(None))
    ).scalar()
    return found if open_since is None else [*found, Gap(open_since, None)]


def _looked_at() -> sa.ColumnElement[datetime]:
    """When a poll saw the mailbox last. Before the first poll, when the account was added."""
    return sa.func.coalesce(lease.c.looked_at, account.c.created_at, type_=gap.c.began_at.type)


def gap_seconds(found: Iterable[Gap], day: date, now: datetime) -> float:
    """How long the gaps were on that day."""
    begins, ends = begin(day), begin(day + timedelta(days=1))
    return sum(
        max(0.0, (min(ends, one.until or now) - max(begins, one.since)).total_seconds()) for one in found
    )


def ended_gaps(connection: Connection, since: datetime) -> int:
    """How many gaps of all accounts ended since then."""
    return connection.execute(
        sa.select(sa.func.count()).select_from(gap).where(gap.c.ended_at > since)
    ).scalar_one()


def losses(connection: Connection, first: date) -> dict[str, int]:
    """Messages that each account lost since that day, by account id. Accounts without losses are absent."""
    found: dict[str, int] = {}
    for query in (
        sa.select(poll_day.c.account_id, sa.func.sum(poll_day.c.lost))
        .where(poll_day.c.lost > 0, poll_day.c.day >= first)
        .group_by(poll_day.c.account_id),
        sa.select(poll.c.account_id, sa.func.sum(poll.c.lost))
        .join(mailbox, mailbox.c.account_id == poll.c.account_id)
        .where(poll.c.lost > 0, poll.c.ended_at >= begin(first), poll.c.token > mailbox.c.counted)
        .group_by(poll.c.account_id),
    ):
        for account_id, lost in connection.execute(query):
            found[account_id] = found.get(account_id, 0) + int(lost)
    return found


def lost(connection: Connection, account_id: str) -> int:
    """How many messages of an account disappeared before they were archived, ever."""
    stored = sa.select(sa.func.sum(poll_day.c.lost)).where(poll_day.c.account_id == account_id)
    fresh = (
        sa.select(sa.func.sum(poll.c.lost))
        .join(mailbox, mailbox.c.account_id == poll.c.account_id)
        .where(poll.c.account_id == account_id, poll.c.token > mailbox.c.counted)
    )
    return sum(int(connection.execute(query).scalar() or 0) for query in (stored, fresh))


# Housekeeping.


def tidy(
    database: Database,
    *,
    now: datetime,
    keep_days: int,
    stopping: Callable[[], bool] = lambda: False,
    bounds: Bounds = BOUNDS,
) -> Tidied:
    """Add all polls to their days, then remove polls that are older than ``keep_days``.

    It works in transactions of bounded size, and none of them changes what a day
    shows. If several processes do this at once, one works. It may be stopped or
    killed anywhere, and repeated.
    """
    counted = removed = 0
    after: str | None = ""
    while after is not None:
        number, after = database.transact(partial(add_up, after=after, bounds=bounds))
        if number is None or stopping():
            return Tidied(counted + (number or 0), removed, whole=False)
        counted += number
    before = begin(now.astimezone(UTC).date() - timedelta(days=keep_days))
    since: datetime | None = datetime.min.replace(tzinfo=UTC)
    while since is not None:
        step = partial(remove_ended, since=since, before=before, at_once=bounds.polls)
        number, since = database.transact(step)
        if number is None or stopping():
            return Tidied(counted, removed + (number or 0), whole=False)
        removed += number
    return Tidied(counted, removed, whole=True)


def add_up(connection: Connection, after: str, bounds: Bounds) -> tuple[int | None, str | None]:
    """Add the next accounts' polls to their days. Returns their number, and where to continue, if at all."""
    if not _is_ours(connection):
        return None, None
    found = connection.execute(
        sa.select(mailbox.c.account_id)
        .where(mailbox.c.account_id > after)
        .order_by(mailbox.c.account_id)
        .limit(bounds.accounts)
        # An account whose poll ends at this moment is counted next time.
        .with_for_update(skip_locked=True)
    ).scalars()
    these = list(found)
    if not these:
        return 0, None
    rows = connection.execute(
        sa.select(poll)
        .join(mailbox, mailbox.c.account_id == poll.c.account_id)
        .where(
            poll.c.account_id.in_(these),
            # The condition is on both tables. Otherwise all mailboxes are read for the sake of a few.
            mailbox.c.account_id.in_(these),
            poll.c.token > mailbox.c.counted,
        )
        .order_by(poll.c.account_id, poll.c.token)
        .limit(bounds.polls)
    ).all()
    if rows:
        added = _added_up(rows)
        _add(connection, added)
        connection.execute(
            sa.update(mailbox)
            .where(mailbox.c.account_id == sa.bindparam("b_account_id"))
            .values(counted=sa.bindparam("b_counted")),
            # The last row of an account has its highest token.
            [{"b_account_id": row.account_id, "b_counted": row.token} for row in _lasts(rows)],
        )
    if len(rows) < bounds.polls:
        return len(rows), max(these)
    # The last account may have more polls. It is the first of the next batch.
    before = [account_id for account_id in these if account_id < rows[-1].account_id]
    return len(rows), max(before, default=after)


def remove_ended(
    connection: Connection, since: datetime, before: datetime, at_once: int
) -> tuple[int | None, datetime | None]:
    """Remove the polls that ended after ``since``. Returns their number, and where to continue, if at all."""
    if not _is_ours(connection):
        return None, None
    ended = sa.and_(poll.c.ended_at > since, poll.c.ended_at < before)
    upto = connection.execute(
        sa.select(poll.c.ended_at).where(ended).order_by(poll.c.ended_at).limit(1).offset(at_once - 1)
    ).scalar()
    newer = poll.alias("newer")
    marked = sa.select(mailbox.c.counted).where(mailbox.c.account_id == poll.c.account_id).scalar_subquery()
    removed = connection.execute(
        sa.delete(poll).where(
            ended,
            sa.true() if upto is None else poll.c.ended_at <= upto,
            poll.c.token <= marked,
            sa.exists().where(newer.c.account_id == poll.c.account_id, newer.c.token > poll.c.token),
        )
    ).rowcount
    return removed, upto


def _is_ours(connection: Connection) -> bool:
    """Whether it is this transaction's turn to tidy up. SQLite has one writer anyway."""
    if connection.dialect.name != "postgresql":
        return True
    return bool(connection.execute(sa.select(sa.func.pg_try_advisory_xact_lock(TIDY_LOCK))).scalar())


def _add(connection: Connection, added: Mapping[str, Sequence[Day]]) -> None:
    statement = _dialect_insert(connection, poll_day)
    new, old = statement.excluded, poll_day.c
    seen = {name: sa.case((new.listed.is_(None), old[name]), else_=new[name]) for name in _STATES}
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["account_id", "day"],
            set_={
                **{name: old[name] + new[name] for name in _SUMS},
                **seen,
                "first_look_at": sa.func.coalesce(old.first_look_at, new.first_look_at),
                "last_look_at": sa.func.coalesce(new.last_look_at, old.last_look_at),
            },
        ),
        [
            {"account_id": account_id, **{name: getattr(one, name) for name in _COLUMNS}}
            for account_id, parts in added.items()
            for one in parts
        ],
    )


# Arithmetic.

_LOOKS = ("first_look_at", "last_look_at")
_COLUMNS = ("day", *_SUMS, *_STATES, *_LOOKS)


def of_poll(row: Any) -> Day:
    """A poll as a part of its day. A pure function."""
    saw, counts = row.listed is not None, Counts.of(row)
    return Day(
        day=row.ended_at.astimezone(UTC).date(),
        polls=1,
        failed=int(row.outcome != "ok"),
        looks=int(saw),
        listed=row.listed,
        archived=counts.new + counts.known if saw else None,
        quarantined=counts.quarantined if saw else None,
        to_come=row.to_come,
        **{name: getattr(counts, name) for name in FLOWS},
        seconds=row.seconds,
        first_look_at=row.ended_at if saw else None,
        last_look_at=row.ended_at if saw else None,
    )


def _added_up(rows: Iterable[Any]) -> dict[str, list[Day]]:
    """The days of each account, from its polls in order."""
    found: dict[str, dict[date, Day]] = {}
    for row in rows:
        one = of_poll(row)
        of_account = found.setdefault(row.account_id, {})
        of_account[one.day] = of_account[one.day].then(one) if one.day in of_account else one
    return {account_id: list(of_account.values()) for account_id, of_account in found.items()}


def _lasts(rows: Sequence[Any]) -> list[Any]:
    return list({row.account_id: row for row in rows}.values())


def _every_day(found: Mapping[date, Day], first: date, last: date) -> list[Day]:
    number = (last - first).days + 1
    every = (first + timedelta(days=index) for index in range(number))
    return [found.get(day, Day(day)) for day in every]


def _of_row(row: Any) -> Day:
    values = row._mapping
    return Day(
        day=row.day,
        **{name: _whole(values[name]) for name in _SUMS if name != "seconds"},
        seconds=float(values["seconds"]),
        **{name: values.get(name) for name in (*_STATES, *_LOOKS)},
    )


def _whole(value: Any) -> Any:
    # On PostgreSQL, a sum of integers is numeric.
    return None if value is None else int(value)


def begin(day: date) -> datetime:
    """When a day begins."""
    return datetime.combine(day, time(), UTC)


def _stored(first: date, last: date, account_id: str) -> sa.Select[Any]:
    return sa.select(poll_day).where(
        poll_day.c.account_id == account_id, poll_day.c.day >= first, poll_day.c.day <= last
    )


def _in_days(first: date, last: date) -> sa.ColumnElement[bool]:
    """A condition for polls of these days that are not in a stored day yet."""
    return sa.and_(
        poll.c.token > mailbox.c.counted,
        poll.c.ended_at >= begin(first),
        poll.c.ended_at < begin(last + timedelta(days=1)),
    )


def _uncounted(first: date, last: date, account_id: str) -> sa.Select[Any]:
    return (
        sa.select(poll)
        .join(mailbox, mailbox.c.account_id == poll.c.account_id)
        .where(poll.c.account_id == account_id, _in_days(first, last))
        .order_by(poll.c.token)
    )


def _fresh(connection: Connection, first: date, last: date) -> sa.Select[Any]:
    """The same for all accounts, added up by account and day in the database."""
    day = _day(connection).label("day")
    saw = poll.c.listed.is_not(None)
    counts = {
        "polls": sa.func.count(),
        "failed": sa.func.count().filter(poll.c.outcome != "ok"),
        "looks": sa.func.count().filter(saw),
    }
    sums = {name: sa.func.sum(poll.c[name]) for name in _SUMS if name not in counts}
    return (
        sa.select(
            poll.c.account_id,
            day,
            *(column.label(name) for name, column in (counts | sums).items()),
            sa.func.min(poll.c.ended_at).filter(saw).label("first_look_at"),
            sa.func.max(poll.c.ended_at).filter(saw).label("last_look_at"),
            sa.func.max(poll.c.token).filter(saw).label("last_token"),
        )
        .join(mailbox, mailbox.c.account_id == poll.c.account_id)
        .where(_in_days(first, last))
        .group_by(poll.c.account_id, day)
    )


def _last_listings(fresh: sa.CTE) -> sa.Select[Any]:
    return sa.select(
        fresh.c.account_id,
        fresh.c.day,
        poll.c.listed,
        (poll.c.new + poll.c.known).label("archived"),
        poll.c.quarantined,
        poll.c.to_come,
    ).join(poll, sa.and_(poll.c.account_id == fresh.c.account_id, poll.c.token == fresh.c.last_token))


def _day(connection: Connection) -> sa.ColumnElement[date]:
    if connection.dialect.name == "sqlite":
        return sa.func.date(poll.c.ended_at, type_=sa.Date())
    return sa.cast(sa.func.timezone("UTC", poll.c.ended_at), sa.Date())


def _dialect_insert(connection: Connection, into: sa.Table) -> Any:
    # ON CONFLICT is spelled the same in both dialects, but SQLAlchemy has two constructs.
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(into)

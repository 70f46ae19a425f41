"""Captures: what the database knows of the messages in the archive."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import bulk
from archiver.db.bulk import FETCH_ROWS
from archiver.db.tables import account, capture, mailbox


class Capture(NamedTuple):
    """One account's custody of one message, as ``archiver message`` shows it."""

    account_name: str
    account_id: str
    sha256: bytes
    size: int
    epoch: int
    uidl: bytes
    captured_at: datetime
    version_id: str | None
    token: int
    sequence: int


_CAPTURES: sa.Select[Any] = sa.select(
    account.c.name,
    capture.c.account_id,
    capture.c.sha256,
    capture.c.size,
    capture.c.epoch,
    capture.c.uidl,
    capture.c.captured_at,
    capture.c.version_id,
    capture.c.token,
    capture.c.sequence,
).join(account, account.c.id == capture.c.account_id)


class CapturedContent(NamedTuple):
    """When a content was captured, and its size."""

    captured_at: datetime
    size: int


def contents(
    connection: Connection, account_id: str, digests: Sequence[bytes]
) -> dict[bytes, CapturedContent]:
    """Which of these contents the account has captured already."""
    rows = by_digest(connection, account_id, digests)
    return {row.sha256: CapturedContent(row.captured_at, row.size) for row in rows}


class Provable(NamedTuple):
    """A capture, and the journal segment that names it."""

    sha256: bytes
    captured_at: datetime
    size: int
    sequence: int


def by_digest(connection: Connection, account_id: str, digests: Sequence[bytes]) -> Iterator[Provable]:
    """The account's captures with these digests."""
    found = connection.execute(
        _by_digest(connection.dialect.name), {"b_account_id": account_id, "digests": digests}
    )
    return (Provable(*row) for row in found)


@cache
def _by_digest(dialect: str) -> sa.Select[Any]:
    of_account = sa.select(capture.c.sha256, capture.c.captured_at, capture.c.size, capture.c.sequence).where(
        capture.c.account_id == sa.bindparam("b_account_id")
    )
    return bulk.look_up(dialect, of_account, capture.c.sha256, "digests")


def listed(
    connection: Connection, *, account_id: str | None = None, limit: int | None = None, newest: bool = False
) -> Iterator[Capture]:
    """Captures in the order in which they were made, or the newest first, streamed."""
    order = (capture.c.captured_at, capture.c.account_id, capture.c.sha256)
    query = _CAPTURES
    if account_id is not None:
        query = query.where(capture.c.account_id == account_id)
    query = query.order_by(*((column.desc() for column in order) if newest else order)).limit(limit)
    for row in connection.execution_options(yield_per=FETCH_ROWS).execute(query):
        yield Capture(*row)


def find(
    connection: Connection, *, sha256_from: bytes, sha256_to: bytes, account_id: str | None
) -> list[Capture]:
    """Captures whose digest is in this range, ends included: at most three, enough to see an ambiguity."""
    query = _CAPTURES.where(capture.c.sha256 >= sha256_from, capture.c.sha256 <= sha256_to).limit(3)
    if account_id is not None:
        query = query.where(capture.c.account_id == account_id)
    elif connection.dialect.name == "sqlite":
        query = query.where(capture.c.account_id.in_(sa.select(account.c.id)))
    return [Capture(*row) for row in connection.execute(query)]


def digests(connection: Connection, account_id: str) -> Iterator[bytes]:
    """The digest of every capture of an account, sorted and streamed."""
    rows = connection.execution_options(yield_per=FETCH_ROWS).execute(
        sa.select(capture.c.sha256).where(capture.c.account_id == account_id).order_by(capture.c.sha256)
    )
    return (row.sha256 for row in rows)


def counted(connection: Connection, account_id: str) -> tuple[int, int]:
    """An account's captures and their bytes, as counted while they were recorded."""
    row = connection.execute(
        sa.select(mailbox.c.captures, mailbox.c.captured_bytes).where(mailbox.c.account_id == account_id)
    ).one()
    return int(row.captures), int(row.captured_bytes)


def count(connection: Connection, account_id: str) -> tuple[int, int]:
    """The same, from the captures themselves. Slow in proportion to their number."""
    row = connection.execute(
        sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(capture.c.size), 0)).where(
            capture.c.account_id == account_id
        )
    ).one()
    return int(row[0]), int(row[1])

"""What a poll begins with: its account, its journal's head, what its mailbox looked like."""

from collections.abc import Sequence
from datetime import date
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import bulk
from archiver.db.account_columns import account_of
from archiver.db.tables import account, journal, mailbox
from archiver.model import Account, JournalHead, LastLook


class BeforePoll(NamedTuple):
    """What the database knows of an account when a poll of it begins."""

    account: Account
    head: JournalHead
    """The last journal segment that the database has."""
    last_look: LastLook | None
    """What the mailbox looked like at the last listing; None when the mailbox must be listed."""
    listed: int
    """Messages in the last listing."""
    quarantined: int
    """Those of them that were in quarantine."""
    day: date | None = None
    day_bytes: int = 0
    """Bytes fetched on ``day`` (UTC)."""


def before_poll(connection: Connection, account_id: str) -> BeforePoll:
    """All that a poll must know before it connects, in one query."""
    return before_polls(connection, [account_id])[account_id]


def before_polls(connection: Connection, account_ids: Sequence[str]) -> dict[str, BeforePoll]:
    """The same for many, by account's id."""
    rows = connection.execute(_of_before(connection.dialect.name), {"ids": account_ids})
    return {row.id: _before(row) for row in rows}


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

"""Accounts: added, changed, found, removed. Few rows, so this speaks the ORM."""

from dataclasses import replace
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlmodel import Session, select

from archiver.db import requests, schedule
from archiver.db.account_columns import account_of, columns_of, settings_of
from archiver.db.tables import AccountRow, JournalRow, LeaseRow, MailboxRow, account
from archiver.errors import UsageError
from archiver.model import NO_DIGEST, Account, mail_host
from archiver.policy import late_after_seconds
from archiver.states import AccountState
from archiver.timetable import Timetable

ACCOUNTS_LOCK = 0x61636374
"""The advisory lock of a process that adds many accounts: "acct" in ASCII."""


def wait_for_others(connection: Connection) -> None:
    """Wait for the commit of another process that adds accounts, and see what it added from here on.

    For processes that start together and add the same accounts. SQLite has one
    writer anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ACCOUNTS_LOCK)))


def add(connection: Connection, new: Account, at: datetime) -> Account:
    """Add an account, due now or as its cron expression says, and return it as it is stored.

    A removed account comes back, with the id of its archive, when name and URL are
    the same. Raises UsageError when the name or the URL is taken; but not when ``new``
    itself is there already, by a transaction whose answer was lost.
    """
    with Session(bind=connection) as session:
        row = session.exec(select(AccountRow).where(AccountRow.name == new.name)).first()
        if row is not None and row.removed_at is None and row.id == new.id:
            return new
        if row is not None and (row.removed_at is None or row.url != new.url):
            was = "is" if row.removed_at is None else "was"
            raise UsageError(
                f"there {was} an account named {new.name} already, for {row.url}", hint="choose another name"
            )
        if row is not None:
            again = replace(new, id=row.id, epoch=row.epoch)
            change(connection, again, at)
            connection.execute(sa.update(account).where(account.c.id == again.id).values(removed_at=None))
            schedule.resume(connection, again.id)
            schedule.reconsider(connection, again.id, again.url, _first_due(again, at))
            return again
        _refuse_second(connection, new)
        session.add(AccountRow(created_at=at, **columns_of(new)))
        session.flush()
        late_at = at + timedelta(seconds=late_after_seconds(None))
        session.add(LeaseRow(account_id=new.id, due_at=None, host=mail_host(new.url), late_at=late_at))
        session.add(MailboxRow(account_id=new.id))
        session.add(JournalRow(account_id=new.id, sequence=0, digest=NO_DIGEST, written_at=at))
        session.flush()
    schedule.resume(connection, new.id)
    if new.cron is not None:
        schedule.reconsider(connection, new.id, new.url, _first_due(new, at))
    return new


def change(connection: Connection, changed: Account, at: datetime, *, former: Account | None = None) -> None:
    """Give an account other settings. Its id, and so its objects and its journal, stays.

    Of ``former``, from which ``changed`` was made, what is equal is left as it
    is: a poll may have written there since. The account is due at once, or as
    its cron expression says. Raises UsageError when another account has the URL.
    """
    _refuse_second(connection, changed)
    before = {} if former is None else settings_of(former)
    values = dict(settings_of(changed).items() - before.items())
    if values:
        connection.execute(sa.update(account).where(account.c.id == changed.id).values(**values))
    schedule.reconsider(connection, changed.id, changed.url, _first_due(changed, at))
    # Another address may be another mailbox, and another policy lets other messages go.
    requests.distrust(connection, changed.id)


def exchange_secret(connection: Connection, account_id: str, old: str, new: str) -> bool:
    """Replace a reference to a secret; returns False when it has been replaced by another meanwhile."""
    exchanged = connection.execute(
        sa.update(account)
        .where(account.c.id == account_id, account.c.secret_reference.in_([old, new]))
        .values(secret_reference=new)
    )
    return bool(exchanged.rowcount)


def page(connection: Connection, after: str, limit: int) -> list[Account]:
    """Accounts that were not removed, by name, behind the one of that name."""
    rows = connection.execute(
        sa.select(account)
        .where(account.c.removed_at.is_(None), account.c.name > after)
        .order_by(account.c.name)
        .limit(limit)
    )
    return [account_of(row) for row in rows]


def remove(connection: Connection, account_id: str, at: datetime) -> None:
    """Stop archiving an account and forget its secret. Its captures and their record stay."""
    schedule.stop(connection, account_id, AccountState.REMOVED)
    connection.execute(
        sa.update(account).where(account.c.id == account_id).values(removed_at=at, secret_reference="")
    )


def by_name(connection: Connection, name: str) -> Account | None:
    """The account of that name, removed or not."""
    return _one(connection, account.c.name == name)


def by_url(connection: Connection, url: str) -> Account | None:
    """The account that archives this URL."""
    return _one(connection, sa.and_(account.c.url == url, account.c.removed_at.is_(None)))


def all_active(connection: Connection) -> list[Account]:
    """Every account that was not removed, by name."""
    rows = connection.execute(
        sa.select(account).where(account.c.removed_at.is_(None)).order_by(account.c.name)
    )
    return [account_of(row) for row in rows]


def every(connection: Connection) -> list[Account]:
    """Every account that ever was, removed ones too: their archives are still to be proved."""
    return [account_of(row) for row in connection.execute(sa.select(account).order_by(account.c.name))]


def _first_due(wanted: Account, at: datetime) -> datetime | None:
    """The cron expression's next moment; None without one: at once."""
    return Timetable.of(wanted).next_cron(at)


def _refuse_second(connection: Connection, wanted: Account) -> None:
    other = by_url(connection, wanted.url)
    if other is not None and other.id != wanted.id:
        raise UsageError(
            f"account {other.name} archives {wanted.url} already",
            hint="two accounts on one mailbox would each fetch all of it",
        )


def _one(connection: Connection, wanted: sa.ColumnElement[bool]) -> Account | None:
    row = connection.execute(sa.select(account).where(wanted)).first()
    return None if row is None else account_of(row)

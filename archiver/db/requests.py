"""What an operator asks for, and the next poll of the account does."""

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import captures, schedule
from archiver.db.tables import account, lease, mailbox, sighting
from archiver.states import SightingState


def retry_quarantined(connection: Connection, account_id: str, at: datetime, uidl: bytes | None) -> int:
    """Retry what is in quarantine, of that UIDL or all of it, at the next poll; returns how many messages."""
    wanted = [sighting.c.account_id == account_id, sighting.c.absent_at.is_(None)]
    if uidl is not None:
        wanted.append(sighting.c.uidl == uidl)
    distrust(connection, account_id)
    found = connection.execute(
        sa.update(sighting).where(*wanted, sighting.c.state == SightingState.QUARANTINED).values(retry_at=at)
    )
    return found.rowcount


def fetch_again(connection: Connection, account_id: str, uidl: bytes) -> int:
    """Fetch a captured message that is still on the server, and store it, at the next poll.

    That repairs an object which the store lost: the same content has the same key,
    and an object that is there is left as it is. Until then the message is not
    deleted. The row keeps its digest, so that another content under this UIDL does
    not hide the former one. Messages known by their content are fetched at every
    poll anyway.
    """
    distrust(connection, account_id)
    found = connection.execute(
        sa.update(sighting)
        .where(
            sighting.c.account_id == account_id,
            sighting.c.uidl == uidl,
            sighting.c.content == b"",
            sighting.c.state == SightingState.CAPTURED,
            sighting.c.absent_at.is_(None),
        )
        .values(state=SightingState.PENDING)
    )
    return found.rowcount


def allow_deletion(connection: Connection, account_id: str) -> None:
    """An operator confirms: the account's deletion policy applies again."""
    distrust(connection, account_id)
    connection.execute(sa.update(account).where(account.c.id == account_id).values(deletion_suspended=None))


def distrust(connection: Connection, account_id: str) -> None:
    """Make the next poll that begins list the mailbox, whatever a poll under way reports of it."""
    # The lease first, as an ending does: none is claimed or released until this is committed.
    schedule.ask_again(connection, account_id)
    connection.execute(
        sa.update(mailbox).where(mailbox.c.account_id == account_id).values(trusted_until=None)
    )


def recount(connection: Connection, account_id: str) -> bool:
    """Correct an account's counts of captures and bytes; returns whether they were wrong.

    No capture is recorded meanwhile, because that locks the lease's row too.
    """
    connection.execute(
        sa.select(lease.c.token).where(lease.c.account_id == account_id).with_for_update()
    ).one()
    counted = captures.count(connection, account_id)
    if counted == captures.counted(connection, account_id):
        return False
    number, captured_bytes = counted
    connection.execute(
        sa.update(mailbox)
        .where(mailbox.c.account_id == account_id)
        .values(captures=number, captured_bytes=captured_bytes)
    )
    return True

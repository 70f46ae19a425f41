"""A journal segment, taken in: captures, sightings, journal head and feed events, all or nothing."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import bulk, events, leases, requests, sightings
from archiver.db.tables import account, capture, journal, mailbox, sighting
from archiver.errors import IntegrityError
from archiver.model import Claim, Resolved, Segment, What
from archiver.policy import why_suspended


def segment(connection: Connection, claim: Claim, written: Segment, digest: bytes) -> None:
    """Take in a segment. To take in the same one again changes nothing; one of a new epoch begins it.

    Raises LeaseLost, or IntegrityError when the segment does not follow the one
    that the database has.
    """
    leases.fence(connection, claim)
    head = connection.execute(_HEAD, {"b_account_id": written.account_id}).one()
    if (head.sequence, head.digest) == (written.sequence, digest):
        return
    if (head.sequence + 1, head.digest) != (written.sequence, written.previous):
        raise IntegrityError(
            f"journal segment {written.sequence} of account {written.account_name} does not follow "
            f"segment {head.sequence}, which the database has"
        )
    if written.epoch < head.epoch:
        raise IntegrityError(
            f"journal segment {written.sequence} of account {written.account_name} is of epoch "
            f"{written.epoch}, and epoch {head.epoch} has begun"
        )
    connection.execute(
        _ADVANCE,
        {
            "b_account_id": written.account_id,
            "sequence": written.sequence,
            "digest": digest,
            "written_at": written.written_at,
        },
    )
    begins_epoch = written.epoch > head.epoch
    if begins_epoch:
        _begin_epoch(connection, written)
    captured = [line for line in written.lines if line.what is What.CAPTURED]
    if captured:
        _NEW_CAPTURES.run(connection, [_capture_row(written, line) for line in captured])
        _count(connection, written.account_id, captured)
    sightings.resolve(connection, written)
    events.publish(connection, events.of_segment(written, begins_epoch=begins_epoch))


def _begin_epoch(connection: Connection, written: Segment) -> None:
    """The mailbox was renumbered: what the former UIDLs named is not listed any more.

    Whether those messages are still on the server, their UIDLs do not say. So none
    is reported as gone, and deletion is suspended until an operator confirms.
    """
    connection.execute(
        sa.update(account)
        .where(account.c.id == written.account_id)
        .values(epoch=written.epoch, deletion_suspended=why_suspended(written.epoch, written.written_at))
    )
    connection.execute(
        sa.update(sighting)
        .where(
            sighting.c.account_id == written.account_id,
            sighting.c.epoch != written.epoch,
            sighting.c.absent_at.is_(None),
        )
        .values(absent_at=written.written_at)
    )
    requests.distrust(connection, written.account_id)


def _capture_row(written: Segment, line: Resolved) -> dict[str, Any]:
    return {
        "account_id": written.account_id,
        "sha256": line.sha256,
        "size": line.size,
        "epoch": written.epoch,
        "uidl": line.sighting.uidl,
        "captured_at": line.resolved_at,
        "version_id": line.version_id,
        "token": written.token,
        "sequence": written.sequence,
    }


def _count(connection: Connection, account_id: str, captured: list[Resolved]) -> None:
    captured_bytes = sum(line.size or 0 for line in captured)
    connection.execute(
        _COUNT, {"b_account_id": account_id, "b_captures": len(captured), "b_bytes": captured_bytes}
    )


# Made once: composing a statement costs more than running it.

_ACCOUNT_ID = sa.bindparam("b_account_id", type_=sa.Text())
_HEAD = (
    sa.select(journal.c.sequence, journal.c.digest, account.c.epoch)
    .join(account, account.c.id == journal.c.account_id)
    .where(journal.c.account_id == _ACCOUNT_ID)
)
_ADVANCE = sa.update(journal).where(journal.c.account_id == _ACCOUNT_ID)
_COUNT = (
    sa.update(mailbox)
    .where(mailbox.c.account_id == _ACCOUNT_ID)
    .values(
        captures=mailbox.c.captures + sa.bindparam("b_captures", type_=sa.BigInteger()),
        captured_bytes=mailbox.c.captured_bytes + sa.bindparam("b_bytes", type_=sa.BigInteger()),
    )
)
_NEW_CAPTURES = bulk.insert(capture, capture.c.keys(), lambda insert: insert.on_conflict_do_nothing())

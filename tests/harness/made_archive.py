"""One account with any number of captures, made directly: objects, journal and database, without a poll.

Owns the short cut. Promises what polls of a mailbox of tiny messages would
leave behind, ``BATCH`` messages a segment, so that a verification finds it
sound; but nothing is made durable.
"""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import sqlalchemy as sa

from archiver.db import Database, accounts
from archiver.db.tables import capture, mailbox
from archiver.db.tables import journal as journal_table
from archiver.evidence import journal
from archiver.model import (
    NO_DIGEST,
    Account,
    Resolved,
    Segment,
    ServerRecord,
    SightingKey,
    What,
    message_key,
    new_account_id,
    segment_key,
)

BATCH = 100

_AT = datetime(2024, 2, 29, 12, tzinfo=UTC)
_SERVER = ServerRecord("mail.example", 995, "+OK", "PLAIN", None, None, None)


def content(number: int) -> bytes:
    """The message of this number, counted from 0."""
    return b"Subject: %d\r\n\r\n" % number


def make_archive(database: Database, store: Path, captures: int) -> Account:
    """An account with so many captures, in a database with a schema and a directory store."""
    identity = new_account_id()
    account = Account(
        identity, f"made {identity}", f"pop3s://{identity}@mail.example", "implicit", "env:NONE"
    )
    account = database.transact(lambda connection: accounts.add(connection, account, _AT))
    for shard in range(256):
        (store / f"messages/{identity}/{shard:02x}").mkdir(parents=True)
    (store / f"journal/{identity}").mkdir(parents=True)
    numbers = iter(range(captures))
    sequence, previous, total = 0, NO_DIGEST, 0
    while batch := list(islice(numbers, BATCH)):
        sequence += 1
        segment = _segment(account, sequence, previous, list(_captured(account, store, batch)))
        encoded = journal.encode(segment)
        previous = hashlib.sha256(encoded).digest()
        (store / segment_key(identity, sequence)).write_bytes(encoded)
        _insert(database, list(_rows(segment)))
        total += sum(line.size or 0 for line in segment.lines)

    def finish(connection: sa.Connection) -> None:
        head = {"sequence": sequence, "digest": previous}
        connection.execute(
            sa.update(journal_table).where(journal_table.c.account_id == identity).values(head)
        )
        counted = {"captures": captures, "captured_bytes": total}
        connection.execute(sa.update(mailbox).where(mailbox.c.account_id == identity).values(counted))

    database.transact(finish)
    return account


def _captured(account: Account, store: Path, numbers: list[int]) -> Iterator[Resolved]:
    for number in numbers:
        message = content(number)
        digest = hashlib.sha256(message).digest()
        (store / message_key(account.id, digest)).write_bytes(message)
        sighting = SightingKey(b"%d" % number, len(message))
        yield Resolved(What.CAPTURED, sighting, _AT, sha256=digest, size=len(message))


def _segment(account: Account, sequence: int, previous: bytes, lines: list[Resolved]) -> Segment:
    return Segment(
        account_id=account.id,
        account_name=account.name,
        account_url=account.url,
        epoch=1,
        sequence=sequence,
        previous=previous,
        token=1,
        written_at=_AT,
        server=_SERVER,
        listing_count=len(lines),
        listing_digest=NO_DIGEST,
        lines=tuple(lines),
    )


def _insert(database: Database, rows: list[dict[str, object]]) -> None:
    database.transact(lambda connection: connection.execute(sa.insert(capture), rows))


def _rows(segment: Segment) -> Iterator[dict[str, object]]:
    for line in segment.lines:
        yield {
            "account_id": segment.account_id,
            "sha256": line.sha256,
            "size": line.size,
            "epoch": segment.epoch,
            "uidl": line.sighting.uidl,
            "captured_at": line.resolved_at,
            "token": segment.token,
            "sequence": segment.sequence,
        }

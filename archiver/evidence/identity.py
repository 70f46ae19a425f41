"""One identity for a store and its database: the two belong together, or nothing is written.

An unmounted volume, another bucket, an older snapshot: each looks like a store that
works. So the archive has an id, made once, which is kept in an object at the root of
the store and in the database. The object also has the number of the store's format,
which a program that does not know it refuses.

A store without the object gets it only if the database has no captures yet, or if the
store shows the journal segments that the database knows. An empty store under a
database with captures never does.
"""

import contextlib
import json
import secrets
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import Database
from archiver.db.tables import archive, journal
from archiver.errors import IntegrityError, OperatorNeeded
from archiver.evidence.journal import read as read_segment
from archiver.store import ObjectDiffers, ObjectNotFound, Store
from archiver.store.spool import BytesBody

KEY = "archive.json"
FORMAT = 1
LARGEST_BYTES = 64 * 1024
"""A larger object under ``KEY`` is not an identity, and is not read into memory."""

HEADS_COMPARED = 20
"""Journals by whose last segment a store without an identity is recognised: the most recent ones."""


class Identity(NamedTuple):
    """Which archive this is, and the format of its store."""

    archive_id: str
    format: int


class StoreMismatch(OperatorNeeded):
    """The store is not the one that the database belongs to. Nothing was fetched, written or deleted."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            hint="check ARCHIVER_STORE_URL, and that its volume is mounted; a moved archive must be whole",
        )


def check(store: Store, database: Database, now: datetime) -> Identity:
    """The identity that store and database share, made when both are new.

    Raises StoreMismatch, OperatorNeeded for a format that this release does not know,
    IntegrityError for an object that is not an identity, and what the store raises.
    """
    shown = read(store)
    with database.reading() as connection:
        known, has_captures = _of_database(connection), _has_captures(connection)
    if shown is not None and known is not None:
        if shown.archive_id != known:
            raise StoreMismatch(
                f"the store is of archive {shown.archive_id}, and the database of archive {known}"
            )
        return shown
    if has_captures and not _shows_its_journals(store, database):
        raise StoreMismatch(
            "the database has captures, and the store does not have their journal: "
            "it is empty, of another archive, or older than the database"
        )
    if shown is None:
        shown = _write(store, known or secrets.token_hex(16), now)
        if known is not None and shown.archive_id != known:
            return check(store, database, now)
    if known is None:
        made = shown
        database.transact(lambda connection: _keep(connection, made))
        return check(store, database, now)
    return shown


def read(store: Store) -> Identity | None:
    """The identity that the store shows, or None. Raises as ``check`` does."""
    data = bytearray()
    try:
        with store.get(KEY) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) > LARGEST_BYTES:
                    raise IntegrityError(f"{KEY} in the store is too large for an archive's identity")
    except ObjectNotFound:
        return None
    try:
        found = json.loads(data)
        identity = Identity(found["archive"], found["format"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{KEY} in the store is not an archive's identity: {error!r}") from error
    if type(identity.archive_id) is not str or type(identity.format) is not int:
        raise IntegrityError(f"{KEY} in the store is not an archive's identity")
    if identity.format != FORMAT:
        raise OperatorNeeded(
            f"the store has format {identity.format}, and this release knows format {FORMAT}",
            hint="upgrade archiver",
        )
    return identity


def _write(store: Store, archive_id: str, now: datetime) -> Identity:
    """Put the object. Of two processes that do so at once, one wins, and both read what it wrote."""
    document = {"archive": archive_id, "format": FORMAT, "made_at": now.isoformat()}
    with contextlib.suppress(ObjectDiffers):
        store.put(KEY, BytesBody(json.dumps(document).encode() + b"\n"))
    written = read(store)
    if written is None:
        raise IntegrityError(f"{KEY} was written, and is missing in the store")
    return written


def _of_database(connection: Connection) -> str | None:
    return connection.execute(sa.select(archive.c.archive_id)).scalar()


def _keep(connection: Connection, identity: Identity) -> None:
    if _of_database(connection) is None:
        connection.execute(sa.insert(archive).values(number=1, archive_id=identity.archive_id))


def _has_captures(connection: Connection) -> bool:
    return (
        connection.execute(sa.select(journal.c.sequence).where(journal.c.sequence > 0).limit(1)).first()
        is not None
    )


def _shows_its_journals(store: Store, database: Database) -> bool:
    """Whether the store has the last segments of the journals that were written most recently."""
    newest = (
        sa.select(journal.c.account_id, journal.c.sequence, journal.c.digest)
        .where(journal.c.sequence > 0)
        .order_by(journal.c.written_at.desc())
        .limit(HEADS_COMPARED)
    )
    with database.reading() as connection:
        heads = connection.execute(newest).all()
    for head in heads:
        found = read_segment(store, head.account_id, head.sequence)
        if found is None or found[1] != head.digest:
            return False
    return True

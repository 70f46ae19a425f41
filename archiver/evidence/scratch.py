"""What a verification must remember of one account, on disk, so that memory does not grow with the account.

Owns one temporary file: a row for each content that the database or the
journal names, sorted by digest. The database's digests arrive sorted; the
journal's arrive in the order of capture, so SQLite's B-tree sorts them, with a
page cache of a fixed size. Promises that the file is gone when the process
ends, however it ends. A million captures take about 50 MB.

Leaves to ``verify`` what the rows mean.
"""

import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from archiver.errors import OperatorNeeded
from archiver.store.disk import failure

_CACHE_KIB = 4 * 1024

_SETTINGS = (
    f"PRAGMA cache_size = -{_CACHE_KIB}",
    # Nothing is ever read back after a crash: no journal, no fsync, one transaction that never commits.
    "PRAGMA journal_mode = OFF",
    "PRAGMA synchronous = OFF",
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA temp_store = FILE",
)

_TABLES = (
    """
    CREATE TABLE content (
        sha256 BLOB PRIMARY KEY,
        is_recorded INTEGER NOT NULL,
        size INTEGER,
        position INTEGER,
        must_be_recorded INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    "CREATE TABLE missing (position INTEGER PRIMARY KEY, sha256 BLOB NOT NULL)",
)

_RECORDED = "INSERT INTO content VALUES (?, 1, NULL, NULL, 0)"

# A content may stand in the journal twice. Its last size counts, and its first position.
_WRITTEN = """
    INSERT INTO content VALUES (?, 0, ?, ?, ?)
    ON CONFLICT (sha256) DO UPDATE SET
        size = excluded.size,
        position = coalesce(position, excluded.position),
        must_be_recorded = max(must_be_recorded, excluded.must_be_recorded)
"""


class Content(NamedTuple):
    """What the database and the journal say of one content."""

    sha256: bytes
    is_recorded: bool
    """Whether the database has a capture of it."""
    size: int | None
    """In bytes, by the journal; None where the journal does not name it."""
    position: int | None
    """Where the journal first names it, counted over all its lines."""


class Scratch:
    """One account's contents. Used by one thread; see ``scratch``."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._positions = count()
        for statement in (*_SETTINGS, "BEGIN", *_TABLES):
            connection.execute(statement)

    def add_recorded(self, digests: Iterable[bytes]) -> None:
        """Add the database's captures, sorted by digest. Call it once, first."""
        self._connection.executemany(_RECORDED, ((digest,) for digest in digests))

    def add_written(self, captured: Iterable[tuple[bytes, int]], *, must_be_recorded: bool) -> None:
        """Add captures of the journal, in its order: digest and size in bytes.

        ``must_be_recorded``: whether the database knows the segment they are from.
        """
        self._connection.executemany(
            _WRITTEN, ((sha256, size, next(self._positions), must_be_recorded) for sha256, size in captured)
        )

    def contents(self) -> Iterator[Content]:
        """All contents, sorted by digest."""
        rows = self._connection.execute(
            "SELECT sha256, is_recorded, size, position FROM content ORDER BY sha256"
        )
        return (Content(sha256, bool(recorded), size, at) for sha256, recorded, size, at in rows)

    def unwritten(self) -> Iterator[bytes]:
        """Digests that the database has and the journal lacks, sorted."""
        return self._digests("SELECT sha256 FROM content WHERE size IS NULL ORDER BY sha256")

    def unrecorded(self) -> Iterator[bytes]:
        """Digests in segments that the database knows, without a capture in the database; sorted."""
        return self._digests(
            "SELECT sha256 FROM content WHERE must_be_recorded AND NOT is_recorded ORDER BY sha256"
        )

    def add_missing(self, content: Content) -> None:
        """Note that the store lacks a content of the journal."""
        self._connection.execute("INSERT INTO missing VALUES (?, ?)", (content.position, content.sha256))

    def missing(self) -> Iterator[bytes]:
        """Digests that ``add_missing`` noted, in the order of the journal."""
        return self._digests("SELECT sha256 FROM missing ORDER BY position")

    def _digests(self, query: str) -> Iterator[bytes]:
        return (row[0] for row in self._connection.execute(query))


@contextmanager
def scratch(directory: Path | None) -> Iterator[Scratch]:
    """An empty scratch file in ``directory``; None means where the system keeps temporary files.

    Raises OperatorNeeded when the file cannot be written, also from inside the block.
    """
    where = directory or Path(tempfile.gettempdir())
    trying = f"keep what is to be verified in a temporary file in {where}"
    try:
        descriptor, name = tempfile.mkstemp(dir=where, prefix="archiver-verify-")
    except OSError as error:
        raise failure(error, trying) from error
    os.close(descriptor)
    try:
        try:
            connection = sqlite3.connect(name, isolation_level=None)
            opened = Scratch(connection)
        finally:
            Path(name).unlink()  # SQLite has it open; without a name it cannot outlive a killed process
        with closing(connection):
            yield opened
    except sqlite3.Error as error:
        raise OperatorNeeded(
            f"cannot {trying}: {error}",
            hint="free some space there: about 50 bytes a capture of the largest account",
        ) from error

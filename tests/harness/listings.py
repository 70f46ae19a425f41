"""Listings as a server sends them, and a reader of them that is too slow to be wrong.

Owns ``listed``, which feeds the client's reader in pieces of any size, and
``slowly_listed``, which says line by line, with dictionaries, what must come out.
"""

import hashlib
import re
from collections.abc import Callable
from typing import TypeVar

from archiver.pop3.listing import (
    LARGEST_NUMBER,
    LARGEST_SIZE,
    UIDL_BYTES,
    Entry,
    Listing,
    SizeColumn,
    UidlColumn,
    join,
)

ValueT = TypeVar("ValueT", bytes, int)


def uidl_column(block: bytes, piece_bytes: int = 0) -> UidlColumn:
    """The response to UIDL, fed in pieces of so many octets, or at once."""
    column = UidlColumn()
    for piece in _pieces(block, piece_bytes):
        column.feed(piece)
    column.finish()
    return column


def size_column(block: bytes, piece_bytes: int = 0) -> SizeColumn:
    """The response to LIST, in the same way."""
    column = SizeColumn()
    for piece in _pieces(block, piece_bytes):
        column.feed(piece)
    column.finish()
    return column


def listed(uidl: bytes | None, sizes: bytes | None, piece_bytes: int = 0) -> Listing:
    """What the client makes of both; None where the server does not know the command."""
    return join(
        None if uidl is None else uidl_column(uidl, piece_bytes),
        None if sizes is None else size_column(sizes, piece_bytes),
    )


def slowly_listed(uidl: bytes | None, sizes: bytes | None) -> tuple[list[Entry], int, bytes]:
    """The entries, the lines skipped, and the digest that must come out."""
    uids, skipped_uids = _told(uidl or b"", _uid)
    octets, skipped_sizes = _told(sizes or b"", _size)
    entries = []
    digest = hashlib.sha256()
    for number in sorted({*uids, *octets}):
        uid, size = uids.get(number), octets.get(number)
        entries.append(Entry(number, uid, size))
        digest.update(b"%d %d" % (number, -1 if size is None else size))
        digest.update(b"\n" if uid is None else b" " + uid + b"\n")
    return entries, skipped_uids + skipped_sizes, digest.digest()


def _pieces(block: bytes, octets: int) -> list[bytes]:
    size = octets or len(block) or 1
    return [block[at : at + size] for at in range(0, len(block), size)]


def _told(
    block: bytes, read: Callable[[bytes], tuple[ValueT | None, bool]]
) -> tuple[dict[int, ValueT | None], int]:
    told: dict[int, ValueT | None] = {}
    skipped = 0
    for line in block.split(b"\n"):
        if line in {b"", b"\r"}:
            continue
        fields = line.split(None, 1)
        if not fields or not re.fullmatch(rb"[0-9]{1,40}", fields[0]):
            skipped += 1
            continue
        number = int(fields[0])
        if not 1 <= number <= LARGEST_NUMBER:
            skipped += 1
            continue
        value, usable = read(fields[1].rstrip() if len(fields) > 1 else b"")
        if number not in told:
            told[number] = value
            skipped += not usable
            continue
        skipped += 1
        if told[number] != value:
            told[number] = None
    return told, skipped


def _uid(rest: bytes) -> tuple[bytes | None, bool]:
    usable = 0 < len(rest) <= UIDL_BYTES and not any(octet < 0x20 or octet == 0x7F for octet in rest)
    return (rest if usable else None), usable


def _size(rest: bytes) -> tuple[int | None, bool]:
    word = (rest.split(None, 1) or [b""])[0]
    size = int(word) if re.fullmatch(rb"[0-9]{1,40}", word) else None
    return (None if size is None or size > LARGEST_SIZE else size), True

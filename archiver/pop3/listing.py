"""What a mailbox holds, as UIDL and LIST tell it (RFC 1939 sections 5 and 7).

Owns the reading of both listings and their join by message number. Promises to
read whatever a server sends without failing: a line that makes no sense is
skipped and counted, never guessed at. Leaves identity over sessions to the
caller.

A message number is good for one session only. A uid is opaque octets: servers
send 8-bit, inner spaces, more than the 70 octets of RFC 1939, and the same uid
for two messages, which section 7 allows.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

LARGEST_NUMBER: Final = 2**31 - 1  # larger ones are attacks on clients that count in 32 bits
LARGEST_SIZE: Final = 2**63 - 1
UIDL_OCTETS: Final = 1024  # RFC 1939 says 70; near 300 was met in the wild

_DIGITS: Final = 40  # of a number with its leading zeros
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")

ValueT = TypeVar("ValueT", bytes, int)


@dataclass(frozen=True, slots=True)
class Entry:
    """One message of this session's listing.

    ``uidl`` is None when the server gave none, or gave two that differ.
    ``size`` is what the server claims, in octets, or None; a hint (many servers
    count otherwise) that frames nothing.
    """

    number: int
    uidl: bytes | None
    size: int | None


@dataclass(frozen=True, slots=True)
class Listing:
    """A mailbox at one moment, by ascending number.

    ``skipped_lines`` counts lines of UIDL and LIST that gave nothing usable.
    ``has_uidl`` is false when the server does not know UIDL. ``digest`` is the
    SHA-256 over the canonical entries, one line each: ``number SP size SP uidl
    LF``, with -1 for an unknown size, and without the last field where there is
    no uid.
    """

    entries: tuple[Entry, ...]
    skipped_lines: int
    has_uidl: bool
    digest: bytes


@dataclass(frozen=True, slots=True)
class Column(Generic[ValueT]):
    """What one of the two commands told: a value (or None) for each number, and the lines skipped."""

    values: dict[int, ValueT | None]
    skipped_lines: int


def parse_uidl(block: bytes) -> Column[bytes]:
    """Read the lines ``number uid`` of UIDL.

    A line without a uid, or with one that holds control characters or is longer
    than 1 KiB, still shows that the message exists: its value is None, and it
    counts as skipped.
    """
    return _parse(block, _uid)


def parse_list(block: bytes) -> Column[int]:
    """Read the lines ``number size [anything]`` of LIST; a size that is no decimal up to 2^63-1 is None."""
    return _parse(block, _size)


def join(uidl: Column[bytes] | None, sizes: Column[int] | None) -> Listing:
    """One listing from both; None stands for a command that the server does not know.

    UIDL was asked first, so a number beyond all that it told arrived in
    between; it is left to the next session. A gap below that is a message
    without a uid.
    """
    uid_of = {} if uidl is None else uidl.values
    size_of = {} if sizes is None else sizes.values
    numbers = sorted(uid_of.keys() | size_of.keys())
    if uid_of:
        last = max(uid_of)
        numbers = [number for number in numbers if number <= last]
    entries = tuple(Entry(number, uid_of.get(number), size_of.get(number)) for number in numbers)
    return Listing(
        entries,
        skipped_lines=sum(column.skipped_lines for column in (uidl, sizes) if column is not None),
        has_uidl=uidl is not None,
        digest=_digest(entries),
    )


def _digest(entries: tuple[Entry, ...]) -> bytes:
    canonical = hashlib.sha256()
    for entry in entries:
        size = -1 if entry.size is None else entry.size
        # Unambiguous: a uid is never empty and holds no control character.
        uid = b"" if entry.uidl is None else b" " + entry.uidl
        canonical.update(b"%d %d%b\n" % (entry.number, size, uid))
    return canonical.digest()


def _parse(block: bytes, read_value: Callable[[bytes], tuple[ValueT | None, bool]]) -> Column[ValueT]:
    values: dict[int, ValueT | None] = {}
    skipped = 0
    for line in block.split(b"\n"):
        fields = line.split(None, 1)
        if not fields:
            skipped += line not in {b"", b"\r"}  # spaces alone; an empty line is no line
            continue
        number = _number(fields[0])
        if number is None:
            skipped += 1
            continue
        value, usable = read_value(fields[1].rstrip() if len(fields) > 1 else b"")
        skipped += not usable
        if number in values:
            skipped += usable
            if values[number] != value:
                values[number] = None  # two answers to one question: neither can be believed
        else:
            values[number] = value
    return Column(values, skipped)


def _uid(rest: bytes) -> tuple[bytes | None, bool]:
    usable = 0 < len(rest) <= UIDL_OCTETS and not _CONTROL.search(rest)
    return (rest if usable else None), usable


def _size(rest: bytes) -> tuple[int | None, bool]:
    size = decimal(rest.split(None, 1)[0]) if rest else None
    return (None if size is None or size > LARGEST_SIZE else size), True


def _number(text: bytes) -> int | None:
    number = decimal(text)
    return number if number is not None and 1 <= number <= LARGEST_NUMBER else None


def decimal(text: bytes) -> int | None:
    """A number as POP3 writes it, leading zeros allowed; None for anything else."""
    return int(text) if len(text) <= _DIGITS and text.isdigit() else None

"""What a mailbox holds, as UIDL and LIST tell it (RFC 1939 sections 5 and 7).

Owns the reading of both listings and their join by message number. Promises to
read whatever a server sends without failing: a line that makes no sense is
skipped and counted, never guessed at. Promises little memory: octets become
arrays while they arrive, and a message costs some twenty octets beside its uid,
as long as nobody asks for its ``Entry``. Leaves identity over sessions to the
caller.

A message number is good for one session only. A uid is opaque octets: servers
send 8-bit, inner spaces, more than the 70 octets of RFC 1939, and the same uid
for two messages, which section 7 allows.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import accumulate, islice, pairwise, starmap
from operator import lt
from typing import Final, Generic, NamedTuple, TypeVar, overload

LARGEST_NUMBER: Final = 2**31 - 1  # larger ones are attacks on clients that count in 32 bits
LARGEST_SIZE: Final = 2**63 - 1
UIDL_BYTES: Final = 1024  # RFC 1939 says 70; near 300 was met in the wild

_LINE_OCTETS: Final = 2048  # that are looked at; what matters of a line is in them
_CHUNK_OCTETS: Final = 32 * 1024  # read at once: enough for C loops to pay, little enough to forget
_RUN: Final = 16 * 1024  # entries that are sorted as objects; more are merged from such runs
_DIGITS: Final = 40  # of a number with its leading zeros
_NOWHERE: Final = 2**32 - 1  # for the place of a value that there is not
_UNKNOWN: Final = -1  # for a size
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")

ValueT = TypeVar("ValueT", bytes, int)


class Entry(NamedTuple):
    """One message of this session's listing.

    ``uidl`` is None when the server gave none, or gave two that differ.
    ``size`` is what the server claims, in octets, or None; a hint (many servers
    count otherwise) that frames nothing.
    """

    number: int
    uidl: bytes | None
    size: int | None


class Entries(Sequence[Entry]):
    """The messages of a listing by ascending number. Each Entry is made when it is asked for."""

    def __init__(
        self, numbers: "array[int]", sizes: "array[int]", uids: "UidlColumn", places: "array[int] | None"
    ) -> None:
        """Use ``join``. ``places`` are those of the uids, None where they stand in the same order."""
        self._numbers = numbers
        self._sizes = sizes
        self._uids = uids
        self._places = places

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, index: int | slice) -> Entry | tuple[Entry, ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        place = range(len(self))[index]
        size = self._sizes[place]
        return Entry(
            self._numbers[place],
            self._uids.at(place if self._places is None else self._places[place]) or None,
            None if size == _UNKNOWN else size,
        )

    def __iter__(self) -> Iterator[Entry]:
        uids = self._uids.all() if self._places is None else map(self._uids.at, self._places)
        for number, uid, size in zip(self._numbers, uids, self._sizes, strict=True):
            yield Entry(number, uid or None, None if size == _UNKNOWN else size)

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of equal entries."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"<{len(self)} entries>"


def _same(one: object, other: object) -> bool:
    return one == other


@dataclass(frozen=True, slots=True)
class Listing:
    """A mailbox at one moment, by ascending number.

    ``skipped_lines`` counts lines of UIDL and LIST that gave nothing usable.
    ``has_uidl`` and ``has_sizes`` are false where the server refused UIDL and
    LIST; of what has no uid, LIST alone would have told. ``digest`` is the
    SHA-256 over the canonical entries, one line each: ``number SP size SP uidl
    LF``, with -1 for an unknown size, and without the last field where there is
    no uid.
    ``first`` is the number from which on messages were asked for, one by one;
    of those before it there are no entries.
    """

    entries: Entries
    skipped_lines: int
    has_uidl: bool
    has_sizes: bool
    digest: bytes
    first: int = 1

    @property
    def count(self) -> int:
        """How many messages the mailbox holds, those before ``first`` included."""
        return self.first - 1 + len(self.entries)

    @property
    def is_legible(self) -> bool:
        """Whether nothing that the server said of the messages was lost on us."""
        return self.has_sizes and not self.skipped_lines

    @property
    def is_whole(self) -> bool:
        """Whether a message that it does not show is not there."""
        return self.first == 1 and self.is_legible

    def by_uidl(self) -> "array[int]":
        """The indices of ``entries`` in the order of their uid, octet by octet, then of their size.

        As a database sorts them: no uid is b"", an unknown size is -1. Takes
        four octets an entry, and some megabytes while it sorts.
        """
        runs: list[array[int]] = []
        last: _Key | None = None
        keyed = starmap(_key, enumerate(self.entries))
        while run := sorted(islice(keyed, _RUN)):
            if last is None or run[0] < last:
                runs.append(array("I"))
            runs[-1].extend(index for _, _, index in run)
            last = run[-1]
        if len(runs) == 1:
            return runs[0]
        # From here on one entry of each run is in memory.
        merged = merge(*(self._keys(run) for run in runs))
        return array("I", (index for _, _, index in merged))

    def _keys(self, run: "array[int]") -> "Iterator[_Key]":
        return (_key(index, self.entries[index]) for index in run)


_Key = tuple[bytes, int, int]


def _key(index: int, entry: Entry) -> _Key:
    return entry.uidl or b"", _UNKNOWN if entry.size is None else entry.size, index


class _Column(ABC, Generic[ValueT]):
    """What one of the two commands told, number by number.

    ``feed`` it the response as it arrives, then ``finish``. ``numbers`` ascend
    from then on, each once. ``skipped_lines`` counts what gave nothing usable.
    """

    _lawful: re.Pattern[bytes]
    """Lines of which nothing need be looked at singly."""
    _skipped_as: ValueT | None
    """The value of a line that was counted as skipped when it was read."""

    def __init__(self) -> None:
        self.numbers: array[int] = array("I")
        self.skipped_lines = 0
        self._pending = bytearray()

    def feed(self, octets: bytes) -> None:
        """Take octets of the response."""
        self._pending += octets
        if len(self._pending) < _CHUNK_OCTETS:
            return
        end = self._pending.rfind(b"\n") + 1
        if end:
            self._take(bytes(self._pending[:end]))
            del self._pending[:end]
        else:
            del self._pending[_LINE_OCTETS:]

    def finish(self) -> None:
        """The response is complete."""
        self._take(bytes(self._pending))
        self._pending.clear()
        if not all(map(lt, self.numbers, islice(self.numbers, 1, None))):
            self._arrange(self._ascending())

    def _take(self, lines: bytes) -> None:
        if self._lawful.fullmatch(lines):
            fields = lines.split()
            self.numbers.extend(map(int, fields[::2]))
            self._keep(self._convert(fields[1::2]))
        else:
            self._take_singly(lines)

    def _take_singly(self, lines: bytes) -> None:
        values: list[ValueT] = []
        for whole in lines.split(b"\n"):
            line = whole[:_LINE_OCTETS]
            fields = line.split(None, 1)
            if not fields:
                self.skipped_lines += line not in {b"", b"\r"}  # spaces alone; an empty line is no line
                continue
            number = _number(fields[0])
            if number is None:
                self.skipped_lines += 1
                continue
            value, usable = self._value(fields[1].rstrip() if len(fields) > 1 else b"")
            self.skipped_lines += not usable
            self.numbers.append(number)
            values.append(value)
        self._keep(values)

    def _ascending(self) -> "array[int]":
        """The place of each number's value, once ``numbers`` are in order, and each stands there once.

        Of a number that was told twice, the second line is skipped; and if the
        two differ, neither can be believed.
        """
        packed = array("Q", (number << 32 | place for place, number in enumerate(self.numbers)))
        self.numbers = array("I")
        for start in range(0, len(packed), _RUN):
            packed[start : start + _RUN] = array("Q", sorted(packed[start : start + _RUN]))
        view = memoryview(packed)
        places: array[int] = array("I")
        for each in merge(*(view[start : start + _RUN] for start in range(0, len(packed), _RUN))):
            number, place = each >> 32, each & _NOWHERE
            if not self.numbers or number != self.numbers[-1]:
                self.numbers.append(number)
                places.append(place)
                continue
            self.skipped_lines += self._at(place) != self._skipped_as
            if places[-1] == _NOWHERE or self._at(places[-1]) != self._at(place):
                places[-1] = _NOWHERE
        return places

    @abstractmethod
    def _convert(self, fields: list[bytes]) -> Iterable[ValueT]:
        """The values of lawful lines."""

    @abstractmethod
    def _value(self, rest: bytes) -> tuple[ValueT, bool]:
        """The value of any line, and whether the line is to be counted as a good one."""

    @abstractmethod
    def _keep(self, values: Iterable[ValueT]) -> None:
        """Append values."""

    @abstractmethod
    def _at(self, place: int) -> ValueT:
        """The value that was kept as the ``place``-th."""

    @abstractmethod
    def _arrange(self, places: "array[int]") -> None:
        """The values belong to ``numbers`` in this order of places."""


class UidlColumn(_Column[bytes]):
    """The lines ``number uid`` of UIDL.

    A line without a uid, or with one that holds control characters or is longer
    than 1 KiB, still shows that the message exists: it has no uid, and the line
    counts as skipped.
    """

    # Uids lie end to end in a block for each chunk: one object for hundreds of them, none of which moves.
    _lawful = re.compile(rb"(?:[1-9][0-9]{0,8} [!-~]{1,512}\r?\n)*")
    _skipped_as = b""

    def __init__(self) -> None:
        super().__init__()
        self.places: array[int] | None = None
        """Where the uid of each of ``numbers`` is, by ``at``; None when they stand in the same order."""
        self._blocks: list[bytes] = []
        self._firsts: array[int] = array("I")
        self._ends: array[int] = array("I")

    def at(self, place: int) -> bytes:
        """The uid at a place; b"" where there is none."""
        if place == _NOWHERE:
            return b""
        block = bisect_right(self._firsts, place) - 1
        start = self._ends[place - 1] if place > self._firsts[block] else 0
        return self._blocks[block][start : self._ends[place]]

    def all(self) -> Iterator[bytes]:
        """The uids of all places, in order."""
        for block, (first, end) in zip(self._blocks, pairwise([*self._firsts, len(self._ends)]), strict=True):
            for start, stop in pairwise([0, *self._ends[first:end]]):
                yield block[start:stop]

    def _convert(self, fields: list[bytes]) -> list[bytes]:
        return fields

    def _value(self, rest: bytes) -> tuple[bytes, bool]:
        usable = 0 < len(rest) <= UIDL_BYTES and not _CONTROL.search(rest)
        return (rest if usable else b""), usable

    def _keep(self, values: Iterable[bytes]) -> None:
        uids = list(values)
        if uids:
            self._firsts.append(len(self._ends))
            self._blocks.append(b"".join(uids))
            self._ends.extend(accumulate(map(len, uids)))

    def _at(self, place: int) -> bytes:
        return self.at(place)

    def _arrange(self, places: "array[int]") -> None:
        self.places = places


class SizeColumn(_Column[int]):
    """The lines ``number size [anything]`` of LIST; a size that is no decimal up to 2^63-1 is unknown."""

    _lawful = re.compile(rb"(?:[1-9][0-9]{0,8} [0-9]{1,18}\r?\n)*")
    _skipped_as = None

    def __init__(self) -> None:
        super().__init__()
        self.sizes: array[int] = array("q")
        """The size of each of ``numbers``; -1 where it is unknown."""

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]]) -> "SizeColumn":
        """Numbers, which ascend, and sizes that were told in another way than by LIST."""
        column = cls()
        for number, size in sizes:
            column.numbers.append(number)
            column.sizes.append(size)
        return column

    def _convert(self, fields: list[bytes]) -> Iterable[int]:
        return map(int, fields)

    def _value(self, rest: bytes) -> tuple[int, bool]:
        size = decimal(rest.split(None, 1)[0]) if rest else None
        return (_UNKNOWN if size is None or size > LARGEST_SIZE else size), True

    def _keep(self, values: Iterable[int]) -> None:
        self.sizes.extend(values)

    def _at(self, place: int) -> int:
        return self.sizes[place]

    def _arrange(self, places: "array[int]") -> None:
        self.sizes = array("q", (_UNKNOWN if place == _NOWHERE else self.sizes[place] for place in places))


def join(uidl: UidlColumn | None, sizes: SizeColumn | None, *, first: int = 1) -> Listing:
    """One listing from both, finished; None stands for a command that the server does not know.

    A number that UIDL did not tell is a message without a uid. Beyond all that
    UIDL told it may be one that arrived in between, as UIDL was asked first; but
    of one that never gets a uid nobody would ever hear if it were left out.
    """
    entries = _joined(uidl, sizes)
    return Listing(
        entries,
        skipped_lines=sum(column.skipped_lines for column in (uidl, sizes) if column is not None),
        has_uidl=uidl is not None,
        has_sizes=sizes is not None,
        digest=_digest(entries),
        first=first,
    )


def _joined(uidl: UidlColumn | None, sizes: SizeColumn | None) -> Entries:
    if uidl is None or (sizes is not None and not uidl.numbers):
        sizes = sizes or SizeColumn()
        nowhere = array("I", [_NOWHERE]) * len(sizes.numbers)
        return Entries(sizes.numbers, sizes.sizes, UidlColumn(), nowhere)
    if sizes is None:
        return Entries(uidl.numbers, array("q", [_UNKNOWN]) * len(uidl.numbers), uidl, uidl.places)
    if uidl.numbers == sizes.numbers:
        return Entries(uidl.numbers, sizes.sizes, uidl, uidl.places)
    return _joined_by_number(uidl, sizes)


def _joined_by_number(uidl: UidlColumn, sizes: SizeColumn) -> Entries:
    told: array[int] = array("I")
    sized: array[int] = array("q")
    placed: array[int] = array("I")
    end = len(sizes.numbers)
    at = 0
    for index, number in enumerate(uidl.numbers):
        while at < end and sizes.numbers[at] < number:
            told.append(sizes.numbers[at])
            sized.append(sizes.sizes[at])
            placed.append(_NOWHERE)
            at += 1
        told.append(number)
        placed.append(index if uidl.places is None else uidl.places[index])
        found = at < end and sizes.numbers[at] == number
        sized.append(sizes.sizes[at] if found else _UNKNOWN)
        at += found
    told.extend(sizes.numbers[at:])
    sized.extend(sizes.sizes[at:])
    placed.extend(array("I", [_NOWHERE]) * (end - at))
    return Entries(told, sized, uidl, placed)


def _digest(entries: Entries) -> bytes:
    canonical = hashlib.sha256()
    # Unambiguous: a uid is never empty and holds no control character.
    lines = (
        b"%d %d%b\n" % (number, _UNKNOWN if size is None else size, b"" if uid is None else b" " + uid)
        for number, uid, size in entries
    )
    while some := b"".join(islice(lines, 1000)):
        canonical.update(some)
    return canonical.digest()


def _number(text: bytes) -> int | None:
    number = decimal(text)
    return number if number is not None and 1 <= number <= LARGEST_NUMBER else None


def decimal(text: bytes) -> int | None:
    """A number as POP3 writes it, leading zeros allowed; None for anything else."""
    return int(text) if len(text) <= _DIGITS and text.isdigit() else None

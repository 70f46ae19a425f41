"""The messages of a mailbox, by UIDL and LIST (RFC 1939 sections 5 and 7).

Owns the parsing of both listings and their join by message number. Promises to
parse anything that a server sends without failing: a line that makes no sense is
skipped and counted, never guessed at. Promises little memory: bytes become
arrays while they arrive. A message costs some twenty bytes beside its uid, until
its ``Entry`` is asked for. Leaves identity over sessions to the caller.

A message number is good for one session only. A uid is opaque bytes. Servers
send 8-bit, inner spaces, and more than the 70 octets of RFC 1939. They also send
the same uid for two messages, which section 7 allows.
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

LARGEST_NUMBER: Final = 2**31 - 1  # larger ones attack clients that count in 32 bits
LARGEST_SIZE: Final = 2**63 - 1
UIDL_BYTES: Final = 1024  # RFC 1939 says 70; real servers send up to 300

_LINE_BYTES: Final = 2048
"""Only this much of a line is parsed."""
_CHUNK_BYTES: Final = 32 * 1024
"""Parsed at a time: enough to be fast, and little memory."""
_RUN: Final = 16 * 1024
"""Entries that are sorted at a time as objects. Such runs are then merged."""
_DIGITS: Final = 40
"""The most digits of a number, leading zeros included."""
_NOWHERE: Final = 2**32 - 1
"""The index of a missing value."""
_UNKNOWN: Final = -1
"""An unknown size."""
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")

ValueT = TypeVar("ValueT", bytes, int)


class Entry(NamedTuple):
    """One message of this session's listing."""

    number: int
    uidl: bytes | None
    """None if the server gave no uid, or two that differ."""
    size: int | None
    """In bytes, as the server claims, if it does: a hint, since many servers count differently."""


class Entries(Sequence[Entry]):
    """The messages of a listing by ascending number. An Entry is made when it is asked for."""

    def __init__(
        self, numbers: "array[int]", sizes: "array[int]", uids: "UidlColumn", uid_indices: "array[int] | None"
    ) -> None:
        """Use ``join``. ``uid_indices`` say where each uid is; None if they are in the same order."""
        self._numbers = numbers
        self._sizes = sizes
        self._uids = uids
        self._uid_indices = uid_indices

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, index: int | slice) -> Entry | tuple[Entry, ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        index = range(len(self))[index]
        size = self._sizes[index]
        return Entry(
            self._numbers[index],
            self._uids.at(index if self._uid_indices is None else self._uid_indices[index]) or None,
            None if size == _UNKNOWN else size,
        )

    def __iter__(self) -> Iterator[Entry]:
        uids = self._uids.all() if self._uid_indices is None else map(self._uids.at, self._uid_indices)
        for number, uid, size in zip(self._numbers, uids, self._sizes, strict=True):
            yield Entry(number, uid or None, None if size == _UNKNOWN else size)

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of equal entries."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]  # not hashable, as a list

    def __repr__(self) -> str:
        return f"<{len(self)} entries>"


def _same(one: object, other: object) -> bool:
    return one == other


@dataclass(frozen=True, slots=True)
class Listing:
    """A mailbox at one moment, by ascending number."""

    entries: Entries
    skipped_lines: int
    """Lines of UIDL and LIST without anything usable."""
    has_uidl: bool
    """Whether the server knows UIDL."""
    has_sizes: bool
    """Whether the server knows LIST, which alone shows messages without a uid."""
    digest: bytes
    """SHA-256 over the canonical entries, one line each: ``number SP size SP uidl LF``.

    An unknown size is -1. Without a uid, the last field is missing.
    """
    first: int = 1
    """The number of the first message that was asked for; there are no entries before it."""

    @property
    def count(self) -> int:
        """How many messages the mailbox has, those before ``first`` included."""
        return self.first - 1 + len(self.entries)

    @property
    def is_legible(self) -> bool:
        """Whether everything that the server said about the messages was understood."""
        return self.has_sizes and not self.skipped_lines

    @property
    def is_whole(self) -> bool:
        """Whether a message that is missing here is missing from the mailbox."""
        return self.first == 1 and self.is_legible

    def by_uidl(self) -> "array[int]":
        """The indices of ``entries`` in the order of their uid, byte by byte, then of their size.

        A database sorts them in the same way: no uid is b"", an unknown size is
        -1. Takes four bytes an entry, and some megabytes while it sorts.
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
        # The merge has one entry of each run in memory.
        merged = merge(*(self._keys(run) for run in runs))
        return array("I", (index for _, _, index in merged))

    def _keys(self, run: "array[int]") -> "Iterator[_Key]":
        return (_key(index, self.entries[index]) for index in run)


_Key = tuple[bytes, int, int]


def _key(index: int, entry: Entry) -> _Key:
    return entry.uidl or b"", _UNKNOWN if entry.size is None else entry.size, index


class _Column(ABC, Generic[ValueT]):
    """The response to one of the two commands, number by number.

    Call ``feed`` with the response as it arrives, then ``finish``. From then on
    ``numbers`` ascend, each once. ``skipped_lines`` counts lines without anything
    usable.
    """

    _lawful: re.Pattern[bytes]
    """Lines that may be parsed together."""
    _skipped_as: ValueT | None
    """The value of a line that was already counted as skipped."""

    def __init__(self) -> None:
        self.numbers: array[int] = array("I")
        self.skipped_lines = 0
        self._pending = bytearray()

    def feed(self, octets: bytes) -> None:
        """Take bytes of the response."""
        self._pending += octets
        if len(self._pending) < _CHUNK_BYTES:
            return
        end = self._pending.rfind(b"\n") + 1
        if end:
            self._take(bytes(self._pending[:end]))
            del self._pending[:end]
        else:
            del self._pending[_LINE_BYTES:]

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
            line = whole[:_LINE_BYTES]
            fields = line.split(None, 1)
            if not fields:
                self.skipped_lines += line not in {b"", b"\r"}  # spaces alone count; an empty line does not
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
        """Sort ``numbers`` so that each occurs once, and return the index of each number's value.

        If a number came twice, the second line is skipped. If the two lines
        differ, the number has no value.
        """
        packed = array("Q", (number << 32 | index for index, number in enumerate(self.numbers)))
        self.numbers = array("I")
        for start in range(0, len(packed), _RUN):
            packed[start : start + _RUN] = array("Q", sorted(packed[start : start + _RUN]))
        view = memoryview(packed)
        indices: array[int] = array("I")
        for each in merge(*(view[start : start + _RUN] for start in range(0, len(packed), _RUN))):
            number, index = each >> 32, each & _NOWHERE
            if not self.numbers or number != self.numbers[-1]:
                self.numbers.append(number)
                indices.append(index)
                continue
            self.skipped_lines += self._at(index) != self._skipped_as
            if indices[-1] == _NOWHERE or self._at(indices[-1]) != self._at(index):
                indices[-1] = _NOWHERE
        return indices

    @abstractmethod
    def _convert(self, fields: list[bytes]) -> Iterable[ValueT]:
        """The values of such lines."""

    @abstractmethod
    def _value(self, rest: bytes) -> tuple[ValueT, bool]:
        """The value of any line, and whether the line was usable."""

    @abstractmethod
    def _keep(self, values: Iterable[ValueT]) -> None:
        """Append values."""

    @abstractmethod
    def _at(self, index: int) -> ValueT:
        """The kept value with this index."""

    @abstractmethod
    def _arrange(self, indices: "array[int]") -> None:
        """Note that the values belong to ``numbers`` in this order of indices."""


class UidlColumn(_Column[bytes]):
    """The lines ``number uid`` of UIDL.

    A uid with control characters, or of more than 1 KiB, is not usable. Such a
    line, or one without a uid, still shows that the message exists. Then it has no
    uid, and the line counts as skipped.
    """

    # The uids of a chunk are joined in one block: one object for hundreds of uids, and none is ever moved.
    _lawful = re.compile(rb"(?:[1-9][0-9]{0,8} [!-~]{1,512}\r?\n)*")
    _skipped_as = b""

    def __init__(self) -> None:
        super().__init__()
        self.indices: array[int] | None = None
        """The index for ``at`` of each number's uid; None if the uids are in the order of the numbers."""
        self._blocks: list[bytes] = []
        self._firsts: array[int] = array("I")
        self._ends: array[int] = array("I")

    def at(self, index: int) -> bytes:
        """The uid with this index; b"" for a missing one."""
        if index == _NOWHERE:
            return b""
        block = bisect_right(self._firsts, index) - 1
        start = self._ends[index - 1] if index > self._firsts[block] else 0
        return self._blocks[block][start : self._ends[index]]

    def all(self) -> Iterator[bytes]:
        """All uids, in the order of their indices."""
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

    def _at(self, index: int) -> bytes:
        return self.at(index)

    def _arrange(self, indices: "array[int]") -> None:
        self.indices = indices


class SizeColumn(_Column[int]):
    """The lines ``number size [anything]`` of LIST. A size that is not a decimal up to 2^63-1 is unknown."""

    _lawful = re.compile(rb"(?:[1-9][0-9]{0,8} [0-9]{1,18}\r?\n)*")
    _skipped_as = None

    def __init__(self) -> None:
        super().__init__()
        self.sizes: array[int] = array("q")
        """The size of each of ``numbers``; -1 if it is unknown."""

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]]) -> "SizeColumn":
        """A column of ascending numbers and sizes that do not come from LIST."""
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

    def _at(self, index: int) -> int:
        return self.sizes[index]

    def _arrange(self, indices: "array[int]") -> None:
        self.sizes = array("q", (_UNKNOWN if index == _NOWHERE else self.sizes[index] for index in indices))


def join(uidl: UidlColumn | None, sizes: SizeColumn | None, *, first: int = 1) -> Listing:
    """One listing from both columns, which are finished. None: the server does not know the command.

    A number without a UIDL line is a message without a uid. It may have arrived
    between UIDL and LIST. It is listed all the same, since some messages never
    get a uid, and they must not go unnoticed.
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
        return Entries(uidl.numbers, array("q", [_UNKNOWN]) * len(uidl.numbers), uidl, uidl.indices)
    if uidl.numbers == sizes.numbers:
        return Entries(uidl.numbers, sizes.sizes, uidl, uidl.indices)
    return _joined_by_number(uidl, sizes)


def _joined_by_number(uidl: UidlColumn, sizes: SizeColumn) -> Entries:
    numbers: array[int] = array("I")
    sized: array[int] = array("q")
    indexed: array[int] = array("I")
    end = len(sizes.numbers)
    at = 0
    for index, number in enumerate(uidl.numbers):
        while at < end and sizes.numbers[at] < number:
            numbers.append(sizes.numbers[at])
            sized.append(sizes.sizes[at])
            indexed.append(_NOWHERE)
            at += 1
        numbers.append(number)
        indexed.append(index if uidl.indices is None else uidl.indices[index])
        found = at < end and sizes.numbers[at] == number
        sized.append(sizes.sizes[at] if found else _UNKNOWN)
        at += found
    numbers.extend(sizes.numbers[at:])
    sized.extend(sizes.sizes[at:])
    indexed.extend(array("I", [_NOWHERE]) * (end - at))
    return Entries(numbers, sized, uidl, indexed)


def _digest(entries: Entries) -> bytes:
    canonical = hashlib.sha256()
    # The lines are unambiguous: a uid is never empty and has no control character.
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
    """A decimal number, leading zeros allowed; None for anything else."""
    return int(text) if len(text) <= _DIGITS and text.isdigit() else None

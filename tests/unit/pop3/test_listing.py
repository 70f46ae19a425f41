"""UIDL and LIST as servers send them."""

from collections.abc import Iterable, Sequence

import pytest

from archiver.pop3.listing import UIDL_BYTES, Entry, Listing
from tests.harness.listings import listed, slowly_listed


def uids(listing: Listing) -> dict[int, bytes | None]:
    return {entry.number: entry.uidl for entry in listing.entries}


UIDL_LINES = {
    "plain": (b"1 abc", 1, b"abc"),
    "three spaces, as Comcast and a Japanese provider send": (b"1   abc", 1, b"abc"),
    "a tab": (b"1\tabc", 1, b"abc"),
    "leading space": (b" 1 abc", 1, b"abc"),
    "trailing spaces": (b"1 abc  ", 1, b"abc"),
    "leading zeros": (b"0001 abc", 1, b"abc"),
    "inner spaces belong to the uid": (b"1 a b  c", 1, b"a b  c"),
    "8-bit": (b"1 \xe9\xff", 1, b"\xe9\xff"),
    "near 300 octets, as a ticket system met": (b"1 " + b"u" * 300, 1, b"u" * 300),
    "as long as can be": (b"1 " + b"u" * UIDL_BYTES, 1, b"u" * UIDL_BYTES),
    "a slash": (b"1 a/../b", 1, b"a/../b"),
    "the largest number": (b"2147483647 abc", 2147483647, b"abc"),
}


@pytest.mark.parametrize(("line", "number", "uidl"), UIDL_LINES.values(), ids=UIDL_LINES.keys())
def test_a_uidl_line_is_read_tolerantly(line: bytes, number: int, uidl: bytes) -> None:
    listing = listed(line + b"\r\n", None)
    assert (uids(listing), listing.skipped_lines) == ({number: uidl}, 0)


UNUSABLE = {
    "no uid, as getmail's users met": (b"1", {1: None}),
    "blank uid": (b"1  ", {1: None}),
    "control character in the uid": (b"1 a\x1bb", {1: None}),
    "longer than 1 KiB": (b"1 " + b"u" * (UIDL_BYTES + 1), {1: None}),
    "number zero, as netius counted": (b"0 abc", {}),
    "negative": (b"-1 abc", {}),
    "over 31 bits, an attack on C clients": (b"2147483648 abc", {}),
    "thousands of digits": (b"9" * 10_000 + b" abc", {}),
    "no number": (b"abc def", {}),
    "underscores, which Python's int would take": (b"1_0 abc", {}),
    "a plus sign": (b"+1 abc", {}),
    "other digits": ("\u0661 abc".encode(), {}),
    "spaces alone": (b"   ", {}),
}


@pytest.mark.parametrize(("line", "values"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_uidl_line_is_counted_and_the_rest_is_read(line: bytes, values: dict[int, None]) -> None:
    listing = listed(line + b"\r\n7 good\r\n", None)
    assert uids(listing) == {**values, 7: b"good"}
    assert listing.skipped_lines == 1


@pytest.mark.parametrize(
    ("line", "values"),
    [
        (b"1 120", {1: 120}),
        (b"1 120 and more text", {1: 120}),
        (b"1  0120 ", {1: 120}),
        (b"1 0", {1: 0}),
        (b"1 9223372036854775807", {1: 2**63 - 1}),
        (b"1 9223372036854775808", {1: None}),
        (b"1 %!d(float64=5461)", {1: None}),  # Mailpit (mailpit#312)
        (b"1 -5", {1: None}),
        (b"1", {1: None}),
    ],
)
def test_a_size_that_is_none_does_not_hide_the_message(line: bytes, values: dict[int, int | None]) -> None:
    entries = listed(None, line + b"\r\n").entries
    assert {entry.number: entry.size for entry in entries} == values


def test_a_number_told_twice_the_same_way_is_kept_once() -> None:
    listing = listed(b"1 a\r\n1 a\r\n", None)
    assert (uids(listing), listing.skipped_lines) == ({1: b"a"}, 1)


def test_a_number_told_twice_in_two_ways_has_no_uid() -> None:
    listing = listed(b"1 a\r\n1 b\r\n1 a\r\n2 c\r\n", None)
    assert (uids(listing), listing.skipped_lines) == ({1: None, 2: b"c"}, 2)


def test_a_number_with_two_sizes_has_none() -> None:
    assert listed(b"2 b\r\n1 a\r\n", b"1 5\r\n1 6\r\n2 7\r\n").entries == (
        Entry(1, b"a", None),
        Entry(2, b"b", 7),
    )


def test_the_same_uid_for_two_messages_is_lawful() -> None:
    """RFC 1939 section 7; popa3d and Dovecot do it."""
    listing = listed(b"1 a\r\n2 a\r\n", b"1 5\r\n2 6\r\n")
    assert listing.entries == (Entry(1, b"a", 5), Entry(2, b"a", 6))


def test_any_order_and_gaps_are_lawful() -> None:
    listing = listed(b"9 c\r\n2 a\r\n", b"2 5\r\n9 6\r\n")
    assert listing.entries == (Entry(2, b"a", 5), Entry(9, b"c", 6))


def test_a_message_beyond_all_that_uidl_told_is_listed_without_a_uid() -> None:
    listing = listed(b"1 a\r\n", b"1 5\r\n2 6\r\n3 7\r\n")
    assert listing.entries == (Entry(1, b"a", 5), Entry(2, None, 6), Entry(3, None, 7))


def test_a_message_that_uidl_passed_over_is_listed_without_a_uid() -> None:
    listing = listed(b"1 a\r\n3 c\r\n", b"1 5\r\n2 6\r\n3 7\r\n")
    assert listing.entries[1] == Entry(2, None, 6)


def test_an_empty_uidl_does_not_hide_what_list_shows() -> None:
    listing = listed(b"", b"1 5\r\n")
    assert listing.entries == (Entry(1, None, 5),)


def test_without_uidl_the_listing_says_so() -> None:
    listing = listed(None, b"1 5\r\n")
    assert not listing.has_uidl
    assert listing.entries == (Entry(1, None, 5),)


def test_without_list_the_sizes_are_unknown() -> None:
    listing = listed(b"1 a\r\n", None)
    assert listing.has_uidl
    assert listing.entries == (Entry(1, b"a", None),)


def test_the_digest_depends_on_the_entries_alone() -> None:
    one = listed(b"1 a\r\n2 b\r\n", b"1 5\r\n2 6\r\n")
    same = listed(b"2   b\r\n1 a \r\n", b"2 6 octets\r\n1 5\r\n")
    assert one.digest == same.digest
    assert len(one.digest) == 32


def test_the_digest_differs_with_every_field() -> None:
    listings = [
        listed(b"1 a\r\n", b"1 5\r\n"),
        listed(b"2 a\r\n", b"2 5\r\n"),
        listed(b"1 b\r\n", b"1 5\r\n"),
        listed(b"1 a\r\n", b"1 6\r\n"),
        listed(b"1 a\r\n", None),
        listed(None, b"1 5\r\n"),
        listed(None, None),
    ]
    assert len({listing.digest for listing in listings}) == len(listings)


# Many lines: what is read by the chunk is what would have been read by the line.

MANY = 20_000


def lines(numbers: Iterable[int], value: str) -> bytes:
    return b"".join(f"{number} {value.format(number)}\r\n".encode() for number in numbers)


SHUFFLED = sorted(range(1, MANY + 1), key=lambda number: number * 7919 % 20_011)


@pytest.mark.parametrize(
    ("uidl", "sizes"),
    [
        pytest.param(lines(range(1, MANY), "uid-{:08x}"), lines(range(1, MANY), "{}"), id="in order"),
        pytest.param(lines(range(MANY, 0, -1), "{:x}"), lines(range(1, MANY + 1), "{}"), id="newest first"),
        pytest.param(lines(SHUFFLED, "{:x}"), lines(reversed(SHUFFLED), "{}"), id="shuffled"),
        pytest.param(lines(range(1, MANY, 3), "{}"), lines(range(1, MANY, 2), "{}"), id="gaps in both"),
        pytest.param(
            lines(range(1, MANY), "a b {}") + b"3 other\r\n9\r\n", lines([1, MANY], "-{}"), id="odd"
        ),
        pytest.param(
            lines([*range(1, MANY), *range(1, 99)], "{}"), lines(range(1, MANY), "1"), id="told twice"
        ),
        pytest.param(
            lines(range(1, 100), "u" * 3000 + "{}"), b"1 " + b"7" * 100_000 + b"\r\n", id="long lines"
        ),
    ],
)
@pytest.mark.parametrize("piece_bytes", [0, 1000, 65536])
@pytest.mark.slow
def test_a_long_listing_is_read_as_line_by_line(uidl: bytes, sizes: bytes, piece_bytes: int) -> None:
    entries, skipped_lines, digest = slowly_listed(uidl, sizes)
    listing = listed(uidl, sizes, piece_bytes)
    assert listing.entries == entries
    assert listing.entries[:7] == tuple(entries[:7])
    assert (listing.skipped_lines, listing.digest) == (skipped_lines, digest)


# Entries as a sequence, and in another order.


def test_entries_are_a_sequence() -> None:
    entries = listed(b"1 a\r\n2 b\r\n5 c\r\n", b"1 7\r\n2 8\r\n5 9\r\n").entries
    last = Entry(5, b"c", 9)
    assert len(entries) == 3
    assert entries[-1] == entries[2] == last
    assert entries[1:] == (Entry(2, b"b", 8), last)
    assert next(reversed(entries)) == last
    assert last in entries
    assert entries == listed(b"5 c\r\n2 b\r\n1 a\r\n", b"1 7\r\n2 8\r\n5 9\r\n").entries
    assert entries != entries[:2]
    with pytest.raises(IndexError):
        entries[3]


def test_by_uidl_goes_by_octets_then_by_size_and_has_none_first() -> None:
    listing = listed(b"1 b\r\n2 a\r\n3 a\r\n4 \xff\r\n5\r\n6 aa\r\n", b"2 9\r\n3 1\r\n5 3\r\n")
    in_order = [listing.entries[index] for index in listing.by_uidl()]
    assert [(entry.uidl, entry.size) for entry in in_order] == [
        (None, 3),
        (b"a", 1),
        (b"a", 9),
        (b"aa", None),
        (b"b", None),
        (b"\xff", None),
    ]


def test_by_uidl_of_no_messages() -> None:
    assert list(listed(b"", b"").by_uidl()) == []


@pytest.mark.parametrize(
    "numbers", [range(1, 50_001), SHUFFLED * 2, range(50_000, 0, -1)], ids=["up", "mixed", "down"]
)
def test_by_uidl_of_many_is_in_order(numbers: Sequence[int]) -> None:
    uidl = b"".join(b"%d %08x\r\n" % (index, number) for index, number in enumerate(numbers, 1))
    listing = listed(uidl, None)
    uids = [entry.uidl or b"" for entry in listing.entries]
    order = list(listing.by_uidl())
    assert sorted(order) == list(range(len(uids)))
    assert [uids[index] for index in order] == sorted(uids)

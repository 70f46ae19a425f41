"""UIDL and LIST as servers send them."""

import pytest

from archiver.pop3.listing import UIDL_OCTETS, Entry, join, parse_list, parse_uidl

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
    "as long as can be": (b"1 " + b"u" * UIDL_OCTETS, 1, b"u" * UIDL_OCTETS),
    "a slash": (b"1 a/../b", 1, b"a/../b"),
    "the largest number": (b"2147483647 abc", 2147483647, b"abc"),
}


@pytest.mark.parametrize(("line", "number", "uidl"), UIDL_LINES.values(), ids=UIDL_LINES.keys())
def test_a_uidl_line_is_read_tolerantly(line: bytes, number: int, uidl: bytes) -> None:
    column = parse_uidl(line + b"\r\n")
    assert (column.values, column.skipped_lines) == ({number: uidl}, 0)


UNUSABLE = {
    "no uid, as getmail's users met": (b"1", {1: None}),
    "blank uid": (b"1  ", {1: None}),
    "control character in the uid": (b"1 a\x1bb", {1: None}),
    "longer than 1 KiB": (b"1 " + b"u" * (UIDL_OCTETS + 1), {1: None}),
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
    column = parse_uidl(line + b"\r\n7 good\r\n")
    assert column.values == {**values, 7: b"good"}
    assert column.skipped_lines == 1


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
    assert parse_list(line + b"\r\n").values == values


def test_a_number_told_twice_the_same_way_is_kept_once() -> None:
    column = parse_uidl(b"1 a\r\n1 a\r\n")
    assert (column.values, column.skipped_lines) == ({1: b"a"}, 1)


def test_a_number_told_twice_in_two_ways_has_no_uid() -> None:
    column = parse_uidl(b"1 a\r\n1 b\r\n1 a\r\n2 c\r\n")
    assert (column.values, column.skipped_lines) == ({1: None, 2: b"c"}, 2)


def test_the_same_uid_for_two_messages_is_lawful() -> None:
    """RFC 1939 section 7; popa3d and Dovecot do it."""
    listing = join(parse_uidl(b"1 a\r\n2 a\r\n"), parse_list(b"1 5\r\n2 6\r\n"))
    assert listing.entries == (Entry(1, b"a", 5), Entry(2, b"a", 6))


def test_any_order_and_gaps_are_lawful() -> None:
    listing = join(parse_uidl(b"9 c\r\n2 a\r\n"), parse_list(b"2 5\r\n9 6\r\n"))
    assert listing.entries == (Entry(2, b"a", 5), Entry(9, b"c", 6))


def test_mail_that_came_between_uidl_and_list_waits_for_the_next_session() -> None:
    listing = join(parse_uidl(b"1 a\r\n"), parse_list(b"1 5\r\n2 6\r\n"))
    assert listing.entries == (Entry(1, b"a", 5),)


def test_a_message_that_uidl_passed_over_is_listed_without_a_uid() -> None:
    listing = join(parse_uidl(b"1 a\r\n3 c\r\n"), parse_list(b"1 5\r\n2 6\r\n3 7\r\n"))
    assert listing.entries[1] == Entry(2, None, 6)


def test_an_empty_uidl_does_not_hide_what_list_shows() -> None:
    listing = join(parse_uidl(b""), parse_list(b"1 5\r\n"))
    assert listing.entries == (Entry(1, None, 5),)


def test_without_uidl_the_listing_says_so() -> None:
    listing = join(None, parse_list(b"1 5\r\n"))
    assert not listing.has_uidl
    assert listing.entries == (Entry(1, None, 5),)


def test_without_list_the_sizes_are_unknown() -> None:
    listing = join(parse_uidl(b"1 a\r\n"), None)
    assert listing.has_uidl
    assert listing.entries == (Entry(1, b"a", None),)


def test_the_digest_depends_on_the_entries_alone() -> None:
    one = join(parse_uidl(b"1 a\r\n2 b\r\n"), parse_list(b"1 5\r\n2 6\r\n"))
    same = join(parse_uidl(b"2   b\r\n1 a \r\n"), parse_list(b"2 6 octets\r\n1 5\r\n"))
    assert one.digest == same.digest
    assert len(one.digest) == 32


def test_the_digest_differs_with_every_field() -> None:
    listings = [
        join(parse_uidl(b"1 a\r\n"), parse_list(b"1 5\r\n")),
        join(parse_uidl(b"2 a\r\n"), parse_list(b"2 5\r\n")),
        join(parse_uidl(b"1 b\r\n"), parse_list(b"1 5\r\n")),
        join(parse_uidl(b"1 a\r\n"), parse_list(b"1 6\r\n")),
        join(parse_uidl(b"1 a\r\n"), None),
        join(None, parse_list(b"1 5\r\n")),
        join(None, None),
    ]
    assert len({listing.digest for listing in listings}) == len(listings)

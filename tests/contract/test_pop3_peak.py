"""Whatever a server sends: under 64 MB above what the process had, by the default limits.

Each session runs in a process of its own, which measures itself as the kernel counts.
"""

from collections.abc import Callable, Iterable

import pytest

from archiver.pop3 import Limits
from archiver.settings import Settings
from tests.harness.peak import Cost, default_limits, measure
from tests.harness.scripted_pop3 import (
    Channel,
    Expect,
    ScriptedPop3,
    Send,
    SendEndlessly,
    Step,
    Talk,
)

pytestmark = pytest.mark.slow

MOST_BYTES = 64_000_000
MANY = 500_000

CAPABILITIES: list[Step] = [Expect(b"CAPA\r\n"), Send(b"+OK\r\nUIDL\r\n.\r\n")]
LOGIN: list[Step] = [
    Send(b"+OK ready\r\n"),
    *CAPABILITIES,
    Expect(b"USER user\r\n"),
    Send(b"+OK\r\n"),
    Expect(b"PASS secret\r\n"),
    Send(b"+OK\r\n"),
    *CAPABILITIES,
]
EMPTY: list[Step] = [
    *LOGIN,
    Expect(b"UIDL\r\n"),
    Send(b"+OK\r\n.\r\n"),
    Expect(b"LIST\r\n"),
    Send(b"+OK\r\n.\r\n"),
    Expect(b"RETR 1\r\n"),
]


def lines(numbers: Iterable[int], value: Callable[[int], bytes]) -> Talk:
    """Lines of a listing, some thousands a write."""

    def talk(channel: Channel) -> None:
        some = []
        for number in numbers:
            some.append(b"%d %b\r\n" % (number, value(number)))
            if len(some) == 5000:
                channel.send(b"".join(some))
                some.clear()
        channel.send(b"".join(some))

    return Talk(talk)


def uid(number: int) -> bytes:
    return b"%040x" % (number * 7919)


def size(number: int) -> bytes:
    return b"%d" % (number * 3_000_000_000)


def listing(uidl: Iterable[int], sizes: Iterable[int], *, end: bytes = b".\r\n") -> list[Step]:
    return [
        *LOGIN,
        Expect(b"UIDL\r\n"),
        Send(b"+OK\r\n"),
        lines(uidl, uid),
        Send(b".\r\n"),
        Expect(b"LIST\r\n"),
        Send(b"+OK\r\n"),
        lines(sizes, size),
        Send(end),
    ]


def shuffled(count: int) -> Iterable[int]:
    """Numbers up to 2^31 in no order."""
    return (1 + number * 1_327_217_885 % 2_147_483_647 for number in range(1, count))


def cost_of(script: list[Step], *, seconds_a_look: float = 0.0) -> Cost:
    with ScriptedPop3([script]) as server:
        return measure(server.port, seconds_a_look=seconds_a_look)


ENDLESS = 50_000_000

ATTACKS: dict[str, tuple[list[Step], str]] = {
    "greeting": ([SendEndlessly(b"+OK ")], "status_line_bytes"),
    "line of a reply": ([*EMPTY, SendEndlessly(b"+OK x")], "status_line_bytes"),
    "line of a listing": (
        [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n1 "), SendEndlessly(b"a")],
        "listing_bytes",
    ),
    "UIDL": (
        [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n"), lines(range(1, ENDLESS), uid)],
        "listing_bytes",
    ),
    "UIDL of short lines": (
        [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n"), lines(range(1, ENDLESS), lambda _: b"a")],
        "listing_lines",
    ),
    "UIDL of one number": (
        [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n"), SendEndlessly(b"1 abc\r\n")],
        "listing_lines",
    ),
    "UIDL of lines that mean nothing": (
        [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n"), SendEndlessly(b"\r\n")],
        "listing_lines",
    ),
    "LIST behind a long UIDL": (listing(range(1, 650_000), range(1, ENDLESS)), "listing_lines"),
    "LIST in no order behind a UIDL in none": (
        listing(shuffled(550_000), shuffled(ENDLESS)),
        "listing_lines",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_never_ends_takes_little_memory(attack: str) -> None:
    script, limit = ATTACKS[attack]
    cost = cost_of(script)
    assert (cost.kind, cost.limit) == ("protocol", limit)
    assert cost.octets < MOST_BYTES


@pytest.mark.parametrize("octets", [b"x", b"x\r\n", b"\r\n.x", b"\r"], ids=repr)
def test_an_endless_message_takes_little_memory_and_ends_with_the_session(octets: bytes) -> None:
    cost = cost_of([*EMPTY, Send(b"+OK\r\n"), SendEndlessly(octets)], seconds_a_look=1.0)
    assert (cost.kind, cost.limit) == ("transient", "session_seconds")
    assert cost.octets < MOST_BYTES
    assert cost.clock_seconds < default_limits().session_seconds + 10


def dripping(octets: bytes) -> Talk:
    """One byte a write, without end."""

    def talk(channel: Channel) -> None:
        while True:
            channel.send(octets, 1)

    return Talk(talk)


@pytest.mark.parametrize(
    ("script", "limit"),
    [
        pytest.param([Send(b"+OK "), dripping(b"x")], "greeting_seconds", id="greeting"),
        pytest.param(
            [*LOGIN, Expect(b"UIDL\r\n"), Send(b"+OK\r\n"), dripping(b"1 abc\r\n")],
            "session_seconds",
            id="listing",
        ),
        pytest.param([*EMPTY, Send(b"+OK\r\n"), dripping(b"x\r\n")], "session_seconds", id="message"),
    ],
)
def test_an_octet_a_second_ends_with_the_time_that_is_allowed(script: list[Step], limit: str) -> None:
    cost = cost_of(script, seconds_a_look=1.0)
    assert (cost.kind, cost.limit) == ("transient", limit)
    assert cost.clock_seconds < getattr(default_limits(), limit) + 60
    assert cost.octets < MOST_BYTES


@pytest.mark.parametrize(
    "order", [range(1, MANY + 1), range(MANY, 0, -1)], ids=["oldest first", "newest first"]
)
def test_a_mailbox_of_half_a_million_messages_is_listed(order: Iterable[int]) -> None:
    cost = cost_of([*listing(order, order), Expect(b"RETR 1\r\n"), Send(b"-ERR\r\n")])
    assert cost.listed == MANY
    assert cost.octets < MOST_BYTES


def test_the_client_by_itself_allows_what_an_installation_allows() -> None:
    settings = Settings.model_construct()
    limits = Limits()
    assert (limits.listing_lines, limits.listing_bytes) == (settings.listing_lines, settings.listing_bytes)

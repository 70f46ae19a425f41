"""Random servers against the wire layer and the listing: ``python -m tests.fuzz.wire --seconds 600``.

Hypothesis builds what a server sends from pieces that matter to framing, and
checks it against a reader that is too slow to be wrong. What fails is shrunk,
kept in ``tests/fuzz/corpus`` and tried first from then on, by the tests too.
"""

import argparse
import hashlib
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Final

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from archiver.pop3 import Pop3Error
from archiver.pop3.wire import BlockEnd, Receiver, Reply, Shape
from tests.harness.listings import listed, slowly_listed

CORPUS: Final = Path(__file__).parent / "corpus"

_EXAMPLES_A_ROUND: Final = 500
_PIECES: Final = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b".",
        b"..",
        b"\r\n.\r\n",
        b"\n.\n",
        b"+OK\r\n",
        b"-ERR x\r\n",
        b"+OK",
        b"+ \r\n",
    ),
    *(b"1 a\r\n", b"2 b c\r\n", b"0 z\r\n", b"-1 5\r\n", b"9" * 20, b" ", b"\t", b"\0", b"\xff", b"x" * 70),
)

_FIELDS: Final = (
    b"1",
    b"2",
    b"3",
    b"03",
    b"0",
    b"-1",
    b"2147483647",
    b"2147483648",
    b"9" * 41,
    b"a",
    b"b c",
    b"\xff",
)
_ENDS: Final = (b"\r\n", b"\r\n", b"\n", b" \r\n", b"\r\r\n")

lines = st.lists(
    st.tuples(
        st.sampled_from(_FIELDS),
        st.sampled_from((b" ", b"  ", b"\t", b"")),
        st.sampled_from(_FIELDS),
        st.sampled_from(_ENDS),
    ).map(b"".join),
    max_size=30,
).map(b"".join)
streams = st.lists(st.one_of(st.sampled_from(_PIECES), st.binary(max_size=8)), max_size=40).map(b"".join)


def events(octets: bytes, places: tuple[int, ...]) -> tuple[list[Reply | bytes | BlockEnd], str | None]:
    """What a receiver makes of the answers to RETR, with contents joined; the error that ended it.

    ``places`` are where reads are cut.
    """
    receiver = Receiver()
    for shape in (Shape.LINE, Shape.BLOCK, Shape.BLOCK):
        receiver.expect(shape)
    found: list[Reply | bytes | BlockEnd] = []
    content = b""
    try:
        for start, end in pairwise((0, *places, len(octets))):
            receiver.feed(octets[start:end])
            while (event := receiver.next_event()) is not None:
                if isinstance(event, bytes):
                    content += event
                    continue
                if isinstance(event, BlockEnd):
                    found.append(content)
                    content = b""
                found.append(event)
    except Pop3Error as error:
        return found, str(error)
    return found, None


def block(octets: bytes) -> bytes | None:
    """The content of a multi-line response, line by line (RFC 1939 section 3); None when it has no end."""
    content: list[bytes] = []
    while True:
        line, end, octets = octets.partition(b"\r\n")
        if not end:
            return None
        if line == b".":
            return b"".join(content)
        content.append(line.removeprefix(b".") + end)


def check(octets: bytes) -> None:
    """Everything that must hold for any octets at all."""
    check_wire(octets)
    check_listing(octets)


def check_wire(octets: bytes) -> None:
    """However the octets are cut, they mean the same, and what the standard says."""
    whole = events(octets, ())
    singly = events(octets, tuple(range(1, len(octets))))
    # An error may be seen before the octets behind it, and its words may quote fewer of them.
    assert (singly[0], singly[1] is None) == (whole[0], whole[1] is None)

    answer, _ = events(b"+OK\r\n+OK\r\n" + octets, ())
    meant = block(octets)
    if meant is None:
        assert not any(isinstance(event, BlockEnd) for event in answer)
    else:
        assert answer[2:4] == [meant, BlockEnd()]


def check_listing(octets: bytes) -> None:
    """Any octets are a listing, the same one however they are cut."""
    for uidl, sizes in ((octets, octets), (octets, None), (None, octets)):
        due = slowly_listed(uidl, sizes)
        for piece_bytes in (0, 1, 7):
            listing = listed(uidl, sizes, piece_bytes)
            assert (list(listing.entries), listing.skipped_lines, listing.digest) == due
            uids = [listing.entries[index].uidl or b"" for index in listing.by_uidl()]
            assert uids == sorted(entry.uidl or b"" for entry in listing.entries)


TARGETS: Final = {
    "wire": (check_wire, streams),
    "listing": (check_listing, st.one_of(lines, streams)),
}


def fuzz(seconds: float, first_seed: int = 0, *, target: str = "wire") -> int:
    """Try random octets for so long; how many. Raises what the check raises; the example is kept."""
    holds, octets_of = TARGETS[target]
    ends_at = time.monotonic() + seconds
    tried = 0
    number = first_seed
    while time.monotonic() < ends_at:
        failing = b""

        @seed(number)
        @settings(
            max_examples=_EXAMPLES_A_ROUND,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(octets_of)
        def one_round(octets: bytes) -> None:
            nonlocal tried, failing
            tried += 1
            failing = octets
            holds(octets)

        try:
            one_round()
        except BaseException:
            CORPUS.mkdir(exist_ok=True)
            (CORPUS / hashlib.sha256(failing).hexdigest()[:16]).write_bytes(failing)
            raise
        number += 1
    return tried


def main() -> int:
    """Fuzz until the time is over, shared by the targets, or something fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    arguments = parser.parse_args()
    for target in TARGETS:
        tried = fuzz(arguments.seconds / len(TARGETS), arguments.seed, target=target)
        sys.stdout.write(f"{target}: {tried} streams, from seed {arguments.seed} on: nothing found\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

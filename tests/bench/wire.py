"""How fast the wire layer is, beside what hashing the same octets costs.

Run it by ``python -m tests.bench.wire``.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial

from archiver.pop3.wire import Receiver, Shape
from tests.harness.listings import listed
from tests.harness.scripted_pop3 import stuffed

_ROUNDS = 5  # the best one counts: the others met somebody else's work
_TOTAL_OCTETS = 128 * 1024 * 1024
_LINE = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/abcdefghijkl\r\n"


def receive(reads: list[bytes], replies: int) -> Iterator[bytes]:
    receiver = Receiver()
    for _ in range(replies):
        receiver.expect(Shape.BLOCK)
    for read in reads:
        receiver.feed(read)
        while (event := receiver.next_event()) is not None:
            if isinstance(event, bytes):
                yield event


def drain(reads: list[bytes], replies: int) -> None:
    for _ in receive(reads, replies):
        pass


def cut(octets: bytes, size: int) -> list[bytes]:
    return [octets[start : start + size] for start in range(0, len(octets), size)]


def best_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def report(name: str, octets: int, work: Callable[[], object]) -> None:
    print(f"{name:<66} {octets / best_seconds(work) / 1e6:8.0f} MB/s")  # noqa: T201


def main() -> None:
    clean = _LINE * (_TOTAL_OCTETS // len(_LINE))
    dotted = (_LINE * 9 + b"." + _LINE) * (_TOTAL_OCTETS // (10 * len(_LINE)))
    small = [_LINE * 200] * (_TOTAL_OCTETS // (200 * len(_LINE)))
    cases = {
        "one message, no dots": [clean],
        "one message, every tenth line begins with a dot": [dotted],
        "messages of 16 KB": small,
    }
    for name, messages in cases.items():
        sent = b"".join(b"+OK\r\n" + stuffed(message) for message in messages)
        for size in (16384, 65536):
            reads = cut(sent, size)
            report(f"{name}, reads of {size // 1024} KiB", len(sent), partial(drain, reads, len(messages)))
    reads = cut(clean, 65536)
    report(
        "hashlib.sha256 alone, 64 KiB at a time", len(clean), lambda: [hashlib.sha256(read) for read in reads]
    )
    uidl = b"".join(b"%d %08x%08x\r\n" % (number, number, 7) for number in range(1, 100_001))
    sizes = b"".join(b"%d %d\r\n" % (number, number * 7) for number in range(1, 100_001))
    seconds = best_seconds(lambda: listed(uidl, sizes, 65536))
    print(f"listing of 100,000 messages: {seconds * 1000:.0f} ms")  # noqa: T201


if __name__ == "__main__":
    main()

"""What it costs to list a large mailbox: ``python -m tests.bench.listing``.

A scripted server sends UIDL and LIST with uids of 40 octets; a process of its
own lists, and tells its memory above what it had before, as the kernel counts
it (raw responses included), and the time from connect to the end. Beside it the
time of the reading alone, and of the order by uid.
"""

import sys
import time
from functools import partial

from tests.bench.wire import best_seconds
from tests.harness.listings import listed
from tests.harness.peak import measure
from tests.harness.scripted_pop3 import MailboxPlay, ScriptedPop3, Send

_COUNTS = (100_000, 500_000)
_READ_OCTETS = 65536


def _responses(count: int) -> tuple[bytes, bytes]:
    numbers = range(1, count + 1)
    uidl = b"".join(b"%d %040x\r\n" % (number, number * 7919) for number in numbers)
    return uidl, b"".join(b"%d %d\r\n" % (number, number * 7) for number in numbers)


def main() -> None:
    for count in _COUNTS:
        uidl, sizes = _responses(count)
        whole = listed(uidl, sizes, _READ_OCTETS)
        reading = best_seconds(partial(listed, uidl, sizes, _READ_OCTETS))
        started = time.perf_counter()
        whole.by_uidl()
        ordering = time.perf_counter() - started
        faults = {
            "UIDL": Send(b"+OK\r\n" + uidl + b".\r\n"),
            "LIST": Send(b"+OK\r\n" + sizes + b".\r\n"),
            "RETR": Send(b"-ERR\r\n"),
        }
        with ScriptedPop3(MailboxPlay([], faults=faults)) as server:
            cost = measure(server.port)
        sys.stdout.write(
            f"{cost.listed} messages: read in {reading * 1000:.0f} ms; "
            f"listed in {cost.seconds * 1000:.0f} ms, {cost.octets / 1e6:.1f} MB; "
            f"by uid in {ordering * 1000:.0f} ms\n"
        )


if __name__ == "__main__":
    main()

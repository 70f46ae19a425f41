"""What a session costs a process of its own: ``python -m tests.harness.peak PORT SECONDS_A_LOOK``.

Owns the measuring of memory as the kernel sees it (VmHWM), with the limits that
an installation has by default. ``measure`` starts the process and reads what it
found. ``SECONDS_A_LOOK`` is by how much each look at its clock moves it on: 0 is
the real clock; hours of a dripping server go by in a moment otherwise.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from archiver.pop3 import Endpoint, Entry, Limits, Mailbox, Pop3Error, Tls
from archiver.settings import Settings

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Cost:
    """``octets`` above what the process had before it connected; ``clock_seconds`` by its own clock.

    ``kind`` and ``limit`` are those of the error that ended the session, None
    where it went well and ``listed`` so many messages.
    """

    octets: int
    seconds: float
    clock_seconds: float
    listed: int | None = None
    kind: str | None = None
    limit: str | None = None


def measure(port: int, *, seconds_a_look: float = 0.0) -> Cost:
    """Log in at the port of this machine, list, and fetch the first message, in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.peak", str(port), str(seconds_a_look)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return Cost(**json.loads(done.stdout))


def default_limits() -> Limits:
    """The limits of an installation that sets none."""
    settings = Settings.model_construct()
    return Limits(
        listing_lines=settings.listing_lines,
        listing_bytes=settings.listing_bytes,
        message_bytes=settings.message_bytes,
        status_line_bytes=settings.status_line_bytes,
        session_seconds=2 * settings.session_seconds,
    )


class _Nothing:
    def write(self, _: bytes, /) -> None: ...


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _clock(seconds_a_look: float) -> Callable[[], float]:
    if not seconds_a_look:
        return time.monotonic
    now = 0.0

    def look() -> float:
        nonlocal now
        now += seconds_a_look
        return now

    return look


def main() -> None:
    """Measure one session and write the cost as JSON."""
    port, monotonic = int(sys.argv[1]), _clock(float(sys.argv[2]))
    limits = default_limits()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started, began = _status("VmHWM"), time.monotonic(), monotonic()
    found: dict[str, object] = {}
    try:
        endpoint = Endpoint("localhost", port, Tls.NONE, "user")
        with Mailbox.connect(endpoint, limits=limits, monotonic=monotonic) as mailbox:
            mailbox.login("secret")
            listing = mailbox.list()
            found["listed"] = len(listing.entries)
            first = [Entry(1, None, None)]
            for _ in mailbox.retrieve(first, lambda _: _Nothing()):
                pass
            with suppress(Pop3Error):
                mailbox.quit()
    except Pop3Error as error:
        found |= {"kind": error.kind.value, "limit": error.limit}
    cost = Cost(_status("VmHWM") - before, time.monotonic() - started, monotonic() - began, **found)  # type: ignore[arg-type]
    json.dump(asdict(cost), sys.stdout)


if __name__ == "__main__":
    main()

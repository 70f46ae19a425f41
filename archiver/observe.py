"""The names of metrics, and the format of the log.

A poll writes one log line when it ends (``poll.ended``). Lines are JSON, one
object per line on standard error. Event names are ``noun.verb``, metric names
begin with ``archiver_``; docs/reference/events-and-metrics.md lists both.
Neither ever contains a secret.
"""

import atexit
import json
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from io import TextIOBase
from typing import Any, TextIO, cast

import structlog
from prometheus_client import Counter, Gauge, Histogram

from archiver.printable import printable

POLLS = Counter("archiver_polls", "Polls that ended, by outcome.", ["outcome"])
POLL_SECONDS = Histogram(
    "archiver_poll_seconds",
    "Duration of polls, in seconds.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
POLLS_RUNNING = Gauge("archiver_polls_running", "Polls that are running in this process.")
CAPTURED = Counter("archiver_messages_captured", "Messages that were archived.")
CAPTURED_BYTES = Counter(
    "archiver_captured_bytes",
    "Bytes that were read from mail servers and stored, including those of messages that were known.",
)
DELETE_REQUESTED = Counter(
    "archiver_messages_delete_requested", "Messages that mail servers were asked to delete."
)
ACCOUNTS = Gauge("archiver_accounts", "Accounts in the database, by state.", ["state"])
QUARANTINED = Gauge("archiver_messages_quarantined", "Messages in quarantine, in the whole database.")
LOST = Counter(
    "archiver_messages_lost", "Messages that disappeared from mail servers before they were archived."
)
LATE = Gauge(
    "archiver_accounts_late",
    "Accounts without a successful poll for longer than scheduled, in the whole database.",
)
DELETION_SUSPENDED = Gauge(
    "archiver_accounts_deletion_suspended",
    "Accounts with deletion suspended until an operator confirms, in the whole database.",
)
HOSTS_FAILING = Gauge("archiver_hosts_failing", "Mail hosts that polls fail to reach, in the whole database.")
OVERDUE_SECONDS = Gauge(
    "archiver_overdue_seconds",
    "Seconds by which the most overdue account is late, in the whole database. NaN while it is unreachable.",
)
TOKEN_REQUESTS = Counter(
    "archiver_token_requests",
    "Requests for OAuth access tokens, by result: ok, refused (access revoked or secret expired), failed.",
    ["result"],
)
HEARTBEATS_FAILED = Counter("archiver_heartbeats_failed", "Lease renewals that the database refused.")


LOG_LINES_DROPPED = Counter(
    "archiver_log_lines_dropped", "Log lines that were not written because standard error was full or failed."
)

QUEUED_LINES = 10_000
"""Lines that wait for a standard error that is not read. Further lines are dropped and counted."""
QUEUED_CHARACTERS = 4 * 1024 * 1024
"""The same, in characters: a line with a traceback is long."""
LEAVE_SECONDS = 2.0
"""How long an exit waits for a standard error that takes nothing."""


class Lines(TextIOBase):
    """A stream whose writes never wait: a thread hands the text to a file descriptor.

    Archiving must not depend on the log. A full disk, a closed pipe or a pipe that
    is not read costs lines, which are counted, and nothing else.
    """

    def __init__(
        self,
        descriptor: int,
        on_gap: Callable[[int], None],
        *,
        lines: int = QUEUED_LINES,
        characters: int = QUEUED_CHARACTERS,
    ) -> None:
        """``on_gap`` receives the number of lines that were dropped, once there is room again."""
        super().__init__()
        self._on_gap = on_gap
        self._descriptor = descriptor
        self._lines_at_most = lines
        self._characters_at_most = characters
        self._waiting: deque[str] = deque()
        self._characters = 0
        self._written = 0
        self._dropped_since = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="log", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in typeshed
        return "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, text: str) -> int:
        """Hand over the text, one or more whole lines, or drop it. Returns at once."""
        with self._changed:
            if (
                len(self._waiting) >= self._lines_at_most
                or self._characters + len(text) > self._characters_at_most
            ):
                self._dropped_since += 1
                LOG_LINES_DROPPED.inc()
            elif text:
                self._waiting.append(text)
                self._characters += len(text)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Nothing: the thread never delays what it has."""

    def drain(self, still_seconds: float = LEAVE_SECONDS) -> bool:
        """Wait until all is written, or nothing was for ``still_seconds``. Returns whether all is written."""
        with self._changed:
            while self._characters:
                if not self._changed.wait_for(partial(self._went_on, self._written), still_seconds):
                    return False
            return True

    def _went_on(self, before: int) -> bool:
        return self._written != before

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                text = self._waiting.popleft()
            if not self._put(text):
                LOG_LINES_DROPPED.inc()
            dropped = 0
            with self._changed:
                self._characters -= len(text)
                self._written += 1
                # Not while lines are still lost: that would be a line for each line.
                if len(self._waiting) <= self._lines_at_most // 2:
                    dropped, self._dropped_since = self._dropped_since, 0
                self._changed.notify_all()
            if dropped:
                self._on_gap(dropped)

    def _put(self, text: str) -> bool:
        left = printable(text).encode()
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError:
                return False
        return True


def get_logger() -> Any:
    """The project's logger. Keyword arguments become fields of the line."""
    return structlog.get_logger("archiver")


def _report_gap(lines: int) -> None:
    log = get_logger()
    log.warning("log.dropped", lines=lines)


def log_json(level: str) -> Lines:
    """Log to standard error from now on, libraries included, as one JSON object per line.

    Standard error itself becomes the stream that never waits, so that nothing else
    that writes there can block a thread. An orderly exit waits for the last lines;
    ``os._exit`` needs a ``drain`` before it.
    """
    lines = Lines(sys.stderr.fileno(), _report_gap)
    sys.stderr.flush()
    sys.stderr = cast(TextIO, lines)
    atexit.register(lines.drain)
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
    ]
    # json.dumps would create an encoder for each line.
    encode = json.JSONEncoder(default=str).encode
    rendered: list[Any] = [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(serializer=lambda event, **_: encode(event)),
    ]
    # Our lines bypass logging's records, which would add a twentieth to the cost of an idle poll.
    structlog.configure(
        processors=[*shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, lines)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Only the problems of libraries matter here, not their progress.
    root.setLevel(logging.WARNING)
    # A late tick on a busy machine is harmless: the next one does its work.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    return lines


def log_quietly() -> None:
    """Discard the log. For commands whose output is for people and has all that they need."""
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("archiver").setLevel(logging.ERROR)

"""The names of metrics, and the format of the log.

A poll writes one log line when it ends (``poll.ended``). Lines are JSON, one
object per line on standard error. Event names are ``noun.verb``, metric names
begin with ``archiver_``; docs/reference/events-and-metrics.md lists both.
Neither ever contains a secret.
"""

import json
import logging
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog
from prometheus_client import Counter, Gauge, Histogram

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


class _Forgiving:
    """A stream that ignores write errors, such as a full disk or a closed pipe.

    The standard library's logging does the same. Archiving must not depend on the log.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def get_logger() -> Any:
    """The project's logger. Keyword arguments become fields of the line."""
    return structlog.get_logger("archiver")


def log_json(level: str) -> None:
    """Log to standard error from now on, libraries included, as one JSON object per line."""
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
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _Forgiving(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
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


def log_quietly() -> None:
    """Discard the log. For commands whose output is for people and has all that they need."""
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("archiver").setLevel(logging.ERROR)

"""The names of logs and metrics, and where they go.

One canonical log line a poll (``poll.ended``), one JSON object a line on
standard error. Event names are ``noun.verb``. Metrics begin with
``archiver_``; docs/operations.md says which ones to alert on. Nothing here is
ever given a secret.
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
    "How long polls took.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
POLLS_RUNNING = Gauge("archiver_polls_running", "Polls under way in this process.")
CAPTURED = Counter("archiver_messages_captured", "Messages captured.")
CAPTURED_BYTES = Counter("archiver_captured_bytes", "Bytes read from mail servers and stored.")
DELETE_REQUESTED = Counter(
    "archiver_messages_delete_requested", "Messages that servers were asked to delete."
)
ACCOUNTS = Gauge("archiver_accounts", "Accounts in the database, by state.", ["state"])
QUARANTINED = Gauge("archiver_messages_quarantined", "Messages on mail servers that are in quarantine.")
LOST = Counter("archiver_messages_lost", "Messages that were gone from mail servers before we had them.")
LATE = Gauge(
    "archiver_accounts_late", "Accounts into whose mailbox nobody has looked for longer than planned."
)
DELETION_SUSPENDED = Gauge(
    "archiver_accounts_deletion_suspended", "Accounts of which nothing is deleted until somebody has looked."
)
HOSTS_FAILING = Gauge("archiver_hosts_failing", "Mail hosts in trouble.")
OVERDUE_SECONDS = Gauge("archiver_overdue_seconds", "How long the longest waiting account is due.")
TOKEN_REQUESTS = Counter(
    "archiver_token_requests", "Requests for OAuth access tokens, by result: ok, refused, failed.", ["result"]
)
HEARTBEATS_FAILED = Counter("archiver_heartbeats_failed", "Renewals of leases that the database refused.")


class _Forgiving:
    """A stream whose writer goes on where it cannot be written to: a full disk, a reader that went away.

    As logging does it: whether mail is archived must not hang on its log.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: it was closed
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def get_logger() -> Any:
    """The logger of this project: keyword arguments become fields."""
    return structlog.get_logger("archiver")


def log_json(level: str) -> None:
    """Have everything logged in this process, libraries too, as a JSON object a line on standard error."""
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
    ]
    # json.dumps would make an encoder for each line.
    encode = json.JSONEncoder(default=str).encode
    rendered: list[Any] = [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(serializer=lambda event, **_: encode(event)),
    ]
    # Our own lines do without logging's records: one a poll, they would cost a twentieth of an idle one.
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
    # Libraries speak up for what goes wrong; their progress is not ours.
    root.setLevel(logging.WARNING)
    # A tick that is late on a busy machine is made up for by the next one.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)


def log_quietly() -> None:
    """For commands that talk to people: what matters is in their output; a log goes nowhere."""
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("archiver").setLevel(logging.ERROR)

"""What one poll did, as JSON: the same names in ``sync --json``, ``account show --json`` and the log.

Fields are only ever added.
"""

from dataclasses import asdict
from typing import Any

from archiver.db.overview import PastPoll
from archiver.model import Counts, PollReport


def counts_json(counts: Counts, to_come: int | None) -> dict[str, int | None]:
    """The counts of messages by their names for scripts, with what is still to come of the listing."""
    numbers = asdict(counts)
    of_listing = {name: numbers[name] for name in ("new", "known", "quarantined")}
    del numbers["fetched_bytes"]
    return of_listing | {"to_come": to_come} | numbers


def report_json(report: PollReport) -> dict[str, Any]:
    """A poll of this run, in the form that scripts rely on."""
    return {
        "account": report.account,
        "outcome": report.outcome,
        "listed": report.listed or 0,
        **counts_json(report.counts, report.to_come or 0),
        "bytes": report.counts.fetched_bytes,
        "seconds": round(report.seconds, 3),
        "error": report.error,
        "warnings": report.warnings,
    }


def past_json(poll: PastPoll) -> dict[str, Any]:
    """An earlier poll, from the database."""
    return {
        "token": poll.token,
        "ended_at": poll.ended_at,
        "outcome": poll.outcome,
        "listed": poll.listed,
        **counts_json(poll.counts, poll.to_come),
        "glanced": poll.glanced,
        "bytes": poll.counts.fetched_bytes,
        "seconds": round(poll.seconds, 3),
        "error": poll.error,
    }

"""The feed: what happened to captures, in one order."""

import json
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import bulk
from archiver.db.tables import event
from archiver.model import (
    Resolved,
    Segment,
    What,
    capture_id,
    message_key,
    uidl_text,
)

FEED_LOCK = 0x61726368
"""The advisory lock that orders the feed on PostgreSQL: "arch" in ASCII."""


class Event(NamedTuple):
    """One event. ``body`` is JSON text: what a consumer gets beside position, kind and time."""

    position: int
    kind: str
    account_id: str
    at: datetime
    body: str


_EVENTS = sa.select(event.c.position, event.c.kind, event.c.account_id, event.c.at, event.c.body)


def read(connection: Connection, *, after: int, limit: int) -> list[Event]:
    """The events behind a position, in order."""
    query = _EVENTS.where(event.c.position > after).order_by(event.c.position).limit(limit)
    return [Event(*row) for row in connection.execute(query)]


def publish(connection: Connection, rows: list[dict[str, Any]]) -> None:
    """Append to the feed, so that a reader who has seen a position has seen all before it.

    Positions are assigned at the insert, but become visible at the commit, and
    commits may come in another order: a reader would pass an event by. So on
    PostgreSQL writers take turns, from here to their commit. That is why this is a
    transaction's last step. SQLite has one writer anyway.
    """
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(FEED_LOCK)))
    _NEW_EVENTS.run(connection, rows)


def of_segment(written: Segment, *, begins_epoch: bool) -> list[dict[str, Any]]:
    """The rows of the events that a journal segment brings, in the order of its lines."""
    told = [line for line in written.lines if line.what in (What.CAPTURED, What.QUARANTINED)]
    first = [_epoch_row(written)] if begins_epoch else []
    return first + [_line_row(written, line) for line in told]


# One encoder for all: json.dumps would make one for each event.
_document = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def _line_row(written: Segment, line: Resolved) -> dict[str, Any]:
    body: dict[str, Any] = {
        "account": written.account_name,
        "account_id": written.account_id,
        "uidl": uidl_text(line.sighting.uidl),
        "epoch": written.epoch,
        "token": written.token,
        "segment": written.sequence,
    }
    if line.sha256 is not None:
        body |= {
            "capture": capture_id(written.account_id, line.sha256),
            "sha256": line.sha256.hex(),
            "size": line.size,
            "key": message_key(written.account_id, line.sha256),
            "version_id": line.version_id,
        }
    if line.reason is not None:
        body["reason"] = line.reason
    return {
        "kind": line.what.value,
        "account_id": written.account_id,
        "at": line.resolved_at,
        "body": _document(body),
    }


def _epoch_row(written: Segment) -> dict[str, Any]:
    body = {
        "account": written.account_name,
        "account_id": written.account_id,
        "epoch": written.epoch,
        "token": written.token,
        "segment": written.sequence,
        "listed": written.listing_count,
    }
    return {
        "kind": "epoch_began",
        "account_id": written.account_id,
        "at": written.written_at,
        "body": _document(body),
    }


_NEW_EVENTS = bulk.insert(event, ("kind", "account_id", "at", "body"))

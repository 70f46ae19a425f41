"""The feed: the ordered stream of what happened to captures, for those who search them.

Events are written in the transaction of the captures they tell of. A position
only grows, and whoever has read up to one has missed none below it
(``db.record.publish`` sees to that), so a reader needs to remember one number.
"""

import json
from collections.abc import Iterator
from typing import Any

from archiver.db import Database, events

PAGE_EVENTS = 500


def page(database: Database, *, after: int, limit: int = PAGE_EVENTS) -> list[dict[str, Any]]:
    """Up to ``limit`` events behind a position, in order, each as a mapping that JSON can hold.

    Every event has ``position``, ``event`` (captured, quarantined, epoch),
    ``at``, ``account``, ``account_id``, ``epoch``, ``poll`` and ``segment``, and
    if it tells of a message ``uidl``; a captured one also ``capture``,
    ``sha256``, ``size``, ``key``, ``version_id``; that of an epoch ``listed``.
    """
    with database.reading() as connection:
        rows = events.read(connection, after=after, limit=limit)
    return [
        {"position": row.position, "event": row.kind, "at": row.at.isoformat(), **json.loads(row.body)}
        for row in rows
    ]


def backlog(database: Database, *, after: int) -> Iterator[dict[str, Any]]:
    """Every event behind a position that is there by now, page by page."""
    while events := page(database, after=after):
        yield from events
        after = events[-1]["position"]

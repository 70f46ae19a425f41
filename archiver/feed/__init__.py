"""The feed: the ordered stream of what happened to captures, for a compliance search.

Events are written in the same transaction as the captures that they describe.
Positions only grow, and a reader that has read up to one has missed none below it
(``db.events.publish`` ensures that). So a consumer needs to remember one number.
"""

import json
from collections.abc import Iterator
from typing import Any

from archiver.db import Database
from archiver.db import events as outbox

PAGE_EVENTS = 500


def page(database: Database, *, after: int, limit: int = PAGE_EVENTS) -> list[dict[str, Any]]:
    """Up to ``limit`` events behind a position, in order, each as a mapping that JSON can hold.

    Every event has ``position``, ``event`` (captured, quarantined, epoch_began), ``at``,
    ``account``, ``account_id``, ``epoch``, ``token`` and ``segment``. An event about a
    message has ``uidl``, and if it is captured ``capture``, ``sha256``, ``size``, ``key``
    and ``version_id``. The event of an epoch has ``listed``.
    """
    with database.reading() as connection:
        rows = outbox.read(connection, after=after, limit=limit)
    return [
        {"position": row.position, "event": row.kind, "at": row.at.isoformat(), **json.loads(row.body)}
        for row in rows
    ]


def backlog(database: Database, *, after: int) -> Iterator[dict[str, Any]]:
    """Every event behind a position that exists by now, page by page."""
    while events := page(database, after=after):
        yield from events
        after = events[-1]["position"]

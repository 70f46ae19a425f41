"""Mail hosts: how many sessions each may have, and which are in trouble.

The table has a row for each host in trouble, and none for a healthy one. Polls
that could not even begin are counted there. From some number on the host backs
off: no account of it is polled until a time, and then one poll tries it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from archiver.db import later, now
from archiver.db.tables import host
from archiver.policy import host_retry_seconds


@dataclass(frozen=True, slots=True)
class HostSessions:
    """Sessions that a mail host may have at once, over all workers: ``others`` unless ``named`` has it."""

    others: int = 20
    named: Mapping[str, int] = field(default_factory=dict)

    def of(self, name: str) -> int:
        return self.named.get(name, self.others)


DEFAULT_SESSIONS = HostSessions()


class Trouble(NamedTuple):
    """A host at which polls could not begin. Until it backs off, it has no ``retry_at``."""

    host: str
    failures: int
    failing_since: datetime
    retry_at: datetime | None
    error: str | None


def troubles(connection: Connection, name: str | None = None, *, limit: int | None = None) -> list[Trouble]:
    """The hosts in trouble, or this one if it is, the longest in trouble first."""
    query = sa.select(host).order_by(host.c.failing_since, host.c.name).limit(limit)
    if name is not None:
        query = query.where(host.c.name == name)
    return [Trouble(*row) for row in connection.execute(query)]


def reached(connection: Connection, name: str) -> bool:
    """Note that a poll of this host could begin; returns whether that ends a trouble."""
    return connection.execute(sa.delete(host).where(host.c.name == name)).rowcount > 0


def unreached(
    connection: Connection, name: str, error: str | None, uniform: Callable[[float, float], float]
) -> Trouble | None:
    """Note that a poll of this host could not begin; returns the trouble when the host backs off by that.

    Polls that began before the host backed off are not counted.
    """
    current = now(connection)
    insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(host)
    failures = connection.execute(
        insert.values(name=name, failures=1, failing_since=current, error=error)
        .on_conflict_do_update(
            index_elements=["name"],
            set_={"failures": host.c.failures + 1, "error": error},
            where=sa.or_(host.c.retry_at.is_(None), host.c.retry_at <= current),
        )
        .returning(host.c.failures)
    ).scalar()
    wait_seconds = None if failures is None else host_retry_seconds(failures, uniform)
    if wait_seconds is None:
        return None
    row = connection.execute(
        sa.update(host)
        .where(host.c.name == name)
        .values(retry_at=later(connection, wait_seconds))
        .returning(*host.c)
    ).one()
    return Trouble(*row)

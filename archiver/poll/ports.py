"""What a poll works with, and within which limits.

Values and ports, no more: the parts are made in ``bootstrap.py``, and what is
done with them is ``archiver.poll``'s story.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from archiver import pop3
from archiver.db import Database
from archiver.model import Account, Claim
from archiver.store import Store
from archiver.store.spool import Spool


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """A batch closes on whichever comes first, so that a crash repeats little."""

    messages: int = 100
    total_bytes: int = 32 * 1024 * 1024
    seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Budget:
    """What one poll may fetch, and what one account may in a day (UTC) unless it says so itself.

    A poll that went on for ``slice_seconds`` ends when others wait for its
    thread or its host. ``ends_at`` is when the account's next blackout begins.
    One message is fetched at least, however large: a budget slows down, and
    does not stop.
    """

    messages: int | None = None
    total_bytes: int | None = None
    day_bytes: int | None = None
    slice_seconds: float = 60.0
    ends_at: datetime | None = None


class Watch(Protocol):
    """Told of a poll's progress while it goes on."""

    def listed(self, listed: int, to_fetch: int, total_bytes: int | None) -> None:
        """The listing was read: so many messages on the server, so many (of so many bytes) to fetch."""

    def fetched(self, message_bytes: int) -> None:
        """One message more was read from the server."""


class Unwatched:
    """Nobody looks."""

    def listed(self, listed: int, to_fetch: int, total_bytes: int | None) -> None: ...
    def fetched(self, message_bytes: int) -> None: ...


class Lease(Protocol):
    """The right to poll, while it lasts."""

    @property
    def claim(self) -> Claim: ...

    def check(self) -> None:
        """Raises LeaseLost when so much time has gone by without a renewal that another may hold it soon."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What a poll works with. ``connect`` opens a session with an account's server, not yet logged in.

    ``another_password`` is asked for one in place of that which the server
    refused; None where there is no other: an access token can be had anew, a
    password cannot.
    ``stopping`` tells that the process wants to end: what is under way is
    finished, nothing more is asked for. ``session_seconds`` is when a poll of a
    large mailbox makes room for others. ``full_listing_seconds`` is how long a
    mailbox that looks unchanged is not listed, nor one that grew by so little that
    ``spared_lines`` of a listing are spared for each new message. With ``forbid_deletion`` nothing
    is deleted from any server, whatever the accounts say. ``make_room`` asks
    whether others wait; a poll that is told so ends.
    """

    connect: Callable[[Account], pop3.Session]
    password: Callable[[Account], str]
    store: Store
    database: Database
    spool: Spool
    uploads: Executor
    now: Callable[[], datetime]
    monotonic: Callable[[], float]
    stopping: Callable[[], bool]
    batch: BatchLimits = BatchLimits()
    session_seconds: float = 1800.0
    full_listing_seconds: float = 4 * 3600.0
    spared_lines: int = 100
    forbid_deletion: bool = False
    uniform: Callable[[float, float], float] = lambda low, high: (low + high) / 2
    another_password: Callable[[Account, str], str | None] = lambda _account, _refused: None
    check_store: Callable[[], None] = lambda: None
    """Raises OperatorNeeded when the store is not the one that the database belongs to."""
    budget: Budget = Budget()
    make_room: Callable[[], bool] = lambda: False

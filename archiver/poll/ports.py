"""The ports that a poll works with, and its limits.

Nothing but values and ports. ``bootstrap.py`` makes the parts, and ``archiver.poll``
uses them.
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
    """How much a poll may fetch; None where there is no limit.

    One message is always fetched, however large: a budget delays, but never stops.
    """

    messages: int | None = None
    """Messages in one poll."""
    total_bytes: int | None = None
    """Bytes in one poll."""
    day_bytes: int | None = None
    """Bytes in one day (UTC), for an account without a limit of its own."""
    slice_seconds: float = 60.0
    """A poll that has lasted this long ends when others wait for its thread or its host."""
    ends_at: datetime | None = None
    """When the account's next blackout begins."""


class Watch(Protocol):
    """Receives a poll's progress."""

    def listed(self, listed: int, to_fetch: int, total_bytes: int | None) -> None:
        """The listing was read: messages on the server, messages to fetch, and their bytes if known."""

    def fetched(self, message_bytes: int) -> None:
        """One more message was read from the server."""


class Unwatched:
    """Discards the progress."""

    def listed(self, listed: int, to_fetch: int, total_bytes: int | None) -> None: ...
    def fetched(self, message_bytes: int) -> None: ...


class Lease(Protocol):
    """The right to poll, while it lasts."""

    @property
    def claim(self) -> Claim: ...

    def check(self) -> None:
        """Raises LeaseLost if the lease was not renewed for so long that another worker may get it soon."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What a poll works with."""

    connect: Callable[[Account], pop3.Session]
    """Opens a session with an account's server, not yet logged in."""
    password: Callable[[Account], str]
    store: Store
    database: Database
    spool: Spool
    uploads: Executor
    """Threads for uploads, recordings and checks of the store."""
    now: Callable[[], datetime]
    monotonic: Callable[[], float]
    stopping: Callable[[], bool]
    """Whether the process is to end. Then a poll finishes what it has asked for and stops asking."""
    batch: BatchLimits = BatchLimits()
    session_seconds: float = 1800.0
    """After this time a poll of a large mailbox stops fetching, so that other accounts get their turn."""
    full_listing_seconds: float = 4 * 3600.0
    """Longest time between full listings of a mailbox that looks unchanged, or only grew."""
    spared_lines: int = 100
    """Lines of a full listing that an incremental one must spare for each new message."""
    forbid_deletion: bool = False
    """Delete nothing from any server, whatever the accounts say."""
    uniform: Callable[[float, float], float] = lambda low, high: (low + high) / 2
    another_password: Callable[[Account, str], str | None] = lambda _account, _refused: None
    """Another password in place of the refused one, or None. Only access tokens can be renewed."""
    check_store: Callable[[], None] = lambda: None
    """Raises OperatorNeeded when the store is not the one that the database belongs to."""
    budget: Budget = Budget()
    make_room: Callable[[], bool] = lambda: False
    """Whether this poll is to end now because others wait."""

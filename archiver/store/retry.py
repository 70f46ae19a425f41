"""Repeats store calls that may succeed a moment later. No other module repeats them.

Wraps any store. Promises a bounded number of attempts in a bounded time, with
full jitter between them. Only ``TryLater`` is repeated; every other error
passes at once. Results that a caller already has stay valid: ``get`` repeats
only its opening, and ``list`` continues after the last object it returned.

Where the other side asks for a wait, the wait is honoured. A wait longer than
the time left is not: the error then goes to the caller, who can wait.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TypeVar

from archiver import observe
from archiver.errors import TryLater
from archiver.store import Body, PutResult, Store, StoredObject

__all__ = ["RetryingStore"]

_Result = TypeVar("_Result")

# Objects requested at a time: one page of S3. After a failure, at most one page is listed again.
_LIST_BATCH = 1000


class RetryingStore:
    """``store``, called up to ``attempts`` times within about ``total_seconds``.

    The wait before attempt n + 1 is drawn evenly from 0 to ``base_seconds`` *
    2 ** (n - 1), capped at ``most_seconds``. With the defaults the waits are at
    most 0.2, 0.4 and 0.8 seconds; longer outages are left to the schedule.
    ``total_seconds`` bounds when the last attempt starts, not how long it takes.
    """

    def __init__(
        self,
        store: Store,
        attempts: int = 4,
        *,
        base_seconds: float = 0.2,
        most_seconds: float = 5,
        total_seconds: float = 60,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._attempts = attempts
        self._base_seconds = base_seconds
        self._most_seconds = most_seconds
        self._total_seconds = total_seconds
        self._sleep = sleep
        self._uniform = uniform
        self._monotonic = monotonic

    @property
    def url(self) -> str:
        return self._store.url

    def put(self, key: str, body: Body) -> PutResult:
        return self._repeat("put", lambda: self._store.put(key, body))

    @contextmanager
    def get(self, key: str) -> Iterator[Iterator[bytes]]:
        with ExitStack() as stack:
            yield self._repeat("get", lambda: stack.enter_context(self._store.get(key)))

    def stat(self, key: str) -> StoredObject | None:
        return self._repeat("stat", lambda: self._store.stat(key))

    def probe(self) -> None:
        self._repeat("probe", self._store.probe)

    def list(self, prefix: str, *, after: str = "", strangers: bool = False) -> Iterator[StoredObject]:
        def start(last: str) -> Iterator[StoredObject]:
            return self._store.list(prefix, after=last, strangers=strangers)

        return self._batches(start, lambda stored: stored.key, after)

    def names(self, prefix: str, *, after: str = "") -> Iterator[str]:
        return self._batches(lambda last: self._store.names(prefix, after=last), str, after)

    def _batches(
        self, start: Callable[[str], Iterator[_Result]], key_of: Callable[[_Result], str], last: str
    ) -> Iterator[_Result]:
        """What ``start`` lists after ``last``, requested in batches. Each batch is repeated by itself."""
        rest: Iterator[_Result] | None = None

        def next_batch() -> tuple[_Result, ...]:
            nonlocal rest
            try:
                rest = rest or start(last)
                return tuple(islice(rest, _LIST_BATCH))
            except TryLater:
                rest = None  # a generator that raised yields nothing more
                raise

        while batch := self._repeat("list", next_batch):
            last = key_of(batch[-1])
            yield from batch

    def _repeat(self, verb: str, call: Callable[[], _Result]) -> _Result:
        started = self._monotonic()
        attempt = 1
        while True:
            try:
                return call()
            except TryLater as error:
                wait_seconds = self._wait_seconds(attempt, error)
                starts_after = self._monotonic() - started + wait_seconds
                if attempt >= self._attempts or starts_after > self._total_seconds:
                    raise
                observe.get_logger().warning(
                    "store.call_repeated",
                    verb=verb,
                    store=self.url,
                    attempt=attempt,
                    wait_seconds=round(wait_seconds, 3),
                    error=str(error),
                )
            self._sleep(wait_seconds)
            attempt += 1

    def _wait_seconds(self, attempt: int, error: TryLater) -> float:
        """How long to wait after attempt number ``attempt`` failed with ``error``."""
        most = min(self._most_seconds, self._base_seconds * 2 ** (attempt - 1))
        return (error.wait_seconds or 0) + self._uniform(0, most)

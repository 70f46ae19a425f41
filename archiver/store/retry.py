"""Repeats what may work a moment later. The only place where a store's call is repeated.

Wraps any store. Promises a bounded number of attempts in a bounded time, with
full jitter between them, and that whatever is not ``TryLater`` passes at once.
Nothing that was handed to a caller is taken back: ``get`` repeats only its
opening, ``list`` goes on behind the last object it gave.

A wait that the other side asked for is kept, or, where it is longer than the
time that is left, passed on with the error to those who can wait.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TypeVar

import structlog
import tenacity

from archiver.errors import TryLater
from archiver.store import Body, PutResult, Store, StoredObject

__all__ = ["RetryingStore"]

_Result = TypeVar("_Result")

# Objects asked for at a time: a page of S3. What a failure in the midst makes us list again.
_LIST_BATCH = 1000

_log = structlog.get_logger(__name__)


class RetryingStore:
    """``store``, asked up to ``attempts`` times within about ``total_seconds``.

    The wait before attempt n + 1 is drawn evenly from 0 to ``base_seconds`` *
    2 ** (n - 1), at most ``most_seconds``. (The default: at most .2, .4 and .8
    seconds; a store that is away for longer is the schedule's affair.)
    ``total_seconds`` bounds when the last attempt begins, not how long it takes.
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

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        last = after
        rest: Iterator[StoredObject] | None = None

        def next_batch() -> tuple[StoredObject, ...]:
            nonlocal rest
            try:
                rest = rest or self._store.list(prefix, after=last)
                return tuple(islice(rest, _LIST_BATCH))
            except TryLater:
                rest = None  # an iterator that failed is at its end
                raise

        while batch := self._repeat("list", next_batch):
            last = batch[-1].key
            yield from batch

    def _repeat(self, verb: str, call: Callable[[], _Result]) -> _Result:
        started = self._monotonic()
        try:
            return call()  # as a rule that is all; tenacity would cost a third of a small PUT
        except TryLater as error:
            failed = [error]

        def attempt() -> _Result:
            if failed:
                raise failed.pop()  # tenacity takes over from here, and counts it
            return call()

        def wait(state: tenacity.RetryCallState) -> float:
            asked = _failure(state).wait_seconds or 0
            most = min(self._most_seconds, self._base_seconds * 2 ** (state.attempt_number - 1))
            return asked + self._uniform(0, most)

        def stop(state: tenacity.RetryCallState) -> bool:
            begins = self._monotonic() - started + state.upcoming_sleep
            return state.attempt_number >= self._attempts or begins > self._total_seconds

        def log(state: tenacity.RetryCallState) -> None:
            _log.warning(
                "store.call_repeated",
                verb=verb,
                store=self.url,
                attempt=state.attempt_number,
                wait_seconds=round(state.upcoming_sleep, 3),
                error=str(_failure(state)),
            )

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TryLater),
            wait=wait,
            stop=stop,
            sleep=self._sleep,
            before_sleep=log,
            reraise=True,
        )(attempt)


def _failure(state: tenacity.RetryCallState) -> TryLater:
    """What made this repetition necessary; nothing else is ever repeated."""
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, TryLater) else TryLater("no answer")

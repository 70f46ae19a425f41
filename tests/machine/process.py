"""A process that can be stopped, killed and made to fail at each call of each port.

Owns the gate through which every call to mail server, store and database
passes, and the thread that the work runs in. A killed process runs nothing
more: the exception that ends it is nobody's to catch, and every later call
raises it again. A frozen one stands still until it is woken or killed.
"""

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import sqlalchemy as sa

from archiver import pop3
from archiver.db import Database
from archiver.errors import TryLater
from archiver.store import Body, PutResult, Store, StoredObject

T = TypeVar("T")

Fate = Literal["killed", "failing", "frozen", "repeated"]

SETTLE_SECONDS = 60.0
"""No step takes so long: a process that does not settle hangs."""


class Killed(BaseException):
    """The process was killed here."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What befalls a process at the ``nth`` call of this name (of any, where the name is empty).

    ``after`` means that the call has done its work, and its answer is lost.
    """

    fate: Fate
    name: str
    nth: int
    after: bool = False


class Passage(Protocol):
    """Where the calls of one process pass: ``mail.list``, ``store.put journal``, ``db.commit`` and others."""

    def passing(self, name: str, *, may_freeze: bool = True) -> AbstractContextManager[None]:
        """Around one call. May raise what ends the process, before the call or after it."""

    def repeats(self, name: str) -> bool:
        """Whether the answer to the next call of this name is lost once, so that the call is repeated."""


class Gate:
    """A ``Passage`` where each call may meet its fate. ``calls`` has their names."""

    def __init__(self, turns: list[Turn], stand_still: Callable[[str], None]) -> None:
        self.turns = turns
        self.calls: list[str] = []
        self.killed = False
        self._times: Counter[str] = Counter()
        self._stand_still = stand_still

    @contextmanager
    def passing(self, name: str, *, may_freeze: bool = True) -> Iterator[None]:
        if self.killed:
            raise Killed(name)
        of_name, of_all = self._times[name], len(self.calls)
        self._times[name] += 1
        self.calls.append(name)
        here = [turn for turn in self.turns if (turn.name, turn.nth) in {(name, of_name), ("", of_all)}]
        for turn in here:
            if not turn.after:
                self._befall(turn, name, may_freeze)
        yield
        if self.killed:
            raise Killed(name)
        for turn in here:
            if turn.after:
                self._befall(turn, f"after {name}", may_freeze)

    def repeats(self, name: str) -> bool:
        return Turn("repeated", name, self._times[name]) in self.turns

    def _befall(self, turn: Turn, where: str, may_freeze: bool) -> None:
        match turn.fate:
            case "killed":
                self.killed = True
                raise Killed(where)
            case "failing" if not where.removeprefix("after ").startswith("mail."):
                raise TryLater(f"{where}: it fails here")
            case "frozen" if may_freeze:
                self._stand_still(where)
                if self.killed:
                    raise Killed(where)


class Process(Generic[T]):
    """Work that runs in a thread, one step of the test at a time."""

    def __init__(self, turns: list[Turn]) -> None:
        self.gate = Gate(turns, self._stand_still)
        self.frozen_at: str | None = None
        self.result: T | None = None
        self.ended = False
        self._wake = threading.Event()
        self._settled: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def start(self, work: Callable[[], T]) -> None:
        """Return when the work has ended, was killed, or stands still."""
        threading.Thread(target=self._run, args=(work,), daemon=True).start()
        self._settle()

    def go_on(self, turns: list[Turn]) -> None:
        """Wake it up, with new turns: its calls are counted on."""
        self.gate.turns = turns
        self._let_go()

    def kill(self) -> None:
        """End it where it stands."""
        self.gate.killed = True
        self._let_go()

    def _let_go(self) -> None:
        self.frozen_at = None
        self._wake.set()
        self._settle()

    def _settle(self) -> None:
        error = self._settled.get(timeout=SETTLE_SECONDS)
        if error is not None and not isinstance(error, Killed):
            raise error

    def _run(self, work: Callable[[], T]) -> None:
        error: BaseException | None = None
        try:
            self.result = work()
        except BaseException as raised:  # noqa: BLE001 - raised again by whoever waits
            error = raised
        self.ended = True
        self._settled.put(error)

    def _stand_still(self, where: str) -> None:
        self._wake.clear()
        self.frozen_at = where
        self._settled.put(None)
        self._wake.wait()


class Uploads(Executor):
    """Runs what is submitted in the thread of the caller: at once, or late.

    That is when its result is wanted, or when three others wait to be run.
    """

    def __init__(self, *, at_once: bool) -> None:
        self._most = 0 if at_once else 3
        self._waiting: deque[_Task[Any]] = deque()

    def submit(self, call: Callable[..., T], /, *arguments: Any, **named: Any) -> "Future[T]":
        future: _Task[T] = _Task(lambda: call(*arguments, **named))
        self._waiting.append(future)
        while len(self._waiting) > self._most:
            oldest = self._waiting.popleft()
            if not oldest.done():
                oldest.run()
        return future


class _Task(Future[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__()
        self._call = call

    def run(self) -> None:
        if self.set_running_or_notify_cancel():
            try:
                self.set_result(self._call())
            except Exception as error:  # noqa: BLE001 - a future hands every error on
                self.set_exception(error)
            except Killed as error:
                self.set_exception(error)
                raise

    def result(self, timeout: float | None = None) -> T:
        if not self.done():
            self.run()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if not self.done():
            self.run()
        return super().exception(timeout)


class GatedStore:
    """A store whose calls pass the gate."""

    def __init__(self, store: Store, gate: Passage) -> None:
        self._store = store
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, body: Body) -> PutResult:
        name = f"store.put {key.partition('/')[0]}"
        if self._gate.repeats(name):
            self._store.put(key, body)
        with self._gate.passing(name):
            return self._store.put(key, body)

    @contextmanager
    def get(self, key: str) -> Iterator[Iterator[bytes]]:
        with self._gate.passing("store.get"), self._store.get(key) as chunks:
            yield chunks

    def stat(self, key: str) -> StoredObject | None:
        with self._gate.passing("store.stat"):
            return self._store.stat(key)


class GatedDatabase(Database):
    """A database whose transactions pass the gate: before them, before their commit, after it."""

    def __init__(self, url: str, gate: Passage) -> None:
        super().__init__(url, sleep=lambda _: None)
        self._gate = gate

    def transact(self, work: Callable[[sa.Connection], T]) -> T:
        def gated(connection: sa.Connection) -> T:
            result = work(connection)
            # Frozen here it would hold the lock of everybody else's writing.
            with self._gate.passing("db.commit", may_freeze=False):
                return result

        if self._gate.repeats("db.transact"):
            super().transact(work)
        with self._gate.passing("db.transact"):
            return super().transact(gated)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._gate.passing("db.reading"):
            pass
        with super().reading() as connection:
            yield connection


class GatedSession:
    """A session with a mailbox whose verbs, whichever it has, pass the gate."""

    def __init__(self, session: pop3.Session, gate: Passage) -> None:
        self._session = session
        self._gate = gate

    def __enter__(self) -> Self:
        self._session.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, error, trace)

    def close(self) -> None:
        # Of a killed process, the kernel does it.
        self._session.close()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            with self._gate.passing(f"mail.{name}"):
                result = found(*arguments, **named)
            return self._items(name, result) if isinstance(result, Iterator) else result

        return call

    def _items(self, name: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self._gate.passing(f"mail.{name}"):
                item = next(items, None)
            if item is None:
                return
            yield item

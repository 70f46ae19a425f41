"""How sessions wait: each in a thread of its own, or many together in one.

A session waits in two ways. ``until_ready`` waits for its socket. ``aside`` runs
something that blocks: the look-up of a name, or a computation that the server
demands. In an ordinary thread both simply block. In a task of a ``Loop``, the
thread meanwhile goes on with other tasks. So the code of a session reads the
same in both cases. Hundreds of sessions that wait for their servers need one
thread, and the kernel need not wake a thread for each answer.

From one wait to the next, a task delays all others. So a task is for short work
between answers: a handshake, a login, a look at a mailbox.
"""

import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

if TYPE_CHECKING:
    from greenlet import greenlet

ResultT = TypeVar("ResultT")

_WAKE_BYTES: Final = 4096
_MOST_SECONDS: Final = (2**31 - 1) // 1000
"""The longest wait that the system calls accept, in milliseconds. The loop then waits again."""


class _OfThread(threading.local):
    loop: "Loop | None" = None
    """The loop whose tasks run in this thread."""


_of_thread: Final = _OfThread()


def until_ready(descriptor: int, events: int, seconds: float) -> bool:
    """Wait for one of these events of ``selectors``, or an error. False if ``seconds`` passed first."""
    loop = _of_thread.loop
    if loop is not None:
        return loop.suspend_until_ready(descriptor, events, seconds)
    with selectors.PollSelector() as waiting:  # it needs no descriptor of its own, and accepts any number
        waiting.register(descriptor, events)
        return bool(waiting.select(_bounded(seconds)))


def aside(block: Callable[[], ResultT]) -> ResultT:
    """Call ``block``, which may block. A task has another thread call it."""
    loop = _of_thread.loop
    return block() if loop is None else loop.suspend_for(block)


class _Wait(NamedTuple):
    task: "greenlet"
    ends_at: float


class _Busy(NamedTuple):
    """A task that is running now."""

    descriptor: int | None
    """What it waited for last."""
    since: float


class Loop:
    """One thread in which tasks wait together. It starts with the first task.

    ``threads`` run what blocks. Any thread may call ``begin``, ``cut_short`` and
    ``close``; only a task may call ``suspend_until_ready`` and ``suspend_for``.
    """

    def __init__(self, threads: Executor, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._threads = threads
        self._monotonic = monotonic
        self._inbox: deque[Callable[[], object]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_called = self._is_closed = False
        self._selector = selectors.DefaultSelector()
        self._tasks: dict[greenlet, int | None] = {}
        self._busy: _Busy | None = None
        self._waiting: dict[int, _Wait] = {}
        self._look_at = math.inf

    def begin(self, task: Callable[[], object]) -> None:
        """Run a task. What it raises goes to ``threading.excepthook``, as from a thread."""
        self._hand_over(partial(self._start, task))

    def cut_short(self, seconds: float) -> bool:
        """Shut down the connection of a task that delays all others for this long; whether there was one.

        A call of OpenSSL goes on reading as long as a server sends messages that
        OpenSSL handles itself, such as session tickets (RFC 8446 section 4.6.1).
        """
        busy = self._busy
        if busy is None or busy.descriptor is None or self._monotonic() - busy.since < seconds:
            return False
        with suppress(OSError), socket.socket(fileno=os.dup(busy.descriptor)) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        return True

    def close(self) -> None:
        """End the thread, and each task by a GreenletExit where it waits. Returns at once."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            if self._thread is not None and not was_closed:
                self._wake()

    # From any thread.

    def _hand_over(self, what: Callable[[], object]) -> None:
        with self._lock:
            if self._is_closed:
                return
            if self._thread is None:
                self._called, self._call = os.pipe()
                thread = threading.Thread(target=self._run, name="sessions", daemon=True)
                thread.start()
                self._thread = thread
            self._inbox.append(what)
            self._wake()

    def _wake(self) -> None:
        if not self._is_called:
            self._is_called = True
            os.write(self._call, b"!")

    # In the thread. Its own greenlet, the hub, chooses what runs next; a task that waits switches to it.

    def _run(self) -> None:
        from greenlet import getcurrent

        _of_thread.loop = self
        self._hub = getcurrent()
        self._selector.register(self._called, selectors.EVENT_READ)
        while self._goes_on():
            looked_at = self._monotonic()
            for (_, descriptor, _, _), _ in self._selector.select(self._patience(looked_at)):
                if descriptor == self._called:
                    os.read(self._called, _WAKE_BYTES)
                    continue
                self._selector.unregister(descriptor)
                self._switch_to(self._waiting.pop(descriptor).task, True)
            self._end_late_waits(looked_at)
        for task in list(self._tasks):
            self._go_on(task, task.throw)
        with self._lock:
            self._selector.close()
            os.close(self._called)
            os.close(self._call)

    def _goes_on(self) -> bool:
        """Run what other threads handed over; False if the loop is closed."""
        self._is_called = False  # what is handed over from here on wakes this thread again
        while self._inbox and not self._is_closed:
            self._inbox.popleft()()
        return not self._is_closed

    def _patience(self, now: float) -> float:
        return _bounded(self._look_at - now)

    def _end_late_waits(self, looked_at: float) -> None:
        """End the waits whose time had passed before the last look, which found nothing for them.

        If the time passed later, while a task delayed the thread, the answer may
        have arrived meanwhile: the next look decides.
        """
        if looked_at < self._look_at:
            return
        for descriptor, wait in list(self._waiting.items()):
            if wait.ends_at <= looked_at:
                self._selector.unregister(descriptor)
                del self._waiting[descriptor]
                self._switch_to(wait.task, False)
        self._look_at = min((wait.ends_at for wait in self._waiting.values()), default=math.inf)

    def _start(self, task: Callable[[], object]) -> None:
        from greenlet import greenlet

        new = greenlet(task, self._hub)
        self._tasks[new] = None
        self._switch_to(new)

    def _switch_to(self, task: "greenlet", *value: object) -> None:
        self._go_on(task, partial(task.switch, *value))

    def _go_on(self, task: "greenlet", switch: Callable[[], object]) -> None:
        """Let a task go on until it waits again, or ends."""
        self._busy = _Busy(self._tasks.get(task), self._monotonic())
        try:
            switch()
        except BaseException as error:  # noqa: BLE001 - an error of one task must not end the others
            threading.excepthook(
                threading.ExceptHookArgs((type(error), error, error.__traceback__, self._thread))
            )
        self._busy = None
        if task.dead:
            self._tasks.pop(task, None)

    # In a task.

    def suspend_until_ready(self, descriptor: int, events: int, seconds: float) -> bool:
        from greenlet import getcurrent

        ends_at = self._monotonic() + seconds
        task = getcurrent()
        self._selector.register(descriptor, events)
        self._waiting[descriptor] = _Wait(task, ends_at)
        self._tasks[task] = descriptor
        self._look_at = min(self._look_at, ends_at)
        return bool(self._hub.switch())

    def suspend_for(self, block: Callable[[], ResultT]) -> ResultT:
        from greenlet import getcurrent

        task = getcurrent()
        done = self._threads.submit(block)
        done.add_done_callback(lambda _: self._hand_over(partial(self._switch_to, task)))
        self._hub.switch()
        return done.result()


def _bounded(seconds: float) -> float:
    return max(0.0, min(seconds, _MOST_SECONDS))

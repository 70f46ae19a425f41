"""Many sessions in one thread: they wait together, and none is another's trouble."""

import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from archiver.pop3 import Limits, Loop, Mailbox, Pop3Error, aside
from archiver.pop3.loop import until_ready
from tests.harness.scripted_pop3 import MailboxPlay, ScriptedPop3, Send, Stall, Step, Talk

SESSIONS = 30
SOON_SECONDS = 30.0
NEVER_SECONDS = 3600.0

ResultT = TypeVar("ResultT")


class Clock:
    """A monotonic clock that is set."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def loop(threads: ThreadPoolExecutor) -> Iterator[Loop]:
    loop = Loop(threads)
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with_ends = socket.socketpair()
    yield with_ends
    for end in with_ends:
        end.close()


def run(loop: Loop, work: Callable[[], ResultT]) -> "Future[ResultT]":
    """What a task comes to."""
    done: Future[ResultT] = Future()

    def task() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is the test's to look at
            done.set_exception(error)

    loop.begin(task)
    return done


def wait_for(end: socket.socket, seconds: float = NEVER_SECONDS) -> bool:
    return until_ready(end.fileno(), selectors.EVENT_READ, seconds)


def test_sessions_wait_for_their_servers_together_in_one_thread(loop: Loop) -> None:
    """No server greets before each has been called: one after the other, that would never be."""
    all_have_called = threading.Barrier(SESSIONS)
    scripts: list[list[Step]] = [
        [Talk(lambda channel: all_have_called.wait(SOON_SECONDS)), Send(b"+OK\r\n"), Stall()]
        for _ in range(SESSIONS)
    ]
    seen: set[int] = set()

    def call() -> str:
        with Mailbox.connect(server.endpoint, avoid=["CAPA"]) as mailbox:
            seen.add(threading.get_ident())
            return mailbox.facts.greeting

    with ScriptedPop3(scripts) as server:
        calls = [run(loop, call) for _ in range(SESSIONS)]
        assert [each.result(SOON_SECONDS) for each in calls] == [""] * SESSIONS
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_a_whole_session_reads_the_same_in_a_task(loop: Loop) -> None:
    def session() -> bytes | None:
        with Mailbox.connect(server.endpoint) as mailbox:
            mailbox.login("secret")
            seen = mailbox.glance(2)
            mailbox.quit()
            return seen.uidl

    with ScriptedPop3(MailboxPlay([(b"a", b"a\r\n"), (b"b", b"b\r\n")])) as server:
        assert run(loop, session).result(SOON_SECONDS) == b"b"


def test_who_is_not_answered_is_told_so_while_others_go_on(loop: Loop) -> None:
    def silent() -> None:
        Mailbox.connect(dead.endpoint, limits=Limits(greeting_seconds=0.05))

    def longer() -> str:
        with pytest.raises(Pop3Error):
            waiting.result(SOON_SECONDS)
        return "alive"

    with ScriptedPop3([[Stall()]]) as dead:
        waiting = run(loop, silent)
        assert run(loop, lambda: aside(longer)).result(SOON_SECONDS) == "alive"
        with pytest.raises(Pop3Error, match="timed out"):
            waiting.result(SOON_SECONDS)


def test_each_has_its_own_time(
    threads: ThreadPoolExecutor, clock: Clock, pair: tuple[socket.socket, socket.socket]
) -> None:
    """The wait that ends first is reported first, and the others keep their time."""
    loop = Loop(threads, monotonic=clock)
    ours, theirs = pair
    long = run(loop, lambda: wait_for(ours, 100.0))
    short = run(loop, lambda: wait_for(theirs, 10.0))
    run(loop, lambda: setattr(clock, "seconds", clock.seconds + 50.0))
    assert short.result(SOON_SECONDS) is False
    assert not long.done()
    theirs.send(b"!")
    assert long.result(SOON_SECONDS) is True
    loop.close()


@pytest.mark.parametrize("is_answered", [True, False])
def test_no_task_is_late_because_another_delayed_the_thread(
    threads: ThreadPoolExecutor, clock: Clock, is_answered: bool
) -> None:
    """Another is resumed, and goes on beyond the other's time; an answer that comes meanwhile counts."""
    loop = Loop(threads, monotonic=clock)
    with ExitStack() as ends:
        (busy, to_busy), (ours, theirs) = [map(ends.enter_context, socket.socketpair()) for _ in range(2)]
        waiting = run(loop, lambda: wait_for(ours, 10.0))

        def hold_up() -> None:
            wait_for(busy)
            if is_answered:
                theirs.send(b"!")
            clock.seconds += 1000.0

        holding = run(loop, hold_up)
        to_busy.send(b"!")
        holding.result(SOON_SECONDS)
        assert waiting.result(SOON_SECONDS) is is_answered
        loop.close()


def test_who_holds_up_all_others_for_long_loses_its_connection(
    threads: ThreadPoolExecutor, clock: Clock, pair: tuple[socket.socket, socket.socket]
) -> None:
    loop = Loop(threads, monotonic=clock)
    ours, theirs = pair
    reads_on = threading.Event()

    def read_for_ever() -> bytes:
        wait_for(ours)
        ours.recv(1)
        reads_on.set()
        return ours.recv(1)

    reading = run(loop, read_for_ever)
    assert not loop.cut_short(5.0)
    theirs.send(b"!")
    assert reads_on.wait(SOON_SECONDS)
    assert not loop.cut_short(5.0)
    clock.seconds += 6.0
    assert loop.cut_short(5.0)
    assert reading.result(SOON_SECONDS) == b""
    assert run(loop, lambda: "alive").result(SOON_SECONDS) == "alive"
    assert not loop.cut_short(5.0)
    loop.close()


def test_a_wait_may_be_of_any_length(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    waiting = run(loop, lambda: wait_for(ours, 1e9))
    assert run(loop, lambda: "alive").result(SOON_SECONDS) == "alive"
    theirs.send(b"!")
    assert waiting.result(SOON_SECONDS) is True


def test_what_blocks_is_done_by_another_thread(loop: Loop) -> None:
    here = run(loop, threading.get_ident).result(SOON_SECONDS)
    assert run(loop, lambda: aside(threading.get_ident)).result(SOON_SECONDS) != here
    # And back: what comes after it is in the thread of all tasks again.
    back = run(loop, lambda: (aside(threading.get_ident), threading.get_ident())[1])
    assert back.result(SOON_SECONDS) == here


def test_what_blocks_delays_no_other_task(loop: Loop) -> None:
    gate = threading.Event()
    waiting = run(loop, lambda: aside(lambda: gate.wait(SOON_SECONDS)))
    assert run(loop, lambda: "meanwhile").result(SOON_SECONDS) == "meanwhile"
    gate.set()
    assert waiting.result(SOON_SECONDS) is True


def test_what_it_raises_is_raised_in_the_task(loop: Loop) -> None:
    def refuse() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run(loop, lambda: aside(refuse)).result(SOON_SECONDS)


def test_outside_of_a_loop_the_thread_itself_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    assert aside(threading.get_ident) == threading.get_ident()
    assert not wait_for(ours, 0.0)
    theirs.send(b"!")
    assert wait_for(ours)


def test_a_task_that_breaks_is_told_and_ends_no_other(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))
    broken = KeyboardInterrupt("not even an Exception")

    def breaks() -> None:
        raise broken

    loop.begin(breaks)
    assert run(loop, lambda: "alive").result(SOON_SECONDS) == "alive"
    assert told == [broken]


def test_who_waits_when_it_is_closed_ends_there(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    ended = threading.Event()

    def task() -> None:
        try:
            wait_for(ours)
        finally:
            ended.set()

    loop.begin(task)
    run(loop, lambda: None).result(SOON_SECONDS)
    assert not ended.is_set()
    loop.close()
    assert ended.wait(SOON_SECONDS)
    theirs.send(b"!")


def test_a_loop_that_ended_leaves_nothing_open(threads: ThreadPoolExecutor) -> None:
    list(threads.map(lambda _: None, range(10)))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        loop = Loop(threads)
        thread = run(loop, threading.current_thread).result(SOON_SECONDS)
        loop.close()
        loop.close()
        loop.begin(lambda: None)
        thread.join(SOON_SECONDS)
        assert not thread.is_alive()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_one_that_was_never_used_has_no_thread(threads: ThreadPoolExecutor) -> None:
    before = threading.active_count()
    Loop(threads).close()
    assert threading.active_count() == before

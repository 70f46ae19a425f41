"""Nothing that the bench started outlives it, however it ends.

Owns the bench's process: the one that was called starts the one that measures,
adopts whatever that leaves behind (prctl(2), PR_SET_CHILD_SUBREAPER), servers in
sessions of their own included, and kills it. When it is killed itself, the one
that measures is asked to end (PR_SET_PDEATHSIG) and ends its servers in order.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from tests.bench.machine import tree

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENDING_SECONDS = 30.0
_LOOK_SECONDS = 0.05


def supervised(measure: Callable[[], int]) -> int:
    """Run ``measure`` in a child; returns its exit code when nothing of it is left. Needs Linux."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        for ending in _ENDINGS:
            signal.signal(ending, _end)
        return measure()
    asked_at: list[float] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        asked_at.append(time.monotonic())
        # A terminal's Ctrl-C goes to both.
        if number != signal.SIGINT:
            os.kill(child, signal.SIGTERM)

    for ending in _ENDINGS:
        signal.signal(ending, pass_on)
    code = None
    while code is None and not (asked_at and time.monotonic() > asked_at[0] + _ENDING_SECONDS):
        time.sleep(_LOOK_SECONDS)
        with contextlib.suppress(ChildProcessError):
            # Adopted ones are waited for as well; their end is nobody else's business.
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
    _kill_what_is_left()
    return 1 if code is None else code if code >= 0 else 128 - code


def _kill_what_is_left() -> None:
    """More than once: what is killed may have had children, which are adopted then."""
    while left := tree(os.getpid())[1:]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _end(number: int, _: FrameType | None) -> None:
    for ending in _ENDINGS:
        # Who asks twice, as timeout(1) and a terminal do, must not cut short how servers are ended.
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")

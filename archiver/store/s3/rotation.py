"""Makes a client again when a file that it was made from has changed.

A service outlives the rotation of a certificate authority or of credentials in
a file. Promises that looking is cheap, that calls under way keep the client that
they have, and that a file that cannot be used keeps the client before it: it may
be half-written. Leaves to boto3 what it reads again by itself, such as the token of
a web identity.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from archiver import observe

__all__ = ["CHECK_SECONDS", "Rotating"]

CHECK_SECONDS = 1.0
"""How long the files count as unchanged after a look at them."""

_Made = TypeVar("_Made")
_Seen = tuple[tuple[int, int, int, int] | None, ...]


class Rotating(Generic[_Made]):
    """What ``make`` makes of ``files``. For any number of threads.

    ``unusable`` are the errors that ``make`` raises for files that it cannot use.
    The first time, they go to the caller.
    """

    def __init__(
        self,
        make: Callable[[], _Made],
        files: Sequence[Path],
        unusable: tuple[type[Exception], ...],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._files = files
        self._unusable = unusable
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._seen = self._look()  # before they are read: a change meanwhile is one more
        self._failed: _Seen | None = None
        self._made = make()
        self._due = monotonic() + CHECK_SECONDS

    @property
    def current(self) -> _Made:
        """Made of the files as they are now, or were up to ``CHECK_SECONDS`` ago."""
        if self._files and self._monotonic() >= self._due and self._lock.acquire(blocking=False):
            try:
                self._check()
            finally:
                self._lock.release()
        return self._made

    def _check(self) -> None:
        self._due = self._monotonic() + CHECK_SECONDS
        seen = self._look()
        if seen in (self._seen, self._failed):
            return
        try:
            self._made = self._make()
        except self._unusable as error:
            self._failed = seen
            observe.get_logger().warning("store.rotation_failed", error=type(error).__name__)
        else:
            self._seen, self._failed = seen, None
            observe.get_logger().info("store.rotated")

    def _look(self) -> _Seen:
        return tuple(map(_fingerprint, self._files))


def _fingerprint(file: Path) -> tuple[int, int, int, int] | None:
    """Differs when the file was written or replaced, also behind a link. None if it cannot be seen."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

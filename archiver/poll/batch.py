"""What a poll has fetched and not recorded yet, and what of it makes the next batch.

Owns the queue between the wire and the journal: messages on their way to the store,
messages that are there, and what was resolved without an object. Promises that a
batch holds stored messages alone, in the order of their arrival unless one takes
long, and that little piles up. Uploading, and recording a batch, is the caller's.
For the poll's own thread.
"""

from collections import deque
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import NamedTuple

from archiver.errors import MessageRefused
from archiver.model import Resolved
from archiver.poll.plan import Item
from archiver.poll.ports import BatchLimits
from archiver.store import PutResult

BATCHES_UPLOADING = 2.0
"""With this many batches on their way to the store, the next message waits until half of them are there."""

BATCHES_UNRECORDED = 3.0
"""With this many batches fetched and not recorded, stored messages do not wait for older ones."""


@dataclass(slots=True, eq=False)
class Fetched:
    """A message that was read from the server and is on its way to the store, or there."""

    item: Item
    attempts: int
    captured_at: datetime
    sha256: bytes
    size: int
    upload: Future[PutResult]
    is_stored: bool = False


class Batch(NamedTuple):
    """Messages whose objects are in the store, and lines without an object, which are recorded together."""

    fetched: list[Fetched]
    resolved: list[Resolved]


@dataclass(slots=True)
class Unrecorded:
    """The queue. Times are seconds of one monotonic clock."""

    limits: BatchLimits
    opened_at: float
    """When the batch that is open was opened."""
    fetched: list[Fetched] = field(default_factory=list)
    uploading: list[Fetched] = field(default_factory=list)
    """Those of ``fetched`` whose upload has not ended, as far as was noticed."""
    resolved: list[Resolved] = field(default_factory=list)
    total_bytes: int = 0
    uploading_bytes: int = 0
    refused: list[tuple[Fetched, MessageRefused]] = field(default_factory=list)
    """Those that the store refused for themselves. They are no part of a batch."""
    error: BaseException | None = None
    """The first error that kept a message out of the store, and may keep out others."""

    def add(self, fetched: Fetched) -> None:
        """Add a message whose upload is under way."""
        self.fetched.append(fetched)
        self.uploading.append(fetched)
        self.total_bytes += fetched.size
        self.uploading_bytes += fetched.size

    @property
    def is_much(self) -> bool:
        """Whether so much is unrecorded that stored messages do not wait for older ones."""
        return self._batches(len(self.fetched) + len(self.resolved), self.total_bytes) > BATCHES_UNRECORDED

    @property
    def is_much_uploading(self) -> bool:
        """Whether the store does not keep up."""
        return self._batches(len(self.uploading), self.uploading_bytes) >= BATCHES_UPLOADING

    def is_due(self, monotonic: float) -> bool:
        """Whether a batch closes because it is full, or was open for long enough."""
        is_full = (
            len(self.fetched) + len(self.resolved) >= self.limits.messages
            or self.total_bytes >= self.limits.total_bytes
        )
        return is_full or self._is_late(monotonic)

    def notice_uploads(self) -> None:
        """Notice which uploads have ended."""
        uploading, self.uploading = self.uploading, []
        for fetched in uploading:
            if not fetched.upload.done():
                self.uploading.append(fetched)
                continue
            self.uploading_bytes -= fetched.size
            error = fetched.upload.exception()
            fetched.is_stored = error is None
            if isinstance(error, MessageRefused):
                self.fetched.remove(fetched)
                self.total_bytes -= fetched.size
                self.refused.append((fetched, error))
            else:
                self.error = self.error or error

    def wait_for_some(self) -> None:
        """Wait until half of the uploads have ended, in whatever order."""
        ended = as_completed([fetched.upload for fetched in self.uploading])
        deque(islice(ended, len(self.uploading) // 2 + 1), maxlen=0)
        self.notice_uploads()

    def wait_for_all(self) -> None:
        """Wait until all uploads have ended."""
        for fetched in self.uploading:
            fetched.upload.exception()
        self.notice_uploads()

    def next_batch(self, monotonic: float) -> Batch | None:
        """The next batch, if one is due and stored. A slow upload delays a few batches at most."""
        if not self.is_due(monotonic):
            return None
        if self.is_much or self._is_late(monotonic):
            return self.stored_batch(monotonic)
        first = self._close(self.fetched)
        return self._remove(first, monotonic) if all(fetched.is_stored for fetched in first) else None

    def stored_batch(self, monotonic: float) -> Batch | None:
        """A batch of what is stored, due or not; None if nothing is."""
        stored = [fetched for fetched in self.fetched if fetched.is_stored]
        return self._remove(self._close(stored), monotonic) if stored or self.resolved else None

    def _is_late(self, monotonic: float) -> bool:
        return bool(self.fetched) and monotonic - self.opened_at >= self.limits.seconds

    def _close(self, fetched: list[Fetched]) -> list[Fetched]:
        """The first of these: as many as a batch has room for beside what is resolved."""
        room, room_bytes = self.limits.messages - len(self.resolved), self.limits.total_bytes
        for index, each in enumerate(fetched):
            if index >= room or room_bytes <= 0:
                return fetched[:index]
            room_bytes -= each.size
        return fetched

    def _remove(self, taken: list[Fetched], monotonic: float) -> Batch:
        batch = Batch(taken, self.resolved)
        gone = set(map(id, taken))
        self.fetched = [fetched for fetched in self.fetched if id(fetched) not in gone]
        self.total_bytes -= sum(fetched.size for fetched in taken)
        self.resolved, self.opened_at = [], monotonic
        return batch

    def _batches(self, messages: int, total_bytes: int) -> float:
        return max(messages / self.limits.messages, total_bytes / self.limits.total_bytes)

"""Holds a message between the wire and the store, in memory of a fixed size.

Owns the process's memory budget for messages in flight, and the temporary files
for messages that do not fit. Promises:

- The budget is never exceeded, however many threads write and whatever sizes a
  server states.
- Size and SHA-256 are of exactly the bytes written.
- A sealed message can be read from the start any number of times, also by
  several readers at once.
- No file outlives the process: none of them ever has a name.

Leaves the meaning of the bytes to others.
"""

import contextlib
import hashlib
import io
import os
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, BinaryIO, Self

from archiver.errors import MessageRefused
from archiver.store.disk import failure

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["BytesBody", "Spool", "SpooledMessage"]

# Memory is reserved in steps, so that a message that arrives in many small
# pieces does not take the lock for each of them.
_STEP_BYTES = 16 * 1024

# One write or read of a temporary file: large enough to make the cost of system calls negligible.
_FILE_BUFFER_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class BytesBody:
    """A ``store.Body`` of bytes that are in memory anyway, such as a journal segment."""

    data: bytes = field(repr=False)
    sha256: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", hashlib.sha256(self.data).digest())

    @property
    def size(self) -> int:
        return len(self.data)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)


class Spool:
    """A memory budget, shared by all threads, and a directory for messages that exceed it.

    Temporary files go to ``directory``. None means the system's directory for
    them, which on many machines is memory too. ``memory_bytes`` is the budget of
    the whole process; one message may use ``message_memory_bytes`` of it.
    """

    def __init__(self, directory: Path | None, memory_bytes: int, message_memory_bytes: int) -> None:
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._message_memory_bytes = message_memory_bytes
        self._in_use = 0
        self._lock = threading.Lock()

    @property
    def memory_in_use(self) -> int:
        """How many bytes of the budget messages use now."""
        return self._in_use

    def create(self, size_hint: int | None = None) -> "SpooledMessage":
        """An empty message to write to; the caller closes it.

        ``size_hint`` is the size that the server states. It may be wrong: it only
        decides early where the message goes. Raises what
        ``SpooledMessage.write`` raises.
        """
        message = SpooledMessage(self)
        if size_hint is not None:
            message.make_room(size_hint)
        return message

    def _reserve(self, amount: int) -> bool:
        if not amount:
            return True
        with self._lock:
            if self._in_use + amount > self._memory_bytes:
                return False
            self._in_use += amount
            return True

    def _release(self, amount: int) -> None:
        with self._lock:
            self._in_use -= amount

    def _temporary_file(self) -> IO[bytes]:
        # The standard library unlinks it at once, or never gives it a name (O_TMPFILE).
        return tempfile.TemporaryFile(dir=self._directory, buffering=_FILE_BUFFER_BYTES)


class SpooledMessage:
    """One message on its way: written once by one thread, sealed, then a ``store.Body`` for any thread.

    ``close`` gives back memory and file. It may be called again; leaving a
    ``with`` block calls it. Readers that are open by then stay readable.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._hash = hashlib.sha256()
        self._size = 0
        self._reserved = 0
        self._memory: io.BytesIO | None = io.BytesIO()
        self._file: IO[bytes] | None = None
        self._content: bytes | None = None
        self._sha256: bytes | None = None
        self._closed = False
        self._refused: MessageRefused | None = None

    @property
    def size(self) -> int:
        """How many bytes were written so far."""
        return self._size

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the content, 32 bytes. Only a sealed message has one."""
        if self._sha256 is None:
            raise ValueError("the message is not sealed")
        return self._sha256

    @property
    def in_memory(self) -> bool:
        """Whether the message is in memory rather than in a temporary file."""
        return self._file is None

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append bytes. ``chunk`` may be reused as soon as this returns.

        Raises TryLater when the disk is full: the message is then closed and its
        content gone. A message that is too large for one file is discarded from
        there on, and ``seal`` raises: the server can send it to its end. Raises
        OperatorNeeded when the directory is unusable, and ValueError after
        ``seal`` or ``close``.
        """
        if self._closed or self._sha256 is not None:
            raise ValueError("the message is sealed or closed")
        if self._refused is not None:
            return
        self.make_room(len(chunk))
        self._hash.update(chunk)
        self._size += len(chunk)
        if self._memory is not None:
            self._memory.write(chunk)
        elif self._file is not None:
            try:
                self._file.write(chunk)
            except OSError as error:
                self._give_up(error)

    def make_room(self, amount: int) -> None:
        """Reserve ``amount`` more bytes in memory, or move the message to a file."""
        if self._memory is None:
            return
        needed = self._size + amount
        steps = max(0, -(-(needed - self._reserved) // _STEP_BYTES)) * _STEP_BYTES
        if needed <= self._spool._message_memory_bytes and self._spool._reserve(steps):
            self._reserved += steps
        else:
            self._move_to_file(self._memory)

    def seal(self) -> None:
        """End the writing. From here on ``size``, ``sha256`` and ``open`` describe the same bytes.

        Raises what ``write`` raises, and MessageRefused when it is too large for
        one file of the spool.
        """
        if self._closed or self._sha256 is not None:
            raise ValueError("the message is sealed or closed")
        if self._refused is not None:
            raise self._refused
        if self._memory is not None:
            self._content = self._memory.getvalue()  # shares the buffer, copies nothing
            self._memory = None
        elif self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)
            if self._refused is not None:
                raise self._refused
        self._sha256 = self._hash.digest()

    def open(self) -> BinaryIO:
        """A new seekable reader at the first byte. The caller closes it. Raises TryLater."""
        if self._closed or self._sha256 is None:
            raise ValueError("the message is not sealed, or closed")
        if self._file is None:
            return io.BytesIO(self._content or b"")
        try:
            descriptor = os.dup(self._file.fileno())
        except OSError as error:
            raise failure(error, "read from the spool") from error
        return io.BufferedReader(_FileReader(descriptor, self._size), _FILE_BUFFER_BYTES)

    def close(self) -> None:
        """Give memory and file back. May be called again."""
        self._closed = True
        self._memory = self._content = None
        if self._file is not None:
            # A failed flush does not matter: the content is discarded.
            with contextlib.suppress(OSError):
                self._file.close()
        self._spool._release(self._reserved)
        self._reserved = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _move_to_file(self, memory: io.BytesIO) -> None:
        try:
            self._file = self._spool._temporary_file()
            self._file.write(memory.getbuffer())
        except OSError as error:
            self._give_up(error)
        self._memory = None
        self._spool._release(self._reserved)
        self._reserved = 0

    def _give_up(self, error: OSError) -> None:
        where = self._spool._directory or tempfile.gettempdir()
        failed = failure(error, f"spool a message in {where}")
        if isinstance(failed, MessageRefused):
            self._refused = failed
            return
        self.close()
        raise failed from error


class _FileReader(io.RawIOBase):
    """Reads a shared file at a position of its own (pread), through a descriptor of its own.

    Its own, because the system gives a descriptor's number to another file as
    soon as the message is closed.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        data = os.pread(self._descriptor, len(target), self._position)
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

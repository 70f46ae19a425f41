"""The store in a directory: a key is a path below its root.

Promises what the port promises, across processes and power cuts. An object
appears under its name by link(2), which refuses an existing name: by then it is
complete, checked and durable. Its whole path is durable when ``put`` returns.
A file that was being written when its process died stays in ``.incoming``,
where no key leads, until a later ``probe`` removes it.

Believes little of what lies below the root, which others may be able to write
to. Every part of a path is opened relative to the one before it, and no
symbolic link is followed. Only a regular file is an object. Whatever else has
an object's name is not in the store, but takes the name. The root itself, and
what is above it, may be links. A hard link to a file elsewhere is a regular
file: it holds what it must only as long as it is read, as ``stat`` never gives
a digest.

Leaves to the operator: permissions, backups, and a file system that knows
hard links and fsync.
"""

import builtins
import errno
import hashlib
import itertools
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from archiver.errors import IntegrityError, OperatorNeeded, TryLater
from archiver.store import (
    Body,
    NotAnObject,
    ObjectDiffers,
    ObjectNotFound,
    PutResult,
    StoredObject,
    check_key,
    check_prefix,
    is_key,
)
from archiver.store.disk import durable, durable_directory, failure

__all__ = ["FilesystemStore"]

_CHUNK_BYTES = 256 * 1024

# A running write touches its file all the time. After a day without, its process must have died.
_STALE_SECONDS = 24 * 3600

# How many directories to remember as durable: two megabytes at most.
_REMEMBERED_DIRECTORIES = 8_192

# A file server's clock may be a little ahead of this machine's.
_CLOCK_SECONDS = 60.0

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
# Without O_NONBLOCK, opening a FIFO waits until another process writes to it.
_OBJECT = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_ROOT = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_DIRECTORY = _ROOT | os.O_NOFOLLOW
_OBJECT_MODE = 0o444  # objects are never changed
_ROOT_MODE = 0o750  # mail is private; the umask decides whether the group may read

_INCOMING = ".incoming"

# What open(2) says of a link, a socket, or a device without a driver, besides "no such file".
_NOT_A_DIRECTORY = {errno.ENOTDIR, errno.ELOOP, errno.EMLINK}
_NOT_A_FILE = {errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.ENODEV, errno.EISDIR}


class FilesystemStore:
    """Objects as read-only files below ``root``. For any number of threads and processes at once.

    ``root`` must exist; only ``probe`` makes it. Otherwise a new archive would
    start below the mount point of a volume that is not mounted. ``now`` is the
    time in seconds since 1970.
    """

    def __init__(self, root: Path, *, now: Callable[[], float] = time.time) -> None:
        # Absolute, so that a later change of the working directory does not move the archive.
        self._root = root.absolute()
        self._now = now
        self._durable_directories: set[str] = set()
        # For names of temporary files that no other store, process or machine uses.
        self._token = secrets.token_hex(8)
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"file:{self._root}"

    def put(self, key: str, body: Body) -> PutResult:
        directory, _, name = check_key(key).rpartition("/")
        try:
            with (
                self._incoming() as incoming,
                self._written(key, body, incoming) as temporary,
                self._made(directory) as descriptor,
            ):
                created = _link(temporary, incoming, name, descriptor)
                if not created:
                    self._compare(key, name, descriptor, body)
                # Also where another process made it: that process may not have come to this call yet.
                durable(descriptor)
        except OSError as error:
            raise failure(error, f"write {self._root / key}") from error
        return PutResult(created)

    @contextmanager
    def get(self, key: str) -> Iterator[Iterator[bytes]]:
        directory, _, name = check_key(key).rpartition("/")
        with ExitStack() as stack:
            try:
                with self._directory(directory) as descriptor:
                    file, size = stack.enter_context(_opened(name, descriptor))
            except _NotThereError as error:
                message = f"{key} is not in {self.url}"
                if error.is_foreign:
                    raise NotAnObject(f"{message}: {error.instead}", hint=_NO_LINKS) from error
                raise ObjectNotFound(message) from error
            except OSError as error:
                raise failure(error, f"read {self._root / key}") from error
            yield _translated(file, size, self._root / key)

    def stat(self, key: str) -> StoredObject | None:
        directory, _, name = check_key(key).rpartition("/")
        try:
            with self._directory(directory) as descriptor:
                return self._stat(key, name, descriptor)
        except _NotThereError:
            return None
        except OSError as error:
            raise failure(error, f"look at {self._root / key}") from error

    def list(self, prefix: str, *, after: str = "", strangers: bool = False) -> Iterator[StoredObject]:
        parent, slash, _ = check_prefix(prefix).rpartition("/")
        self._check_root()
        return self._walk(parent + slash, prefix, after, strangers=strangers)

    def names(self, prefix: str, *, after: str = "") -> Iterator[str]:
        self._check_root()
        return (name for name in self._names(check_prefix(prefix)) if name > after)

    def probe(self) -> None:
        """As the port says. Also makes the directory, and removes files that dead processes left in it."""
        try:
            self._make_root()
            with self._incoming() as incoming, self._mark(incoming) as mark:
                _check_links(mark, incoming)
                durable(incoming)
                # By the file system's own clock: it need not agree with this machine's.
                now = os.stat(mark, dir_fd=incoming, follow_symlinks=False).st_mtime
                _remove_older_than(now - _STALE_SECONDS, incoming)
        except OSError as error:
            raise failure(error, f"use the directory {self._root} as a store") from error

    def _check_root(self) -> None:
        """Check that the archive itself is there. Raises OperatorNeeded, TryLater."""
        try:
            os.scandir(self._root).close()
        except OSError as error:
            raise failure(error, f"use the directory {self._root} as a store") from error

    def _stat(self, key: str, name: str, directory: int) -> StoredObject | None:
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        # A date in the future is false, and would pass for that of an object just written.
        is_likely = 0 <= status.st_mtime <= self._now() + _CLOCK_SECONDS
        modified_at = datetime.fromtimestamp(status.st_mtime, UTC) if is_likely else None
        return StoredObject(key, status.st_size, modified_at=modified_at)

    @contextmanager
    def _directory(self, path: str) -> Iterator[int]:
        """A directory below the root ("", "a/b" or "a/b/"), open. Raises _NotThereError, OSError."""
        descriptor = os.open(self._root, _ROOT)
        try:
            for part in path.removesuffix("/").split("/") if path else ():
                try:
                    below = os.open(part, _DIRECTORY, dir_fd=descriptor)
                except FileNotFoundError:
                    raise _NotThereError from None
                except OSError as error:
                    if error.errno not in _NOT_A_DIRECTORY:
                        raise
                    raise _NotThereError(part, _mode(part, descriptor)) from None
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _made(self, path: str) -> Iterator[int]:
        """The same, made where it is missing, and its path durable. Raises OperatorNeeded for a link.

        An existing path is made durable too: another process may have made it a
        moment ago, and died before it was durable.
        """
        descriptor = os.open(self._root, _ROOT)
        made = ""
        try:
            for part in path.split("/") if path else ():
                made = f"{made}/{part}"
                below = self._made_below(made, part, descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def _made_below(self, path: str, name: str, parent: int) -> int:
        if path in self._durable_directories:
            with suppress(FileNotFoundError):
                return self._open_to_write(name, parent, path)
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
        below = self._open_to_write(name, parent, path)
        try:
            durable(parent)
        except BaseException:
            os.close(below)
            raise
        if len(self._durable_directories) >= _REMEMBERED_DIRECTORIES:
            self._durable_directories.clear()
        self._durable_directories.add(path)
        return below

    @contextmanager
    def _incoming(self) -> Iterator[int]:
        """The directory of files that are being written, open."""
        root = os.open(self._root, _ROOT)
        try:
            try:
                descriptor = self._open_to_write(_INCOMING, root, f"/{_INCOMING}")
            except FileNotFoundError:
                with suppress(FileExistsError):
                    os.mkdir(_INCOMING, dir_fd=root)
                descriptor = self._open_to_write(_INCOMING, root, f"/{_INCOMING}")
        finally:
            os.close(root)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open_to_write(self, name: str, parent: int, path: str) -> int:
        """Open a directory that is ``path`` below the root. Raises OperatorNeeded for a link, OSError."""
        try:
            return os.open(name, _DIRECTORY, dir_fd=parent)
        except OSError as error:
            instead = error.errno in _NOT_A_DIRECTORY and _NotThereError(path, _mode(name, parent)).instead
            if not instead:
                raise
            raise OperatorNeeded(f"cannot write below {self._root}: {instead}", hint=_NO_LINKS) from error

    def _temporary(self) -> str:
        return f"{os.getpid()}-{self._token}-{next(self._numbers)}"

    @contextmanager
    def _mark(self, incoming: int) -> Iterator[str]:
        name = self._temporary()
        os.close(os.open(name, _NEW_FILE, _OBJECT_MODE, dir_fd=incoming))
        try:
            yield name
        finally:
            os.unlink(name, dir_fd=incoming)

    @contextmanager
    def _written(self, key: str, body: Body, incoming: int) -> Iterator[str]:
        """The name of a temporary file that holds the body, checked and durable. It is removed at the end."""
        name = self._temporary()
        descriptor = os.open(name, _NEW_FILE, _OBJECT_MODE, dir_fd=incoming)
        try:
            try:
                _copy(key, body, descriptor)
                durable(descriptor)
            finally:
                os.close(descriptor)
            yield name
        finally:
            os.unlink(name, dir_fd=incoming)

    def _compare(self, key: str, name: str, directory: int, body: Body) -> None:
        """Check an object that exists already: the caller will rely on it. Raises ObjectDiffers, TryLater."""
        try:
            with _opened(name, directory) as (file, size):
                digest = hashlib.sha256()
                for chunk in _chunks(file, size) if size == body.size else ():
                    digest.update(chunk)
        except _NotThereError as error:
            if error.instead is None:
                raise TryLater(f"{key} was removed while it was being written again") from error
            raise ObjectDiffers(f"{key} is not in {self.url}: {error.instead}", hint=_NO_LINKS) from error
        if size != body.size or digest.digest() != body.sha256:
            raise ObjectDiffers(f"{key} is in the store already, with other content")

    def _make_root(self) -> None:
        missing = [path for path in (self._root, *self._root.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(mode=_ROOT_MODE, exist_ok=True)
            durable_directory(path.parent)

    def _names(self, directory: str) -> builtins.list[str]:
        """The names in a directory ("" or "a/b/"), sorted; those of directories end in a slash."""
        try:
            with self._directory(directory) as descriptor, os.scandir(descriptor) as entries:
                return sorted(
                    f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                    for entry in entries
                )
        except _NotThereError:
            return []
        except OSError as error:
            raise failure(error, f"list {self._root / directory}") from error

    def _walk(self, directory: str, prefix: str, after: str, *, strangers: bool) -> Iterator[StoredObject]:
        """The objects below ``directory`` ("" or "a/b/"), in the order of their whole keys.

        A directory sorts by its name with the slash, as its keys do: "a-b"
        comes before "a/x", and "a/x" before "a0". However deep directories are,
        one of them is open at a time.
        """
        names = self._names(directory)
        if strangers and not names and directory > after and directory.startswith(prefix):
            yield StoredObject(directory, 0)
        for is_below, several in groupby(names, key=lambda name: name.endswith("/")):
            keys = [directory + name for name in several]
            if not is_below:
                listed = [key for key in keys if key > after and key.startswith(prefix)]
                yield from self._files(directory, listed, strangers=strangers)
                continue
            for key in keys:
                if not is_key(key.removesuffix("/")):
                    # Incoming, or another's. It is one stranger, whatever is in it.
                    if strangers and key > after and key.startswith(prefix):
                        yield StoredObject(key, 0)
                    continue
                wanted = key.startswith(prefix) or prefix.startswith(key)
                if wanted and (key > after or after.startswith(key)):
                    yield from self._walk(key, prefix, after, strangers=strangers)

    def _files(self, directory: str, keys: Sequence[str], *, strangers: bool) -> Iterator[StoredObject]:
        """The objects with these keys in one directory, and the strangers among them."""
        if not keys:
            return
        try:
            with self._directory(directory) as descriptor:
                for key in keys:
                    name = key.removeprefix(directory)
                    stored = self._stat(key, name, descriptor) if is_key(key) else None
                    if stored is None and strangers and _mode(name, descriptor):
                        stored = StoredObject(key, 0)
                    if stored is not None:
                        yield stored
        except _NotThereError:
            return
        except OSError as error:
            raise failure(error, f"list {self._root / directory}") from error


_NO_LINKS = (
    "below its directory, the store follows no symbolic link and believes regular files alone; "
    "to have a part of it on another disk, mount that disk there"
)


class _NotThereError(Exception):
    """No object has this name. ``instead`` says what has it, if anything does: "x is a symbolic link"."""

    def __init__(self, name: str = "", mode: int = 0) -> None:
        super().__init__(name)
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        self.instead = f"{name} is {kind}" if mode else None
        self.is_foreign = bool(mode) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
        """Whether it is what no object and no part of a key can be."""


_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFREG: "a regular file"}


def _chunks(reader: BinaryIO, size: int) -> Iterator[bytes]:
    """The content, up to ``size`` bytes: an object does not grow, but a file that took its place may."""
    while size > 0 and (chunk := reader.read(min(size, _CHUNK_BYTES))):
        size -= len(chunk)
        yield chunk


def _copy(key: str, body: Body, descriptor: int) -> None:
    digest = hashlib.sha256()
    size = 0
    with body.open() as reader:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            written = os.write(descriptor, chunk)
            while written < len(chunk):
                written += os.write(descriptor, memoryview(chunk)[written:])
    if (size, digest.digest()) != (body.size, body.sha256):
        raise IntegrityError(f"the content of {key} changed between the wire and the store")


def _translated(reader: BinaryIO, size: int, path: Path) -> Iterator[bytes]:
    try:
        yield from _chunks(reader, size)
    except OSError as error:
        raise failure(error, f"read {path}") from error


def _check_links(mark: str, incoming: int) -> None:
    """Check that link(2) works here and refuses a name that is taken: write-once depends on it."""
    second = f"{mark}.link"
    _link(mark, incoming, second, incoming)
    try:
        is_refused = not _link(mark, incoming, second, incoming)
    finally:
        os.unlink(second, dir_fd=incoming)
    if not is_refused:
        raise OperatorNeeded(
            "this file system lets a hard link replace a file", hint="choose a local file system"
        )


def _link(temporary: str, incoming: int, name: str, directory: int) -> bool:
    """Give the temporary file its name; return False when the name is taken."""
    try:
        os.link(temporary, name, src_dir_fd=incoming, dst_dir_fd=directory, follow_symlinks=False)
    except FileExistsError:
        return False
    return True


def _remove_older_than(limit: float, incoming: int) -> None:
    with os.scandir(incoming) as entries:
        for entry in entries:
            # Two processes may clean at the same time. Directories stay: we make none here.
            with suppress(FileNotFoundError):
                is_dead = entry.stat(follow_symlinks=False).st_mtime < limit
                if is_dead and not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=incoming)


@contextmanager
def _opened(name: str, directory: int) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, open for reading, and its size. Raises _NotThereError, OSError.

    Never waits for another process, and never follows a link. The open file is
    checked, not its name, which another process may give to another file.
    """
    try:
        descriptor = os.open(name, _OBJECT, dir_fd=directory)
    except FileNotFoundError:
        raise _NotThereError from None
    except OSError as error:
        if error.errno not in _NOT_A_FILE:
            raise
        raise _NotThereError(name, _mode(name, directory)) from None
    with ExitStack() as undo:
        undo.callback(os.close, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _NotThereError(name, status.st_mode)
        yield os.fdopen(descriptor, "rb", buffering=0, closefd=False), status.st_size


def _mode(name: str, directory: int) -> int:
    """The kind of file that has this name; 0 if it is gone."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0

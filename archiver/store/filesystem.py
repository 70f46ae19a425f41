"""The store in a directory: a key is a path below its root.

Promises what the port promises, across processes and power cuts. An object
appears under its name by link(2), which refuses an existing name: by then it is
complete, checked and durable. Its whole path is durable when ``put`` returns.
A file that was being written when its process died stays in ``.incoming``,
where no key leads, until a later ``probe`` removes it.

Leaves to the operator: permissions, backups, and a file system that knows
hard links and fsync.
"""

import builtins
import contextlib
import hashlib
import itertools
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from archiver.errors import IntegrityError, OperatorNeeded, TryLater
from archiver.store import (
    Body,
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

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_OBJECT_MODE = 0o444  # objects are never changed
_ROOT_MODE = 0o700  # mail is private; an operator who wants another mode makes the directory first


class FilesystemStore:
    """Objects as read-only files below ``root``. For any number of threads and processes at once.

    ``root`` must exist; only ``probe`` makes it. Otherwise a new archive would
    start below the mount point of a volume that is not mounted.
    """

    def __init__(self, root: Path) -> None:
        # Absolute, so that a later change of the working directory does not move the archive.
        self._root = root.absolute()
        self._incoming = self._root / ".incoming"
        self._durable_directories: set[str] = set()
        # For names of temporary files that no other store, process or machine uses.
        self._token = secrets.token_hex(8)
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"file:{self._root}"

    def put(self, key: str, body: Body) -> PutResult:
        path = self._path(key)
        try:
            temporary = self._write(key, body)
            try:
                created = self._link(temporary, path)
            finally:
                temporary.unlink()
            if not created:
                _compare(key, path, body)
            # Also where another process made it: that process may not have come to this call yet.
            durable_directory(path.parent)
        except OSError as error:
            raise failure(error, f"write {path}") from error
        return PutResult(created)

    @contextmanager
    def get(self, key: str) -> Iterator[Iterator[bytes]]:
        path = self._path(key)
        try:
            file = path.open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            self._check_root()
            raise ObjectNotFound(f"{key} is not in {self.url}") from error
        except OSError as error:
            raise failure(error, f"read {path}") from error
        with file:
            yield _translated(file, path)

    def stat(self, key: str) -> StoredObject | None:
        path = self._path(key)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return None
        except OSError as error:
            raise failure(error, f"look at {path}") from error
        if stat.S_ISDIR(status.st_mode):
            return None
        modified_at = datetime.fromtimestamp(status.st_mtime, UTC)
        return StoredObject(key, status.st_size, modified_at=modified_at)

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
            with self._mark() as mark:
                _check_links(mark)
                durable_directory(self._incoming)
                # By the file system's own clock: it need not agree with this machine's.
                self._remove_older_than(mark.stat().st_mtime - _STALE_SECONDS)
        except OSError as error:
            raise failure(error, f"use the directory {self._root} as a store") from error

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _check_root(self) -> None:
        """Check that the archive itself is there. Raises OperatorNeeded, TryLater."""
        try:
            os.scandir(self._root).close()
        except OSError as error:
            raise failure(error, f"use the directory {self._root} as a store") from error

    def _temporary(self) -> tuple[int, Path]:
        """A new file, open for writing, and its path."""
        path = self._incoming / f"{os.getpid()}-{self._token}-{next(self._numbers)}"
        try:
            return os.open(path, _NEW_FILE, _OBJECT_MODE), path
        except FileNotFoundError:
            self._incoming.mkdir(exist_ok=True)
            return os.open(path, _NEW_FILE, _OBJECT_MODE), path

    @contextmanager
    def _mark(self) -> Iterator[Path]:
        descriptor, path = self._temporary()
        os.close(descriptor)
        try:
            yield path
        finally:
            path.unlink()

    def _write(self, key: str, body: Body) -> Path:
        """A temporary file that holds the body, checked and durable."""
        descriptor, path = self._temporary()
        try:
            try:
                _copy(key, body, descriptor)
                durable(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            path.unlink()
            raise
        return path

    def _link(self, temporary: Path, path: Path) -> bool:
        """Give the temporary file its name; return False when the name is taken."""
        try:
            if str(path.parent) in self._durable_directories:
                with contextlib.suppress(FileNotFoundError):
                    path.hardlink_to(temporary)
                    return True
            self._make_directory(path.parent)
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        return True

    def _make_directory(self, directory: Path) -> None:
        """Make a directory below the root, and make its path durable.

        An existing path is made durable too: another process may have made it a
        moment ago, and died before it was durable.
        """
        if directory == self._root:
            return
        if str(directory) in self._durable_directories and directory.is_dir():
            return
        self._make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        durable_directory(directory.parent)
        if len(self._durable_directories) >= _REMEMBERED_DIRECTORIES:
            self._durable_directories.clear()
        self._durable_directories.add(str(directory))

    def _make_root(self) -> None:
        missing = [path for path in (self._root, *self._root.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(mode=_ROOT_MODE, exist_ok=True)
            durable_directory(path.parent)
        self._incoming.mkdir(exist_ok=True)

    def _remove_older_than(self, limit: float) -> None:
        with os.scandir(self._incoming) as entries:
            for entry in entries:
                # Two processes may clean at the same time.
                with contextlib.suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_mtime < limit:
                        Path(entry.path).unlink()

    def _names(self, directory: str) -> builtins.list[str]:
        """The names in a directory ("" or "a/b/"), sorted; those of directories end in a slash."""
        try:
            with os.scandir(self._root / directory) as entries:
                return sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise failure(error, f"list {self._root / directory}") from error

    def _walk(self, directory: str, prefix: str, after: str, *, strangers: bool) -> Iterator[StoredObject]:
        """The objects below ``directory`` ("" or "a/b/"), in the order of their whole keys.

        A directory sorts by its name with the slash, as its keys do: "a-b"
        comes before "a/x", and "a/x" before "a0".
        """
        names = self._names(directory)
        if strangers and not names and directory > after and directory.startswith(prefix):
            yield StoredObject(directory, 0)
        for name in names:
            key = directory + name
            if not is_key(key.removesuffix("/")):
                # Not an object, or still incoming. A directory is one stranger, whatever is in it.
                if strangers and key > after and key.startswith(prefix):
                    yield StoredObject(key, 0)
                continue
            if name.endswith("/"):
                wanted = key.startswith(prefix) or prefix.startswith(key)
                if wanted and (key > after or after.startswith(key)):
                    yield from self._walk(key, prefix, after, strangers=strangers)
            elif key.startswith(prefix) and key > after:
                stored = self.stat(key)
                if stored is not None:
                    yield stored


def _chunks(reader: BinaryIO) -> Iterator[bytes]:
    while chunk := reader.read(_CHUNK_BYTES):
        yield chunk


def _copy(key: str, body: Body, descriptor: int) -> None:
    digest = hashlib.sha256()
    size = 0
    with body.open() as reader:
        for chunk in _chunks(reader):
            digest.update(chunk)
            size += len(chunk)
            written = os.write(descriptor, chunk)
            while written < len(chunk):
                written += os.write(descriptor, memoryview(chunk)[written:])
    if (size, digest.digest()) != (body.size, body.sha256):
        raise IntegrityError(f"the content of {key} changed between the wire and the store")


def _translated(reader: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from _chunks(reader)
    except OSError as error:
        raise failure(error, f"read {path}") from error


def _compare(key: str, path: Path, body: Body) -> None:
    """Check an object that exists already: the caller will rely on it. Raises ObjectDiffers, TryLater."""
    try:
        with path.open("rb", buffering=0) as file:
            same = os.fstat(file.fileno()).st_size == body.size
            same = same and hashlib.file_digest(file, "sha256").digest() == body.sha256
    except FileNotFoundError as error:
        raise TryLater(f"{key} was removed while it was being written again") from error
    if not same:
        raise ObjectDiffers(f"{key} is in the store already, with other content")


def _check_links(mark: Path) -> None:
    """Check that link(2) works here and refuses a name that is taken: write-once depends on it."""
    second = mark.with_suffix(".link")
    second.hardlink_to(mark)
    try:
        second.hardlink_to(mark)
    except FileExistsError:
        return
    finally:
        second.unlink()
    raise OperatorNeeded(
        "this file system lets a hard link replace a file", hint="choose a local file system"
    )

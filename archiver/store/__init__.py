"""Where objects go: a directory or an S3 bucket, behind five verbs.

Owns keys, bytes and their checksums in the store. Promises that an object is
whole or absent, and that it is written once and never changed. Every error is a
class of ``errors.py``: ``TryLater`` when a repetition may help,
``OperatorNeeded`` when only a person can, ``MessageRefused`` when one object is
refused and others are not, ``IntegrityError`` when bytes are not what they must
be. Leaves the meaning of the objects to its callers.

Every verb may be repeated by anyone at any time without harm. Retrying is one
layer of its own (``retry.py``); the stores themselves try once.
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from archiver.errors import IntegrityError, UsageError

__all__ = [
    "AddressingStyle",
    "Body",
    "InvalidKey",
    "NotAnObject",
    "ObjectDiffers",
    "ObjectNotFound",
    "PutResult",
    "Store",
    "StoredObject",
    "check_key",
    "check_prefix",
    "is_key",
    "open_store",
]


AddressingStyle = Literal["auto", "path", "virtual"]
"""Where a request names its bucket: in the path, or in the host name."""


class ObjectNotFound(IntegrityError):
    """An object that must be in the store is not."""


class NotAnObject(IntegrityError):
    """Something else has the key's name, such as a symbolic link: others put it there."""


class ObjectDiffers(IntegrityError):
    """The key exists already, with other content. Nothing was written.

    For a message this is an alarm. For a journal segment it means that another
    worker wrote this sequence first: the caller reads that one.
    """


class InvalidKey(IntegrityError):
    """Not a key that this project makes. If it was read from a journal, that was tampered with."""


class Body(Protocol):
    """The content of a new object: size and hash are known beforehand, and it can be read again."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the content, 32 bytes."""

    def open(self) -> BinaryIO:
        """A new seekable reader at the first byte. The caller closes it. May be called again for a retry."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """``created`` is False when the key existed already; nothing was written then."""

    created: bool
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What the store says about an object."""

    key: str
    size: int
    sha256: bytes | None = None
    """What the store itself computed over the whole object. None: read the object to know."""
    version_id: str | None = None
    modified_at: datetime | None = None
    """None also where the store's date is in the future."""


class Store(Protocol):
    """The port. Keys are relative to the store's prefix, ASCII, with ``/`` as separator (``check_key``)."""

    @property
    def url(self) -> str:
        """Where this store is, for people and logs. Never holds a secret."""

    def put(self, key: str, body: Body) -> PutResult:
        """Write once: an existing key is left as it is and reported by ``created=False``.

        When this returns, the object is durable and complete. The store compared
        its SHA-256 with ``body.sha256``; for a directory, that happens during the
        write. An object that exists already is compared by size and SHA-256: the
        store's own, or else it is read. Raises MessageRefused (this object alone
        cannot be stored: it is too large), TryLater, OperatorNeeded, ObjectDiffers
        (it exists with other content), IntegrityError (size or SHA-256 of the
        body are wrong).
        """

    def get(self, key: str) -> AbstractContextManager[Iterator[bytes]]:
        """The content in chunks, in bounded memory.

        Raises ObjectNotFound, NotAnObject, TryLater, OperatorNeeded.
        """

    def stat(self, key: str) -> StoredObject | None:
        """Size and more of one object; None if it does not exist. Raises TryLater, OperatorNeeded."""

    def list(self, prefix: str, *, after: str = "", strangers: bool = False) -> Iterator[StoredObject]:
        """Every object whose key starts with ``prefix``, ordered by key.

        Starts after the key ``after``, if given. With ``strangers``, lists also
        what others put there under names that no key has (``is_key``): any
        character, lone surrogates included; a slash at the end for a folder
        without objects. Some servers order strangers in their own way, so the
        caller then checks the order of the keys that it needs ordered. Raises
        TryLater and OperatorNeeded, also in the middle.
        """

    def names(self, prefix: str, *, after: str = "") -> Iterator[str]:
        """The names directly below the folder ``prefix``, strangers' too; those of folders end in a slash.

        Starts after the name ``after``, if given. Raises TryLater and
        OperatorNeeded, also in the middle.
        """

    def probe(self) -> None:
        """Check that this store can be used: the directory is writable, the bucket exists and answers.

        Raises OperatorNeeded, or TryLater. Leaves nothing behind.
        """


# Printable ASCII; no part is empty, hidden, ``.`` or ``..``; no backslash. Below what file
# systems (255 bytes a name) and S3 (1,024 bytes a key, prefix included) can hold.
_KEY_PART = re.compile(r"[!-\-0-\[\]-~][!-.0-\[\]-~]{0,199}")
_KEY_CHARACTERS = 800


def is_key(key: str) -> bool:
    """Whether this can be a key: it does not lead out of the store, and every store can hold it."""
    return len(key) <= _KEY_CHARACTERS and all(_KEY_PART.fullmatch(part) for part in key.split("/"))


def check_key(key: str) -> str:
    """Return the key. Raises InvalidKey where ``is_key`` says no."""
    if not is_key(key):
        raise InvalidKey(f"not a key of this store: {key[:200]!a}")
    return key


def check_prefix(prefix: str) -> str:
    """Return the prefix of a listing: the beginning of a key, or empty. Raises InvalidKey."""
    beginning = prefix.removesuffix("/")
    if beginning:
        check_key(beginning)
    elif prefix:
        raise InvalidKey("a prefix must not begin with a slash")
    return prefix


# An S3 bucket's name, with what older buckets and other makers' servers allow.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_EXPECTED = "expected file:PATH or s3://BUCKET/PREFIX"


def open_store(
    url: str,
    *,
    s3_endpoint_url: str | None = None,
    s3_region: str | None = None,
    s3_addressing_style: AddressingStyle | None = None,
    max_connections: int = 32,
    sleep: Callable[[float], None] = time.sleep,
    uniform: Callable[[float, float], float] = random.uniform,
) -> Store:
    """The store at ``url``, with retries around it. Touches neither disk nor network; ``probe`` does.

    ``file:PATH`` (relative, absolute, or ``file:///PATH``) is a directory; its
    path is taken literally. ``s3://BUCKET/PREFIX`` is a bucket; boto3 finds the
    credentials. ``max_connections`` bounds the connections kept open to S3: one
    for each thread that uses the store. Raises UsageError.
    """
    from archiver.store.retry import RetryingStore

    store = _open(url, s3_endpoint_url, s3_region, s3_addressing_style, max_connections)
    return RetryingStore(store, sleep=sleep, uniform=uniform)


def _open(
    url: str,
    s3_endpoint_url: str | None,
    s3_region: str | None,
    s3_addressing_style: AddressingStyle | None,
    max_connections: int,
) -> Store:
    scheme, colon, rest = url.partition(":")
    # The URL may hold a password by mistake, so no error repeats it.
    if not colon:
        raise UsageError(f"the store's URL has no scheme: {_EXPECTED}")
    if scheme == "file":
        from archiver.store.filesystem import FilesystemStore

        path = rest.removeprefix("//") if rest.startswith("///") else rest
        if not path or path.startswith("//") or "\0" in path:
            raise UsageError(f"the store's URL does not name a directory of this machine: {_EXPECTED}")
        return FilesystemStore(Path(path))
    if scheme == "s3" and rest.startswith("//"):
        from archiver.store.s3 import S3Store

        bucket, _, prefix = rest.removeprefix("//").partition("/")
        if "@" in bucket:
            raise UsageError(
                "the store's URL must not hold credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(f"the store's URL does not name a valid bucket: {_EXPECTED}")
        try:
            prefix = check_prefix(prefix).removesuffix("/")
        except InvalidKey as error:
            raise UsageError(f"the store's URL has an unusable prefix: {error}") from error
        return S3Store(
            bucket,
            prefix,
            endpoint_url=s3_endpoint_url,
            region=s3_region,
            addressing_style=s3_addressing_style,
            max_connections=max_connections,
        )
    raise UsageError(f"unknown scheme in the store's URL: {_EXPECTED}")

"""Where objects go: a directory or an S3 bucket, behind five verbs.

This package owns keys, bytes and their checksums in the store. It promises
that an object is whole or absent, that it is written once and never changed,
and that every error is one of ours: ``TryLater`` when a repetition may help,
``OperatorNeeded`` when only a person can, ``IntegrityError`` when bytes are
not what they must be. It leaves what the objects mean to its callers.

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
from typing import BinaryIO, Protocol

from archiver.errors import IntegrityError, UsageError

__all__ = [
    "Body",
    "InvalidKey",
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


class ObjectNotFound(IntegrityError):
    """An object that must be in the store is not."""


class ObjectDiffers(IntegrityError):
    """The key was there already, with other content. Nothing was written.

    Of a message that is an alarm. Of a journal segment it says that another
    worker wrote this sequence first: the caller reads what is there.
    """


class InvalidKey(IntegrityError):
    """No key that this project makes; one read from a journal was tampered with."""


class Body(Protocol):
    """What is to be written: its length and hash are known beforehand, and it can be read again."""

    @property
    def size(self) -> int:
        """Length in octets."""

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the content, 32 octets."""

    def open(self) -> BinaryIO:
        """A new seekable reader at the first octet. The caller closes it. May be called again for a retry."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """``created`` is false when the key was there already; nothing was written then."""

    created: bool
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What the store says of an object. ``sha256`` is None where the store does not keep one."""

    key: str
    size: int
    sha256: bytes | None = None
    version_id: str | None = None
    modified_at: datetime | None = None


class Store(Protocol):
    """The port. Keys are relative to the store's prefix, ASCII, with ``/`` as separator (``check_key``)."""

    @property
    def url(self) -> str:
        """Where this store is, for people and logs; never with a secret in it."""

    def put(self, key: str, body: Body) -> PutResult:
        """Write once: an existing key is left as it is and reported by ``created=False``.

        When this returns, the object is durable and complete, and its SHA-256
        was compared with ``body.sha256`` by the store (or, in a directory,
        while it was written). Of an object that was there already, the size
        is compared, and the SHA-256 where the store knows it. Raises TryLater,
        OperatorNeeded, ObjectDiffers (there already, with other content),
        IntegrityError (the body is not what it says).
        """

    def get(self, key: str) -> AbstractContextManager[Iterator[bytes]]:
        """The content in chunks, in bounded memory. Raises ObjectNotFound, TryLater, OperatorNeeded."""

    def stat(self, key: str) -> StoredObject | None:
        """What is known of one object, or None. Raises TryLater, OperatorNeeded."""

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        """Every object whose key starts with ``prefix``, ordered by key.

        Begins behind the key ``after``, where one is given. Raises TryLater,
        OperatorNeeded, also on the way.
        """

    def probe(self) -> None:
        """Whether this store can be used: the directory is writable, the bucket exists and answers.

        Raises OperatorNeeded with what is wrong, or TryLater. Leaves nothing behind.
        """


# Printable ASCII; no part is empty, hidden, ``.`` or ``..``; no backslash. Below what file
# systems (255 octets a name) and S3 (1,024 octets a key, prefix included) can hold.
_KEY_PART = re.compile(r"[!-\-0-\[\]-~][!-.0-\[\]-~]{0,199}")
_KEY_CHARACTERS = 800


def is_key(key: str) -> bool:
    """Whether this can be a key: it stays in the store, and can be kept everywhere."""
    return len(key) <= _KEY_CHARACTERS and all(_KEY_PART.fullmatch(part) for part in key.split("/"))


def check_key(key: str) -> str:
    """The key itself. Raises InvalidKey for what ``is_key`` refuses."""
    if not is_key(key):
        raise InvalidKey(f"not a key of this store: {key[:200]!a}")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix of a listing itself: the beginning of a key, or empty. Raises InvalidKey."""
    beginning = prefix.removesuffix("/")
    if beginning:
        check_key(beginning)
    elif prefix:
        raise InvalidKey("a prefix does not begin with a slash")
    return prefix


# An S3 bucket's name, with what older buckets and other makers' servers allow.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_EXPECTED = "expected file:PATH or s3://BUCKET/PREFIX"


def open_store(
    url: str,
    *,
    s3_endpoint_url: str | None = None,
    s3_region: str | None = None,
    max_connections: int = 32,
    sleep: Callable[[float], None] = time.sleep,
    uniform: Callable[[float, float], float] = random.uniform,
) -> Store:
    """The store at ``url``, with retries around it. Touches neither disk nor network: ``probe`` does.

    ``file:PATH`` (relative, absolute, or ``file:///PATH``) is a directory, its
    path taken literally; ``s3://BUCKET/PREFIX`` a bucket, whose credentials
    come by boto3's own chain. ``max_connections`` bounds the connections kept
    open to S3: one for each thread that uses the store. Raises UsageError.
    """
    from archiver.store.retry import RetryingStore

    return RetryingStore(
        _open(url, s3_endpoint_url, s3_region, max_connections), sleep=sleep, uniform=uniform
    )


def _open(url: str, s3_endpoint_url: str | None, s3_region: str | None, max_connections: int) -> Store:
    scheme, colon, rest = url.partition(":")
    # A URL may have been given a password by mistake: no error repeats what it holds.
    if not colon:
        raise UsageError(f"the store's URL has no scheme: {_EXPECTED}")
    if scheme == "file":
        from archiver.store.filesystem import FilesystemStore

        path = rest.removeprefix("//") if rest.startswith("///") else rest
        if not path or path.startswith("//") or "\0" in path:
            raise UsageError(f"the store's URL names no directory of this machine: {_EXPECTED}")
        return FilesystemStore(Path(path))
    if scheme == "s3" and rest.startswith("//"):
        from archiver.store.s3 import S3Store

        bucket, _, prefix = rest.removeprefix("//").partition("/")
        if "@" in bucket:
            raise UsageError(
                "the store's URL must not hold credentials: they come from AWS_ACCESS_KEY_ID etc."
            )
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(f"the store's URL names no valid bucket: {_EXPECTED}")
        try:
            prefix = check_prefix(prefix).removesuffix("/")
        except InvalidKey as error:
            raise UsageError(f"the store's URL has an unusable prefix: {error}") from error
        return S3Store(
            bucket,
            prefix,
            endpoint_url=s3_endpoint_url,
            region=s3_region,
            max_connections=max_connections,
        )
    raise UsageError(f"unknown scheme in the store's URL: {_EXPECTED}")

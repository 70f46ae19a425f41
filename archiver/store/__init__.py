"""Where objects go: a directory or an S3 bucket, behind five verbs.

This package owns keys, bytes and their checksums in the store. It promises
that an object is whole or absent, that it is written once and never changed,
and that every error is one of ours: ``TryLater`` when a repetition may help,
``OperatorNeeded`` when only a person can, ``IntegrityError`` when bytes are
not what they must be. It leaves what the objects mean to its callers.

Every verb may be repeated by anyone at any time without harm. Retrying is one
layer of its own (``retry.py``); the stores themselves try once.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO, Protocol

from archiver.errors import IntegrityError

__all__ = ["Body", "ObjectNotFound", "PutResult", "Store", "StoredObject"]


class ObjectNotFound(IntegrityError):
    """An object that must be in the store is not."""


class Body(Protocol):
    """What is to be written: its length and hash are known beforehand, and it can be read again."""

    @property
    def size(self) -> int:
        """Length in octets."""

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the content, 32 octets."""

    def open(self) -> BinaryIO:
        """A new reader at the first octet. The caller closes it. May be called again for a retry."""


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
    """The port. Keys are relative to the store's prefix, ASCII, with ``/`` as separator."""

    @property
    def url(self) -> str:
        """Where this store is, for people and logs; never with a secret in it."""

    def put(self, key: str, body: Body) -> PutResult:
        """Write once: an existing key is left as it is and reported by ``created=False``.

        When this returns, the object is durable and complete, and its SHA-256
        was compared with ``body.sha256`` by the store (or, in a directory,
        while it was written). Raises TryLater, OperatorNeeded, IntegrityError.
        """

    def get(self, key: str) -> AbstractContextManager[Iterator[bytes]]:
        """The content in chunks, in bounded memory. Raises ObjectNotFound, TryLater, OperatorNeeded."""

    def stat(self, key: str) -> StoredObject | None:
        """What is known of one object, or None. Raises TryLater, OperatorNeeded."""

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key starts with ``prefix``, ordered by key. Raises TryLater, OperatorNeeded."""

    def probe(self) -> None:
        """Whether this store can be used: the directory is writable, the bucket exists and answers.

        Raises OperatorNeeded with what is wrong, or TryLater. Leaves nothing behind.
        """

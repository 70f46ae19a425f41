"""Proof that an object is in the store, whole and unaltered. It asks the store and nothing else."""

import hashlib
from typing import NamedTuple

from archiver.store import Store


class Expected(NamedTuple):
    """An object that the store must have. Of a segment that an earlier poll wrote, only the key is known."""

    key: str
    sha256: bytes | None
    size: int | None = None


def fault(store: Store, expected: Expected) -> str | None:
    """The fault of an object, or None. It is read if the store keeps no checksum."""
    found = store.stat(expected.key)
    if found is None:
        return f"{expected.key} was written, and is missing in the store"
    if expected.sha256 is None:
        return None if found.size else f"{expected.key} was written, and is empty in the store"
    seen = found.sha256
    if seen is None and expected.size in (None, found.size):
        digest = hashlib.sha256()
        with store.get(expected.key) as chunks:
            for chunk in chunks:
                digest.update(chunk)
        seen = digest.digest()
    if expected.size not in (None, found.size) or seen != expected.sha256:
        return f"{expected.key} was written, and is altered in the store"
    return None

"""The journal: an account's hash-chained record of what was captured, one object for each batch.

A segment is NDJSON: a header line, then a line for each sighting that was
resolved. Its header names the SHA-256 of the whole segment before it. So no segment
can be changed, dropped or inserted without breaking the chain. Its number follows
from its predecessor and its object is written once, so of two writers one finds the
number taken. docs/compliance.md describes the format for auditors. ``SCHEMA`` grows
when an older reader would misread a segment.
"""

import hashlib
import json
from datetime import datetime
from typing import Any

from archiver import __version__
from archiver.errors import IntegrityError
from archiver.model import (
    NO_DIGEST,
    UNKNOWN_SIZE,
    JournalHead,
    Resolved,
    Segment,
    ServerRecord,
    SightingKey,
    What,
    message_key,
    segment_key,
    uidl_bytes,
    uidl_text,
)
from archiver.store import ObjectNotFound, Store

SCHEMA = 1
LARGEST_NUMBER = 2**63 - 1
SEGMENT_BYTES = 64 * 1024 * 1024
"""More than any batch writes. A larger object is not a segment, and is not read into memory."""


def encode(segment: Segment) -> bytes:
    """A segment as it is stored. The same segment always gives the same bytes."""
    header = {
        "schema": SCHEMA,
        "account": {"id": segment.account_id, "name": segment.account_name, "url": segment.account_url},
        "epoch": segment.epoch,
        "sequence": segment.sequence,
        "previous": segment.previous.hex(),
        "poll": segment.token,
        "written_at": segment.written_at.isoformat(),
        "server": {
            "host": segment.server.host,
            "port": segment.server.port,
            "greeting": segment.server.greeting,
            "mechanism": segment.server.mechanism,
            "tls": segment.server.tls_version
            and {
                "version": segment.server.tls_version,
                "cipher": segment.server.cipher,
                "certificate_sha256": segment.server.certificate_sha256,
            },
        },
        "listing": {"count": segment.listing_count, "sha256": segment.listing_digest.hex()}
        | ({} if segment.listing_first == 1 else {"first": segment.listing_first}),
        "lines": len(segment.lines),
        "writer": f"archiver/{__version__}",
    }
    lines = [header, *(_line(segment.account_id, resolved) for resolved in segment.lines)]
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


def decode(data: bytes, where: str) -> Segment:
    """Decode a segment. Raises IntegrityError, which names ``where``, for anything else."""
    try:
        header, *lines = (json.loads(line) for line in data.splitlines())
        if (schema := _whole(header["schema"])) != SCHEMA:
            raise IntegrityError(
                f"{where} has the journal schema {schema}, which this release does not know",
                hint="upgrade archiver",
            )
        if (promised := _whole(header["lines"])) != len(lines):
            raise IntegrityError(f"{where} has {len(lines)} lines where its header says {promised}")
        tls = header["server"]["tls"] or {}
        return Segment(
            account_id=header["account"]["id"],
            account_name=header["account"]["name"],
            account_url=header["account"]["url"],
            epoch=_whole(header["epoch"]),
            sequence=_whole(header["sequence"]),
            previous=_digest(header["previous"]),
            token=_whole(header["poll"]),
            written_at=_time(header["written_at"]),
            server=ServerRecord(
                host=header["server"]["host"],
                port=header["server"]["port"],
                greeting=header["server"]["greeting"],
                mechanism=header["server"]["mechanism"],
                tls_version=tls.get("version"),
                cipher=tls.get("cipher"),
                certificate_sha256=tls.get("certificate_sha256"),
            ),
            listing_count=_whole(header["listing"]["count"]),
            listing_digest=_digest(header["listing"]["sha256"]),
            listing_first=_whole(header["listing"].get("first", 1)),
            lines=tuple(_resolved(line) for line in lines),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{where} is not a journal segment: {error!r}") from error


def read(store: Store, account_id: str, sequence: int) -> tuple[Segment, bytes] | None:
    """One segment and its SHA-256, or None when the store does not have it.

    Raises IntegrityError when the object is not that segment, and the store's
    errors.
    """
    key = segment_key(account_id, sequence)
    try:
        with store.get(key) as chunks:
            data = bytearray()
            for chunk in chunks:
                data += chunk
                if len(data) > SEGMENT_BYTES:
                    raise IntegrityError(f"{key} is too large for a journal segment")
    except ObjectNotFound:
        return None
    segment = decode(bytes(data), key)
    if (segment.account_id, segment.sequence) != (account_id, sequence):
        raise IntegrityError(f"{key} holds segment {segment.sequence} of account {segment.account_id!a}")
    return segment, hashlib.sha256(data).digest()


def follows(segment: Segment, head: JournalHead) -> bool:
    """Whether a segment is the next link of the chain after ``head``."""
    return (segment.sequence, segment.previous) == (head.sequence + 1, head.digest)


def _line(account_id: str, resolved: Resolved) -> dict[str, Any]:
    sighting = resolved.sighting
    line: dict[str, Any] = {
        "what": resolved.what.value,
        "uidl": uidl_text(sighting.uidl),
        "listed_size": None if sighting.size == UNKNOWN_SIZE else sighting.size,
        "at": resolved.resolved_at.isoformat(),
    }
    if sighting.content:
        line["by_content"] = True
    if resolved.sha256 is not None:
        line |= {"sha256": resolved.sha256.hex(), "key": message_key(account_id, resolved.sha256)}
    if resolved.size is not None:
        line["size"] = resolved.size
    if resolved.version_id is not None:
        line["version_id"] = resolved.version_id
    if resolved.reason is not None:
        line |= {"reason": resolved.reason, "attempts": resolved.attempts}
    return line


def _resolved(line: dict[str, Any]) -> Resolved:
    what = What(line["what"])
    sha256 = _digest(line["sha256"]) if "sha256" in line else None
    size = _whole(line["size"]) if "size" in line else None
    if what in (What.CAPTURED, What.KNOWN) and (sha256 is None or size is None):
        raise ValueError(f"a {what} line without a digest or a size")
    content = sha256 if line.get("by_content") else None
    return Resolved(
        what=what,
        sighting=SightingKey(
            uidl_bytes(line["uidl"]),
            UNKNOWN_SIZE if line["listed_size"] is None else _whole(line["listed_size"]),
            content or b"",
        ),
        resolved_at=_time(line["at"]),
        sha256=sha256,
        size=size,
        version_id=line.get("version_id"),
        reason=line.get("reason"),
        attempts=_whole(line.get("attempts", 0)),
    )


# Anyone with write access to the bucket may have written what is in it.


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_NUMBER:
        raise ValueError(f"not a whole number: {value!r}")
    return value


def _digest(text: str) -> bytes:
    digest = bytes.fromhex(text)
    if len(digest) != len(NO_DIGEST):
        raise ValueError("not a SHA-256")
    return digest


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("a time without a zone")
    return time

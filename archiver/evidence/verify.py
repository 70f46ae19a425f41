"""Objects, journal and database, each against the others: the proof that nothing was lost or altered.

Reads everything and changes nothing. It may run while polls go on: what is
read first is what is written last, so that a capture under way is not taken
for a fault; and what came to the store after the beginning is left to the next
time.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from archiver.db import Database, reads, schedule
from archiver.errors import IntegrityError
from archiver.evidence import journal
from archiver.model import Account, JournalHead, Segment, What, journal_prefix, message_key, segment_key
from archiver.store import ObjectNotFound, Store, StoredObject

Kind = Literal["missing", "damaged", "chain_break", "unrecorded", "miscounted"]

IN_FLIGHT = timedelta(minutes=15)
"""What is so young, of an account that is being polled, need not be in the journal or the database yet."""

HASHED_AT_ONCE = 64
FINDINGS_KEPT = 1_000
"""All are counted; so many are named."""


class Finding(NamedTuple):
    """One thing that is not as it must be."""

    kind: Kind
    account: str
    key: str
    detail: str


@dataclass(slots=True)
class Findings:
    """What was looked at and what was found. ``checked`` counts messages."""

    checked: int = 0
    octets: int = 0
    segments: int = 0
    missing: int = 0
    damaged: int = 0
    chain_breaks: int = 0
    unrecorded: int = 0
    miscounted: int = 0
    named: list[Finding] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.missing or self.damaged or self.chain_breaks or self.unrecorded or self.miscounted)

    def add(self, finding: Finding) -> None:
        match finding.kind:
            case "missing":
                self.missing += 1
            case "damaged":
                self.damaged += 1
            case "chain_break":
                self.chain_breaks += 1
            case "unrecorded":
                self.unrecorded += 1
            case "miscounted":
                self.miscounted += 1
        if len(self.named) < FINDINGS_KEPT:
            self.named.append(finding)


def verify(
    account: Account,
    database: Database,
    store: Store,
    findings: Findings,
    *,
    now: datetime,
    readers: Executor,
    rehash: bool = True,
    progress: Callable[[StoredObject], None] = lambda _: None,
) -> None:
    """Check one account and add to ``findings``. With ``rehash`` every object is read and hashed again.

    Raises what the store and the database raise.
    """
    with database.reading() as connection:
        head = reads.journal_head(connection, account.id)
        recorded = set(reads.capture_digests(connection, account.id))
        told, held = reads.counted(connection, account.id), reads.count_again(connection, account.id)
        since = now - IN_FLIGHT if schedule.is_unsettled(connection, account.id) else now
    written = _read_journal(account, store, head, since, findings)
    unnamed = {message_key(account.id, digest) for digest in recorded - written.captured.keys()}
    for key in unnamed:
        detail = "the database has it, the journal has not"
        findings.add(Finding("unrecorded", account.name, key, detail))
    lacking = written.known_to_database - recorded
    if told != held and not unnamed and not lacking:
        detail = f"{told} captures and octets are told of, {held} are there; run: archiver db recount"
        findings.add(Finding("miscounted", account.name, "mailbox", detail))
    for digest in lacking:
        detail = "the journal has it, the database has not"
        findings.add(Finding("unrecorded", account.name, message_key(account.id, digest), detail))

    expected = {message_key(account.id, digest): digest for digest in written.captured}
    sound: list[tuple[StoredObject, bytes]] = []
    for found in store.list(f"messages/{account.id}/"):
        wanted = expected.pop(found.key, None)
        if wanted is None:
            if found.key not in unnamed and not _is_younger(found, since):
                findings.add(Finding("unrecorded", account.name, found.key, "no journal segment names it"))
        elif found.size != written.captured[wanted]:
            detail = f"{found.size} octets, and the journal says {written.captured[wanted]}"
            findings.add(Finding("damaged", account.name, found.key, detail))
        else:
            sound.append((found, wanted))
    for key in expected:
        findings.add(Finding("missing", account.name, key, "the store lacks it"))
    findings.checked += len(written.captured)
    for found, finding in _rehashed(account, store, sound, readers) if rehash else _taken_as_is(sound):
        progress(found)
        findings.octets += found.size
        if finding is not None:
            findings.add(finding)


def find_strays(known: Collection[str], store: Store, findings: Findings) -> None:
    """Add to ``findings`` what lies in the store for accounts that the database does not know.

    ``known`` has every account's id. One request an account: what lies behind
    an id is passed over.
    """
    for prefix in ("messages/", "journal/"):
        after = ""
        while (found := next(iter(store.list(prefix, after=after)), None)) is not None:
            account_id = found.key.removeprefix(prefix).partition("/")[0]
            if account_id not in known:
                detail = "the database has no account of that id"
                findings.add(Finding("unrecorded", account_id, f"{prefix}{account_id}/", detail))
            # The tilde comes after every character that a key of ours has.
            after = f"{prefix}{account_id}/~"


@dataclass(slots=True)
class _Written:
    """What an account's journal says was captured: octets by digest."""

    captured: dict[bytes, int] = field(default_factory=dict)
    known_to_database: set[bytes] = field(default_factory=set)

    def take_in(self, segment: Segment, *, known_to_database: bool) -> None:
        for line in segment.lines:
            if line.what is What.CAPTURED and line.sha256 is not None and line.octets is not None:
                self.captured[line.sha256] = line.octets
                if known_to_database:
                    self.known_to_database.add(line.sha256)


def _is_younger(found: StoredObject, since: datetime) -> bool:
    return found.modified_at is not None and found.modified_at >= since


def _read_journal(
    account: Account, store: Store, head: JournalHead, since: datetime, findings: Findings
) -> _Written:
    written = _Written()
    last = JournalHead(0, bytes(32))
    for listed in store.list(journal_prefix(account.id)):
        sequence = _number(account, listed.key)
        if sequence is None:
            findings.add(Finding("unrecorded", account.name, listed.key, "it is no journal segment"))
            continue
        if sequence > last.sequence + 1:
            missing = last.sequence + 1
            detail = f"segment {missing} is not there"
            findings.add(Finding("chain_break", account.name, segment_key(account.id, missing), detail))
            last = JournalHead(sequence - 1, b"")
        try:
            found = journal.read(store, account.id, sequence)
        except IntegrityError as error:
            findings.add(Finding("chain_break", account.name, listed.key, str(error)))
            last = JournalHead(sequence, b"")
            continue
        if found is None:
            raise ObjectNotFound(f"{listed.key} was listed and is not there")
        segment, digest = found
        if last.digest and not journal.follows(segment, last):
            detail = "it does not name the segment before it"
            findings.add(Finding("chain_break", account.name, listed.key, detail))
        if sequence == head.sequence and digest != head.digest:
            detail = "the database knows it with another digest"
            findings.add(Finding("chain_break", account.name, listed.key, detail))
        if sequence > head.sequence and not _is_younger(listed, since):
            detail = "the database does not know it; if it was restored from a backup: archiver db catch-up"
            findings.add(Finding("unrecorded", account.name, listed.key, detail))
        written.take_in(segment, known_to_database=sequence <= head.sequence)
        findings.segments += 1
        last = JournalHead(sequence, digest)
    if last.sequence < head.sequence:
        detail = f"the database knows {head.sequence} segments, the store has {last.sequence}"
        findings.add(Finding("chain_break", account.name, segment_key(account.id, head.sequence), detail))
    return written


def _number(account: Account, key: str) -> int | None:
    """The number of the segment that lies under a key; None for a key that no segment has."""
    name = key.rpartition("/")[2].removesuffix(".ndjson")
    number = int(name) if name.isascii() and name.isdigit() else 0
    return number if number and key == segment_key(account.id, number) else None


def _taken_as_is(sound: list[tuple[StoredObject, bytes]]) -> Iterator[tuple[StoredObject, Finding | None]]:
    for found, _ in sound:
        yield found, None


def _rehashed(
    account: Account, store: Store, sound: list[tuple[StoredObject, bytes]], readers: Executor
) -> Iterator[tuple[StoredObject, Finding | None]]:
    def check(item: tuple[StoredObject, bytes]) -> Finding | None:
        found, wanted = item
        digest = hashlib.sha256()
        try:
            with store.get(found.key) as chunks:
                for chunk in chunks:
                    digest.update(chunk)
        except ObjectNotFound:
            return Finding("missing", account.name, found.key, "the store lists it and lacks it")
        if digest.digest() == wanted:
            return None
        return Finding("damaged", account.name, found.key, f"its SHA-256 is {digest.hexdigest()}")

    for start in range(0, len(sound), HASHED_AT_ONCE):
        chunk = sound[start : start + HASHED_AT_ONCE]
        yield from zip((found for found, _ in chunk), readers.map(check, chunk), strict=True)

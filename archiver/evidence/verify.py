"""Compares objects, journal and database with each other: the proof that nothing was lost or altered.

Reads everything and changes nothing. Polls may run meanwhile: what a poll
writes last is read first, so that a capture under way is not reported. What
arrived after the start is left to the next verification.

Memory does not grow with an account. What the database and the journal say is
sorted by digest in a temporary file (``scratch``), and merged with the store's
listing, which is sorted by key. Findings beyond ``FINDINGS_KEPT`` are only counted.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from archiver.db import Database, before, captures, leases
from archiver.errors import IntegrityError, OperatorNeeded
from archiver.evidence import journal
from archiver.evidence.scratch import Content, Scratch, scratch
from archiver.model import Account, JournalHead, Segment, What, journal_prefix, message_key, segment_key
from archiver.store import NotAnObject, ObjectNotFound, Store, StoredObject, is_key

Kind = Literal["missing", "damaged", "chain_break", "unrecorded", "miscounted"]

IN_FLIGHT = timedelta(minutes=15)
"""While an account is being polled, what is younger need not be in the journal or the database yet."""

HASHED_AT_ONCE = 64
FINDINGS_KEPT = 1_000
"""How many findings are named. All of them are counted."""

UNRECORDED_KEPT = 500


class Finding(NamedTuple):
    """One thing that is wrong."""

    kind: Kind
    account: str
    key: str
    detail: str


@dataclass(slots=True)
class Findings:
    """The counts of one verification, and its first findings."""

    checked: int = 0
    """Messages that the journal names."""
    hashed_bytes: int = 0
    """The total size of the messages that were read, in bytes."""
    segments: int = 0
    missing: int = 0
    damaged: int = 0
    chain_breaks: int = 0
    unrecorded: int = 0
    miscounted: int = 0
    named: list[Finding] = field(default_factory=list)
    """The first ``FINDINGS_KEPT``, at most ``UNRECORDED_KEPT`` of them unrecorded."""
    unrecorded_named: int = field(default=0, repr=False, compare=False)

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
        self._name(finding)

    def _name(self, finding: Finding) -> None:
        # Many strangers must not hide what is missing.
        if finding.kind == "unrecorded":
            if self.unrecorded_named >= UNRECORDED_KEPT:
                return
            self.unrecorded_named += 1
        if len(self.named) < FINDINGS_KEPT:
            self.named.append(finding)

    def include(self, later: "Findings") -> None:
        """Add all that ``later`` has, after what is here."""
        self.checked += later.checked
        self.hashed_bytes += later.hashed_bytes
        self.segments += later.segments
        self.missing += later.missing
        self.damaged += later.damaged
        self.chain_breaks += later.chain_breaks
        self.unrecorded += later.unrecorded
        self.miscounted += later.miscounted
        for finding in later.named:
            self._name(finding)


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
    scratch_directory: Path | None = None,
) -> None:
    """Check one account and add to ``findings``. With ``rehash`` every object is read and hashed again.

    ``scratch_directory`` takes a temporary file, about 50 bytes a capture; None
    means the system's directory for temporary files. Raises what the store and
    the database raise, and OperatorNeeded when that file cannot be written.
    """
    with scratch(scratch_directory) as contents:
        with database.reading() as connection:
            head = before.journal_head(connection, account.id)
            contents.add_recorded(captures.digests(connection, account.id))
            stated, actual = captures.counted(connection, account.id), captures.count(connection, account.id)
            since = now - IN_FLIGHT if leases.is_unsettled(connection, account.id) else now
        check = _Check(account, store, contents, findings, head=head, since=since)
        check.read_journal()
        agree = check.compare_database()
        if stated != actual and agree:
            detail = f"captures and bytes are counted as {stated}, but are {actual}; run: archiver db recount"
            findings.add(Finding("miscounted", account.name, "mailbox", detail))
        # Findings about contents come last, in the order of keys.
        of_contents = Findings()
        sound = check.compare_store()
        for found, finding in _rehashed(account, store, sound, readers) if rehash else _taken_as_is(sound):
            progress(found)
            of_contents.hashed_bytes += found.size
            if finding is not None:
                of_contents.add(finding)
        check.report_missing()
        findings.include(of_contents)


def find_strays(known: Collection[str], store: Store, findings: Findings) -> None:
    """Add to ``findings`` what lies beside the accounts' folders, where the database knows no account.

    ``known`` has every account's id. An unknown folder is one finding, whatever
    is in it. Costs one request for a thousand names.
    """
    for prefix in ("messages/", "journal/"):
        for name in store.names(prefix):
            account_id = name.removesuffix("/")
            if name.endswith("/") and account_id in known:
                continue
            detail = "the database has no account with this id" if is_key(account_id) else _NO_KEY
            findings.add(Finding("unrecorded", printable(account_id), printable(prefix + name), detail))


_NO_KEY = "the archiver gives no object such a name"

_SHOWN_CHARACTERS = 300


def printable(name: str) -> str:
    """A stranger's name for people and JSON: escaped, and cut where it is too long."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."


_MESSAGE = re.compile(r"messages/[^/]+/([0-9a-f]{2})/\1[0-9a-f]{62}\.eml")
_FOLDER = re.compile(r"(messages/[^/]+/([0-9a-f]{2}/)?|journal/[^/]+/)")
"""A folder that the archiver makes. It is empty after a crash, or where a console shows it."""


class _Check:
    """The steps of one account's verification, in the order in which ``verify`` calls them."""

    def __init__(
        self,
        account: Account,
        store: Store,
        contents: Scratch,
        findings: Findings,
        *,
        head: JournalHead,
        since: datetime,
    ) -> None:
        """``head`` is the database's; what the store took at ``since`` or later may still be under way."""
        self._account = account
        self._store = store
        self._contents = contents
        self._findings = findings
        self._head = head
        self._since = since

    def read_journal(self) -> None:
        """Follow the chain from its first segment, and put what was captured into the scratch file."""
        last = JournalHead(0, bytes(32))
        for listed in self._store.list(journal_prefix(self._account.id), strangers=True):
            sequence = self._sequence_of(listed.key)
            if sequence is None:
                if not _FOLDER.fullmatch(listed.key):
                    self._report("unrecorded", printable(listed.key), "it is not a journal segment")
                continue
            if sequence <= last.sequence:
                raise _out_of_order(listed.key)
            if sequence > last.sequence + 1:
                lost = last.sequence + 1
                self._report("chain_break", self._segment_key(lost), f"segment {lost} is not in the store")
                last = JournalHead(sequence - 1, b"")
            try:
                found = journal.read(self._store, self._account.id, sequence)
            except IntegrityError as error:
                self._report("chain_break", listed.key, str(error))
                last = JournalHead(sequence, b"")
                continue
            if found is None:
                raise ObjectNotFound(f"{listed.key} was listed, but cannot be read")
            segment, digest = found
            self._check_link(listed, segment, digest, last)
            captured = _captured(segment)
            self._contents.add_written(captured, must_be_recorded=sequence <= self._head.sequence)
            self._findings.segments += 1
            last = JournalHead(sequence, digest)
        if last.sequence < self._head.sequence:
            detail = f"the database knows {self._head.sequence} segments, the store has {last.sequence}"
            self._report("chain_break", self._segment_key(self._head.sequence), detail)

    def _check_link(self, listed: StoredObject, segment: Segment, digest: bytes, last: JournalHead) -> None:
        if last.digest and not journal.follows(segment, last):
            self._report("chain_break", listed.key, "it does not name the segment before it")
        if segment.sequence == self._head.sequence and digest != self._head.digest:
            self._report("chain_break", listed.key, "the database has another digest of it")
        if segment.sequence > self._head.sequence and not self._is_young(listed):
            detail = (
                "the database does not know it; if it was restored from a backup, run: archiver db catch-up"
            )
            self._report("unrecorded", listed.key, detail)

    def compare_database(self) -> bool:
        """Report what only the journal or only the database has; return whether they agree."""
        before = self._findings.unrecorded
        for digest in self._contents.unwritten():
            self._report("unrecorded", self._message_key(digest), "in the database, but not in the journal")
        for digest in self._contents.unrecorded():
            self._report("unrecorded", self._message_key(digest), "in the journal, but not in the database")
        return self._findings.unrecorded == before

    def compare_store(self) -> Iterator[tuple[StoredObject, bytes]]:
        """Compare journal and listing, both sorted by key; yield objects of the right size with their digest.

        Objects that the store lacks are noted for ``report_missing``.
        """
        named = ((self._message_key(content.sha256), content) for content in self._contents.contents())
        for key, content, found in _side_by_side(named, self._messages()):
            if content is None:
                if found is not None and not self._is_young(found):
                    self._report("unrecorded", key, "no journal segment names it")
                continue
            if content.size is None:
                continue  # compare_database reported it
            self._findings.checked += 1
            if found is None:
                self._contents.add_missing(content)
            elif found.size != content.size:
                self._report("damaged", key, f"{found.size} bytes, but the journal says {content.size}")
            else:
                yield found, content.sha256

    def _messages(self) -> Iterator[tuple[str, StoredObject]]:
        """The objects that can be messages, by key. All others are reported."""
        last = ""
        for found in self._store.list(f"messages/{self._account.id}/", strangers=True):
            if _MESSAGE.fullmatch(found.key):
                if found.key <= last:
                    raise _out_of_order(found.key)
                last = found.key
                yield found.key, found
            elif not _FOLDER.fullmatch(found.key):
                self._report("unrecorded", printable(found.key), _NO_KEY)

    def report_missing(self) -> None:
        """Report what ``compare_store`` did not find, in the order of the journal."""
        for digest in self._contents.missing():
            self._report("missing", self._message_key(digest), "not in the store")

    def _report(self, kind: Kind, key: str, detail: str) -> None:
        self._findings.add(Finding(kind, self._account.name, key, detail))

    def _is_young(self, found: StoredObject) -> bool:
        return found.modified_at is not None and found.modified_at >= self._since

    def _message_key(self, digest: bytes) -> str:
        return message_key(self._account.id, digest)

    def _segment_key(self, sequence: int) -> str:
        return segment_key(self._account.id, sequence)

    def _sequence_of(self, key: str) -> int | None:
        """The number of the segment under a key; None for a key that no segment has."""
        name = key.rpartition("/")[2].removesuffix(".ndjson")
        number = int(name) if name.isascii() and name.isdigit() else 0
        return number if number and key == self._segment_key(number) else None


def _out_of_order(key: str) -> OperatorNeeded:
    # A comparison with the journal would report objects as missing that are there.
    return OperatorNeeded(
        f"the store does not list {key} in the order of its keys", hint="report it to the maker of the store"
    )


def _captured(segment: Segment) -> Iterator[tuple[bytes, int]]:
    for line in segment.lines:
        if line.what is What.CAPTURED and line.sha256 is not None and line.size is not None:
            yield line.sha256, line.size


def _side_by_side(
    named: Iterator[tuple[str, Content]], listed: Iterator[tuple[str, StoredObject]]
) -> Iterator[tuple[str, Content | None, StoredObject | None]]:
    """Merge two streams that are sorted by key, each key once."""
    content_key, content = next(named, _END)
    found_key, found = next(listed, _END)
    while content is not None or found is not None:
        if found is None or (content is not None and content_key < found_key):
            yield content_key, content, None
            content_key, content = next(named, _END)
        elif content is None or found_key < content_key:
            yield found_key, None, found
            found_key, found = next(listed, _END)
        else:
            yield found_key, content, found
            content_key, content = next(named, _END)
            found_key, found = next(listed, _END)


_END = ("", None)


def _taken_as_is(
    sound: Iterator[tuple[StoredObject, bytes]],
) -> Iterator[tuple[StoredObject, Finding | None]]:
    for found, _ in sound:
        yield found, None


def _rehashed(
    account: Account, store: Store, sound: Iterator[tuple[StoredObject, bytes]], readers: Executor
) -> Iterator[tuple[StoredObject, Finding | None]]:
    def check(item: tuple[StoredObject, bytes]) -> Finding | None:
        found, expected = item
        digest = hashlib.sha256()
        try:
            with store.get(found.key) as chunks:
                for chunk in chunks:
                    digest.update(chunk)
        except ObjectNotFound:
            return Finding("missing", account.name, found.key, "the store lists it, but does not have it")
        except NotAnObject as error:
            return Finding("damaged", account.name, found.key, str(error))
        if digest.digest() == expected:
            return None
        return Finding("damaged", account.name, found.key, f"its SHA-256 is {digest.hexdigest()}")

    while batch := list(islice(sound, HASHED_AT_ONCE)):
        yield from zip((found for found, _ in batch), readers.map(check, batch), strict=True)

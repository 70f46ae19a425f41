"""One poll of one mailbox: the whole story of its messages, top to bottom.

Owns the order of the steps, on which the promises rest: a message's object is
in the store before the journal names it, the journal's segment is in the store
before the database knows it, and the database knows it before the server is
asked to delete it. Whatever stops a poll between two steps, the next one
finishes or repeats the work and ends in the same state. The session is never
repeated in place; the schedule does that.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, Protocol, Self

from archiver import policy, pop3
from archiver.db import Database, reads, record
from archiver.errors import (
    ArchiverError,
    IntegrityError,
    LeaseLost,
    MessageRefused,
    OperatorNeeded,
    Outcome,
    TryLater,
)
from archiver.evidence import journal
from archiver.model import (
    Account,
    Claim,
    JournalHead,
    MailServer,
    PollReport,
    Resolved,
    Segment,
    SightingKey,
    What,
    message_key,
    segment_key,
)
from archiver.policy import Identified
from archiver.store import ObjectDiffers, PutResult, Store
from archiver.store.spool import BytesBody, Spool, SpooledMessage

DELETIONS_AT_ONCE = 500
"""Messages between one look at the store and their DELE; what a lost connection leaves unsure."""

LINES_AT_ONCE = 5_000
"""Absences that go into one segment: a mailbox that was emptied at once makes several of bounded size."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """A batch closes on whichever comes first, so that a crash repeats little."""

    messages: int = 100
    octets: int = 32 * 1024 * 1024
    seconds: float = 10.0


class Watch(Protocol):
    """Told of a poll's progress while it goes on."""

    def listed(self, listed: int, to_fetch: int, octets: int | None) -> None:
        """The listing was read: so many messages on the server, so many (of so many octets) to fetch."""

    def fetched(self, octets: int) -> None:
        """One message more was read from the server."""


class Unwatched:
    """Nobody looks."""

    def listed(self, listed: int, to_fetch: int, octets: int | None) -> None: ...
    def fetched(self, octets: int) -> None: ...


class Lease(Protocol):
    """The right to poll, while it lasts."""

    @property
    def claim(self) -> Claim: ...

    def check(self) -> None:
        """Raises LeaseLost when so much time has gone by without a renewal that another may hold it soon."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a poll works with. ``connect`` opens a session with an account's server, not yet logged in.

    ``stopping`` tells that the process wants to end: what is under way is
    finished, nothing more is asked for. ``session_seconds`` is when a poll of a
    large mailbox makes room for others.
    """

    connect: Callable[[Account], pop3.Session]
    password: Callable[[Account], str]
    store: Store
    database: Database
    spool: Spool
    uploads: Executor
    now: Callable[[], datetime]
    monotonic: Callable[[], float]
    stopping: Callable[[], bool]
    batch: BatchLimits = BatchLimits()
    session_seconds: float = 1800.0


def poll(account: Account, lease: Lease, tools: Tools, watch: Watch | None = None) -> PollReport:
    """Poll one account and report. Errors that are ours or the server's end up in the report."""
    with _Poll(account, lease, tools, watch or Unwatched()) as story:
        return story.tell()


class _Deletable(NamedTuple):
    """A message on the server that the account's policy lets go, once its capture is proved."""

    entry: pop3.Entry
    sighting: SightingKey
    sha256: bytes


@dataclass(slots=True)
class _Plan:
    """What one listing asks for, set against what the database holds."""

    fetch: list[Identified[pop3.Entry]] = field(default_factory=list)
    present_again: list[SightingKey] = field(default_factory=list)
    absent: list[Resolved] = field(default_factory=list)
    deletable: list[_Deletable] = field(default_factory=list)


@dataclass(slots=True)
class _Fetched:
    """A message that was read from the server and is on its way to the store."""

    item: Identified[pop3.Entry]
    attempts: int
    at: datetime
    sha256: bytes
    octets: int
    upload: Future[PutResult]


@dataclass(slots=True)
class _Batch:
    """Messages whose fate is recorded together."""

    opened_at: float
    fetched: list[_Fetched] = field(default_factory=list)
    resolved: list[Resolved] = field(default_factory=list)
    octets: int = 0

    def is_full(self, limits: BatchLimits, monotonic: float) -> bool:
        return (
            len(self.fetched) + len(self.resolved) >= limits.messages
            or self.octets >= limits.octets
            or (bool(self.fetched) and monotonic - self.opened_at >= limits.seconds)
        )


class _Poll:
    """The state of one poll. ``tell`` is the story; the methods below it are its verbs, in order."""

    def __init__(self, account: Account, lease: Lease, tools: Tools, watch: Watch) -> None:
        self.account = account
        self.lease = lease
        self.tools = tools
        self.watch = watch
        self.started_at = tools.monotonic()
        self.head = JournalHead(0, b"")
        self.journal_uncertain = lease.claim.recover
        self.mailbox: pop3.Session | None = None
        self.server: MailServer | None = None
        self.listing: pop3.Listing | None = None
        self.attempts: dict[SightingKey, int] = {}
        self.known_contents: set[SightingKey] = set()
        self.seen_contents: Counter[SightingKey] = Counter()
        self.untold: Counter[SightingKey] = Counter()
        self.spooled: dict[int, SpooledMessage] = {}
        self.uploads: set[Future[PutResult]] = set()
        self.pipelining_broke = False
        self.new = self.known = self.quarantined = 0
        self.delete_requested = self.octets = self.segments = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # One that was cancelled is not waited for: it may be behind many of other accounts.
        wait([upload for upload in self.uploads if not upload.cancel()])
        for spooled in self.spooled.values():
            spooled.close()

    def tell(self) -> PollReport:
        """The poll, from the journal's end to QUIT."""
        try:
            self._catch_up_with_journal()
            with translated(), self.tools.connect(self.account) as mailbox:
                self.mailbox = mailbox
                mailbox.login(self.tools.password(self.account))
                self.server = _server(mailbox.facts)
                self.listing = mailbox.list()
                plan = self._plan(self.listing)
                self._archive(mailbox, plan)
                self._delete(mailbox, plan)
                self._quit(mailbox)
        except ArchiverError as error:
            return self._report(error.outcome, error)
        return self._report("ok", None)

    def _catch_up_with_journal(self) -> None:
        """Take in the segments that an earlier holder of the lease wrote and could not record."""
        with self.tools.database.reading() as connection:
            self.head = reads.journal_head(connection, self.account.id)
        if not self.lease.claim.recover:
            return
        while (found := journal.read(self.tools.store, self.account.id, self.head.sequence + 1)) is not None:
            # A later token than ours is no reason to stop: where the claim still
            # stands, the database is an older one, restored, and learns it here.
            segment, digest = found
            if not journal.follows(segment, self.head):
                raise IntegrityError(
                    f"journal of {self.account.name}: segment {segment.sequence} does not follow "
                    f"segment {self.head.sequence}",
                    hint="run: archiver verify",
                )
            self._record_segment(segment, digest)
        self.journal_uncertain = False

    def _plan(self, listing: pop3.Listing) -> _Plan:
        """Set the listing against what is known: a set difference of ids, never of dates or numbers."""
        plan = _Plan()
        items = policy.identify(listing.entries)
        unseen = {item.sighting: item for item in items if item.certain}
        uncertain = [item for item in items if not item.certain]
        ambiguous = {item.sighting for item in uncertain}
        before: dict[SightingKey, reads.Known] = {}
        complete = listing.skipped_lines == 0
        # A message without a UIDL may be any of those that are not shown by theirs.
        all_named = all(entry.uidl is not None for entry in listing.entries)
        now = self.tools.now()
        with self.tools.database.reading() as connection:
            for sighting, known in reads.present_sightings(connection, self.account.id, self.account.epoch):
                if sighting.content:
                    self.known_contents.add(sighting)
                elif (item := unseen.pop(sighting, None)) is not None:
                    self._place(plan, item, known, now)
                elif sighting in ambiguous:
                    before[sighting] = known
                elif complete and (all_named or not sighting.uidl):
                    what = What.DELETED if known.delete_requested else What.GONE
                    plan.absent.append(Resolved(what, sighting, now, sha256=known.sha256))
            returned = reads.absent_sightings(
                connection, self.account.id, self.account.epoch, [sighting.uidl for sighting in unseen]
            )
        for sighting, known in returned.items():
            if self.account.delete.after_days is not None and known.state == "captured":
                # Some servers give an id again, to another message. Where we delete, only
                # the content tells; until it was read, the row stays that of an absent one.
                continue
            if (item := unseen.pop(sighting, None)) is not None:
                plan.present_again.append(sighting)
                self._place(plan, item, known, now)
        plan.fetch += unseen.values()
        for item in uncertain:
            self._place_uncertain(plan, item, before.get(item.sighting), now)
        # In the order of the mailbox, which is that of arrival; but what cost a
        # connection before holds nothing else up.
        plan.fetch.sort(key=lambda item: (item.sighting in self.attempts, item.entry.number))
        sizes = [item.entry.size for item in plan.fetch]
        octets = None if None in sizes else sum(size for size in sizes if size is not None)
        self.watch.listed(len(listing.entries), len(plan.fetch), octets)
        return plan

    def _place(self, plan: _Plan, item: Identified[pop3.Entry], known: reads.Known, now: datetime) -> None:
        self.attempts[item.sighting] = known.attempts
        match known.state:
            case "captured" if known.sha256 is not None:
                self.known += 1
                if policy.may_delete(self.account.delete, known.first_seen_at, now):
                    plan.deletable.append(_Deletable(item.entry, item.sighting, known.sha256))
            case "quarantined" if known.retry_at is None or known.retry_at > now:
                self.quarantined += 1
            case _:
                plan.fetch.append(item)

    def _place_uncertain(
        self, plan: _Plan, item: Identified[pop3.Entry], known: reads.Known | None, now: datetime
    ) -> None:
        """Only its content can tell which message this is, so it is fetched; unless that failed of late."""
        if known is None or known.state == "captured":
            plan.fetch.append(item)
        else:
            self.untold[item.sighting] += 1
            self._place(plan, item, known, now)

    def _archive(self, mailbox: pop3.Session, plan: _Plan) -> None:
        """Fetch what is new; close a batch whenever it is full; lose nothing that was fetched whole."""
        claim, epoch = self.lease.claim, self.account.epoch
        if plan.present_again:
            self.tools.database.transact(
                lambda connection: record.present_again(connection, claim, epoch, plan.present_again)
            )
        while len(plan.absent) > LINES_AT_ONCE:
            self._write_segment(plan.absent[:LINES_AT_ONCE])
            del plan.absent[:LINES_AT_ONCE]
        items = {item.entry.number: item for item in plan.fetch}
        batch = _Batch(self.tools.monotonic(), resolved=plan.absent)
        try:
            for outcome in mailbox.retrieve(self._supply(plan.fetch), self._open_spool):
                item = items[outcome.entry.number]
                match outcome:
                    case pop3.Retrieved(sink=spooled):
                        self._send_to_store(item, spooled, batch)
                    case pop3.Refused(error=error):
                        self._set_aside(item, str(error), batch)
                if batch.is_full(self.tools.batch, self.tools.monotonic()):
                    full, batch = batch, _Batch(self.tools.monotonic())
                    self._record(full, plan)
        except (TryLater, OperatorNeeded):
            # The spool has no room for a message: those before it must not be fetched for nothing.
            self._record(batch, plan)
            raise
        except pop3.Pop3Error as error:
            self.pipelining_broke = mailbox.facts.pipelining and error.kind is pop3.FailureKind.PROTOCOL
            if mailbox.in_transit is not None and error.kind in _CONNECTION_DIED:
                self._blame(items[mailbox.in_transit.number], str(error), batch)
            self._record(batch, plan)
            raise
        self._record(batch, plan)
        vanished = self._vanished_contents()
        for start in range(0, len(vanished), LINES_AT_ONCE):
            self._write_segment(vanished[start : start + LINES_AT_ONCE])

    def _vanished_contents(self) -> list[Resolved]:
        """Messages known by content alone that are on the server no more.

        Proved only where every message of a listing that was read whole was
        fetched and told apart: one that was set aside, that is still to come, or
        that shows an id today may be any of those that are not seen.
        """
        listing = self.listing
        if listing is None or listing.skipped_lines or self.seen_contents.total() < len(listing.entries):
            return []
        now = self.tools.now()
        vanished = sorted(self.known_contents - self.seen_contents.keys())
        return [Resolved(What.GONE, sighting, now, sha256=sighting.content) for sighting in vanished]

    def _supply(self, fetch: Iterable[Identified[pop3.Entry]]) -> Iterator[pop3.Entry]:
        """The entries to ask for, until time is up. The client takes them as its window moves on."""
        ends_at = self.started_at + self.tools.session_seconds
        for item in fetch:
            if self.tools.stopping() or self.tools.monotonic() >= ends_at:
                return
            yield item.entry

    def _open_spool(self, entry: pop3.Entry) -> SpooledMessage:
        spooled = self.tools.spool.create(entry.size)
        self.spooled[entry.number] = spooled
        return spooled

    def _send_to_store(self, item: Identified[pop3.Entry], spooled: SpooledMessage, batch: _Batch) -> None:
        """Hand a message over: the upload goes on while the next messages arrive."""
        spooled.seal()
        sighting = item.sighting
        if not item.certain:
            self._tell_apart(sighting, batch)
            item = Identified(item.entry, sighting._replace(content=spooled.sha256), certain=False)
            self.seen_contents[item.sighting] += 1
        upload = self.tools.uploads.submit(self._upload, item.entry.number, spooled)
        self.uploads.add(upload)
        attempts = self.attempts.get(sighting, 0)
        fetched = _Fetched(item, attempts, self.tools.now(), spooled.sha256, spooled.size, upload)
        batch.fetched.append(fetched)
        batch.octets += spooled.size
        self.octets += spooled.size
        self.watch.fetched(spooled.size)

    def _tell_apart(self, sighting: SightingKey, batch: _Batch) -> None:
        """Messages that failed before, and have no id of their own, are all known by content at last."""
        self.untold[sighting] -= 1
        if self.untold[sighting] == 0:
            batch.resolved.append(Resolved(What.GONE, sighting, self.tools.now()))

    def _upload(self, number: int, spooled: SpooledMessage) -> PutResult:
        with spooled:
            try:
                return self.tools.store.put(message_key(self.account.id, spooled.sha256), spooled)
            finally:
                del self.spooled[number]

    def _set_aside(self, item: Identified[pop3.Entry], reason: str, batch: _Batch) -> None:
        """This message alone cannot be had: it is quarantined, and the others go on."""
        if (spooled := self.spooled.pop(item.entry.number, None)) is not None:
            spooled.close()
        attempts = self.attempts.get(item.sighting, 0) + 1
        batch.resolved.append(
            Resolved(What.QUARANTINED, item.sighting, self.tools.now(), reason=reason, attempts=attempts)
        )

    def _blame(self, item: Identified[pop3.Entry], reason: str, batch: _Batch) -> None:
        """The connection died in this message. Once is chance; time and again, it is the message."""
        claim, epoch, now = self.lease.claim, self.account.epoch, self.tools.now()
        attempts = self.attempts.get(item.sighting, 0) + 1
        self.tools.database.transact(
            lambda connection: record.died_in_transit(
                connection, claim, epoch, item.sighting, attempts=attempts, at=now
            )
        )
        if policy.is_fatal(attempts):
            self._set_aside(item, reason, batch)

    def _record(self, batch: _Batch, plan: _Plan) -> None:
        """Steps 2 to 4 of a batch: objects, journal segment, rows; each durable before the next."""
        results = [(fetched, fetched.upload.result()) for fetched in batch.fetched]
        self.uploads.difference_update(fetched.upload for fetched in batch.fetched)
        if not results and not batch.resolved:
            return
        with self.tools.database.reading() as connection:
            held = reads.held(connection, self.account.id, [fetched.sha256 for fetched in batch.fetched])
        captured: set[bytes] = set(held)
        lines = list(batch.resolved)
        counts: Counter[What] = Counter(resolved.what for resolved in batch.resolved)
        for fetched, put in results:
            sighting = fetched.item.sighting
            what = What.KNOWN if fetched.sha256 in captured else What.CAPTURED
            captured.add(fetched.sha256)
            counts[what] += 1
            if sighting in self.known_contents:
                continue  # It is fetched at every poll, and nothing about it is new.
            lines.append(
                Resolved(
                    what,
                    sighting,
                    fetched.at,
                    sha256=fetched.sha256,
                    octets=fetched.octets,
                    version_id=put.version_id,
                    attempts=fetched.attempts,
                )
            )
        if lines:
            self._write_segment(lines)
        # Not before: a report must not count what the database does not know.
        self.new += counts[What.CAPTURED]
        self.known += counts[What.KNOWN]
        self.quarantined += counts[What.QUARANTINED]
        now = self.tools.now()
        plan.deletable += [
            _Deletable(fetched.item.entry, fetched.item.sighting, fetched.sha256)
            for fetched in batch.fetched
            if fetched.item.certain and policy.may_delete(self.account.delete, fetched.at, now)
        ]

    def _write_segment(self, lines: list[Resolved]) -> None:
        if self.server is None or self.listing is None:
            raise RuntimeError("a segment tells of a listing, and there was none")
        segment = Segment(
            account_id=self.account.id,
            account_name=self.account.name,
            account_url=self.account.url,
            epoch=self.account.epoch,
            sequence=self.head.sequence + 1,
            previous=self.head.digest,
            token=self.lease.claim.token,
            written_at=self.tools.now(),
            server=self.server,
            listing_count=len(self.listing.entries),
            listing_digest=self.listing.digest,
            lines=tuple(lines),
        )
        body = BytesBody(journal.encode(segment))
        self.lease.check()
        self.journal_uncertain = True
        try:
            created = self.tools.store.put(segment_key(self.account.id, segment.sequence), body).created
        except ObjectDiffers:
            created = False
        if not created:
            self._settle(segment, body.sha256)
        self._record_segment(segment, body.sha256)
        self.journal_uncertain = False
        self.segments += 1

    def _settle(self, ours: Segment, digest: bytes) -> None:
        """The segment's number was taken: by our own PUT whose answer was lost, or by another writer."""
        found = journal.read(self.tools.store, self.account.id, ours.sequence)
        if found is None:
            raise TryLater(f"the store refused segment {ours.sequence} of {self.account.name} and lacks it")
        theirs, their_digest = found
        if their_digest == digest:
            return
        if theirs.token > ours.token:
            raise LeaseLost(f"journal of {self.account.name} was continued by a later poll")
        raise TryLater(
            f"journal of {self.account.name} was continued by an earlier poll; the next poll takes that in"
        )

    def _record_segment(self, segment: Segment, digest: bytes) -> None:
        claim = self.lease.claim
        self.tools.database.transact(lambda connection: record.segment(connection, claim, segment, digest))
        self.head = JournalHead(segment.sequence, digest)

    def _delete(self, mailbox: pop3.Session, plan: _Plan) -> None:
        """Ask the server to delete what the policy lets go, and of that only what is proved to be archived.

        Each of these stands in this session's one listing, with the same UIDL
        and size as in a transaction that is committed; and its object is looked
        at in the store now.
        """
        for start in range(0, len(plan.deletable), DELETIONS_AT_ONCE):
            if self.tools.stopping():
                return
            chosen = self._prove(plan.deletable[start : start + DELETIONS_AT_ONCE])
            self._ask_to_delete(mailbox, chosen)

    def _prove(self, candidates: list[_Deletable]) -> list[_Deletable]:
        """Those whose capture is old enough. Raises IntegrityError if one's object is not as it must be."""
        with self.tools.database.reading() as connection:
            held = reads.held(connection, self.account.id, [candidate.sha256 for candidate in candidates])
        now = self.tools.now()
        chosen = [
            candidate
            for candidate in candidates
            if (capture := held.get(candidate.sha256)) is not None
            and policy.may_delete(self.account.delete, capture.captured_at, now)
        ]
        looks = self.tools.uploads.map(
            lambda candidate: self._look_at(candidate.sha256, held[candidate.sha256].octets), chosen
        )
        for fault in looks:
            if fault is not None:
                raise IntegrityError(
                    fault, hint="it was not deleted from the mail server; run: archiver verify"
                )
        return chosen

    def _look_at(self, sha256: bytes, octets: int) -> str | None:
        """What is wrong with a capture's object, or None. It is read where the store keeps no checksum."""
        key = message_key(self.account.id, sha256)
        found = self.tools.store.stat(key)
        if found is None:
            return f"{key} was captured, and is missing in the store"
        seen = found.sha256
        if seen is None and found.size == octets:
            digest = hashlib.sha256()
            with self.tools.store.get(key) as chunks:
                for chunk in chunks:
                    digest.update(chunk)
            seen = digest.digest()
        if (found.size, seen) != (octets, sha256):
            return f"{key} was captured, and is altered in the store"
        return None

    def _ask_to_delete(self, mailbox: pop3.Session, chosen: list[_Deletable]) -> None:
        if not chosen:
            return
        claim, epoch = self.lease.claim, self.account.epoch
        sightings = [candidate.sighting for candidate in chosen]
        self.tools.database.transact(
            lambda connection: record.deletions_requested(
                connection, claim, epoch, sightings, self.tools.now()
            )
        )
        self.lease.check()
        self.delete_requested += len(mailbox.delete([candidate.entry for candidate in chosen]))

    def _quit(self, mailbox: pop3.Session) -> None:
        """End the session: all that was fetched in it is recorded by now.

        Only QUIT makes deletions happen (RFC 1939 section 6); where none was
        asked for, a server that hangs up instead of answering does no harm.
        """
        self.lease.check()
        try:
            mailbox.quit()
        except pop3.Pop3Error:
            if self.delete_requested:
                raise

    def _report(self, outcome: Outcome, error: ArchiverError | None) -> PollReport:
        facts = None if self.mailbox is None else self.mailbox.facts
        return PollReport(
            account=self.account.name,
            outcome=outcome,
            listed=None if self.listing is None else len(self.listing.entries),
            new=self.new,
            known=self.known,
            quarantined=self.quarantined,
            delete_requested=self.delete_requested,
            octets=self.octets,
            seconds=self.tools.monotonic() - self.started_at,
            error=None if error is None else str(error),
            hint=None if error is None else error.hint,
            segments=self.segments,
            wait_seconds=error.wait_seconds if isinstance(error, TryLater) else None,
            # Objects that no segment names yet are the next poll's to account for, too.
            journal_uncertain=self.journal_uncertain or bool(self.uploads),
            pipelining_broke=self.pipelining_broke,
            login_delay_seconds=None if facts is None else facts.login_delay_seconds,
            implementation=None if facts is None else facts.implementation,
            warnings=() if facts is None else warnings(self.account, facts),
        )


_CONNECTION_DIED = frozenset({pop3.FailureKind.TRANSIENT, pop3.FailureKind.PROTOCOL})


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """The client's failures, as what happens next."""
    try:
        yield
    except pop3.Pop3Error as error:
        match error.kind:
            case pop3.FailureKind.TRANSIENT | pop3.FailureKind.PROTOCOL:
                raise TryLater(
                    str(error), hint=_how_to_raise(error.limit), wait_seconds=error.wait_seconds
                ) from error
            case pop3.FailureKind.POISON:
                raise MessageRefused(str(error), hint=_how_to_raise(error.limit)) from error
            case _:
                raise OperatorNeeded(str(error)) from error


def warnings(account: Account, facts: pop3.ServerFacts) -> tuple[str, ...]:
    """What is wrong with this server, or with how it is used, though polls of it work. A pure function."""
    found = []
    if account.tls_minimum not in pop3.SAFE_TLS_VERSIONS and facts.tls_version is not None:
        old = facts.tls_version not in _SAFE_TLS_NAMES
        found.append(
            f"{facts.tls_version} is broken (RFC 8996): on the way, the password and the mail may be read"
            if old
            else f"TLS {account.tls_minimum} is allowed for this account and not needed: "
            f"the server speaks {facts.tls_version}; set its tls_minimum to 1.2"
        )
    if facts.expire_days == 0:
        found.append("the server may remove messages once they were read (EXPIRE 0), whatever our policy is")
    return tuple(found)


_SAFE_TLS_NAMES = {f"TLSv{version}" for version in pop3.SAFE_TLS_VERSIONS}

_OF_ACCOUNTS = frozenset({"connect_seconds", "greeting_seconds", "idle_seconds"})
"""Limits in whose place an account's own timeout stands, where it has one."""


def _how_to_raise(limit: str | None) -> str | None:
    """The setting of a limit of the client's bears its name; docs/settings.md describes each."""
    if limit is None:
        return None
    own = ", or the account's timeout if it has one" if limit in _OF_ACCOUNTS else ""
    return f"if that is right for this server, raise ARCHIVER_{limit.upper()}{own}"


def _server(facts: pop3.ServerFacts) -> MailServer:
    return MailServer(
        host=facts.host,
        port=facts.port,
        greeting=facts.greeting,
        mechanism=facts.mechanism,
        tls_version=facts.tls_version,
        cipher=facts.cipher,
        certificate_sha256=facts.certificate_sha256,
    )

"""One poll of one mailbox: the whole story of its messages, top to bottom.

Owns the order of the steps, on which the promises rest: a message's object is
in the store before the journal names it, the journal's segment is in the store
before the database knows it, and the database knows it before the server is
asked to delete it. Whatever stops a poll between two steps, the next one
finishes or repeats the work and ends in the same state. The session is never
repeated in place; the schedule does that.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Container, Generator, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple, Self

from archiver import policy, pop3
from archiver.db import captures, record, sightings
from archiver.db.before import BeforePoll, before_poll
from archiver.errors import (
    ArchiverError,
    IntegrityError,
    LeaseLost,
    OperatorNeeded,
    Outcome,
    TryLater,
)
from archiver.evidence import journal
from archiver.model import (
    Counts,
    HeldBack,
    JournalHead,
    LastLook,
    PollReport,
    Resolved,
    Segment,
    ServerRecord,
    SightingKey,
    What,
    message_key,
    segment_key,
)
from archiver.poll import server as mailserver
from archiver.poll.batch import Batch, Fetched, Unrecorded
from archiver.poll.plan import ABSENCES_AT_ONCE, Item, Plan
from archiver.poll.ports import Lease, Ports, Unwatched, Watch
from archiver.store import ObjectDiffers, PutResult
from archiver.store.spool import BytesBody, SpooledMessage

DELETIONS_AT_ONCE = 500
"""Messages between one look at the store and their DELE; what a lost connection leaves unsure."""

READING_AGAIN_SECONDS = 300.0
"""How long one session reads again what it is to delete: a connection lost before QUIT makes that vain."""


Story = Generator[None, None, PollReport]
"""A poll that goes on as it is asked to, by ``begin`` and ``finish``, in whatever thread."""


def poll(
    before: BeforePoll,
    lease: Lease,
    ports: Ports,
    watch: Watch | None = None,
    *,
    may_glance: bool = False,
) -> Story:
    """Poll one account and report. Errors that are ours or the server's end up in the report.

    ``before`` was read from the database after the account was claimed: what
    was read earlier may be out of date. With ``may_glance``, a mailbox that
    looks unchanged is not listed. A poll that a person asked for always lists.
    """
    with _Poll(before, lease, ports, watch or Unwatched()) as one:
        return (yield from one.tell(may_glance=may_glance))


def begin(story: Story) -> PollReport | None:
    """As much of a poll as waits for the server and does little else; its report, if that was all."""
    try:
        next(story)
    except StopIteration as end:
        report: PollReport = end.value
        return report
    return None


def finish(story: Story) -> PollReport:
    """All that is left of a poll: it reads and writes, computes, and may go on for long."""
    while (report := begin(story)) is None:
        pass
    return report


_Candidate = tuple[Item, captures.Provable]


class _Object(NamedTuple):
    """What the store must have. Neither digest nor size is known of a segment that an earlier poll wrote."""

    key: str
    sha256: bytes | None
    size: int | None = None


class _Poll:
    """The state of one poll. ``tell`` is the story; the methods below it are its verbs, in order."""

    def __init__(self, before: BeforePoll, lease: Lease, ports: Ports, watch: Watch) -> None:
        self.before, self.account, self.head = before, before.account, before.head
        self.spent_today = _spent_today(before, ports.now())
        self.lease = lease
        self.ports = ports
        self.watch = watch
        self.started_at = ports.monotonic()
        self.digests: dict[int, bytes] = {}
        self.journal_uncertain = lease.claim.recover
        self.mailbox: pop3.Session | None = None
        self.server: ServerRecord | None = None
        self.listing: pop3.Listing | None = None
        self.asked: dict[int, Item] = {}
        self.asked_messages = self.asked_bytes = 0
        self.seen_contents: set[SightingKey] = set()
        self.spooled: dict[int, SpooledMessage] = {}
        self.uploads: set[Future[PutResult]] = set()
        self.unrecorded = Unrecorded(ports.batch, self.started_at)
        self.recording: tuple[Batch, Future[Counts]] | None = None
        self.counts = Counts()
        self.segments = 0
        self.calling = False
        self.held_back: HeldBack | None = None
        self.glanced = False
        self.last_look: LastLook | None = None
        self.trusted_until: datetime | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        under_way: list[Future[Any]] = [*self.uploads]
        if self.recording is not None:
            under_way.append(self.recording[1])
        # One that was cancelled is not waited for: it may be behind many of other accounts.
        wait([each for each in under_way if not each.cancel()])
        for spooled in self.spooled.values():
            spooled.close()

    def tell(self, *, may_glance: bool) -> Story:
        """The poll, from the journal's end to QUIT. What follows a ``yield`` wants a thread of its own."""
        try:
            if self.lease.claim.recover:
                yield
                self._catch_up_with_journal()
            with mailserver.translated(), self._log_in() as mailbox:
                self.server = mailserver.of_facts(mailbox.facts)
                seen = self._glance(mailbox, self.before.last_look) if may_glance else None
                if seen is not None and seen == _as_seen(self.before.last_look):
                    self._quit(mailbox)
                    return self._report_unchanged()
                yield
                self.listing = self._list(mailbox, seen)
                plan = self._plan(self.listing)
                self._check_store(plan)
                self._archive(mailbox, plan)
                self._delete(mailbox, plan)
                self._look_back(mailbox, plan)
                self._quit(mailbox)
        except ArchiverError as error:
            return self._report(error.outcome, error)
        return self._report("ok", None)

    def _catch_up_with_journal(self) -> None:
        """Record the segments that an earlier holder of the lease wrote and could not record."""
        while (found := journal.read(self.ports.store, self.account.id, self.head.sequence + 1)) is not None:
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
        with self.ports.database.reading() as connection:
            before = self.before = before_poll(connection, self.account.id)
        self.account, self.head = before.account, before.head
        self.spent_today = _spent_today(before, self.ports.now())

    def _log_in(self) -> pop3.Session:
        """A session that is logged in. What the server refuses and can be had anew is tried once more."""
        password = self.ports.password(self.account)
        try:
            return self._log_in_by(password)
        except pop3.Pop3Error as error:
            another = None
            if error.kind is pop3.FailureKind.AUTH:
                another = self.ports.another_password(self.account, password)
            if another is None:
                raise
        return self._log_in_by(another)

    def _log_in_by(self, password: str) -> pop3.Session:
        self.calling = True
        mailbox = self.mailbox = self.ports.connect(self.account)
        try:
            mailbox.login(password)
        except BaseException:
            mailbox.close()
            raise
        return mailbox

    def _glance(self, mailbox: pop3.Session, last: LastLook | None) -> pop3.Glance | None:
        """STAT and the last message's UIDL, where that they are what they were may be trusted; else None.

        A message that is new or gone changes the count, or the last UIDL, or
        the octets; what slips through all three waits for the next whole listing.
        The poll before, where it was cut short, may have had that, and recorded
        nothing of it.
        """
        if (
            last is None
            or self.lease.claim.recover
            or not policy.is_trusted(last.trusted_until, self.ports.now(), self.ports.full_listing_seconds)
        ):
            return None
        self.glanced = True
        return mailbox.glance(last.last_number)

    def _list(self, mailbox: pop3.Session, seen: pop3.Glance | None) -> pop3.Listing:
        tail = None
        if seen is not None and self.before.last_look is not None:
            tail = self._list_tail(mailbox, self.before.last_look, seen)
        self.glanced = False
        return tail or mailbox.list()

    def _list_tail(self, mailbox: pop3.Session, last: LastLook, seen: pop3.Glance) -> pop3.Listing | None:
        """What came behind the last message, where the mailbox did no more than grow by it.

        Then the one that was last is where it was, the count grew by as many and
        the octets by as much as these have, and no id of theirs is another's.
        """
        if (
            seen.count is None
            or seen.size is None
            or last.last_number != last.stat_count
            or seen.uidl != last.last_uidl
            or not policy.is_worth_a_tail(
                listed=last.stat_count,
                new=seen.count - last.stat_count,
                spared_lines=self.ports.spared_lines,
                pipelining=mailbox.facts.pipelining,
            )
        ):
            return None
        tail = mailbox.list_from(last.stat_count + 1, seen.count)
        if tail is None or sum(entry.size or 0 for entry in tail.entries) != seen.size - last.stat_size:
            return None
        uidls = [entry.uidl or b"" for entry in tail.entries]
        with self.ports.database.reading() as connection:
            if len(set(uidls)) < len(uidls) or sightings.is_any_present(
                connection, self.account.id, self.account.epoch, uidls
            ):
                return None
        before = self.before
        self.counts += _as_listed(before)
        self.trusted_until = last.trusted_until
        return tail

    def _plan(self, listing: pop3.Listing) -> Plan:
        """Set the listing against what is known, and note what is there although it was to go."""
        account = self.account
        delete = policy.delete_in_force(
            account.delete, hold=account.deletion_suspended, forbidden=self.ports.forbid_deletion
        )
        with self.ports.database.reading() as connection:
            # Of what came since, nothing was there.
            plan = Plan.of(
                listing,
                sightings.present(connection, account.id, account.epoch) if listing.first == 1 else (),
                sightings.absent_quarantined(connection, account.id, account.epoch),
                delete=delete,
                now=self.ports.now(),
            )
        self.counts += plan.counts
        if plan.still_there:
            claim, now = self.lease.claim, self.ports.now()
            self.ports.database.transact(
                lambda connection: sightings.listed_again(
                    connection, claim, account.epoch, plan.still_there, now
                )
            )
        self.watch.listed(listing.count, len(plan.fetch), plan.bytes_to_fetch())
        return plan

    def _check_store(self, plan: Plan) -> None:
        """Before anything is fetched, written or deleted: is this the store that the database belongs to?

        It must show the archive's identity, and the last segment that the database knows.
        """
        if not (plan.fetch or plan.absent or plan.due):
            return
        try:
            self.ports.check_store()
        except OperatorNeeded as error:
            # It is no trouble of this account, and passes when the volume is back.
            raise TryLater(str(error), hint=error.hint) from error
        if self.head.sequence:
            last = _Object(segment_key(self.account.id, self.head.sequence), self.head.digest)
            if (fault := self._look_at(last)) is not None:
                raise IntegrityError(fault, hint="nothing was fetched or deleted; run: archiver verify")

    def _archive(self, mailbox: pop3.Session, plan: Plan) -> None:
        """Fetch what is new; close a batch whenever it is full; lose nothing that was fetched whole."""
        if not plan.suspect and plan.overflows:
            self._tell_absences(plan)
        self.unrecorded.opened_at = self.ports.monotonic()
        if not plan.suspect:
            self.unrecorded.resolved += plan.take_absent()
        try:
            for outcome in mailbox.retrieve(self._supply(plan), self._open_spool):
                item = self.asked.pop(outcome.entry.number)
                match outcome:
                    case pop3.Retrieved(sink=spooled):
                        spooled.seal()
                        self._send_to_store(item, spooled, plan)
                    case pop3.Refused(error=error):
                        self._set_aside(item, str(error), plan)
                self._record_what_is_stored(plan)
        except (TryLater, OperatorNeeded):
            # The spool has no room for a message, or the store none for one: the others must not be
            # fetched for nothing. But where the journal is ahead of the database, nothing goes on.
            self._end_recording(plan)
            if not self.journal_uncertain:
                self._record_all(plan)
            raise
        except pop3.Pop3Error as error:
            self._end_recording(plan)
            if mailbox.in_transit is not None and error.kind in _CONNECTION_DIED:
                self._blame(self.asked[mailbox.in_transit.number], str(error), plan)
            self._record_all(plan)
            raise
        self._record_all(plan)
        if not plan.suspect:
            self._tell_absences(plan)
            self._tell_vanished_contents(plan)

    def _tell_absences(self, plan: Plan) -> None:
        """What is not shown any more, some thousands at a time."""
        while lines := plan.take_absent():
            self.counts += self._write_segment(lines)
            if not plan.overflows:
                return
            with self.ports.database.reading() as connection:
                after = lines[-1].sighting
                rows = sightings.present(connection, self.account.id, self.account.epoch, after=after)
                plan.find_more_absent(rows, after)

    def _tell_vanished_contents(self, plan: Plan) -> None:
        """Messages without an id of their own that are not on the server any more.

        That is known once the content of every listed message is: from the row
        of its sighting, or because it was fetched now. One that is set aside, or
        still to come, may be any of them.
        """
        vanished = plan.contents - self.seen_contents
        if not vanished or not plan.believed or self._left() or self.counts.quarantined:
            return
        with self.ports.database.reading() as connection:
            present = sightings.present(connection, self.account.id, self.account.epoch)
            # One that had no id may have one since, and one whose id stood twice may have it alone.
            by_id = {
                former
                for key, known in present
                if not key.content and known.sha256 is not None
                for former in (key._replace(content=known.sha256), SightingKey(b"", key.size, known.sha256))
                if former in vanished
            }
        now = self.ports.now()
        lines = [
            Resolved(
                What.GONE,
                sighting,
                now,
                sha256=sighting.content,
                reason=_KNOWN_BY_ID if sighting in by_id else None,
            )
            for sighting in sorted(vanished)
        ]
        for start in range(0, len(lines), ABSENCES_AT_ONCE):
            self.counts += self._write_segment(lines[start : start + ABSENCES_AT_ONCE])

    def _left(self) -> int:
        """How many listed messages are neither archived nor set aside yet."""
        listed = 0 if self.listing is None else self.listing.count
        return listed - self.counts.resolved

    def _supply(self, plan: Plan) -> Iterator[pop3.Entry]:
        """The entries to ask for, until something holds back. The client takes them as its window moves."""
        for place in plan.fetch:
            item = plan.item(place)
            if self.ports.stopping():
                return
            self.held_back = self._holds_back(item.entry.size or 0)
            if self.held_back is not None:
                return
            yield self._asking_for(item)

    def _asking_for(self, item: Item) -> pop3.Entry:
        self.asked_messages += 1
        self.asked_bytes = max(self.asked_bytes, self.counts.fetched_bytes) + (item.entry.size or 0)
        self.asked[item.entry.number] = item
        return item.entry

    def _holds_back(self, size: int) -> HeldBack | None:
        """What keeps this poll from asking for one message more, of that size."""
        budget, seconds = self.ports.budget, self.ports.monotonic() - self.started_at
        asked_for = max(self.asked_bytes, self.counts.fetched_bytes)
        if budget.ends_at is not None and self.ports.now() >= budget.ends_at:
            return "blackout"
        day_bytes = self.account.day_bytes or budget.day_bytes
        spent = self.spent_today + asked_for
        if day_bytes is not None and spent and spent + size > day_bytes:
            return "day"
        if (
            seconds >= self.ports.session_seconds
            or (budget.messages is not None and self.asked_messages >= budget.messages)
            or (budget.total_bytes is not None and asked_for and asked_for + size > budget.total_bytes)
        ):
            return "session"
        return "room" if seconds >= budget.slice_seconds and self.ports.make_room() else None

    def _open_spool(self, entry: pop3.Entry) -> SpooledMessage:
        spooled = self.ports.spool.create(entry.size)
        self.spooled[entry.number] = spooled
        return spooled

    def _send_to_store(self, item: Item, spooled: SpooledMessage, plan: Plan) -> None:
        """Hand a message over: the upload goes on while the next messages arrive."""
        attempts = plan.attempts.get(item.sighting, 0)
        if not item.certain:
            self._tell_apart(item.sighting, plan)
            item = item._replace(sighting=item.sighting._replace(content=spooled.sha256))
            self.seen_contents.add(item.sighting)
        upload = self.ports.uploads.submit(self._upload, item.entry.number, spooled)
        self.uploads.add(upload)
        fetched = Fetched(item, attempts, self.ports.now(), spooled.sha256, spooled.size, upload)
        self.unrecorded.add(fetched)
        self._count_read(spooled.size)

    def _tell_apart(self, sighting: SightingKey, plan: Plan) -> None:
        """Messages that failed before, and have no id of their own, are all known by content at last."""
        plan.untold[sighting] -= 1
        if plan.untold[sighting] == 0:
            known = Resolved(What.GONE, sighting, self.ports.now(), reason=_KNOWN_BY_CONTENT)
            self.unrecorded.resolved.append(known)

    def _upload(self, number: int, spooled: SpooledMessage) -> PutResult:
        with spooled:
            try:
                return self.ports.store.put(message_key(self.account.id, spooled.sha256), spooled)
            finally:
                del self.spooled[number]

    def _set_aside(self, item: Item, reason: str, plan: Plan) -> None:
        """This message alone cannot be had: it is quarantined, and the others go on."""
        self._drop_spooled(item.entry.number)
        attempts = plan.attempts.get(item.sighting, 0) + 1
        now = self.ports.now()
        self.unrecorded.resolved.append(
            Resolved(What.QUARANTINED, item.sighting, now, reason=reason, attempts=attempts)
        )
        plan.set_aside(now, attempts)

    def _blame(self, item: Item, reason: str, plan: Plan) -> None:
        """The connection died in this message. Once is chance; time and again, it is the message."""
        claim, epoch, now = self.lease.claim, self.account.epoch, self.ports.now()
        attempts = plan.attempts.get(item.sighting, 0) + 1
        self.ports.database.transact(
            lambda connection: sightings.died_in_transit(
                connection, claim, epoch, item.sighting, attempts=attempts, at=now
            )
        )
        if policy.is_fatal(attempts):
            self._set_aside(item, reason, plan)

    def _record_what_is_stored(self, plan: Plan) -> None:
        """Have a batch recorded beside all that goes on; wait where store or database do not keep up."""
        unrecorded = self.unrecorded
        unrecorded.look()
        while unrecorded.is_much_uploading:
            unrecorded.wait_for_some()
        if plan.suspect and unrecorded.is_due(self.ports.monotonic()):
            unrecorded.wait_for_all()  # What the first batch shows decides on all that follows.
        if unrecorded.error is not None:
            self._record_all(plan)  # Whatever else was fetched would wait for a store that is away.
        if self.recording is not None and (self.recording[1].done() or unrecorded.is_much):
            self._end_recording(plan)
        if self.recording is None and (batch := unrecorded.take(self.ports.monotonic())):
            if plan.suspect:
                self._record(batch, plan)
            else:
                self.recording = batch, self.ports.uploads.submit(self._write_down, batch, plan)

    def _end_recording(self, plan: Plan) -> None:
        """Wait for the batch that is being recorded, if there is one, and raise what went wrong with it."""
        if self.recording is not None:
            (batch, written), self.recording = self.recording, None
            self._count_batch(batch, written.result(), plan)

    def _record_all(self, plan: Plan) -> None:
        """Record whatever comes into the store, and raise what kept anything out of it."""
        self._end_recording(plan)
        self.unrecorded.wait_for_all()
        while batch := self.unrecorded.take_stored(self.ports.monotonic()):
            self._record(batch, plan)
        if (error := self.unrecorded.error) is not None:
            raise error

    def _record(self, batch: Batch, plan: Plan) -> None:
        self._count_batch(batch, self._write_down(batch, plan), plan)

    def _write_down(self, batch: Batch, plan: Plan) -> Counts:
        """Steps 3 and 4 of a batch that is stored: journal segment, then rows. Returns what it counted."""
        whats: Counter[What] = Counter(resolved.what for resolved in batch.resolved)
        with self.ports.database.reading() as connection:
            held = captures.contents(
                connection, self.account.id, [fetched.sha256 for fetched in batch.fetched]
            )
        begins_epoch = plan.suspect and self._judge(plan, batch, held)
        captured: set[bytes] = set(held)
        lines = list(batch.resolved)
        for fetched in batch.fetched:
            sighting = fetched.item.sighting
            what = What.KNOWN if fetched.sha256 in captured else What.CAPTURED
            captured.add(fetched.sha256)
            whats[what] += 1
            if sighting in plan.contents:
                continue  # It is fetched at every poll, and nothing about it is new.
            lines.append(
                Resolved(
                    what,
                    sighting,
                    fetched.captured_at,
                    sha256=fetched.sha256,
                    size=fetched.size,
                    version_id=fetched.upload.result().version_id,
                    attempts=fetched.attempts,
                )
            )
        counts = Counts(
            new=whats[What.CAPTURED], known=whats[What.KNOWN], quarantined=whats[What.QUARANTINED]
        )
        if begins_epoch:
            # Of the ids that were found still, nothing is known in the new epoch.
            counts -= plan.counts
        return counts + self._write_segment(lines) if lines or begins_epoch else counts

    def _count_batch(self, batch: Batch, counts: Counts, plan: Plan) -> None:
        """The batch is recorded. Not before: a report must not count what the database does not know."""
        self.uploads.difference_update(fetched.upload for fetched in batch.fetched)
        self.counts += counts
        now = self.ports.now()
        for fetched in batch.fetched:
            if fetched.item.certain and policy.may_delete(plan.delete, fetched.captured_at, now):
                plan.deletable.append(fetched.item.place)
            else:
                plan.keep(fetched.captured_at)

    def _judge(self, plan: Plan, batch: Batch, held: Container[bytes]) -> bool:
        """Whether the mailbox was renumbered, as it seems: known contents under strange ids say so.

        Then a new epoch begins, with the segment of this batch. Nothing of the
        old one is told as absent: what its ids named may be there under others.
        """
        if not batch.fetched:
            return False
        plan.suspect = False
        known = sum(fetched.sha256 in held for fetched in batch.fetched)
        if not policy.is_renumbered(fetched=len(batch.fetched), known=known):
            return False
        epoch = self.account.epoch + 1
        hold = policy.why_suspended(epoch, self.ports.now())
        self.account = replace(self.account, epoch=epoch, deletion_suspended=hold)
        plan.begin_epoch()
        return True

    def _write_segment(self, lines: list[Resolved]) -> Counts:
        """Write a segment and record it. Returns the absences that it counts."""
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
            written_at=self.ports.now(),
            server=self.server,
            listing_count=self.listing.count,
            listing_digest=self.listing.digest,
            listing_first=self.listing.first,
            lines=tuple(lines),
        )
        body = BytesBody(journal.encode(segment))
        self.lease.check()
        self.journal_uncertain = True
        try:
            created = self.ports.store.put(segment_key(self.account.id, segment.sequence), body).created
        except ObjectDiffers:
            created = False
        if not created:
            self._settle(segment, body.sha256)
        self._record_segment(segment, body.sha256)
        self.journal_uncertain = False
        self.segments += 1
        # One that is known otherwise is there still.
        absent = [line for line in lines if line.what in (What.DELETED, What.GONE) and line.reason is None]
        return Counts(
            deleted=sum(line.what is What.DELETED for line in absent),
            gone=sum(line.what is What.GONE and line.sha256 is not None for line in absent),
            lost=sum(line.sha256 is None for line in absent),
        )

    def _settle(self, ours: Segment, digest: bytes) -> None:
        """The segment's number was taken: by our own PUT whose answer was lost, or by another writer."""
        found = journal.read(self.ports.store, self.account.id, ours.sequence)
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
        self.ports.database.transact(lambda connection: record.segment(connection, claim, segment, digest))
        self.head = JournalHead(segment.sequence, digest)
        self.digests[segment.sequence] = digest

    def _delete(self, mailbox: pop3.Session, plan: Plan) -> None:
        """Ask the server to delete what the policy lets go, and of that only what is proved to be archived.

        Each of these stands in this session's one listing, with the same UIDL
        and size as in a transaction that is committed; its content was read in
        this session; and its object and the journal are looked at in the store now.
        """
        if plan.suspect:
            return
        self._delete_at_once(mailbox, plan, plan.take_deletable())
        began_at = self.ports.monotonic()
        for places in _in_parts(plan.due):
            if self.ports.stopping():
                return
            same = self._read_again(mailbox, self._old_enough(places, plan), plan, began_at)
            self._ask_to_delete(mailbox, self._prove(same))
        # What came under the id of another may go by its own age.
        self._delete_at_once(mailbox, plan, plan.take_deletable())

    def _delete_at_once(self, mailbox: pop3.Session, plan: Plan, fetched: "array[int]") -> None:
        """Delete what this session fetched."""
        for places in _in_parts(fetched):
            if self.ports.stopping():
                return
            self._ask_to_delete(mailbox, self._prove(self._old_enough(places, plan)))

    def _old_enough(self, places: "array[int]", plan: Plan) -> list[_Candidate]:
        """Those of these messages whose capture is old enough for the policy."""
        account, now = self.account, self.ports.now()
        items = [plan.item(place) for place in places]
        with self.ports.database.reading() as connection:
            found = sightings.provable(
                connection, account.id, account.epoch, [item.sighting.uidl for item in items]
            )
        return [
            (item, found[item.sighting])
            for item in items
            if item.sighting in found
            and policy.may_delete(plan.delete, found[item.sighting].captured_at, now)
        ]

    def _read_again(
        self, mailbox: pop3.Session, candidates: list[_Candidate], plan: Plan, began_at: float
    ) -> list[_Candidate]:
        """Those that are, octet for octet, what an earlier session captured, as far as this one gets.

        RFC 1939 section 7 lets a server give an id to another message once its
        own is gone; between two polls nobody sees that, and of two messages
        with one size only their content tells. Another content is archived as
        a new message's is. One that the server refuses stays where it is.
        """
        expected = {item.entry.number: (item, provable) for item, provable in candidates}
        same: list[_Candidate] = []
        self.unrecorded.opened_at = self.ports.monotonic()
        supply = self._supply_again([item for item, _ in candidates], began_at)
        try:
            for outcome in mailbox.retrieve(supply, self._open_spool):
                number = outcome.entry.number
                item = self.asked.pop(number)
                match outcome:
                    case pop3.Retrieved(sink=spooled):
                        spooled.seal()
                        if spooled.sha256 == expected[number][1].sha256:
                            same.append(expected[number])
                            self._count_read(spooled.size)
                            self._drop_spooled(number)
                        else:
                            self._replace(item, expected[number][1].sha256, spooled, plan)
                    case pop3.Refused():
                        self._drop_spooled(number)
                self.unrecorded.look()
                if self.unrecorded.error or self.unrecorded.is_due(self.ports.monotonic()):
                    self._record_all(plan)
        except (TryLater, OperatorNeeded):
            if not self.journal_uncertain:
                self._record_all(plan)
            raise
        except pop3.Pop3Error as error:
            self._record_all(plan)
            if mailbox.in_transit is not None and error.kind in _CONNECTION_DIED:
                self._put_off_deletion(expected[mailbox.in_transit.number][0])
            raise
        self._record_all(plan)
        return same

    def _supply_again(self, items: list[Item], began_at: float) -> Iterator[pop3.Entry]:
        """What to read again, as far as the budgets go. What is left out waits for the next poll."""
        for item in items:
            if (
                self.ports.stopping()
                or self.ports.monotonic() - began_at >= READING_AGAIN_SECONDS
                or self._holds_back(item.entry.size or 0) is not None
            ):
                return
            yield self._asking_for(item)

    def _replace(self, item: Item, former: bytes, spooled: SpooledMessage, plan: Plan) -> None:
        """Under this id and size there is another message: the former one went, by our hand or another's."""
        ours = item.sighting in plan.still_there
        self.unrecorded.resolved.append(
            Resolved(
                What.DELETED if ours else What.GONE,
                item.sighting._replace(content=former),
                self.ports.now(),
                sha256=former,
            )
        )
        self.counts -= Counts(known=1)
        self._send_to_store(item, spooled, plan)

    def _put_off_deletion(self, item: Item) -> None:
        """The connection died in this message, which is archived: the next polls do without reading it."""
        claim, epoch, now = self.lease.claim, self.account.epoch, self.ports.now()
        self.ports.database.transact(
            lambda connection: sightings.deletion_put_off(connection, claim, epoch, item.sighting, now)
        )

    def _drop_spooled(self, number: int) -> None:
        if (spooled := self.spooled.pop(number, None)) is not None:
            spooled.close()

    def _count_read(self, size: int) -> None:
        self.counts += Counts(fetched_bytes=size)
        self.watch.fetched(size)

    def _prove(self, candidates: list[_Candidate]) -> list[Item]:
        """Their messages. Raises IntegrityError if an object or a journal segment is not as it must be."""
        account = self.account.id
        objects = [
            _Object(message_key(account, each.sha256), each.sha256, each.size) for _, each in candidates
        ]
        # The head stands for the sightings, which segments after a capture's own may tell of.
        sequences = {each.sequence for _, each in candidates} | {self.head.sequence}
        segments = [_Object(segment_key(account, each), self.digests.get(each)) for each in sorted(sequences)]
        for fault in self.ports.uploads.map(self._look_at, [*objects, *segments] if candidates else []):
            if fault is not None:
                raise IntegrityError(
                    fault, hint="nothing was deleted from the mail server; run: archiver verify"
                )
        return [item for item, _ in candidates]

    def _look_at(self, wanted: _Object) -> str | None:
        """What is wrong with an object, or None. It is read where the store keeps no checksum."""
        found = self.ports.store.stat(wanted.key)
        if found is None:
            return f"{wanted.key} was written, and is missing in the store"
        if wanted.sha256 is None:
            return None if found.size else f"{wanted.key} was written, and is empty in the store"
        seen = found.sha256
        if seen is None and wanted.size in (None, found.size):
            digest = hashlib.sha256()
            with self.ports.store.get(wanted.key) as chunks:
                for chunk in chunks:
                    digest.update(chunk)
            seen = digest.digest()
        if wanted.size not in (None, found.size) or seen != wanted.sha256:
            return f"{wanted.key} was written, and is altered in the store"
        return None

    def _ask_to_delete(self, mailbox: pop3.Session, chosen: list[Item]) -> None:
        if not chosen:
            return
        claim, epoch = self.lease.claim, self.account.epoch
        keys = [item.sighting for item in chosen]
        self.ports.database.transact(
            lambda connection: sightings.deletions_requested(connection, claim, epoch, keys, self.ports.now())
        )
        self.lease.check()
        asked = len(mailbox.delete([item.entry for item in chosen]))
        self.counts += Counts(delete_requested=asked)

    def _look_back(self, mailbox: pop3.Session, plan: Plan) -> None:
        """Remember what the mailbox looks like, if nothing is left to do: by that the next poll knows it.

        The server is asked in the same words as it will be then. One that
        trips over them, or contradicts its own listing, is listed at each poll.
        """
        entries = plan.listing.entries
        last = entries[-1] if entries else None
        if self._left() or self.counts.delete_requested or not plan.is_clear:
            return
        now = self.ports.now()
        until = policy.trusted_until(now, self.ports.full_listing_seconds, plan.due_at(), self.ports.uniform)
        if until is None:
            return
        if self.trusted_until is not None:
            until = min(until, self.trusted_until)
        try:
            seen = mailbox.glance(None if last is None else last.number)
        except pop3.Pop3Error:
            return
        if seen.size is None or seen.count != plan.listing.count:
            return
        if last is None:
            self.last_look = LastLook(seen.count, seen.size, None, None, until)
        elif last.uidl is not None and seen.uidl == last.uidl:
            self.last_look = LastLook(seen.count, seen.size, last.number, last.uidl, until)

    def _quit(self, mailbox: pop3.Session) -> None:
        """End the session: all that was fetched in it is recorded by now.

        Only QUIT makes deletions happen (RFC 1939 section 6); where none was
        asked for, a server that hangs up instead of answering does no harm.
        """
        self.lease.check()
        try:
            mailbox.quit()
        except pop3.Pop3Error:
            if self.counts.delete_requested:
                raise

    def _report_unchanged(self) -> PollReport:
        """The mailbox is as it was when it was listed last, and so is what is known of its messages."""
        before = self.before
        self.counts += _as_listed(before)
        return self._report("ok", None, listed=before.listed)

    def _report(
        self, outcome: Outcome, error: ArchiverError | None, *, listed: int | None = None
    ) -> PollReport:
        facts = None if self.mailbox is None else self.mailbox.facts
        return PollReport(
            account=self.account.name,
            outcome=outcome,
            listed=listed if self.listing is None else self.listing.count,
            counts=self.counts,
            seconds=self.ports.monotonic() - self.started_at,
            error=None if error is None else str(error),
            hint=None if error is None else error.hint,
            segments=self.segments,
            glanced=self.glanced,
            last_look=self.last_look,
            wait_seconds=error.wait_seconds if isinstance(error, TryLater) else None,
            # Objects that no segment names yet are the next poll's to account for, too.
            journal_uncertain=self.journal_uncertain or bool(self.uploads) or self.recording is not None,
            avoid=() if facts is None else tuple(sorted(facts.avoid)),
            suspect=() if facts is None else tuple(sorted(facts.suspect)),
            login_delay_seconds=None if facts is None else facts.login_delay_seconds,
            implementation=None if facts is None else facts.implementation,
            warnings=() if facts is None else (*mailserver.warnings(self.account, facts), *self._of_budget()),
            reached=self.mailbox is not None if self.calling else None,
            held_back=self.held_back,
        )

    def _of_budget(self) -> Iterator[str]:
        if self.held_back == "day":
            spent = self.spent_today + self.counts.fetched_bytes
            yield (
                f"the day's budget is spent: {spent} bytes fetched since 00:00 UTC, "
                f"and {self._left()} messages wait for tomorrow"
            )


def _spent_today(before: BeforePoll, now: datetime) -> int:
    """The bytes that earlier polls of this account fetched today (UTC)."""
    return before.day_bytes if before.day == now.date() else 0


def _as_listed(before: BeforePoll) -> Counts:
    """What is known of the messages that were listed last."""
    return Counts(known=before.listed - before.quarantined, quarantined=before.quarantined)


def _as_seen(look: LastLook | None) -> pop3.Glance | None:
    return None if look is None else pop3.Glance(look.stat_count, look.stat_size, look.last_uidl)


_KNOWN_BY_CONTENT = "it is known by its content"
_KNOWN_BY_ID = "it is known by its id"
"""Why a sighting ended, although its message is there still."""


def _in_parts(places: "array[int]") -> Iterator["array[int]"]:
    """Some hundreds at a time."""
    return (places[at : at + DELETIONS_AT_ONCE] for at in range(0, len(places), DELETIONS_AT_ONCE))


_CONNECTION_DIED = frozenset({pop3.FailureKind.TRANSIENT, pop3.FailureKind.PROTOCOL})

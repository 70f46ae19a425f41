"""What a session fetches, on its way from the wire to the journal.

Owns the messages that were asked for, those that arrive, their uploads, and when a
batch is recorded. Promises that a batch holds stored messages alone, that nothing
that was fetched whole is dropped while it can still be recorded, and that a report
counts only what the database knows. The caller decides which messages are asked
for, and when.

Threads: an ``Intake`` belongs to the poll's own thread. A message's content is
handed over to the thread that uploads it, and the chain to the thread that records
(see ``chain``). Both threads receive frozen values, and hand back a result.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace

from archiver import policy, pop3
from archiver.db import captures, sightings
from archiver.model import Account, Counts, Resolved, SightingKey, What, message_key
from archiver.poll.batch import Batch, Fetched, Unrecorded
from archiver.poll.budget import Spending
from archiver.poll.chain import Recorder, Source
from archiver.poll.plan import Item, Plan
from archiver.poll.ports import Lease, Ports, Watch
from archiver.store import PutResult, Store
from archiver.store.spool import SpooledMessage

CONNECTION_DIED = frozenset({pop3.FailureKind.TRANSIENT, pop3.FailureKind.PROTOCOL})
"""Failures that may be the fault of the message that was under way."""

_KNOWN_BY_CONTENT = "it is known by its content"
"""Why a sighting ended although its message is still there."""


class Intake:
    """The messages of one session. Its verbs are in the order of a message's way."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        recorder: Recorder,
        spending: Spending,
        lease: Lease,
        ports: Ports,
        watch: Watch,
        counts: Counts,
    ) -> None:
        self.plan = plan
        self.source = source
        self.recorder = recorder
        self.spending = spending
        self.counts = counts
        """Recorded messages, and listed ones that need nothing done."""
        self.seen_contents: set[SightingKey] = set()
        """Messages without an id of their own that were fetched in this session."""
        self._lease = lease
        self._ports = ports
        self._watch = watch
        self._asked: dict[int, Item] = {}
        self._arriving: dict[int, SpooledMessage] = {}
        self._uploads: dict[Future[PutResult], SpooledMessage] = {}
        self._unrecorded = Unrecorded(ports.batch, ports.monotonic())

    @property
    def account(self) -> Account:
        """The account, in the epoch that the mailbox is in."""
        return self.source.account

    @property
    def to_come(self) -> int:
        """How many listed messages are neither archived nor in quarantine yet."""
        return self.source.listing.count - self.counts.resolved

    @property
    def has_uploads(self) -> bool:
        """Whether the store may have objects that no segment names yet."""
        return bool(self._uploads)

    def close(self) -> None:
        """Give everything back, and wait for the work that has begun in other threads."""
        # An upload that could be cancelled may be queued behind many of other accounts.
        wait([upload for upload in self._uploads if not upload.cancel()])
        self.recorder.abandon()
        for spooled in (*self._arriving.values(), *self._uploads.values()):
            spooled.close()

    # A message, from the wire to the store

    def open_batch(self, resolved: Iterable[Resolved] = ()) -> None:
        """A batch opens now, with what is resolved without being fetched."""
        self._unrecorded.opened_at = self._ports.monotonic()
        self._unrecorded.resolved += resolved

    def ask(self, item: Item) -> pop3.Entry:
        """Note that the server is asked for a message."""
        self.spending.asked(item.entry.size)
        self._asked[item.entry.number] = item
        return item.entry

    def open_spool(self, entry: pop3.Entry) -> SpooledMessage:
        """Where a message's content goes while it arrives."""
        spooled = self._arriving[entry.number] = self._ports.spool.create(entry.size)
        return spooled

    def answered(self, entry: pop3.Entry) -> Item:
        """The message that was asked for, once its answer is there."""
        return self._asked.pop(entry.number)

    def in_transit(self, mailbox: pop3.Session, error: pop3.Pop3Error) -> Item | None:
        """The message over which the connection died, if it was a message."""
        if mailbox.in_transit is None or error.kind not in CONNECTION_DIED:
            return None
        return self._asked[mailbox.in_transit.number]

    def drop(self, item: Item) -> None:
        """Forget what arrived of a message."""
        if (spooled := self._arriving.pop(item.entry.number, None)) is not None:
            spooled.close()

    def count_read(self, size: int) -> None:
        """A message of this size was read whole."""
        self.spending.fetched(size)
        self._watch.fetched(size)

    def store(self, item: Item, spooled: SpooledMessage) -> None:
        """Hand a message over to be uploaded, while the next ones arrive."""
        attempts = self.plan.attempts.get(item.sighting, 0)
        if not item.certain:
            self._tell_apart(item.sighting)
            item = replace(item, sighting=item.sighting._replace(content=spooled.sha256))
            self.seen_contents.add(item.sighting)
        sha256, size = spooled.sha256, spooled.size
        upload = self._ports.uploads.submit(_upload, self._ports.store, self.account.id, spooled)
        self._uploads[upload] = self._arriving.pop(item.entry.number)
        self._unrecorded.add(Fetched(item, attempts, self._ports.now(), sha256, size, upload))
        self.count_read(size)

    def _tell_apart(self, sighting: SightingKey) -> None:
        """A message that failed before, and has no id of its own, is known by its content at last."""
        if self.plan.recognise(sighting):
            self.resolve(Resolved(What.GONE, sighting, self._ports.now(), reason=_KNOWN_BY_CONTENT))

    # A message that cannot be had

    def resolve(self, line: Resolved) -> None:
        """Something to record that has no object of its own."""
        self._unrecorded.resolved.append(line)

    def quarantine(self, item: Item, reason: str) -> None:
        """This message alone cannot be had: it is quarantined, and the others go on."""
        self.drop(item)
        attempts = self.plan.attempts.get(item.sighting, 0) + 1
        now = self._ports.now()
        self.resolve(Resolved(What.QUARANTINED, item.sighting, now, reason=reason, attempts=attempts))
        self.plan.quarantined_now(now, attempts)

    def blame(self, item: Item, reason: str) -> None:
        """This message failed, perhaps by itself. Once is chance; several times, it is the message."""
        claim, epoch, now = self._lease.claim, self.account.epoch, self._ports.now()
        attempts = self.plan.attempts.get(item.sighting, 0) + 1
        self._ports.database.transact(
            lambda connection: sightings.died_in_transit(
                connection, claim, epoch, item.sighting, attempts=attempts, at=now
            )
        )
        if policy.is_fatal(attempts):
            self.quarantine(item, reason)

    def _blame_refused(self) -> None:
        """Blame each message that the store refused for itself. The others go on."""
        refused, self._unrecorded.refused = self._unrecorded.refused, []
        for fetched, error in refused:
            del self._uploads[fetched.upload]
            # Without the content, as the next listing shows it.
            listed = fetched.item.sighting._replace(content=b"")
            self.blame(replace(fetched.item, sighting=listed), str(error))

    # Batches

    def record_stored(self) -> None:
        """Have a batch recorded in another thread. Wait if store or database do not keep up."""
        unrecorded, plan = self._unrecorded, self.plan
        unrecorded.notice_uploads()
        while unrecorded.is_much_uploading:
            unrecorded.wait_for_some()
        self._blame_refused()
        if plan.looks_renumbered and unrecorded.is_due(self._ports.monotonic()):
            unrecorded.wait_for_all()  # The first batch decides about all that follows.
        if unrecorded.error is not None:
            self.record_all()  # Anything else that was fetched would wait for a store that does not answer.
        if self.recorder.has_result or (self.recorder.is_recording and unrecorded.is_much):
            self.end_recording()
        if self.recorder.is_recording:
            return
        batch = unrecorded.next_batch(self._ports.monotonic())
        if batch is None:
            return
        if plan.looks_renumbered:
            self._record(batch)
        else:
            source, by_content = self.source, plan.contents
            self.recorder.begin(batch, lambda chain: chain.record(source, batch, by_content))

    def record_due(self) -> None:
        """Record all that came into the store, in this thread, if a batch is due or an upload failed."""
        self._unrecorded.notice_uploads()
        self._blame_refused()
        if self._unrecorded.error or self._unrecorded.is_due(self._ports.monotonic()):
            self.record_all()

    def end_recording(self) -> None:
        """Wait for the batch that is being recorded, if there is one, and raise what went wrong with it."""
        if (ended := self.recorder.end()) is not None:
            self._count(*ended)

    def record_all(self) -> None:
        """Record all that comes into the store, and raise what kept anything out of it."""
        self.end_recording()
        self._unrecorded.wait_for_all()
        self._blame_refused()
        while batch := self._unrecorded.stored_batch(self._ports.monotonic()):
            self._record(batch)
        if (error := self._unrecorded.error) is not None:
            raise error

    def write(self, lines: Sequence[Resolved]) -> None:
        """Write a segment of lines that belong to no batch."""
        self.counts += self.recorder.now(lambda chain: chain.write(self.source, lines))

    def _record(self, batch: Batch) -> None:
        begins_epoch = self.plan.looks_renumbered and self._begin_epoch_if_renumbered(batch)
        source, by_content = self.source, self.plan.contents
        counts = self.recorder.now(
            lambda chain: chain.record(source, batch, by_content, begins_epoch=begins_epoch)
        )
        if begins_epoch:
            # Of the ids that were still found, nothing is known in the new epoch.
            counts -= self.plan.counts
        self._count(batch, counts)

    def _count(self, batch: Batch, counts: Counts) -> None:
        """The batch is recorded. Not before: a report must not count what the database does not know."""
        for fetched in batch.fetched:
            del self._uploads[fetched.upload]
        self.counts += counts
        now = self._ports.now()
        for fetched in batch.fetched:
            if fetched.item.certain and policy.may_delete(self.plan.delete, fetched.captured_at, now):
                self.plan.deletable.append(fetched.item.index)
            else:
                self.plan.keep(fetched.captured_at)

    def _begin_epoch_if_renumbered(self, batch: Batch) -> bool:
        """Whether the mailbox was renumbered, as suspected: known contents under unknown ids prove it.

        Then a new epoch begins, with the segment of this batch. Nothing of the old
        one is recorded as absent: its messages may be there under other ids.
        """
        if not batch.fetched:
            return False
        plan, account = self.plan, self.account
        plan.looks_renumbered = False
        with self._ports.database.reading() as connection:
            archived = captures.contents(connection, account.id, [each.sha256 for each in batch.fetched])
        known = sum(fetched.sha256 in archived for fetched in batch.fetched)
        if not policy.is_renumbered(fetched=len(batch.fetched), known=known):
            return False
        epoch = account.epoch + 1
        suspended = policy.why_suspended(epoch, self._ports.now())
        account = replace(account, epoch=epoch, deletion_suspended=suspended)
        self.source = self.source._replace(account=account)
        plan.begin_epoch()
        return True


def _upload(store: Store, account_id: str, spooled: SpooledMessage) -> PutResult:
    """Step 2 of a batch, in a thread of its own, to which the message's content now belongs."""
    with spooled:
        return store.put(message_key(account_id, spooled.sha256), spooled)

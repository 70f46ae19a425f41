"""The writer of an account's journal: its chain of segments, as one poll continues it.

Owns where the chain stands: its head, the digests of the segments that this poll
recorded, and whether the store may have a segment that the database does not know.
Steps 3 and 4 of a batch are here and nowhere else: first the segment in the store,
then one transaction. Which batches are recorded, and when, is the caller's business.

Threads: a ``Chain`` belongs to one thread at a time, the one that records. The
poll's own thread has the ``Recorder``. That lends the chain to a recording, which
may go on in another thread, and has nothing but frozen values to read: ``Counts``
once the recording has ended, and the ``ChainState`` that was handed back with it.
"""

from collections import Counter
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple, TypeVar

from archiver import pop3
from archiver.db import captures, record
from archiver.db.before import BeforePoll
from archiver.errors import IntegrityError, LeaseLost, TryLater
from archiver.evidence import journal
from archiver.model import (
    Account,
    Counts,
    JournalHead,
    Resolved,
    Segment,
    ServerRecord,
    SightingKey,
    What,
    segment_key,
)
from archiver.poll.batch import Batch
from archiver.poll.ports import Lease, Ports
from archiver.store import ObjectDiffers
from archiver.store.spool import BytesBody

ResultT = TypeVar("ResultT")


class Source(NamedTuple):
    """What a segment says about the session that it comes from."""

    account: Account
    server: ServerRecord
    listing: pop3.Listing


class ChainState(NamedTuple):
    """Where a chain stood when it was handed back."""

    head: JournalHead
    segments: int
    """Segments that this poll wrote."""
    is_uncertain: bool
    """Whether the store may have a segment that the database does not know."""


class Chain:
    """The chain itself. For one thread at a time: see the module."""

    def __init__(self, before: BeforePoll, lease: Lease, ports: Ports) -> None:
        self._account_id, self._name = before.account.id, before.account.name
        self._lease = lease
        self._ports = ports
        self._head = before.head
        self._digests = {before.head.sequence: before.head.digest}
        self._segments = 0
        self._is_uncertain = lease.claim.recover

    @property
    def state(self) -> ChainState:
        return ChainState(self._head, self._segments, self._is_uncertain)

    def digest(self, sequence: int) -> bytes | None:
        """The digest of the segment that this poll began behind, or that it recorded; None for any other."""
        return self._digests.get(sequence)

    def catch_up(self) -> None:
        """Record the segments that an earlier holder of the lease wrote and could not record."""
        store = self._ports.store
        while (found := journal.read(store, self._account_id, self._head.sequence + 1)) is not None:
            # A later token than ours is no reason to stop: if our claim is valid, the
            # database was restored from an older copy, and learns the token here.
            segment, digest = found
            if not journal.follows(segment, self._head):
                raise IntegrityError(
                    f"journal of {self._name}: segment {segment.sequence} does not follow "
                    f"segment {self._head.sequence}",
                    hint="run: archiver verify",
                )
            self._record(segment, digest)
        self._is_uncertain = False

    def record(
        self, source: Source, batch: Batch, by_content: Container[SightingKey], *, begins_epoch: bool = False
    ) -> Counts:
        """Steps 3 and 4 of a batch whose messages are stored. Returns what it counts.

        ``by_content`` are sightings that are known by their content alone. They are
        fetched at every poll, so seeing one again is not worth a line. The first
        segment of an epoch is written even if it has no lines.
        """
        with self._ports.database.reading() as connection:
            captured = set(
                captures.contents(connection, self._account_id, [each.sha256 for each in batch.fetched])
            )
        whats: Counter[What] = Counter(resolved.what for resolved in batch.resolved)
        lines = list(batch.resolved)
        for fetched in batch.fetched:
            what = What.KNOWN if fetched.sha256 in captured else What.CAPTURED
            captured.add(fetched.sha256)
            whats[what] += 1
            if fetched.item.sighting in by_content:
                continue
            lines.append(
                Resolved(
                    what,
                    fetched.item.sighting,
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
        return counts + self.write(source, lines) if lines or begins_epoch else counts

    def write(self, source: Source, lines: Sequence[Resolved]) -> Counts:
        """Put a segment into the store, then record it. Returns the absences that it counts.

        Raises LeaseLost or TryLater if another writer took the segment's number.
        """
        segment = Segment(
            account_id=source.account.id,
            account_name=source.account.name,
            account_url=source.account.url,
            epoch=source.account.epoch,
            sequence=self._head.sequence + 1,
            previous=self._head.digest,
            token=self._lease.claim.token,
            written_at=self._ports.now(),
            server=source.server,
            listing_count=source.listing.count,
            listing_digest=source.listing.digest,
            listing_first=source.listing.first,
            lines=tuple(lines),
        )
        body = BytesBody(journal.encode(segment))
        self._lease.check()
        self._is_uncertain = True
        try:
            created = self._ports.store.put(segment_key(self._account_id, segment.sequence), body).created
        except ObjectDiffers:
            created = False
        if not created:
            self._settle(segment, body.sha256)
        self._record(segment, body.sha256)
        self._is_uncertain = False
        self._segments += 1
        # A line with a reason is about a message that is still there, known in another way.
        absent = [line for line in lines if line.what in (What.DELETED, What.GONE) and line.reason is None]
        return Counts(
            deleted=sum(line.what is What.DELETED for line in absent),
            gone=sum(line.what is What.GONE and line.sha256 is not None for line in absent),
            lost=sum(line.sha256 is None for line in absent),
        )

    def _settle(self, ours: Segment, digest: bytes) -> None:
        """The number is taken: by our own PUT whose answer was lost, or by another writer."""
        found = journal.read(self._ports.store, self._account_id, ours.sequence)
        if found is None:
            raise TryLater(
                f"the store says that segment {ours.sequence} of {self._name} exists, but it cannot be read"
            )
        theirs, their_digest = found
        if their_digest == digest:
            return
        if theirs.token > ours.token:
            raise LeaseLost(f"journal of {self._name} was continued by a later poll")
        raise TryLater(
            f"journal of {self._name} was continued by an earlier poll; the next poll records that"
        )

    def _record(self, segment: Segment, digest: bytes) -> None:
        claim = self._lease.claim
        self._ports.database.transact(lambda connection: record.segment(connection, claim, segment, digest))
        self._head = JournalHead(segment.sequence, digest)
        self._digests[segment.sequence] = digest


class Recording(NamedTuple):
    """A batch that is being recorded in another thread."""

    batch: Batch
    counts: Future[Counts]


class Recorder:
    """Lends the chain to one recording at a time. For the poll's own thread."""

    def __init__(self, chain: Chain, threads: Executor) -> None:
        self._chain = chain
        self._threads = threads
        self._recording: Recording | None = None
        self._state = chain.state

    @property
    def state(self) -> ChainState:
        """Where the chain stood when it was last handed back."""
        return self._state

    @property
    def is_uncertain(self) -> bool:
        """Whether the store may have a segment that the database does not know."""
        return self._recording is not None or self._state.is_uncertain

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    @property
    def has_result(self) -> bool:
        """Whether the recording in the other thread has come to its end."""
        return self._recording is not None and self._recording.counts.done()

    def now(self, work: Callable[[Chain], ResultT]) -> ResultT:
        """Do this with the chain, in this thread."""
        chain = self._lend()
        try:
            return work(chain)
        finally:
            self._state = chain.state

    def begin(self, batch: Batch, work: Callable[[Chain], Counts]) -> None:
        """Have another thread do this with the chain. Until ``end``, the chain belongs to that thread."""
        self._recording = Recording(batch, self._threads.submit(work, self._lend()))

    def end(self) -> tuple[Batch, Counts] | None:
        """Wait for the recording, if there is one, and take the chain back. Raises what went wrong in it."""
        if self._recording is None:
            return None
        (batch, counts), self._recording = self._recording, None
        try:
            return batch, counts.result()
        finally:
            self._state = self._chain.state

    def abandon(self) -> None:
        """Cancel the recording, or wait for it if it has begun."""
        if self._recording is not None and not self._recording.counts.cancel():
            self._recording.counts.exception()

    def _lend(self) -> Chain:
        if self._recording is not None:
            raise RuntimeError("the chain belongs to the recording that is under way")
        return self._chain

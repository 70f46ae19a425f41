"""What to do about one listing, by comparison with what the database holds.

Owns identity within a listing, and the comparison: what to fetch, what may be
deleted, what is absent. Both sides come in the byte order of the UIDLs and are
walked side by side. So half a million messages take one pass and a few bytes
each, and only what differs becomes an object. Sets of ids decide, never dates or
message numbers. Pure: it asks neither server nor store nor database. The poll decides
what is done about a plan, and in which order.
"""

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import Self

from archiver import policy, pop3
from archiver.db.sightings import Known
from archiver.model import NEVER_DELETE, UNKNOWN_SIZE, Counts, DeletePolicy, Resolved, SightingKey, What

ABSENCES_AT_ONCE = 5_000
"""Absences that are kept in memory, and go into one segment. A mailbox that was emptied has many."""

UNNAMED_LOOKED_AT = 1_000
"""Messages without a UIDL whose sizes are compared with those that we asked to delete. A server with more of
them has no UIDL at all."""

Listed = tuple[bytes, int, pop3.Entry]
KnownRow = tuple[SightingKey, Known]


@dataclass(frozen=True, slots=True)
class Item:
    """A message of the listing and its sighting."""

    index: int
    """Its index in ``listing.entries``."""
    entry: pop3.Entry
    sighting: SightingKey
    certain: bool
    """Whether its UIDL identifies it. If not, only its content does."""


@dataclass(slots=True)
class Plan:
    """The work that a listing makes. Messages are indices of ``listing.entries``."""

    listing: pop3.Listing
    order: "array[int]"
    """The messages in the byte order of their UIDLs."""
    delete: DeletePolicy
    """The deletion policy in force."""
    now: datetime
    believed: bool
    """Whether the listing was read whole, so that what it does not show is not there."""
    unnamed_sizes: frozenset[int] | None
    """The sizes of the messages without a UIDL; None if one of them may have any size."""
    quarantined_before: Mapping[SightingKey, Known]
    """Sightings that are in quarantine and were absent."""
    fetch: "array[int]" = field(default_factory=lambda: array("I"))
    """What to fetch, in order."""
    due: "array[int]" = field(default_factory=lambda: array("I"))
    """What the policy lets go, fetched by earlier sessions."""
    deletable: "array[int]" = field(default_factory=lambda: array("I"))
    """What the policy lets go, fetched in this session."""
    uncertain: set[int] = field(default_factory=set)
    """Messages that only their content identifies."""
    attempts: dict[SightingKey, int] = field(default_factory=dict)
    """How often fetching has failed."""
    still_there: list[SightingKey] = field(default_factory=list)
    """Sightings that are listed although we asked to delete them, or although they were absent."""
    absent: list[Resolved] = field(default_factory=list)
    """The first of the absences."""
    overflows: bool = False
    """Whether ``find_more_absent`` finds others."""
    contents: frozenset[SightingKey] = frozenset()
    """Sightings that are known by their content alone."""
    unrecognised: Counter[SightingKey] = field(default_factory=Counter)
    """Messages that failed before and have no id of their own, so that any of these may be any of those."""
    looks_renumbered: bool = False
    """Whether the mailbox may be renumbered. Then nothing is absent or deleted until contents were seen."""
    known: int = 0
    quarantined: int = 0
    known_ids: int = 0
    """Of the ids that identify a message and are not expected to be gone: those that were there before."""
    found_ids: int = 0
    """Of these, the ones that are still listed."""
    unknown_ids: int = 0
    """Ids that are listed for the first time."""
    oldest_kept: datetime | None = None
    earliest_retry: datetime | None = None
    _contents: set[SightingKey] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        listing: pop3.Listing,
        known_before: Iterable[KnownRow],
        quarantined_before: Mapping[SightingKey, Known],
        *,
        delete: DeletePolicy,
        now: datetime,
    ) -> Self:
        """Compare a listing with ``known_before``: what the last listing showed, in the order of its keys.

        ``quarantined_before`` is what is in quarantine although it was absent.
        ``delete`` is the policy in force.
        """
        order = listing.by_uidl()
        unnamed_sizes = _unnamed_sizes(listing, order)
        plan = cls(listing, order, delete, now, listing.is_whole, unnamed_sizes, quarantined_before)
        for uidl, listed, rows in _side_by_side(_listed(listing, order), _by_uidl(known_before)):
            plan._compare(uidl, listed, rows)
        plan.contents = frozenset(plan._contents)
        plan.looks_renumbered = plan.believed and policy.may_be_renumbered(
            known=plan.known_ids, found=plan.found_ids, unknown=plan.unknown_ids
        )
        # In the order of the mailbox, which is that of arrival; but what cost a
        # connection before comes last, so that it delays nothing else.
        entries = listing.entries
        tried = {index for index in plan.fetch if plan.attempts and _key(entries[index]) in plan.attempts}
        plan.fetch = array("I", sorted(plan.fetch, key=lambda index: (index in tried, index)))
        return plan

    def item(self, index: int) -> Item:
        """One message of the listing."""
        entry = self.listing.entries[index]
        return Item(index, entry, _key(entry), certain=index not in self.uncertain)

    @property
    def is_clear(self) -> bool:
        """Whether all of the listing was understood, and each of its messages has an id of its own."""
        return self.listing.is_legible and not self.uncertain and not self.looks_renumbered

    @property
    def counts(self) -> Counts:
        """What the listing shows that needs nothing done now."""
        return Counts(known=self.known, quarantined=self.quarantined)

    def bytes_to_fetch(self) -> int | None:
        """How many bytes are to be fetched, by the listing; None if it does not say."""
        total_bytes = 0
        for index in self.fetch:
            size = self.listing.entries[index].size
            if size is None:
                return None
            total_bytes += size
        return total_bytes

    def keep(self, captured_at: datetime) -> None:
        """A message that was captured at that time stays on the server for now."""
        self.oldest_kept = _earlier(self.oldest_kept, captured_at)

    def quarantined_now(self, at: datetime, attempts: int) -> None:
        """A message was quarantined, for the ``attempts``-th time."""
        retry_at = at + timedelta(seconds=policy.quarantine_retry_seconds(attempts))
        self.earliest_retry = _earlier(self.earliest_retry, retry_at)

    def begin_epoch(self) -> None:
        """Forget what was known by the old ids: nothing is recorded as absent, or deleted, by them."""
        self.delete = NEVER_DELETE
        self.due = array("I")
        self.deletable = array("I")
        self.absent.clear()
        self.overflows = False
        self.contents = frozenset()
        self.unrecognised.clear()

    def due_at(self) -> tuple[datetime | None, datetime | None]:
        """When a message that is kept may be deleted, and one in quarantine is retried."""
        kept = None if self.oldest_kept is None else policy.deletable_at(self.delete, self.oldest_kept)
        return kept, self.earliest_retry

    def pop_absent(self) -> list[Resolved]:
        """The absences found so far, which are then removed from the plan."""
        popped, self.absent = self.absent, []
        return popped

    def pop_deletable(self) -> "array[int]":
        """What this session has fetched so far and may go, which is then removed from the plan."""
        popped, self.deletable = self.deletable, array("I")
        return popped

    def recognise(self, sighting: SightingKey) -> bool:
        """Of the messages that failed before with this key, one was fetched. Whether it was the last one."""
        self.unrecognised[sighting] -= 1
        return self.unrecognised[sighting] == 0

    def find_more_absent(self, known_before: Iterable[KnownRow], after: SightingKey) -> None:
        """Find the next absences: ``known_before`` is what the database has after ``after``."""
        entries = self.listing.entries
        start = bisect_left(self.order, after.uidl, key=lambda index: entries[index].uidl or b"")
        rest = _listed(self.listing, self.order[start:])
        for uidl, listed, rows in _side_by_side(rest, _by_uidl(known_before)):
            self.absent += self._absences(uidl, listed, rows)
            if len(self.absent) >= ABSENCES_AT_ONCE:
                return
        self.overflows = False

    def _compare(self, uidl: bytes, listed: list[Listed], rows: list[KnownRow]) -> None:
        """Decide on all that has one UIDL, on the server and in the database."""
        if uidl and len(listed) == 1:
            _, index, entry = listed[0]
            key = _key(entry)
            known = next((known for row_key, known in rows if row_key == key), None)
            if len(rows) != (known is not None):
                self._note_absences(uidl, listed, rows)
            self.found_ids += known is not None and not known.delete_requested
            known = known or self._returned(key)
            self.unknown_ids += known is None
            self._decide(index, key, known)
        else:
            if rows:
                self._note_absences(uidl, listed, rows)
            self._decide_by_content(listed, dict(rows))
        for key, known in rows:
            self.known_ids += not key.content and not known.delete_requested

    def _returned(self, key: SightingKey) -> Known | None:
        """A message in quarantine that was absent and is back. It is retried no sooner for that."""
        known = self.quarantined_before.get(key)
        if known is not None:
            self.still_there.append(key)
        return known

    def _decide(self, index: int, key: SightingKey, known: Known | None) -> None:
        if known is None:
            self.fetch.append(index)
            return
        if known.attempts:
            self.attempts[key] = known.attempts
        match known.state:
            case "captured" if known.sha256 is not None:
                if known.delete_requested:
                    self.still_there.append(key)
                if not policy.may_delete(self.delete, known.first_seen_at, self.now):
                    if known.delete_requested:
                        # It may be gone, and another message may have its id: the content tells.
                        self.fetch.append(index)
                        return
                elif policy.may_ask_again(
                    requested=known.delete_requested,
                    unheeded=known.delete_attempts,
                    retry_at=known.delete_retry_at,
                    now=self.now,
                ):
                    self.due.append(index)
                self.known += 1
                self.keep(known.first_seen_at)
            case "quarantined" if known.retry_at is None or known.retry_at > self.now:
                self.quarantined += 1
                self.earliest_retry = _earlier(self.earliest_retry, known.retry_at)
            case _:
                self.fetch.append(index)

    def _decide_by_content(self, listed: list[Listed], before: Mapping[SightingKey, Known]) -> None:
        """Fetch each of these messages, unless that failed recently: only its content tells which it is.

        RFC 1939 section 7 lets a server give equal ids to equal messages, and some
        servers give them to different ones. So an id that stands twice in a listing
        identifies nothing, and neither does a missing one.
        """
        for _, index, entry in listed:
            self.uncertain.add(index)
            key = _key(entry)
            known = before.get(key)
            if known is None or known.state == "captured":
                self.fetch.append(index)
            else:
                self.unrecognised[key] += 1
                self._decide(index, key, known)

    def _note_absences(self, uidl: bytes, listed: list[Listed], rows: list[KnownRow]) -> None:
        absent = self._absences(uidl, listed, rows)
        self._contents.update(key for key, _ in rows if key.content)
        self._contents.difference_update(line.sighting for line in absent)
        if len(self.absent) < ABSENCES_AT_ONCE:
            self.absent += absent
        elif absent:
            self.overflows = True

    def _absences(self, uidl: bytes, listed: list[Listed], rows: list[KnownRow]) -> list[Resolved]:
        """Those of these rows that are not listed any more."""
        if not self.believed:
            return []
        shown = {_key(entry) for _, _, entry in listed}
        return [
            Resolved(
                What.DELETED if known.delete_requested else What.GONE, key, self.now, sha256=known.sha256
            )
            for key, known in rows
            if (uidl and not listed if key.content else key not in shown)
            and (not uidl or self._is_not_unnamed(key, known))
        ]

    def _is_not_unnamed(self, key: SightingKey, known: Known) -> bool:
        """Whether none of the messages without a UIDL may be this one, which has one.

        Any of them may be. But one that we asked to delete is most likely gone, and
        is certainly gone if none of them has its size.
        """
        sizes = self.unnamed_sizes
        if sizes is None or key.size == UNKNOWN_SIZE:
            return sizes == frozenset()
        return not sizes or (known.delete_requested and key.size not in sizes)


def without_own_id(entries: Iterable[pop3.Entry]) -> int:
    """How many messages of a listing only their content identifies."""
    times = Counter(entry.uidl for entry in entries)
    return sum(count for uidl, count in times.items() if uidl is None or count > 1)


def _unnamed_sizes(listing: pop3.Listing, order: "array[int]") -> frozenset[int] | None:
    """The sizes of the messages without a UIDL, which come first in ``order``."""
    sizes = set()
    for looked_at, index in enumerate(order):
        _, uidl, size = listing.entries[index]
        if uidl is not None:
            break
        if size is None or looked_at >= UNNAMED_LOOKED_AT:
            return None
        sizes.add(size)
    return frozenset(sizes)


def _key(entry: pop3.Entry) -> SightingKey:
    return SightingKey(entry.uidl or b"", UNKNOWN_SIZE if entry.size is None else entry.size)


def _earlier(one: datetime | None, other: datetime | None) -> datetime | None:
    return other if one is None or (other is not None and other < one) else one


def _listed(listing: pop3.Listing, order: "array[int]") -> Iterator[tuple[bytes, list[Listed]]]:
    entries = listing.entries
    each = ((entry.uidl or b"", index, entry) for index in order for entry in (entries[index],))
    return ((uidl, list(group)) for uidl, group in groupby(each, key=itemgetter(0)))


def _by_uidl(rows: Iterable[KnownRow]) -> Iterator[tuple[bytes, list[KnownRow]]]:
    return ((uidl, list(group)) for uidl, group in groupby(rows, key=lambda each: each[0].uidl))


def _side_by_side(
    listed: Iterator[tuple[bytes, list[Listed]]], known: Iterator[tuple[bytes, list[KnownRow]]]
) -> Iterator[tuple[bytes, list[Listed], list[KnownRow]]]:
    """Both streams, which ascend, as one: for each UIDL what either has of it."""
    here, there = next(listed, None), next(known, None)
    while here is not None or there is not None:
        if here is not None and (there is None or here[0] < there[0]):
            yield here[0], here[1], []
            here = next(listed, None)
        elif there is not None and (here is None or there[0] < here[0]):
            yield there[0], [], there[1]
            there = next(known, None)
        elif here is not None and there is not None:
            yield here[0], here[1], there[1]
            here, there = next(listed, None), next(known, None)

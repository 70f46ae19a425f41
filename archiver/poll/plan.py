"""What one listing asks for, set against what the database holds: to fetch, to delete, to tell as absent.

Owns identity within a listing and the comparison with what was there before.
Both come in the order of the UIDL's octets and are walked side by side, so a
mailbox of half a million messages costs one pass and some octets for each
message, and only what differs becomes an object. Sets of ids decide, never
dates, and never numbers. Pure: it asks neither server nor store nor database,
and leaves to the poll what is done about it, and in which order.
"""

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, Self

from archiver import policy, pop3
from archiver.db.sightings import Known
from archiver.model import NEVER_DELETE, UNKNOWN_SIZE, Counts, DeletePolicy, Resolved, SightingKey, What

ABSENCES_AT_ONCE = 5_000
"""Absences that are held in memory, and go into one segment: of a mailbox that was emptied there are many."""

UNNAMED_LOOKED_AT = 1_000
"""Messages without a UIDL whose sizes are compared with those that we asked to be deleted. A server that has
more of them has no UIDL at all."""

Listed = tuple[bytes, int, pop3.Entry]
KnownRow = tuple[SightingKey, Known]


class Item(NamedTuple):
    """A message of the listing and its sighting. ``certain`` is false where only content can tell which."""

    place: int
    entry: pop3.Entry
    sighting: SightingKey
    certain: bool


@dataclass(slots=True)
class Plan:
    """What is to be done about a listing. Messages are indices of ``listing.entries``.

    Of what the policy lets go, ``due`` was fetched by earlier sessions, and
    ``deletable`` in this one.
    ``believed``: the listing was read whole, so what it does not show is not
    there; ``unnamed_sizes`` are those of the messages without a UIDL, None where
    one may have any size. ``absent`` has the first of those
    that are shown no more; ``overflows`` tells that ``find_more_absent`` has others.
    ``suspect``: the mailbox looks renumbered, so nothing is to be told as absent,
    and nothing deleted, until contents were seen. ``contents`` are sightings
    known by their content alone, ``untold`` those that failed before and have no
    id of their own. Of ids with nothing to hide behind, ``held`` were there
    before, ``found`` are still shown, and ``strange`` are shown for the first time.
    """

    listing: pop3.Listing
    order: "array[int]"
    delete: DeletePolicy
    now: datetime
    believed: bool
    unnamed_sizes: frozenset[int] | None
    aside: Mapping[SightingKey, Known]
    fetch: "array[int]" = field(default_factory=lambda: array("I"))
    due: "array[int]" = field(default_factory=lambda: array("I"))
    deletable: "array[int]" = field(default_factory=lambda: array("I"))
    uncertain: set[int] = field(default_factory=set)
    attempts: dict[SightingKey, int] = field(default_factory=dict)
    still_there: list[SightingKey] = field(default_factory=list)
    absent: list[Resolved] = field(default_factory=list)
    contents: set[SightingKey] = field(default_factory=set)
    untold: Counter[SightingKey] = field(default_factory=Counter)
    overflows: bool = False
    suspect: bool = False
    known: int = 0
    quarantined: int = 0
    held: int = 0
    found: int = 0
    strange: int = 0
    oldest_kept: datetime | None = None
    earliest_retry: datetime | None = None

    @classmethod
    def of(
        cls,
        listing: pop3.Listing,
        held: Iterable[KnownRow],
        aside: Mapping[SightingKey, Known],
        *,
        delete: DeletePolicy,
        now: datetime,
    ) -> Self:
        """Set a listing against ``held``, what was there when it was last listed, in the order of its keys.

        ``aside`` is what is in quarantine although it was absent. ``delete`` is
        the policy that is in force.
        """
        order = listing.by_uidl()
        plan = cls(listing, order, delete, now, listing.is_whole, _unnamed_sizes(listing, order), aside)
        for uidl, listed, rows in _side_by_side(_listed(listing, order), _by_uidl(held)):
            plan._take(uidl, listed, rows)
        plan.suspect = plan.believed and policy.may_be_renumbered(
            held=plan.held, found=plan.found, strange=plan.strange
        )
        # In the order of the mailbox, which is that of arrival; but what cost a
        # connection before holds nothing else up.
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
        return self.listing.is_legible and not self.uncertain and not self.suspect

    @property
    def counts(self) -> Counts:
        """What the listing shows that needs nothing done now."""
        return Counts(known=self.known, quarantined=self.quarantined)

    def bytes_to_fetch(self) -> int | None:
        """How many bytes are to be fetched, by the listing; None where it does not say."""
        total_bytes = 0
        for place in self.fetch:
            size = self.listing.entries[place].size
            if size is None:
                return None
            total_bytes += size
        return total_bytes

    def keep(self, captured_at: datetime) -> None:
        """A message that was captured then stays on the server for now."""
        self.oldest_kept = _earlier(self.oldest_kept, captured_at)

    def set_aside(self, at: datetime, attempts: int) -> None:
        """A message was quarantined just now, for the ``attempts``-th time."""
        retry_at = at + timedelta(seconds=policy.quarantine_retry_seconds(attempts))
        self.earliest_retry = _earlier(self.earliest_retry, retry_at)

    def begin_epoch(self) -> None:
        """Forget what was known by the old ids; nothing is to be told or deleted by them."""
        self.delete = NEVER_DELETE
        self.due = array("I")
        self.deletable = array("I")
        self.absent.clear()
        self.overflows = False
        self.contents.clear()
        self.untold.clear()

    def due_at(self) -> tuple[datetime | None, datetime | None]:
        """When something is next to be done about a message that is kept, or set aside."""
        kept = None if self.oldest_kept is None else policy.deletable_at(self.delete, self.oldest_kept)
        return kept, self.earliest_retry

    def take_absent(self) -> list[Resolved]:
        """The absences that were found by now, once."""
        taken, self.absent = self.absent, []
        return taken

    def take_deletable(self) -> "array[int]":
        """What was fetched in this session by now, and may go; once."""
        taken, self.deletable = self.deletable, array("I")
        return taken

    def find_more_absent(self, held: Iterable[KnownRow], after: SightingKey) -> None:
        """Find the next absences: ``held`` is what the database has behind ``after``."""
        entries = self.listing.entries
        start = bisect_left(self.order, after.uidl, key=lambda index: entries[index].uidl or b"")
        for uidl, listed, rows in _side_by_side(_listed(self.listing, self.order[start:]), _by_uidl(held)):
            self.absent += self._absences(uidl, listed, rows)
            if len(self.absent) >= ABSENCES_AT_ONCE:
                return
        self.overflows = False

    def _take(self, uidl: bytes, listed: list[Listed], rows: list[KnownRow]) -> None:
        """Decide on all that has one UIDL, on the server and in the database."""
        if uidl and len(listed) == 1:
            _, index, entry = listed[0]
            key = _key(entry)
            known = next((known for held, known in rows if held == key), None)
            if len(rows) != (known is not None):
                self._note_absences(uidl, listed, rows)
            self.found += known is not None and not known.delete_requested
            known = known or self._returned(key)
            self.strange += known is None
            self._place(index, key, known)
        else:
            if rows:
                self._note_absences(uidl, listed, rows)
            self._place_uncertain(listed, dict(rows))
        for key, known in rows:
            self.held += not key.content and not known.delete_requested

    def _returned(self, key: SightingKey) -> Known | None:
        """One that had been set aside, and absent. It is tried no sooner for having been away."""
        known = self.aside.get(key)
        if known is not None:
            self.still_there.append(key)
        return known

    def _place(self, index: int, key: SightingKey, known: Known | None) -> None:
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
                        # It went, perhaps, and another has its id: the content tells.
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

    def _place_uncertain(self, listed: list[Listed], before: Mapping[SightingKey, Known]) -> None:
        """Only its content can tell which message each is, so it is fetched; unless that failed of late.

        RFC 1939 section 7 lets a server give equal ids to equal messages, and
        some give them to different ones: an id that stands twice in a listing
        identifies nothing, and neither does a missing one.
        """
        for _, index, entry in listed:
            self.uncertain.add(index)
            key = _key(entry)
            known = before.get(key)
            if known is None or known.state == "captured":
                self.fetch.append(index)
            else:
                self.untold[key] += 1
                self._place(index, key, known)

    def _note_absences(self, uidl: bytes, listed: list[Listed], rows: list[KnownRow]) -> None:
        absent = self._absences(uidl, listed, rows)
        self.contents.update(key for key, _ in rows if key.content)
        self.contents.difference_update(line.sighting for line in absent)
        if len(self.absent) < ABSENCES_AT_ONCE:
            self.absent += absent
        elif absent:
            self.overflows = True

    def _absences(self, uidl: bytes, listed: list[Listed], rows: list[KnownRow]) -> list[Resolved]:
        """Which of these rows are shown no more."""
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

        Any of them may be, but one that we asked to be deleted is most likely
        not, and is not at all if none has its size.
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


def _by_uidl(held: Iterable[KnownRow]) -> Iterator[tuple[bytes, list[KnownRow]]]:
    return ((uidl, list(group)) for uidl, group in groupby(held, key=lambda each: each[0].uidl))


def _side_by_side(
    listed: Iterator[tuple[bytes, list[Listed]]], held: Iterator[tuple[bytes, list[KnownRow]]]
) -> Iterator[tuple[bytes, list[Listed], list[KnownRow]]]:
    """Both streams, which ascend, as one: for each UIDL what either has of it."""
    here, there = next(listed, None), next(held, None)
    while here is not None or there is not None:
        if here is not None and (there is None or here[0] < there[0]):
            yield here[0], here[1], []
            here = next(listed, None)
        elif there is not None and (here is None or there[0] < here[0]):
            yield there[0], [], there[1]
            there = next(held, None)
        elif here is not None and there is not None:
            yield here[0], here[1], there[1]
            here, there = next(listed, None), next(held, None)

"""A listing set against what was there before, for mailboxes of every kind."""

from array import array
from collections import Counter
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from archiver.db.sightings import Known
from archiver.model import UNKNOWN_SIZE, DeletePolicy, SightingKey, What
from archiver.poll import plan as planning
from archiver.poll.plan import Plan
from archiver.pop3 import Listing
from archiver.pop3.listing import SizeColumn, UidlColumn, join
from archiver.states import SightingState

NOW = datetime(2024, 2, 29, 12, tzinfo=UTC)
DIGEST = bytes(32)

Pairs = list[tuple[bytes, int]]


def listing_of(pairs: Pairs) -> Listing:
    """Messages of these UIDLs (b"" for none) and sizes."""
    uids = UidlColumn()
    for number, (uidl, _) in enumerate(pairs, start=1):
        if uidl:
            uids.feed(b"%d %b\r\n" % (number, uidl))
    # A gap below the last number is a message without a uid.
    uids.feed(b"%d last\r\n" % (len(pairs) + 1))
    uids.finish()
    return join(
        uids, SizeColumn.of([*((n, size) for n, (_, size) in enumerate(pairs, 1)), (len(pairs) + 1, 1)])
    )


def known(state: str = "captured", *, requested: bool = False, attempts: int = 0) -> Known:
    sha256 = DIGEST if state == "captured" else None
    retry_at = NOW + timedelta(hours=1) if state == "quarantined" else None
    seen_at = NOW - timedelta(days=1)
    tries = (0, None, attempts, None) if state == "captured" else (attempts, retry_at, 0, None)
    return Known(SightingState(state), sha256, seen_at, *tries, requested)


LAST = SightingKey(b"last", 1)
uidls = st.sampled_from([b"", b"a", b"b", b"c", b"ca", b"\xff"])
sizes = st.integers(0, 2)
contents = st.sampled_from([b"", b"", b"", b"x" * 32, b"y" * 32])
states = st.builds(
    known,
    st.sampled_from(["captured", "captured", "quarantined", "pending"]),
    requested=st.booleans(),
    attempts=st.integers(0, 2),
)


@given(
    st.lists(st.tuples(uidls, sizes), max_size=12),
    st.dictionaries(st.builds(SightingKey, uidls, sizes, contents), states, max_size=12),
)
def test_the_walk_side_by_side_finds_what_sets_find(pairs: Pairs, held: dict[SightingKey, Known]) -> None:
    plan = Plan.of(listing_of(pairs), sorted(held.items()), {}, delete=DeletePolicy(None), now=NOW)
    pairs = [*pairs, (b"last", 1)]
    times = Counter(uidl for uidl, _ in pairs)
    certain = {place for place, (uidl, _) in enumerate(pairs) if uidl and times[uidl] == 1}
    assert set(range(len(pairs))) - plan.uncertain == certain

    row = {place: held.get(SightingKey(*pairs[place])) for place in range(len(pairs))}
    # One that was to go, and is there under a policy that keeps it, is read: it may be another.
    by_id = {
        place
        for place in certain
        if (found := row[place]) is not None and found.state == "captured" and not found.delete_requested
    }
    aside = {place for place, found in row.items() if found is not None and found.state == "quarantined"}
    assert (plan.known, plan.quarantined) == (len(by_id), len(aside))
    assert set(plan.fetch) == set(range(len(pairs))) - by_id - aside
    assert len(plan.fetch) == len(set(plan.fetch))

    unnamed = {size for uidl, size in pairs if not uidl}
    listed = {SightingKey(*pair) for pair in pairs}
    gone = {key for key in held if not key.content and key not in listed}
    gone |= {key for key in held if key.content and key.uidl and not times[key.uidl]}
    # A message without a UIDL may be any that is missing; but none of another size that we asked to delete.
    absent = {
        key
        for key in gone
        if not (key.uidl and unnamed) or (held[key].delete_requested and key.size not in unnamed)
    }
    assert {line.sighting for line in plan.absent} == absent
    for line in plan.absent:
        assert line.what is (What.DELETED if held[line.sighting].delete_requested else What.GONE)
    assert plan.contents == {key for key in held if key.content} - absent


@given(st.sets(st.integers(0, 40)), st.integers(0, 40))
def test_absences_go_on_where_they_were_left(shown: set[int], left_at: int) -> None:
    pairs = [(b"%03d" % number, 1) for number in sorted(shown)]
    held = [(SightingKey(b"%03d" % number, 1), known()) for number in range(41)]
    plan = Plan.of(listing_of(pairs), held, {}, delete=DeletePolicy(None), now=NOW)
    everything = [line.sighting for line in plan.pop_absent()]
    assert everything == [key for key, _ in held if int(key.uidl) not in shown]
    after = held[left_at][0]
    plan.find_more_absent(held[left_at + 1 :], after)
    assert [line.sighting for line in plan.pop_absent()] == [key for key in everything if key > after]


def test_a_listing_that_was_not_read_whole_proves_no_absence() -> None:
    uids = UidlColumn()
    uids.feed(b"1 a\r\nwhat?\r\n")
    uids.finish()
    plan = Plan.of(
        join(uids, None), [(SightingKey(b"b", UNKNOWN_SIZE), known())], {}, delete=DeletePolicy(None), now=NOW
    )
    assert (plan.absent, plan.fetch, plan.is_clear) == ([], array("I", [0]), False)


def test_what_cost_a_connection_before_holds_nothing_else_up() -> None:
    held = [(SightingKey(b"a", 1), known("pending", attempts=1))]
    plan = Plan.of(listing_of([(b"a", 1), (b"b", 1)]), held, {}, delete=DeletePolicy(None), now=NOW)
    assert list(plan.fetch) == [1, 2, 0]


def test_one_in_quarantine_that_was_away_waits_as_long() -> None:
    aside = {SightingKey(b"a", 1): known("quarantined", attempts=3)}
    plan = Plan.of(listing_of([(b"a", 1)]), [(LAST, known())], aside, delete=DeletePolicy(None), now=NOW)
    assert (plan.quarantined, plan.still_there, len(plan.fetch)) == (1, [SightingKey(b"a", 1)], 0)


def test_messages_without_an_id_of_their_own_are_counted() -> None:
    entries = listing_of([(b"a", 1), (b"b", 1), (b"a", 2), (b"", 1)]).entries
    assert planning.without_own_id(entries) == 3

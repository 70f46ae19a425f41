"""What makes a batch: how much, how long, what is stored, and what takes long on its way."""

import threading
from concurrent.futures import Future
from datetime import UTC, datetime

import pytest

from archiver.errors import TryLater
from archiver.model import Resolved, SightingKey, What
from archiver.poll.batch import Batch, Fetched, Unrecorded
from archiver.poll.plan import Item
from archiver.poll.ports import BatchLimits
from archiver.pop3 import Entry
from archiver.store import PutResult

AT = datetime(2026, 1, 1, tzinfo=UTC)
LIMITS = BatchLimits(messages=3, total_bytes=1000, seconds=10.0)


def unrecorded(*octets: int) -> Unrecorded:
    """A queue with a message of each size, none of them stored, open since 0."""
    queue = Unrecorded(LIMITS, 0.0)
    for number, size in enumerate(octets, 1):
        add(queue, number, size)
    return queue


def add(queue: Unrecorded, number: int, octets: int = 1) -> None:
    item = Item(
        number, Entry(number, b"%d" % number, octets), SightingKey(b"%d" % number, octets), certain=True
    )
    queue.add(Fetched(item, 0, AT, b"", octets, Future()))


def store(queue: Unrecorded, *numbers: int) -> None:
    for fetched in queue.fetched:
        if fetched.item.index in numbers:
            fetched.upload.set_result(PutResult(True))
    queue.notice_uploads()


def refuse(queue: Unrecorded, count: int) -> None:
    for number in range(count):
        queue.resolved.append(Resolved(What.QUARANTINED, SightingKey(b"q%d" % number, 1), AT, reason="no"))


def places(batch: Batch | None) -> list[int] | None:
    return None if batch is None else [fetched.item.index for fetched in batch.fetched]


def test_a_batch_closes_when_it_is_full_and_stored() -> None:
    queue = unrecorded(1, 1)
    store(queue, 1, 2)
    assert queue.next_batch(0.0) is None
    add(queue, 3)
    assert queue.next_batch(0.0) is None
    store(queue, 3)
    assert places(queue.next_batch(0.0)) == [1, 2, 3]
    assert (queue.fetched, queue.total_bytes, queue.uploading_bytes) == ([], 0, 0)


def test_it_closes_by_octets() -> None:
    queue = unrecorded(400, 700, 5)
    store(queue, 1, 2, 3)
    assert places(queue.next_batch(0.0)) == [1, 2]
    assert queue.total_bytes == 5


def test_it_closes_by_time_without_what_is_on_its_way() -> None:
    queue = unrecorded(1, 1)
    store(queue, 1)
    assert queue.next_batch(9.9) is None
    assert places(queue.next_batch(10.0)) == [1]
    # From then on the next one is open.
    store(queue, 2)
    assert queue.next_batch(19.9) is None
    assert places(queue.next_batch(20.0)) == [2]
    assert queue.next_batch(100.0) is None


def test_what_has_no_object_counts_too() -> None:
    queue = unrecorded(1, 1)
    refuse(queue, 2)
    store(queue, 1, 2)
    batch = queue.next_batch(0.0)
    assert (places(batch), batch and len(batch.resolved)) == ([1], 2)
    refuse(queue, 3)
    batch = queue.next_batch(0.0)
    assert (places(batch), batch and len(batch.resolved)) == ([], 3)
    assert places(queue.stored_batch(0.0)) == [2]
    assert queue.stored_batch(0.0) is None


def test_one_that_takes_long_holds_up_three_batches_and_no_more() -> None:
    queue = unrecorded(*[1] * 9)
    store(queue, 1, *range(3, 10))
    assert queue.next_batch(0.0) is None
    add(queue, 10)
    assert places(queue.next_batch(0.0)) == [1, 3, 4]
    # Little is left now: again it is waited for.
    assert queue.next_batch(0.0) is None
    store(queue, 2)
    assert places(queue.next_batch(0.0)) == [2, 5, 6]


def test_at_the_end_all_that_is_stored_goes_in_batches_of_the_usual_size() -> None:
    queue = unrecorded(1, 1, 1, 600, 600, 1)
    store(queue, 1, 2, 4, 5, 6)
    assert [places(queue.stored_batch(0.0)) for _ in range(3)] == [[1, 2, 4], [5, 6], None]
    assert [fetched.item.index for fetched in queue.fetched] == [3]


def test_what_kept_a_message_out_is_told_and_the_others_are_there() -> None:
    queue = unrecorded(1, 1, 1)
    error = TryLater("throttled")
    queue.fetched[1].upload.set_exception(error)
    queue.fetched[2].upload.set_exception(TryLater("again"))
    store(queue, 1)
    assert queue.error is error
    assert places(queue.stored_batch(0.0)) == [1]
    assert queue.stored_batch(0.0) is None


@pytest.mark.parametrize(
    ("octets", "much"), [((1,) * 5, False), ((1,) * 6, True), ((1999,), False), ((2000,), True)]
)
def test_how_much_may_be_on_its_way(octets: tuple[int, ...], much: bool) -> None:
    assert unrecorded(*octets).is_much_uploading is much


def test_half_of_the_uploads_is_waited_for_whichever_these_are() -> None:
    queue = unrecorded(1, 1, 1, 1, 1, 1)
    uploads = [fetched.upload for fetched in queue.fetched]
    waiter = threading.Thread(target=queue.wait_for_some)
    waiter.start()
    for upload in uploads[2:]:
        upload.set_result(PutResult(True))
    waiter.join(60.0)
    assert not waiter.is_alive()
    assert {fetched.item.index for fetched in queue.uploading} >= {1, 2}
    assert not queue.is_much_uploading

"""Who has the journal's chain: one recording at a time, and otherwise the poll's own thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from archiver.errors import TryLater
from archiver.model import Counts
from archiver.poll.batch import Batch
from archiver.poll.chain import Chain, Recorder
from tests.harness.scripted_pop3 import MailboxPlay
from tests.scenarios.story import Archive

EMPTY = Batch([], [])


@pytest.fixture
def recorder(small_archive: Archive) -> Recorder:
    account = small_archive.add(small_archive.serve(MailboxPlay([])))
    ports = small_archive.ports()
    return Recorder(Chain(small_archive.before(account), small_archive.claim(account), ports), ports.uploads)


def test_a_chain_that_is_lent_is_in_no_other_hands(recorder: Recorder) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work(_: Chain) -> Counts:
        begun.set()
        assert go_on.wait(10)
        return Counts(new=1)

    recorder.begin(EMPTY, work)
    assert begun.wait(10)
    assert (recorder.is_recording, recorder.has_result, recorder.is_uncertain) == (True, False, True)
    with pytest.raises(RuntimeError, match="under way"):
        recorder.now(lambda chain: chain.digest(1))
    with pytest.raises(RuntimeError, match="under way"):
        recorder.begin(EMPTY, work)
    go_on.set()
    assert recorder.end() == (EMPTY, Counts(new=1))
    assert (recorder.is_recording, recorder.is_uncertain, recorder.end()) == (False, False, None)
    assert recorder.now(lambda chain: chain.digest(1)) is None


def test_a_recording_that_fails_hands_the_chain_back(recorder: Recorder) -> None:
    def work(_: Chain) -> Counts:
        raise TryLater("the store does not answer")

    recorder.begin(EMPTY, work)
    with pytest.raises(TryLater):
        recorder.end()
    assert not recorder.is_recording
    assert recorder.state.head.sequence == 0


def test_a_recording_that_has_not_begun_is_cancelled(small_archive: Archive) -> None:
    account = small_archive.add(small_archive.serve(MailboxPlay([])))
    begun, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work(_: Chain) -> Counts:
        done.append(1)
        return Counts()

    def hold() -> None:
        begun.set()
        go_on.wait(10)

    with ThreadPoolExecutor(1) as threads:
        recorder = Recorder(
            Chain(small_archive.before(account), small_archive.claim(account), small_archive.ports()), threads
        )
        threads.submit(hold)
        assert begun.wait(10)
        recorder.begin(EMPTY, work)
        recorder.abandon()
        go_on.set()
    assert done == []

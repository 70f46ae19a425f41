"""A message that the store refuses for itself never holds up the others; a store in trouble marks none."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from archiver.errors import ArchiverError, MessageRefused, OperatorNeeded, TryLater
from archiver.policy import FATAL_ATTEMPTS
from archiver.store import Body, PutResult, Store, StoredObject
from tests.harness.scripted_pop3 import MailboxPlay
from tests.scenarios.story import Archive, message

NAMES = [f"u{number}" for number in range(9)]


class Choosy:
    """A store that does not take what is in ``refused``, and raises ``error`` for it."""

    def __init__(self, store: Store, refused: set[bytes], error: ArchiverError) -> None:
        self._store = store
        self.refused = refused
        self.error = error

    @property
    def url(self) -> str:
        return self._store.url

    def put(self, key: str, body: Body) -> PutResult:
        with body.open() as reader:
            if reader.read() in self.refused:
                raise self.error
        return self._store.put(key, body)

    def get(self, key: str) -> AbstractContextManager[Iterator[bytes]]:
        return self._store.get(key)

    def stat(self, key: str) -> StoredObject | None:
        return self._store.stat(key)

    def list(self, prefix: str, *, after: str = "", strangers: bool = False) -> Iterator[StoredObject]:
        return self._store.list(prefix, after=after, strangers=strangers)

    def names(self, prefix: str, *, after: str = "") -> Iterator[str]:
        return self._store.names(prefix, after=after)

    def probe(self) -> None:
        self._store.probe()


def mailbox() -> MailboxPlay:
    return MailboxPlay([(name.encode(), message(name)) for name in NAMES])


TOO_LARGE = MessageRefused("cannot write it: 413", hint="raise the limit")


@pytest.mark.parametrize("index", [0, 4, 8], ids=["first", "in the middle", "last"])
def test_a_message_that_is_too_large_for_the_store_is_quarantined_and_the_others_go_on(
    archive: Archive, index: int
) -> None:
    account = archive.add(archive.serve(mailbox()))
    store = Choosy(archive.store, {message(NAMES[index])}, TOO_LARGE)
    others = {message(name) for name in NAMES} - store.refused
    quarantined = []
    for _ in range(FATAL_ATTEMPTS):
        poll = archive.poll_on_schedule(account, archive.ports(store=store))
        assert poll.outcome == "ok", poll.error
        assert set(archive.archived(account)) == others
        quarantined.append(poll.quarantined)
    assert quarantined == [0] * (FATAL_ATTEMPTS - 1) + [1]
    [row] = [row for row in archive.sightings(account) if row.state == "quarantined"]
    assert "413" in row.reason
    asked = archive.sync(account, archive.ports(store=store))
    assert (asked.outcome, asked.counts.quarantined, asked.counts.new) == ("ok", 1, 0)
    # The limit was raised: the next retry takes it.
    archive.clock.advance(8 * 86400)
    report = archive.sync(account)
    assert (report.outcome, report.counts.quarantined, report.counts.new) == ("ok", 0, 1)
    assert set(archive.archived(account)) == others | store.refused


def test_a_retry_that_fails_again_waits_longer(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox()))
    store = Choosy(archive.store, {message(NAMES[4])}, TOO_LARGE)
    for _ in range(FATAL_ATTEMPTS):
        archive.sync(account, archive.ports(store=store))
    fetched = []
    for _ in range(24):
        archive.clock.advance(3600)
        fetched.append(archive.sync(account, archive.ports(store=store)).counts.fetched_bytes > 0)
    assert 1 <= fetched.count(True) <= 4


@pytest.mark.parametrize(
    "error", [TryLater("503 SlowDown"), OperatorNeeded("AccessDenied"), TryLater("No space left on device")]
)
def test_trouble_of_the_whole_store_marks_no_message(archive: Archive, error: ArchiverError) -> None:
    account = archive.add(archive.serve(mailbox()))
    store = Choosy(archive.store, {message(name) for name in NAMES}, error)
    for _ in range(FATAL_ATTEMPTS + 2):
        report = archive.sync(account, archive.ports(store=store))
        assert (report.outcome, report.counts.quarantined) == (error.outcome, 0)
    report = archive.sync(account)
    assert (report.outcome, report.counts.new, report.counts.quarantined) == ("ok", len(NAMES), 0)

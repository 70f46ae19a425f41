"""The feed: a reader who remembers one number misses nothing, whoever writes at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

from archiver import feed
from archiver.db import Database, events
from archiver.db.tables import event
from tests.harness.scripted_pop3 import MailboxPlay, Send
from tests.scenarios.story import Archive, message

WRITERS, TRANSACTIONS, EVENTS_EACH = 4, 12, 3
DEADLINE_SECONDS = 60.0


def rows(writer: int, transaction: int) -> list[dict[str, Any]]:
    return [
        {
            "kind": "captured",
            "account_id": f"{writer:016d}",
            "at": datetime.now(UTC),
            "body": f'{{"name":"{writer}.{transaction}.{number}"}}',
        }
        for number in range(EVENTS_EACH)
    ]


def publish(database: Database, written: list[dict[str, Any]]) -> None:
    database.transact(lambda connection: events.publish(connection, written))


def test_a_reader_misses_none_of_many_writers(lone_archive: Archive) -> None:
    database = lone_archive.database
    done = threading.Event()

    def write(writer: int) -> None:
        for transaction in range(TRANSACTIONS):
            publish(database, rows(writer, transaction))

    def read() -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []
        while True:
            # Asked first: what was written before that is read below.
            ended = done.is_set()
            seen.extend(feed.backlog(database, after=seen[-1]["position"] if seen else 0))
            if ended:
                return seen

    with ThreadPoolExecutor(WRITERS + 2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for writing in [pool.submit(write, writer) for writer in range(WRITERS)]:
                writing.result(DEADLINE_SECONDS)
        finally:
            done.set()
        expected = {
            f"{writer}.{transaction}.{number}"
            for writer in range(WRITERS)
            for transaction in range(TRANSACTIONS)
            for number in range(EVENTS_EACH)
        }
        for reading in readers:
            seen = reading.result(DEADLINE_SECONDS)
            positions = [one["position"] for one in seen]
            assert positions == sorted(set(positions))
            assert {one["name"] for one in seen} == expected
            assert len(seen) == len(expected)


def test_a_position_is_never_given_out_again(lone_archive: Archive) -> None:
    database = lone_archive.database
    database.transact(lambda connection: events.publish(connection, rows(1, 1)))
    (*_, last) = feed.backlog(database, after=0)
    lone_archive.execute(event.delete())
    database.transact(lambda connection: events.publish(connection, rows(1, 2)))
    assert next(feed.backlog(database, after=0))["position"] > last["position"]


def test_a_transaction_that_fails_tells_nothing(lone_archive: Archive) -> None:
    database = lone_archive.database

    def work(connection: Any) -> None:
        events.publish(connection, rows(1, 1))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        database.transact(work)
    assert list(feed.backlog(database, after=0)) == []


def test_pages_are_of_the_size_asked_for_and_go_on(lone_archive: Archive) -> None:
    database = lone_archive.database
    for transaction in range(4):
        publish(database, rows(1, transaction))
    page = feed.page(database, after=0, limit=5)
    assert len(page) == 5
    rest = feed.page(database, after=page[-1]["position"], limit=100)
    assert len(rest) == 7
    assert feed.page(database, after=rest[-1]["position"]) == []


def test_what_events_tell(archive: Archive) -> None:
    play = MailboxPlay([(b"\xe9 a", message("a")), (b"b", message("b")), (b"c", message("a"))])
    play.faults = {"RETR 2": Send(b"-ERR [SYS/PERM] no\r\n")}
    account = archive.add(archive.serve(play))
    archive.sync(account)
    refused, captured = archive.events(account)
    assert (captured["event"], captured["uidl"], captured["size"]) == ("captured", "é a", len(message("a")))
    assert captured["capture"] == f"{account.id}-{captured['sha256']}"
    with archive.store.get(captured["key"]) as chunks:
        assert b"".join(chunks) == message("a")
    assert (refused["event"], refused["uidl"], refused["account"]) == ("quarantined", "b", account.name)
    assert "[SYS/PERM] no" in refused["reason"]
    assert (captured["segment"], captured["token"]) == (1, 1)

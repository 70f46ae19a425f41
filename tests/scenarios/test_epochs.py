"""A server that gives all messages other ids, or an id again: nothing is lost, doubled, or told untruly."""

from typing import Any

import pytest

from archiver.db import requests
from archiver.model import Account, DeletePolicy, What
from archiver.poll.ports import BatchLimits, Unwatched
from tests.harness.scripted_pop3 import MailboxPlay
from tests.scenarios.story import Archive, Fuse, message
from tests.scenarios.test_poll import AFTER_ARCHIVED, mailbox

NAMES = [f"message {number:02}" for number in range(12)]


def renumber(play: MailboxPlay) -> None:
    """What a lost index of ids, or another server, does (Dovecot, Courier, popa3d)."""
    play.messages[:] = [(b"new-%d" % number, content) for number, (_, content) in enumerate(play.messages)]


def renumbered(archive: Archive, **settings: Any) -> tuple[MailboxPlay, Account]:
    play = mailbox(*NAMES)
    account = archive.add(archive.serve(play), **settings)
    assert archive.sync(account).counts.new == len(NAMES)
    renumber(play)
    return play, account


def told(archive: Archive, account: Account) -> list[tuple[int, What, bytes]]:
    return [
        (segment.epoch, line.what, line.sighting.uidl)
        for segment in archive.segments(account)
        for line in segment.lines
    ]


def expect_new_epoch(archive: Archive, account: Account) -> None:
    """Everything is known under its new id, nothing is stored again, nothing is told as gone."""
    fresh = archive.fresh(account)
    assert fresh.epoch == 2
    assert "epoch 2" in str(fresh.deletion_suspended)
    assert len(archive.captures(account)) == len(NAMES)
    lines = told(archive, account)
    assert {what for _, what, _ in lines} == {What.CAPTURED, What.KNOWN}
    known = sorted(uidl for epoch, what, uidl in lines if (epoch, what) == (2, What.KNOWN))
    assert known == sorted(b"new-%d" % number for number in range(len(NAMES)))
    rows = archive.sightings(account)
    assert {row.epoch for row in rows if row.absent_at is None} == {2}
    assert len([row for row in rows if row.epoch == 2]) == len(NAMES)
    assert [one["epoch"] for one in archive.events(account) if one["event"] == "epoch_began"] == [2]
    assert archive.verify(account).clean


def test_a_renumbered_mailbox_begins_an_epoch(archive: Archive) -> None:
    _, account = renumbered(archive)
    report = archive.sync(account)
    assert (report.outcome, report.counts.new) == ("ok", 0)
    assert (report.counts.known, report.to_come) == (len(NAMES), 0)
    assert (report.counts.deleted, report.counts.gone, report.counts.lost) == (0, 0, 0)
    expect_new_epoch(archive, account)
    assert archive.sync(account).segments == 0
    assert archive.poll_on_schedule(account).glanced


def calls_of_the_poll_after(archive: Archive) -> list[str]:
    _, account = renumbered(archive)
    fuse = Fuse()
    archive.poll_until_death(account, archive.mortal_ports(fuse))
    return fuse.calls


@pytest.mark.slow
def test_whenever_that_poll_dies_the_epoch_begins_once(archive: Archive) -> None:
    """Before each of its calls: what a death after one leaves is what one before the next leaves."""
    calls = calls_of_the_poll_after(archive)
    assert calls.count("store.put journal") > 1
    # What differs between the databases is what a transaction leaves: there, its calls are enough.
    everywhere = archive.database.engine.dialect.name == "sqlite"
    for index in [at for at, call in enumerate(calls) if everywhere or call in {"db.transact", "db.commit"}]:
        _, account = renumbered(archive)
        archive.poll_until_death(account, archive.mortal_ports(Fuse(index)))
        assert What.GONE not in {line.what for line in archive.lines(account)}
        for _ in range(2):
            assert archive.sync(account).outcome == "ok", (index, calls[index])
        expect_new_epoch(archive, account)


def test_nothing_is_deleted_until_somebody_has_looked(archive: Archive) -> None:
    play, account = renumbered(archive)
    from archiver.db import accounts

    archive.database.transact(
        lambda connection: accounts.change(
            connection,
            Account(account.id, account.name, account.url, "none", "env:NONE", delete=AFTER_ARCHIVED),
            archive.clock.now(),
        )
    )
    for _ in range(3):
        assert archive.sync(account).counts.delete_requested == 0
    assert len(play.messages) == len(NAMES)
    assert archive.poll_on_schedule(account).glanced

    archive.database.transact(lambda connection: requests.allow_deletion(connection, account.id))
    assert archive.poll_on_schedule(account).delete_requested == len(NAMES)
    assert play.messages == []
    row = archive.poll_on_schedule(account)
    assert (row.deleted, row.gone, row.lost) == (len(NAMES), 0, 0)


def test_an_emptied_mailbox_with_new_mail_is_no_epoch(archive: Archive) -> None:
    play = mailbox(*NAMES)
    account = archive.add(archive.serve(play))
    archive.sync(account)
    play.messages[:] = [(b"fresh", message("fresh"))]
    report = archive.sync(account)
    assert (report.counts.new, report.counts.gone) == (1, len(NAMES))
    assert archive.fresh(account).epoch == 1


def test_a_window_of_a_mailbox_that_moves_on_is_no_epoch(archive: Archive) -> None:
    """Gmail shows what was never fetched, and after that the next part (quirks G1, G5)."""
    play = mailbox(*NAMES)
    account = archive.add(archive.serve(play))
    for part in range(3):
        play.messages[:] = [
            (b"%d-%d" % (part, number), message(f"{part}-{number}")) for number in range(len(NAMES))
        ]
        report = archive.sync(account)
        assert (report.outcome, report.counts.new) == ("ok", len(NAMES))
    fresh = archive.fresh(account)
    assert (fresh.epoch, fresh.deletion_suspended) == (1, None)
    gone = [line for line in archive.lines(account) if line.what is What.GONE]
    assert len(gone) == 2 * len(NAMES)


def test_what_we_deleted_ourselves_makes_no_epoch(archive: Archive) -> None:
    play = mailbox(*NAMES)
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    archive.sync(account)
    play.messages[:] = [(b"new-%d" % number, message(name)) for number, name in enumerate(NAMES)]
    report = archive.sync(account)
    assert (report.counts.known, report.counts.deleted) == (len(NAMES), len(NAMES))
    assert archive.fresh(account).epoch == 1


def test_a_poll_that_is_stopped_before_it_saw_a_content_decides_nothing(archive: Archive) -> None:
    _, account = renumbered(archive, delete=DeletePolicy(0.0))
    account_without = archive.add(archive.serve(mailbox("a")))
    assert archive.sync(account_without).counts.new == 1
    play, account = renumbered(archive)
    report = archive.sync(account, archive.ports(stopping=lambda: True))
    assert (report.outcome, report.counts.gone, report.segments) == ("ok", 0, 0)
    assert archive.fresh(account).epoch == 1
    assert archive.sync(account).counts.known == len(play.messages)
    expect_new_epoch(archive, account)


def test_another_worker_begins_the_epoch_in_between(archive: Archive) -> None:
    """An account is chosen before it is claimed: its epoch counts as it is after the claim."""
    _, account = renumbered(archive)
    stale = archive.fresh(account)
    archive.sync(account)
    (report,) = archive.worker().poll_now([stale], lambda _: Unwatched())
    assert report.counts.known == len(NAMES)
    expect_new_epoch(archive, account)


def test_an_older_database_learns_the_epoch_from_the_journal(archive: Archive) -> None:
    _, account = renumbered(archive)
    before_its_row = calls_of_the_poll_after(archive).index("store.put journal")
    archive.poll_until_death(account, archive.mortal_ports(Fuse(before_its_row, after=True)))
    assert archive.segments(account)[-1].epoch == 2
    assert archive.fresh(account).epoch == 1
    archive.sync(account, archive.ports(batch=BatchLimits(messages=100)))
    expect_new_epoch(archive, account)


@pytest.mark.parametrize("delete", [DeletePolicy(), AFTER_ARCHIVED], ids=["kept", "deleted"])
def test_an_id_given_again_keeps_both_messages_in_the_record(archive: Archive, delete: DeletePolicy) -> None:
    play = MailboxPlay([])
    account = archive.add(archive.serve(play), delete=delete)
    contents = [message("a"), message("b"), message("a"), message("c")]
    assert len({len(content) for content in contents}) == 1
    for content in contents:
        play.messages[:] = [(b"1", content)]
        archive.sync(account)
        play.messages.clear()
        archive.sync(account)
    captured = {row.sha256 for row in archive.captures(account)}
    assert len(captured) == 3
    rows = archive.sightings(account)
    assert {row.sha256 for row in rows} == captured
    assert all(row.absent_at is not None for row in rows)
    assert sum(row.content == b"" for row in rows) == 1
    whats = [line.what for line in archive.lines(account)]
    assert whats.count(What.CAPTURED) == 3
    assert whats.count(What.KNOWN) == 1
    assert archive.verify(account).clean

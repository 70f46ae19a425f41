"""One poll after the other, with deaths, faults and hostile mailboxes in between: nothing is lost,
stored twice or unaccounted for."""

import hashlib
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import sqlalchemy as sa

from archiver import pop3
from archiver.db.tables import lease
from archiver.errors import ArchiverError, IntegrityError, LeaseLost, OperatorNeeded, TryLater
from archiver.model import Account, DeletePolicy, What, message_key
from archiver.poll.ports import BatchLimits, Ports
from archiver.states import AccountState
from archiver.store import Body, PutResult
from archiver.store.filesystem import FilesystemStore
from archiver.store.spool import Spool
from tests.harness.scripted_pop3 import Cut, HangUp, MailboxPlay, Send
from tests.machine.process import Uploads
from tests.scenarios.story import Archive, Fuse, State, message

AFTER_ARCHIVED = DeletePolicy(0.0)
DAY = 86400.0


def mailbox(*names: str, **settings: Any) -> MailboxPlay:
    """A mailbox with a message of each name, whose UIDL is the name."""
    return MailboxPlay([(name.encode(), message(name)) for name in names], **settings)


def of(*names: str) -> set[bytes]:
    return {message(name) for name in names}


# Deaths. The mailbox has a refused message, and one content twice; everything archived is deleted.


def eventful_mailbox() -> MailboxPlay:
    play = mailbox("a", "b", "refused", "d", faults={"RETR 3": Send(b"-ERR [SYS/PERM] cannot open it\r\n")})
    play.messages.append((b"again", message("a")))
    return play


def lived(archive: Archive) -> State:
    """How it ends when nobody dies."""
    play = eventful_mailbox()
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    for _ in range(3):
        assert archive.sync(account).outcome == "ok"
    assert play.messages == [(b"refused", message("refused"))]
    return archive.state(account, play)


def only_refused_remains(play: MailboxPlay, archive: Archive, account: Account) -> None:
    """The first promise, at any moment: on the server, or proved to be archived."""
    on_server = {content for _, content in play.messages}
    missing = {content for _, content in eventful_mailbox().messages} - on_server
    assert missing <= set(archive.archived(account))


def calls_of_a_poll(archive: Archive) -> list[str]:
    account = archive.add(archive.serve(eventful_mailbox()), delete=AFTER_ARCHIVED)
    fuse = Fuse()
    archive.poll_until_death(account, archive.mortal_ports(fuse))
    return fuse.calls


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.slow
def test_whenever_a_poll_dies_the_next_ones_end_in_the_same_state(archive: Archive, after: bool) -> None:
    expected = lived(archive)
    calls = calls_of_a_poll(archive)
    assert {"mail.login", "mail.list", "mail.retrieve", "mail.delete", "mail.quit"} < set(calls)
    assert {"store.put messages", "store.put journal", "store.stat", "db.transact", "db.commit"} < set(calls)
    for index, name in enumerate(calls):
        play = eventful_mailbox()
        account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
        archive.poll_until_death(account, archive.mortal_ports(Fuse(index, after=after)))
        only_refused_remains(play, archive, account)

        for _ in range(2):
            assert archive.sync(account).outcome == "ok", (index, name)
        assert archive.state(account, play) == expected, (index, name)
        findings = archive.verify(account)
        assert findings.clean, (index, name, findings.named)
        assert findings.checked == 3


def test_a_poll_that_dies_while_it_catches_up_is_caught_up_with(archive: Archive) -> None:
    expected = lived(archive)
    calls = calls_of_a_poll(archive)
    before_its_row = calls.index("store.put journal")
    recovery = Fuse()
    for index in range(8):
        play = eventful_mailbox()
        account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
        archive.poll_until_death(account, archive.mortal_ports(Fuse(before_its_row, after=True)))
        assert archive.segments(account)
        assert not archive.captures(account)

        recovery = Fuse(index)
        archive.poll_until_death(account, archive.mortal_ports(recovery))
        only_refused_remains(play, archive, account)

        for _ in range(2):
            assert archive.sync(account).outcome == "ok", index
        assert archive.state(account, play) == expected, (index, recovery.calls)
    assert recovery.calls[:4] == ["store.get", "db.transact", "db.commit", "store.get"]


def test_a_store_whose_answers_are_lost_costs_nothing(archive: Archive) -> None:
    expected = lived(archive)

    class Forgetful(FilesystemStore):
        """It wrote, and says that the name is taken: what a repetition after a lost answer sees."""

        def put(self, key: str, body: Body) -> PutResult:
            super().put(key, body)
            return super().put(key, body)

    play = eventful_mailbox()
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    ports = archive.ports(store=Forgetful(archive.directory / "store"))
    for _ in range(3):
        assert archive.sync(account, ports).outcome == "ok"
    assert archive.state(account, play) == expected


def test_a_failed_store_leaves_everything_on_the_server_and_counts_nothing(archive: Archive) -> None:
    class Refusing(FilesystemStore):
        def put(self, key: str, body: Body) -> PutResult:
            if key.startswith("journal/"):
                raise TryLater("the store is away", wait_seconds=77.0)
            return super().put(key, body)

    play = mailbox("a", "b", "c", faults={"RETR 1": Send(b"-ERR [SYS/PERM] no\r\n")})
    server = archive.serve(play)
    account = archive.add(server, delete=AFTER_ARCHIVED)
    report = archive.sync(account, archive.ports(store=Refusing(archive.directory / "store")))

    assert (report.outcome, report.listed, report.wait_seconds) == ("try_later", 3, 77.0)
    assert (report.counts.new, report.counts.known, report.counts.quarantined, report.to_come) == (0, 0, 0, 3)
    assert len(play.messages) == 3
    # It hides nothing that a server would hide after QUIT.
    assert server.commands["QUIT"] == 0
    assert archive.polls(account)[0].to_come == 3
    assert archive.sync(account).counts.new == 2


# What comes again, and what is odd.


def test_a_second_poll_fetches_nothing_and_writes_nothing(archive: Archive) -> None:
    server = archive.serve(mailbox("a", "b", "c"))
    account = archive.add(server)
    assert archive.sync(account).counts.new == 3
    segments = len(archive.segments(account))

    report = archive.sync(account)
    assert (report.counts.new, report.counts.known, report.segments) == (0, 3, 0)
    assert server.commands["RETR"] == 3
    assert len(archive.segments(account)) == segments


@pytest.mark.parametrize(
    "uidls",
    [
        "+OK\r\n1 same\r\n2 same\r\n3 same\r\n4 other\r\n.\r\n",
        "+OK\r\n1\r\n2\r\n3\r\n4\r\n.\r\n",
        "-ERR unknown command\r\n",
    ],
    ids=["duplicate", "empty", "no UIDL"],
)
def test_messages_without_an_id_of_their_own_are_told_apart_by_content(archive: Archive, uidls: str) -> None:
    # Equal sizes, and the first and the third are the same message.
    play = MailboxPlay([(b"", message(name)) for name in ("x", "y", "x", "z")])
    play.capabilities = ("USER", "PIPELINING")
    play.faults = {"UIDL": Send(uidls.encode())}
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)

    first = archive.sync(account)
    assert (first.outcome, first.listed, first.counts.new, first.counts.known) == ("ok", 4, 3, 1)
    assert set(archive.archived(account)) == of("x", "y", "z")
    # Only what has an id of its own may be deleted.
    certain = uidls.count("other")
    assert first.counts.delete_requested == certain == 4 - len(play.messages)

    play.faults = {"UIDL": Send(uidls.replace("4 other\r\n", "").encode())}
    for segments in (certain, 0):  # of the deletion; and then there is nothing new
        report = archive.sync(account)
        assert (report.outcome, report.counts.new) == ("ok", 0)
        assert (report.counts.known, report.to_come) == (4 - certain, 0)
        assert report.segments == segments
    assert archive.verify(account).clean


def test_a_message_that_vanishes_and_returns_is_not_stored_again(archive: Archive) -> None:
    play = mailbox("a", "b")
    server = archive.serve(play)
    account = archive.add(server)
    archive.sync(account)
    gone = play.messages.pop(0)
    assert archive.sync(account).segments == 1
    assert [line.what for line in archive.lines(account)] == [What.CAPTURED, What.CAPTURED, What.GONE]
    assert archive.sync(account).segments == 0

    # Its id may have been given again: only its content tells that it is the same.
    play.messages.append(gone)
    report = archive.sync(account)
    assert (report.counts.new, report.counts.known, report.segments) == (0, 2, 1)
    assert server.commands["RETR"] == 3
    assert archive.sync(account).segments == 0
    play.messages.remove(gone)
    archive.sync(account)
    assert [line.what for line in archive.lines(account)].count(What.GONE) == 2


def test_a_listing_that_cannot_be_read_whole_proves_no_absence(archive: Archive) -> None:
    play = mailbox("a", "b")
    account = archive.add(archive.serve(play))
    archive.sync(account)
    play.faults = {"UIDL": Send(b"+OK\r\n1 a\r\nwhat?\r\n.\r\n")}
    archive.sync(account)
    # One has lost its id for once: it may be the one that is not shown.
    play.faults = {"UIDL": Send(b"+OK\r\n2 b\r\n.\r\n")}
    archive.sync(account)
    # UIDL does not work today.
    play.faults = {"UIDL": Send(b"-ERR no\r\n")}
    play.capabilities = ("USER", "PIPELINING")
    archive.sync(account)
    gone = [line for line in archive.lines(account) if line.what is What.GONE]
    assert {line.reason for line in gone} == {"it is known by its id"}


def test_what_is_gone_for_certain_says_so_also_of_messages_without_id(archive: Archive) -> None:
    play = MailboxPlay([(b"", message("x"))], faults={"RETR 1": Send(b"-ERR [SYS/PERM] no\r\n")})
    account = archive.add(archive.serve(play))
    archive.sync(account)
    assert [line.what for line in archive.lines(account)] == [What.QUARANTINED]
    play.messages.clear()
    archive.sync(account)
    assert [line.what for line in archive.lines(account)] == [What.QUARANTINED, What.GONE]


# Messages that fail by themselves.


def test_a_refused_message_is_set_aside_and_tried_again_later(archive: Archive) -> None:
    play = mailbox("a", "bad", "c", faults={"RETR 2": Send(b"-ERR [SYS/PERM] corrupt\r\n")})
    server = archive.serve(play)
    account = archive.add(server, delete=AFTER_ARCHIVED)
    report = archive.sync(account)
    assert (report.outcome, report.counts.new, report.counts.quarantined, report.to_come) == ("ok", 2, 1, 0)
    assert "corrupt" in str(archive.sightings(account)[1].reason)

    server.commands.clear()
    report = archive.sync(account)
    assert (report.counts.quarantined, report.segments) == (1, 1)  # of the two that were deleted
    assert server.commands["RETR"] == 0
    assert archive.sync(account).segments == 0

    archive.clock.advance(3601)
    play.faults = {"RETR 1": Send(b"-ERR [SYS/PERM] corrupt\r\n")}
    assert archive.sync(account).counts.quarantined == 1
    archive.clock.advance(3601)
    assert archive.sync(account).segments == 0  # the wait has doubled
    archive.clock.advance(3601)
    play.faults = {}
    report = archive.sync(account)
    assert (report.counts.new, report.counts.quarantined) == (1, 0)
    assert play.messages == []
    assert archive.verify(account).checked == 3


def test_a_refused_message_without_id_is_tried_no_more_often(archive: Archive) -> None:
    play = MailboxPlay([(b"", message(name)) for name in ("x", "longer", "the longest")])
    play.faults = {"UIDL": Send(b"-ERR unknown\r\n"), "RETR 2": Send(b"-ERR [SYS/PERM] corrupt\r\n")}
    play.capabilities = ("USER",)
    server = archive.serve(play)
    account = archive.add(server)
    report = archive.sync(account)
    assert (report.counts.new, report.counts.quarantined, report.to_come) == (2, 1, 0)
    segments, events = len(archive.segments(account)), len(archive.events(account))

    for _ in range(2):
        report = archive.sync(account)
        assert (report.counts.new, report.counts.known, report.counts.quarantined) == (0, 2, 1)
    assert (len(archive.segments(account)), len(archive.events(account))) == (segments, events)
    assert server.received.count((b"RETR 2", False)) == 1

    archive.clock.advance(3601)
    play.faults = {"UIDL": Send(b"-ERR unknown\r\n")}
    assert archive.sync(account).counts.new == 1
    # It is known by its content now, and nothing is left of the sighting that had none.
    report = archive.sync(account)
    assert (report.counts.known, report.counts.quarantined, report.segments) == (3, 0, 0)
    with archive.database.reading() as connection:
        from archiver.db import overview

        assert overview.account_states(connection, [account.id])[0].quarantined == 0


def test_a_message_over_the_limit_is_set_aside_and_leaves_nothing_behind(archive: Archive) -> None:
    play = mailbox("a", "c")
    play.messages.insert(1, (b"large", message("large") + b"x" * 5000 + b"\r\n"))
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    ports = archive.ports()
    ports = replace(ports, connect=lambda account: archive.connect(account, message_bytes=1000))
    report = archive.sync(account, ports)
    assert (report.counts.new, report.counts.quarantined) == (2, 1)
    assert [uidl for uidl, _ in play.messages] == [b"large"]
    assert ports.spool.memory_in_use == 0
    assert len(archive.objects(account)) == 2


@pytest.mark.parametrize("named", [True, False], ids=["UIDL", "no UIDL"])
def test_a_message_that_kills_the_connection_is_set_aside_and_the_others_archived(
    archive: Archive, named: bool
) -> None:
    play = mailbox("a", "killer", "the third", faults={"RETR 2": Cut(10)})
    if not named:
        play.capabilities = ("USER",)
        play.faults = {"UIDL": Send(b"-ERR unknown\r\n"), "RETR 2": Cut(10)}
    account = archive.add(archive.serve(play))

    reports = [archive.sync(account) for _ in range(3)]
    assert [report.outcome for report in reports] == ["try_later"] * 3
    assert [report.counts.quarantined for report in reports] == [0, 0, 1]
    report = archive.sync(account)
    assert (report.outcome, report.counts.quarantined, report.to_come) == ("ok", 1, 0)
    assert set(archive.archived(account)) == of("a", "the third")

    # After its third failure it is left alone for four hours, then tried once, and blamed at once.
    archive.clock.advance(4 * 3600 + 1)
    assert archive.sync(account).outcome == "try_later"
    assert archive.sync(account).outcome == "ok"


def test_a_connection_that_dies_elsewhere_each_time_blames_nobody(archive: Archive) -> None:
    play = mailbox("a", "b", "c", "d")
    account = archive.add(archive.serve(play))
    for number in (1, 2, 3):
        play.faults = {f"RETR {number}": Cut(5)}
        assert archive.sync(account).outcome == "try_later"
    play.faults = {}
    assert archive.sync(account).outcome == "ok"
    assert What.QUARANTINED not in {line.what for line in archive.lines(account)}
    assert set(archive.archived(account)) == of("a", "b", "c", "d")


def test_a_quota_that_is_used_up_marks_no_message(archive: Archive) -> None:
    play = mailbox("a", "b", "c", faults={"RETR 2": Send(b"-ERR bandwidth quota exceeded, try later\r\n")})
    account = archive.add(archive.serve(play))
    for _ in range(4):
        report = archive.sync(account)
        assert (report.outcome, report.counts.quarantined) == ("try_later", 0)
    assert {row.uidl: (row.state, row.attempts) for row in archive.sightings(account)} == {
        b"a": ("captured", 0)
    }
    play.faults = {}
    assert archive.sync(account).counts.new == 2


def test_a_message_that_fits_nowhere_does_not_undo_those_before_it(archive: Archive) -> None:
    class SmallSpool(Spool):
        def _temporary_file(self) -> "BinaryIO":
            raise OSError(28, "No space left on device")

    play = mailbox("a", "b")
    play.messages.append((b"large", message("large") + b"x" * 200_000 + b"\r\n"))
    account = archive.add(archive.serve(play))
    ports = archive.ports(
        spool=SmallSpool(archive.directory, 100_000, 50_000), batch=BatchLimits(messages=100)
    )
    report = archive.sync(account, ports)
    assert (report.outcome, report.counts.new, report.to_come) == ("try_later", 2, 1)
    assert set(archive.archived(account)) == of("a", "b")
    assert ports.spool.memory_in_use == 0
    assert archive.sync(account).counts.new == 1


# A batch is recorded while the next one is fetched.


class SlowJournal(FilesystemStore):
    """Its first segment is not written before a message of a later batch has come."""

    def __init__(self, root: Path, later: bytes, fault: ArchiverError | None = None) -> None:
        super().__init__(root)
        self._later = hashlib.sha256(later).digest()
        self._has_come = threading.Event()
        self._fault = fault

    def put(self, key: str, body: Body) -> PutResult:
        if key.startswith("journal/"):
            assert self._has_come.wait(60.0), "nothing more was fetched"
            if self._fault is not None:
                raise self._fault
        elif body.sha256 == self._later:
            self._has_come.set()
        return super().put(key, body)


def test_the_next_batch_is_fetched_while_one_is_recorded(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox(*"abcdef")))
    report = archive.sync(
        account, archive.ports(store=SlowJournal(archive.directory / "store", message("d")))
    )
    assert (report.outcome, report.counts.new, report.segments) == ("ok", 6, 3)
    assert archive.verify(account).clean


def test_a_message_that_is_long_on_its_way_holds_up_a_few_batches_only(archive: Archive) -> None:
    recorded = threading.Event()

    class SlowFirst(FilesystemStore):
        def put(self, key: str, body: Body) -> PutResult:
            if key.startswith("journal/"):
                recorded.set()
            elif body.sha256 == hashlib.sha256(message("a")).digest():
                assert recorded.wait(60.0), "nothing was recorded"
            return super().put(key, body)

    account = archive.add(archive.serve(mailbox(*"abcdefghij")))
    report = archive.sync(account, archive.ports(store=SlowFirst(archive.directory / "store")))
    assert (report.outcome, report.counts.new) == ("ok", 10)
    assert archive.verify(account).clean


def test_a_batch_closes_by_time_while_messages_come(archive: Archive) -> None:
    class Slow(FilesystemStore):
        def put(self, key: str, body: Body) -> PutResult:
            if key.startswith("messages/"):
                archive.clock.advance(0.6)
            return super().put(key, body)

    account = archive.add(archive.serve(mailbox(*"abcdefghij")))
    ports = archive.ports(
        store=Slow(archive.directory / "store"),
        uploads=Uploads(at_once=False),
        batch=BatchLimits(messages=100, seconds=1.0),
    )
    report = archive.sync(account, ports)
    assert (report.outcome, report.counts.new) == ("ok", 10)
    assert report.segments > 2


def test_the_time_of_a_batch_does_not_run_before_the_first_message(archive: Archive) -> None:
    def connect(account: Account) -> pop3.Session:
        archive.clock.advance(5.0)
        return archive.connect(account)

    account = archive.add(archive.serve(mailbox(*"abcde")))
    ports = archive.ports(
        connect=connect, uploads=Uploads(at_once=True), batch=BatchLimits(messages=100, seconds=1.0)
    )
    report = archive.sync(account, ports)
    assert (report.outcome, report.counts.new, report.segments) == ("ok", 5, 1)


def test_refusals_alone_make_batches(archive: Archive) -> None:
    refused = {f"RETR {number}": Send(b"-ERR [SYS/PERM] corrupt\r\n") for number in range(1, 6)}
    account = archive.add(archive.serve(mailbox(*"abcde", faults=refused)))
    report = archive.sync(account)
    assert (report.outcome, report.counts.quarantined) == ("ok", 5)
    assert report.segments > 1


@pytest.mark.parametrize("fault", [TryLater("throttled"), IntegrityError("altered"), LeaseLost("late")])
def test_what_keeps_a_batch_from_being_recorded_ends_the_poll(archive: Archive, fault: ArchiverError) -> None:
    account = archive.add(archive.serve(mailbox(*"abcdefgh")))
    slow = SlowJournal(archive.directory / "store", message("d"), fault)
    report = archive.sync(account, archive.ports(store=slow))
    assert (report.outcome, report.error, report.counts.new) == (fault.outcome, str(fault), 0)
    assert report.journal_uncertain
    assert archive.verify(account, later_seconds=0.0).clean
    again = archive.sync(account)
    assert (again.outcome, again.counts.new) == ("ok", 8)
    assert archive.verify(account).clean


# Deletion, only when proved.


def captured_before(archive: Archive, *names: str, **settings: Any) -> tuple[MailboxPlay, Account]:
    """A mailbox that was archived when the account said never to delete."""
    play = mailbox(*names)
    account = archive.add(archive.serve(play))
    assert archive.sync(account).counts.delete_requested == 0
    changed = replace(account, delete=AFTER_ARCHIVED, **settings)

    from archiver.db import accounts

    archive.database.transact(lambda connection: accounts.change(connection, changed, archive.clock.now()))
    return play, changed


def remove_object(path: Path) -> None:
    path.unlink()


def truncate_object(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [remove_object, truncate_object])
def test_nothing_is_deleted_when_one_object_is_not_as_it_must_be(
    archive: Archive, damage: Callable[[Path], None]
) -> None:
    play, account = captured_before(archive, "a", "b", "c")
    key = message_key(account.id, hashlib.sha256(message("b")).digest())
    damage(archive.directory / "store" / key)

    report = archive.sync(account)
    assert (report.outcome, report.counts.delete_requested) == ("integrity", 0)
    assert [uidl for uidl, _ in play.messages] == [b"a", b"b", b"c"]
    # It stops, and says why.
    assert key in str(archive.fresh(account).state_reason)
    assert archive.lease(account).due_at is None


def test_a_message_whose_size_changed_is_another_message(archive: Archive) -> None:
    play, account = captured_before(archive, "a")
    play.messages[:] = [(b"a", message("a, and more"))]
    report = archive.sync(account, archive.ports(stopping=lambda: True))
    assert report.counts.delete_requested == 0
    assert play.messages
    report = archive.sync(account)
    assert (report.counts.new, report.counts.delete_requested) == (1, 1)
    assert set(archive.archived(account)) == of("a", "a, and more")


def test_deletion_waits_for_its_days(archive: Archive) -> None:
    play = mailbox("a")
    account = archive.add(archive.serve(play), delete=DeletePolicy(7.0))
    archive.sync(account)
    archive.clock.advance(7 * DAY - 1)
    play.messages.append((b"b", message("b")))
    assert archive.sync(account).counts.delete_requested == 0
    archive.clock.advance(1)
    assert archive.sync(account).counts.delete_requested == 1
    assert [uidl for uidl, _ in play.messages] == [b"b"]
    archive.sync(account)
    assert [(line.what, line.sighting.uidl) for line in archive.lines(account)][-1] == (What.DELETED, b"a")


def test_a_second_copy_waits_as_long_as_the_first(archive: Archive) -> None:
    play = mailbox("a")
    account = archive.add(archive.serve(play), delete=DeletePolicy(7.0))
    archive.sync(account)
    archive.clock.advance(6 * DAY)
    play.messages.append((b"copy", message("a")))
    archive.sync(account)
    archive.clock.advance(1 * DAY)
    assert archive.sync(account).counts.delete_requested == 1
    assert [uidl for uidl, _ in play.messages] == [b"copy"]


def test_a_deletion_that_the_server_did_not_confirm_is_asked_for_again(archive: Archive) -> None:
    play = mailbox("a", "b", faults={"QUIT": Send(b"-ERR [SYS/TEMP] some deleted messages not removed\r\n")})
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    assert archive.sync(account).outcome == "try_later"
    assert len(play.messages) == 2
    play.faults = {}
    assert archive.sync(account).counts.delete_requested == 2
    assert play.messages == []
    archive.sync(account)
    assert sorted(line.what for line in archive.lines(account)[-2:]) == [What.DELETED, What.DELETED]


def test_an_absurd_number_of_days_stops_no_poll(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox("a")), delete=DeletePolicy.parse(f"after-days={10**30}"))
    assert archive.sync(account).outcome == "ok"
    assert archive.fresh(account).delete == account.delete


# Time, and the end of the process.


def test_a_large_mailbox_is_worked_off_in_several_polls(archive: Archive) -> None:
    ticks = itertools.count()

    def monotonic() -> float:
        return next(ticks) / 10

    account = archive.add(archive.serve(mailbox(*map(str, range(60)))))
    report = archive.sync(account, archive.ports(session_seconds=2.0, monotonic=monotonic))
    assert (report.outcome, report.to_come) == ("ok", 0)
    # A poll counts what the ones before it archived as known: the sum must not count it twice.
    assert (report.counts.new, report.counts.known) == (60, 0)
    assert len(archive.polls(account)) > 1


def test_a_stopping_process_asks_for_nothing_more(archive: Archive) -> None:
    server = archive.serve(mailbox("a", "b"))
    account = archive.add(server)
    report = archive.sync(account, archive.ports(stopping=lambda: True))
    assert (report.outcome, report.counts.new, report.to_come) == ("ok", 0, 2)
    assert (server.commands["RETR"], server.commands["QUIT"]) == (0, 1)


@pytest.mark.slow
def test_five_thousand_absences_at_a_time(small_archive: Archive) -> None:
    archive = small_archive
    play = MailboxPlay([(b"%d" % number, b"x\r\n") for number in range(5_500)])
    account = archive.add(archive.serve(play))
    assert archive.sync(account, archive.ports(batch=BatchLimits(messages=5_000))).counts.new == 1
    play.messages.clear()
    report = archive.sync(account)
    assert report.segments == 2
    assert [len(segment.lines) for segment in archive.segments(account)[-2:]] == [5_000, 500]


# What goes wrong inside.


@pytest.mark.parametrize("stage", ["before", "after"])
def test_an_operator_needed_for_the_service_pauses_no_account(archive: Archive, stage: str) -> None:
    class Denied(FilesystemStore):
        def put(self, key: str, body: Body) -> PutResult:
            raise OperatorNeeded("access denied")

    def refuse(account: Account) -> str:
        raise OperatorNeeded("no password")

    account = archive.add(archive.serve(mailbox("a")))
    broken: Ports = archive.ports(store=Denied(archive.directory / "store"))
    if stage == "before":
        broken = archive.ports(password=refuse)
    for _ in range(6):
        assert archive.sync(account, broken).outcome == "operator_needed"
    assert (archive.fresh(account).state is AccountState.ACTIVE) is (stage == "after")
    assert (archive.lease(account).due_at is None) is (stage == "before")


def test_a_mistake_of_ours_ends_one_poll_and_gives_the_account_back(archive: Archive) -> None:
    def broken(_: Account) -> pop3.Mailbox:
        raise ZeroDivisionError

    account = archive.add(archive.serve(mailbox("a")))
    report = archive.sync(account, archive.ports(connect=broken))
    assert (report.outcome, report.error) == ("try_later", "internal error: ZeroDivisionError()")
    assert archive.lease(account).owner is None
    assert archive.sync(account).counts.new == 1


def test_a_segment_that_was_tampered_with_stops_the_account(archive: Archive) -> None:
    play = mailbox("a")
    account = archive.add(archive.serve(play))
    archive.sync(account)
    archive.execute(sa.update(lease).values(recover=True).where(lease.c.account_id == account.id))
    path = archive.directory / "store" / f"journal/{account.id}/000000000002.ndjson"
    path.write_bytes(b"[" * 100_000 + b"\n")

    report = archive.sync(account)
    assert (report.outcome, report.listed) == ("integrity", None)
    assert archive.fresh(account).state is AccountState.WAITING


def test_an_object_that_differs_under_its_own_digest_is_an_alarm(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox("a", "b")), delete=AFTER_ARCHIVED)
    path = archive.directory / "store" / message_key(account.id, hashlib.sha256(message("b")).digest())
    path.parent.mkdir(parents=True)
    path.write_bytes(b"planted")
    report = archive.sync(account)
    assert (report.outcome, report.counts.new, report.counts.delete_requested) == ("integrity", 1, 0)
    assert IntegrityError.outcome == "integrity"


def test_an_id_that_is_given_again_to_another_message_loses_nothing(archive: Archive) -> None:
    """Some servers count from the start when a mailbox is made anew (quirk CY1); the sizes may agree."""
    play = MailboxPlay([(b"1", message("a"))])
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    assert archive.sync(account).counts.delete_requested == 1
    archive.sync(account)  # sees that it is gone
    assert len(message("a")) == len(message("b"))
    play.messages.append((b"1", message("b")))

    report = archive.sync(account)
    assert (report.outcome, report.counts.new, report.counts.delete_requested) == ("ok", 1, 1)
    assert set(archive.archived(account)) == {message("a"), message("b")}
    assert play.messages == []
    assert archive.verify(account).clean


def test_a_message_that_comes_back_is_looked_at_before_it_is_deleted_again(archive: Archive) -> None:
    play = MailboxPlay([(b"1", message("a"))])
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    archive.sync(account)
    archive.sync(account)
    play.messages.append((b"1", message("a")))
    play.faults = {"RETR 1": HangUp()}
    assert archive.sync(account).counts.delete_requested == 0
    assert archive.sync(account).counts.delete_requested == 0
    play.faults = {}
    report = archive.sync(account)
    assert (report.outcome, report.counts.new) == ("ok", 0)
    assert (report.counts.known, report.counts.delete_requested) == (1, 1)
    assert play.messages == []
    assert len(archive.captures(account)) == 1
    assert archive.verify(account).clean

"""What goes from a server, by whose hand, and what is told of it; and what no policy may delete."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from archiver import policy
from archiver.db import accounts, requests, sightings
from archiver.db.tables import sighting
from archiver.errors import TryLater
from archiver.model import Account, DeletePolicy, SightingKey, What, message_key, segment_key
from archiver.poll.ports import BatchLimits, Budget
from archiver.store import Body, PutResult
from archiver.store.filesystem import FilesystemStore
from tests.harness.scripted_pop3 import HangUp, MailboxPlay, Send
from tests.scenarios.story import Archive, message
from tests.scenarios.test_poll import AFTER_ARCHIVED, DAY, mailbox


def change(archive: Archive, account: Account, **settings: Any) -> None:
    changed = replace(archive.fresh(account), **settings)
    archive.database.transact(lambda connection: accounts.change(connection, changed, archive.clock.now()))


def test_three_ways_to_vanish_are_told_apart(archive: Archive) -> None:
    play = mailbox("ours", "theirs", "lost")
    play.faults = {"RETR 3": Send(b"-ERR [SYS/PERM] corrupt\r\n")}
    account = archive.add(archive.serve(play), delete=DeletePolicy(1.0))
    archive.sync(account)
    del play.messages[1:]
    report = archive.sync(account)
    assert (report.counts.deleted, report.counts.gone, report.counts.lost) == (0, 1, 1)
    archive.clock.advance(DAY)
    assert archive.sync(account).counts.delete_requested == 1
    report = archive.sync(account)
    assert (report.counts.deleted, report.counts.gone, report.counts.lost) == (1, 0, 0)
    absences = {line.sighting.uidl: line for line in archive.lines(account) if line.what is not What.CAPTURED}
    assert absences[b"ours"].what is What.DELETED
    assert absences[b"theirs"].what is What.GONE
    assert absences[b"theirs"].sha256 is not None
    assert (absences[b"lost"].what, absences[b"lost"].sha256) == (What.GONE, None)
    assert [(row.deleted, row.gone, row.lost) for row in archive.polls(account)] == [
        (0, 0, 0),
        (0, 1, 1),
        (0, 0, 0),
        (1, 0, 0),
    ]


def test_a_request_that_the_server_did_not_heed_is_taken_back(archive: Archive) -> None:
    """GMX says +OK and deletes nothing (quirk Y6). Whoever deletes it later, it was not us."""
    play = mailbox("a", faults={"DELE 1": Send(b"+OK\r\n")})
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    assert archive.sync(account).counts.delete_requested == 1
    assert archive.sightings(account)[0].delete_requested_at is not None
    change(archive, account, delete=DeletePolicy())
    assert archive.sync(account).counts.deleted == 0
    assert archive.sightings(account)[0].delete_requested_at is None
    play.messages.clear()
    report = archive.sync(account)
    assert (report.counts.deleted, report.counts.gone) == (0, 1)


def test_it_is_asked_for_again_as_long_as_the_policy_says_so(archive: Archive) -> None:
    """Once more at once; then daily, since it is read again each time."""
    play = mailbox("a", faults={"DELE 1": Send(b"+OK\r\n")})
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    assert [archive.poll_on_schedule(account).delete_requested for _ in range(4)] == [1, 1, 0, 0]
    assert [row.fetched_bytes > 0 for row in archive.polls(account)] == [True, True, False, False]
    archive.clock.advance(DAY)
    assert [archive.poll_on_schedule(account).delete_requested for _ in range(3)] == [1, 0, 0]
    play.faults = {}
    archive.clock.advance(DAY)
    assert archive.poll_on_schedule(account).delete_requested == 1
    assert archive.poll_on_schedule(account).deleted == 1


def test_sessions_that_break_before_quit_do_not_put_a_deletion_off(archive: Archive) -> None:
    play = mailbox("a", faults={"QUIT": HangUp()})
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    reports = [archive.sync(account) for _ in range(4)]
    assert [(report.outcome, report.counts.delete_requested) for report in reports] == [("try_later", 1)] * 4
    play.faults = {}
    assert archive.sync(account).counts.delete_requested == 1
    assert archive.sync(account).counts.deleted == 1


def test_what_took_the_place_of_a_deleted_message_is_read_under_any_policy(archive: Archive) -> None:
    play = MailboxPlay([(b"1", message("a"))])
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    assert archive.sync(account).counts.delete_requested == 1
    play.messages[:] = [(b"1", message("b"))]
    change(archive, account, delete=DeletePolicy())
    assert archive.sync(account).counts.new == 1
    assert message("b") in archive.archived(account)


def test_where_deletion_is_forbidden_no_policy_deletes(archive: Archive) -> None:
    play = mailbox("a", "b")
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    forbidding = archive.ports(forbid_deletion=True)
    for _ in range(2):
        assert archive.sync(account, forbidding).counts.delete_requested == 0
    assert len(play.messages) == 2
    assert archive.sync(account).counts.delete_requested == 2


def verdicts(archive: Archive, account: Account, *, forbidden: bool = False) -> dict[bytes, str]:
    """What ``account deletable`` tells."""
    account = archive.fresh(account)
    with archive.database.reading() as connection:
        return {
            key.uidl: policy.delete_verdict(
                account.delete,
                state=known.state,
                by_content=bool(key.content),
                captured_at=known.first_seen_at,
                suspended=account.deletion_suspended,
                forbidden=forbidden,
                now=archive.clock.now(),
            ).value
            for key, known in sightings.present(connection, account.id, account.epoch)
        }


def test_a_dry_run_tells_what_the_poll_then_does(archive: Archive) -> None:
    play = mailbox("old", "bad", "same", "young")
    play.messages.insert(3, (b"same", message("the same")))
    play.faults = {"RETR 2": Send(b"-ERR [SYS/PERM] corrupt\r\n")}
    young = play.messages.pop()
    account = archive.add(archive.serve(play), delete=DeletePolicy(7.0))
    archive.sync(account)
    archive.clock.advance(6 * DAY)
    play.messages.append(young)
    archive.sync(account)
    archive.clock.advance(1 * DAY)
    expected = {b"old": "goes", b"bad": "quarantined", b"same": "no_id", b"young": "too_young"}
    assert verdicts(archive, account) == expected
    assert verdicts(archive, account, forbidden=True)[b"old"] == "forbidden"
    play.faults = {"RETR 2": Send(b"-ERR [SYS/PERM] corrupt\r\n")}
    archive.sync(account)
    assert {uidl for uidl, _ in play.messages} == {b"bad", b"same", b"young"}


def test_what_was_there_comes_in_the_order_of_octets(archive: Archive) -> None:
    uidls = [b"b", b"a", b"B", b"\xff", b"\x80", b"aa", b"~", b"a b"]
    play = MailboxPlay([(uidl, message(str(number))) for number, uidl in enumerate(uidls)])
    account = archive.add(archive.serve(play))
    assert archive.sync(account).counts.new == len(uidls)

    def present(after: SightingKey | None) -> list[SightingKey]:
        with archive.database.reading() as connection:
            rows = sightings.present(connection, account.id, account.epoch, after=after)
            return [key for key, _ in rows]

    everything = present(None)
    assert [key.uidl for key in everything] == sorted(uidls)
    for place, key in enumerate(everything):
        assert present(key) == everything[place + 1 :]


@pytest.mark.parametrize("count", [0, 999, 1000, 1001, 3500])
def test_what_was_there_comes_whole_and_never_at_once(archive: Archive, count: int) -> None:
    """Whatever the last listing said: a poll that was killed may have left any number of them."""
    account = archive.add(archive.serve(MailboxPlay([])))
    of_all = {"account_id": account.id, "epoch": 1, "size": 1, "content": b"", "state": "captured"}
    of_all |= {"first_seen_at": archive.clock.now(), "attempts": 0}
    uidls = [b"%05d" % number for number in range(count)]
    statements: list[bool] = []

    def note(_connection: Any, _cursor: Any, statement: str, _values: Any, context: Any, _many: bool) -> None:
        statements.append("LIMIT 1000" in statement or context.execution_options.get("yield_per") == 1000)

    if count:
        rows = [{**of_all, "uidl": uidl} for uidl in uidls]
        archive.database.transact(lambda connection: connection.execute(sa.insert(sighting), rows))
    with archive.database.reading() as connection:
        sa.event.listen(connection, "before_cursor_execute", note)
        present = [key.uidl for key, _ in sightings.present(connection, account.id, 1)]
    assert present == uidls
    assert statements == [True] * (2 if count >= 1000 else 1)


# An id that was given again to a message of the same size, when nobody looked.


def given_again(archive: Archive, **settings: Any) -> tuple[MailboxPlay, Account]:
    """Under the id of a captured message, which had the same size, there is another one."""
    play = MailboxPlay([(b"1", message("a")), (b"2", message("c"))])
    account = archive.add(archive.serve(play))
    assert archive.sync(account).counts.new == 2
    archive.clock.advance(2 * DAY)
    play.messages[0] = (b"1", message("b"))
    change(archive, account, **settings)
    return play, account


def test_an_id_given_again_between_two_polls_loses_nothing(archive: Archive) -> None:
    play, account = given_again(archive, delete=AFTER_ARCHIVED)
    report = archive.sync(account)
    assert (report.outcome, report.counts.new, report.counts.known, report.to_come) == ("ok", 1, 1, 0)
    assert (report.counts.gone, report.counts.delete_requested) == (1, 2)
    assert play.messages == []
    assert set(archive.archived(account)) == {message("a"), message("b"), message("c")}
    former = hashlib.sha256(message("a")).digest()
    assert [line.sha256 for line in archive.lines(account) if line.what is What.GONE] == [former]
    report = archive.sync(account)
    assert (report.counts.deleted, report.counts.gone, report.counts.lost) == (2, 0, 0)
    assert archive.verify(account).clean


def test_what_came_under_the_id_of_another_waits_for_its_own_days(archive: Archive) -> None:
    play, account = given_again(archive, delete=DeletePolicy(2.0))
    assert archive.sync(account).counts.delete_requested == 1
    assert play.messages == [(b"1", message("b"))]
    archive.clock.advance(2 * DAY)
    assert archive.sync(account).counts.delete_requested == 1
    assert play.messages == []


def test_what_cannot_be_read_again_stays(archive: Archive) -> None:
    play, account = given_again(archive, delete=AFTER_ARCHIVED)
    play.faults = {"RETR 1": Send(b"-ERR [SYS/PERM] corrupt\r\n")}
    report = archive.sync(account)
    assert (report.outcome, report.counts.delete_requested) == ("ok", 1)
    assert play.messages == [(b"1", message("b"))]
    play.faults = {}
    assert archive.poll_on_schedule(account).new == 1
    assert message("b") in archive.archived(account)


def test_a_connection_lost_while_reading_again_loses_nothing(archive: Archive) -> None:
    play, account = given_again(archive, delete=AFTER_ARCHIVED)
    play.faults = {"RETR 2": HangUp()}
    report = archive.sync(account)
    assert (report.outcome, report.counts.new, report.counts.delete_requested) == ("try_later", 1, 0)
    assert len(play.messages) == 2
    # What costs the connection each time is in the way of nothing: it is read again a day later.
    report = archive.sync(account)
    assert (report.outcome, report.counts.delete_requested) == ("ok", 1)
    assert play.messages == [(b"2", message("c"))]
    play.faults = {}
    assert archive.sync(account).counts.delete_requested == 0
    archive.clock.advance(DAY)
    assert archive.sync(account).counts.delete_requested == 1
    assert play.messages == []


def test_reading_again_is_within_the_budgets(archive: Archive) -> None:
    play = mailbox("a", "b", "c")
    account = archive.add(archive.serve(play))
    archive.sync(account)
    change(archive, account, delete=AFTER_ARCHIVED)
    small = archive.ports(budget=Budget(messages=2))
    assert [archive.poll_on_schedule(account, small).delete_requested for _ in range(2)] == [2, 1]
    assert play.messages == []


# The journal is looked at, too.


class StoreWithoutJournal(FilesystemStore):
    """Says that it took a segment of the journal, and did not."""

    def put(self, key: str, body: Body) -> PutResult:
        return (
            PutResult(created=True, version_id=None) if key.startswith("journal/") else super().put(key, body)
        )


def test_nothing_is_deleted_without_its_segment_in_the_store(archive: Archive) -> None:
    play = mailbox("a", "b", "c")
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    report = archive.sync(account, archive.ports(store=StoreWithoutJournal(archive.directory / "store")))
    assert (report.outcome, report.counts.delete_requested) == ("integrity", 0)
    assert "journal/" in str(report.error)
    assert len(play.messages) == 3


def test_nothing_is_deleted_whose_segment_of_an_earlier_poll_is_missing(archive: Archive) -> None:
    play = mailbox("a")
    account = archive.add(archive.serve(play))
    archive.sync(account)
    play.messages.append((b"b", message("b")))
    archive.sync(account)
    change(archive, account, delete=AFTER_ARCHIVED)
    (archive.directory / "store" / segment_key(account.id, 1)).unlink()
    report = archive.sync(account)
    assert (report.outcome, report.counts.delete_requested) == ("integrity", 0)
    assert len(play.messages) == 2


def test_an_object_that_the_store_lost_is_put_back_from_the_mail_server(archive: Archive) -> None:
    play = mailbox("a")
    account = archive.add(archive.serve(play), delete=DeletePolicy(1.0))
    archive.sync(account)
    path = archive.directory / "store" / message_key(account.id, hashlib.sha256(message("a")).digest())
    path.unlink()
    archive.clock.advance(DAY)
    assert archive.sync(account).outcome == "integrity"
    assert (
        archive.database.transact(lambda connection: requests.fetch_again(connection, account.id, b"a")) == 1
    )
    report = archive.sync(account)
    assert (report.outcome, report.counts.new) == ("ok", 0)
    assert (report.counts.known, report.counts.delete_requested) == (1, 0)
    assert path.read_bytes() == message("a")
    assert archive.verify(account).clean
    assert archive.sync(account).counts.delete_requested == 1


def test_a_deletion_is_told_though_another_message_has_no_id(archive: Archive) -> None:
    """Unless it has the size of that message: then it may be it."""
    play = mailbox("a")
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    assert archive.sync(account).counts.delete_requested == 1
    change(archive, account, delete=DeletePolicy())
    play.messages[:] = [(b"none", message("b")), (b"z", message("z"))]
    play.faults = {"UIDL": Send(b"+OK\r\n2 z\r\n.\r\n")}
    assert archive.sync(account).counts.deleted == 0
    play.messages[0] = (b"none", message("of another size"))
    assert archive.sync(account).counts.deleted == 1


def test_a_message_that_only_list_shows_is_archived_and_told_once(archive: Archive) -> None:
    """It came between UIDL and LIST, and has an id at the next poll; or it never has one."""
    play = mailbox("a", "b")
    play.faults = {"UIDL": Send(b"+OK\r\n1 a\r\n.\r\n")}
    account = archive.add(archive.serve(play))
    report = archive.sync(account)
    assert (report.listed, report.counts.new, report.to_come) == (2, 2, 0)
    report = archive.sync(account)
    assert (report.counts.new, report.counts.known, report.counts.gone) == (0, 2, 0)
    play.faults = {}
    report = archive.sync(account)
    assert (report.counts.new, report.counts.known, report.counts.gone, report.to_come) == (0, 2, 0, 0)
    assert archive.verify(account).clean


def test_without_list_nothing_is_told_as_gone(archive: Archive) -> None:
    """Whatever has no id is in no other listing."""
    only_one_has_an_id = {"UIDL": Send(b"+OK\r\n1 a\r\n.\r\n")}
    play = mailbox("a", "b")
    play.faults = {**only_one_has_an_id}
    account = archive.add(archive.serve(play))
    assert archive.sync(account).counts.new == 2
    play.faults = {**only_one_has_an_id, "LIST": Send(b"-ERR not now\r\n")}
    report = archive.sync(account)
    assert (report.outcome, report.listed, report.counts.gone) == ("ok", 1, 0)
    play.faults = {**only_one_has_an_id}
    report = archive.sync(account)
    assert (report.counts.known, report.counts.new, report.counts.gone) == (2, 0, 0)


# Messages that their ids do not tell apart.


def test_one_of_two_with_the_same_id_is_gone(archive: Archive) -> None:
    play = MailboxPlay([(b"same", message("x")), (b"same", message("y")), (b"a", message("a"))])
    account = archive.add(archive.serve(play))
    archive.sync(account)
    play.messages.insert(0, (b"same", message("z")))
    del play.messages[1]
    report = archive.sync(account)
    assert (report.counts.new, report.counts.gone, report.counts.lost) == (1, 1, 0)
    gone = [line.sha256 for line in archive.lines(account) if line.what is What.GONE]
    assert gone == [row.sha256 for row in archive.captures(account) if row.size and row.sha256 in gone]
    assert archive.sync(account).segments == 0
    del play.messages[:2]
    report = archive.sync(account)
    assert (report.listed, report.counts.known, report.counts.gone) == (1, 1, 2)


def test_one_that_has_its_id_for_itself_again_is_still_there(archive: Archive) -> None:
    play = MailboxPlay([(b"same", message("x")), (b"same", message("y"))])
    account = archive.add(archive.serve(play))
    archive.sync(account)
    del play.messages[0]
    archive.sync(account)
    ends = {line.sha256: line.reason for line in archive.lines(account) if line.what is What.GONE}
    assert sorted(ends.values(), key=str) == [None, "it is known by its id"]
    assert sum(row.gone for row in archive.polls(account)) == 1


def test_one_that_is_set_aside_may_be_any_of_those_without_id(archive: Archive) -> None:
    play = MailboxPlay([(b"same", message("x")), (b"same", message("yy"))])
    account = archive.add(archive.serve(play))
    archive.sync(account)
    play.messages[0] = (b"same", message("another one"))
    play.faults = {"RETR 1": Send(b"-ERR [SYS/PERM] corrupt\r\n")}
    report = archive.sync(account)
    assert (report.counts.quarantined, report.counts.gone) == (1, 0)


# Trouble of the whole session, or of the store, marks no message.


@pytest.mark.parametrize(
    "said",
    [
        "-ERR Download exceed",
        "-ERR bandwidth quota exceeded",
        "-ERR Download was rate limited. Try again in 30 minutes",
        "-ERR [SYS/TEMP] try again later",
        "-ERR [IN-USE] mailbox locked by another session",
        "-ERR too many commands, slow down",
        "-ERR Message 2 expunged.",
        "-ERR Can't open the message file - it's gone!",
        "-ERR Disconnected for inactivity",
    ],
)
def test_trouble_of_the_session_marks_no_message(archive: Archive, said: str) -> None:
    play = mailbox("a", "b", "c", faults={"RETR 2": Send(f"{said}\r\n".encode())})
    account = archive.add(archive.serve(play))
    for _ in range(4):
        report = archive.sync(account)
        assert (report.outcome, report.counts.quarantined, report.counts.lost) == ("try_later", 0, 0)
    assert {(row.uidl, row.state, row.attempts) for row in archive.sightings(account)} == {
        (b"a", "captured", 0)
    }
    play.faults = {}
    assert archive.sync(account).counts.new == 2


def test_a_store_that_is_away_has_the_poll_stop_soon(archive: Archive) -> None:
    class Away(FilesystemStore):
        def put(self, key: str, body: Body) -> PutResult:
            raise TryLater("the store is away")

        @contextmanager
        def get(self, key: str) -> Iterator[Iterator[bytes]]:
            raise TryLater("the store is away")

    play = mailbox(*map(str, range(300)), capabilities=("USER", "UIDL"))
    server = archive.serve(play)
    account = archive.add(server)
    ports = archive.ports(
        store=Away(archive.directory / "store"),
        batch=BatchLimits(messages=1_000_000, total_bytes=2**40, seconds=1e9),
    )
    for _ in range(5):
        assert archive.sync(account, ports).outcome == "try_later"
        assert ports.spool.memory_in_use == 0
    # It may be a few messages until the first upload has failed.
    assert server.commands["RETR"] < 100
    assert server.commands["QUIT"] == 0
    assert archive.sync(account, archive.ports(batch=BatchLimits())).counts.new == 300
    assert archive.verify(account).clean

"""A mailbox that speaks POP2: its messages have no ids, and yet each is archived once."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archiver import pop3
from archiver.errors import UsageError
from archiver.model import Account, DeletePolicy, PollReport, What, new_account_id
from archiver.poll import finish
from archiver.poll import poll as tell_poll
from archiver.pop3 import Limits, Tls, parse_url
from tests.harness.scripted_pop2 import Pop2Play, pop2_server
from tests.harness.scripted_pop3 import ScriptedPop3
from tests.scenarios.story import Archive, message
from tests.scenarios.test_commands import Commands


def account_of(archive: Archive, server: ScriptedPop3, play: Pop2Play, **settings: object) -> Account:
    play.user = new_account_id()  # The port may be that of an earlier server, in the same database.
    return archive.add(server, url=f"pop2://{play.user}@localhost:{server.port}", **settings)


def connection(**limits: Any) -> Callable[[Account], pop3.Session]:
    return lambda account: pop3.connect(parse_url(account.url, Tls(account.tls)), limits=Limits(**limits))


def sync(archive: Archive, account: Account, **limits: Any) -> PollReport:
    return archive.sync(account, archive.ports(connect=connection(**limits)))


def test_every_message_is_archived_once_however_often_it_is_fetched(archive: Archive) -> None:
    """Two messages of the same content are one; a second poll fetches all, and writes nothing anywhere."""
    contents = [message("one"), message("two"), message("one"), b"no line end"]
    play = Pop2Play(list(contents))
    with pop2_server(play) as server:
        account = account_of(archive, server, play)
        first = sync(archive, account)
        assert (first.outcome, first.listed, first.counts.new, first.counts.known) == ("ok", 4, 3, 1)
        segments, events = archive.segments(account), archive.events(account)
        assert segments[0].server.mechanism == "HELO"

        second = sync(archive, account)
        assert (second.outcome, second.counts.new, second.counts.known, second.segments) == ("ok", 0, 4, 0)
        assert second.counts.fetched_bytes == first.counts.fetched_bytes
        assert (archive.segments(account), archive.events(account)) == (segments, events)

        play.messages.insert(0, message("three"))  # Numbers mean nothing: the new one is the first.
        third = sync(archive, account)
        assert (third.outcome, third.counts.new, third.counts.known, third.segments) == ("ok", 1, 4, 1)
    assert sorted(archive.archived(account)) == sorted({*contents, message("three")})
    assert archive.verify(account).clean


def test_a_message_that_vanished_is_known_to_be_gone_and_comes_back_without_being_stored(
    archive: Archive,
) -> None:
    play = Pop2Play([message("one"), message("two"), message("three")])
    with pop2_server(play) as server:
        account = account_of(archive, server, play)
        assert sync(archive, account).counts.new == 3
        gone = play.messages.pop(1)
        report = sync(archive, account)
        assert (report.outcome, report.counts.known, report.segments) == ("ok", 2, 1)
        (line,) = archive.segments(account)[-1].lines
        assert (line.what, line.sha256) == (What.GONE, hashlib.sha256(gone).digest())
        assert sync(archive, account).segments == 0

        play.messages.append(gone)
        report = sync(archive, account)
        assert (report.counts.new, report.counts.known, report.segments) == (0, 3, 1)
        assert archive.segments(account)[-1].lines[0].what is What.KNOWN
        assert sync(archive, account).segments == 0

        play.messages.clear()
        assert sync(archive, account).segments == 1
        assert all(row.absent_at is not None for row in archive.sightings(account))
    assert archive.verify(account).clean
    assert len(archive.archived(account)) == 3


@pytest.mark.parametrize("trouble", ["cut", "set aside", "no time"])
def test_a_poll_that_did_not_see_everything_proves_no_absence(archive: Archive, trouble: str) -> None:
    play = Pop2Play([message("one"), message("two"), message("three")])
    with pop2_server(play) as server:
        account = account_of(archive, server, play)
        assert sync(archive, account).counts.new == 3
        play.messages.pop(0)
        if trouble == "cut":
            play.cuts = {2: 5}
            assert sync(archive, account).outcome == "try_later"
        elif trouble == "set aside":
            assert sync(archive, account, message_bytes=len(message("two"))).counts.quarantined == 1
        else:
            seen = iter([False])
            ports = archive.ports(connect=connection(), stopping=lambda: next(seen, True))
            finish(tell_poll(archive.before(account), archive.claim(account), ports))
            archive.run_out(account)
        assert What.GONE not in {line.what for line in archive.lines(account)}


def test_nothing_is_deleted_whatever_the_policy_says(small_archive: Archive) -> None:
    play = Pop2Play([message("one")])
    with pop2_server(play) as server:
        account = account_of(small_archive, server, play, delete=DeletePolicy(0))
        for _ in range(2):
            report = sync(small_archive, account)
            assert (report.outcome, report.counts.delete_requested) == ("ok", 0)
        assert "ACKD" not in server.commands
    assert play.messages == [message("one")]


def test_a_message_that_is_too_large_is_set_aside_and_the_others_are_archived(small_archive: Archive) -> None:
    play = Pop2Play([message("one"), b"x" * 5000, message("two")])
    with pop2_server(play) as server:
        account = account_of(small_archive, server, play)
        report = sync(small_archive, account, message_bytes=4000)
        assert (report.outcome, report.counts.new, report.counts.quarantined) == ("ok", 2, 1)
        again = sync(small_archive, account, message_bytes=4000)
        assert (again.outcome, again.counts.known) == ("ok", 2)
        assert (again.counts.quarantined, again.segments) == (1, 0)
    assert sorted(small_archive.archived(account)) == sorted([message("one"), message("two")])


def test_a_cut_in_a_message_loses_nothing_that_was_read_before(small_archive: Archive) -> None:
    play = Pop2Play([message("one"), message("two")], cuts={2: 10})
    with pop2_server(play) as server:
        account = account_of(small_archive, server, play)
        report = sync(small_archive, account)
        assert (report.outcome, report.counts.new) == ("try_later", 1)
        assert small_archive.archived(account) == [message("one")]
        play.cuts = {}
        assert sync(small_archive, account).counts.new == 1
    assert sorted(small_archive.archived(account)) == sorted([message("one"), message("two")])


def test_account_add_check_and_sync_speak_pop2(tmp_path: Path) -> None:
    play = Pop2Play([message("one")])
    commands = Commands(tmp_path)
    with pop2_server(play) as server:
        url = f"pop2://user@localhost:{server.port}"
        with pytest.raises(UsageError, match="crosses the network in clear text"):
            commands.run("account", "check", url, "--password-env", "PASSWORD")
        assert server.received == []
        commands.run("account", "add", "old", url, "--tls", "none", "--password-env", "PASSWORD")
        (told,) = commands.json("account", "check", "old")
        assert (told["mechanism"], told["messages"], told["has_uidl"]) == ("HELO", 1, False)
        assert any("each poll fetches all" in line for line in told["advice"])
        (report,) = commands.json("sync", "old")
        assert (report["outcome"], report["new"]) == ("ok", 1)

"""What a server trips over is remembered by its account, through worker and database, for a month."""

from archiver import policy
from archiver.model import Account
from tests.harness.scripted_pop3 import HangUp, HangUpIfPipelined, MailboxPlay
from tests.scenarios.story import Archive, message

MONTH_SECONDS = (policy.AVOID_DAYS + 1) * 86400.0


def avoided(archive: Archive, account: Account) -> frozenset[str]:
    return policy.avoided(archive.fresh(account), archive.clock.now())


def test_a_server_that_hangs_up_at_capa_is_asked_twice_and_then_not_for_a_month(archive: Archive) -> None:
    play = MailboxPlay([(b"a", message("a"))], faults={"CAPA": HangUp()})
    server = archive.serve(play)
    account = archive.add(server)

    # Each time it is called again, without the question: the poll works.
    for polls in (1, 2):
        assert archive.sync(account).outcome == "ok"
        assert (server.connections, server.commands["CAPA"]) == (2 * polls, polls)
    assert avoided(archive, account) == {"CAPA"}

    play.messages.append((b"b", message("b")))
    assert archive.sync(account).counts.new == 1
    assert (server.connections, server.commands["CAPA"]) == (5, 2)
    assert avoided(archive, account) == {"CAPA"}

    archive.clock.advance(MONTH_SECONDS)
    assert avoided(archive, account) == frozenset()
    play.faults = {}
    assert archive.sync(account).outcome == "ok"
    assert server.connections == 6
    assert server.commands["CAPA"] > 2
    assert archive.fresh(account).avoids == ()


def test_a_server_that_hangs_up_under_pipelined_retrs_gives_its_mail_all_the_same(archive: Archive) -> None:
    names = ("a", "b", "c", "d", "e")
    play = MailboxPlay(
        [(name.encode(), message(name)) for name in names], faults={"RETR": HangUpIfPipelined()}
    )
    account = archive.add(archive.serve(play))

    # Once may be chance.
    assert archive.sync(account).outcome == "try_later"
    assert avoided(archive, account) == frozenset()
    assert archive.sync(account).outcome == "try_later"
    assert avoided(archive, account) == {"PIPELINING"}

    report = archive.sync(account)
    assert (report.outcome, report.counts.new) == ("ok", len(names))
    assert sorted(archive.objects(account).values()) == sorted(content for _, content in play.messages)

    # After a month it may have been mended: it is tried, and was not.
    archive.clock.advance(MONTH_SECONDS)
    play.messages += [(name.encode(), message(name)) for name in ("f", "g")]
    assert archive.sync(account).outcome == "try_later"
    play.faults = {}
    assert archive.sync(account).counts.new == 2
    assert archive.fresh(account).avoids == ()

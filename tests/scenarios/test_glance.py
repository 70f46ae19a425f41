"""A mailbox that looks as it did is not listed; whatever may have changed, or is due, has it listed."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace

import pytest
import sqlalchemy as sa

from archiver import pop3
from archiver.db import accounts, requests
from archiver.model import Account, DeletePolicy, PollReport, new_account_id
from archiver.poll import NEEDS_THREAD, Story, begin, poll
from archiver.poll.ports import Ports
from archiver.store import Body, PutResult
from archiver.store.filesystem import FilesystemStore
from tests.conftest import Mailbox
from tests.harness.scripted_pop3 import CAPABILITIES, Channel, HangUp, MailboxPlay, ScriptedPop3, Send, Talk
from tests.scenarios.story import Archive, Fuse, message, poll_claimed
from tests.scenarios.test_poll import mailbox as scripted_mailbox

IDLE_STATEMENTS = 10
"""After the claim: the account, the journal and what was seen last; the report, and the lease given back."""

HOURS = 3600.0
DAY = 86400.0


def settled(archive: Archive, play: MailboxPlay, **settings: object) -> tuple[ScriptedPop3, Account]:
    """A mailbox that was archived, and is as it was since."""
    server = archive.serve(play)
    account = archive.add(server, **settings)
    assert archive.poll_on_schedule(account).outcome == "ok"
    server.commands.clear()
    return server, account


def was_listed(server: ScriptedPop3) -> bool:
    listed = server.commands["LIST"] > 0
    server.commands.clear()
    return listed


def test_an_unchanged_mailbox_is_not_listed(archive: Archive) -> None:
    server, account = settled(archive, scripted_mailbox("a", "b", "c"))
    before, segments = archive.mailbox_row(account), len(archive.segments(account))
    for _ in range(3):
        row = archive.poll_on_schedule(account)
        assert (row.outcome, row.glanced, row.listed, row.known, row.to_come) == ("ok", True, 3, 3, 0)
        assert not was_listed(server)
    assert archive.mailbox_row(account) == before
    assert len(archive.segments(account)) == segments
    # The look is one round trip between login and QUIT.
    assert [line for line, _ in server.received[-3:]] == [b"STAT", b"UIDL 3", b"QUIT"]


def test_an_empty_mailbox_is_known_by_its_emptiness(archive: Archive) -> None:
    play = scripted_mailbox()
    server, account = settled(archive, play)
    assert archive.poll_on_schedule(account).glanced
    play.messages.append((b"a", message("a")))
    assert archive.poll_on_schedule(account).new == 1
    assert was_listed(server)


def arrives(play: MailboxPlay) -> None:
    play.messages.append((b"d", message("d")))


def leaves(play: MailboxPlay) -> None:
    del play.messages[0]


def is_exchanged(play: MailboxPlay) -> None:
    """As many as before, and as many octets."""
    del play.messages[0]
    play.messages.append((b"d", message("d")))


def grows(play: MailboxPlay) -> None:
    play.messages[0] = (b"a", message("a, and more"))


@pytest.mark.parametrize("change", [arrives, leaves, is_exchanged, grows])
def test_what_changes_is_seen(archive: Archive, change: Callable[[MailboxPlay], None]) -> None:
    play = scripted_mailbox("a", "b", "c")
    server, account = settled(archive, play)
    change(play)
    row = archive.poll_on_schedule(account)
    assert (row.outcome, row.glanced) == ("ok", False)
    assert was_listed(server)
    assert {content for _, content in play.messages} <= set(archive.archived(account))
    assert archive.poll_on_schedule(account).glanced


def test_what_changed_is_archived_in_the_session_that_saw_it(archive: Archive) -> None:
    play = scripted_mailbox("a", "b", "c")
    server, account = settled(archive, play)
    before = server.connections
    arrives(play)
    assert archive.poll_on_schedule(account).new == 1
    assert server.connections == before + 1


def test_mailboxes_are_looked_at_together_and_take_no_thread(archive: Archive) -> None:
    """No server answers STAT before each was asked, and there is one thread for all that wants one."""
    plays = [scripted_mailbox("a") for _ in range(3)]
    accounts = [settled(archive, play)[1] for play in plays]
    together = threading.Barrier(len(plays))

    def answer(channel: Channel) -> None:
        together.wait(20)
        channel.send(b"+OK 1 %d\r\n" % len(message("a")))

    for play in plays:
        play.faults = {"STAT": Talk(answer)}
    worker = archive.worker(workers=1)
    wait(worker.changeovers.begin([archive.claim(account, owner=worker.terms.owner) for account in accounts]))
    assert [archive.polls(account)[-1].glanced for account in accounts] == [True] * 3


# One that only grew.


def came(play: MailboxPlay, *names: str) -> None:
    play.messages.extend((name.encode(), message(name)) for name in names)


def sparing(archive: Archive) -> Ports:
    """A line of the listing that is spared is worth to ask for a message singly."""
    return archive.ports(spared_lines=1)


def lines_of(server: ScriptedPop3) -> list[bytes]:
    """The commands between login and QUIT, without CAPA."""
    lines = [line for line, _ in server.received if line.split()[0] in {b"STAT", b"UIDL", b"LIST", b"RETR"}]
    server.received.clear()
    return lines


@pytest.mark.parametrize("capabilities", [CAPABILITIES, ("USER", "UIDL")], ids=["pipelined", "not"])
def test_of_a_mailbox_that_grew_only_what_came_is_listed(
    archive: Archive, capabilities: tuple[str, ...]
) -> None:
    play = scripted_mailbox("a", "b", "c", capabilities=capabilities)
    server, account = settled(archive, play)
    lines_of(server)
    came(play, "d", "e")
    row = archive.poll_on_schedule(account, sparing(archive))
    assert (row.outcome, row.glanced, row.listed, row.new, row.known) == ("ok", False, 5, 2, 3)
    looked, asked = [b"STAT", b"UIDL 3"], [b"UIDL 4", b"LIST 4", b"UIDL 5", b"LIST 5"]
    assert lines_of(server) == [*looked, *asked, b"RETR 4", b"RETR 5", b"STAT", b"UIDL 5"]
    assert set(archive.archived(account)) == {message(name) for name in "abcde"}
    segment = archive.segments(account)[-1]
    listed = b"".join(b"%d %d %b\n" % (n, len(message(u)), u.encode()) for n, u in ((4, "d"), (5, "e")))
    assert (segment.listing_count, segment.listing_first) == (5, 4)
    assert segment.listing_digest == hashlib.sha256(listed).digest()
    # From there on it is known by the new look, and the whole listing finds nothing else.
    row = archive.poll_on_schedule(account, sparing(archive))
    assert (row.glanced, row.listed, row.known) == (True, 5, 5)
    assert archive.sync(account).counts.known == 5
    assert archive.verify(account).clean


def leaves_and_two_come(play: MailboxPlay) -> None:
    leaves(play)
    came(play, "d", "e")


def comes_first(play: MailboxPlay) -> None:
    play.messages.insert(0, (b"d", message("d")))


def comes_under_an_id_that_is_there(play: MailboxPlay) -> None:
    play.messages.append((b"a", message("d")))


def come_under_one_id(play: MailboxPlay) -> None:
    play.messages += [(b"d", message("d")), (b"d", message("e"))]


def comes_and_another_is_altered(play: MailboxPlay) -> None:
    grows(play)
    came(play, "d")


def comes_and_has_no_id(play: MailboxPlay) -> None:
    came(play, "d")
    play.faults = {"UIDL 4": Send(b"-ERR no such message\r\n")}


def comes_and_has_no_size(play: MailboxPlay) -> None:
    came(play, "d")
    play.faults = {"LIST 4": Send(b"+OK 4 large\r\n")}


def comes_and_is_told_of_as_another(play: MailboxPlay) -> None:
    came(play, "d")
    play.faults = {"LIST 4": Send(b"+OK 3 %d\r\n" % len(message("d")))}


def come_in_numbers(play: MailboxPlay) -> None:
    came(play, "d", "e", "f", "g")


@pytest.mark.parametrize(
    "change",
    [
        leaves_and_two_come,
        comes_first,
        comes_under_an_id_that_is_there,
        come_under_one_id,
        comes_and_another_is_altered,
        comes_and_has_no_id,
        comes_and_has_no_size,
        comes_and_is_told_of_as_another,
        come_in_numbers,
    ],
)
def test_what_did_more_than_grow_is_listed(archive: Archive, change: Callable[[MailboxPlay], None]) -> None:
    play = scripted_mailbox("a", "b", "c")
    server, account = settled(archive, play)
    change(play)
    lines_of(server)
    row = archive.poll_on_schedule(account, sparing(archive))
    assert (row.outcome, row.listed) == ("ok", len(play.messages))
    assert b"LIST" in lines_of(server)
    assert {content for _, content in play.messages} <= set(archive.archived(account))
    assert archive.verify(account).clean


def test_a_mailbox_that_grows_is_listed_whole_after_some_hours(archive: Archive) -> None:
    play = scripted_mailbox("a", "b", "c")
    server, account = settled(archive, play)
    lines_of(server)
    listed = []
    for hour in range(6):
        archive.clock.advance(HOURS)
        came(play, str(hour))
        assert archive.poll_on_schedule(account, sparing(archive)).new == 1
        listed.append(b"LIST" in lines_of(server))
    assert listed == [False, False, False, True, False, False]


def test_what_was_set_aside_is_counted_and_tried_again_though_the_mailbox_grew(archive: Archive) -> None:
    play = scripted_mailbox("a", "bad", "c", faults={"RETR 2": Send(b"-ERR [SYS/PERM] corrupt\r\n")})
    server, account = settled(archive, play)
    came(play, "d")
    lines_of(server)
    row = archive.poll_on_schedule(account, sparing(archive))
    assert (row.new, row.known, row.quarantined, row.to_come) == (1, 2, 1, 0)
    assert b"LIST" not in lines_of(server)
    play.faults = {}
    archive.clock.advance(HOURS + 1)
    came(play, "e")
    assert archive.poll_on_schedule(account, sparing(archive)).new == 2
    assert b"LIST" in lines_of(server)


def test_what_came_since_is_deleted_when_it_is_time(archive: Archive) -> None:
    play = scripted_mailbox("a", "b")
    server, account = settled(archive, play, delete=DeletePolicy(1.0))
    archive.clock.advance(DAY - HOURS)
    assert archive.poll_on_schedule(account, sparing(archive)).known == 2
    came(play, "c")
    lines_of(server)
    assert archive.poll_on_schedule(account, sparing(archive)).new == 1
    assert b"LIST" not in lines_of(server)
    archive.clock.advance(HOURS)
    assert archive.poll_on_schedule(account, sparing(archive)).delete_requested == 2
    assert [uidl for uidl, _ in play.messages] == [b"c"]


def test_a_question_about_what_came_that_breaks_the_session_is_not_asked_twice(archive: Archive) -> None:
    play = scripted_mailbox("a", capabilities=("USER",))
    server, account = settled(archive, play)
    came(play, "b")
    play.faults = {"LIST 2": HangUp()}
    assert archive.poll_on_schedule(account, sparing(archive)).outcome == "try_later"
    lines_of(server)
    assert archive.poll_on_schedule(account, sparing(archive)).new == 1
    assert lines_of(server)[:2] == [b"UIDL", b"LIST"]


def test_it_is_listed_all_the_same_after_some_hours(archive: Archive) -> None:
    server, account = settled(archive, scripted_mailbox("a"))
    archive.clock.advance(3 * HOURS)
    assert archive.poll_on_schedule(account).glanced
    archive.clock.advance(1 * HOURS)
    assert not archive.poll_on_schedule(account).glanced
    assert was_listed(server)
    assert archive.poll_on_schedule(account).glanced


@pytest.mark.parametrize("set_by_seconds", [-DAY, DAY])
def test_it_is_listed_when_the_clock_was_set(archive: Archive, set_by_seconds: float) -> None:
    """One that was set back would have the mailbox believed until it is that late again."""
    server, account = settled(archive, scripted_mailbox("a"))
    archive.clock.advance(set_by_seconds)
    assert not archive.poll_on_schedule(account).glanced
    assert was_listed(server)
    assert archive.poll_on_schedule(account).glanced


def test_what_a_listing_showed_is_not_overlooked_because_its_poll_died(archive: Archive) -> None:
    play = scripted_mailbox("a", "b", "c")
    server, account = settled(archive, play)
    play.messages[1] = (b"d", message("d"))
    fuse = Fuse(1, after=True)
    archive.poll_until_death(account, archive.mortal_ports(fuse))
    assert fuse.calls == ["mail.login", "mail.list"]
    assert was_listed(server)
    row = archive.poll_on_schedule(account)
    assert (row.glanced, row.new) == (False, 1)
    assert was_listed(server)


def test_it_is_always_listed_where_the_setting_says_so(archive: Archive) -> None:
    account = archive.add(archive.serve(scripted_mailbox("a")))
    ports = archive.ports(full_listing_seconds=0.0)
    assert [archive.poll_on_schedule(account, ports).glanced for _ in range(2)] == [False, False]


def test_whoever_asks_in_person_gets_a_listing(archive: Archive) -> None:
    server, account = settled(archive, scripted_mailbox("a"))
    archive.sync(account)
    assert was_listed(server)


def test_a_message_that_is_set_aside_is_tried_again_when_it_is_time(archive: Archive) -> None:
    play = scripted_mailbox("a", "bad", faults={"RETR 2": Send(b"-ERR [SYS/PERM] corrupt\r\n")})
    server, account = settled(archive, play)
    row = archive.poll_on_schedule(account)
    assert (row.glanced, row.known, row.quarantined) == (True, 1, 1)
    play.faults = {}
    archive.clock.advance(HOURS + 1)
    assert archive.poll_on_schedule(account).new == 1
    assert was_listed(server)


def test_a_message_that_falls_due_to_be_deleted_is_deleted(archive: Archive) -> None:
    play = scripted_mailbox("a")
    server, account = settled(archive, play, delete=DeletePolicy(1.0))
    archive.clock.advance(DAY - HOURS)
    assert not archive.poll_on_schedule(account).glanced
    assert archive.poll_on_schedule(account).glanced
    archive.clock.advance(HOURS)
    assert archive.poll_on_schedule(account).delete_requested == 1
    # Whether it went is seen by a listing alone.
    server.commands.clear()
    assert archive.poll_on_schedule(account).deleted == 1
    assert was_listed(server)


def test_another_policy_has_the_mailbox_listed(archive: Archive) -> None:
    _, account = settled(archive, scripted_mailbox("a"))
    changed = replace(archive.fresh(account), delete=DeletePolicy(30.0))
    archive.database.transact(lambda connection: accounts.change(connection, changed, archive.clock.now()))
    assert not archive.poll_on_schedule(account).glanced


def test_somebody_who_wants_a_retry_has_the_mailbox_listed(archive: Archive) -> None:
    play = scripted_mailbox("a", "bad", "worse")
    play.faults = {f"RETR {number}": Send(b"-ERR [SYS/PERM] corrupt\r\n") for number in (2, 3)}
    _, account = settled(archive, play)
    play.faults = {}
    now = archive.clock.now()

    def retry(uidl: bytes | None) -> int:
        return archive.database.transact(
            lambda connection: requests.retry_quarantined(connection, account.id, now, uidl)
        )

    assert (retry(b"unheard of"), retry(b"bad")) == (0, 1)
    row = archive.poll_on_schedule(account)
    assert (row.new, row.quarantined) == (1, 1)
    assert retry(None) == 1
    assert archive.poll_on_schedule(account).new == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"UIDL": Send(b"+OK\r\n1 same\r\n2 same\r\n.\r\n")},
        {"UIDL": Send(b"-ERR unknown\r\n")},
        {"UIDL": Send(b"+OK\r\n1 a\r\nwhat?\r\n2 b\r\n.\r\n")},
        {"STAT": Send(b"-ERR no\r\n")},
        {"STAT": Send(b"+OK 17 1\r\n")},
        {"STAT": Send(b"+OK who knows\r\n")},
        {"UIDL 2": Send(b"-ERR no such message\r\n")},
        {"UIDL 2": Send(b"+OK 2 another\r\n")},
    ],
    ids=[
        "duplicates",
        "no UIDL",
        "odd line",
        "no STAT",
        "wrong STAT",
        "odd STAT",
        "no UIDL n",
        "wrong UIDL n",
    ],
)
def test_a_server_that_cannot_be_trusted_is_listed_each_time(
    archive: Archive, fault: dict[str, Send]
) -> None:
    play = scripted_mailbox("a", "b", capabilities=("USER",), faults=fault)
    server, account = settled(archive, play)
    for _ in range(2):
        row = archive.poll_on_schedule(account)
        assert (row.outcome, row.glanced, row.known) == ("ok", False, 2)
        assert was_listed(server)


def test_a_look_that_breaks_the_session_is_not_taken_twice(archive: Archive) -> None:
    play = scripted_mailbox("a", capabilities=("USER",))
    server, account = settled(archive, play)
    play.faults = {"STAT": Send(b"what?\r\n")}
    assert archive.poll_on_schedule(account).outcome == "try_later"
    assert not was_listed(server)
    assert archive.poll_on_schedule(account).outcome == "ok"
    assert was_listed(server)


def edits(archive: Archive, account: Account) -> None:
    at = archive.clock.now()
    changed = replace(account, delete=DeletePolicy(30.0))
    archive.database.transact(lambda connection: accounts.change(connection, changed, at, former=account))


def allows_deletion(archive: Archive, account: Account) -> None:
    archive.database.transact(lambda connection: requests.allow_deletion(connection, account.id))


def fetches_again(archive: Archive, account: Account) -> None:
    archive.database.transact(lambda connection: requests.fetch_again(connection, account.id, b"a"))


@pytest.mark.parametrize("act", [edits, allows_deletion, fetches_again])
def test_what_somebody_did_while_a_poll_went_on_has_the_next_one_list(
    archive: Archive, act: Callable[[Archive, Account], None]
) -> None:
    play = scripted_mailbox("a", "b")
    server, account = settled(archive, play)
    arrives(play)
    ports = archive.ports()

    def meanwhile(account: Account) -> pop3.Session:
        act(archive, account)
        return ports.connect(account)

    assert archive.poll_on_schedule(account, replace(ports, connect=meanwhile)).new == 1
    server.commands.clear()
    assert archive.poll_on_schedule(archive.fresh(account)).outcome == "ok"
    assert was_listed(server)
    assert archive.poll_on_schedule(archive.fresh(account)).glanced


def test_what_is_still_to_come_is_not_overlooked(archive: Archive) -> None:
    class Away(FilesystemStore):
        def put(self, key: str, body: Body) -> PutResult:
            raise OSError("away")

    account = archive.add(archive.serve(scripted_mailbox("a")))
    away = archive.ports(store=Away(archive.directory / "store"))
    assert archive.poll_on_schedule(account, away).outcome == "try_later"
    row = archive.mailbox_row(account)
    assert row.trusted_until is None
    assert archive.poll_on_schedule(account).new == 1
    row = archive.mailbox_row(account)
    assert (row.listed, row.quarantined, row.to_come, row.listed_at) == (1, 0, 0, archive.clock.now())


def test_an_idle_poll_asks_little_of_the_database(archive: Archive) -> None:
    _, account = settled(archive, scripted_mailbox(*map(str, range(100))))
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if not statement.startswith(("BEGIN", "COMMIT")):
            statements.append(statement)

    worker = archive.worker()
    held = archive.claim(account, owner=worker.terms.owner)
    sa.event.listen(archive.database.engine, "before_cursor_execute", note)
    try:
        poll_claimed(worker, held)
    finally:
        sa.event.remove(archive.database.engine, "before_cursor_execute", note)
    assert archive.polls(account)[-1].glanced
    assert len(statements) <= IDLE_STATEMENTS, statements
    assert not [one for one in statements if "sighting" in one or "capture" in one]
    assert not [one for one in statements if one.startswith("UPDATE mailbox")]


def test_dovecot_is_known_by_a_look(archive: Archive, mailbox: Callable[..., Mailbox]) -> None:
    box = mailbox([message(name) for name in ("a", "b", "c")])
    trusting = archive.ports(password=lambda _: box.password)
    new = Account(
        id=new_account_id(),
        name=box.url,
        url=box.url,
        tls="implicit",
        secret_reference="env:NONE",
        ca_file=str(box.ca_file),
    )
    account = archive.database.transact(lambda connection: accounts.add(connection, new, archive.clock.now()))

    def connect(account: Account) -> pop3.Session:
        return pop3.connect(
            pop3.parse_url(account.url, pop3.Tls.IMPLICIT),
            tls_settings=pop3.TlsSettings(ca_file=box.ca_file),
        )

    ports = replace(trusting, connect=connect)
    assert archive.poll_on_schedule(account, ports).new == 3
    for _ in range(2):
        row = archive.poll_on_schedule(account, ports)
        assert (row.outcome, row.glanced, row.known) == ("ok", True, 3)
    box.deliver([message("d")])
    row = archive.poll_on_schedule(account, ports)
    assert (row.glanced, row.new) == (False, 1)
    box.remove(1)
    row = archive.poll_on_schedule(account, ports)
    assert (row.glanced, row.gone, row.known) == (False, 1, 3)
    assert archive.poll_on_schedule(account, ports).glanced
    box.deliver([message("e"), message("f")])
    row = archive.poll_on_schedule(account, replace(ports, spared_lines=1))
    assert (row.glanced, row.listed, row.new, row.known) == (False, 5, 2, 3)
    assert archive.segments(account)[-1].listing_first == 4
    assert archive.sync(account, ports).counts.known == 5
    assert set(archive.archived(account)) == {message(name) for name in "abcdef"}


def test_a_story_needs_a_thread_before_it_lists(archive: Archive) -> None:
    account = archive.add(archive.serve(MailboxPlay([(b"a", message("a"))])))

    def story() -> Story:
        lease = archive.claim(account)
        return poll(archive.before(account), lease, archive.ports(), may_glance=True)

    listing = story()
    assert begin(listing) is NEEDS_THREAD
    listing.close()
    archive.run_out(account)
    archive.poll_on_schedule(account)
    report = begin(story())
    assert isinstance(report, PollReport)
    assert (report.outcome, report.listed, report.glanced) == ("ok", 1, True)

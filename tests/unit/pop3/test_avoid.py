"""A command that a server trips over is reported, and is not sent to it again."""

import io
from collections.abc import Mapping
from pathlib import Path

import pytest

from archiver.pop3 import FailureKind, Limits, Mailbox, Pop3Error, TlsSettings
from tests.harness.scripted_pop3 import (
    CAPABILITIES,
    Cut,
    Expect,
    Fault,
    HangUp,
    MailboxPlay,
    ScriptedPop3,
    Send,
    Stall,
    Step,
)

HASTY = Limits(capability_seconds=0.2, login_seconds=0.5, listing_seconds=0.2, idle_seconds=0.2)
MESSAGES = [(b"uid-%d" % number, b"message %d\r\n" % number) for number in range(1, 100)]
TRIPS = [pytest.param(HangUp(), id="disconnects"), pytest.param(Stall(), id="stalls")]


def server(faults: Mapping[str, Fault], capabilities: tuple[str, ...] | None = CAPABILITIES) -> ScriptedPop3:
    return ScriptedPop3(MailboxPlay(list(MESSAGES), faults=faults, capabilities=capabilities))


def connected(at: ScriptedPop3, *avoid: str) -> Mailbox:
    return Mailbox.connect(at.endpoint, limits=HASTY, avoid=avoid)


def failed(mailbox: Mailbox) -> Pop3Error:
    """How a session fails that fetches everything."""

    def fetch_all() -> None:
        mailbox.login("secret")
        mailbox.glance()
        list(mailbox.retrieve(mailbox.list().entries, lambda _: io.BytesIO()))

    with mailbox, pytest.raises(Pop3Error) as caught:
        fetch_all()
    return caught.value


@pytest.mark.parametrize("trip", TRIPS)
@pytest.mark.parametrize("verb", ["CAPA", "UTF8"])
def test_a_verb_before_the_login_costs_a_connection_once(verb: str, trip: Fault) -> None:
    with server({verb: trip}, (*CAPABILITIES, "UTF8")) as at:
        with connected(at) as mailbox:
            assert mailbox.facts.suspect == {verb}
            mailbox.login("secret")
        assert at.connections == 2
        with connected(at, verb) as mailbox:
            assert mailbox.facts.suspect == frozenset()
            mailbox.login("secret")
        assert (at.connections, at.commands[verb]) == (3, 1)


def test_a_server_that_trips_over_two_verbs_is_called_for_each() -> None:
    with server({"UTF8": HangUp()}, (*CAPABILITIES, "UTF8")) as at, connected(at) as mailbox:
        mailbox.login("secret")
        assert mailbox.facts.suspect == {"UTF8"}


@pytest.mark.parametrize("trip", TRIPS)
def test_uidl_is_under_suspicion_only_where_it_was_not_offered(trip: Fault) -> None:
    with server({"UIDL": trip}, ("USER", "TOP")) as at:
        mailbox = connected(at)
        assert failed(mailbox).kind is FailureKind.TRANSIENT
        assert mailbox.facts.suspect == {"UIDL"}
        with connected(at, "UIDL") as mailbox:
            mailbox.login("secret")
            assert not mailbox.list().has_uidl
    with server({"UIDL": trip}, ("USER", "UIDL")) as at:
        mailbox = connected(at)
        failed(mailbox)
        assert mailbox.facts.suspect == frozenset()


def test_y10_a_server_that_lists_pipelining_and_hangs_up_under_it() -> None:
    with server({"RETR 3": Cut(4)}) as at:
        mailbox = connected(at)
        assert failed(mailbox).kind is FailureKind.TRANSIENT
        assert "PIPELINING" in mailbox.facts.suspect
        with connected(at, "PIPELINING") as mailbox:
            mailbox.login("secret")
            assert not mailbox.facts.pipelining


def test_a_line_that_breaks_after_a_whole_window_says_nothing_of_pipelining() -> None:
    with server({"RETR 80": Cut(4)}) as at:
        mailbox = connected(at)
        failed(mailbox)
        assert mailbox.facts.suspect == frozenset()


def test_replies_that_make_no_sense_under_pipelining_are_beyond_doubt() -> None:
    with server({"RETR 3": Send(b"what?\r\n")}) as at:
        mailbox = connected(at)
        assert failed(mailbox).kind is FailureKind.PROTOCOL
        assert mailbox.facts.avoid == {"PIPELINING"}


def test_auth_gives_way_to_user_and_pass_within_tls(certificate: tuple[Path, Path]) -> None:
    play = MailboxPlay(list(MESSAGES), faults={"AUTH": HangUp()}, capabilities=("STLS", "USER", "SASL PLAIN"))
    trusted = TlsSettings(ca_file=certificate[0])
    with ScriptedPop3(play, tls="implicit", certificate=certificate) as at:
        mailbox = Mailbox.connect(at.endpoint, tls_settings=trusted, limits=HASTY)
        failed(mailbox)
        assert mailbox.facts.suspect == {"AUTH"}
        with Mailbox.connect(at.endpoint, tls_settings=trusted, avoid={"AUTH"}) as mailbox:
            mailbox.login("secret")
            assert mailbox.facts.mechanism is not None
        assert at.commands["PASS"] == 1


def test_without_tls_an_attacker_on_the_line_cannot_make_us_skip_auth() -> None:
    with server({"AUTH": HangUp()}) as at:
        mailbox = connected(at, "AUTH")
        failed(mailbox)
        assert mailbox.facts.suspect == frozenset()
        assert at.commands["PASS"] == 0


def test_y8_a_server_that_hangs_up_between_two_ways_is_called_again() -> None:
    """free.fr refuses one way, and closes when the next is tried in the same connection."""
    hello: list[Step] = [
        Send(b"+OK ready\r\n"),
        Expect(b"CAPA\r\n"),
        Send(b"+OK\r\nSASL PLAIN\r\nUSER\r\n.\r\n"),
    ]
    refusing: list[Step] = [
        *hello,
        Expect(b"AUTH PLAIN AHVzZXIAc2VjcmV0\r\n"),
        Send(b"-ERR unknown command\r\n"),
        Expect(b"AUTH PLAIN\r\n"),
        Send(b"-ERR unknown command\r\n"),
        Expect(b"USER user\r\n"),
        HangUp(),
    ]
    taking: list[Step] = [
        *hello,
        Expect(b"USER user\r\n"),
        Send(b"+OK\r\n"),
        Expect(b"PASS secret\r\n"),
        Send(b"+OK\r\n"),
        Expect(b"CAPA\r\n"),
        Send(b"-ERR\r\n"),
    ]
    with ScriptedPop3([refusing, taking]) as at:
        with connected(at) as mailbox:
            mailbox.login("secret")
        assert at.connections == 2


def test_y8_it_is_called_again_once() -> None:
    hello: list[Step] = [
        Send(b"+OK ready\r\n"),
        Expect(b"CAPA\r\n"),
        Send(b"+OK\r\nSASL PLAIN\r\nUSER\r\n.\r\n"),
    ]
    refusing: list[Step] = [
        *hello,
        Expect(b"AUTH PLAIN AHVzZXIAc2VjcmV0\r\n"),
        Send(b"-ERR unknown command\r\n"),
        Expect(b"AUTH PLAIN\r\n"),
        Send(b"-ERR unknown command\r\n"),
        HangUp(),
    ]
    with ScriptedPop3([refusing, [*hello, Expect(b"USER user\r\n"), HangUp()]]) as at:
        assert failed(connected(at)).kind is FailureKind.TRANSIENT
        assert at.connections == 2


# A glance.


def test_a_glance_tells_count_octets_and_the_uid_of_one_message() -> None:
    with server({"UIDL 99": Send(b"+OK 99 uid-99\r\n")}) as at, connected(at) as mailbox:
        mailbox.login("secret")
        assert mailbox.glance(99) == (99, sum(len(content) for _, content in MESSAGES), b"uid-99")
        assert mailbox.glance().uidl is None
        assert len(mailbox.list().entries) == 99


@pytest.mark.parametrize(
    "said",
    [b"-ERR\r\n", b"+OK\r\n", b"+OK many\r\n", b"+OK -1 5\r\n", b"+OK 99999999999 5\r\n", b"+OK 1 x\r\n"],
)
def test_y14_a_stat_without_sense_is_no_error(said: bytes) -> None:
    with server({"STAT": Send(said)}) as at, connected(at) as mailbox:
        mailbox.login("secret")
        assert mailbox.glance()[:2] == (None, None)


@pytest.mark.parametrize("said", [b"-ERR no such message\r\n", b"-ERR unknown command\r\n"])
def test_a_server_without_uidl_for_one_message(said: bytes) -> None:
    with server({"UIDL 7": Send(said)}) as at, connected(at) as mailbox:
        mailbox.login("secret")
        assert mailbox.glance(7).uidl is None
        assert mailbox.facts.avoid == frozenset()


@pytest.mark.parametrize(
    "said", [b"+OK uid-7\r\n", b"+OK 8 uid-7\r\n", b"+OK\r\n"], ids=["t1", "other", "mp1"]
)
def test_an_answer_about_another_message_is_none_and_is_not_asked_for_again(said: bytes) -> None:
    with server({"UIDL 7": Send(said)}) as at:
        with connected(at) as mailbox:
            mailbox.login("secret")
            assert mailbox.glance(7).uidl is None
            assert mailbox.facts.avoid == {"UIDL-N"}
        with connected(at, "UIDL-N") as mailbox:
            mailbox.login("secret")
            assert mailbox.glance(7).count == 99
        assert at.commands["UIDL"] == 1


def test_mp1_a_listing_behind_the_answer_to_one_uidl_ends_the_session_and_is_remembered() -> None:
    with server({"UIDL 7": Send(b"+OK\r\n7 a\r\n.\r\n")}) as at, connected(at) as mailbox:
        mailbox.login("secret")
        mailbox.glance(7)
        with pytest.raises(Pop3Error) as caught:
            mailbox.round_trip()
        assert caught.value.kind is FailureKind.PROTOCOL
        assert mailbox.facts.avoid == {"UIDL-N"}


def test_some_messages_are_listed_one_by_one() -> None:
    for capabilities in (CAPABILITIES, ("USER",)):
        with server({}, capabilities) as at, connected(at) as mailbox:
            mailbox.login("secret")
            listing = mailbox.list_from(98, 99)
            assert listing is not None
            assert (listing.first, listing.count, listing.is_whole) == (98, 99, False)
            assert listing.entries == mailbox.list().entries[97:]
            with pytest.raises(RuntimeError):
                mailbox.list_from(98, 99)


@pytest.mark.parametrize(
    "fault",
    [
        {"UIDL 98": b"-ERR no such message\r\n"},
        {"LIST 98": b"-ERR no such message\r\n"},
        {"UIDL 98": b"+OK 97 a\r\n"},
        {"UIDL 98": b"+OK 98 \x01\r\n"},
        {"UIDL 98": b"+OK\r\n"},
        {"LIST 99": b"+OK 99\r\n"},
        {"LIST 99": b"+OK 99 -7\r\n"},
        {"LIST 99": b"+OK 98 5\r\n"},
        {"LIST 99": b"+OK message 99 has 5 octets\r\n"},
    ],
)
@pytest.mark.parametrize("capabilities", [CAPABILITIES, ("USER",)], ids=["pipelined", "not"])
def test_what_is_not_told_of_each_message_wants_the_whole_listing(
    fault: dict[str, bytes], capabilities: tuple[str, ...]
) -> None:
    faults = {line: Send(said) for line, said in fault.items()}
    with server(faults, capabilities) as at, connected(at) as mailbox:
        mailbox.login("secret")
        assert mailbox.list_from(98, 99) is None
        assert len(mailbox.list().entries) == 99


@pytest.mark.parametrize("trip", TRIPS)
def test_a_server_that_trips_over_list_of_one_message_is_not_asked(trip: Fault) -> None:
    with server({"LIST 99": trip}, ("UIDL", "USER")) as at:
        with connected(at) as mailbox:
            mailbox.login("secret")
            with pytest.raises(Pop3Error):
                mailbox.list_from(99, 99)
            assert mailbox.facts.suspect == {"UIDL-N"}
        with connected(at, "UIDL-N") as mailbox:
            mailbox.login("secret")
            assert mailbox.list_from(99, 99) is None


@pytest.mark.parametrize("trip", TRIPS)
def test_a_server_that_trips_over_stat_is_not_asked(trip: Fault) -> None:
    with server({"STAT": trip}, ("UIDL", "USER")) as at:
        mailbox = connected(at)
        failed(mailbox)
        assert mailbox.facts.suspect == {"STAT"}
        with connected(at, "STAT") as mailbox:
            mailbox.login("secret")
            assert mailbox.glance(1) == (None, None, None)
            assert mailbox.list().entries
        assert at.commands["STAT"] == 1

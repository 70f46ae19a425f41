"""What real servers do, one case each, played by a scripted server.

Each name begins with a letter for the server or service, or with the number of
the symptom: D Dovecot, C Courier, CY Cyrus, M Microsoft, Y other services, and
so on. What other tests show already is not here.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from archiver.pop3 import FailureKind, Limits, Mailbox, Pop3Error, Refused, Retrieved
from tests.harness.scripted_pop3 import (
    CAPABILITIES,
    Cut,
    Fault,
    HangUp,
    MailboxPlay,
    ScriptedPop3,
    Send,
    stuffed,
)

HASTY = Limits(login_seconds=0.2, listing_seconds=0.2, idle_seconds=0.2)
MESSAGES = [
    (b"uid-1", b"Subject: one\r\n\r\nfirst\r\n"),
    (b"uid-2", b"Subject: two\r\n\r\nsecond\r\n"),
    (b"uid-3", b"Subject: three\r\n\r\nthird\r\n"),
]
WITHOUT_PIPELINING = tuple(each for each in CAPABILITIES if each != "PIPELINING")

Result = Retrieved[io.BytesIO] | Refused[io.BytesIO]


def server(faults: Mapping[str, Fault] | None = None, **changes: Any) -> ScriptedPop3:
    return ScriptedPop3(MailboxPlay(list(MESSAGES), faults=faults or {}, **changes))


def logged_in(at: ScriptedPop3, limits: Limits | None = None) -> Mailbox:
    mailbox = Mailbox.connect(at.endpoint, limits=limits or Limits())
    try:
        mailbox.login("secret")
    except BaseException:
        mailbox.close()
        raise
    return mailbox


def fetched(at: ScriptedPop3) -> list[Result]:
    with logged_in(at) as mailbox:
        results = list(mailbox.retrieve(mailbox.list().entries, lambda _: io.BytesIO()))
        mailbox.quit()
    return results


def contents(results: list[Result]) -> list[bytes | None]:
    return [each.sink.getvalue() if isinstance(each, Retrieved) else None for each in results]


def failure_of(call: Callable[[], object]) -> Pop3Error:
    with pytest.raises(Pop3Error) as caught:
        call()
    return caught.value


# At the login.


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        pytest.param(b"[AUTH] Application-specific password required", FailureKind.OPERATOR, id="g8"),
        pytest.param(b"[AUTH] Web login required", FailureKind.OPERATOR, id="g8 web"),
        pytest.param(b"[SYS/TEMP] Temporary system problem", FailureKind.TRANSIENT, id="g9"),
        pytest.param(b"Your account is not enabled for POP access", FailureKind.OPERATOR, id="g11"),
        pytest.param(b"Logon failure: unknown user name or bad password.", FailureKind.AUTH, id="m4"),
        pytest.param(
            b"Exceeded the login limit for a 15 minute period", FailureKind.TRANSIENT, id="m4 honest"
        ),
        pytest.param(b"please wait a few minutes", FailureKind.TRANSIENT, id="y17 InterMail"),
        pytest.param(b"maildrop lock is held", FailureKind.TRANSIENT, id="y17 Qpopper"),
        pytest.param(b"Your account is temporarily unavailable (+t bit)", FailureKind.TRANSIENT, id="c3"),
        pytest.param(b"POP3 access disabled", FailureKind.OPERATOR, id="c3 disabled"),
        pytest.param(b"Re-Authentication Failure", FailureKind.TRANSIENT, id="px1"),
        pytest.param(b"[IN-USE] mailbox already in use by pid 12345", FailureKind.TRANSIENT, id="5.20"),
        pytest.param(b"", FailureKind.AUTH, id="p1"),
    ],
)
def test_a_refused_login_is_understood(said: bytes, kind: FailureKind) -> None:
    refusal = b"-ERR " + said + b"\r\n" if said else b"-ERR\r\n"
    with server({"PASS": Send(refusal)}, capabilities=None) as at:
        assert failure_of(lambda: logged_in(at)).kind is kind


def test_m5_brackets_in_the_greeting_are_no_response_code() -> None:
    greeting = b"+OK The Microsoft Exchange POP3 service is ready. [UwBDADEAUAA=]\r\n"
    with server(greeting=greeting) as at, logged_in(at) as mailbox:
        assert "[UwBDADEAUAA=]" in mailbox.facts.greeting


def test_cy3_an_apop_stamp_is_no_reason_to_try_apop() -> None:
    with server(greeting=b"+OK ready <1896.697170952@example.com>\r\n", capabilities=None) as at:
        logged_in(at).close()
        assert at.commands["APOP"] == 0


def test_w2_and_y9_nothing_is_probed_that_was_not_offered() -> None:
    """WildDuck disconnects at a verb that it does not know, IONOS at an AUTH without argument."""
    with server() as at:
        fetched(at)
        lines = [line for line, _ in at.received]
    assert {line.split(b" ")[0] for line in lines} == {b"CAPA", b"AUTH", b"UIDL", b"LIST", b"RETR", b"QUIT"}
    assert b"AUTH" not in lines


# The listing.


@pytest.mark.parametrize(
    ("uidl", "uidls", "skipped"),
    [
        pytest.param(b"1   a\r\n2\tb\r\n3 c  \r\n", [b"a", b"b", b"c"], 0, id="y12 several spaces"),
        pytest.param(b"1 a\r\n2 a\r\n3 a\r\n", [b"a", b"a", b"a"], 0, id="d2, p1, 5.4 duplicates"),
        pytest.param(b"1 a\r\n2\r\n3 \r\n", [b"a", None, None], 2, id="5.3 without a uid"),
        pytest.param(b"1 \xff\xfe\r\n2 a b/..\r\n3 c\r\n", [b"\xff\xfe", b"a b/..", b"c"], 0, id="5.5"),
        pytest.param(b"1 " + b"m" * 300 + b"\r\n2 b\r\n3 c\r\n", [b"m" * 300, b"b", b"c"], 0, id="m14"),
        pytest.param(b"3 c\r\n1 a\r\n2 b\r\n", [b"a", b"b", b"c"], 0, id="y14 any order"),
    ],
)
def test_odd_uidls_are_read(uidl: bytes, uidls: list[bytes | None], skipped: int) -> None:
    with server({"UIDL": Send(b"+OK\r\n" + uidl + b".\r\n")}) as at, logged_in(at) as mailbox:
        listing = mailbox.list()
    assert [entry.uidl for entry in listing.entries] == uidls
    assert listing.skipped_lines == skipped


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param(b"1 %!d(float64=5461)\r\n2 5\r\n3 6\r\n", [None, 5, 6], id="mp1"),
        pytest.param(b"0 9\r\n1 4\r\n2 5\r\n3 6\r\n", [4, 5, 6], id="n1 from zero"),
        pytest.param(b"1 -4\r\n2 99999999999999999999\r\n3 6 octets\r\n", [None, None, 6], id="5.7"),
        pytest.param(b"1 1\r\n2 2\r\n3 999999\r\n", [1, 2, 999999], id="m8 sizes of a database"),
    ],
)
def test_odd_sizes_lose_no_message(sizes: bytes, expected: list[int | None]) -> None:
    with server({"LIST": Send(b"+OK\r\n" + sizes + b".\r\n")}) as at:
        with logged_in(at) as mailbox:
            assert [entry.size for entry in mailbox.list().entries] == expected
        assert contents(fetched(at)) == [content for _, content in MESSAGES], "a size frames nothing"


def test_5_6_what_list_alone_shows_is_a_message_without_a_uid() -> None:
    """It may have come between UIDL and LIST, or never get a uid: then it would be fetched never."""
    with server({"UIDL": Send(b"+OK\r\n1 a\r\n2 b\r\n.\r\n")}) as at:
        with logged_in(at) as mailbox:
            assert [entry.uidl for entry in mailbox.list().entries] == [b"a", b"b", None]
        assert contents(fetched(at)) == [content for _, content in MESSAGES]


def test_c2_the_text_behind_ok_is_not_read() -> None:
    taunt = b"+OK 7 POP3 clients that break here, they violate STD53.\r\n1 4\r\n2 5\r\n3 6\r\n.\r\n"
    with server({"LIST": Send(taunt)}) as at, logged_in(at) as mailbox:
        assert [entry.number for entry in mailbox.list().entries] == [1, 2, 3]


def test_y1_uidl_works_though_capa_has_none() -> None:
    with server(capabilities=("TOP", "USER", "SASL PLAIN")) as at, logged_in(at) as mailbox:
        assert mailbox.list().has_uidl


def test_5_8_an_empty_listing_begins_with_its_end() -> None:
    empty = Send(b"+OK\r\n.\r\n", split_bytes=1)
    with server({"UIDL": empty, "LIST": empty}) as at, logged_in(at) as mailbox:
        assert mailbox.list().entries == ()
        mailbox.quit()


def test_w1_a_session_lists_before_it_deletes_and_never_again() -> None:
    with server() as at:
        with logged_in(at) as mailbox:
            entries = mailbox.list().entries
            mailbox.delete(entries[:1])
            with pytest.raises(RuntimeError, match="once"):
                mailbox.list()
        assert (at.commands["UIDL"], at.commands["LIST"]) == (1, 1)


def test_5_25_a_deletion_is_not_verified_in_its_own_session() -> None:
    with server({"STAT": Send(b"+OK 99 99\r\n")}) as at, logged_in(at) as mailbox:
        mailbox.delete(mailbox.list().entries)
        mailbox.quit()
        assert at.commands["STAT"] == 0


# Messages.


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"Message can not load", id="y4"),
        pytest.param(b"Server error, please try again later", id="y3"),
        pytest.param(b"[SYS/PERM] The message could not be rendered", id="m9"),
    ],
)
def test_a_message_that_never_comes_does_not_hold_up_the_others(said: bytes) -> None:
    with server({"RETR 2": Send(b"-ERR " + said + b"\r\n")}) as at:
        first, second, third = fetched(at)
    assert contents([first, third]) == [MESSAGES[0][1], MESSAGES[2][1]]
    assert isinstance(second, Refused)
    assert second.error.kind is FailureKind.POISON


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"Download exceed the limit", id="y4 quota"),
        pytest.param(b"Download was rate limited. Try again in 10 minutes", id="w5"),
        pytest.param(b"Can't open the message file - it's gone!", id="c3 gone"),
        pytest.param(b"lost the mailbox lock to another session", id="u1"),
    ],
)
def test_a_refusal_of_the_session_condemns_no_message(said: bytes) -> None:
    with server({"RETR 2": Send(b"-ERR " + said + b"\r\n")}) as at:
        assert failure_of(lambda: fetched(at)).kind is FailureKind.TRANSIENT
        assert at.commands["QUIT"] == 0


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Cut(9), id="dm1 in mid-message"),
        pytest.param(Send(b"+OK\r\nSubject: x\r\n\r\nbody\r\n.\r"), id="cy2 the last LF never comes"),
        pytest.param(Send(b"+OK\r\n"), id="t1 nothing behind +OK"),
        pytest.param(HangUp(), id="y10 under pipelining"),
    ],
)
def test_half_a_message_is_never_a_message(fault: Fault) -> None:
    with server({"RETR 1": fault}, capabilities=WITHOUT_PIPELINING) as at:
        with logged_in(at, HASTY) as mailbox:
            entries = mailbox.list().entries
            results = mailbox.retrieve(entries, lambda _: io.BytesIO())
            assert failure_of(lambda: next(results)).kind is FailureKind.TRANSIENT
            assert mailbox.in_transit == entries[0]
        assert at.commands["QUIT"] == 0


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b" a continuation line first\r\n\r\nbody\r\n", id="y15"),
        pytest.param(b"Subject: x\r\n\r\nbefore\n.\nafter\r.\rend\r\n", id="5.8 lone dots"),
        pytest.param(b"Subject: x\r\n\r\n" + b"y" * 3_000_000 + b"\r\n", id="5.11 one line of 3 MB"),
        pytest.param(b"Subject: x\r\n\r\n+OK 1 2\r\n-ERR\r\n..\r\n", id="5.10 looks like replies"),
        pytest.param(b"Subject: x\r\n\r\nbody\r\n\r\n", id="s1 an empty line at the end"),
    ],
)
def test_a_message_is_kept_as_it_is(message: bytes) -> None:
    with ScriptedPop3(MailboxPlay([(b"uid", message)])) as at:
        assert contents(fetched(at)) == [message]


@pytest.mark.parametrize("octets", [1, 2, 3])
def test_5_9_segments_fall_anywhere(octets: int) -> None:
    message = b"Subject: x\r\n\r\n.\r\n..x\r\nend\r\n"
    reply = Send(b"+OK\r\n" + stuffed(message), split_bytes=octets)
    with ScriptedPop3(MailboxPlay([(b"uid", message)], faults={"RETR 1": reply})) as at:
        assert contents(fetched(at)) == [message]


# The end.


def test_m11_an_empty_answer_to_dele_ends_the_session_without_quit() -> None:
    with server({"DELE 2": Send(b"\r\n")}) as at:
        with logged_in(at) as mailbox:
            entries = mailbox.list().entries
            error = failure_of(lambda: mailbox.delete(entries))
        assert error.kind is FailureKind.PROTOCOL
        assert at.commands["QUIT"] == 0


def test_5_18_an_unanswered_quit_is_no_success() -> None:
    with server({"QUIT": HangUp()}) as at, logged_in(at) as mailbox:
        mailbox.delete(mailbox.list().entries)
        assert failure_of(mailbox.quit).kind is FailureKind.TRANSIENT


def test_5_19_quit_is_a_whole_line() -> None:
    with server() as at:
        fetched(at)
        assert at.received[-1][0] == b"QUIT"


# Others, one by one.


def test_gr1_dots_that_were_not_stuffed_cost_a_dot_and_never_the_framing() -> None:
    """GreenMail left dots alone: ``.x`` comes out as ``x``, and a lone dot ends the message too early."""
    message = Send(b"+OK\r\nSubject: x\r\n\r\n.x\r\n.\r\n")
    with server({"RETR 1": message}) as at:
        assert contents(fetched(at))[0] == b"Subject: x\r\n\r\nx\r\n"
    early = Send(b"+OK\r\nSubject: x\r\n\r\nbefore\r\n.\r\nafter\r\n.\r\n")
    with server({"RETR 1": early}) as at:
        assert failure_of(lambda: fetched(at)).kind is FailureKind.PROTOCOL
        assert at.commands["QUIT"] == 0


def test_j1_and_d1_uids_that_are_all_new_are_another_listing() -> None:
    """James and Dovecot rename every message when their settings change: the digest tells."""
    renamed = [(b"new-" + uid, content) for uid, content in MESSAGES]
    digests = []
    for messages in (MESSAGES, renamed):
        with ScriptedPop3(MailboxPlay(list(messages))) as at, logged_in(at) as mailbox:
            digests.append(mailbox.list().digest)
    assert digests[0] != digests[1]


def test_cy1_a_uid_that_is_given_again_with_another_size_is_another_listing() -> None:
    again = [(MESSAGES[0][0], b"a message of another size\r\n"), *MESSAGES[1:]]
    digests = []
    for messages in (MESSAGES, again):
        with ScriptedPop3(MailboxPlay(list(messages))) as at, logged_in(at) as mailbox:
            digests.append(mailbox.list().digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize("verb", ["AUTH", "PASS"], ids=["y7 OVH, too early", "c4 Courier crashed"])
def test_a_login_that_is_cut_off_proves_nothing(verb: str) -> None:
    offered = CAPABILITIES if verb == "AUTH" else None
    with server({verb: HangUp()}, capabilities=offered) as at:
        assert failure_of(lambda: logged_in(at)).kind is FailureKind.TRANSIENT
        assert at.connections == 1


def test_g3_and_m15_a_user_name_is_passed_on_as_it_is() -> None:
    for user in ("recent:me@gmail.com", "DOMAIN/me/alias"):
        with server(user=user, capabilities=None) as at:
            logged_in(at).close()
            assert f"USER {user}".encode() in [line for line, _ in at.received]


def test_g14_pipelining_that_is_not_listed_is_not_used() -> None:
    with server(capabilities=WITHOUT_PIPELINING) as at, logged_in(at) as mailbox:
        assert not mailbox.facts.pipelining


def test_w6_pipelined_messages_that_interleave_end_the_session() -> None:
    with server({"RETR 1": Send(b"+OK\r\nSubject: one\r\n+OK\r\nSubject: two\r\n.\r\nfirst\r\n.\r\n")}) as at:
        assert failure_of(lambda: fetched(at)).kind is FailureKind.PROTOCOL
        assert at.commands["QUIT"] == 0


def test_w3_a_session_that_waits_can_show_that_it_lives() -> None:
    with server() as at, logged_in(at) as mailbox:
        mailbox.round_trip()
        assert at.commands["NOOP"] == 1


@pytest.mark.parametrize(
    "fault",
    [Send(b"-ERR unknown command\r\n"), HangUp()],
    ids=["5.26 unsupported", "y12, y15, o1 never used"],
)
def test_top_is_never_needed(fault: Fault) -> None:
    with server({"TOP": fault}) as at:
        assert contents(fetched(at)) == [content for _, content in MESSAGES]
        assert at.commands["TOP"] == 0


def test_d6_an_empty_message_may_come_as_an_empty_line() -> None:
    with server(
        {"RETR 1": Send(b"+OK\r\n\r\n.\r\n"), "LIST": Send(b"+OK\r\n1 0\r\n2 5\r\n3 6\r\n.\r\n")}
    ) as at:
        assert contents(fetched(at))[0] == b"\r\n"


def test_gm1_and_q1_a_message_may_be_larger_than_was_said() -> None:
    """GNU mailutils adds X-UIDL to what RETR gives, and counts it in no listing."""
    longer = b"X-UIDL: abc\r\nSubject: one\r\n\r\nfirst\r\n"
    with server({"RETR 1": Send(b"+OK\r\n" + longer + b".\r\n")}) as at:
        assert contents(fetched(at))[0] == longer


@pytest.mark.parametrize(
    "said", [b"-ERR busy, try later\r\n", b""], ids=["5.24 -ERR", "5.24 disconnects, m12"]
)
def test_a_server_that_does_not_greet_is_busy(said: bytes) -> None:
    with ScriptedPop3([[Send(said)]]) as at:
        assert failure_of(lambda: Mailbox.connect(at.endpoint)).kind is FailureKind.TRANSIENT


def test_5_13_no_command_can_be_smuggled_in_by_a_password() -> None:
    with server(capabilities=None) as at, Mailbox.connect(at.endpoint) as mailbox:
        assert failure_of(lambda: mailbox.login("a\r\nDELE 1")).kind is FailureKind.OPERATOR
        assert at.commands["PASS"] == at.commands["DELE"] == 0


def test_5_12_what_poplib_gets_wrong() -> None:
    """Lines that begin with one dot, 8-bit and empty lines of CAPA, messages that end in bare LF."""
    with server(
        {
            "CAPA": Send(b"+OK\r\n\xff\xfe\r\n\r\nUIDL\r\n.\r\n"),
            "RETR 1": Send(b"+OK\r\n\rone\n.\ntwo\r\n.three\r\n.\r\n"),
        }
    ) as at:
        assert contents(fetched(at))[0] == b"\rone\n.\ntwo\r\nthree\r\n"


def test_m10_and_y6_ok_to_quit_is_all_that_is_known_of_a_deletion() -> None:
    with server({"DELE": Send(b"+OK\r\n")}) as at:
        for _ in range(2):
            with logged_in(at) as mailbox:
                entries = mailbox.list().entries
                assert len(entries) == 3, "it acknowledges, and deletes nothing"
                assert mailbox.delete(entries) == list(entries)
                mailbox.quit()

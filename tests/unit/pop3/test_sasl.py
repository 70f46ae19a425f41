"""Which mechanism is tried, and what PLAIN says."""

import pytest

from archiver.pop3.failures import FailureKind, Pop3Error
from archiver.pop3.sasl import LOGIN_COMMANDS, Plain, choose_mechanism


@pytest.mark.parametrize(
    ("offered", "fixed", "ways"),
    [
        (frozenset({"PLAIN"}), None, ("PLAIN", LOGIN_COMMANDS)),
        (frozenset({"XOAUTH2", "PLAIN", "LOGIN"}), None, ("PLAIN", LOGIN_COMMANDS)),
        (frozenset(), None, (LOGIN_COMMANDS,)),
        (frozenset({"GSSAPI"}), None, (LOGIN_COMMANDS,)),
        (frozenset({"PLAIN"}), "+LOGIN", (LOGIN_COMMANDS,)),
        (frozenset({"PLAIN"}), "PLAIN", ("PLAIN",)),
        (frozenset(), "PLAIN", ("PLAIN",)),  # servers under-report
    ],
)
def test_the_choice_is_ours(offered: frozenset[str], fixed: str | None, ways: tuple[str, ...]) -> None:
    assert choose_mechanism(offered, fixed, private=True) == ways


def test_a_name_that_the_login_commands_cannot_carry_is_not_sent_by_them() -> None:
    assert choose_mechanism(frozenset({"PLAIN"}), None, private=True, user_is_ascii=False) == ("PLAIN",)


@pytest.mark.parametrize("fixed", [None, "PLAIN", "+LOGIN"])
def test_nothing_reveals_a_password_on_a_channel_that_is_not_private(fixed: str | None) -> None:
    with pytest.raises(Pop3Error) as caught:
        choose_mechanism(frozenset({"PLAIN"}), fixed, private=False)
    assert caught.value.kind is FailureKind.SECURITY


def test_a_mechanism_that_the_url_fixes_is_never_replaced() -> None:
    with pytest.raises(Pop3Error, match="SCRAM-SHA-256") as caught:
        choose_mechanism(frozenset({"PLAIN"}), "SCRAM-SHA-256", private=True)
    assert caught.value.kind is FailureKind.OPERATOR


def test_plain_says_user_and_password_at_once() -> None:
    """RFC 4616 section 2."""
    mechanism = Plain("J\u00fcrgen", "gar\u00e7on")
    assert not mechanism.complete
    assert mechanism.start() == b"\0J\xc3\xbcrgen\0gar\xc3\xa7on"
    assert mechanism.complete


def test_plain_has_no_answer_to_a_challenge() -> None:
    with pytest.raises(Pop3Error) as caught:
        Plain("user", "secret").respond(b"more?")
    assert caught.value.kind is FailureKind.PROTOCOL


def test_a_mechanism_does_not_show_its_password() -> None:
    assert "hunter2" not in repr(Plain("user", "hunter2"))

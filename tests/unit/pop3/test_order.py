"""What may follow what in a session. Nothing out of order reaches the server."""

import io
from collections.abc import Callable

import pytest

from archiver.pop3 import FailureKind, Mailbox, Pop3Error
from archiver.pop3.order import Order, Verb
from tests.harness.scripted_pop3 import MailboxPlay, ScriptedPop3

VERBS: dict[Verb, Callable[[Mailbox], object]] = {
    Verb.GLANCE: lambda mailbox: mailbox.glance(),
    Verb.LIST_FROM: lambda mailbox: mailbox.list_from(1, 1),
    Verb.LIST: lambda mailbox: mailbox.list(),
    Verb.RETRIEVE: lambda mailbox: list(mailbox.retrieve([], lambda _: io.BytesIO())),
    Verb.DELETE: lambda mailbox: mailbox.delete([]),
    Verb.ROUND_TRIP: lambda mailbox: mailbox.round_trip(),
}


def server() -> ScriptedPop3:
    return ScriptedPop3(MailboxPlay([(b"uid", b"message\r\n")]))


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_but_login_and_quit_comes_before_the_login(verb: Verb) -> None:
    with server() as at, Mailbox.connect(at.endpoint) as mailbox:
        with pytest.raises(RuntimeError, match=f"{verb.value} is out of order: the session is not logged in"):
            VERBS[verb](mailbox)
        assert [line for line, _ in at.received] == [b"CAPA"]
        mailbox.login("secret")
        mailbox.quit()


@pytest.mark.parametrize("verb", [Verb.LIST, Verb.LIST_FROM])
def test_after_a_delete_there_is_no_listing(verb: Verb) -> None:
    """Some servers renumber their listings then: the wrong messages would be deleted."""
    with server() as at, Mailbox.connect(at.endpoint) as mailbox:
        mailbox.login("secret")
        mailbox.delete([])
        with pytest.raises(RuntimeError, match=f"{verb.value} is out of order"):
            VERBS[verb](mailbox)


@pytest.mark.parametrize("verb", [*VERBS, Verb.LOGIN, Verb.QUIT])
def test_nothing_comes_after_the_end(verb: Verb) -> None:
    order = Order()
    order.close()
    with pytest.raises(RuntimeError, match="closed"):
        order.advance(verb)


@pytest.mark.parametrize("verb", [*VERBS, Verb.LOGIN, Verb.QUIT])
def test_after_a_failure_every_verb_raises_it_again(verb: Verb) -> None:
    order = Order()
    failure = Pop3Error(FailureKind.TRANSIENT, "the line broke")
    order.close(failure)
    order.close()
    with pytest.raises(Pop3Error) as caught:
        order.advance(verb)
    assert caught.value is failure


def test_a_refused_login_may_be_tried_again() -> None:
    mail = MailboxPlay([], password="right")
    with ScriptedPop3(mail) as at, Mailbox.connect(at.endpoint) as mailbox:
        with pytest.raises(Pop3Error):
            mailbox.login("wrong")
        mailbox.login("right")
        mailbox.quit()

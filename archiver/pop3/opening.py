"""How a POP3 connection is opened: TLS, the greeting, CAPA, UTF8 (RFC 1939, RFC 2449, RFC 2595, RFC 6856).

Promises that the channel is private, where the endpoint wants that, before
anything but STLS is sent. A server that stalls or hangs up at CAPA or UTF8 is
called again without it.
"""

from archiver.pop3.conversation import Terms
from archiver.pop3.failures import FailureKind, Pop3Error, Stage
from archiver.pop3.replies import Pop3Conversation, Quirks
from archiver.pop3.url import Tls
from archiver.pop3.wire import Command, Shape, command

_GREETING = Command(b"", "the greeting", Shape.GREETING)
_OPTIONAL = frozenset({"CAPA", "UTF8"})


def open_conversation(terms: Terms, quirks: Quirks) -> Pop3Conversation:
    """Connect, and come as far as the login. Raises Pop3Error.

    Adds to ``quirks`` what the server tripped over on the way.
    """
    while True:
        talk = Pop3Conversation(terms, quirks)
        try:
            _open(talk)
        except Pop3Error:
            talk.close()
            tripped = quirks.suspect & _OPTIONAL - quirks.avoid
            if not tripped:
                raise
            quirks.avoid |= tripped
        except BaseException:
            talk.close()
            raise
        else:
            return talk


def _open(talk: Pop3Conversation) -> None:
    if talk.terms.endpoint.tls is Tls.IMPLICIT:
        talk.start_tls()
    talk.expect(_GREETING)
    greeting = talk.reply(talk.step("greeting_seconds"))
    talk.greeting = greeting.text
    if not greeting.ok:
        raise talk.refused_at(Stage.GREETING, _GREETING.label, greeting)
    if talk.terms.endpoint.tls is Tls.STARTTLS:
        _upgrade(talk)
    talk.ask_capa()
    if talk.lists("UTF8") and not talk.quirks.avoids("UTF8"):
        _switch_to_utf8(talk)


def _upgrade(talk: Pop3Conversation) -> None:
    """STLS (RFC 2595 section 4). CAPA is not asked in clear text: its answer would have to be forgotten."""
    asked = command("STLS")
    talk.send(asked)
    reply = talk.reply()
    if not reply.ok:
        raise talk.error(
            FailureKind.SECURITY,
            asked.label,
            f"the server refuses TLS, and no password was sent: {talk.show(reply.text)!r}",
        )
    if talk.receiver.surplus:
        raise talk.error(
            FailureKind.SECURITY,
            asked.label,
            "data in clear text followed the +OK: an attacker may have injected it",
        )
    talk.start_tls()


def _switch_to_utf8(talk: Pop3Conversation) -> None:
    """Ask for messages as they are (RFC 6856 section 2.1): a server may otherwise convert what is not ASCII.

    After STLS and before the login, and only if CAPA lists UTF8: some servers
    hang up at a verb that they do not know. If the server refuses, the session
    goes on in ASCII. LANG is not needed: until it is sent, a server that has it
    speaks i-default (section 3), which ``failures`` can read.
    """
    talk.send(command("UTF8"))
    talk.is_utf8 = talk.reply().ok

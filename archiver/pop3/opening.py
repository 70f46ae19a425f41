"""How a POP3 connection is opened: TLS, the greeting, CAPA, UTF8 (RFC 1939, RFC 2449, RFC 2595, RFC 6856).

Promises that nothing but STLS is sent before the channel is private, if the
endpoint demands that. If a server stalls or disconnects at CAPA or UTF8, it
connects again and leaves that command out.
"""

from archiver.pop3.conversation import Terms
from archiver.pop3.failures import FailureKind, Pop3Error, Stage
from archiver.pop3.replies import Pop3Conversation, Quirks
from archiver.pop3.url import Tls
from archiver.pop3.wire import Command, Shape, command

_GREETING = Command(b"", "the greeting", Shape.GREETING)
_OPTIONAL = frozenset({"CAPA", "UTF8"})


def open_conversation(terms: Terms, quirks: Quirks) -> Pop3Conversation:
    """Connect, and go as far as the login. Raises Pop3Error.

    Adds to ``quirks`` what the server tripped over on the way.
    """
    while True:
        talk = Pop3Conversation(terms, quirks)
        try:
            _open(talk)
        except Pop3Error as error:
            talk.close()
            if talk.is_distrusted:
                raise _with_certificate(error, terms, quirks) from error
            tripped = quirks.suspect & (_OPTIONAL - quirks.avoid)
            if not tripped:
                raise
            quirks.avoid |= tripped
        except BaseException:
            talk.close()
            raise
        else:
            return talk


def _open(talk: Pop3Conversation) -> None:
    tls = talk.terms.endpoint.tls
    if tls is Tls.IMPLICIT:
        talk.start_tls(if_plain="; for STARTTLS write pop3://")
    _greet(talk)
    if tls is Tls.STARTTLS:
        _upgrade(talk)
        talk.start_tls()
    talk.ask_capa()
    if talk.lists("UTF8") and not talk.quirks.avoids("UTF8"):
        _switch_to_utf8(talk)


def _greet(talk: Pop3Conversation) -> None:
    talk.expect(_GREETING)
    try:
        greeting = talk.reply(talk.step("greeting_seconds"))
    except Pop3Error as error:
        is_silent = error.limit == "greeting_seconds" and not talk.receiver.in_reply
        if not is_silent or talk.is_encrypted:
            raise
        reason = f"{error}; a port that speaks TLS from the start is silent like this: use pop3s://"
        raise Pop3Error(error.kind, reason, limit=error.limit) from error
    talk.greeting = greeting.text
    if not greeting.ok:
        raise talk.refused_at(Stage.GREETING, _GREETING.label, greeting)


def _upgrade(talk: Pop3Conversation) -> None:
    """STLS (RFC 2595 section 4). CAPA is not asked in clear text: its answer would have to be dropped."""
    asked = command("STLS")
    talk.send(asked)
    reply = talk.reply()
    if not reply.ok:
        said = f" and said {talk.show(reply.text)!r}" if reply.text else ""
        raise talk.error(
            FailureKind.SECURITY, asked.label, f"the server refused TLS{said}; the password was not sent"
        )
    if talk.receiver.surplus:
        raise talk.error(
            FailureKind.SECURITY,
            asked.label,
            "data in clear text followed the +OK: an attacker may have injected it",
        )


def _with_certificate(error: Pop3Error, terms: Terms, quirks: Quirks) -> Pop3Error:
    """The error, with the certificate that did not pass verification, so that it can be compared and pinned.

    OpenSSL does not keep it after a failure. So this looks at it in a connection
    of its own, in which nothing is sent but STLS.
    """
    try:
        talk = Pop3Conversation(terms, quirks)
        try:
            if terms.endpoint.tls is Tls.STARTTLS:
                _greet(talk)
                _upgrade(talk)
            shown = talk.look_at_certificate()
        finally:
            talk.close()
    except Pop3Error:
        return error
    return Pop3Error(error.kind, f"{error} ({shown.text})", certificate_sha256=shown.sha256)


def _switch_to_utf8(talk: Pop3Conversation) -> None:
    """Ask for messages as they are (RFC 6856 section 2.1): a server may otherwise convert what is not ASCII.

    After STLS and before the login, and only if CAPA lists UTF8: some servers
    disconnect at a verb that they do not know. If the server refuses, the session
    goes on in ASCII. LANG is not needed: until it is sent, a server that has it
    speaks i-default (section 3), which ``failures`` can read.
    """
    talk.send(command("UTF8"))
    talk.is_utf8 = talk.reply().ok

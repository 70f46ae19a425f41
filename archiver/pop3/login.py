"""Logging in to a POP3 server: USER and PASS, APOP, and AUTH (RFC 1939, RFC 5034).

Owns the order in which ways to log in are tried, and the AUTH exchange. Promises
that a secret is sent only where ``sasl.choose_mechanism`` allows it, and that
neither the password nor anything made of it is in an error. Leaves to ``sasl``
what a mechanism says.
"""

import base64
import binascii
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from archiver.pop3.conversation import Wait
from archiver.pop3.failures import FailureKind, Pop3Error, Stage, says_unknown_command
from archiver.pop3.replies import Pop3Conversation
from archiver.pop3.sasl import (
    APOP,
    LOGIN_COMMANDS,
    MECHANISMS,
    SCRAM_MECHANISMS,
    Credentials,
    Mechanism,
    RefusedInside,
    apop_digest,
    apop_stamp,
    binding_for,
    choose_mechanism,
    is_prepared,
)
from archiver.pop3.url import Tls
from archiver.pop3.wire import COMMAND_LINE_BYTES, Command, Reply, Shape, Status, command

_CHALLENGES: Final = 8  # in one login; SCRAM needs two


def log_in(talk: Pop3Conversation, password: str, call_again: Callable[[], Pop3Conversation]) -> str:
    """Log in by the first way that works, and return its name. Raises Pop3Error.

    A later way is tried only if the server refused the earlier one without
    looking at the password. ``call_again`` connects again, to a server that
    disconnects between two ways (free.fr, popa3d), once for each refusal.
    """
    with talk.named("login"):
        talk.terms.secrets.add(*_secrets(talk.terms.endpoint.user, password))
        ways = deque(_ways(talk, password))
    wait = talk.step("login_seconds")
    was_refused = False
    while True:
        way = ways.popleft()
        try:
            refusal = _Attempt(talk, password, wait).by(way)
        except Pop3Error as error:
            if not was_refused or error.kind is not FailureKind.TRANSIENT or error.limit is not None:
                raise
            was_refused = False
            ways.appendleft(way)
            talk = call_again()
            continue
        if refusal is None:
            return way
        was_refused = True
        if way in SCRAM_MECHANISMS and refusal.lacks_scram_keys(talk):
            ways = deque(each for each in ways if each not in SCRAM_MECHANISMS)
        elif not refusal.is_unknown:
            ways.clear()
        if not ways:
            raise talk.refused_at(
                Stage.LOGIN, refusal.label, refusal.reply, proof=refusal.proof, hint=refusal.hint
            )


def _ways(talk: Pop3Conversation, password: str) -> tuple[str, ...]:
    """The ways to log in that server, channel, endpoint and password allow, best first."""
    endpoint = talk.terms.endpoint
    user, fixed = endpoint.user, endpoint.mechanism
    offered = _offered(talk)
    if talk.quirks.avoids("AUTH") and talk.may_skip_sasl:
        offered = frozenset()
    scram = offered.intersection(SCRAM_MECHANISMS)
    if scram and fixed is None and not is_prepared(Credentials(user, password)):
        offered -= scram
    return choose_mechanism(
        offered,
        fixed,
        private=talk.is_encrypted or endpoint.tls is Tls.NONE,
        binds=(bool(scram) or fixed in SCRAM_MECHANISMS) and talk.channel_binding is not None,
    )


def _offered(talk: Pop3Conversation) -> frozenset[str]:
    known = talk.capabilities
    return known.sasl_mechanisms if known else frozenset()


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A way to log in that the server refused."""

    label: str
    """The command that was refused."""
    reply: Reply
    proof: str = "password"
    """What the client proved its identity with."""
    hint: str = ""
    was_challenged: bool = False
    """Whether the server sent a challenge before it refused, so that it knows the mechanism."""

    @property
    def is_unknown(self) -> bool:
        """Whether the server refused the command and not the credentials."""
        return not self.was_challenged and says_unknown_command(self.reply.text)

    def lacks_scram_keys(self, talk: Pop3Conversation) -> bool:
        """Whether the server refused SCRAM before its first challenge: it did not look at the password.

        Some servers (Dovecot) offer SCRAM to all users, also to those for whom
        they store the password in a form that SCRAM cannot be checked against.
        """
        return not self.was_challenged and talk.meaning(self.reply, Stage.LOGIN).kind is FailureKind.AUTH


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One try to log in, by one way. Each method returns None when it worked."""

    talk: Pop3Conversation
    password: str = field(repr=False)
    wait: Wait

    def by(self, way: str) -> _Refusal | None:
        """Try this way."""
        if way == LOGIN_COMMANDS:
            return self._by_user_and_pass()
        if way == APOP:
            return self._by_apop()
        return self._by_sasl(way)

    def _by_user_and_pass(self) -> _Refusal | None:
        # Beyond ASCII in UTF-8, as other clients send it, also where the server does not offer UTF8 USER.
        with self.talk.named("login"):
            steps = (
                command("USER", self.talk.terms.endpoint.user, label="USER", utf8=True),
                command("PASS", self.password, label="PASS", utf8=True),
            )
        for step in steps:
            self.talk.send(step)
            reply = self.talk.reply(self.wait)
            if not reply.ok:
                return _Refusal(step.label, reply)
        return None

    def _by_apop(self) -> _Refusal | None:
        with self.talk.named(APOP):
            stamp = apop_stamp(self.talk.greeting)
            if stamp is None:
                raise Pop3Error(
                    FailureKind.OPERATOR,
                    "the password was not sent: the greeting has no timestamp that is safe to use",
                )
            digest = apop_digest(stamp, self.password)
            self.talk.terms.secrets.add(digest.encode())
            step = command(APOP, self.talk.terms.endpoint.user, digest, label=APOP, utf8=True)
        self.talk.send(step)
        reply = self.talk.reply(self.wait)
        return None if reply.ok else _Refusal(APOP, reply)

    def _by_sasl(self, way: str) -> _Refusal | None:
        endpoint = self.talk.terms.endpoint
        binding = self.talk.channel_binding if way in SCRAM_MECHANISMS else None
        credentials = Credentials(
            endpoint.user,
            self.password,
            endpoint.host,
            endpoint.port,
            binding_for(way, _offered(self.talk), binding),
        )
        refusal = None
        # Servers older than RFC 5034 know AUTH only without an initial response.
        for at_once in (True, False):
            with self.talk.named("login"):
                mechanism = MECHANISMS[way](credentials)
                initial = mechanism.start()
            refusal = self._authenticate(mechanism, initial, at_once=at_once)
            if refusal is None or not refusal.is_unknown or initial is None:
                break
        return refusal

    def _authenticate(self, mechanism: Mechanism, initial: bytes | None, *, at_once: bool) -> _Refusal | None:
        """The AUTH exchange (RFC 5034 section 4), to its +OK or -ERR."""
        label = f"AUTH {mechanism.name}"
        opening = label.encode()
        if at_once and initial is not None:
            whole = opening + b" " + (self._encoded(initial) or b"=")
            if len(whole) + 2 <= COMMAND_LINE_BYTES:
                opening, initial = whole, None
        self._say(opening, label)
        was_challenged = False
        for _ in range(_CHALLENGES):
            reply = self.talk.reply(self.wait)
            if reply.ok:
                with self.talk.named(label):
                    mechanism.conclude(reply.text)
                return None
            if reply.status is not Status.CHALLENGE:
                return _Refusal(label, reply, mechanism.proof, mechanism.hint, was_challenged)
            if initial is None:
                was_challenged = True
                answer = self._answer(mechanism, reply)
            else:
                answer, initial = initial, None
            self._say(self._encoded(answer), label)
        raise self.talk.error(
            FailureKind.PROTOCOL, label, f"the server sent more than {_CHALLENGES} challenges"
        )

    def _answer(self, mechanism: Mechanism, challenge: Reply) -> bytes:
        """The answer to a challenge. A bad challenge cancels the exchange, which keeps the framing intact."""
        label = f"AUTH {mechanism.name}"
        cancel = b"*"
        try:
            return mechanism.respond(base64.b64decode(challenge.text, validate=True))
        except RefusedInside as refusal:
            error: Pop3Error = refusal
            cancel = base64.b64encode(refusal.farewell)
        except Pop3Error as refusal:
            error = refusal
        except binascii.Error:
            error = Pop3Error(FailureKind.PROTOCOL, "the server's challenge is not base64")
        self._say(cancel, label)
        said = self.talk.reply(self.wait).text
        reasons = [str(error), f"the server said {self.talk.show(said)!r}" if said else "", mechanism.hint]
        raise self.talk.error(error.kind, label, "; ".join(filter(None, reasons)))

    def _say(self, line: bytes, label: str) -> None:
        self.talk.send(Command(line + b"\r\n", label, Shape.EXCHANGE))

    def _encoded(self, message: bytes) -> bytes:
        """A message of a mechanism as it goes over the wire; from now on it is a secret, in both forms."""
        encoded = base64.b64encode(message)
        if message not in {b"", self.talk.terms.endpoint.user.encode()}:
            self.talk.terms.secrets.add(encoded, message)
        return encoded


def _secrets(user: str, password: str) -> tuple[bytes, ...]:
    """What must never be quoted from a server that repeats what it was sent, the longest first.

    Raises Pop3Error of kind OPERATOR for what no login can carry.
    """
    if any(octet in text for octet in "\r\n\0" for text in (user, password)):
        raise Pop3Error(
            FailureKind.OPERATOR,
            "the password was not sent: the user name or the password contains CR, LF or NUL",
        )
    try:
        secret = password.encode()
        message = b"\0" + user.encode() + b"\0" + secret
    except UnicodeEncodeError:
        raise Pop3Error(
            FailureKind.OPERATOR,
            "the password was not sent: the user name or the password is not Unicode text",
        ) from None
    return tuple(each for each in (base64.b64encode(message), base64.b64encode(secret), secret) if each)

"""How a client proves its identity: SASL mechanisms (RFC 5034), APOP (RFC 1939), and the choice among them.

Owns what a mechanism says, what it accepts as an answer, and which one is
tried. Promises:

- our policy decides the choice, and never the server's order;
- no mechanism that reveals a password is chosen for a channel that is not private;
- a server that lies in a SCRAM exchange is refused, and cannot make us compute for long;
- no secret appears in a ``repr`` or an error.

Leaves the AUTH exchange itself (base64, two-step form, cancelling) to ``login``.

A SCRAM login derives its keys each time and caches none. At the usual 4096
iterations that takes 1 ms of CPU (SHA-512: 2 ms), outside of Python's lock. A
server that stores the password in clear text (Dovecot) makes a new salt for each
login, so a cache would never hit. Elsewhere a cached key would be worth as much
as the password.
"""

import base64
import binascii
import hashlib
import hmac
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from archiver.pop3.failures import FailureKind, Pop3Error
from archiver.pop3.loop import aside

if TYPE_CHECKING:
    from scramp import ScramClient

LOGIN_COMMANDS: Final = "USER/PASS"
"""The commands of RFC 1939, not a SASL mechanism. A URL fixes them by ``;AUTH=+LOGIN``."""
APOP: Final = "APOP"
"""The command of RFC 1939 section 7, not a SASL mechanism. A URL fixes it by ``;AUTH=+APOP``."""

MOST_ITERATIONS: Final = 1_000_000
"""The most of PBKDF2 that a server may demand: half a second of CPU. Servers demand 4096 to some 600 000."""
LONG_TOKEN_BYTES: Final = 4096
"""Microsoft refuses longer access tokens with a protocol error, for some users (MailKit#1948)."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a mechanism may use."""

    user: str
    secret: str = field(repr=False)
    """The password, or the access token for OAuth."""
    host: str = ""
    port: int = 0
    binding: bytes | None = field(default=None, repr=False)
    """The ``tls-server-end-point`` of the channel (RFC 5929 section 4); see ``binding_for``."""


class RefusedInside(Pop3Error):
    """The server refused in a challenge. After the raw answer ``farewell`` it sends its -ERR."""

    def __init__(self, kind: FailureKind, message: str, farewell: bytes) -> None:
        super().__init__(kind, message)
        self.farewell = farewell


class Mechanism(ABC):
    """The client's side of one SASL exchange. Messages are raw, not base64."""

    name: str
    """The registered name, in upper case."""
    proof = "password"
    """What it proves the client's identity with, for people."""
    complete = False
    """Whether the client has said and verified everything."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    @property
    def hint(self) -> str:
        """A likely reason for a refusal, for the operator, or an empty text."""
        return ""

    @abstractmethod
    def start(self) -> bytes | None:
        """The client's first message, or None if the server speaks first."""

    def respond(self, _challenge: bytes, /) -> bytes:
        """The answer to a challenge. Raises Pop3Error if the mechanism does not allow the challenge."""
        raise Pop3Error(
            FailureKind.PROTOCOL, f"the server sent a challenge that SASL {self.name} does not have"
        )

    def conclude(self, _text: bytes, /) -> None:
        """Take the server's +OK, with its text. Raises Pop3Error (SECURITY) if it comes too early."""
        if not self.complete:
            raise Pop3Error(FailureKind.SECURITY, "the server ended the exchange before it proved itself")


class Plain(Mechanism):
    """PLAIN (RFC 4616): one message with user and password, in UTF-8."""

    name = "PLAIN"

    def start(self) -> bytes:
        user, password = self._credentials.user, self._credentials.secret
        if "\0" in user or "\0" in password:
            raise Pop3Error(
                FailureKind.OPERATOR,
                "the user name or the password contains NUL, which SASL PLAIN cannot carry",
            )
        self.complete = True
        return b"\0" + user.encode() + b"\0" + password.encode()


class Login(Mechanism):
    """LOGIN (draft-murchison-sasl-login): the name, then the password, each after a prompt of any wording."""

    name = "LOGIN"
    _named = False

    def start(self) -> None:
        return None

    def respond(self, challenge: bytes, /) -> bytes:
        if self.complete:
            return super().respond(challenge)
        if self._named:
            self.complete = True
            return self._credentials.secret.encode()
        self._named = True
        return self._credentials.user.encode()


class CramMd5(Mechanism):
    """CRAM-MD5 (RFC 2195): weak, and the server stores the password. Used only if the URL fixes it."""

    name = "CRAM-MD5"

    def start(self) -> None:
        return None

    def respond(self, challenge: bytes, /) -> bytes:
        if self.complete:
            return super().respond(challenge)
        if not _CRAM_CHALLENGE.fullmatch(challenge):
            raise Pop3Error(FailureKind.PROTOCOL, "the server's challenge does not have the form of CRAM-MD5")
        self.complete = True
        digest = hmac.new(self._credentials.secret.encode(), challenge, _MD5).hexdigest()
        return f"{self._credentials.user} {digest}".encode()


# RFC 1939 and RFC 2195 demand MD5. With this mark it is available in FIPS mode too.
_MD5: Final = partial(hashlib.md5, usedforsecurity=False)
_CRAM_CHALLENGE: Final = re.compile(rb"<[!-;=?-~]+>")


class Scram(Mechanism):
    """SCRAM (RFC 5802, RFC 7677), with and without channel binding. ``nonce`` is for tests only."""

    def __init__(self, name: str, credentials: Credentials, *, nonce: str | None = None) -> None:
        """Raises Pop3Error (OPERATOR) if SASLprep (RFC 4013) forbids the user name or the password."""
        super().__init__(credentials)
        self.name = name
        self._answered = False
        self._client = _scram_client(name, credentials, nonce)
        self._first: str = self._client.get_client_first()

    @property
    def hint(self) -> str:
        return _BINDING_HINT if self.name.endswith(_PLUS) else ""

    def start(self) -> bytes:
        return self._first.encode()

    def respond(self, challenge: bytes, /) -> bytes:
        from scramp import ScramException

        if self.complete:
            return super().respond(challenge)
        if challenge[:2] == b"e=":
            raise _scram_refusal(challenge[2:])
        try:
            if self._answered:
                self._client.set_server_final(challenge.decode())
                self.complete = True
                return b""
            self._client.set_server_first(challenge.decode())
        except (ScramException, UnicodeDecodeError) as error:
            # The exception is not chained: it contains secrets.
            raise _scram_lie(challenge, error) from None
        iterations = int(self._client.iterations)
        if iterations > MOST_ITERATIONS:
            raise Pop3Error(
                FailureKind.SECURITY,
                f"the server demands {iterations} iterations of PBKDF2, more than {MOST_ITERATIONS}",
            )
        self._answered = True
        # The server decides how long this takes.
        answer: str = aside(self._client.get_client_final)
        return answer.encode()

    def conclude(self, text: bytes, /) -> None:
        """Take a server's proof from the +OK too: RFC 5034 has no place for it. It is plain or in base64."""
        if self._answered and not self.complete:
            with suppress(binascii.Error):
                self.respond(text if text.startswith(b"v=") else base64.b64decode(text, validate=True))
        super().conclude(text)


_PLUS: Final = "-PLUS"
_BINDING_HINT: Final = (
    "channel binding fails behind a proxy that ends TLS: fix a mechanism without -PLUS by ;AUTH= in the URL"
)


def _scram_client(name: str, credentials: Credentials, nonce: str | None) -> "ScramClient":
    # The import is slow, and only servers that offer SCRAM need it.
    from scramp import ScramClient, ScramException

    binding = None if credentials.binding is None else ("tls-server-end-point", credentials.binding)
    try:
        return ScramClient(
            [name], credentials.user, credentials.secret, channel_binding=binding, c_nonce=nonce
        )
    except ScramException:
        raise Pop3Error(
            FailureKind.OPERATOR,
            "the user name or the password contains characters that SCRAM forbids (SASLprep, RFC 4013)",
        ) from None


_SCRAM_REFUSALS: Final = {
    b"channel-bindings-dont-match": FailureKind.SECURITY,
    b"server-does-support-channel-binding": FailureKind.SECURITY,
    b"channel-binding-not-supported": FailureKind.OPERATOR,
    b"unsupported-channel-binding-type": FailureKind.OPERATOR,
    b"extensions-not-supported": FailureKind.OPERATOR,
    b"no-resources": FailureKind.TRANSIENT,
}
"""RFC 5802 section 7. Any other reason, other-error included, may mean wrong credentials."""


def _scram_refusal(reason: bytes) -> Pop3Error:
    kind = _SCRAM_REFUSALS.get(reason.split(b",")[0], FailureKind.AUTH)
    return Pop3Error(kind, f"the server refused within the SCRAM exchange{_word(reason.decode('latin-1'))}")


def _word(reason: str) -> str:
    """A reason for people, if it looks like those of the RFCs. Any other text may repeat a secret."""
    return f" ({reason})" if re.fullmatch(r"[1-5]\d\d|[a-z]{2,12}([_-][a-z]{2,12}){1,5}", reason) else ""


def _scram_lie(challenge: bytes, error: Exception) -> Pop3Error:
    if re.match(rb"(.*,)?m=", challenge, re.DOTALL):  # RFC 5802 section 5.1: the client must end it
        return Pop3Error(FailureKind.OPERATOR, "the server demands an unknown extension of SCRAM")
    reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
    return Pop3Error(
        FailureKind.SECURITY, f"the server's SCRAM message is wrong, as an impostor's would be: {reason}"
    )


class _Token(Mechanism):
    """The common part of the two mechanisms for OAuth."""

    proof = "access token"
    _farewell: bytes

    @property
    def hint(self) -> str:
        octets = len(self._credentials.secret)
        if octets <= LONG_TOKEN_BYTES:
            return ""
        return f"the access token has {octets} bytes, and some servers accept at most {LONG_TOKEN_BYTES}"

    def respond(self, challenge: bytes, /) -> bytes:
        raise _token_refused(challenge, self._farewell)

    @property
    def _bearer(self) -> str:
        """The token, as both mechanisms send it. Raises Pop3Error (OPERATOR) if it cannot be a token."""
        if "\1" in self._credentials.user or not _TOKEN.fullmatch(self._credentials.secret):
            raise Pop3Error(
                FailureKind.OPERATOR,
                "nothing was sent: the access token is not printable ASCII without spaces",
            )
        return f"\1auth=Bearer {self._credentials.secret}\1\1"


class Xoauth2(_Token):
    """XOAUTH2, of Google and Microsoft: an access token, always in two steps.

    https://developers.google.com/workspace/gmail/imap/xoauth2-protocol;
    Microsoft accepts no initial response on POP3, and closes the connection after one.
    """

    name = "XOAUTH2"
    _farewell = b""

    def start(self) -> None:
        return None

    def respond(self, challenge: bytes, /) -> bytes:
        if self.complete:
            return super().respond(challenge)
        self.complete = True
        return f"user={self._credentials.user}{self._bearer}".encode()


class OauthBearer(_Token):
    """OAUTHBEARER (RFC 7628): an access token, in one message."""

    name = "OAUTHBEARER"
    _farewell = b"\1"  # section 3.2.3

    def start(self) -> bytes:
        who = self._credentials
        user = who.user.replace("=", "=3D").replace(",", "=2C")  # saslname, RFC 5801 section 4
        self.complete = True
        return f"n,a={user},\1host={who.host}\1port={who.port}{self._bearer}".encode()


_TOKEN: Final = re.compile(r"[!-~]+")


def _token_refused(challenge: bytes, farewell: bytes) -> RefusedInside:
    """The JSON that a server sends before its -ERR, as an error (RFC 7628 section 3.2.2, Google's page)."""
    try:
        told = json.loads(challenge)
    except (ValueError, RecursionError):
        told = None
    status = str(told.get("status", "")) if isinstance(told, dict) else ""
    if status in {"403", "insufficient_scope"}:
        kind = FailureKind.OPERATOR
    elif re.fullmatch(r"5\d\d", status):
        kind = FailureKind.TRANSIENT
    else:
        kind = FailureKind.AUTH
    return RefusedInside(kind, f"the server refused the access token{_word(status)}", farewell)


class External(Mechanism):
    """EXTERNAL (RFC 4422 appendix A): the client's certificate proves its identity.

    The user is named: without a name, the server could choose another mailbox
    than the URL's.
    """

    name = "EXTERNAL"
    proof = "client certificate"

    @property
    def hint(self) -> str:
        return "EXTERNAL needs a client certificate that the server accepts for this user"

    def start(self) -> bytes:
        self.complete = True
        return self._credentials.user.encode()


class Gssapi(Mechanism):
    """GSSAPI (RFC 4752), which is Kerberos: a ticket proves the client's identity. The user is named.

    The process has the ticket: ``KRB5CCNAME`` names its cache, or
    ``KRB5_CLIENT_KTNAME`` a keytab with which the library fetches a ticket. TLS is
    the security layer, so GSSAPI adds none.
    """

    name = "GSSAPI"
    proof = "Kerberos ticket"

    def __init__(self, credentials: Credentials) -> None:
        """Raises Pop3Error (OPERATOR) if the library is missing."""
        super().__init__(credentials)
        self._context = aside(partial(_kerberos_context, credentials.host))

    @property
    def hint(self) -> str:
        return "GSSAPI needs a Kerberos ticket that the server accepts for this user"

    def start(self) -> bytes:
        return self._step(None)

    def respond(self, challenge: bytes, /) -> bytes:
        if self.complete:
            return super().respond(challenge)
        if not self._context.complete:
            return self._step(challenge)
        return self._agree(challenge)

    def _step(self, token: bytes | None) -> bytes:
        from gssapi.exceptions import GSSError

        try:
            # This may ask a resolver and a key distribution centre.
            answer: bytes | None = aside(partial(self._context.step, token))
        except GSSError as error:
            raise _kerberos_failure(error, spoke=token is not None) from None
        return answer or b""

    def _agree(self, challenge: bytes) -> bytes:
        """The last step (section 3.1): decline the security layers that are offered, and name the user."""
        from gssapi.exceptions import GSSError

        try:
            offer = self._context.unwrap(challenge).message
            if len(offer) != _LAYER_OFFER_BYTES or not offer[0] & _NO_LAYER:
                raise Pop3Error(
                    FailureKind.OPERATOR,
                    "the server demands a security layer of GSSAPI, which is not supported beside TLS",
                )
            answer = bytes([_NO_LAYER, 0, 0, 0]) + self._credentials.user.encode()
            wrapped: bytes = self._context.wrap(answer, False).message
        except GSSError as error:
            raise _kerberos_failure(error, spoke=True) from None
        self.complete = True
        return wrapped


_NO_LAYER: Final = 1
_LAYER_OFFER_BYTES: Final = 4
_PASSING_KERBEROS: Final = frozenset({-1765328228 & 0xFFFFFFFF, -1765328230 & 0xFFFFFFFF})
"""MIT krb5's codes for a key distribution centre that does not answer, or cannot be found now."""


def _kerberos_context(host: str) -> Any:
    try:
        import gssapi
    except (ImportError, OSError):
        raise Pop3Error(
            FailureKind.OPERATOR, "the library for GSSAPI is not installed: pip install 'archiver[gssapi]'"
        ) from None
    # RFC 5034 section 4: the service's name in POP3 is pop.
    service = gssapi.Name(f"pop@{host}", gssapi.NameType.hostbased_service)
    flags = (gssapi.RequirementFlag.mutual_authentication, gssapi.RequirementFlag.integrity)
    return gssapi.SecurityContext(name=service, mech=gssapi.MechType.kerberos, flags=flags, usage="initiate")


def _kerberos_failure(error: Any, *, spoke: bool) -> Pop3Error:
    """An error of the library: about our ticket at first, later about the server's proof."""
    reason = " ".join(str(error).split())
    if spoke:
        return Pop3Error(FailureKind.SECURITY, f"the server did not prove its identity by Kerberos: {reason}")
    passing = (error.min_code & 0xFFFFFFFF) in _PASSING_KERBEROS
    kind = FailureKind.TRANSIENT if passing else FailureKind.OPERATOR
    return Pop3Error(kind, f"there is no Kerberos ticket for the server: {reason}")


# APOP.

_STAMP: Final = re.compile(rb"<[0-9A-Za-z!#$%&'*+/=?^_`{|}~.-]+@[0-9A-Za-z._:\[\]-]+>")


def apop_stamp(greeting: bytes) -> bytes | None:
    """The timestamp in a greeting, if it is one message-id of plain ASCII; None otherwise.

    With other timestamps an impostor could learn the first characters of the
    password by collisions of MD5 (CVE-2007-1558).
    """
    found = _STAMP.findall(greeting)
    well_formed = len(found) == 1 and greeting.count(b"<") == greeting.count(b">") == 1
    return found[0] if well_formed else None


def apop_digest(stamp: bytes, password: str) -> str:
    """The digest that APOP sends in place of the password (RFC 1939 section 7)."""
    return _MD5(stamp + password.encode()).hexdigest()


# The choice.

SCRAM_MECHANISMS: Final = (
    "SCRAM-SHA-512-PLUS",
    "SCRAM-SHA-256-PLUS",
    "SCRAM-SHA-512",
    "SCRAM-SHA-256",
    "SCRAM-SHA-1-PLUS",
    "SCRAM-SHA-1",
)
"""The strongest first."""

MECHANISMS: Final[Mapping[str, Callable[[Credentials], Mechanism]]] = {
    **{name: partial(Scram, name) for name in SCRAM_MECHANISMS},
    **{each.name: each for each in (Plain, Login, CramMd5, Xoauth2, OauthBearer, External, Gssapi)},
}
"""Constructors by name. Add new mechanisms here."""

_BY_THEMSELVES: Final = (*SCRAM_MECHANISMS, "PLAIN", "LOGIN")
"""Tried in this order if the URL fixes nothing. The others are weak, or need a token, certificate or ticket,
and only the operator knows whether there is one."""

_REVEAL_NOTHING: Final = frozenset({*SCRAM_MECHANISMS, "CRAM-MD5"})
"""Allowed on a channel that is not private."""

_FIXED_COMMANDS: Final = {"+LOGIN": LOGIN_COMMANDS, "+APOP": APOP}


def choose_mechanism(
    offered: frozenset[str],
    fixed: str | None,
    *,
    private: bool,
    binds: bool = False,
) -> tuple[str, ...]:
    """The ways to log in, best first. A later way is for a server that does not know the earlier ones.

    ``offered`` has the SASL names of CAPA. ``fixed`` is the way that the URL
    names: then nothing else is tried (RFC 2384), offered or not, since servers
    list too little. ``private`` says whether a password may cross this channel,
    because of TLS or because the operator allows it. ``binds`` says whether there
    is channel binding for the -PLUS mechanisms. USER/PASS comes last on a private
    channel, since every server knows it.

    Raises Pop3Error: SECURITY if the remaining ways would reveal the password,
    OPERATOR if there is no way.
    """
    if fixed is not None:
        return (_fixed(fixed, private=private, binds=binds),)
    ways: tuple[str, ...] = tuple(
        name
        for name in _BY_THEMSELVES
        if name in offered and (private or name in _REVEAL_NOTHING) and (binds or not name.endswith(_PLUS))
    )
    if not private:
        if not ways:
            raise _not_private()
    else:
        ways += (LOGIN_COMMANDS,)
    return ways


def _fixed(fixed: str, *, private: bool, binds: bool) -> str:
    name = _FIXED_COMMANDS.get(fixed, fixed)
    if name not in MECHANISMS and fixed not in _FIXED_COMMANDS:
        raise Pop3Error(
            FailureKind.OPERATOR, f"the URL names the login mechanism {fixed}, which is not supported"
        )
    if not private and name not in _REVEAL_NOTHING:
        raise _not_private()
    if name.endswith(_PLUS) and not binds:
        raise Pop3Error(
            FailureKind.OPERATOR, f"{name} needs TLS and a server certificate that allows channel binding"
        )
    return name


def _not_private() -> Pop3Error:
    return Pop3Error(FailureKind.SECURITY, "the password was not sent: the channel is not private")


def binding_for(way: str, offered: frozenset[str], binding: bytes | None) -> bytes | None:
    """The channel binding for ``way``, which decides its gs2 flag (RFC 5802 section 6).

    A -PLUS mechanism binds (flag ``p``). Another mechanism that gets a binding
    sends flag ``y``: the client could bind, and the server does not offer it. So a
    server that did offer it learns that an attacker removed the offer. If the
    server offered -PLUS, or its offers are unknown, the flag is ``n``.
    """
    could_bind = bool(offered) and not any(name.endswith(_PLUS) for name in offered)
    return binding if way.endswith(_PLUS) or could_bind else None


def is_prepared(credentials: Credentials) -> bool:
    """Whether SCRAM, by SASLprep, accepts the user name and the password. PLAIN accepts any."""
    try:
        _scram_client("SCRAM-SHA-256", Credentials(credentials.user, credentials.secret), None)
    except Pop3Error:
        return False
    return True

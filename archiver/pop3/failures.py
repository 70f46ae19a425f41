"""What can go wrong between a POP3 client and a server, grouped by what the caller does next.

Owns the one error of this package, the meaning of a server's ``-ERR`` text, and
the escaping of foreign bytes for people. Promises that a message is one short
line, and that control characters of the server never reach a terminal. Leaves
retrying and remembering to the caller.

Servers rarely say what they mean. Response codes (RFC 2449 section 8, RFC 3206)
decide first, and then the words that real servers use.
"""

import re
from dataclasses import dataclass
from enum import Enum

_SHOWN_BYTES = 200  # of a server's text in an error: enough for any honest sentence
_DEFAULT_LOGIN_DELAY_SECONDS = 900.0  # for [LOGIN-DELAY], if the server announced no figure
_LONGEST_WAIT_SECONDS = 86400.0  # the longest known ban is Gmail's, one day; more would be a misreading


class FailureKind(Enum):
    """What happens next."""

    TRANSIENT = "transient"
    """Network or server busy, a lock, throttling: back off and try the session again."""
    POISON = "poison"
    """This message cannot be fetched; the mailbox is fine."""
    AUTH = "auth"
    """The credentials were refused. It may be throttling in disguise: retry, with growing back-off."""
    PROTOCOL = "protocol"
    """Bytes that the grammar does not allow: nothing in this session can be trusted from here on."""
    SECURITY = "security"
    """Evidence of tampering, or a refusal of the TLS that was demanded: never fall back."""
    OPERATOR = "operator"
    """Only a person can fix it: configuration, certificate, POP3 switched off."""


class Pop3Error(Exception):
    """A POP3 session, or one message of it, failed.

    The message is one line: what was tried, on which host, and what the server
    said.
    """

    def __init__(
        self,
        kind: FailureKind,
        message: str,
        *,
        wait_seconds: float | None = None,
        limit: str | None = None,
        certificate_sha256: str | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.wait_seconds = wait_seconds
        """How long the server asked us to wait, if it did."""
        self.limit = limit
        """The field of ``values.Limits`` that was exceeded, if that was the reason."""
        self.certificate_sha256 = certificate_sha256
        """The certificate that did not pass verification, if that was the reason."""


class Stage(Enum):
    """Where in the session an ``-ERR`` came; the same words mean different things at different stages."""

    GREETING = "greeting"
    LOGIN = "login"
    LISTING = "listing"
    RETRIEVE = "retrieve"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an ``-ERR`` means."""

    kind: FailureKind
    wait_seconds: float | None = None
    """How long the server asked us to wait."""


def printable(text: bytes, limit: int = _SHOWN_BYTES) -> str:
    """Foreign bytes for people: one line, control characters and 8-bit escaped, cut after ``limit`` bytes."""
    shown = text[:limit].decode("ascii", "backslashreplace")
    escaped = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
    return escaped + "..." if len(text) > limit else escaped


_CODE = re.compile(rb"\s*\[([A-Za-z0-9/._-]+)\]")

# An account that a person must unlock. "Mailbox locked" is another session's lock, which ends by itself.
_ACCOUNT_LOCKED = re.compile(rb"account\b.{0,40}\block(ed|out)\b|\blocked\b.{0,20}\baccount")
_OPERATOR_WORDS = re.compile(
    rb"disabled|not enabled|web login|log ?in via (your|the) web|application-specific|app password"
    rb"|less secure|suspended|not permitted to use pop|pop3? access is not"
)
# "Re-Authentication Failure" is what a proxy (perdition) makes of a backend's lock.
_BUSY_WORDS = re.compile(
    rb"lock|in use|busy|already|wait|try again|too many|exceed|limit|temporar|unavailable"
    rb"|time-?out|timed out|throttl|re-authentication failure|inactiv|disconnect|auto-?logout"
)
_CREDENTIAL_WORDS = re.compile(
    rb"password|credential|authenticat|authoriz|log[io]n fail|logon|invalid (user|login)|unknown user"
    rb"|no such user|denied|user ?name"
)
# In answer to RETR, "try again later" and "unavailable" may mean that one message, permanently (Yahoo,
# NetEase). Only words about the session or the account's quota end the session.
_MESSAGE_SIZE_WORDS = re.compile(
    rb"too (large|big|long)|(size|length) (limit|exceed)|exceed\w* .{0,30}\bsize"
)
_SESSION_WORDS = re.compile(
    rb"quota|rate.?limit|throttl|bandwidth|exceed|too many|\block(ed)?\b|in use"
    rb"|inactiv|disconnect|time-?out|timed out|auto-?logout|session|connection"
)
# Another client deleted the message meanwhile (Dovecot, Courier): the listing is stale, no message is bad.
_VANISHED_WORDS = re.compile(rb"expunged|it's gone")

_DURATION = re.compile(rb"(\d{1,5})[ -]?(s|secs?|seconds?|m|mins?|minutes?|h|hours?)\b")
_UNIT_SECONDS = {b"s": 1, b"m": 60, b"h": 3600}

_UNKNOWN_COMMAND = re.compile(
    rb"(unknown|invalid|bad|unrecogni[sz]ed|unsupported|unimplemented) "
    rb"(command|verb|mechanism|argument|parameter|auth\w* (mechanism|type|method))"
    rb"|(command|mechanism|auth\w* (type|method)) .{0,40}(unknown|not (recogni[sz]ed|available))"
    rb"|syntax|not (supported|implemented)|protocol error|too long|\busage\b"
)


def response_code(text: bytes) -> str | None:
    """The response code that opens an ``-ERR`` text (RFC 2449 section 8), in upper case, or None."""
    found = _CODE.match(text)
    return found[1].decode("ascii").upper() if found else None


def says_unknown_command(text: bytes) -> bool:
    """Whether an ``-ERR`` refuses the form of a command and not its content.

    Such a refusal at login says nothing about the credentials, so another form or
    mechanism may be tried.
    """
    if response_code(text) in _CODES:
        return False
    words = text.lower()
    return not _OPERATOR_WORDS.search(words) and bool(_UNKNOWN_COMMAND.search(words))


def classify(
    text: bytes,
    stage: Stage,
    *,
    auth_resp_code: bool = False,
    login_delay_seconds: float | None = None,
) -> Meaning:
    """What the text after ``-ERR`` means at ``stage``. A pure function.

    ``auth_resp_code``: the server lists AUTH-RESP-CODE (RFC 3206 section 6). So
    it marks refused credentials with ``[AUTH]``, and any other refusal at login
    has another reason. ``login_delay_seconds`` is the LOGIN-DELAY that CAPA
    announced. At RETRIEVE, POISON concerns this message alone; every other kind
    ends the session. At LISTING, PROTOCOL means that the server gave no reason:
    it does not know the command.
    """
    words = text.lower()
    code = response_code(text)
    by_code = _by_code(code, words, stage, login_delay_seconds)
    if by_code is not None:
        return by_code
    if stage is Stage.RETRIEVE:
        return _at_retrieve(words)
    return _by_words(words, stage, auth_resp_code=auth_resp_code)


_CODES = frozenset({"LOGIN-DELAY", "IN-USE", "SYS/TEMP", "SYS/PERM", "AUTH", "UTF8"})


def _by_code(
    code: str | None, words: bytes, stage: Stage, login_delay_seconds: float | None
) -> Meaning | None:
    while code is not None and code not in _CODES:  # an unknown sub-code means what its parent means
        code = code.rpartition("/")[0] or None
    match code:
        case "LOGIN-DELAY":
            return Meaning(
                FailureKind.TRANSIENT,
                _wait_in(words) or login_delay_seconds or _DEFAULT_LOGIN_DELAY_SECONDS,
            )
        case "IN-USE" | "SYS/TEMP":
            return Meaning(FailureKind.TRANSIENT, _wait_in(words))
        case "SYS/PERM":
            return Meaning(FailureKind.POISON if stage is Stage.RETRIEVE else FailureKind.OPERATOR)
        case "AUTH":
            # Gmail: "[AUTH] Application-specific password required"; a retry does not help.
            return Meaning(FailureKind.OPERATOR if _OPERATOR_WORDS.search(words) else FailureKind.AUTH)
        case "UTF8" if stage is Stage.RETRIEVE:
            return Meaning(FailureKind.POISON)
        case _:
            return None


def _at_retrieve(words: bytes) -> Meaning:
    if _VANISHED_WORDS.search(words):
        return Meaning(FailureKind.TRANSIENT)
    if not _MESSAGE_SIZE_WORDS.search(words) and _SESSION_WORDS.search(words):
        return Meaning(FailureKind.TRANSIENT, _wait_in(words))
    return Meaning(FailureKind.POISON)


def _by_words(words: bytes, stage: Stage, *, auth_resp_code: bool) -> Meaning:
    wait_seconds = _wait_in(words)
    if _ACCOUNT_LOCKED.search(words):
        passing = wait_seconds is not None or b"temporar" in words
        kind = FailureKind.TRANSIENT if passing else FailureKind.OPERATOR
    elif _OPERATOR_WORDS.search(words):
        kind = FailureKind.OPERATOR
    elif _BUSY_WORDS.search(words):
        kind = FailureKind.TRANSIENT
    elif stage is Stage.LISTING:
        kind = FailureKind.PROTOCOL
    elif stage is not Stage.LOGIN or auth_resp_code:
        kind = FailureKind.TRANSIENT
    elif says_unknown_command(words) and not _CREDENTIAL_WORDS.search(words):
        kind = FailureKind.OPERATOR
    else:
        kind = FailureKind.AUTH
    return Meaning(kind, wait_seconds if kind is FailureKind.TRANSIENT else None)


def _wait_in(words: bytes) -> float | None:
    """The first time span in a text, in seconds: ``try again in 15 minutes`` is 900."""
    found = _DURATION.search(words)
    if found is None:
        return None
    return min(float(int(found[1]) * _UNIT_SECONDS[found[2][:1]]), _LONGEST_WAIT_SECONDS)

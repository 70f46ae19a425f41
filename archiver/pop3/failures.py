"""What can go wrong between a POP3 client and a server, grouped by what the caller does next.

Owns the one error of this package, the reading of a server's ``-ERR`` text, and
the escaping of foreign octets for people. Promises that a message is one line,
that it is short, and that control characters of the server never reach a
terminal. Leaves retrying and remembering to the caller.

Servers rarely say what they mean. Response codes (RFC 2449 section 8, RFC 3206)
are trusted first; then words that real servers use decide.
"""

import re
from dataclasses import dataclass
from enum import Enum

_SHOWN_OCTETS = 200  # of a server's text in an error: enough for any honest sentence
_DEFAULT_LOGIN_DELAY_SECONDS = 900.0  # [LOGIN-DELAY] from a server that announced no figure
_LONGEST_WAIT_SECONDS = 86400.0  # the longest ban known is Gmail's, of a day; more is a misreading


class FailureKind(Enum):
    """What happens next."""

    TRANSIENT = "transient"
    """Network or server busy, a lock, throttling: back off and try the session again."""
    POISON = "poison"
    """This message cannot be had; the mailbox is fine."""
    AUTH = "auth"
    """The credentials were refused. May be throttling in disguise: ask again, ever more rarely."""
    PROTOCOL = "protocol"
    """Octets that the grammar does not allow: nothing of this session can be trusted any more."""
    SECURITY = "security"
    """Evidence of tampering, or TLS refused where it was demanded: never fall back."""
    OPERATOR = "operator"
    """Only a person can mend it: configuration, certificate, POP3 switched off."""


class Pop3Error(Exception):
    """A POP3 session, or one message of it, failed.

    The message is one line: what was tried, on which host, what the server
    said. ``wait_seconds`` is how long the server asked to be left alone, where
    it said so. ``limit`` names the field of ``mailbox.Limits`` that was exceeded,
    where that was the reason.
    """

    def __init__(
        self,
        kind: FailureKind,
        message: str,
        *,
        wait_seconds: float | None = None,
        limit: str | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.wait_seconds = wait_seconds
        self.limit = limit


class Stage(Enum):
    """Where in the session an ``-ERR`` came; the same words mean different things at different stages."""

    GREETING = "greeting"
    LOGIN = "login"
    LISTING = "listing"
    RETRIEVE = "retrieve"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an ``-ERR`` means: the kind, and the wait that the server asked for."""

    kind: FailureKind
    wait_seconds: float | None = None


def printable(text: bytes, limit: int = _SHOWN_OCTETS) -> str:
    """Foreign octets for people: one line, controls and 8-bit escaped, cut after ``limit`` octets."""
    shown = text[:limit].decode("ascii", "backslashreplace")
    escaped = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
    return escaped + "..." if len(text) > limit else escaped


_CODE = re.compile(rb"\s*\[([A-Za-z0-9/._-]+)\]")

# An account that a person must unlock; "mailbox locked" is another session's lock and passes by itself.
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
# While a message is asked for, "try again later" and "unavailable" are said of single messages, for ever
# (Yahoo, NetEase): only words about the session or the account's quota end the session.
_MESSAGE_SIZE_WORDS = re.compile(
    rb"too (large|big|long)|(size|length) (limit|exceed)|exceed\w* .{0,30}\bsize"
)
_SESSION_WORDS = re.compile(
    rb"quota|rate.?limit|throttl|bandwidth|exceed|too many|\block(ed)?\b|in use"
    rb"|inactiv|disconnect|time-?out|timed out|auto-?logout|session|connection"
)
# Another client took the message away meanwhile (Dovecot, Courier): the listing is stale, no message is bad.
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
    """Whether an ``-ERR`` refuses the form of a command rather than what it asked for.

    Such a refusal at login says nothing of the credentials, so another form or
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

    ``auth_resp_code``: the server promised by AUTH-RESP-CODE (RFC 3206 section
    6) that it marks refused credentials with ``[AUTH]``, so that anything else
    at login is no credential problem. ``login_delay_seconds`` is the LOGIN-DELAY
    that CAPA announced. At RETRIEVE, POISON concerns this message alone; every
    other kind ends the session. At LISTING, PROTOCOL means that the server gave
    no reason: it does not know the command.
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
            # Gmail: "[AUTH] Application-specific password required"; no retry will ever help.
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
    """The first span of time that a text names, in seconds: ``try again in 15 minutes`` is 900."""
    found = _DURATION.search(words)
    if found is None:
        return None
    return min(float(int(found[1]) * _UNIT_SECONDS[found[2][:1]]), _LONGEST_WAIT_SECONDS)

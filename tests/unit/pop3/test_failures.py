"""What real servers' refusals mean. Each text was sent by the server that its line names."""

import pytest

from archiver.pop3.failures import FailureKind, Meaning, Stage, classify, printable, says_unknown_command

TRANSIENT, POISON, AUTH = FailureKind.TRANSIENT, FailureKind.POISON, FailureKind.AUTH
PROTOCOL, OPERATOR = FailureKind.PROTOCOL, FailureKind.OPERATOR

AT_LOGIN = [
    (b"[AUTH] Authentication failed.", AUTH),  # Dovecot
    (b"[auth] lower case", AUTH),
    (b"Login failed.", AUTH),  # Courier
    (b"", AUTH),  # popa3d
    (b"Logon failure: unknown user name or bad password", AUTH),  # Exchange; may be throttling (M4)
    (b"[IN-USE] Mailbox is locked by another POP3 session.", TRANSIENT),  # Dovecot
    (b"[IN-USE] mailbox already in use by pid 12345", TRANSIENT),
    (b"[SYS/TEMP] Temporary system problem", TRANSIENT),  # Gmail
    (b"[SYS/TEMP/DISK] unknown sub-code", TRANSIENT),
    (b"[SYS/PERM] mailbox removed", OPERATOR),
    (b"Re-Authentication Failure", TRANSIENT),  # perdition hides the backend's lock
    (b"maildrop lock failed, try again", TRANSIENT),  # Qpopper
    (b"mailbox locked", TRANSIENT),
    (b"wait a few minutes", TRANSIENT),  # InterMail
    (b"Exceeded the login limit for a 15 minute period", TRANSIENT),  # Exchange
    (b"Your account is temporarily unavailable (+t bit set on home directory)", TRANSIENT),  # Courier
    (b"too many authentication failures", TRANSIENT),
    (b"[AUTH] Application-specific password required", OPERATOR),  # Gmail
    (b"[AUTH] Web login required", OPERATOR),  # Gmail
    (b"Your account is not enabled for POP access.", OPERATOR),
    (b"POP3 access disabled", OPERATOR),  # Courier
    (b"account suspended", OPERATOR),
    (b"Account is locked", OPERATOR),
    (b"account temporarily locked", TRANSIENT),
    (b"unknown command", OPERATOR),
    (b"[UwBDADEAUAByAGUA] bad password", AUTH),  # Exchange's bracketed base64 is no code (M5)
    (b"[EXPIRED] password", AUTH),
]


@pytest.mark.parametrize(("text", "kind"), AT_LOGIN)
def test_at_login(text: bytes, kind: FailureKind) -> None:
    assert classify(text, Stage.LOGIN).kind is kind


def test_a_server_that_marks_bad_credentials_means_something_else_without_the_mark() -> None:
    """RFC 3206 section 6."""
    assert classify(b"Login failed", Stage.LOGIN, auth_resp_code=True).kind is TRANSIENT
    assert classify(b"[AUTH] Login failed", Stage.LOGIN, auth_resp_code=True).kind is AUTH
    assert classify(b"POP3 access disabled", Stage.LOGIN, auth_resp_code=True).kind is OPERATOR


AT_RETRIEVE = [
    (b"Message 2 expunged.", TRANSIENT),  # Dovecot: drop it from the plan and list again
    (b"Can't open the message file - it's gone!", TRANSIENT),  # Courier
    (b"Download was rate limited. Try again in 2 hours", TRANSIENT),  # WildDuck
    (b"Download exceed", TRANSIENT),  # NetEase
    (b"daily download quota reached", TRANSIENT),
    (b"[SYS/TEMP] try later", TRANSIENT),
    (b"[IN-USE] lost the lock", TRANSIENT),
    (b"mailbox lock lost", TRANSIENT),  # UW ipop3d
    (b"Disconnected for inactivity", TRANSIENT),  # Dovecot, unasked
    (b"[SYS/PERM] corrupt", POISON),
    (b"[UTF8] message needs UTF8", POISON),
    (b"Message can not load", POISON),  # NetEase
    (b"server error, try again later", POISON),  # Yahoo, of one message, permanently
    (b"message temporarily unavailable", POISON),
    (b"message exceeds the size limit", POISON),
    (b"message too large", POISON),
    (b"unable to render", POISON),  # Exchange
    (b"", POISON),
]


@pytest.mark.parametrize(("text", "kind"), AT_RETRIEVE)
def test_at_retrieve(text: bytes, kind: FailureKind) -> None:
    assert classify(text, Stage.RETRIEVE).kind is kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"unknown command", PROTOCOL),
        (b"", PROTOCOL),
        (b"[SYS/TEMP] x", TRANSIENT),
        (b"mailbox busy", TRANSIENT),
    ],
)
def test_at_listing(text: bytes, kind: FailureKind) -> None:
    assert classify(text, Stage.LISTING).kind is kind


@pytest.mark.parametrize(
    ("text", "kind"), [(b"", TRANSIENT), (b"connection refused", TRANSIENT), (b"POP disabled", OPERATOR)]
)
def test_at_the_greeting(text: bytes, kind: FailureKind) -> None:
    assert classify(text, Stage.GREETING).kind is kind


@pytest.mark.parametrize(
    ("text", "wait_seconds"),
    [
        (b"[LOGIN-DELAY] minimum time between mail checks", 900.0),
        (b"[LOGIN-DELAY] wait 720 s", 720.0),
        (b"[IN-USE] retry in 5 minutes", 300.0),
        (b"login limit for a 15 minute period", 900.0),
        (b"too many logins, try again in 99999 hours", 86400.0),
        (b"busy", None),
    ],
)
def test_a_wait_that_the_server_names_is_kept(text: bytes, wait_seconds: float | None) -> None:
    assert classify(text, Stage.LOGIN) == Meaning(TRANSIENT, wait_seconds)


def test_the_announced_login_delay_is_the_wait_where_the_refusal_names_none() -> None:
    verdict = classify(b"[LOGIN-DELAY]", Stage.LOGIN, login_delay_seconds=600)
    assert verdict == Meaning(TRANSIENT, 600)


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        (b"unknown command", True),
        (b"Unrecognized authentication type", True),
        (b"syntax error", True),
        (b"Protocol error. Connection is closed. 10", True),  # Microsoft, to an initial response
        (b"authentication mechanism not supported", True),
        (b"[AUTH] unknown command", False),
        (b"Logon failure: unknown user name or bad password", False),
        (b"Authentication failed", False),
        (b"", False),
    ],
)
def test_only_a_refusal_of_the_form_allows_another_try(text: bytes, unknown: bool) -> None:
    """Every needless second try brings an account nearer to its lock-out."""
    assert says_unknown_command(text) is unknown


def test_foreign_octets_cannot_drive_a_terminal() -> None:
    shown = printable(b"\x1b[31mred\r\nnext\0\xff" + b"x" * 500)
    assert shown.isprintable()
    assert shown.startswith("\\x1b[31mred\\x0d\\x0anext\\x00\\xff")
    assert len(shown) < 300

"""Passwords: where they are, and where they must never be seen."""

import base64
import json
import os
import subprocess
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from archiver.bootstrap import App
from archiver.errors import ArchiverError, OperatorNeeded, UsageError
from archiver.model import Account
from archiver.secrets import SECRET_BYTES, Secrets, check_reference, from_file
from archiver.settings import Settings

PASSWORD = "correct horse"
KEY = base64.b64encode(bytes(range(32))).decode()
ACCOUNT = Account("id", "work", "pop3s://me@host", "implicit", "")
OTHER = base64.urlsafe_b64encode(bytes(range(200, 232))).decode()


def told(error: BaseException) -> str:
    """Everything that a log could show of an error, and of what led to it."""
    hint = getattr(error, "hint", "")
    return f"{error} {error!r} {hint} {''.join(traceback.format_exception(error))}"


# References.


@pytest.mark.parametrize("reference", ["file:/run/secrets/work", "env:PASSWORD", "sealed:abc"])
def test_references(reference: str) -> None:
    assert check_reference(reference) == reference


@pytest.mark.parametrize("given", ["", "file:", "env:", "prompt:", "https://x", "file:/a\0b", "env:\x1b"])
def test_other_words_are_no_reference(given: str) -> None:
    with pytest.raises(UsageError, match="file:/path or env:NAME"):
        check_reference(given)


def test_a_password_given_for_a_reference_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        check_reference(PASSWORD)
    assert PASSWORD not in told(caught.value)


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"p", "p"),
        (b"p\n", "p"),
        (b"p\r\n", "p"),
        (b"p\n\n", "p\n"),
        (b" p \n", " p "),
        ("pä".encode(), "pä"),
        (b"p\r", "p\r"),
        (b"\xef\xbb\xbfp\r\n", "p"),
        ("\ufeffpä".encode(), "pä"),
        ("p\ufeff".encode(), "p\ufeff"),
    ],
)
def test_a_password_file_counts_whole_less_one_line_end(
    tmp_path: Path, content: bytes, password: str
) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    assert from_file(path) == password
    assert Secrets(None).resolve(ACCOUNT, f"file:{path}") == password


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\r\n",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xef\xbb\xbf\r\n",
        "xxx\r\n".encode("utf-16"),
        "xxx\r\n".encode("utf-16-le"),
        "xxx\r\n".encode("utf-16-be"),
        "xxx".encode("utf-32"),
        "xxxä".encode("cp1252"),
        b"x" * (SECRET_BYTES + 1),
    ],
)
def test_an_unusable_password_file_says_why_and_not_what(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    with pytest.raises(OperatorNeeded, match="password") as caught:
        from_file(path)
    assert "xxx" not in told(caught.value)
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(OperatorNeeded, match="cannot read the password file"):
            from_file(missing)


def test_a_variable_is_looked_up_at_poll_time() -> None:
    environment = {"P": PASSWORD, "EMPTY": ""}
    secrets = Secrets(None, environment=environment)
    assert secrets.resolve(ACCOUNT, "env:P") == PASSWORD
    environment["P"] = "changed"
    assert secrets.resolve(ACCOUNT, "env:P") == "changed"
    for name in ("EMPTY", "NOTHING"):
        with pytest.raises(OperatorNeeded, match=f"variable {name}, which is not set"):
            secrets.resolve(ACCOUNT, f"env:{name}")


@pytest.mark.parametrize("reference", ["prompt:", "", "strange:x"])
def test_an_account_without_a_password_needs_an_operator(reference: str) -> None:
    with pytest.raises(OperatorNeeded, match="no password"):
        Secrets(KEY).resolve(ACCOUNT, reference)


# Sealed.


@pytest.mark.parametrize("password", [PASSWORD, "ä\udcff\n\0", "x" * 10_000])
def test_what_is_sealed_opens_again(password: str) -> None:
    sealed = Secrets(KEY).seal(ACCOUNT, password)
    assert password not in sealed
    assert Secrets(KEY).resolve(ACCOUNT, sealed) == password
    assert Secrets(KEY).seal(ACCOUNT, password) != sealed


def test_another_key_opens_nothing() -> None:
    sealed = Secrets(KEY).seal(ACCOUNT, PASSWORD)
    with pytest.raises(OperatorNeeded, match="another key") as caught:
        Secrets(OTHER).resolve(ACCOUNT, sealed)
    for secret in (PASSWORD, KEY, OTHER):
        assert secret not in told(caught.value)


def test_a_sealed_password_in_another_row_does_not_open() -> None:
    sealed = Secrets(KEY).seal(ACCOUNT, PASSWORD)
    with pytest.raises(OperatorNeeded, match="sealed for another account") as caught:
        Secrets(KEY).resolve(replace(ACCOUNT, id="another id"), sealed)
    assert PASSWORD not in told(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"url": "pop3s://me@elsewhere"},
        {"url": "pop3s://me@host:1995"},
        {"url": "pop3s://you@host"},
        {"url": "pop3://me@host", "tls": "starttls"},
        {"tls": "none"},
        {"url": "pop2://me@host"},
        {"url": "pop3s://me@host/folder"},
        {"url": "pop3s://me;AUTH=PLAIN@elsewhere"},
        {"url": "pop3s://me@elsewhere/;AUTH=PLAIN@host"},
    ],
)
def test_a_sealed_password_is_for_one_login(change: dict[str, str]) -> None:
    sealed = Secrets(KEY).seal(ACCOUNT, PASSWORD)
    moved = replace(ACCOUNT, secret_reference=sealed, **change)  # type: ignore[arg-type]
    for attempt in (Secrets(KEY).resolve, Secrets(KEY).resealed):
        with pytest.raises(OperatorNeeded, match="another server, user or TLS mode") as caught:
            attempt(moved)
        assert PASSWORD not in told(caught.value)


def test_a_sealed_password_serves_every_mechanism() -> None:
    sealed = Secrets(KEY).seal(ACCOUNT, PASSWORD)
    fixed = replace(ACCOUNT, url="pop3s://me;AUTH=PLAIN@host", secret_reference=sealed)
    assert Secrets(KEY).resolve(fixed) == PASSWORD


def former_form(secret: str) -> str:
    return f"sealed:{Fernet(KEY).encrypt(json.dumps([ACCOUNT.id, secret]).encode()).decode()}"


@pytest.mark.parametrize("before", ["", "oauth:"])
def test_the_former_form_opens_and_is_resealed_for_its_login(before: str) -> None:
    old = replace(ACCOUNT, secret_reference=before + former_form(PASSWORD))
    assert Secrets(KEY).resolve(old, former_form(PASSWORD)) == PASSWORD
    new = Secrets(KEY).resealed(old)
    assert new is not None
    assert new.startswith(f"{before}sealed:")
    resealed = replace(ACCOUNT, secret_reference=new)
    assert Secrets(KEY).resolve(resealed, new.removeprefix("oauth:")) == PASSWORD
    assert Secrets(KEY).resealed(resealed) is None
    with pytest.raises(OperatorNeeded, match="another server"):
        Secrets(KEY).resolve(replace(ACCOUNT, tls="none"), new.removeprefix("oauth:"))


# The service's own secrets.


OWN = [
    "ARCHIVER_SECRET_KEY",
    "ARCHIVER_API_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "PGPASSWORD",
    "archiver_database_url",
]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("before", ["", "oauth:"])
def test_no_variable_of_the_service_is_a_password(before: str, name: str) -> None:
    with pytest.raises(UsageError, match="service's own"):
        check_reference(f"{before}env:{name}")
    with pytest.raises(OperatorNeeded, match="service's own") as caught:
        Secrets(KEY, environment={name: PASSWORD}).resolve(ACCOUNT, f"env:{name}")
    assert PASSWORD not in told(caught.value)


@pytest.mark.parametrize("link", ["itself", "symbolic", "hard"])
def test_no_file_of_the_service_is_a_password(tmp_path: Path, link: str) -> None:
    own, path = tmp_path / "token", tmp_path / "link"
    own.write_text(PASSWORD)
    if link == "symbolic":
        path.symlink_to(own)
    elif link == "hard":
        path.hardlink_to(own)
    else:
        path = own
    secrets = Secrets(KEY, environment={"AWS_WEB_IDENTITY_TOKEN_FILE": str(own)})
    for name in (str(path), "/proc/self/environ", f"/proc/{os.getpid()}/task/{os.getpid()}/environ"):
        with pytest.raises(OperatorNeeded, match="service's own") as caught:
            secrets.resolve(ACCOUNT, f"file:{name}")
        assert PASSWORD not in told(caught.value)
    assert Secrets(KEY, environment={"MY_FILE": str(own)}).resolve(ACCOUNT, f"file:{path}") == PASSWORD


@pytest.mark.parametrize("damaged", ["sealed:", "sealed:é", "sealed:abc", "sealed:gAAAA"])
def test_a_damaged_seal_needs_an_operator(damaged: str) -> None:
    with pytest.raises(OperatorNeeded):
        Secrets(KEY).resolve(ACCOUNT, damaged)


def test_a_key_is_changed_without_a_break() -> None:
    old = Secrets(KEY).seal(ACCOUNT, PASSWORD)
    between = Secrets(f"{OTHER}, {KEY}")
    assert between.resolve(ACCOUNT, old) == PASSWORD
    new = between.seal(ACCOUNT, PASSWORD)
    assert Secrets(OTHER).resolve(ACCOUNT, new) == PASSWORD


def test_keys_come_from_openssl_or_fernet() -> None:
    made = subprocess.run(["openssl", "rand", "-base64", "32"], capture_output=True, check=True, text=True)
    for key in (made.stdout, made.stdout.strip(), Fernet.generate_key().decode()):
        assert Secrets(key).resolve(ACCOUNT, Secrets(key).seal(ACCOUNT, PASSWORD)) == PASSWORD


@pytest.mark.parametrize(
    "key", [None, "", "short", "é" * 44, f"{KEY},", base64.b64encode(bytes(31)).decode()]
)
def test_an_unusable_key_is_said_and_not_repeated(key: str | None) -> None:
    with pytest.raises(UsageError, match="ARCHIVER_SECRET_KEY") as caught:
        Secrets(key).seal(ACCOUNT, PASSWORD)
    assert not key or key not in told(caught.value)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


# Nowhere to be seen.


def test_no_value_shows_a_secret(tmp_path: Path) -> None:
    settings = Settings(
        secret_key=SecretStr(KEY),
        api_token=SecretStr("token of the api"),
        database_url=f"sqlite:///{tmp_path / 'x.db'}",
        store_url=f"file:{tmp_path / 'store'}",
    )
    with App(settings) as app:
        sealed = app.secrets.seal(ACCOUNT, PASSWORD)
        app.open_archive()
        account = replace(ACCOUNT, secret_reference=sealed)
        app.passwords["other"] = PASSWORD
        shown = [settings, account, app, app.secrets, app.ports]
        for value in shown:
            for text in (str(value), repr(value)):
                for secret in (KEY, "token of the api", PASSWORD, sealed):
                    assert secret not in text, type(value)
        assert app.password(account) == PASSWORD


def test_a_wrong_password_is_in_no_error(tmp_path: Path) -> None:
    with pytest.raises(ArchiverError) as caught:
        Secrets(None, environment=os.environ).resolve(ACCOUNT, f"file:{tmp_path}/{'x' * 300}")
    assert "cannot read" in str(caught.value)

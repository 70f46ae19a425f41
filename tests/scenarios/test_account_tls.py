"""An account's choices about TLS, from the command line and the accounts file to the wire."""

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archiver.bootstrap import App
from archiver.db import accounts
from archiver.errors import UsageError
from archiver.model import Account
from archiver.settings import Settings
from tests.harness.certificates import certificate_sha256, client_certificate, key_sha256, self_signed
from tests.harness.scripted_pop3 import MailboxPlay, ScriptedPop3
from tests.scenarios.story import message
from tests.scenarios.test_commands import Commands

pytestmark = pytest.mark.slow

PIN = "ab" * 32
URL = "pop3s://user@pop.example.com"


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    return self_signed(tmp_path)


@pytest.fixture
def old_server(certificate: tuple[Path, Path]) -> Iterator[ScriptedPop3]:
    """One that nobody can replace: TLS 1.0, and a certificate for another name that nobody vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.deprecated_call():
        context.maximum_version = ssl.TLSVersion.TLSv1
    play = MailboxPlay([(b"uid", message("m"))])
    with ScriptedPop3(play, tls="implicit", context=context) as server:
        yield server


def kept(commands: Commands, name: str = "sales") -> Account:
    database = commands.database()
    try:
        with database.reading() as connection:
            account = accounts.by_name(connection, name)
    finally:
        database.close()
    assert account is not None
    return account


def test_what_is_chosen_is_kept_until_it_is_taken_away(commands: Commands, tmp_path: Path) -> None:
    client, key = client_certificate(tmp_path)
    access = ("--password-env", "PASSWORD")
    commands.run("account", "add", "sales", URL, *access)
    plain = kept(commands)
    commands.run(
        *("account", "edit", "sales", "--tls-pin", PIN.upper(), "--tls-pin", "00" * 32),
        *("--tls-minimum", "1.0", "--tls-server-name", "old.example.com"),
        *("--client-certificate", str(client), "--client-key", str(key)),
    )
    chosen = kept(commands)
    assert chosen.tls_pins == ("00" * 32, PIN)
    assert (chosen.tls_minimum, chosen.tls_server_name) == ("1.0", "old.example.com")
    assert (chosen.client_certificate, chosen.client_key) == (str(client), str(key))
    [shown] = commands.json("account", "show", "sales")
    assert shown["tls_pins"] == ["00" * 32, PIN]
    assert (shown["tls_minimum"], shown["client_certificate"]) == ("1.0", str(client))
    told = " ".join(commands.run("account", "show", "sales").split())
    assert f"tls implicit at least 1.0 pinned to {'00' * 32} or {PIN} expecting old.example.com" in told
    commands.run("account", "edit", "sales", "--interval", "60")
    assert kept(commands).tls_pins == chosen.tls_pins
    commands.run(
        *("account", "edit", "sales", "--tls-pin", "none", "--tls-minimum", "1.2"),
        *("--tls-server-name", "none", "--client-certificate", "none", "--interval", "300"),
    )
    assert kept(commands) == plain


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (("--tls-pin", "none", "--tls-pin", PIN), "64 hex digits"),
        (("--tls-pin", "abc"), "64 hex digits"),
        (("--tls-minimum", "0.9"), "--tls-minimum: 0.9 is unknown"),
        (("--tls-server-name", ".example"), "cannot be a server's name"),
        (("--client-certificate", "nowhere.pem"), "--client-certificate: there is no file"),
        (("--client-key", "nowhere.key"), "--client-key: there is no file"),
    ],
)
@pytest.mark.parametrize("command", [("sync", URL), ("account", "add", "sales", URL)], ids=["sync", "add"])
def test_a_choice_that_cannot_be_touches_nothing(
    commands: Commands, command: tuple[str, ...], choice: tuple[str, ...], words: str
) -> None:
    result = commands.process(*command, "--password-env", "PASSWORD", *choice)
    assert (result.returncode, words in result.stderr) == (2, True), result.stderr
    assert not list(commands.directory.iterdir())


def test_a_key_without_a_certificate_touches_nothing(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    _, key = client_certificate(tmp_path / "elsewhere")
    for command in (("sync", URL), ("account", "add", "sales", URL)):
        result = commands.process(*command, "--password-env", "PASSWORD", "--client-key", str(key))
        assert result.returncode == 2
        assert "needs a client certificate" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_an_old_server_is_archived_with_a_warning_each_time(
    commands: Commands, old_server: ScriptedPop3, certificate: tuple[Path, Path]
) -> None:
    url = f"pop3s://user@127.1:{old_server.port}"
    access = ("--password-env", "PASSWORD", "--tls-pin", key_sha256(certificate[0]))
    [refused] = commands.json("sync", url, *access, code=1)
    assert "TLS 1.2 is required" in refused["error"]
    for new in (1, 0):
        [report] = commands.json("sync", url, *access, "--tls-minimum", "1.0")
        assert (report["outcome"], report["new"]) == ("ok", new)
        assert [warning.partition(" ")[0] for warning in report["warnings"]] == ["TLSv1"]
    assert "warning: TLSv1 is broken" in commands.run("sync", url)
    [checked] = commands.json("account", "check", url, *access, "--tls-minimum", "1.0")
    assert checked["tls_version"] == "TLSv1"
    assert checked["certificate_sha256"] == certificate_sha256(certificate[0])
    assert checked["certificate_days_left"] is not None
    assert checked["advice"][0].startswith("TLSv1 is broken")


def taken_in(commands: Commands, file: Path) -> dict[str, Any]:
    environment = commands.environment
    settings = Settings(
        database_url=environment["ARCHIVER_DATABASE_URL"], store_url=environment["ARCHIVER_STORE_URL"]
    )
    with App(settings) as app:
        app.make_database()
        app.take_in(file)
        with app.database.reading() as connection:
            return {account.name: account for account in accounts.every(connection)}


def test_the_accounts_file_has_the_same_choices(commands: Commands, tmp_path: Path) -> None:
    file = tmp_path / "accounts.toml"
    table = f'[[account]]\nname = "sales"\nurl = "{URL}"\npassword = "env:P"\n'
    file.write_text(
        f'{table}tls_pins = ["{PIN.upper()}"]\ntls_minimum = "1.1"\ntls_server_name = "old.example.com"\n'
        'client_certificate = "/etc/c.pem"\nclient_key = "/etc/c.key"\n'
    )
    account = taken_in(commands, file)["sales"]
    assert (account.tls_pins, account.tls_minimum) == ((PIN,), "1.1")
    assert account.tls_server_name == "old.example.com"
    assert (account.client_certificate, account.client_key) == ("/etc/c.pem", "/etc/c.key")
    file.write_text(table)
    account = taken_in(commands, file)["sales"]
    assert (account.tls_pins, account.tls_minimum, account.client_certificate) == ((), "1.2", None)
    for wrong in ('tls_pins = ["abc"]', 'tls_minimum = "2"', 'client_key = "/etc/c.key"'):
        file.write_text(f"{table}{wrong}\n")
        with pytest.raises(UsageError, match=r'entry 1 \("sales", line 1\)'):
            taken_in(commands, file)

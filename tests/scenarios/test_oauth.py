"""A mailbox that opens to access tokens alone: a real Dovecot, a provider, and what becomes of a poll."""

import base64
import json
import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from archiver import pop3
from archiver.db import accounts
from archiver.demo import dovecot as demo_dovecot
from archiver.demo.dovecot import Dovecot
from archiver.errors import TryLater, UsageError
from archiver.model import Account
from archiver.oauth import AccessTokens, Poster
from archiver.poll.ports import Ports
from archiver.secrets import Secrets
from tests.conftest import require
from tests.harness.oauth_provider import CLIENT, SCOPE, SECRET, OauthProvider
from tests.scenarios.story import Archive, message
from tests.scenarios.test_commands import KEY, Commands

pytestmark = [pytest.mark.dovecot, pytest.mark.xdist_group("oauth")]

USER = "anna"
OTHER_KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture(scope="module")
def provider(server_directory: Path) -> Iterator[OauthProvider]:
    with OauthProvider(server_directory / "provider", rotates=True, interval_seconds=0.01) as provider:
        yield provider


@pytest.fixture(scope="module")
def server(server_directory: Path, provider: OauthProvider) -> Iterator[Dovecot]:
    require(demo_dovecot.unavailable(server_directory))
    oauth2 = server_directory / "tokens.conf"
    oauth2.write_text(f"tokeninfo_url = {provider.tokeninfo_url}\nusername_attribute = username\n")
    oauth2.chmod(0o644)
    # Without a cache each login is looked at anew, so that a token can run out at once.
    settings = f"""\
auth_mechanisms = plain xoauth2 oauthbearer
auth_cache_size = 0
passdb {{
  driver = oauth2
  mechanisms = xoauth2 oauthbearer
  args = {oauth2}
}}
"""
    with Dovecot(server_directory / "oauth", {USER: "not told"}, extra_settings=settings) as dovecot:
        yield dovecot


@dataclass
class Polls:
    """One process that polls this mailbox."""

    archive: Archive
    server: Dovecot
    account: Account
    tokens: AccessTokens

    def ports(self) -> Ports:
        return self.archive.ports(
            connect=self.connect,
            password=lambda account: self.tokens.current(account, USER),
            another_password=lambda account, refused: self.tokens.instead(account, USER, refused),
        )

    def connect(self, account: Account) -> pop3.Session:
        settings = pop3.TlsSettings(ca_file=self.server.ca_file)
        return pop3.connect(pop3.parse_url(account.url, pop3.Tls.IMPLICIT), tls_settings=settings)

    def sync(self) -> Any:
        return self.archive.sync(self.account, self.ports())


def polls(archive: Archive, server: Dovecot, provider: OauthProvider, user: str = USER) -> Polls:
    secrets = Secrets(KEY)
    document = {"token_endpoint": provider.token_endpoint, "scope": SCOPE, "client_id": CLIENT}
    document |= {"client_secret": SECRET, "refresh_token": provider.refresh_token(user)}
    url = f"pop3s://{USER};AUTH=XOAUTH2@localhost:{server.pop3s_port}"
    bare = Account("0123456789abcdef", "anna", url, "implicit", "")
    new = replace(bare, secret_reference=f"oauth:{secrets.seal(bare, json.dumps(document))}")
    account = archive.database.transact(lambda connection: accounts.add(connection, new, archive.clock.now()))

    def keep(account: Account, reference: str, document: str) -> str:
        sealed = f"oauth:{secrets.seal(account, document)}"
        archive.database.transact(
            lambda connection: accounts.exchange_secret(connection, account.id, reference, sealed)
        )
        return sealed

    poster = Poster(tls=provider.client_tls)
    tokens = AccessTokens(secrets, keep, poster=poster, monotonic=archive.clock.monotonic)
    return Polls(archive, server, account, tokens)


def test_a_token_that_the_server_refuses_is_had_anew_and_the_mail_archived(
    small_archive: Archive, server: Dovecot, provider: OauthProvider
) -> None:
    story = polls(small_archive, server, provider)
    server.deliver(USER, [message("one")])
    assert story.sync().outcome == "ok"
    asked = len(provider.requests)

    provider.expire_access_tokens()
    small_archive.clock.advance(600)
    server.deliver(USER, [message("two")])
    report = story.sync()
    assert (report.outcome, report.counts.new) == ("ok", 1)
    assert len(provider.requests) == asked + 1
    assert set(small_archive.archived(story.account)) == {message("one"), message("two")}
    # The provider ended the refresh tokens that it replaced; the newest one is in the database.
    secret = small_archive.fresh(story.account).secret_reference
    kept = Secrets(KEY).resolve(story.account, secret.removeprefix("oauth:"))
    assert list(provider.refresh_tokens) == [json.loads(kept)["refresh_token"]]


def test_a_mailbox_that_the_token_is_not_for_is_tried_once_more_and_needs_an_operator(
    small_archive: Archive, server: Dovecot, provider: OauthProvider
) -> None:
    story = polls(small_archive, server, provider, user="somebody-else")
    first = story.sync()
    assert (first.outcome, first.listed) == ("operator_needed", None)
    small_archive.clock.advance(600)
    asked = len(provider.requests)
    again = story.sync()
    assert again.outcome == "operator_needed"
    assert "the server refused the access token" in (again.error or "")
    assert len(provider.requests) == asked + 1


def test_access_that_was_taken_back_is_said_with_what_to_do(
    small_archive: Archive, server: Dovecot, provider: OauthProvider
) -> None:
    story = polls(small_archive, server, provider)
    provider.refresh_tokens.clear()
    report = story.sync()
    assert (report.outcome, report.hint) == ("operator_needed", "archiver account authorize anna")


# By the commands.


class Authorized(Commands):
    """The command line, where this provider's authority is trusted."""

    provider: OauthProvider

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"SSL_CERT_FILE": str(self.provider.ca_file)}


@pytest.fixture
def commands(tmp_path: Path, provider: OauthProvider) -> Authorized:
    made = Authorized(tmp_path)
    object.__setattr__(made, "provider", provider)
    return made


@pytest.fixture
def options(tmp_path: Path, provider: OauthProvider) -> list[str]:
    secret = tmp_path / "client-secret"
    secret.write_text(f"{SECRET}\n")
    return [
        *("--client-id", CLIENT, "--client-secret-file", str(secret), "--scope", SCOPE),
        *("--token-endpoint", provider.token_endpoint, "--device-endpoint", provider.device_endpoint),
    ]


def add(commands: Authorized, server: Dovecot, *options: str) -> None:
    url = f"pop3s://{USER}@localhost:{server.pop3s_port}"
    commands.run("account", "add", "anna", url, "--ca-file", str(server.ca_file), *options)


def test_a_mailbox_is_let_in_by_a_code_and_archived(
    commands: Authorized, server: Dovecot, provider: OauthProvider, options: list[str]
) -> None:
    provider.at_once = USER
    add(commands, server, "--password-env", "PASSWORD")
    [told] = commands.json("account", "authorize", "anna", *options)
    assert told["url"] == f"pop3s://{USER};AUTH=XOAUTH2@localhost:{server.pop3s_port}"
    [shown] = commands.json("account", "show", "anna")
    assert shown["password"] == "oauth:sealed"
    for _ in range(3):  # each a process that must find the newest refresh token
        [report] = commands.json("sync", "anna")
        assert report["outcome"] == "ok"
    [checked] = commands.json("account", "check", "anna")
    assert checked["mechanism"] == "XOAUTH2"
    for path in (commands.directory / "store").rglob("*"):
        if path.is_file():
            octets = path.read_bytes()
            assert not [token for token in provider.refresh_tokens if token.encode() in octets]


def test_an_account_that_waits_for_its_access_is_added_without_a_password(
    commands: Authorized, server: Dovecot, provider: OauthProvider, options: list[str]
) -> None:
    url = f"pop3s://{USER};AUTH=OAUTHBEARER@localhost:{server.pop3s_port}"
    commands.run("account", "add", "anna", url, "--ca-file", str(server.ca_file))
    provider.at_once = USER
    [told] = commands.json("account", "authorize", "anna", *options)
    assert told["url"] == url
    [report] = commands.json("sync", "anna")
    assert report["outcome"] == "ok"


def test_an_application_or_a_file_needs_no_person(
    commands: Authorized, server: Dovecot, provider: OauthProvider, options: list[str], tmp_path: Path
) -> None:
    add(commands, server, "--password-env", "PASSWORD")
    commands.run("account", "authorize", "anna", "--client-credentials", *options)
    assert provider.requests[-1]["grant_type"] == "client_credentials"
    file = tmp_path / "credential.json"
    document = {"token_endpoint": provider.token_endpoint, "client_id": CLIENT, "scope": SCOPE}
    file.write_text(json.dumps(document | {"client_secret": SECRET}))
    commands.run("account", "authorize", "anna", "--credential-file", str(file))
    [shown] = commands.json("account", "show", "anna")
    assert shown["password"] == f"oauth:file:{file}"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--client-id", "x"], "give --provider"),
        (["--provider", "google"], "--client-id is needed"),
        (["--provider", "yahoo", "--client-id", "x"], "--provider yahoo is unknown"),
        (["--provider", "google", "--client-id", "x", "--tenant", "t"], "--tenant is for"),
        (["--provider", "microsoft", "--client-id", "x", "--client-credentials"], "needs --tenant"),
        (
            ["--provider", "google", "--client-id", "x", "--client-credentials"],
            "application.s secret alone",
        ),
        (["--client-id", "x", "--token-endpoint", "http://x/", "--scope", "s"], "is an https:// address"),
        (["--credential-file", "x", "--provider", "google"], "cannot be combined with other options"),
    ],
)
def test_what_cannot_be_meant(
    commands: Authorized, server: Dovecot, arguments: list[str], reason: str
) -> None:
    add(commands, server, "--password-env", "PASSWORD")
    with pytest.raises(UsageError, match=reason):
        commands.run("account", "authorize", "anna", *arguments)


def test_a_way_to_log_in_that_the_url_fixes_is_not_replaced(commands: Authorized, server: Dovecot) -> None:
    url = f"pop3s://{USER};AUTH=PLAIN@localhost:{server.pop3s_port}"
    commands.run("account", "add", "anna", url, "--password-env", "PASSWORD")
    with pytest.raises(UsageError, match="requires PLAIN, which is not a login by OAuth"):
        commands.run("account", "authorize", "anna", "--provider", "google", "--client-id", "x")


# By a proxy.


class Tunnel(socketserver.ThreadingTCPServer):
    """A proxy that opens a tunnel to whoever says who he is."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), TunnelHandler)
        self.asked: list[bytes] = []


class TunnelHandler(socketserver.StreamRequestHandler):
    server: Tunnel

    def handle(self) -> None:
        request = b"".join(iter(self.rfile.readline, b"\r\n"))
        self.server.asked.append(request)
        if b"Basic dXNlcjpwQHNz" not in request:
            self.wfile.write(b"HTTP/1.1 407 Who are you?\r\n\r\n")
            return
        host, port = request.split()[1].decode().split(":")
        with socket.create_connection((host, int(port))) as there:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            ends = {self.connection: there, there: self.connection}
            while True:
                for ready in select.select([*ends], [], [], 20)[0]:
                    octets = ready.recv(65536)
                    if not octets:
                        return
                    ends[ready].sendall(octets)


class Tunnelled(Authorized):
    proxy: str

    @property
    def environment(self) -> dict[str, str]:
        names = ("https_proxy", "HTTPS_PROXY")
        return super().environment | dict.fromkeys(names, self.proxy) | {"no_proxy": "", "NO_PROXY": ""}


def test_a_provider_behind_a_proxy(tmp_path: Path, provider: OauthProvider, options: list[str]) -> None:
    with Tunnel() as tunnel:
        thread = threading.Thread(target=tunnel.serve_forever, args=(0.02,))
        thread.start()
        address = f"127.0.0.1:{tunnel.server_address[1]}"
        commands = Tunnelled(tmp_path)
        object.__setattr__(commands, "provider", provider)
        object.__setattr__(commands, "proxy", f"http://user:p%40ss@{address}")
        commands.run("account", "add", "anna", "pop3s://anna@localhost", "--password-env", "PASSWORD")
        commands.run("account", "authorize", "anna", "--client-credentials", *options)
        object.__setattr__(commands, "proxy", f"http://user:wrong@{address}")
        with pytest.raises(TryLater, match="407") as caught:
            commands.run("account", "authorize", "anna", "--client-credentials", *options)
        tunnel.shutdown()
        thread.join()
    assert "wrong" not in str(caught.value)
    assert [request.split()[0] for request in tunnel.asked] == [b"CONNECT", b"CONNECT"]
    assert SECRET.encode() not in b"".join(tunnel.asked)


# Another key.


class Rekeyed(Authorized):
    key: str

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"ARCHIVER_SECRET_KEY": self.key}


def test_the_key_is_changed_and_the_old_one_dropped(
    commands: Authorized, server: Dovecot, provider: OauthProvider, options: list[str]
) -> None:
    provider.at_once = USER
    add(commands, server, "--password-env", "PASSWORD")
    commands.run("account", "authorize", "anna", *options)
    for number in range(3):
        url = f"pop3s://user{number}@localhost"
        commands.run("account", "add", f"user{number}", url, "--password-stdin", stdin=b"secret")
    commands.run("account", "add", "file", "pop3s://file@localhost", "--password-env", "PASSWORD")

    def keyed(key: str) -> Rekeyed:
        made = Rekeyed(commands.directory)
        object.__setattr__(made, "provider", provider)
        object.__setattr__(made, "key", key)
        return made

    both = keyed(f"{OTHER_KEY},{KEY}")
    assert both.json("account", "reseal") == [{"resealed": 4, "current": 0, "unsealed": 1, "failed": 0}]
    assert both.json("account", "reseal") == [{"resealed": 0, "current": 4, "unsealed": 1, "failed": 0}]
    new = keyed(OTHER_KEY)
    [report] = new.json("sync", "anna")
    assert report["outcome"] == "ok"
    [failed] = commands.json("account", "reseal", code=1)
    assert failed["failed"] == 4

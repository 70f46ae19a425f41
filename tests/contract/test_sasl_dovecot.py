"""Every way to log in that a real Dovecot knows, and what it says to those who may not."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from archiver.demo import dovecot as demo_dovecot
from archiver.demo.dovecot import Dovecot
from archiver.pop3 import Endpoint, FailureKind, Mailbox, Pop3Error, Tls, TlsSettings
from tests.conftest import require
from tests.harness.certificates import client_certificate

pytestmark = [pytest.mark.dovecot, pytest.mark.xdist_group("sasl")]

USER, PASSWORD = "anna", "correct horse, battery=staple"
TOKEN = "an.access.token-" + "t" * 400
MECHANISMS = "plain login cram-md5 apop scram-sha-1 scram-sha-256 oauthbearer xoauth2 external"
BY_PASSWORD = ["PLAIN", "LOGIN", "CRAM-MD5", "SCRAM-SHA-1", "SCRAM-SHA-256", "+LOGIN", "+APOP"]


class TokenInfo(BaseHTTPRequestHandler):
    """Tells whose token it is, as Dovecot's ``tokeninfo_url`` asks for it: by GET, the token at its end."""

    def do_GET(self) -> None:
        known = parse_qs(urlsplit(self.path).query).get("access_token") == [TOKEN]
        answer = json.dumps({"username": USER} if known else {"error": "invalid_token"}).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def tokens() -> Iterator[str]:
    """The address of the token service."""
    with HTTPServer(("127.0.0.1", 0), TokenInfo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/?access_token="
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def client(server_directory: Path) -> tuple[Path, Path]:
    """The user's certificate and its key."""
    return client_certificate(server_directory, USER)


@pytest.fixture(scope="module")
def server(server_directory: Path, tokens: str, client: tuple[Path, Path]) -> Iterator[Dovecot]:
    require(demo_dovecot.unavailable(server_directory))
    oauth2 = server_directory / "oauth2.conf"
    oauth2.write_text(f"tokeninfo_url = {tokens}\nusername_attribute = username\n")
    oauth2.chmod(0o644)
    settings = f"""\
auth_mechanisms = {MECHANISMS}
passdb {{
  driver = oauth2
  mechanisms = xoauth2 oauthbearer
  args = {oauth2}
}}
"""
    ca_file, _ = client
    settings += f"""\
ssl_ca = <{ca_file}
ssl_verify_client_cert = yes
ssl_require_crl = no
auth_ssl_username_from_cert = yes
passdb {{
  driver = static
  mechanisms = external
  args = nopassword
}}
"""
    with Dovecot(server_directory / "sasl", {USER: PASSWORD}, extra_settings=settings) as dovecot:
        yield dovecot


@contextmanager
def session(
    server: Dovecot, mechanism: str | None, tls: Tls = Tls.IMPLICIT, user: str = USER
) -> Iterator[Mailbox]:
    port = server.pop3s_port if tls is Tls.IMPLICIT else server.pop3_port
    endpoint = Endpoint(server.host, port, tls, user, mechanism)
    with Mailbox.connect(endpoint, tls_settings=TlsSettings(ca_file=server.ca_file)) as mailbox:
        yield mailbox


@pytest.mark.parametrize("tls", list(Tls), ids=lambda tls: tls.value)
@pytest.mark.parametrize("mechanism", BY_PASSWORD)
def test_every_way_by_password_leads_to_the_mailbox(server: Dovecot, mechanism: str, tls: Tls) -> None:
    with session(server, mechanism, tls) as mailbox:
        mailbox.login(PASSWORD)
        assert mailbox.facts.mechanism == {"+LOGIN": "USER/PASS", "+APOP": "APOP"}.get(mechanism, mechanism)
        assert mailbox.list().entries == ()
        mailbox.quit()


@pytest.mark.parametrize("tls", list(Tls), ids=lambda tls: tls.value)
def test_the_strongest_is_taken_unasked(server: Dovecot, tls: Tls) -> None:
    with session(server, None, tls) as mailbox:
        mailbox.login(PASSWORD)
        assert mailbox.facts.mechanism == "SCRAM-SHA-256"
        mailbox.quit()


@pytest.mark.parametrize("mechanism", [None, *BY_PASSWORD])
def test_a_wrong_password_is_refused_by_every_way(server: Dovecot, mechanism: str | None) -> None:
    with session(server, mechanism) as mailbox, pytest.raises(Pop3Error) as caught:
        mailbox.login("hunter2")
    assert caught.value.kind is FailureKind.AUTH
    assert "hunter2" not in str(caught.value)


def test_an_unknown_user_is_refused(server: Dovecot) -> None:
    with session(server, None, user="nobody-is-called-so") as mailbox, pytest.raises(Pop3Error) as caught:
        mailbox.login(PASSWORD)
    assert caught.value.kind is FailureKind.AUTH


def test_a_user_whose_password_is_kept_as_a_hash_gets_in_by_plain(
    server: Dovecot, server_directory: Path
) -> None:
    """Dovecot offers SCRAM to all, and can check it only where it keeps the password, or SCRAM's keys."""
    server.add_user("hashed", PASSWORD)
    digest = base64.b64encode(hashlib.sha256(PASSWORD.encode()).digest()).decode()
    (server_directory / "sasl" / "users" / "hashed").write_text(f"hashed:{{SHA256}}{digest}::::::\n")
    with session(server, None, user="hashed") as mailbox:
        mailbox.login(PASSWORD)
        assert mailbox.facts.mechanism == "PLAIN"
    with session(server, None, user="hashed") as mailbox, pytest.raises(Pop3Error) as caught:
        mailbox.login("hunter2")
    assert caught.value.kind is FailureKind.AUTH


@pytest.mark.parametrize("mechanism", ["XOAUTH2", "OAUTHBEARER"])
def test_an_access_token_leads_to_the_mailbox(server: Dovecot, mechanism: str) -> None:
    with session(server, mechanism) as mailbox:
        mailbox.login(TOKEN)
        assert mailbox.facts.mechanism == mechanism
        mailbox.quit()


@pytest.mark.parametrize("mechanism", ["XOAUTH2", "OAUTHBEARER"])
def test_g13_a_token_that_is_refused_ends_in_an_error_and_not_in_silence(
    server: Dovecot, mechanism: str
) -> None:
    token = TOKEN.replace("access", "another")
    with session(server, mechanism) as mailbox, pytest.raises(Pop3Error) as caught:
        mailbox.login(token)
    assert caught.value.kind is FailureKind.AUTH
    assert "the server refused the access token (" in str(caught.value)
    assert token not in str(caught.value)


@contextmanager
def session_with_certificate(server: Dovecot, client: tuple[Path, Path], user: str) -> Iterator[Mailbox]:
    certificate, key = client
    settings = TlsSettings(ca_file=server.ca_file, client_certificate=certificate, client_key=key)
    endpoint = Endpoint(server.host, server.pop3s_port, Tls.IMPLICIT, user, "EXTERNAL")
    with Mailbox.connect(endpoint, tls_settings=settings) as mailbox:
        yield mailbox


def test_a_certificate_leads_to_the_mailbox_of_its_user(server: Dovecot, client: tuple[Path, Path]) -> None:
    with session_with_certificate(server, client, USER) as mailbox:
        mailbox.login("")
        assert mailbox.facts.mechanism == "EXTERNAL"
        mailbox.quit()


def test_a_certificate_leads_to_no_other_mailbox(server: Dovecot, client: tuple[Path, Path]) -> None:
    """The URL's user is named; without, the server would open the mailbox that the certificate names."""
    with session_with_certificate(server, client, "berta") as mailbox, pytest.raises(Pop3Error) as caught:
        mailbox.login("")
    assert caught.value.kind is FailureKind.AUTH


def test_external_without_a_certificate_is_refused(server: Dovecot) -> None:
    with session(server, "EXTERNAL") as mailbox, pytest.raises(Pop3Error) as caught:
        mailbox.login("")
    assert caught.value.kind is FailureKind.AUTH
    assert "client certificate" in str(caught.value)

"""TLS of a real Dovecot: pins, an obsolete version, client certificates."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from archiver.demo import dovecot as demo_dovecot
from archiver.demo.dovecot import Dovecot
from archiver.pop3 import FailureKind, Mailbox, Pop3Error, Tls, TlsSettings, parse_url
from tests.conftest import Mailbox as Box
from tests.conftest import require
from tests.harness.certificates import certificate_sha256, client_certificate, key_sha256

pytestmark = [pytest.mark.dovecot, pytest.mark.xdist_group("tls")]

USER, PASSWORD = "ann", "secret of ann"
MESSAGE = b"Subject: tls\r\n\r\nprivate\r\n"


def fetch(url: str, password: str, settings: TlsSettings) -> tuple[str | None, int]:
    """A whole session; the version of TLS, and how many messages there are."""
    with Mailbox.connect(parse_url(url), tls_settings=settings) as client:
        client.login(password)
        count = len(client.list().entries)
        client.quit()
        return client.facts.tls_version, count


def refusal(url: str, settings: TlsSettings) -> Pop3Error:
    with pytest.raises(Pop3Error) as caught:
        fetch(url, PASSWORD, settings)
    return caught.value


@pytest.mark.parametrize("tls", [Tls.IMPLICIT, Tls.STARTTLS])
def test_a_pin_of_the_certificate_or_of_its_key(mailbox: Callable[..., Box], tls: Tls) -> None:
    box = mailbox([MESSAGE])
    url = box.url if tls is Tls.IMPLICIT else f"pop3://{box.user}@127.1:{box.server.pop3_port}"
    for pin in (certificate_sha256(box.ca_file), key_sha256(box.ca_file)):
        pins = frozenset({pin, "00" * 32})
        assert fetch(url, box.password, TlsSettings(pins=pins))[1] == 1
    error = refusal(url, TlsSettings(pins=frozenset({"00" * 32}), ca_file=box.ca_file))
    assert error.kind is FailureKind.SECURITY


@pytest.fixture(scope="module")
def old(server_directory: Path) -> Iterator[Dovecot]:
    """A Dovecot whose OpenSSL was configured when TLS 1.1 was the newest."""
    directory = server_directory / "old"
    require(demo_dovecot.unavailable(server_directory))
    directory.mkdir()
    configuration = directory / "openssl.cnf"
    configuration.write_text(
        "openssl_conf = settings\n[settings]\nssl_conf = ssl\n[ssl]\nsystem_default = all\n"
        "[all]\nMinProtocol = TLSv1\nMaxProtocol = TLSv1.1\nCipherString = DEFAULT:@SECLEVEL=0\n"
    )
    settings = (
        f"import_environment = OPENSSL_CONF={configuration}\n"
        "ssl_min_protocol = TLSv1\nssl_cipher_list = DEFAULT:@SECLEVEL=0\n"
    )
    with Dovecot(directory, {USER: PASSWORD}, extra_settings=settings) as server:
        server.deliver(USER, [MESSAGE])
        yield server


def test_an_old_server_is_archived_where_that_is_allowed(old: Dovecot) -> None:
    trusting = TlsSettings(ca_file=old.ca_file)
    error = refusal(old.url(USER), trusting)
    assert "a server without TLS 1.2 may disconnect like this" in str(error), "it sends no alert"
    for minimum in ("1.0", "1.1"):
        found = fetch(old.url(USER), PASSWORD, replace(trusting, minimum_version=minimum))
        assert found == ("TLSv1.1", 1)


@pytest.fixture(scope="module")
def demanding(server_directory: Path) -> Iterator[Dovecot]:
    """A Dovecot that refuses every login without a certificate that it trusts."""
    directory = server_directory / "demanding"
    require(demo_dovecot.unavailable(server_directory))
    directory.mkdir()
    certificate, _ = client_certificate(directory)
    settings = (
        f"ssl_ca = <{certificate}\nssl_require_crl = no\n"
        "ssl_verify_client_cert = yes\nauth_ssl_require_client_cert = yes\n"
    )
    with Dovecot(directory, {USER: PASSWORD}, extra_settings=settings) as server:
        server.deliver(USER, [MESSAGE])
        yield server


def test_a_client_certificate_opens_the_door(demanding: Dovecot, tmp_path: Path) -> None:
    directory = demanding.ca_file.parent
    trusting = TlsSettings(ca_file=demanding.ca_file)
    known = replace(
        trusting, client_certificate=directory / "client.pem", client_key=directory / "client.key"
    )
    assert fetch(demanding.url(USER), PASSWORD, known)[1] == 1
    stranger, key = client_certificate(tmp_path, "stranger")
    for settings in (trusting, replace(trusting, client_certificate=stranger, client_key=key)):
        error = refusal(demanding.url(USER), settings)
        assert error.kind is FailureKind.AUTH
        assert "valid SSL certificate" in str(error), "it says so at the login"

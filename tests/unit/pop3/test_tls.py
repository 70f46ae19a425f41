"""Whom a channel trusts, how old it may be, and as whom it appears."""

import base64
import os
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from archiver.pop3 import FailureKind, Mailbox, Pop3Error, Tls, TlsSettings, parse_pin
from archiver.pop3.transport import tls_context
from tests.harness.certificates import certificate_sha256, client_certificate, key_sha256, self_signed
from tests.harness.scripted_pop3 import (
    Expect,
    HangUp,
    MailboxPlay,
    ScriptedPop3,
    Send,
    StartTls,
    Step,
    TlsMode,
)

OTHER_PIN = "0" * 64
HEX = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

Certificate = tuple[Path, Path]


@pytest.fixture(params=["implicit", "starttls"])
def mode(request: pytest.FixtureRequest) -> TlsMode:
    mode: TlsMode = request.param
    return mode


def server_context(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def old_context(certificate: Certificate, version: ssl.TLSVersion) -> ssl.SSLContext:
    """A server that speaks this version and nothing later."""
    context = server_context(certificate)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    if version < ssl.TLSVersion.TLSv1_2:
        with pytest.deprecated_call():
            context.maximum_version = version
    else:
        context.maximum_version = version
    return context


@contextmanager
def serving(context: ssl.SSLContext, mode: TlsMode = "implicit") -> Iterator[ScriptedPop3]:
    with ScriptedPop3(MailboxPlay([(b"uid-1", b"content\r\n")]), tls=mode, context=context) as server:
        yield server


def log_in(server: ScriptedPop3, settings: TlsSettings, host: str = "localhost") -> str | None:
    """A whole session; gives the version of TLS."""
    with Mailbox.connect(replace(server.endpoint, host=host), tls_settings=settings) as mailbox:
        mailbox.login("secret")
        mailbox.quit()
        return mailbox.facts.tls_version


def refusal(call: Callable[[], object]) -> Pop3Error:
    with pytest.raises(Pop3Error) as caught:
        call()
    return caught.value


def said(server: ScriptedPop3) -> list[bytes]:
    """The commands that the server received, except STLS."""
    return [line for line, _ in server.received if line != b"STLS"]


# Pins.


@pytest.mark.parametrize("digest", [certificate_sha256, key_sha256], ids=["certificate", "key"])
def test_a_pin_stands_for_chain_and_name(
    digest: Callable[[Path], str], certificate: Certificate, mode: TlsMode
) -> None:
    with serving(server_context(certificate), mode) as server:
        assert refusal(lambda: log_in(server, TlsSettings())).kind is FailureKind.OPERATOR
        settings = TlsSettings(pins=frozenset({digest(certificate[0])}))
        assert log_in(server, settings, host="127.1"), "by a name that the certificate has not"


def test_the_facts_of_a_pinned_certificate_are_as_complete(certificate: Certificate) -> None:
    pinned = TlsSettings(pins=frozenset({key_sha256(certificate[0])}))
    with serving(server_context(certificate)) as server:
        facts = []
        for settings in (pinned, TlsSettings(ca_file=certificate[0])):
            with Mailbox.connect(server.endpoint, tls_settings=settings) as mailbox:
                facts.append(mailbox.facts)
    assert facts[0] == facts[1]
    assert facts[0].certificate_not_after is not None
    assert facts[0].certificate_sha256 == certificate_sha256(certificate[0])


def test_nothing_is_said_to_a_server_whose_certificate_is_not_pinned(
    certificate: Certificate, mode: TlsMode
) -> None:
    """Though the authority that vouches for it is trusted."""
    settings = TlsSettings(ca_file=certificate[0], pins=frozenset({OTHER_PIN}))
    with serving(server_context(certificate), mode) as server:
        error = refusal(lambda: log_in(server, settings))
        assert said(server) == []
    assert error.kind is FailureKind.SECURITY
    assert certificate_sha256(certificate[0]) in str(error), "so that it can be compared"


def test_two_pins_carry_over_a_change_of_keys(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = self_signed(tmp_path / "old"), self_signed(tmp_path / "new")
    settings = TlsSettings(pins=frozenset({key_sha256(old[0]), key_sha256(new[0])}))
    for certificate in (old, new):
        with serving(server_context(certificate)) as server:
            assert log_in(server, settings)


@pytest.mark.parametrize(
    "text",
    [
        HEX,
        HEX.upper(),
        ":".join(HEX[i : i + 2] for i in range(0, 64, 2)),
        "sha256//" + base64.b64encode(bytes.fromhex(HEX)).decode(),
    ],
    ids=["hex", "upper case", "colons", "curl"],
)
def test_a_pin_may_be_written_in_several_ways(text: str) -> None:
    assert parse_pin(text) == HEX


@pytest.mark.parametrize(
    "text", ["", HEX[:-1], HEX + "0", f"{HEX}:", "g" * 64, "sha256//", "sha256//AAAA", "sha256//!!", "none"]
)
def test_what_is_no_pin(text: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        parse_pin(text)


@pytest.mark.parametrize(
    "choices",
    [
        {"minimum_version": "1.4"},
        {"minimum_version": "TLSv1"},
        {"client_key": Path("key.pem")},
        {"pins": frozenset({HEX.upper()})},
        {"pins": frozenset({"short"})},
        {"server_name": ""},
        {"server_name": ".example"},
        {"server_name": "x" * 64},
    ],
)
def test_choices_that_cannot_be(choices: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        TlsSettings(**choices)


# Certificates that do not pass verification.


def test_an_untrusted_certificate_is_shown_so_that_it_can_be_compared(
    certificate: Certificate, mode: TlsMode
) -> None:
    with serving(server_context(certificate), mode) as server:
        error = refusal(lambda: log_in(server, TlsSettings()))
        assert said(server) == []
        assert log_in(server, TlsSettings(pins=frozenset({error.certificate_sha256 or ""})))
    assert error.kind is FailureKind.OPERATOR
    assert re.search(
        rf"self-signed certificate \(subject \S.*, valid until \d{{4}}-\d\d-\d\d, "
        rf"SHA-256 {certificate_sha256(certificate[0])}\)",
        str(error),
    )


def test_a_server_that_does_not_show_its_certificate_again_is_refused_all_the_same(
    certificate: Certificate,
) -> None:
    first: list[Step] = [Send(b"+OK\r\n"), Expect(b"STLS\r\n"), Send(b"+OK\r\n"), StartTls()]
    scripts: list[list[Step]] = [first, [HangUp()]]
    with ScriptedPop3(scripts, tls="starttls", context=server_context(certificate)) as server:
        error = refusal(lambda: log_in(server, TlsSettings()))
    assert error.kind is FailureKind.OPERATOR
    assert error.certificate_sha256 is None


# Names.


def test_another_name_is_expected_and_asked_for(certificate: Certificate) -> None:
    asked: list[str | None] = []
    context = server_context(certificate)
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    trusting = TlsSettings(ca_file=certificate[0], server_name="localhost")
    with serving(context) as server:
        assert log_in(server, trusting, host="127.1")
        assert asked == ["localhost"]
        error = refusal(lambda: log_in(server, replace(trusting, server_name="pop.example.com")))
    assert error.kind is FailureKind.OPERATOR
    assert "pop.example.com" in str(error)


# Versions.

OLD = [(ssl.TLSVersion.TLSv1, "1.0", "TLSv1"), (ssl.TLSVersion.TLSv1_1, "1.1", "TLSv1.1")]


@pytest.mark.parametrize(("version", "allowed", "name"), OLD, ids=["1.0", "1.1"])
def test_an_old_server_is_spoken_to_only_where_that_is_allowed(
    version: ssl.TLSVersion, allowed: str, name: str, certificate: Certificate, mode: TlsMode
) -> None:
    with serving(old_context(certificate, version), mode) as server:
        error = refusal(lambda: log_in(server, TlsSettings(ca_file=certificate[0])))
        assert error.kind is FailureKind.OPERATOR
        assert "TLS 1.2 is required" in str(error)
        assert said(server) == []
        assert log_in(server, TlsSettings(ca_file=certificate[0], minimum_version=allowed)) == name


def test_what_is_allowed_is_no_less_than_what_is_said(certificate: Certificate) -> None:
    with serving(old_context(certificate, ssl.TLSVersion.TLSv1)) as server:
        error = refusal(lambda: log_in(server, TlsSettings(ca_file=certificate[0], minimum_version="1.1")))
        assert error.kind is FailureKind.OPERATOR
        assert said(server) == []
    with serving(old_context(certificate, ssl.TLSVersion.TLSv1_2)) as server:
        error = refusal(lambda: log_in(server, TlsSettings(ca_file=certificate[0], minimum_version="1.3")))
        assert error.kind is FailureKind.OPERATOR
        assert said(server) == []


def test_an_old_minimum_still_takes_the_best_and_still_verifies(certificate: Certificate) -> None:
    with serving(server_context(certificate)) as server:
        assert log_in(server, TlsSettings(ca_file=certificate[0], minimum_version="1.0")) == "TLSv1.3"
        assert (
            refusal(lambda: log_in(server, TlsSettings(minimum_version="1.0"))).kind is FailureKind.OPERATOR
        )


def test_an_old_server_need_not_know_secure_renegotiation() -> None:
    """Its hello has no extension (RFC 5746 came in 2010). Then it disconnects, before the handshake ends."""
    hello = b"\x03\x01" + bytes(32) + b"\0" + b"\x00\x2f" + b"\0"  # AES128-SHA, no compression
    handshake = b"\x02" + len(hello).to_bytes(3, "big") + hello
    record = b"\x16\x03\x01" + len(handshake).to_bytes(2, "big") + handshake
    with ScriptedPop3([[Send(record), HangUp()]]) as server:
        endpoint = replace(server.endpoint, tls=Tls.IMPLICIT)
        error = refusal(lambda: Mailbox.connect(endpoint, tls_settings=TlsSettings(minimum_version="1.0")))
    assert "renegotiation" not in str(error)
    assert "may disconnect like this" in str(error) or "reset" in str(error).lower()


# Client certificates.


def demanding(certificate: Certificate, client: Path, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = server_context(certificate)
    context.maximum_version = version
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(client)
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_sees_the_clients_certificate(
    version: ssl.TLSVersion, certificate: Certificate, tmp_path: Path
) -> None:
    client, key = client_certificate(tmp_path)
    stranger, strangers_key = client_certificate(tmp_path, "stranger")
    both = tmp_path / "both.pem"
    both.write_bytes(client.read_bytes() + key.read_bytes())
    trusting = TlsSettings(ca_file=certificate[0])
    with serving(demanding(certificate, client, version)) as server:
        assert log_in(server, replace(trusting, client_certificate=client, client_key=key))
        assert log_in(server, replace(trusting, client_certificate=both))
        told = len(said(server))
        for settings in (
            trusting,
            replace(trusting, client_certificate=stranger, client_key=strangers_key),
        ):
            error = refusal(partial(log_in, server, settings))
            assert error.kind is FailureKind.OPERATOR, str(error)
        assert len(said(server)) == told


def test_a_client_certificate_that_cannot_be_used(certificate: Certificate, tmp_path: Path) -> None:
    client, _ = client_certificate(tmp_path)
    locked, locked_key = client_certificate(tmp_path, "locked", passphrase=b"open sesame")
    choices: list[dict[str, Any]] = [
        {"client_certificate": tmp_path / "none.pem"},
        {"client_certificate": client, "client_key": tmp_path / "none.key"},
        {"client_certificate": client},
        {"client_certificate": locked, "client_key": locked_key},
        {"client_certificate": client, "client_key": locked_key},
    ]
    with serving(server_context(certificate)) as server:
        for choice in choices:
            settings = TlsSettings(ca_file=certificate[0], **choice)
            error = refusal(partial(log_in, server, settings))
            assert error.kind is FailureKind.OPERATOR, str(error)
            assert "client" in str(error)
        assert said(server) == []


# Contexts are costly, so they are shared; a change must not be missed for that.


def test_equal_settings_share_a_context_and_pins_do_not_part_them(certificate: Certificate) -> None:
    assert tls_context(TlsSettings()) is tls_context(TlsSettings(server_name="another.example"))
    assert tls_context(TlsSettings()) is not tls_context(TlsSettings(ca_file=certificate[0]))
    pinned = tls_context(TlsSettings(pins=frozenset({HEX})))
    assert pinned is tls_context(TlsSettings(pins=frozenset({OTHER_PIN}), ca_file=certificate[0]))
    assert pinned is not tls_context(TlsSettings()), "one that verifies nothing is for pins alone"


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    """Two authorities, one after the other in the same file, of the same length and age."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first, second = self_signed(tmp_path / "first"), self_signed(tmp_path / "second")
    trusted = tmp_path / "ca.pem"
    settings = TlsSettings(ca_file=trusted)
    for certificate in (first, second):
        new = tmp_path / "new.pem"
        new.write_bytes(certificate[0].read_bytes())
        os.utime(new, (0, 0))
        new.replace(trusted)
        with serving(server_context(certificate)) as server:
            assert log_in(server, settings)


def test_a_file_that_was_fixed_is_tried_again(certificate: Certificate, tmp_path: Path) -> None:
    trusted = tmp_path / "ca.pem"
    settings = TlsSettings(ca_file=trusted)
    trusted.write_text("no certificate\n")
    assert refusal(lambda: tls_context(settings)).kind is FailureKind.OPERATOR
    trusted.write_bytes(certificate[0].read_bytes())
    assert tls_context(settings)

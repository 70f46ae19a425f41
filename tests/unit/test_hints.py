"""From the client's failures and the server's facts to what an operator is told."""

from dataclasses import fields, replace

import pytest

from archiver import pop3
from archiver.errors import ArchiverError, MessageRefused, OperatorNeeded, TryLater
from archiver.model import Account
from archiver.poll.server import translated, warnings
from archiver.settings import Settings

ACCOUNT = Account("id", "sales", "pop3s://sales@localhost", "implicit", "env:NONE")

FACTS = pop3.ServerFacts(
    host="localhost",
    port=995,
    greeting="ready",
    capabilities=(),
    tls_version="TLSv1.3",
    cipher="TLS_AES_256_GCM_SHA384",
    certificate_sha256="00",
    certificate_not_after=None,
    mechanism="PLAIN",
    pipelining=True,
    bare_lf=False,
    login_delay_seconds=None,
    expire_days=None,
    utf8=False,
    implementation=None,
)


def translation(kind: pop3.FailureKind, limit: str | None) -> ArchiverError:
    with pytest.raises(ArchiverError) as caught, translated():
        raise pop3.Pop3Error(kind, "it failed", limit=limit)
    return caught.value


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (pop3.FailureKind.TRANSIENT, TryLater),
        (pop3.FailureKind.PROTOCOL, TryLater),
        (pop3.FailureKind.POISON, MessageRefused),
        (pop3.FailureKind.AUTH, OperatorNeeded),
        (pop3.FailureKind.SECURITY, OperatorNeeded),
        (pop3.FailureKind.OPERATOR, OperatorNeeded),
    ],
)
def test_each_kind_of_failure_has_its_class(kind: pop3.FailureKind, error: type[ArchiverError]) -> None:
    found = translation(kind, None)
    assert type(found) is error
    assert (found.hint is None) is (kind is not pop3.FailureKind.AUTH)


def test_refused_credentials_are_to_be_replaced() -> None:
    found = translation(pop3.FailureKind.AUTH, None)
    assert found.hint is not None
    assert "archiver account edit NAME --password-file FILE" in found.hint


def test_an_untrusted_certificate_may_be_pinned() -> None:
    with pytest.raises(OperatorNeeded) as caught, translated():
        raise pop3.Pop3Error(pop3.FailureKind.OPERATOR, "TLS failed", certificate_sha256="ab" * 32)
    assert caught.value.hint is not None
    assert caught.value.hint.endswith(f"archiver account edit NAME --tls-pin {'ab' * 32}")


def test_a_limit_that_was_exceeded_is_a_setting_to_raise() -> None:
    found = translation(pop3.FailureKind.POISON, "message_bytes")
    assert found.hint == "if that is right for this server, raise ARCHIVER_MESSAGE_BYTES"
    found = translation(pop3.FailureKind.TRANSIENT, "idle_seconds")
    assert found.hint is not None
    assert "ARCHIVER_IDLE_SECONDS, or the account's timeout" in found.hint


def test_every_limit_is_a_setting_of_its_name() -> None:
    limits = {field.name: field.default for field in fields(pop3.Limits) if field.name != "window"}
    assert limits.keys() <= Settings.model_fields.keys()


# Warnings: what is wrong though polls work.


def test_nothing_is_wrong_with_a_server_of_today() -> None:
    assert warnings(ACCOUNT, FACTS) == ()
    assert warnings(ACCOUNT, replace(FACTS, expire_days=30)) == ()
    assert warnings(replace(ACCOUNT, tls="none", tls_minimum="1.0"), replace(FACTS, tls_version=None)) == ()


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1.1"])
def test_an_old_tls_is_warned_of(version: str) -> None:
    [warning] = warnings(replace(ACCOUNT, tls_minimum="1.0"), replace(FACTS, tls_version=version))
    assert warning.startswith(f"{version} is broken")


def test_an_exception_that_is_no_longer_needed_is_warned_of() -> None:
    [warning] = warnings(replace(ACCOUNT, tls_minimum="1.1"), FACTS)
    assert "TLS 1.1 is allowed for this account and not needed" in warning


def test_a_server_that_removes_what_was_read_is_warned_of() -> None:
    [warning] = warnings(ACCOUNT, replace(FACTS, expire_days=0))
    assert "EXPIRE 0" in warning

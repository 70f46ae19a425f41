"""The border to the POP3 client: a mail server in the words of this project.

Turns the client's failures into this project's errors, once. Turns faults of a
server into sentences for operators. Chooses the facts for the journal.
"""

import contextlib
from collections.abc import Iterator

from archiver import pop3
from archiver.errors import MessageRefused, OperatorNeeded, TryLater
from archiver.model import Account, ServerRecord


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise the client's failures as this project's errors."""
    try:
        yield
    except pop3.Pop3Error as error:
        match error.kind:
            case pop3.FailureKind.TRANSIENT | pop3.FailureKind.PROTOCOL:
                raise TryLater(
                    str(error), hint=_how_to_raise(error.limit), wait_seconds=error.wait_seconds
                ) from error
            case pop3.FailureKind.POISON:
                raise MessageRefused(str(error), hint=_how_to_raise(error.limit)) from error
            case pop3.FailureKind.AUTH:
                raise OperatorNeeded(str(error), hint=_NEW_CREDENTIALS) from error
            case _:
                raise OperatorNeeded(str(error), hint=_how_to_pin(error.certificate_sha256)) from error


def warnings(account: Account, facts: pop3.ServerFacts) -> tuple[str, ...]:
    """Faults of this server, or of its settings here, although polls of it work. A pure function."""
    found = []
    if account.tls_minimum not in pop3.SAFE_TLS_VERSIONS and facts.tls_version is not None:
        old = facts.tls_version not in _SAFE_TLS_NAMES
        found.append(
            f"{facts.tls_version} is broken (RFC 8996): others may read the password and the mail"
            if old
            else f"TLS {account.tls_minimum} is allowed for this account and not needed: "
            f"the server speaks {facts.tls_version}; set its tls_minimum to 1.2"
        )
    if facts.expire_days == 0:
        found.append(
            "the server may remove messages once they are read (EXPIRE 0), whatever the deletion policy says"
        )
    return tuple(found)


_SAFE_TLS_NAMES = {f"TLSv{version}" for version in pop3.SAFE_TLS_VERSIONS}

_NEW_CREDENTIALS = (
    "set a new password: archiver account edit NAME --password-file FILE "
    "(with OAuth: archiver account authorize NAME)"
)

_OF_ACCOUNTS = frozenset({"connect_seconds", "greeting_seconds", "idle_seconds"})
"""Limits that an account's own timeout replaces."""


def _how_to_raise(limit: str | None) -> str | None:
    """The setting has the name of the client's limit. docs/reference/settings.md describes each."""
    if limit is None:
        return None
    own = ", or the account's timeout if it has one" if limit in _OF_ACCOUNTS else ""
    return f"if that is right for this server, raise ARCHIVER_{limit.upper()}{own}"


def _how_to_pin(certificate_sha256: str | None) -> str | None:
    if certificate_sha256 is None:
        return None
    return (
        "compare the SHA-256 with the one that the server's operator gives you; if they are equal, pin it: "
        f"archiver account edit NAME --tls-pin {certificate_sha256}"
    )


def of_facts(facts: pop3.ServerFacts) -> ServerRecord:
    """What the journal keeps of the server."""
    return ServerRecord(
        host=facts.host,
        port=facts.port,
        greeting=facts.greeting,
        mechanism=facts.mechanism,
        tls_version=facts.tls_version,
        cipher=facts.cipher,
        certificate_sha256=facts.certificate_sha256,
    )

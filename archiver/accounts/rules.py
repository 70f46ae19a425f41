"""What the settings of an account must agree on.

Owns the change of settings, and how they become what others work with: an
endpoint, TLS settings. Promises that an account which passed ``changed`` can be
polled as far as its settings go, and that an error names the account and never
repeats a secret. Leaves single values to ``fields``, and files that must exist
when a poll begins to the poll.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from archiver import pop3
from archiver.accounts.fields import BY_NAME
from archiver.errors import UsageError
from archiver.model import Account
from archiver.timetable import Timetable


def endpoint(url: str, tls: str | None) -> pop3.Endpoint:
    """The endpoint of a URL, with the TLS mode if one is given. Raises UsageError."""
    try:
        return pop3.parse_url(url, None if tls is None else pop3.Tls(tls))
    except pop3.UrlError as error:
        raise UsageError(str(error), hint="a URL looks like pop3s://you@mail.example.com") from None


def changed(account: Account, settings: Mapping[str, Any]) -> Account:
    """The account with these settings, by the names of their fields. Raises UsageError if they do not agree.

    Another URL brings its own TLS mode, unless one is given. Another client
    certificate drops the key of the last one, unless a key is given.
    """
    if "url" in settings or "tls" in settings:
        target = endpoint(settings.get("url", account.url), settings.get("tls"))
        settings = {**settings, "url": target.url, "tls": target.tls.value}
    if "client_certificate" in settings:
        settings = {"client_key": None, **settings}
    account = replace(account, **{BY_NAME[name].attribute: value for name, value in settings.items()})
    try:
        _tls_settings_of(account)
        Timetable.of(account)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return account


def tls_settings(account: Account) -> pop3.TlsSettings:
    """How this account's server is verified. Raises UsageError for settings that do not agree."""
    try:
        return _tls_settings_of(account)
    except ValueError as error:
        raise UsageError(f"account {account.name}: {error}") from None


def _tls_settings_of(account: Account) -> pop3.TlsSettings:
    return _tls_settings(
        account.ca_file,
        frozenset(account.tls_pins),
        account.tls_minimum,
        account.client_certificate,
        account.client_key,
        account.tls_server_name,
    )


# Few accounts differ in this, and each poll asks.
@lru_cache(maxsize=1024)
def _tls_settings(
    ca_file: str | None,
    pins: frozenset[str],
    minimum_version: str,
    client_certificate: str | None,
    client_key: str | None,
    server_name: str | None,
) -> pop3.TlsSettings:
    def path(name: str | None) -> Path | None:
        return None if name is None else Path(name)

    return pop3.TlsSettings(
        ca_file=path(ca_file),
        pins=pins,
        minimum_version=minimum_version,
        client_certificate=path(client_certificate),
        client_key=path(client_key),
        server_name=server_name,
    )

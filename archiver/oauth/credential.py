"""The credential that an account keeps in place of a password, to get access tokens.

A credential is a JSON document. The account's secret refers to it: ``oauth:``
and any reference that ``archiver.secrets`` knows (``oauth:sealed:...``,
``oauth:file:/path``, ``oauth:env:NAME``). Its fields decide the grant:

- with ``refresh_token``: a person's access (RFC 6749 section 6);
- with ``private_key``: a Google service account, which acts for each mailbox
  of its domain (RFC 7523). The key file is the document, as Google makes it;
- with neither: the application's own access (RFC 6749 section 4.4).

``provider`` (google or microsoft) stands for the endpoint and the scope of
that provider; for any other, ``token_endpoint`` and ``scope`` are given.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Final, Self
from urllib.parse import quote

from archiver.errors import OperatorNeeded, UsageError
from archiver.oauth.endpoint import Client
from archiver.outbound import check_url
from archiver.secrets import OAUTH

_FIELDS: Final = ("token_endpoint", "client_id", "client_secret", "refresh_token", "private_key", "scope")
_MOST_LABEL_CHARACTERS: Final = 253


def is_oauth(reference: str) -> bool:
    """Whether a secret reference leads to a credential, and not to a password."""
    return reference.startswith(OAUTH)


def reference_to(inner: str) -> str:
    """The reference to a credential that is where ``inner`` says."""
    return OAUTH + inner


@dataclass(frozen=True, slots=True)
class Provider:
    """The settings of a provider. ``{tenant}`` in an endpoint stands for a Microsoft tenant."""

    name: str
    token_endpoint: str
    scope: str
    """Of a person's access to a mailbox by POP3."""
    application_scope: str | None = None
    """Of an application's own access. Without it, access needs a person or a key."""
    device_endpoint: str | None = None
    consent_endpoint: str | None = None
    consent_parameters: tuple[tuple[str, str], ...] = ()

    def of(self, tenant: str) -> "Provider":
        """This provider for one tenant. Raises UsageError if that is not a tenant."""
        if not tenant or len(tenant) > _MOST_LABEL_CHARACTERS or quote(tenant, safe="") != tenant:
            raise UsageError(
                f"{tenant!r} is not a tenant: give its id, or a domain such as contoso.onmicrosoft.com"
            )
        return Provider(
            self.name,
            self.token_endpoint.replace("{tenant}", tenant),
            self.scope,
            self.application_scope,
            self.device_endpoint and self.device_endpoint.replace("{tenant}", tenant),
            self.consent_endpoint and self.consent_endpoint.replace("{tenant}", tenant),
            self.consent_parameters,
        )


GOOGLE: Final = Provider(
    name="google",
    token_endpoint="https://oauth2.googleapis.com/token",  # noqa: S106 - an address
    scope="https://mail.google.com/",
    consent_endpoint="https://accounts.google.com/o/oauth2/v2/auth",
    # A refresh token comes only so, and again only after consent was asked again.
    consent_parameters=(("access_type", "offline"), ("prompt", "consent")),
)
"""Google. Its device flow takes no scope of mail, so that a person consents by a browser:
https://developers.google.com/identity/protocols/oauth2/limited-input-device#allowedscopes,
https://developers.google.com/identity/protocols/oauth2/native-app. POP3 wants the scope of all mail:
https://developers.google.com/workspace/gmail/imap/xoauth2-protocol."""

MICROSOFT: Final = Provider(
    name="microsoft",
    token_endpoint="https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token",  # noqa: S106 - an address
    scope="https://outlook.office.com/POP.AccessAsUser.All offline_access",
    application_scope="https://outlook.office365.com/.default",
    device_endpoint="https://login.microsoftonline.com/{tenant}/oauth2/v2.0/devicecode",
    consent_endpoint="https://login.microsoftonline.com/{tenant}/oauth2/v2.0/authorize",
)
"""Microsoft 365 and Outlook.com. Scopes, and what an application needs besides (POP.AccessAsApp, a service
principal, a right to each mailbox):
https://learn.microsoft.com/exchange/client-developer/legacy-protocols/how-to-authenticate-an-imap-pop-smtp-application-by-using-oauth;
the endpoints: https://learn.microsoft.com/entra/identity-platform/v2-oauth2-device-code."""

PROVIDERS: Final = {provider.name: provider for provider in (GOOGLE, MICROSOFT)}

ANY_TENANT: Final = "common"


@dataclass(frozen=True, slots=True)
class Credential:
    """A credential. ``refresh_token`` and ``private_key`` decide which grant it is for."""

    token_endpoint: str
    client: Client
    scope: str
    refresh_token: str | None = field(default=None, repr=False)
    private_key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, document: str, account: str) -> Self:
        """Read a document. Raises OperatorNeeded, which names ``account`` and nothing from the document."""
        try:
            told = json.loads(document)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise OperatorNeeded(
                f"the OAuth credential of {account} is not a JSON object",
                hint=f"archiver account authorize {account}",
            )
        try:
            return cls._of(_of_google(told) if told.get("type") == "service_account" else _of_provider(told))
        except (ValueError, UsageError) as error:
            raise OperatorNeeded(
                f"the OAuth credential of {account} cannot be used: {error}",
                hint=f"docs/reference/oauth.md describes it; archiver account authorize {account} makes one",
            ) from None

    @classmethod
    def _of(cls, told: dict[str, Any]) -> Self:
        values: dict[str, str | None] = {}
        for name in _FIELDS:
            value = told.get(name)
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"its {name} is not text")
            values[name] = value
        if not (values["client_secret"] or values["refresh_token"] or values["private_key"]):
            raise ValueError("it has neither refresh_token nor client_secret")
        for name in ("token_endpoint", "client_id", "scope"):
            if values[name] is None:
                raise ValueError(f"it has no {name}, and no provider with a default")
        endpoint = check_url(values["token_endpoint"] or "")
        return cls(
            endpoint,
            Client(values["client_id"] or "", values["client_secret"]),
            values["scope"] or "",
            values["refresh_token"],
            values["private_key"],
        )

    def document(self) -> str:
        """The JSON document, as it is kept."""
        told = {
            "token_endpoint": self.token_endpoint,
            "client_id": self.client.id,
            "client_secret": self.client.secret,
            "scope": self.scope,
            "refresh_token": self.refresh_token,
            "private_key": self.private_key,
        }
        return json.dumps({name: value for name, value in told.items() if value is not None})

    def key(self, account_id: str, user: str) -> bytes:
        """The key for this credential's tokens in the cache. Credentials with the same key share tokens.

        An application's token is valid for every mailbox of its tenant. A
        person's refresh token is replaced for each account separately.
        """
        whose = account_id if self.refresh_token else user if self.private_key else ""
        return hashlib.sha256(json.dumps([self.document(), whose]).encode()).digest()


def _of_provider(told: dict[str, Any]) -> dict[str, Any]:
    """The document with what its provider implies."""
    if "provider" not in told:
        return told
    provider = PROVIDERS.get(str(told["provider"]))
    if provider is None:
        raise ValueError(f"its provider must be one of {', '.join(PROVIDERS)}")
    application = not told.get("refresh_token")
    if provider is MICROSOFT:
        if application and "tenant" not in told and "token_endpoint" not in told:
            raise ValueError("an application of Microsoft's needs a tenant, and it names no tenant")
        provider = provider.of(str(told.get("tenant", ANY_TENANT)))
    scope = provider.application_scope if application else provider.scope
    return {"token_endpoint": provider.token_endpoint, "scope": scope, **told}


def _of_google(told: dict[str, Any]) -> dict[str, Any]:
    """A service account's key, as Google makes it, with our field names."""
    return {
        "token_endpoint": told.get("token_uri", GOOGLE.token_endpoint),
        "client_id": told.get("client_email"),
        "private_key": told.get("private_key"),
        "scope": told.get("scope", GOOGLE.scope),
    }

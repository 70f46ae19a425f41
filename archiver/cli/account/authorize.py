"""``archiver account authorize``: access to a mailbox by OAuth instead of a password."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archiver.cli import lookup
from archiver.cli.opened import opened
from archiver.cli.output import Json, emit, note, quoted, say

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from archiver.bootstrap import App
    from archiver.model import Account
    from archiver.oauth import Credential, Poster, Provider
    from archiver.oauth.endpoint import Client
    from archiver.pop3 import Endpoint

BY_TOKEN = ("XOAUTH2", "OAUTHBEARER")
"""The ways to log in by an access token. Every mail provider supports the first one."""


def authorize(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The account's name.", show_default=False)],
    provider: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="google or microsoft. Sets endpoints and scope."),
    ] = None,
    client_id: Annotated[
        str | None, typer.Option(metavar="ID", help="The application's id, as registered with the provider.")
    ] = None,
    client_secret_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The application's secret, if it has one.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(metavar="ID", help="Microsoft: the tenant's id or domain.")
    ] = None,
    client_credentials: Annotated[
        bool,
        typer.Option(
            "--client-credentials", metavar="", help="The application's own access, without any person."
        ),
    ] = False,
    browser: Annotated[
        bool,
        typer.Option(
            "--browser", metavar="", help="By a browser, and not by a code. Google allows mail only so."
        ),
    ] = False,
    credential_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Use the credential in this file (JSON, such as a Google service account's key), "
            "read at each poll. It may serve many accounts.",
        ),
    ] = None,
    token_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Where tokens are had, for any other provider.")
    ] = None,
    device_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Where to request a device code (RFC 8628).")
    ] = None,
    consent_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="The page on which the user consents, in a browser.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(metavar="SCOPES", help="The scopes to request, separated by spaces.")
    ] = None,
    json: Json = False,
) -> None:
    """Give the archiver access to a mailbox by OAuth. No password is kept.

    Shows an address and a code: open the address, type the code, and log in as
    the mailbox's user. The credential is kept in the database, encrypted with
    ARCHIVER_SECRET_KEY, and is renewed automatically. --client-credentials and
    --credential-file work without a login. docs/how-to has the steps for
    Google and for Microsoft.
    """
    from archiver import oauth
    from archiver.errors import UsageError
    from archiver.oauth.endpoint import Client
    from archiver.secrets import from_file

    by_hand = [client_id, client_secret_file, provider, token_endpoint]
    if credential_file is not None and (client_credentials or browser or any(by_hand)):
        raise UsageError("--credential-file cannot be combined with other options")
    with opened() as app:
        account = lookup.active_account(app, name)
        endpoint = _by_token(account)
        poster = oauth.Poster()
        if credential_file is not None:
            file = credential_file.absolute()
            reference = oauth.reference_to(f"file:{file}")
            credential = oauth.Credential.parse(from_file(file, "OAuth credential"), name)
            _try(poster, credential, endpoint.user, name)
        else:
            if client_id is None:
                raise UsageError(
                    "--client-id is needed",
                    hint="docs/how-to/google.md and microsoft.md describe how to register one",
                )
            app.secrets.check_key()  # A missing key is reported before the login.
            secret = None if client_secret_file is None else from_file(client_secret_file, "client secret")
            theirs = _provider(
                provider, tenant, token_endpoint, device_endpoint, consent_endpoint, scope, client_credentials
            )
            client = Client(client_id, secret)
            if client_credentials:
                credential = _application(theirs, client)
                _try(poster, credential, endpoint.user, name)
            elif browser or theirs.device_endpoint is None:
                credential = _by_browser(poster, theirs, client, endpoint.user)
            else:
                credential = _by_device(poster, theirs, client, endpoint.user)
            sealed = app.secrets.seal(replace(account, url=endpoint.url), credential.document())
            reference = oauth.reference_to(sealed)
        _take(app, account, replace(account, url=endpoint.url, secret_reference=reference))
    if json:
        emit({"account": name, "url": endpoint.url, "scope": credential.scope})
        return
    say(f"{name} logs in by {endpoint.mechanism}")
    note(f"next, try it: archiver account check {quoted(name)}")


def _by_token(account: "Account") -> "Endpoint":
    """The account's endpoint, with a way to log in by a token. Raises UsageError if it names another."""
    from archiver.errors import UsageError
    from archiver.pop3 import Tls, Version, parse_url

    endpoint = parse_url(account.url, Tls(account.tls))
    if endpoint.version is not Version.POP3:
        raise UsageError(f"{account.name} uses POP2, which does not support access tokens")
    if endpoint.mechanism is None:
        return replace(endpoint, mechanism=BY_TOKEN[0])
    if endpoint.mechanism not in BY_TOKEN:
        raise UsageError(
            f"the URL of {account.name} requires {endpoint.mechanism}, which is not a login by OAuth",
            hint=f"give it a URL without ;AUTH=: archiver account edit {quoted(account.name)} --url URL",
        )
    return endpoint


def _provider(
    name: str | None,
    tenant: str | None,
    token_endpoint: str | None,
    device_endpoint: str | None,
    consent_endpoint: str | None,
    scope: str | None,
    application: bool,
) -> "Provider":
    """The provider that the options describe. Raises UsageError."""
    from archiver.errors import UsageError
    from archiver.oauth import MICROSOFT, PROVIDERS, Provider
    from archiver.oauth.credential import ANY_TENANT
    from archiver.outbound import check_url

    known = PROVIDERS.get(name or "")
    if name is not None and known is None:
        raise UsageError(f"--provider {name} is unknown: use {' or '.join(PROVIDERS)}, or give the endpoints")
    if known is MICROSOFT:
        if application and tenant is None and token_endpoint is None:
            raise UsageError("--client-credentials with Microsoft needs --tenant")
        known = known.of(tenant or ANY_TENANT)
    elif tenant is not None:
        raise UsageError("--tenant is for --provider microsoft")
    if known is None and (token_endpoint is None or scope is None):
        raise UsageError("give --provider, or --token-endpoint and --scope")
    base = known or Provider("the provider", "", "")
    for endpoint in filter(None, (token_endpoint, device_endpoint, consent_endpoint)):
        try:
            check_url(endpoint)
        except ValueError as error:
            raise UsageError(f"{endpoint!r}: {error}") from None
    return replace(
        base,
        token_endpoint=token_endpoint or base.token_endpoint,
        device_endpoint=device_endpoint or base.device_endpoint,
        consent_endpoint=consent_endpoint or base.consent_endpoint,
        scope=scope or base.scope,
        application_scope=scope or base.application_scope,
    )


def _application(provider: "Provider", client: "Client") -> "Credential":
    from archiver.errors import UsageError
    from archiver.oauth import Credential

    if provider.application_scope is None:
        raise UsageError(
            f"{provider.name} does not allow access to mail by an application's secret alone",
            hint="give a service account's key: --credential-file FILE",
        )
    if client.secret is None:
        raise UsageError("--client-credentials needs --client-secret-file")
    return Credential(provider.token_endpoint, client, provider.application_scope)


def _try(poster: "Poster", credential: "Credential", user: str, name: str) -> None:
    """Check that the provider accepts it. Raises OperatorNeeded, TryLater."""
    import time

    from archiver.errors import OperatorNeeded
    from archiver.oauth.endpoint import Refusal
    from archiver.oauth.tokens import access_token, request

    try:
        access_token(request(poster, credential, user, now=time.time()), name)
    except Refusal as refusal:
        raise OperatorNeeded(f"the provider refused access: {refusal}") from None


def _by_device(poster: "Poster", provider: "Provider", client: "Client", user: str) -> "Credential":
    from archiver.oauth.consent import ask_device_code, await_device

    code = ask_device_code(poster, provider, client)
    note(f"open  {code.address}")
    note(f"type  {code.user_code}")
    note(f"and log in as {user}, or as another user with access to that mailbox")
    return await_device(poster, provider, client, code)


def _by_browser(poster: "Poster", provider: "Provider", client: "Client", user: str) -> "Credential":
    from archiver.oauth.consent import Browser

    with Browser(provider, client, user=user) as browser:
        note(f"open this in a browser, and log in as {user}:\n\n{browser.address}\n")
        note("The last page has an address that begins with http://127.0.0.1")
        note("If the browser runs on another machine and cannot show that page, paste its address here:")
        return browser.wait(poster, sys.stdin)


def _take(app: "App", former: "Account", account: "Account") -> None:
    """Keep the credential, and poll again, unless the account was paused by hand."""
    from archiver.db import accounts, schedule
    from archiver.states import AccountState

    def work(connection: "Connection") -> None:
        accounts.change(connection, account, app.now(), former=former)
        if account.state is not AccountState.PAUSED:
            schedule.resume(connection, account.id)

    app.database.transact(work)

"""``archiver account add`` and ``edit``: the settings of an account."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from archiver.accounts.fields import BY_NAME, Group
from archiver.cli import lookup, options
from archiver.cli.account.authorize import BY_TOKEN
from archiver.cli.lookup import Name
from archiver.cli.opened import opened
from archiver.cli.output import Json, emit, note, quoted, say
from archiver.secrets import NONE, OAUTH, PROMPT, is_sealed
from archiver.states import AccountState

if TYPE_CHECKING:
    from archiver.bootstrap import App
    from archiver.model import Account

EVERY_GROUP = (Group.CONNECTION, Group.DELETION, Group.SCHEDULE)

WITHOUT_PASSWORD = {"EXTERNAL": NONE, "GSSAPI": NONE} | dict.fromkeys(BY_TOKEN, PROMPT)
"""The reference to keep where the URL fixes such a login and no password is named."""


@options.account_options(*EVERY_GROUP)
def add(
    name: Name,
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Such as pop3s://you@mail.example.com", show_default=False)
    ],
    given: options.Given,
    json: Json = False,
) -> None:
    """Add a mailbox that `archiver run` polls from now on.

    With --password-file or --password-env, the password is read at each poll.
    A password that you type, or give on standard input, is kept in the database,
    encrypted with ARCHIVER_SECRET_KEY. URLs with ;AUTH=EXTERNAL or ;AUTH=GSSAPI
    need no password.
    """
    from archiver.db import accounts
    from archiver.errors import UsageError
    from archiver.model import Account

    endpoint = given.endpoint(url)
    try:
        BY_NAME["name"].kind.read(name)
    except ValueError as error:
        raise UsageError(f"{name!r} cannot be an account's name: {error}") from None
    given.check_password()
    with opened() as app:
        new = Account(
            id=_id_for(app, name),
            name=name,
            url="",
            tls="",
            secret_reference="",
            interval_seconds=app.settings.interval_seconds,
        )
        new = given.applied_to(new, url=url)
        if endpoint.mechanism in WITHOUT_PASSWORD and not given.names_password:
            new = replace(new, secret_reference=WITHOUT_PASSWORD[endpoint.mechanism])
        else:
            new = replace(new, secret_reference=_secret(app, new, given))
        app.make_database()
        kept = app.database.transact(lambda connection: accounts.add(connection, new, app.now()))
    if json:
        emit({"account": kept.name, "id": kept.id, "url": kept.url})
    else:
        say(f"{kept.name} will be archived from {kept.url}")
        next_step = "authorize" if kept.secret_reference == PROMPT else "check"
        wanted = "next, give it access" if kept.secret_reference == PROMPT else "next, try it"
        note(f"{wanted}: archiver account {next_step} {quoted(kept.name)}")


@options.account_options(*EVERY_GROUP)
def edit(
    name: Name,
    given: options.Given,
    url: Annotated[str | None, typer.Option(metavar="URL", help="The mailbox's new address.")] = None,
    forget_quirks: Annotated[
        bool,
        typer.Option("--forget-quirks", metavar="", help="Try commands again at which the server failed."),
    ] = False,
) -> None:
    """Change an account's settings. Settings that you do not name stay as they are.

    A password in the database is kept for one server, user and TLS mode. If you
    change these, you are asked for the password again.
    """
    from archiver.db import accounts

    given.check_password()
    with opened() as app:
        former = lookup.active_account(app, name)
        account = given.applied_to(former, url=url)
        if given.reference() is not None or given.password_stdin:
            account = replace(account, secret_reference=_secret(app, account, given))
        elif is_sealed(former.secret_reference) and account.login != former.login:
            account = replace(account, secret_reference=_secret_for(app, account, given))
        if forget_quirks:
            account = replace(account, avoids=())
        app.database.transact(
            lambda connection: accounts.change(connection, account, app.now(), former=former)
        )
    say(f"{name} was changed")


def _id_for(app: "App", name: str) -> str:
    """A new account's id. A removed account keeps its own, to which its password will be bound."""
    from archiver.db import accounts
    from archiver.model import new_account_id

    if app.raw_database.exists:
        with app.database.reading() as connection:
            found = accounts.by_name(connection, name)
        if found is not None and found.state is AccountState.REMOVED:
            return found.id
    return new_account_id()


def _secret_for(app: "App", account: "Account", given: options.Given) -> str:
    """The reference to keep after the login changed for which the former secret was sealed."""
    if account.secret_reference.startswith(OAUTH):
        next_step = f"archiver account authorize {quoted(account.name)}"
        note(f"its OAuth credential was for the former login; next, give it access: {next_step}")
        return PROMPT
    return _secret(app, account, given)


def _secret(app: "App", account: "Account", given: options.Given) -> str:
    """The reference to keep: the given one, or the password itself, sealed."""
    reference = given.reference()
    if reference is not None:
        return reference
    app.secrets.check_key()  # A missing key is reported before the password is typed.
    password = options.from_stdin() if given.password_stdin else options.ask(account.name)
    return app.secrets.seal(account, password)

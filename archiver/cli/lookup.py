"""Accounts by the names that people type."""

from typing import TYPE_CHECKING, Annotated

import typer

from archiver.cli.output import quoted

if TYPE_CHECKING:
    from archiver.bootstrap import App
    from archiver.model import Account

Name = Annotated[str, typer.Argument(metavar="NAME", help="The account's name.", show_default=False)]


def account(app: "App", name: str) -> "Account":
    """The account of that name, removed or not. Raises UsageError if there is no such account."""
    from archiver.db import accounts
    from archiver.errors import UsageError

    with app.database.reading() as connection:
        found = accounts.by_name(connection, name)
    if found is None:
        raise UsageError(f"there is no account named {name}", hint="archiver account list")
    return found


def active_account(app: "App", name: str) -> "Account":
    """The account of that name. Raises UsageError if there is no such account, or it was removed."""
    from archiver.errors import UsageError
    from archiver.states import AccountState

    found = account(app, name)
    if found.state is AccountState.REMOVED:
        raise UsageError(f"{name} was removed", hint=f"archiver account add {quoted(name)} {found.url}")
    return found

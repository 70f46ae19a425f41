"""Accounts by the names that people type."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archiver.bootstrap import App
    from archiver.model import Account


def account(app: "App", name: str) -> "Account":
    """The account of that name, removed or not. Raises UsageError when there is none."""
    from archiver.db import accounts
    from archiver.errors import UsageError

    with app.database.reading() as connection:
        found = accounts.by_name(connection, name)
    if found is None:
        raise UsageError(f"there is no account named {name}", hint="archiver account list")
    return found


def active_account(app: "App", name: str) -> "Account":
    """The account of that name. Raises UsageError when there is none, or it was removed."""
    from archiver.errors import UsageError
    from archiver.states import AccountState

    found = account(app, name)
    if found.state is AccountState.REMOVED:
        raise UsageError(f"{name} was removed", hint=f"archiver account add {name} {found.url}")
    return found

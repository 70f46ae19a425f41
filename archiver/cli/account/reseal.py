"""``archiver account reseal``: the secrets in the database, encrypted with another key."""

from functools import partial
from typing import TYPE_CHECKING

import typer

from archiver.cli.opened import opened
from archiver.cli.output import Json, complain, emit, say

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from archiver.bootstrap import App
    from archiver.model import Account


ACCOUNTS_AT_ONCE = 200
"""Accounts in one transaction. It is short, so polls go on meanwhile."""


def reseal(json: Json = False) -> None:
    """Re-encrypt every password and credential in the database with the first key of ARCHIVER_SECRET_KEY.

    First set ARCHIVER_SECRET_KEY to NEW,OLD. After a run without errors you can
    remove OLD. Safe to repeat, and safe while the service runs. Exits with 1 if
    no key opens one of them.
    """
    from archiver.db import accounts

    counts = {"resealed": 0, "current": 0, "unsealed": 0, "failed": 0}
    with opened() as app:
        app.secrets.check_key()  # An unusable key is reported before anything is changed.
        after = ""
        while True:
            with app.database.reading() as connection:
                batch = accounts.page(connection, after, ACCOUNTS_AT_ONCE)
            if not batch:
                break
            after = batch[-1].name
            new: dict[str, tuple[str, str]] = {}
            for account in batch:
                counts[_look(app, account, new)] += 1
            app.database.transact(partial(_exchange, new=new))
    if json:
        emit(counts)
    else:
        say(f"{counts['resealed']} re-encrypted, {counts['current']} already used the current key")
        if not counts["failed"]:
            say("Older keys can now be removed.")
    if counts["failed"]:
        raise typer.Exit(1)


def _look(app: "App", account: "Account", new: dict[str, tuple[str, str]]) -> str:
    """The count to which one account belongs. A new reference for it goes to ``new``."""
    from archiver.errors import OperatorNeeded
    from archiver.secrets import is_sealed

    if not is_sealed(account.secret_reference):
        return "unsealed"
    try:
        resealed = app.secrets.resealed(account)
    except OperatorNeeded as error:
        complain(error)
        return "failed"
    if resealed is None:
        return "current"
    new[account.id] = (account.secret_reference, resealed)
    return "resealed"


def _exchange(connection: "Connection", *, new: dict[str, tuple[str, str]]) -> None:
    """Write them. A reference that was changed meanwhile stays: the first key sealed it."""
    from archiver.db import accounts

    for account_id, (old, resealed) in new.items():
        accounts.exchange_secret(connection, account_id, old, resealed)

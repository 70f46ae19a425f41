"""``archiver account reseal``: the database's secrets, sealed anew by another key."""

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
"""Accounts of one transaction, which is over in a moment: polls go on meanwhile."""


def reseal(json: Json = False) -> None:
    """Seal every password and credential in the database with the first key of ARCHIVER_SECRET_KEY.

    Set that to NEW,OLD before; when this says that nothing is left, OLD can
    go. Safe to repeat, and to run while polls go on. Exit code 1 when one
    could not be opened by any of the keys.
    """
    from archiver.db import accounts

    counts = {"resealed": 0, "current": 0, "unsealed": 0, "failed": 0}
    with opened() as app:
        app.secrets.check_key()  # A key that cannot be used is said before anything is done.
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
        say(f"{counts['resealed']} sealed anew, {counts['current']} were so already")
        if not counts["failed"]:
            say("the first key opens all; the others can go")
    if counts["failed"]:
        raise typer.Exit(1)


def _look(app: "App", account: "Account", new: dict[str, tuple[str, str]]) -> str:
    """What is to be said of one account; what is to be written for it goes to ``new``."""
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
    """Write them, each unless it was changed meanwhile: that is sealed by the first key already."""
    from archiver.db import accounts

    for account_id, (old, resealed) in new.items():
        accounts.exchange_secret(connection, account_id, old, resealed)

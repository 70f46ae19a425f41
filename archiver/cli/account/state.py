"""``archiver account pause``, ``resume``, ``poll`` and ``remove``: whether and when an account is polled."""

from typing import Annotated

import typer

from archiver.cli import lookup
from archiver.cli.lookup import Name
from archiver.cli.opened import opened
from archiver.cli.output import counted, quoted, say
from archiver.states import AccountState


def pause(name: Name) -> None:
    """Stop polling an account until you resume it. A running poll is finished first."""
    from archiver.db import schedule

    with opened() as app:
        account = lookup.active_account(app, name)
        app.database.transact(lambda connection: schedule.stop(connection, account.id, AccountState.PAUSED))
    say(f"{name} is paused")


def resume(name: Name) -> None:
    """Poll an account again, whether it was paused by hand or waits for an operator."""
    from archiver.db import schedule

    with opened() as app:
        account = lookup.active_account(app, name)
        app.database.transact(lambda connection: schedule.resume(connection, account.id))
    say(f"{name} is polled again")


def poll(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Accounts.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", metavar="", help="Every active account.")] = False,
) -> None:
    """Ask the running service to poll accounts now, whatever their schedule and back-off.

    Returns immediately. An account that is being polled is polled again right
    afterwards. Blackout windows, host back-off and per-host session limits still
    apply. To poll immediately in the foreground, use `archiver sync`.
    """
    from archiver.db import schedule
    from archiver.errors import UsageError

    if bool(names) == every:
        raise UsageError("name the accounts to poll, or give --all")
    with opened() as app:
        chosen = None if every else [lookup.active_account(app, name) for name in names or []]
        for account in chosen or []:
            if account.state is not AccountState.ACTIVE:
                raise UsageError(
                    f"{account.name} is {account.state}",
                    hint=f"archiver account resume {quoted(account.name)}",
                )
        ids = None if chosen is None else [account.id for account in chosen]
        asked = app.database.transact(lambda connection: schedule.ask(connection, ids))
    say(f"{counted(asked, 'account')} {'is' if asked == 1 else 'are'} due now")


def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", metavar="", help="Do not ask.")] = False,
) -> None:
    """Stop archiving an account and forget its password. Captured messages stay in the archive."""
    from archiver.db import accounts

    with opened() as app:
        account = lookup.account(app, name)
        if not yes:
            typer.confirm(f"Stop archiving {account.url}?", abort=True, err=True)
        app.database.transact(lambda connection: accounts.remove(connection, account.id, app.now()))
    say(f"{name} is no longer polled; its messages stay in the archive")

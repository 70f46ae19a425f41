"""``archiver db``: the database's schema."""

from typing import Annotated

import typer

from archiver.cli.opened import opened
from archiver.cli.output import Json, counted, emit, say

commands = typer.Typer(no_args_is_help=True, help="The database: its schema, upgrades, counts and history.")


@commands.command()
def upgrade(json: Json = False) -> None:
    """Upgrade the database to this release's schema. Safe to repeat, and to run several times at once."""
    from archiver.db import migrate

    with opened() as app:
        before, after = migrate.upgrade(app.raw_database)
        where = str(app.raw_database)
    if json:
        emit({"database": where, "before": before, "after": after})
    elif before == after:
        say(f"{where} already has schema {after}")
    else:
        say(f"{where} was upgraded from {'an empty database' if before is None else before} to {after}")


@commands.command()
def prune(
    days: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Keep the polls of the last N days. Default: ARCHIVER_HISTORY_DAYS.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Add polls to the totals of their days and remove old ones, as `archiver run` does every hour.

    Safe at any time. The totals of each day, and each account's latest poll, are
    kept permanently. Captures, the journal and the feed are not touched.
    """
    from archiver.db import history

    with opened() as app:
        keep_days = app.settings.history_days if days is None else days
        done = history.tidy(app.database, now=app.now(), keep_days=keep_days)
    if json:
        emit({"counted": done.counted, "removed": done.removed, "whole": done.whole})
    elif done.whole:
        added = counted(done.counted, "poll")
        say(f"{added} added to the totals of days, {done.removed} older than {keep_days} days removed")
    else:
        say("another process is doing this now")


@commands.command()
def recount(json: Json = False) -> None:
    """Recompute each account's message and byte totals, if `archiver verify` reports `miscounted`.

    Reads every capture's row. Polls may go on.
    """
    from functools import partial

    from archiver.db import accounts, requests

    with opened() as app:
        with app.database.reading() as connection:
            every = accounts.every(connection)
        corrected = [
            account.name
            for account in every
            if app.database.transact(partial(requests.recount, account_id=account.id))
        ]
    if json:
        emit({"accounts": len(every), "corrected": corrected})
    else:
        say(f"{counted(len(every), 'account')} counted, {len(corrected)} corrected")


@commands.command("catch-up")
def catch_up(json: Json = False) -> None:
    """After restoring a backup of the database, bring it up to date with the journals in the store.

    Each account's next poll then reads the journal segments that the database
    does not know. Run this before anything polls. At any other time it costs
    each account one request to the store.
    """
    from archiver.db import leases

    with opened() as app:
        marked = app.database.transact(leases.doubt_journals)
    if json:
        emit({"accounts": marked})
    else:
        say(f"{counted(marked, 'account')} will read the journal at the next poll")


@commands.command()
def current(json: Json = False) -> None:
    """Show the database's schema. Exits with 1 if it is not this release's."""
    from archiver.db import migrate

    with opened() as app:
        found = migrate.current(app.raw_database) if app.raw_database.exists else None
        wanted = migrate.latest()
        where = str(app.raw_database)
    if json:
        emit({"database": where, "current": found, "latest": wanted})
    else:
        say(f"{where} has {found or 'no schema'}; this release needs {wanted}")
    if found != wanted:
        raise typer.Exit(1)

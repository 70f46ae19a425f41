"""``archiver db``: the database's schema."""

from typing import Annotated

import typer

from archiver.cli.opened import opened
from archiver.cli.output import Json, emit, say

commands = typer.Typer(
    no_args_is_help=True, help="The database: its schema, the way up, and the history that it keeps."
)


@commands.command()
def upgrade(json: Json = False) -> None:
    """Bring the database to this release's schema. Safe to repeat, and to start several times at once."""
    from archiver.db import migrate

    with opened() as app:
        before, after = migrate.upgrade(app.raw_database)
        where = str(app.raw_database)
    if json:
        emit({"database": where, "before": before, "after": after})
    elif before == after:
        say(f"{where} has the schema {after} already")
    else:
        say(f"{where} went from {'an empty database' if before is None else before} to {after}")


@commands.command()
def prune(
    days: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Keep the polls of the last N days; ARCHIVER_HISTORY_DAYS unless given.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Add polls to their days and remove old ones, as `archiver run` does every hour. Safe at any time.

    What a day adds up to stays for good, and so does each account's newest
    poll. Captures, the journal and the feed are not touched.
    """
    from archiver.db import history

    with opened() as app:
        keep_days = app.settings.history_days if days is None else days
        done = history.tidy(app.database, now=app.now(), keep_days=keep_days)
    if json:
        emit({"counted": done.counted, "removed": done.removed, "whole": done.whole})
    elif done.whole:
        say(f"{done.counted} polls added to their days, {done.removed} older than {keep_days} days removed")
    else:
        say("another process is at it")


@commands.command()
def recount(json: Json = False) -> None:
    """Count anew what each account holds, where `archiver verify` calls it miscounted.

    Reads every capture's row; polls may go on.
    """
    from functools import partial

    from archiver.db import accounts, requests

    with opened() as app:
        with app.database.reading() as connection:
            every = accounts.every(connection)
        mended = [
            account.name
            for account in every
            if app.database.transact(partial(requests.recount, account_id=account.id))
        ]
    if json:
        emit({"accounts": len(every), "mended": mended})
    else:
        say(f"{len(every)} accounts were counted, {len(mended)} had been miscounted")


@commands.command("catch-up")
def catch_up(json: Json = False) -> None:
    """Have each account's next poll take in journal segments that the database does not know.

    For a database that was restored from a backup: the store may know more.
    Run it before anything polls; at any other time it costs each account a
    request to the store.
    """
    from archiver.db import leases

    with opened() as app:
        marked = app.database.transact(leases.doubt_journals)
    if json:
        emit({"accounts": marked})
    else:
        say(f"{marked} accounts will look at their journals before their next poll")


@commands.command()
def current(json: Json = False) -> None:
    """Show the schema that the database has. Exit code 1 when it is not this release's."""
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

"""``archiver db``: the database's schema."""

import typer

from archiver.cli.output import Json, emit, say

app = typer.Typer(no_args_is_help=True, help="The database's schema: which version it has, and the way up.")


@app.command()
def upgrade(json: Json = False) -> None:
    """Bring the database to this release's schema. Safe to repeat, and to start several times at once."""
    from archiver.bootstrap import Archiver
    from archiver.db import migrate
    from archiver.settings import load

    with Archiver(load()) as archiver:
        before, after = migrate.upgrade(archiver.raw_database)
        where = str(archiver.raw_database)
    if json:
        emit({"database": where, "before": before, "after": after})
    elif before == after:
        say(f"{where} has the schema {after} already")
    else:
        say(f"{where} went from {'an empty database' if before is None else before} to {after}")


@app.command()
def current(json: Json = False) -> None:
    """Show the schema that the database has. Exit code 1 when it is not this release's."""
    from archiver.bootstrap import Archiver
    from archiver.db import migrate
    from archiver.settings import load

    with Archiver(load()) as archiver:
        path = archiver.raw_database.path
        exists = path is None or path.exists()
        found = migrate.current(archiver.raw_database) if exists else None
        wanted = migrate.latest()
        where = str(archiver.raw_database)
    if json:
        emit({"database": where, "current": found, "latest": wanted})
    else:
        say(f"{where} has {found or 'no schema'}; this release needs {wanted}")
    if found != wanted:
        raise typer.Exit(1)

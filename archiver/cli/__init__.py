"""The command line: thin. Each module has the commands of one subject.

Exit codes: 0 all well; 1 something needs attention; 2 wrong use or wrong
settings, and nothing was touched. Errors of ours are one line on standard
error, and a hint. What a command needs is imported when the command runs, so
that help comes quickly.
"""

import sys
from typing import Annotated

import typer

from archiver import __version__
from archiver.cli import account, db, demo, feed, message, run, status, sync, verify
from archiver.cli.output import complain, say
from archiver.errors import ArchiverError, OperatorNeeded, UsageError

app = typer.Typer(
    name="archiver",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="See it work: [bold]archiver demo[/]. Your own mailbox: [bold]archiver sync pop3s://you@mail.example.com[/]",
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"archiver {__version__}")
        raise typer.Exit


@app.callback()
def archiver(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Capture every message of many POP3 mailboxes, byte for byte, into a directory or an S3 bucket.

    Where things lie is set by ARCHIVER_DATABASE_URL and ARCHIVER_STORE_URL;
    without them, in ./archive/.
    """


for module in (demo, sync, run, status, verify):
    module.register(app)
for name, module in (("account", account), ("message", message), ("feed", feed), ("db", db)):
    app.add_typer(module.commands, name=name)


def main() -> None:
    """Run the command line and exit."""
    try:
        app()
    except (OperatorNeeded, UsageError) as error:
        complain(error)
        sys.exit(2)
    except ArchiverError as error:
        complain(error)
        sys.exit(1)
    except BrokenPipeError:
        # The reader had enough (``| head``): no reason for a traceback, and
        # none for another one when Python flushes at its end.
        sys.stderr.close()
        sys.exit(1)

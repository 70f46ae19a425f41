"""The command line: thin. Each module has the commands of one subject.

Exit codes: 0 success; 1 something needs attention; 2 wrong use or wrong
settings, and nothing was touched. An expected error is one line on standard
error, with a hint. A command imports what it needs when it runs, so that
``--help`` stays fast.
"""

import errno
import sys
from typing import Annotated

import typer

from archiver import __version__
from archiver.cli import account, db, demo, feed, message, run, status, sync, verify
from archiver.cli.output import complain, drop_output, print_anything, say
from archiver.errors import ArchiverError, OperatorNeeded, UsageError

app = typer.Typer(
    name="archiver",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Try it: [bold]archiver demo[/]. Archive your mailbox: [bold]archiver sync pop3s://you@mail.example.com[/]",
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"archiver {__version__}")
        raise typer.Exit


@app.callback()
def archiver(
    _: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Archive every message of many POP3 mailboxes, byte for byte, in a directory or an S3 bucket.

    ARCHIVER_DATABASE_URL and ARCHIVER_STORE_URL say where the archive is.
    The default is ./archive/.
    """


for module in (demo, sync, run, status, verify):
    module.register(app)
for name, module in (("account", account), ("message", message), ("feed", feed), ("db", db)):
    app.add_typer(module.commands, name=name)


def main() -> None:
    """Run the command line and exit."""
    print_anything()
    try:
        try:
            app()
        finally:
            # Here, and not when Python ends: a full disk then has its exit code and its line.
            sys.stdout.flush()
    except (OperatorNeeded, UsageError) as error:
        complain(error)
        sys.exit(2)
    except ArchiverError as error:
        complain(error)
        sys.exit(1)
    except BrokenPipeError:
        # The reader has closed the pipe (``| head``), which needs no traceback.
        # Closing standard error prevents another one when Python flushes at exit.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise
        drop_output()
        complain(OperatorNeeded(f"cannot write to standard output: {error.strerror}"))
        sys.exit(1)

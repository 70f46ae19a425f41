"""``archiver message``: captured messages."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from archiver.cli import lookup, options
from archiver.cli.opened import opened
from archiver.cli.output import Json, emit, quoted, say, show, size, table

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from archiver.bootstrap import App
    from archiver.db.captures import Capture


commands = typer.Typer(
    no_args_is_help=True, help="Captured messages: list them, look at one, get its raw bytes."
)

SHORTEST_PREFIX = 6
DIGEST_DIGITS = 64

Which = Annotated[
    str,
    typer.Argument(
        metavar="CAPTURE", help="A capture's id, or the first digits of a SHA-256.", show_default=False
    ),
]


@commands.command("list")
def list_messages(
    account: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="List only this account's messages.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="List at most N messages.", show_default=False)
    ] = None,
    newest: Annotated[bool, typer.Option("--newest", metavar="", help="List the newest first.")] = False,
    json: Json = False,
) -> None:
    """List captured messages, the oldest first."""
    from archiver.db import captures
    from archiver.views.capture import capture_json

    with opened() as app, app.database.reading() as connection:
        account_id = None
        if account is not None:
            account_id = lookup.account(app, account).id
        rows = captures.listed(connection, account_id=account_id, limit=limit, newest=newest)
        if json:
            for row in rows:
                emit(capture_json(row))
            return
        made = table("account", "captured at", "size", "UIDL", "SHA-256", right=("size",))
        for row in rows:
            described = capture_json(row)
            made.add_row(
                row.account_name,
                f"{row.captured_at:%Y-%m-%d %H:%M:%S}",
                size(row.size),
                ascii(described["uidl"])[1:-1],
                described["sha256"][:16],
            )
    show(made)


@commands.command("show")
def show_message(capture: Which, json: Json = False) -> None:
    """Show where a message came from, and where it is stored."""
    from archiver.views.capture import capture_json

    with opened() as app:
        row = _find(app, capture)
        store = app.store.url
    described = capture_json(row) | {"store": store}
    if json:
        emit(described)
        return
    for name, value in described.items():
        say(f"{name:12} {ascii(value)[1:-1] if name == 'uidl' else value}")


@commands.command()
def get(capture: Which) -> None:
    """Write a message's raw bytes to standard output, and check their SHA-256.

    If they are not the bytes that were captured, they are written nevertheless,
    and the exit code is 1.
    """
    import hashlib

    from archiver.cli.output import note
    from archiver.model import message_key

    with opened() as app:
        row = _find(app, capture)
        digest = hashlib.sha256()
        with app.store.get(message_key(row.account_id, row.sha256)) as chunks:
            for chunk in chunks:
                digest.update(chunk)
                sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    if digest.digest() != row.sha256:
        note(f"archiver: these are not the bytes that were captured: their SHA-256 is {digest.hexdigest()}")
        raise typer.Exit(1)


@commands.command()
def retry(
    account: Annotated[
        str, typer.Argument(metavar="ACCOUNT", help="The account's name.", show_default=False)
    ],
    uidl: Annotated[
        str | None,
        typer.Option(
            metavar="UIDL",
            help="Only the message with this UIDL. Default: every message in quarantine.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Poll an account now, and fetch the messages in quarantine again.

    --uidl also fetches a captured message again, if the mail server still lists
    it. This restores an object that the store has lost. Exits with 1 if the
    poll fails.
    """
    from archiver.cli.sync import poll
    from archiver.db import requests
    from archiver.errors import UsageError
    from archiver.model import uidl_bytes

    with opened() as app:
        found = lookup.active_account(app, account)
        try:
            wanted = None if uidl is None else uidl_bytes(uidl)
        except UnicodeEncodeError:
            raise UsageError(
                f"{uidl!r} cannot be a UIDL", hint=f"archiver account show {quoted(account)} lists them"
            ) from None
        now = app.now()

        def mark(connection: "Connection") -> int:
            count = requests.retry_quarantined(connection, found.id, now, wanted)
            return count if wanted is None else count + requests.fetch_again(connection, found.id, wanted)

        if not app.database.transact(mark):
            what = (
                "nothing is in quarantine"
                if uidl is None
                else f"the mail server lists no message with UIDL {uidl!a}"
            )
            raise UsageError(f"{what} for {account}", hint=f"archiver account show {quoted(account)}")
    poll([account], options.Given({}), json=json)


def _find(app: "App", text: str) -> "Capture":
    """The capture with this id or digest. Raises UsageError."""
    from archiver.db import captures
    from archiver.errors import UsageError

    account_id, separator, digits = text.rpartition("-")
    digits = digits.lower()
    if not (SHORTEST_PREFIX <= len(digits) <= DIGEST_DIGITS and all(c in "0123456789abcdef" for c in digits)):
        raise UsageError(f"{text!r} is not the name of a capture", hint="archiver message list shows them")
    with app.database.reading() as connection:
        rows = captures.find(
            connection,
            sha256_from=bytes.fromhex(digits.ljust(DIGEST_DIGITS, "0")),
            sha256_to=bytes.fromhex(digits.ljust(DIGEST_DIGITS, "f")),
            account_id=account_id if separator else None,
        )
    if not rows:
        raise UsageError(f"there is no capture {text}", hint="archiver message list shows them")
    if len(rows) > 1:
        raise UsageError(
            f"{text} names several captures", hint="give more digits, or the whole id: ACCOUNT-SHA256"
        )
    return rows[0]

"""``archiver account deletable`` and ``allow-deletion``: which messages may be deleted from a mail server."""

from collections import Counter
from typing import Annotated, Any

import typer

from archiver.cli import lookup
from archiver.cli.lookup import Name
from archiver.cli.opened import opened
from archiver.cli.output import Json, emit, quoted, say, show, table

MESSAGES_SHOWN = 20

_WORDS = {
    "goes": "to delete at the next poll that lists them and verifies their objects",
    "never": "kept: the policy is never",
    "forbidden": "kept: ARCHIVER_FORBID_DELETION is set",
    "suspended": "kept: deletion is suspended for this account",
    "too_young": "kept: archived too recently for the policy",
    "quarantined": "kept: in quarantine",
    "to_come": "kept: not archived yet",
    "no_id": "kept: their UIDL does not identify them",
}


def deletable(
    name: Name,
    delete: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY", help="Assume this policy instead of the account's.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the messages that the next poll would ask the mail server to delete, and why it keeps the others.

    Covers the messages of the last listing, and connects to no server. Use
    --delete to try a policy before you set it.
    """
    from archiver import policy
    from archiver.db import sightings
    from archiver.errors import UsageError
    from archiver.model import UNKNOWN_SIZE, DeletePolicy, uidl_text

    with opened() as app:
        account = lookup.active_account(app, name)
        try:
            wanted = account.delete if delete is None else DeletePolicy.parse(delete)
        except ValueError as error:
            raise UsageError(str(error)) from None
        now = app.now()
        counts: Counter[str] = Counter()
        going: list[dict[str, Any]] = []
        with app.database.reading() as connection:
            for key, known in sightings.present(connection, account.id, account.epoch):
                verdict = policy.delete_verdict(
                    wanted,
                    state=known.state,
                    by_content=bool(key.content),
                    captured_at=known.first_seen_at,
                    suspended=account.deletion_suspended,
                    forbidden=app.settings.forbid_deletion,
                    now=now,
                )
                counts[verdict.value] += 1
                described = {
                    "uidl": uidl_text(key.uidl),
                    "size": None if key.size == UNKNOWN_SIZE else key.size,
                    "sha256": None if known.sha256 is None else known.sha256.hex(),
                    "since": known.first_seen_at,
                    "verdict": verdict.value,
                }
                if json:
                    emit(described)
                elif verdict is policy.DeletionVerdict.GOES and len(going) < MESSAGES_SHOWN:
                    going.append(described)
    if json:
        return
    say(f"{account.name}: delete {wanted}")
    if account.deletion_suspended is not None:
        say(f"  suspended: {account.deletion_suspended}")
        say(f"  to allow it again: archiver account allow-deletion {quoted(account.name)}")
    for word, count in sorted(counts.items()):
        say(f"  {count} {_WORDS[word]}")
    if going:
        made = table("UIDL", "size", "SHA-256", "since", right=("size",))
        for each in going:
            made.add_row(
                ascii(each["uidl"])[1:-1],
                "-" if each["size"] is None else str(each["size"]),
                str(each["sha256"])[:16],
                f"{each['since']:%Y-%m-%d %H:%M}",
            )
        show(made)
        if counts["goes"] > len(going):
            say(f"  and {counts['goes'] - len(going)} more: --json lists all")


def allow_deletion(name: Name) -> None:
    """Allow deletion again after a mailbox was renumbered. The account's policy then applies."""
    from archiver.db import requests

    with opened() as app:
        account = lookup.active_account(app, name)
        app.database.transact(lambda connection: requests.allow_deletion(connection, account.id))
    was = "was not suspended" if account.deletion_suspended is None else "is no longer suspended"
    say(f"deletion for {name} {was}; its policy is {account.delete}")

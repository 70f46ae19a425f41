"""``archiver verify``: objects, journal and database against each other."""

from typing import TYPE_CHECKING, Annotated

import typer

from archiver.cli.opened import opened
from archiver.cli.output import Json, console, counted, emit, say, size

if TYPE_CHECKING:
    from archiver.bootstrap import App
    from archiver.evidence.verify import Findings
    from archiver.model import Account

READERS = 8


def register(app: typer.Typer) -> None:
    app.command()(verify)


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ACCOUNT]...", help="Only these accounts. Default: every account.", show_default=False
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            metavar="",
            help="Compare names and sizes only; read no message. Other content of the same size passes.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Verify that nothing was lost or altered: compare objects, journal and database with each other.

    Every message is read from the store and hashed again. Missing: captured, but
    not in the store. Damaged: not the bytes that were captured. Chain breaks:
    the journal was cut or changed. Unrecorded: known to one of the three but not
    to another. Miscounted: `status` shows another number than there are
    captures. Changes nothing. Exits with 1 if it finds anything.
    """
    from archiver.db import accounts
    from archiver.errors import UsageError
    from archiver.evidence.verify import Findings

    findings = Findings()
    with opened() as app:
        with app.database.reading() as connection:
            chosen = accounts.every(connection)
        if names:
            missing = set(names) - {account.name for account in chosen}
            if missing:
                raise UsageError(f"there is no account named {min(missing)}", hint="archiver account list")
            chosen = [account for account in chosen if account.name in names]
        _verify(app, chosen, findings, every=not names, rehash=not quick, quiet=json)
    if json:
        emit(
            {
                "checked": findings.checked,
                "bytes": 0 if quick else findings.hashed_bytes,
                "segments": findings.segments,
                "missing": findings.missing,
                "damaged": findings.damaged,
                "chain_breaks": findings.chain_breaks,
                "unrecorded": findings.unrecorded,
                "miscounted": findings.miscounted,
                "findings": [finding._asdict() for finding in findings.named],
            }
        )
    else:
        _tell(findings, len(chosen), rehashed=not quick)
    if not findings.clean:
        raise typer.Exit(1)


def _verify(
    app: "App",
    chosen: "list[Account]",
    findings: "Findings",
    *,
    every: bool,
    rehash: bool,
    quiet: bool,
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from archiver.db import overview
    from archiver.evidence.verify import find_strays
    from archiver.evidence.verify import verify as verify_account

    if every:
        find_strays({account.id for account in chosen}, app.store, findings)
    with app.database.reading() as connection:
        # PostgreSQL takes 65,535 parameters, and there may be more accounts.
        states = overview.account_states(connection, None if every else [account.id for account in chosen])
    columns = (TextColumn("hashing again"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    target = console(stderr=True)
    with (
        ThreadPoolExecutor(READERS, thread_name_prefix="verify") as readers,
        Progress(*columns, console=target, disable=quiet or not target.is_terminal, transient=True) as bars,
    ):
        task = bars.add_task("", total=sum(int(state.captured_bytes) for state in states))
        for account in chosen:
            verify_account(
                account,
                app.database,
                app.store,
                findings,
                now=app.now(),
                readers=readers,
                rehash=rehash,
                scratch_directory=app.settings.spool_directory,
                progress=lambda found: bars.update(task, advance=found.size),
            )


def _tell(findings: "Findings", accounts: int, *, rehashed: bool) -> None:
    how = f"{size(findings.hashed_bytes)} hashed again" if rehashed else "sizes compared"
    for finding in findings.named:
        say(f"{finding.kind.replace('_', ' ')}: {finding.account}: {finding.key}: {finding.detail}")
    say(
        f"{counted(findings.checked, 'message')} ({how}) and "
        f"{counted(findings.segments, 'journal segment')} of {counted(accounts, 'account')}: "
        f"{findings.missing} missing, {findings.damaged} damaged, "
        f"{counted(findings.chain_breaks, 'chain break')}, {findings.unrecorded} unrecorded, "
        f"{findings.miscounted} miscounted"
    )

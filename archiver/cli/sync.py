"""``archiver sync``: poll now, once, with progress."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from archiver.accounts.fields import Group
from archiver.cli import options
from archiver.cli.opened import opened
from archiver.cli.output import Json, SyncProgress, emit, note, one_line, quoted, say, size
from archiver.errors import UsageError
from archiver.states import AccountState

SCHEMES = ("pop", "pops", "pop2", "pop3", "pop3s")

if TYPE_CHECKING:
    from archiver.bootstrap import App
    from archiver.model import Account, PollReport, StoppedBy
    from archiver.pop3 import Endpoint


def register(app: typer.Typer) -> None:
    app.command()(sync)


@options.account_options(Group.CONNECTION, Group.DELETION)
def sync(
    given: options.Given,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ACCOUNT|URL]...",
            help="Accounts by name, or URLs such as pop3s://you@mail.example.com. Default: every account.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Poll mailboxes now, once, and show what was archived.

    A URL needs no set-up: it becomes an account of that name, so the next sync
    of it fetches only new messages. Ignores the schedule and any back-off. Exits
    with 1 if a poll failed, or if messages remain that are not held back by the
    account's daily budget.
    """
    poll(targets or [], given, json=json)


def poll(targets: list[str], given: options.Given, *, json: bool) -> None:
    """Poll accounts and URLs now, or every account, and report. Exits with 1 where ``sync`` does."""
    from archiver.views.poll import report_json

    endpoints = {target: given.endpoint(target) for target in targets if "://" in target}
    options.log_quietly()
    with opened() as app:
        _check(app, targets, endpoints, given)
        app.open_archive()
        chosen = _choose(app, targets, endpoints, given)
        _ask_passwords(app, chosen, given, named=bool(targets))
        worker = app.worker
        worker.start_clock(claim=False)
        with SyncProgress(quiet=json) as progress:
            reports = worker.poll_now(chosen, progress.watch)
    for report in reports:
        if json:
            emit(report_json(report))
        else:
            _tell(report)
    if not chosen and not json:
        note("there is no account yet; add one: archiver account add NAME pop3s://you@mail.example.com")
    if app.stopping.is_set() or not all(map(is_done, reports)):
        raise typer.Exit(1)


def is_done(report: "PollReport") -> bool:
    """Whether all listed messages are archived or quarantined, or wait for another day by the budget."""
    return report.outcome == "ok" and (not report.to_come or report.stopped_by == "day")


def _check(app: "App", targets: list[str], endpoints: "dict[str, Endpoint]", given: options.Given) -> None:
    """Check the request before anything is created. Raises UsageError."""
    from archiver.db import accounts
    from archiver.model import Account
    from archiver.secrets import PROMPT

    if given.changes and not targets:
        raise UsageError(f"{given.changes} needs a URL to apply to", hint="archiver sync URL ...")
    given.check_password()
    with ExitStack() as stack:
        connection = None
        if app.raw_database.exists:
            connection = stack.enter_context(app.database.reading())
        for target in targets:
            endpoint = endpoints.get(target)
            if connection is None:
                found = None
            elif endpoint is None:
                found = accounts.by_name(connection, target)
            else:
                found = accounts.by_url(connection, endpoint.url)
            if endpoint is None and (found is None or found.state is AccountState.REMOVED):
                raise _no_such_account(target)
            if endpoint is None and given.changes:
                raise UsageError(
                    f"{given.changes} is for a URL, and {target} is an account",
                    hint=f"to change the account: archiver account edit {quoted(target)} {given.changes} ...",
                )
            if endpoint is not None:
                given.applied_to(found or Account("", target, "", "", PROMPT), url=target)
            unknown = found is None or found.secret_reference == PROMPT
            if unknown and given.reference() is None and not given.password_stdin:
                options.need_terminal(target)


def _no_such_account(target: str) -> UsageError:
    """The error for a name that is not an account's, with what was probably meant."""
    scheme, slash, rest = target.partition(":/")
    if slash and scheme.lower() in SCHEMES:
        meant = f"{scheme}://{rest.lstrip('/')}"
        return UsageError(f"{target} is not a URL: write {meant}")
    if "@" in target:
        hint = f"a mailbox that is not an account yet is given by its URL: pop3s://{target}"
        return UsageError(f"there is no account named {target}", hint=hint)
    return UsageError(f"there is no account named {target}", hint="archiver account list, or give a URL")


def _choose(
    app: "App", targets: list[str], endpoints: "dict[str, Endpoint]", given: options.Given
) -> "list[Account]":
    from archiver.db import accounts

    if not targets:
        with app.database.reading() as connection:
            active = accounts.all_active(connection)
        return [account for account in active if account.state is AccountState.ACTIVE]
    chosen: dict[str, Account] = {}
    for target in targets:
        if target in endpoints:
            account = _account_of(app, endpoints[target], given)
        else:
            with app.database.reading() as connection:
                found = accounts.by_name(connection, target)
            if found is None:
                raise _no_such_account(target)
            account = found
        chosen[account.id] = account
    return list(chosen.values())


def _account_of(app: "App", endpoint: "Endpoint", given: options.Given) -> "Account":
    """The account of a URL: a new one, or the existing one with the given settings."""
    from archiver.db import accounts
    from archiver.model import Account, new_account_id
    from archiver.secrets import PROMPT

    with app.database.reading() as connection:
        found = accounts.by_url(connection, endpoint.url)
    account = found or Account(
        id=new_account_id(),
        name=endpoint.url,
        url="",
        tls="",
        secret_reference=PROMPT,
        interval_seconds=app.settings.interval_seconds,
    )
    account = given.applied_to(account, url=endpoint.url)
    account = replace(account, secret_reference=given.reference() or account.secret_reference)
    if found is None:
        return app.database.transact(lambda connection: accounts.add(connection, account, app.now()))
    app.database.transact(lambda connection: accounts.change(connection, account, app.now(), former=found))
    return account


def _ask_passwords(app: "App", chosen: "list[Account]", given: options.Given, *, named: bool) -> None:
    """Ask for the passwords that are not kept, for this run only."""
    from archiver.secrets import PROMPT

    if given.password_stdin:
        password = options.from_stdin()
        app.passwords.update({account.id: password for account in chosen})
        return
    for account in chosen:
        if account.secret_reference == PROMPT and (named or sys.stdin.isatty()):
            app.passwords[account.id] = options.ask(account.name)


def _why_held_back(report: "PollReport") -> str:
    if report.stopped_by is None:
        return ""
    reasons: dict[StoppedBy, str] = {
        "session": "the session's budget or time is used up",
        "room": "other accounts are waiting",
        "blackout": "a blackout window began",
        "day": "the daily budget is used up",
    }
    return f" ({reasons[report.stopped_by]})"


def _tell(report: "PollReport") -> None:
    if report.outcome != "ok":
        say(f"{report.account}: {report.outcome.replace('_', ' ')}: {one_line(report.error)}")
        if report.hint:
            say(f"  hint: {one_line(report.hint)}")
    found = report.counts
    counts = [f"{found.new} new", f"{found.known} known"]
    if found.quarantined:
        counts.append(f"{found.quarantined} in quarantine")
    if report.to_come:
        counts.append(f"{report.to_come} to come{_why_held_back(report)}")
    if found.delete_requested:
        counts.append(f"{found.delete_requested} requested to be deleted")
    if found.deleted:
        counts.append(f"{found.deleted} deleted as requested")
    if found.gone:
        counts.append(f"{found.gone} no longer on the server")
    if found.lost:
        counts.append(f"{found.lost} lost: gone from the server before they were archived")
    if report.listed is not None:
        rate = f", {found.new / report.seconds:.0f}/s" if found.new and report.seconds else ""
        say(
            f"{report.account}: {report.listed} on the server: {', '.join(counts)}; "
            f"{size(found.fetched_bytes)} in {report.seconds:.1f} s{rate}"
        )
    for warning in report.warnings:
        say(f"  warning: {one_line(warning)}")

"""``archiver account``: the mailboxes that are archived."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archiver.accounts.fields import BY_NAME, Group, as_json
from archiver.cli import lookup, options
from archiver.cli.account.authorize import BY_TOKEN, authorize
from archiver.cli.account.check import check
from archiver.cli.account.deletion import allow_deletion, deletable
from archiver.cli.account.reseal import reseal
from archiver.cli.calendar import ScheduleShown
from archiver.cli.opened import opened
from archiver.cli.output import Json, ago, emit, note, one_line, say, show, size, table
from archiver.cli.status import LONGEST_DAYS, tell_days
from archiver.secrets import NONE, OAUTH, PROMPT
from archiver.states import AccountState

if TYPE_CHECKING:
    from datetime import datetime

    from archiver.bootstrap import App
    from archiver.db.overview import AccountStatus, PastPoll
    from archiver.model import Account
    from archiver.views.status import Ledger

commands = typer.Typer(
    no_args_is_help=True, help="The mailboxes that are archived: add, look, check, pause, remove."
)

EVERY_GROUP = (Group.CONNECTION, Group.DELETION, Group.SCHEDULE)

POLLS_SHOWN = 10

WITHOUT_PASSWORD = {"EXTERNAL": NONE, "GSSAPI": NONE} | dict.fromkeys(BY_TOKEN, PROMPT)
"""What is kept of an account that logs in so, where no password is named."""
DAYS_SHOWN = 7

Name = Annotated[str, typer.Argument(metavar="NAME", help="The account's name.", show_default=False)]


@commands.command()
@options.account_options(*EVERY_GROUP)
def add(
    name: Name,
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Such as pop3s://you@mail.example.com", show_default=False)
    ],
    given: options.Given,
    json: Json = False,
) -> None:
    """Add a mailbox that `archiver run` polls from now on.

    With --password-file or --password-env, the password is read at each poll.
    A password that you type, or give on standard input, is kept in the database,
    encrypted with ARCHIVER_SECRET_KEY. URLs with ;AUTH=EXTERNAL or ;AUTH=GSSAPI
    need no password.
    """
    from archiver.db import accounts
    from archiver.errors import UsageError
    from archiver.model import Account

    endpoint = given.endpoint(url)
    try:
        BY_NAME["name"].kind.read(name)
    except ValueError as error:
        raise UsageError(f"{name!r} cannot be an account's name: {error}") from None
    given.check_password()
    with opened() as app:
        new = Account(
            id=_id_for(app, name),
            name=name,
            url="",
            tls="",
            secret_reference="",
            interval_seconds=app.settings.interval_seconds,
        )
        new = given.applied_to(new, url=url)
        if endpoint.mechanism in WITHOUT_PASSWORD and not given.names_password:
            new = replace(new, secret_reference=WITHOUT_PASSWORD[endpoint.mechanism])
        else:
            new = replace(new, secret_reference=_secret(app, new, given))
        app.make_database()
        kept = app.database.transact(lambda connection: accounts.add(connection, new, app.now()))
    if json:
        emit({"account": kept.name, "id": kept.id, "url": kept.url})
    else:
        say(f"{kept.name} will be archived from {kept.url}")
        next_step = "authorize" if kept.secret_reference == PROMPT else "check"
        wanted = "give it access" if kept.secret_reference == PROMPT else "see that it works"
        note(f"{wanted}: archiver account {next_step} {kept.name}")


@commands.command()
@options.account_options(*EVERY_GROUP)
def edit(
    name: Name,
    given: options.Given,
    url: Annotated[str | None, typer.Option(metavar="URL", help="The mailbox's new address.")] = None,
    forget_quirks: Annotated[
        bool,
        typer.Option("--forget-quirks", help="Try again the commands at which the server failed before."),
    ] = False,
) -> None:
    """Change an account's settings. Settings that you do not name stay as they are."""
    from archiver.db import accounts

    given.check_password()
    with opened() as app:
        former = lookup.active_account(app, name)
        account = given.applied_to(former, url=url)
        if given.reference() is not None or given.password_stdin:
            account = replace(account, secret_reference=_secret(app, account, given))
        if forget_quirks:
            account = replace(account, avoids=())
        app.database.transact(
            lambda connection: accounts.change(connection, account, app.now(), former=former)
        )
    say(f"{name} is changed")


@commands.command("list")
def list_accounts(json: Json = False) -> None:
    """List the accounts with their schedule and what they hold."""

    with opened() as app:
        states = _states(app)
        now = app.now()
    if json:
        for state in states:
            emit(_state_json(state))
        return
    made = table(
        "account", "url", "state", "last poll", "next poll", "messages", "size", right=("messages", "size")
    )
    for state in states:
        due = "-" if state.due_at is None else ago(state.due_at, now) if state.due_at > now else "now"
        made.add_row(
            state.account.name,
            state.account.url,
            _word(state),
            ago(state.ended_at, now),
            due,
            str(state.captures),
            size(state.captured_bytes),
        )
    show(made)


@commands.command("show")
def show_account(
    name: Name,
    days: Annotated[
        int, typer.Option(metavar="N", min=1, max=LONGEST_DAYS, help="The last N days (UTC), and their gaps.")
    ] = DAYS_SHOWN,
    json: Json = False,
) -> None:
    """Show one account: settings, state, days, last polls, and what is in quarantine and why.

    Of each day: what the last listing showed, what of it was archived by then,
    and what went: deleted by us, gone by another's hand, or lost before we had
    it. And when nobody looked for longer than planned.
    """
    from archiver.db import overview
    from archiver.model import uidl_text
    from archiver.policy import quirks
    from archiver.views import status as view

    with opened() as app:
        account = lookup.account(app, name)
        with app.database.reading() as connection:
            state = overview.account_states(connection, [account.id])[0]
            polls = overview.polls(connection, account.id, POLLS_SHOWN)
            aside = overview.quarantined(connection, account.id)
            now = app.now()
            standing = ScheduleShown.of(connection, account, now, app.settings.day_bytes)
            ledger = view.ledger(connection, account.id, now, days=days)
        forbidden = app.settings.forbid_deletion
    if json:
        emit(
            _state_json(state)
            | as_json(account)
            | {
                "secret": _secret_kind(account),
                "deletion_suspended": account.deletion_suspended,
                "deletion_forbidden": forbidden,
                "epoch": account.epoch,
                "avoids": [
                    {"name": quirk.name, "since": quirk.since, "until": quirk.until, "reason": quirk.reason}
                    for quirk in quirks(account.avoids)
                    if quirk.certain
                ],
                "schedule": standing.as_json(),
                "polls": [_poll_json(poll) for poll in polls],
                "quarantine": [
                    {
                        "uidl": uidl_text(row.uidl),
                        "size": row.size,
                        "reason": row.reason,
                        "attempts": row.attempts,
                        "retry_at": row.retry_at,
                        "absent_at": row.absent_at,
                    }
                    for row in aside
                ],
            }
            | view.ledger_json(ledger)
        )
        return
    say(f"{account.name}  {account.url}  ({_word(state)})")
    say(f"  id {account.id}, tls {_tls(account)}, password {_secret_kind(account)}, delete {account.delete}")
    for line in standing.lines():
        say(f"  {line}")
    say(f"  {state.captures} messages, {size(state.captured_bytes)}")
    if account.state is not AccountState.ACTIVE:
        because = f": {one_line(account.state_reason)}" if account.state_reason else ""
        say(f"  {account.state}{because}")
        say(f"  to go on: archiver account resume {account.name}")
    for quirk in quirks(account.avoids):
        if quirk.certain:
            say(f"  avoids {quirk.name} until {quirk.until}: {quirk.reason}")
    if forbidden:
        say("  nothing is deleted from any mail server: ARCHIVER_FORBID_DELETION is set")
    if account.deletion_suspended is not None:
        say(f"  deletion is suspended: {account.deletion_suspended}")
        say(f"  to lift it: archiver account allow-deletion {account.name}")
    _tell_completeness(state, ledger)
    made = table(
        "poll", "ended", "outcome", "listed", "new", "known", "quarantined", "to come", "seconds", "error"
    )
    for poll in polls:
        listed = "-" if poll.listed is None else str(poll.listed)
        counts = poll.counts
        numbers = (counts.new, counts.known, counts.quarantined, poll.to_come or 0)
        made.add_row(
            str(poll.token),
            ago(poll.ended_at, now),
            poll.outcome,
            listed,
            *map(str, numbers),
            f"{poll.seconds:.1f}",
            one_line(poll.error or ""),
        )
    show(made)
    for row in aside:
        again = f"again {ago(row.retry_at, now)}" if row.absent_at is None else "not shown any more"
        say(
            f"  in quarantine: UIDL {uidl_text(row.uidl)!a}, {row.size} octets, tried {row.attempts} times, "
            f"{again}: {one_line(row.reason or '')}"
        )


@commands.command()
def pause(name: Name) -> None:
    """Stop polling an account until it is resumed. A poll under way is finished."""
    from archiver.db import schedule

    with opened() as app:
        account = lookup.active_account(app, name)
        app.database.transact(lambda connection: schedule.stop(connection, account.id, AccountState.PAUSED))
    say(f"{name} is paused")


@commands.command()
def resume(name: Name) -> None:
    """Poll an account again, from now on, whatever it was paused for."""
    from archiver.db import schedule

    with opened() as app:
        account = lookup.active_account(app, name)
        app.database.transact(lambda connection: schedule.resume(connection, account.id))
    say(f"{name} is polled again")


@commands.command()
def poll(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Accounts.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every account that is not paused.")] = False,
) -> None:
    """Have the running service poll accounts now, whatever their schedule or backoff say.

    Nothing is waited for. One that is being polled is polled again right after
    it. A blackout, a host that is left alone, and the limits of sessions hold
    still; `archiver sync` polls here and now.
    """
    from archiver.db import schedule
    from archiver.errors import UsageError

    if bool(names) == every:
        raise UsageError("name the accounts to poll, or say --all")
    with opened() as app:
        chosen = None if every else [lookup.active_account(app, name) for name in names or []]
        for account in chosen or []:
            if account.state is not AccountState.ACTIVE:
                raise UsageError(
                    f"{account.name} is {account.state}", hint=f"archiver account resume {account.name}"
                )
        ids = None if chosen is None else [account.id for account in chosen]
        asked = app.database.transact(lambda connection: schedule.ask(connection, ids))
    say(f"{asked} accounts are due now")


@commands.command()
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Stop archiving an account and forget its password. What was captured stays, and stays provable."""
    from archiver.db import accounts

    with opened() as app:
        account = lookup.account(app, name)
        if not yes:
            typer.confirm(f"Stop archiving {account.url}?", abort=True, err=True)
        app.database.transact(lambda connection: accounts.remove(connection, account.id, app.now()))
    say(f"{name} is no longer polled; what it captured stays in the archive")


commands.command()(check)
commands.command()(authorize)
commands.command()(reseal)
commands.command()(deletable)
commands.command()(allow_deletion)


def _id_for(app: "App", name: str) -> str:
    """A new account's id. One that was removed has its own still, to which its secret will be bound."""
    from archiver.db import accounts
    from archiver.model import new_account_id

    if app.raw_database.exists:
        with app.database.reading() as connection:
            found = accounts.by_name(connection, name)
        if found is not None and found.state is AccountState.REMOVED:
            return found.id
    return new_account_id()


def _secret(app: "App", account: "Account", given: options.Given) -> str:
    """The reference to keep: as given, or the password itself, sealed."""
    reference = given.reference()
    if reference is not None:
        return reference
    app.secrets.seal(account.id, "")  # A missing key is said before a password is typed.
    password = options.from_stdin() if given.password_stdin else options.ask(account.name)
    return app.secrets.seal(account.id, password)


def _tls(account: "Account") -> str:
    """The account's TLS in words: what differs from the usual is named."""
    words = {
        "at least": None if account.tls_minimum == "1.2" else account.tls_minimum,
        "pinned to": " or ".join(account.tls_pins) or None,
        "trusting": account.ca_file,
        "expecting": account.tls_server_name,
        "as": account.client_certificate,
    }
    return " ".join([account.tls, *(f"{word} {what}" for word, what in words.items() if what is not None)])


def _secret_kind(account: "Account") -> str:
    inner = account.secret_reference.removeprefix(OAUTH)
    kind, _, rest = inner.partition(":")
    words = {
        "file": f"in file {rest}",
        "env": f"in variable {rest}",
        "sealed": "sealed",
        "prompt": "asked for",
        "none": "not needed",
    }.get(kind, "forgotten")
    return words if inner == account.secret_reference else f"by OAuth, credential {words}"


def _states(app: "App") -> "list[AccountStatus]":
    from archiver.db import overview

    with app.database.reading() as connection:
        states = overview.account_states(connection)
    return [state for state in states if state.account.state is not AccountState.REMOVED]


def _tell_completeness(state: "AccountStatus", ledger: "Ledger") -> None:
    say(
        f"  {state.to_come} still to come, {state.quarantined} in quarantine; "
        f"{ledger.lost_ever} lost since it was added"
    )
    if state.account.deletion_suspended:
        say(f"  nothing is deleted: {one_line(state.account.deletion_suspended)}")
    for gap in ledger.gaps:
        until = f"until {_minute(gap.until)}" if gap.until is not None else "and still nobody does"
        say(f"  nobody looked from {_minute(gap.since)} {until}")
    tell_days(ledger.days, [ledger.gap_seconds(day.day) for day in ledger.days])


def _minute(at: "datetime") -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


def _word(state: "AccountStatus") -> str:
    if state.account.state is not AccountState.ACTIVE:
        return state.account.state.value
    if state.is_failing:
        return "failing"
    return "ok" if state.ended_at is not None else "new"


def _state_json(state: "AccountStatus") -> dict[str, Any]:
    return {
        "account": state.account.name,
        "id": state.account.id,
        "url": state.account.url,
        "state": _word(state),
        "state_reason": state.account.state_reason,
        "captures": state.captures,
        "bytes": state.captured_bytes,
        "listed": state.listed,
        "to_come": state.to_come,
        "quarantined": state.quarantined,
        "listed_at": state.listed_at,
        "looked_at": state.looked_at,
        "late_at": state.late_at,
        "deletion_suspended": state.account.deletion_suspended,
        "last_outcome": state.outcome,
        "last_error": state.error,
        "last_poll_at": state.ended_at,
        "due_at": state.due_at,
    }


def _poll_json(poll: "PastPoll") -> dict[str, Any]:
    from archiver.views.poll import counts_json

    return {
        "token": poll.token,
        "ended_at": poll.ended_at,
        "outcome": poll.outcome,
        "listed": poll.listed,
        **counts_json(poll.counts, poll.to_come),
        "glanced": poll.glanced,
        "bytes": poll.counts.fetched_bytes,
        "seconds": poll.seconds,
        "error": poll.error,
    }

"""``archiver account list`` and ``show``: what is known of accounts."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from archiver.cli import lookup
from archiver.cli.lookup import Name
from archiver.cli.opened import opened
from archiver.cli.output import Json, ago, counted, emit, one_line, quoted, say, show, size, table
from archiver.cli.status import LONGEST_DAYS, tell_days
from archiver.secrets import OAUTH
from archiver.states import AccountState

if TYPE_CHECKING:
    from archiver.db.overview import PastPoll, Quarantined
    from archiver.model import Account
    from archiver.views.account import Details
    from archiver.views.schedule import Schedule

DAYS_SHOWN = 7


def list_accounts(json: Json = False) -> None:
    """List the accounts with their state, schedule and size."""
    from archiver.db import overview
    from archiver.views.account import condition, status_json

    with opened() as app:
        with app.database.reading() as connection:
            found = overview.account_states(connection)
        now = app.now()
    found = [status for status in found if status.account.state is not AccountState.REMOVED]
    if json:
        for status in found:
            emit(status_json(status))
        return
    columns = ("account", "state", "last poll", "next poll", "messages", "size", "url")
    made = table(*columns, right=("messages", "size"), spare=("url",))
    for status in found:
        due = status.due_at
        made.add_row(
            status.account.name,
            condition(status),
            ago(status.ended_at, now),
            "-" if due is None else ago(due, now) if due > now else "now",
            str(status.captures),
            size(status.captured_bytes),
            status.account.url,
        )
    show(made)


def show_account(
    name: Name,
    days: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=LONGEST_DAYS, help="Show the last N days (UTC) and the gaps among them."
        ),
    ] = DAYS_SHOWN,
    json: Json = False,
) -> None:
    """Show one account: settings, state, days, latest polls, and messages in quarantine.

    For each day: what the last listing showed, how much of it was archived,
    and which messages are gone: deleted by us, removed by someone else, or
    lost before they were archived.
    """
    from archiver.views import account as view

    with opened() as app:
        account = lookup.account(app, name)
        now = app.now()
        with app.database.reading() as connection:
            found = view.details(connection, account, now, days=days, day_bytes=app.settings.day_bytes)
        forbidden = app.settings.forbid_deletion
    if json:
        emit(view.details_json(found, deletion_forbidden=forbidden))
        return
    say(f"{account.name}  {account.url}  ({view.condition(found.status)})")
    for line in (*_settings(account), *_schedule(found.schedule, now), *_state(found, forbidden=forbidden)):
        say(f"  {line}")
    tell_days(found.ledger.days, [found.ledger.gap_seconds(day.day) for day in found.ledger.days])
    _tell_polls(found.polls, now)
    for message in found.quarantined:
        say(f"  in quarantine: {_quarantined(message, now)}")


def _settings(account: "Account") -> list[str]:
    return [f"id {account.id}", _tls(account), _password(account), f"delete {account.delete}"]


def _tls(account: "Account") -> str:
    """How the channel is protected: only what differs from the default is named."""
    parts = {
        "at least": None if account.tls_minimum == "1.2" else account.tls_minimum,
        "pinned to": " or ".join(account.tls_pins) or None,
        "trusting": account.ca_file,
        "expecting": account.tls_server_name,
        "as": account.client_certificate,
    }
    named = [f"{word} {what}" for word, what in parts.items() if what is not None]
    return " ".join(["tls", account.tls, *named])


def _password(account: "Account") -> str:
    inner = account.secret_reference.removeprefix(OAUTH)
    kind, _, rest = inner.partition(":")
    where = {
        "file": f"in file {rest}",
        "env": f"in variable {rest}",
        "sealed": "sealed in the database",
        "prompt": "asked for at the terminal",
        "none": "not needed",
    }.get(kind, "forgotten")
    return f"password {where}" if inner == account.secret_reference else f"OAuth credential {where}"


def _schedule(found: "Schedule", now: datetime) -> list[str]:
    account = found.account
    if account.cron is not None:
        lines = [f"polled at {account.cron!r} in {account.time_zone}"]
    elif account.interval_max_seconds is None:
        lines = [f"polled every {account.interval_seconds:g} s"]
    else:
        bounds = f"{account.interval_seconds:g} to {account.interval_max_seconds:g} s"
        lines = [f"polled every {bounds}: {_interval(found)}"]
    if account.blackout:
        lines.append(f"not polled {account.blackout} ({account.time_zone})")
    if found.day_bytes is not None:
        lines.append(f"fetched today (UTC): {size(found.fetched_today)} of {size(found.day_bytes)}")
    because = _waits(found, now)
    return lines if because is None else [*lines, f"waits because {because}"]


def _interval(found: "Schedule") -> str:
    seconds = found.interval_seconds
    if seconds is None:
        return "not polled yet"
    why = "mail arrived" if seconds <= found.account.interval_seconds else "no mail arrived"
    return f"{seconds:g} s at present, since {why}"


def _waits(found: "Schedule", now: datetime) -> str | None:
    """Why the account is not polled now; None if nothing delays it."""
    from archiver.views.schedule import Waits

    match found.waits, found.trouble:
        case Waits.HOST_FAILING, trouble if trouble is not None:
            failed = counted(trouble.failures, "poll")
            return (
                f"its host {trouble.host} has been failing since {trouble.failing_since:%Y-%m-%d %H:%M} UTC "
                f"({failed} could not begin: {one_line(trouble.error or '')}); "
                f"next attempt {ago(found.waits_until, now)}"
            )
        case Waits.BLACKOUT, _:
            return f"a blackout window lasts until {found.waits_until:%Y-%m-%d %H:%M} UTC"
        case Waits.NO_SESSION, _:
            return "its host already has as many sessions as it may have"
        case Waits.BACKING_OFF, _:
            return f"{counted(found.failures, 'poll')} failed; next attempt {ago(found.waits_until, now)}"
    return None


def _state(found: "Details", *, forbidden: bool) -> list[str]:
    from archiver.policy import quirks

    status, account = found.status, found.status.account
    lines = [f"{counted(status.captures, 'message')}, {size(status.captured_bytes)}"]
    if account.state is not AccountState.ACTIVE:
        because = f": {one_line(account.state_reason)}" if account.state_reason else ""
        lines += [f"{account.state}{because}", f"to resume: archiver account resume {quoted(account.name)}"]
    lines += [
        f"avoids {quirk.name} until {quirk.until}: {quirk.reason}"
        for quirk in quirks(account.avoids)
        if quirk.certain
    ]
    if forbidden:
        lines.append("nothing is deleted from any mail server: ARCHIVER_FORBID_DELETION is set")
    if account.deletion_suspended is not None:
        lines += [
            f"deletion is suspended: {one_line(account.deletion_suspended)}",
            f"to allow it again: archiver account allow-deletion {quoted(account.name)}",
        ]
    lines.append(
        f"{status.to_come} to come, {status.quarantined} in quarantine; "
        f"{found.ledger.lost_ever} lost since the account was added"
    )
    for gap in found.ledger.gaps:
        if gap.until is None:
            lines.append(f"no successful poll since {_minute(gap.since)}")
        else:
            lines.append(f"no successful poll from {_minute(gap.since)} until {_minute(gap.until)}")
    return lines


def _minute(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


def _tell_polls(polls: "list[PastPoll]", now: datetime) -> None:
    numbers = ("listed", "new", "known", "quarantined", "to come", "seconds")
    made = table("poll", "ended", "outcome", *numbers, "error", right=numbers)
    for poll in polls:
        counts = poll.counts
        made.add_row(
            str(poll.token),
            ago(poll.ended_at, now),
            poll.outcome,
            "-" if poll.listed is None else str(poll.listed),
            *(str(number) for number in (counts.new, counts.known, counts.quarantined, poll.to_come or 0)),
            f"{poll.seconds:.1f}",
            one_line(poll.error or ""),
        )
    show(made)


def _quarantined(message: "Quarantined", now: datetime) -> str:
    from archiver.model import uidl_text

    if message.absent_at is None:
        then = f"next attempt {ago(message.retry_at, now)}"
    else:
        then = "no longer on the server"
    tried = counted(message.attempts, "attempt")
    return (
        f"UIDL {uidl_text(message.uidl)!a}, {counted(message.size, 'byte')}, {tried}, {then}: "
        f"{one_line(message.reason or '')}"
    )

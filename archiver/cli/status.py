"""``archiver status``: all accounts at a glance, and what is not accounted for."""

from typing import TYPE_CHECKING, Annotated

import typer

from archiver.cli.opened import opened
from archiver.cli.output import Json, ago, counted, emit, one_line, say, show, size, table

if TYPE_CHECKING:
    from datetime import datetime

    from archiver.db.history import Day
    from archiver.views.status import Concern, Overview

LONGEST_DAYS = 3660
_HOURS_FROM_SECONDS = 2 * 3600.0


def register(app: typer.Typer) -> None:
    app.command()(status)


def status(
    days: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=LONGEST_DAYS,
            help="Also show the totals of the last N days (UTC), and count losses and gaps of these days.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all", metavar="", help="Name every account that needs attention, not only the first 20."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show the state of all accounts at a glance, and what needs attention, the worst first.

    To come: listed, but not archived or quarantined yet. Lost: disappeared from
    the server before it was archived. Gap: a period without a successful poll,
    longer than scheduled. Exits with 1 if an account fails, waits for an
    operator or has deletion suspended, or if a message is in quarantine.
    Accounts paused by hand do not count.
    """
    from archiver.views import status as view

    with opened() as app:
        now = app.now()
        with app.database.reading() as connection:
            found = view.overview(connection, now, days=days, limit=None if every else view.SHOWN)
        where = app.settings.store_url
        forbidden = app.settings.forbid_deletion
    if json:
        emit(view.overview_json(found, deletion_forbidden=forbidden))
    else:
        if forbidden:
            say("nothing is deleted from any mail server: ARCHIVER_FORBID_DELETION is set")
        _tell(found, where, now)
    if found.needs_operator:
        raise typer.Exit(1)


def _tell(found: "Overview", where: str, now: "datetime") -> None:
    standing = found.standing
    accounts = sum(standing.accounts.values())
    archived = f"{counted(standing.captures, 'message')} of {counted(accounts, 'account')}"
    say(f"{archived}, {size(standing.captured_bytes)}, in {where}")
    say(
        f"{standing.to_come} to come, {standing.quarantined} in quarantine; since {found.since}: "
        f"{counted(found.lost, 'message')} lost, {counted(found.gaps, 'monitoring gap')}"
    )
    made = table("state", "accounts", right=("accounts",))
    for name, number in {
        **standing.accounts,
        "never polled": standing.never_polled,
        "no successful poll for too long": standing.late,
        "deletion suspended": standing.deletion_suspended,
    }.items():
        made.add_row(name, str(number))
    show(made)
    _tell_concerns(found.concerns, now)
    if len(found.concerns) < standing.concerned:
        more = counted(standing.concerned - len(found.concerns), "more account")
        say(f"{more}: archiver status --all")
    _tell_hosts(found, now)
    if found.days is not None:
        tell_days(found.days)


def _tell_concerns(concerns: "list[Concern]", now: "datetime") -> None:
    if not concerns:
        return
    made = table("needs attention", "because", "last poll", "last success", "reason")
    for concern in concerns:
        counted = {
            "lost messages": f"{concern.lost} lost",
            "quarantine": f"{concern.quarantined} in quarantine",
        }
        troubles = [counted.get(trouble, trouble) for trouble in concern.troubles]
        made.add_row(
            concern.account,
            ", ".join(troubles),
            ago(concern.polled_at, now),
            ago(concern.looked_at, now),
            one_line(concern.reason or ""),
        )
    show(made)


def _tell_hosts(found: "Overview", now: "datetime") -> None:
    if not found.hosts:
        return
    made = table("failing mail host", "since", "failures", "next attempt", "reason", right=("failures",))
    for host in found.hosts:
        made.add_row(
            host.host,
            ago(host.failing_since, now),
            str(host.failures),
            ago(host.retry_at, now),
            one_line(host.error or ""),
        )
    show(made)
    if len(found.hosts) < found.standing.hosts:
        say(f"{counted(found.standing.hosts - len(found.hosts), 'more host')}: archiver status --all")


def tell_days(days: "list[Day]", gap_seconds: "list[float] | None" = None) -> None:
    """A table of days, the newest first; for one account with the time without a successful poll."""
    numbers = (
        *("polls", "failed", "listed", "archived", "quarantined", "to come"),
        *("new", "deleted", "gone", "lost", "size", "gap"),
    )
    columns = numbers if gap_seconds is not None else numbers[:-1]
    made = table("day (UTC)", *columns, right=columns)
    for index in reversed(range(len(days))):
        day = days[index]
        counts = (
            *(day.polls, day.failed, day.listed, day.archived, day.quarantined, day.to_come),
            *(day.new, day.deleted, day.gone, day.lost),
        )
        cells = ["-" if count is None else str(count) for count in counts]
        cells.append(size(day.fetched_bytes))
        if gap_seconds is not None:
            cells.append(length(gap_seconds[index]))
        made.add_row(day.day.isoformat(), *cells)
    show(made)


def length(seconds: float) -> str:
    """A length of time for people; empty if there is nothing to report."""
    if seconds < 1:
        return ""
    return f"{seconds / 60:.0f} min" if seconds < _HOURS_FROM_SECONDS else f"{seconds / 3600:.1f} h"

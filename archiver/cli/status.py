"""``archiver status``: all accounts at a glance, and what is unaccounted for."""

from typing import Any

import typer

from archiver.cli.output import Json, ago, emit, note, one_line, say, show, size, table

FAILURES_SHOWN = 20


def register(app: typer.Typer) -> None:
    app.command()(status)


def status(json: Json = False) -> None:
    """Show the state of all accounts at a glance.

    Unaccounted for is what the last listing showed and is neither archived nor
    in quarantine: still to come, if all is well. Exit code 1 when an account
    fails, or waits for an operator, or something is in quarantine; not for one
    that was paused by hand.
    """
    from archiver.bootstrap import Archiver
    from archiver.db import reads
    from archiver.settings import load
    from archiver.worker import PAUSED_BY_HAND

    with Archiver(load()) as archiver:
        with archiver.database.reading() as connection:
            states = reads.account_states(connection)
        now = archiver.now()
        where = archiver.settings.store_url
    active = [state for state in states if state.removed_at is None]
    paused = [state for state in active if state.paused_reason is not None]
    failing = [
        state for state in active if (state.failures or state.refusals) and state.paused_reason is None
    ]
    summary: dict[str, Any] = {
        "accounts": len(active),
        "captures": sum(state.captures for state in states),
        "bytes": sum(int(state.octets) for state in states),
        "unaccounted": sum(state.to_come for state in active),
        "quarantined": sum(state.quarantined for state in states),
        "failing": len(failing),
        "paused": len(paused),
        "never_polled": sum(state.ended_at is None for state in active),
    }
    if json:
        emit(summary)
    else:
        say(f"{summary['captures']} messages of {len(active)} accounts, {size(summary['bytes'])}, in {where}")
        made = table("", "accounts", right=("accounts",))
        for name in ("failing", "paused", "never_polled"):
            made.add_row(name.replace("_", " "), str(summary[name]))
        show(made)
        say(f"{summary['unaccounted']} messages still to come, {summary['quarantined']} in quarantine")
        for state in (paused + failing)[:FAILURES_SHOWN]:
            how = "failing" if state.paused_reason is None else "paused"
            reason = one_line(state.paused_reason or state.error or "")
            say(f"  {state.name}: {how}, last polled {ago(state.ended_at, now)}: {reason}")
        if len(paused + failing) > FAILURES_SHOWN:
            note("more: archiver account list")
    waiting = [state for state in paused if state.paused_reason != PAUSED_BY_HAND]
    if failing or waiting or summary["quarantined"]:
        raise typer.Exit(1)

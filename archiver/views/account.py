"""One account: its settings, state, days, latest polls, and what is in quarantine. As facts, and as JSON."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from archiver import secrets
from archiver.accounts import fields
from archiver.db import overview
from archiver.db.overview import AccountStatus, PastPoll, Quarantined
from archiver.model import Account, uidl_text
from archiver.policy import quirks
from archiver.states import AccountState
from archiver.views.poll import past_json
from archiver.views.schedule import Schedule, schedule, schedule_json
from archiver.views.status import Ledger, ledger, ledger_json

POLLS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Details:
    """Everything that one account is asked for."""

    status: AccountStatus
    schedule: Schedule
    polls: list[PastPoll]
    quarantined: list[Quarantined]
    ledger: Ledger


def details(
    connection: Connection, account: Account, now: datetime, *, days: int, day_bytes: int | None
) -> Details:
    """The account with its last ``days`` days. ``day_bytes`` is the service's limit."""
    return Details(
        status=overview.account_states(connection, [account.id])[0],
        schedule=schedule(connection, account, now, day_bytes),
        polls=overview.polls(connection, account.id, POLLS_SHOWN),
        quarantined=overview.quarantined(connection, account.id),
        ledger=ledger(connection, account.id, now, days=days),
    )


def condition(status: AccountStatus) -> str:
    """An account's state in one word: if it is active, ``new``, ``ok`` or ``failing``."""
    if status.account.state is not AccountState.ACTIVE:
        return str(status.account.state)
    if status.is_failing:
        return "failing"
    return "new" if status.ended_at is None else "ok"


def status_json(status: AccountStatus) -> dict[str, Any]:
    """An account in a list."""
    account = status.account
    return {
        "account": account.name,
        "id": account.id,
        "url": account.url,
        "state": condition(status),
        "state_reason": account.state_reason,
        "captures": status.captures,
        "bytes": int(status.captured_bytes),
        "listed": status.listed,
        "to_come": status.to_come,
        "quarantined": status.quarantined,
        "listed_at": status.listed_at,
        "looked_at": status.looked_at,
        "late_at": status.late_at,
        "deletion_suspended": account.deletion_suspended,
        "last_outcome": status.outcome,
        "last_error": status.error,
        "last_poll_at": status.ended_at,
        "due_at": status.due_at,
    }


def details_json(found: Details, *, deletion_forbidden: bool) -> dict[str, Any]:
    """An account by itself. ``deletion_forbidden`` is a setting of the service."""
    account = found.status.account
    return {
        **status_json(found.status),
        **fields.as_json(account),
        "password": secrets.shown(account.secret_reference),
        "deletion_forbidden": deletion_forbidden,
        "epoch": account.epoch,
        "avoids": [
            {"name": quirk.name, "since": quirk.since, "until": quirk.until, "reason": quirk.reason}
            for quirk in quirks(account.avoids)
            if quirk.certain
        ],
        "schedule": schedule_json(found.schedule),
        "polls": [past_json(poll) for poll in found.polls],
        "quarantine": [_quarantined_json(message) for message in found.quarantined],
        **ledger_json(found.ledger),
    }


def _quarantined_json(message: Quarantined) -> dict[str, Any]:
    return {
        "uidl": uidl_text(message.uidl),
        "size": message.size,
        "reason": message.reason,
        "attempts": message.attempts,
        "retry_at": message.retry_at,
        "absent_at": message.absent_at,
    }

"""``/v1/status`` and ``/v1/accounts/{name}/...``: accounts, by one look at the database each."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy.engine import Connection
from starlette.requests import Request
from starlette.routing import Route

from archiver.db import accounts, schedule
from archiver.states import AccountState
from archiver.views import status as view
from archiver.web.api.answers import Api, Problem, number
from archiver.web.problems import CONFLICT, NOT_FOUND

DAYS_AT_MOST = 3_660
ACCOUNTS_AT_MOST = 1_000


def routes(api: Api, *, deletion_forbidden: bool) -> list[Route]:
    def status(request: Request) -> dict[str, Any]:
        days = number(request, "days", 0, DAYS_AT_MOST)
        limit = number(request, "limit", view.SHOWN, ACCOUNTS_AT_MOST)
        with api.database.reading() as connection:
            found = view.overview(connection, datetime.now(UTC), days=days or None, limit=limit)
        return view.overview_json(found, deletion_forbidden=deletion_forbidden)

    def account_days(request: Request) -> dict[str, Any]:
        days = max(1, number(request, "days", view.LOOK_BACK_DAYS, DAYS_AT_MOST))
        name = request.path_params["name"]
        with api.database.reading() as connection:
            account = accounts.by_name(connection, name)
            if account is None:
                raise Problem(NOT_FOUND, f"there is no account named {name}")
            found = view.ledger(connection, account.id, datetime.now(UTC), days=days)
        return {"account": account.name, "id": account.id} | view.ledger_json(found)

    def poll(request: Request) -> dict[str, Any]:
        name = request.path_params["name"]
        api.database.transact(lambda connection: _ask(connection, name))
        return {"account": name, "asked": True}

    return [
        Route("/v1/status", api.handler(status, parameters=("days", "limit"))),
        # A name may be anything printable, slashes included.
        Route("/v1/accounts/{name:path}/poll", api.handler(poll, status=202, changes=True), methods=["POST"]),
        Route("/v1/accounts/{name:path}/days", api.handler(account_days, parameters=("days",))),
    ]


def _ask(connection: Connection, name: str) -> None:
    """Ask for a poll of an account, as ``archiver account poll`` does."""
    found = accounts.by_name(connection, name)
    if found is None or found.state is AccountState.REMOVED:
        raise Problem(NOT_FOUND, f"there is no account named {name}")
    if found.state is not AccountState.ACTIVE:
        because = f": {found.state_reason}" if found.state_reason else ""
        raise Problem(CONFLICT, f"{name} is {found.state}{because}")
    schedule.ask(connection, [found.id])

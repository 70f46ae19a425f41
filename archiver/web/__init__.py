"""HTTP: health for Kubernetes, metrics for Prometheus, the feed for consumers. Extra ``[web]``.

``/livez`` says that the clock ticks, ``/readyz`` that the store was seen to work
and that the database answers with the schema of this release.
``/v1/events?after=&limit=`` tells who wrote to whose mailbox and when, and
``/v1/status`` and ``/v1/accounts/{name}/days`` tell of accounts; so these want
a bearer token, except on a loopback address.
"""

import hmac
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.engine import Connection
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from archiver import feed, observe
from archiver.db import Database, accounts, overview, schedule
from archiver.errors import ArchiverError, OperatorNeeded, UsageError
from archiver.states import AccountState
from archiver.views import status as view

EVENTS_AT_MOST = 5_000
DAYS_AT_MOST = 3_660
ACCOUNTS_AT_MOST = 1_000
START_SECONDS = 10.0
HIGHEST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Health:
    """The questions that probes ask: ``ready`` raises an ArchiverError that says why not."""

    alive: Callable[[], bool]
    ready: Callable[[], None]
    standing: Callable[[], overview.Overview]


def application(
    database: Database,
    health: Health,
    *,
    token: str | None,
    on_loopback: bool,
    deletion_forbidden: bool,
) -> Starlette:
    """The routes. Handlers are plain functions: Starlette runs them in threads, as the database blocks.

    ``deletion_forbidden`` is told by ``/v1/status``, and changes nothing.
    """

    def events(request: Request) -> Response:
        refusal = _refusal(request, token, on_loopback=on_loopback)
        if refusal is not None:
            return refusal
        try:
            after = _number(request, "after", 0, 2**63 - 1)
            limit = _number(request, "limit", feed.PAGE_EVENTS, EVENTS_AT_MOST)
        except ValueError as error:
            return _problem(400, str(error))
        try:
            found = feed.page(database, after=after, limit=limit)
        except ArchiverError as error:
            return _problem(503, str(error))
        return JSONResponse({"events": found, "next": found[-1]["position"] if found else after})

    accounts_routes = _of_accounts(
        database, token, on_loopback=on_loopback, deletion_forbidden=deletion_forbidden
    )
    return Starlette(routes=[*_of_process(health), Route("/v1/events", events), *accounts_routes])


def _ask(database: Database, name: str) -> Response:
    """Have an account polled now, as ``archiver account poll`` does."""

    def ask(connection: Connection) -> Response:
        found = accounts.by_name(connection, name)
        if found is None or found.state is AccountState.REMOVED:
            return _problem(404, f"there is no account named {name}")
        if found.state is not AccountState.ACTIVE:
            because = f": {found.state_reason}" if found.state_reason else ""
            return _problem(409, f"{name} is {found.state}{because}")
        schedule.ask(connection, [found.id])
        return JSONResponse({"account": name, "asked": True}, 202)

    return database.transact(ask)


@contextmanager
def serving(listen: str, make: Callable[[bool], Starlette]) -> Iterator[str]:
    """Serve at ``host:port`` in a thread of its own, for the length of the block; gives the address.

    ``make`` is told whether it listens on loopback only. Raises UsageError for
    an address that is none, OperatorNeeded when it cannot be listened at.
    """
    host, port = _address(listen)
    config = uvicorn.Config(
        make(_is_loopback(host)),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    version_6 = ":" in host
    try:
        # [::] is every address of the machine, those of IPv4 too.
        listener = socket.create_server(
            (host, port),
            family=socket.AF_INET6 if version_6 else socket.AF_INET,
            dualstack_ipv6=version_6 and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise OperatorNeeded(
            f"cannot listen at {listen}: {error.strerror}", hint="ARCHIVER_HTTP_LISTEN is host:port"
        ) from error
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="web", daemon=True)
    thread.start()
    try:
        ends_at = time.monotonic() + START_SECONDS
        while not server.started and thread.is_alive() and time.monotonic() < ends_at:
            time.sleep(0.01)
        yield f"http://{f'[{host}]' if version_6 else host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=5)


def _of_process(health: Health) -> list[Route]:
    """The routes that tell how this process is."""

    def livez(_: Request) -> Response:
        alive = health.alive()
        return PlainTextResponse("ok\n" if alive else "the clock stands still\n", 200 if alive else 503)

    def readyz(_: Request) -> Response:
        try:
            health.ready()
        except ArchiverError as error:
            return PlainTextResponse(f"{error}\n", 503)
        return PlainTextResponse("ok\n")

    def metrics(_: Request) -> Response:
        try:
            found = health.standing()
        except ArchiverError:
            # The process's own figures matter most when the database is away.
            observe.OVERDUE_SECONDS.set(float("nan"))
        else:
            observe.OVERDUE_SECONDS.set(found.overdue_seconds)
            observe.QUARANTINED.set(found.quarantined)
            observe.LATE.set(found.late)
            observe.DELETION_SUSPENDED.set(found.deletion_suspended)
            observe.HOSTS_FAILING.set(found.hosts)
            for state, count in found.accounts.items():
                observe.ACCOUNTS.labels(state).set(count)
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return [Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", metrics)]


def _of_accounts(
    database: Database, token: str | None, *, on_loopback: bool, deletion_forbidden: bool
) -> list[Route]:
    """The routes about accounts: how they stand, by one look at the database each, and polls asked for."""

    def told(request: Request, answer: Callable[[Connection, Request], dict[str, Any] | None]) -> Response:
        """What one look at the database gives, to whoever may read it."""
        refusal = _refusal(request, token, on_loopback=on_loopback)
        if refusal is not None:
            return refusal
        try:
            with database.reading() as connection:
                found = answer(connection, request)
        except ValueError as error:
            return _problem(400, str(error))
        except ArchiverError as error:
            return _problem(503, str(error))
        return _problem(404, "there is no account of that name") if found is None else JSONResponse(found)

    def poll(request: Request) -> Response:
        refusal = _refusal(request, token, on_loopback=on_loopback)
        if refusal is None and not token and "origin" in request.headers:
            # Any page that somebody on this machine looks at could have its browser say this.
            refusal = _problem(403, "set ARCHIVER_API_TOKEN to ask for polls from a browser")
        if refusal is not None:
            return refusal
        try:
            return _ask(database, request.path_params["name"])
        except ArchiverError as error:
            return _problem(503, str(error))

    status = partial(_status, deletion_forbidden=deletion_forbidden)
    return [
        Route("/v1/status", lambda request: told(request, status)),
        Route("/v1/accounts/{name:path}/poll", poll, methods=["POST"]),
        # A name may be anything that can be printed: slashes, too.
        Route("/v1/accounts/{name:path}/days", lambda request: told(request, _account_days)),
    ]


def _status(connection: Connection, request: Request, *, deletion_forbidden: bool) -> dict[str, Any]:
    days = _number(request, "days", 0, DAYS_AT_MOST)
    limit = _number(request, "limit", view.SHOWN, ACCOUNTS_AT_MOST)
    found = view.overview(connection, datetime.now(UTC), days=days or None, limit=limit)
    return view.overview_json(found, deletion_forbidden=deletion_forbidden)


def _account_days(connection: Connection, request: Request) -> dict[str, Any] | None:
    days = max(1, _number(request, "days", view.LOOK_BACK_DAYS, DAYS_AT_MOST))
    account = accounts.by_name(connection, request.path_params["name"])
    if account is None:
        return None
    found = view.ledger(connection, account.id, datetime.now(UTC), days=days)
    return {"account": account.name, "id": account.id} | view.ledger_json(found)


def _refusal(request: Request, token: str | None, *, on_loopback: bool) -> Response | None:
    if not token:  # An empty one is a setting that was left out, not a token that anybody can guess.
        if on_loopback:
            return None
        return _problem(403, "set ARCHIVER_API_TOKEN to read this from other machines")
    given = request.headers.get("authorization", "")
    if hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        return None
    return _problem(401, "a bearer token is needed", {"www-authenticate": "Bearer"})


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body: dict[str, Any] = {"status": status, "detail": detail}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text) <= most):
        raise ValueError(f"{name} is a whole number from 0 to {most}")
    return int(text)


def _address(listen: str) -> tuple[str, int]:
    host, separator, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (separator and host and port.isascii() and port.isdigit() and int(port) <= HIGHEST_PORT):
        raise UsageError(f"{listen!r} is no address to listen at", hint="ARCHIVER_HTTP_LISTEN is host:port")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""HTTP: health for Kubernetes, metrics for Prometheus, the API for consumers. Extra ``[web]``."""

from collections.abc import Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from archiver.db import Database
from archiver.web import api, probes, problems
from archiver.web.auth import Access, Addressed, Gate
from archiver.web.probes import Health
from archiver.web.serving import serving

__all__ = ["Health", "application", "serving"]


def application(
    database: Database,
    health: Health,
    *,
    token: str | None,
    on_loopback: bool,
    deletion_forbidden: bool,
    hosts: Iterable[str] = (),
) -> Starlette:
    """Every route.

    ``deletion_forbidden`` is a setting, which ``/v1/status`` reports. ``hosts``
    are names under which requests arrive, besides localhost and addresses.
    """
    access = Access(token, on_loopback)
    made = Starlette(
        routes=[
            *probes.routes(health),
            *api.routes(database, access, deletion_forbidden=deletion_forbidden),
        ],
        middleware=[Middleware(Gate, Addressed.by(hosts, on_loopback=on_loopback))],
        exception_handlers={HTTPException: problems.of_routing, Exception: problems.of_fault},
    )
    # A redirect to the path without its last slash would repeat whatever Host was asked.
    made.router.redirect_slashes = False
    return made

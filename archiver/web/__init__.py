"""HTTP: health for Kubernetes, metrics for Prometheus, the API for consumers. Extra ``[web]``."""

from starlette.applications import Starlette

from archiver.db import Database
from archiver.web import api, probes
from archiver.web.auth import Access
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
) -> Starlette:
    """Every route. ``deletion_forbidden`` is a setting, which ``/v1/status`` reports."""
    access = Access(token, on_loopback)
    return Starlette(
        routes=[
            *probes.routes(health),
            *api.routes(database, access, deletion_forbidden=deletion_forbidden),
        ]
    )

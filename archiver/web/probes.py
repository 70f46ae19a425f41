"""What orchestrators and Prometheus ask of a process: ``/livez``, ``/readyz`` and ``/metrics``.

``/livez`` reports whether the process's clock ticks. ``/readyz`` reports whether
the store was seen to work, and whether the database answers with the schema of
this release.
"""

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from archiver import observe
from archiver.db import overview
from archiver.errors import ArchiverError
from archiver.web.problems import UNAVAILABLE, problem


@dataclass(frozen=True, slots=True)
class Health:
    """The questions that probes ask."""

    alive: Callable[[], bool]
    """Whether the process works."""
    ready: Callable[[], None]
    """Raises an ArchiverError that says why the process is not ready."""
    standing: Callable[[], overview.Overview]
    """All accounts together, for the metrics. Raises ArchiverError if the database cannot be reached."""


def routes(health: Health) -> list[Route]:
    """The routes about this process. They need no token."""

    # On the event loop, where no thread that waits for the database can hold it up.
    async def livez(_: Request) -> Response:
        alive = health.alive()
        return PlainTextResponse("ok\n") if alive else problem(UNAVAILABLE, "the clock has stopped")

    def readyz(_: Request) -> Response:
        try:
            health.ready()
        except ArchiverError as error:
            return problem(UNAVAILABLE, str(error))
        return PlainTextResponse("ok\n")

    def metrics(_: Request) -> Response:
        try:
            found = health.standing()
        except ArchiverError:
            # The process's own figures matter most when the database cannot be reached.
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

"""``/v1/events?after=&limit=``: the feed, for consumers that remember their position."""

from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from archiver import feed
from archiver.web.api.answers import Api, number

EVENTS_AT_MOST = 5_000


def routes(api: Api) -> list[Route]:
    def events(request: Request) -> dict[str, Any]:
        after = number(request, "after", 0, 2**63 - 1)
        limit = number(request, "limit", feed.PAGE_EVENTS, EVENTS_AT_MOST)
        found = feed.page(api.database, after=after, limit=limit)
        return {"events": found, "next": found[-1]["position"] if found else after}

    return [Route("/v1/events", api.handler(events, parameters=("after", "limit")))]

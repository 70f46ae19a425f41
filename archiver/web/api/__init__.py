"""The HTTP API, version 1: the feed, the status of all accounts, an account's days, and polls on request."""

from starlette.routing import Route

from archiver.db import Database
from archiver.web.api import accounts, events
from archiver.web.api.answers import Api
from archiver.web.auth import Access


def routes(database: Database, access: Access, *, deletion_forbidden: bool) -> list[Route]:
    """The routes below ``/v1``. ``deletion_forbidden`` is reported by ``/v1/status``, and changes nothing."""
    api = Api(database, access)
    return [*events.routes(api), *accounts.routes(api, deletion_forbidden=deletion_forbidden)]

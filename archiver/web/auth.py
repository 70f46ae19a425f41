"""Who may ask: the one place that decides it.

The feed tells who wrote to whom and when, and other routes report on accounts.
They need a bearer token, except on a loopback address.
"""

import hmac
from dataclasses import dataclass

from starlette.requests import Request

FORBIDDEN = 403
UNAUTHORIZED = 401


class Refused(Exception):
    """A request that may not be answered: the status and the reason for the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Access:
    """What a request must show."""

    token: str | None
    """The bearer token; None or empty if the setting was omitted."""
    on_loopback: bool
    """Whether only this machine can ask."""

    def check(self, request: Request, *, changes: bool = False) -> None:
        """Raises Refused if the request may not be answered. ``changes``: it changes something."""
        if not self.token:
            if not self.on_loopback:
                raise Refused(FORBIDDEN, "set ARCHIVER_API_TOKEN to read this from other machines")
            if changes and "origin" in request.headers:
                # Any page that is open in a browser on this machine could send this.
                raise Refused(FORBIDDEN, "set ARCHIVER_API_TOKEN to ask for polls from a browser")
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise Refused(UNAUTHORIZED, "a bearer token is needed")

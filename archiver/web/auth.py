"""Access to the API: the one place that decides which requests are answered.

The feed tells who wrote to whom and when, and other routes report on accounts.
They need a bearer token, except on a loopback address.

A loopback address is no border for a browser on the same machine. A page can
give its own name the address 127.0.0.1 (DNS rebinding), and then reads the
answers as its own. Such a request shows the page's name as its Host, so a
request must be addressed to a name of this service.
"""

import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from archiver.web.problems import FORBIDDEN, UNAUTHORIZED, problem

PROBES: Final = frozenset({"/livez", "/readyz"})
"""Paths that answer whatever Host they are asked under.

A kubelet asks by the pod's address, a load balancer by any name. They say
whether the process works, and nothing about mail.
"""

METRICS: Final = "/metrics"
"""A path that answers to any Host unless it listens on loopback: Prometheus may know any name of it."""

_AUTHORITY: Final = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.IGNORECASE)
_ORIGIN: Final = re.compile(r"https?://(?P<authority>[^/?#]+)", re.IGNORECASE)


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


@dataclass(frozen=True, slots=True)
class Addressed:
    """Whether a request is meant for this service, by its Host, Origin and Sec-Fetch-Site."""

    names: frozenset[str] = field(default_factory=frozenset)
    """Further names of the service, without ports, in lower case."""
    on_loopback: bool = False

    @classmethod
    def by(cls, names: Iterable[str], *, on_loopback: bool) -> "Addressed":
        return cls(frozenset(_plain(name) for name in names), on_loopback)

    def check(self, headers: Headers, method: str) -> None:
        """Raises Refused if a foreign page may have made the request."""
        host = headers.get("host")
        # Only HTTP/1.0 has no Host, and no browser speaks it.
        if host is not None and not self._known(host):
            raise Refused(FORBIDDEN, "the Host is no name of this service; ARCHIVER_HTTP_HOSTS adds names")
        for origin in headers.getlist("origin"):
            found = _ORIGIN.fullmatch(origin)
            authority = found["authority"].lower() if found else None
            if authority is None or not (
                authority == (host or "").lower() or _host_of(authority) in self.names
            ):
                raise Refused(FORBIDDEN, "a page of another origin may not ask")
        # A link from elsewhere may lead here. What a foreign page loads for itself may not.
        follows_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site") in {"cross-site", "same-site"} and not follows_link:
            raise Refused(FORBIDDEN, "a page of another origin may not ask")

    def _known(self, authority: str) -> bool:
        host = _host_of(authority)
        if host is None:
            return False
        if host in self.names or host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        # An address cannot be rebound: the page under it comes from that address.
        return address.is_loopback or not self.on_loopback


class Gate:
    """Refuses requests that are not addressed to this service, before any route sees them."""

    def __init__(self, app: ASGIApp, addressed: Addressed) -> None:
        self._app = app
        self._addressed = addressed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._app
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            try:
                self._addressed.check(Headers(scope=scope), scope["method"])
            except Refused as refused:
                answer = problem(refused.status, refused.reason)
        await answer(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in PROBES or (path == METRICS and not self._addressed.on_loopback)


def _host_of(authority: str) -> str | None:
    found = _AUTHORITY.fullmatch(authority)
    return _plain(found["host"]) if found else None


def _plain(host: str) -> str:
    """A host as names are compared: no brackets, no final dot, lower case."""
    return host.removeprefix("[").removesuffix("]").removesuffix(".").lower()

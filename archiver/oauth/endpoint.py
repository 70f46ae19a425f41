"""One request to an endpoint of an OAuth provider (RFC 6749 section 3.2, RFC 8628 section 3.1).

Owns the form of the request and the meaning of a refusal. Promises that an
error or a ``Refusal`` shows the provider's words without any secret that was
sent. Leaves HTTP to ``archiver.outbound``, and the meaning of the parameters to
Authlib and to the caller.
"""

import json
import ssl
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

from archiver.errors import OperatorNeeded, TryLater
from archiver.outbound import REQUEST_SECONDS, Outbound, host_of

_SHOWN_CHARACTERS = 300
_SHORTEST_SECRET = 4
_PASSING = frozenset({"temporarily_unavailable", "server_error"})
_PUBLIC = frozenset({"client_id", "grant_type", "scope", "redirect_uri"})
_HEADERS = {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}


class Refusal(Exception):
    """The provider refused, in the words of RFC 6749 section 5.2. ``code`` is its ``error``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Client:
    """The application that a provider knows, as it introduces itself in every request."""

    id: str
    secret: str | None = field(default=None, repr=False)


class Poster:
    """Sends requests, one connection each: an account needs one in an hour. Used by many threads."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, seconds: float = REQUEST_SECONDS) -> None:
        """``tls`` replaces the usual authorities; ``seconds`` bounds each request as a whole."""
        self._outbound = Outbound(tls=tls, seconds=seconds)

    def ask(self, endpoint: str, client: Client, **parameters: str) -> dict[str, Any]:
        """POST these parameters, with the client's own, and return the JSON object of the answer.

        Raises Refusal; TryLater when the provider is unavailable, busy or broken;
        OperatorNeeded when the endpoint does not speak OAuth.
        """
        try:
            from authlib.oauth2.auth import ClientAuth
        except ModuleNotFoundError as error:
            raise OperatorNeeded(
                "access tokens need a package that is not installed", hint="pip install 'archiver[oauth]'"
            ) from error

        # In the body, as Google and Microsoft document, and not by HTTP Basic:
        # providers do not agree on how it encodes odd characters.
        way = "client_secret_post" if client.secret else "none"
        introduction = ClientAuth(client.id, client.secret, way)
        url, headers, body = introduction.prepare("POST", endpoint, dict(_HEADERS), urlencode(parameters))
        host = host_of(endpoint)
        answer = self._outbound.send("POST", url, body.encode(), headers, doing=f"ask {host} for a token")
        # Not by Authlib, which fails on the line ends in Microsoft's descriptions.
        try:
            found = json.loads(answer.body)
        except (ValueError, RecursionError):
            found = None
        is_error = answer.status >= HTTPStatus.BAD_REQUEST
        if not isinstance(found, dict) or (is_error and "error" not in found):
            raise OperatorNeeded(
                f"{host} answered {answer.status}, and not as OAuth does", hint="check the endpoint"
            )
        if "error" in found:
            secrets = [value for name, value in parameters.items() if name not in _PUBLIC]
            raise _refused(host, found, [*secrets, client.secret or ""])
        return found


def _refused(host: str, answer: dict[str, Any], secrets: list[str]) -> Exception:
    """What an OAuth error means: try later, or a Refusal."""
    code = _shown(str(answer["error"]), secrets)
    said = _shown(str(answer.get("error_description", "")), secrets)
    message = f"{host} said {code}{f': {said}' if said else ''}"
    return TryLater(message) if code in _PASSING else Refusal(code, message)


def _shown(text: str, secrets: list[str]) -> str:
    """A provider's words for people: one line, shortened, without anything secret that was sent."""
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."

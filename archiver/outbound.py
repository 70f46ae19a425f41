"""One request to an endpoint of an OAuth provider (RFC 6749 section 3.2, RFC 8628 section 3.1).

Owns the HTTP of it: TLS 1.2 or later, verified by the system's authorities (or
those that ``SSL_CERT_FILE`` names); a proxy where ``HTTPS_PROXY`` names one;
one deadline for all of it, so that a provider which drips cannot hold a thread;
no redirection followed, as it would carry the secrets elsewhere. Promises that
what went wrong is one of our errors, or a ``Refusal`` in the provider's words,
with everything secret that was sent taken out of them. Leaves form and meaning
of the parameters to Authlib and to the caller.
"""

import base64
import http.client
import json
import socket
import ssl
import threading
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, unquote, urlencode, urlsplit

from archiver import __version__
from archiver.errors import OperatorNeeded, TryLater

REQUEST_SECONDS = 30.0
"""From the connection to the last octet of the answer. Providers answer within a second or two."""
ANSWER_BYTES = 256 * 1024
"""Access tokens of Microsoft reach some 10 KB where a person is in many groups; the rest is small."""
LONGEST_WAIT_SECONDS = 3600.0
"""More than an hour is not waited for a provider, whatever its Retry-After says."""

_SHOWN_CHARACTERS = 300
_SHORTEST_SECRET = 4
_PASSING = frozenset({"temporarily_unavailable", "server_error"})
_PUBLIC = frozenset({"client_id", "grant_type", "scope", "redirect_uri"})


class Refusal(Exception):
    """The provider said no, in the words of RFC 6749 section 5.2. ``code`` is its ``error``."""

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
        """``tls`` in place of the usual authorities; ``seconds`` for each request as a whole."""
        self._tls = tls
        self._seconds = seconds

    def ask(self, endpoint: str, client: Client, **parameters: str) -> dict[str, Any]:
        """POST these parameters, with the client's own, and return the JSON object of the answer.

        Raises Refusal; TryLater when the provider is away, busy or out of order;
        OperatorNeeded when what answers there speaks no OAuth.
        """
        try:
            from authlib.oauth2.auth import ClientAuth
        except ModuleNotFoundError as error:
            raise OperatorNeeded(
                "access tokens are to be fetched, and what does that is not installed",
                hint="pip install 'archiver[oauth]'",
            ) from error

        # In the body, which Google and Microsoft write of, and not by HTTP Basic,
        # where providers do not agree on how an odd character is written.
        way = "client_secret_post" if client.secret else "none"
        introduction = ClientAuth(client.id, client.secret, way)
        url, headers, body = introduction.prepare("POST", endpoint, dict(_HEADERS), urlencode(parameters))
        status, content = self._post(url, headers, body)
        # Not by Authlib, to which the line ends in Microsoft's descriptions are an error of their own.
        try:
            told = json.loads(content)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict) or (status >= HTTPStatus.BAD_REQUEST and "error" not in told):
            raise OperatorNeeded(
                f"{_host(endpoint)} answered {status}, and not as OAuth does", hint="check the endpoint"
            )
        if "error" in told:
            secrets = [value for name, value in parameters.items() if name not in _PUBLIC]
            raise _refused(endpoint, told, [*secrets, client.secret or ""])
        return told

    def _post(self, url: str, headers: dict[str, str], body: str) -> tuple[int, bytes]:
        """The request itself: the answer's status and content. Raises TryLater, OperatorNeeded."""
        parts = urlsplit(url)
        host = _host(url)
        connection = _connection(parts, self._tls or _default_tls(), self._seconds)
        cut = threading.Timer(self._seconds, connection.cut)
        cut.daemon = True
        cut.start()
        try:
            path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
            connection.request("POST", path, body.encode(), headers)
            # It holds the socket by itself until it is closed.
            with connection.getresponse() as response:
                content = response.read(ANSWER_BYTES + 1)
        except ssl.SSLCertVerificationError as error:
            raise OperatorNeeded(
                f"{host}: its certificate is not accepted: {error.verify_message}",
                hint="a private authority is trusted where SSL_CERT_FILE names its certificates",
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"it took longer than {self._seconds:g} s" if connection.was_cut else _reason(error)
            raise TryLater(f"cannot ask {host} for a token: {reason}") from error
        finally:
            cut.cancel()
            connection.close()
        if connection.was_cut:
            raise TryLater(f"cannot ask {host} for a token: it took longer than {self._seconds:g} s")
        if len(content) > ANSWER_BYTES:
            raise OperatorNeeded(
                f"{host} answered with more than {ANSWER_BYTES} octets, and was not heard out"
            )
        _check_status(host, response)
        return response.status, content


_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "Connection": "close",
    "Content-Type": "application/x-www-form-urlencoded",
    "User-Agent": f"archiver/{__version__}",
}


class _Connection(http.client.HTTPSConnection):
    """A connection that another thread can cut at any moment, the TLS handshake included."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, seconds: float, server: str) -> None:
        super().__init__(host, port, timeout=seconds, context=tls)
        self._tls = tls
        self._server = server
        self.was_cut = False

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)  # TCP, and a proxy's CONNECT
        self.sock = self._tls.wrap_socket(
            self.sock, server_hostname=self._server, do_handshake_on_connect=False
        )
        if self.was_cut:
            raise TimeoutError
        self.sock.do_handshake()

    def cut(self) -> None:
        """End it under the hands of whoever waits for it."""
        self.was_cut = True
        with suppress(OSError, TypeError):  # not connected yet, or not any more
            # Not the SSL socket's own, which would take its TLS away from the reader.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


def _connection(to: SplitResult, tls: ssl.SSLContext, seconds: float) -> _Connection:
    host, port = to.hostname or "", to.port or http.client.HTTPS_PORT
    proxies = urllib.request.getproxies()
    named = proxies.get("https")
    if not named or urllib.request.proxy_bypass(f"{host}:{port}"):
        return _Connection(host, port, tls, seconds, host)
    try:
        proxy = urlsplit(named if "://" in named else f"http://{named}")
        at = (proxy.hostname or "", proxy.port or http.client.HTTP_PORT)
    except ValueError:
        raise OperatorNeeded("HTTPS_PROXY names no proxy", hint="it is http://host:port") from None
    connection = _Connection(*at, tls, seconds, host)
    headers = {}
    if proxy.username:
        login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    return connection


def _default_tls() -> ssl.SSLContext:
    tls = ssl.create_default_context()
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    return tls


def _check_status(host: str, response: http.client.HTTPResponse) -> None:
    status = response.status
    if (
        status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT}
        or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    ):
        raise TryLater(
            f"{host} answered {status} when asked for a token",
            wait_seconds=_wait_seconds(response.getheader("Retry-After")),
        )
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        raise OperatorNeeded(
            f"{host} answered {status}: it points elsewhere, where secrets are not taken",
            hint="check the endpoint",
        )


def _wait_seconds(retry_after: str | None) -> float | None:
    """Seconds or a date (RFC 9110 section 10.2.3); None for what is neither."""
    if not retry_after:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        seconds = float(retry_after[:9])
    else:
        try:
            seconds = (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_WAIT_SECONDS)


def _refused(endpoint: str, told: dict[str, Any], secrets: list[str]) -> Exception:
    """What an OAuth error means: to be tried later, or a Refusal."""
    code = _shown(str(told["error"]), secrets)
    said = _shown(str(told.get("error_description", "")), secrets)
    message = f"{_host(endpoint)} said {code}{f': {said}' if said else ''}"
    return TryLater(message) if code in _PASSING else Refusal(code, message)


def _shown(text: str, secrets: list[str]) -> str:
    """A provider's words for people: one line, cut, nothing of what was sent in it."""
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return " ".join(str(error).split()) or type(error).__name__

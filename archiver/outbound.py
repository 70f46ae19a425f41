"""One HTTPS request to a foreign server, bounded in time and size, for all parts that call out.

Owns the HTTP of it. TLS is 1.2 or later and verified by the system's
authorities, or by those that ``SSL_CERT_FILE`` names; a proxy is used where
``HTTPS_PROXY`` names one. One deadline covers everything from the connection to
the last byte, so that a server which drips cannot hold a thread. Redirects are
not followed: they would carry secrets elsewhere.

Promises that every failure is ``TryLater`` or ``OperatorNeeded``, and that no
error shows what was sent, or what the server said: it may repeat what it was
sent. (Of a proxy's refusal, the status line is shown.) Leaves the meaning of an
answer to the caller.
"""

import base64
import http.client
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import SplitResult, unquote, urlsplit

from archiver import __version__
from archiver.errors import ArchiverError, OperatorNeeded, TryLater

REQUEST_SECONDS = 30.0
"""From the connection to the last byte of the answer. Most servers answer within a second or two."""
ANSWER_BYTES = 256 * 1024
"""The largest answer of a caller that sets no limit. Access tokens of Microsoft reach 10 KB."""
LONGEST_WAIT_SECONDS = 3600.0
"""A server's Retry-After counts up to here."""

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BUSY = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
_HEADERS = {
    "Accept-Encoding": "identity",
    "Connection": "close",
    "User-Agent": f"archiver/{__version__}",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A status that is neither a redirect nor trouble of the server, with what came with it."""

    status: int
    headers: Mapping[str, str]
    """By name in lower case."""
    body: bytes = field(repr=False)


class Outbound:
    """Sends requests, each on a connection of its own. Used by many threads."""

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        seconds: float = REQUEST_SECONDS,
        answer_bytes: int = ANSWER_BYTES,
    ) -> None:
        """``tls`` replaces the usual authorities; ``seconds`` and ``answer_bytes`` bound each request."""
        self._tls = tls
        self._seconds = seconds
        self._answer_bytes = answer_bytes

    def send(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        doing: str,
    ) -> Answer:
        """Send one request, and return the answer below 300 or from 400 to 499.

        ``doing`` is for errors, and follows "cannot": "ask idp.example for a
        token". Raises TryLater (the server is unavailable, busy, broken or too
        slow), with the wait that it asked for; OperatorNeeded (a certificate that
        is not accepted, a redirect, too large an answer, an unusable URL or header).
        """
        try:
            parts = urlsplit(check_url(url))
        except ValueError as error:
            raise OperatorNeeded(f"cannot {doing}: {error}") from None
        all_headers = _HEADERS | dict(headers or {})
        for name, value in all_headers.items():
            if not (_HEADER_NAME.fullmatch(name) and value.isascii() and value.isprintable()):
                raise OperatorNeeded(f"cannot {doing}: {name!a} holds what no header can hold")
        connection = _connection(parts, self._tls or _default_tls(), self._seconds)
        with _Deadline(self._seconds, connection.cut):
            try:
                path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
                connection.request(method, path, body, all_headers)
                # The response holds the socket by itself until it is closed.
                with connection.getresponse() as response:
                    content = response.read(self._answer_bytes + 1)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self._failure(error, doing, was_cut=connection.was_cut) from None
            finally:
                connection.close()
        if connection.was_cut:
            raise self._too_slow(doing)
        if len(content) > self._answer_bytes:
            raise OperatorNeeded(f"cannot {doing}: it answered with more than {self._answer_bytes} bytes")
        answered = {name.lower(): value for name, value in response.getheaders()}
        _check_status(response.status, answered, doing)
        return Answer(response.status, answered, content)

    def _too_slow(self, doing: str) -> TryLater:
        return TryLater(f"cannot {doing}: it took longer than {self._seconds:g} s")

    def _failure(self, error: Exception, doing: str, *, was_cut: bool) -> ArchiverError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return OperatorNeeded(
                f"cannot {doing}: its certificate is not accepted: {error.verify_message}",
                hint="to trust a private authority, set SSL_CERT_FILE to the file of its certificates",
            )
        if was_cut:
            return self._too_slow(doing)
        return TryLater(f"cannot {doing}: {_reason(error)}")


def check_url(url: str) -> str:
    """The URL itself, if secrets may be sent to it. Raises ValueError, without showing it."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
        bare = parts.username is None and not parts.fragment
    except ValueError:
        whole = bare = False
    if not (whole and bare and re.fullmatch("[!-~]+", url)):
        raise ValueError("an endpoint is an https:// address without a user name")
    return url


def host_of(url: str) -> str:
    """Host and port of a URL, for messages."""
    return urlsplit(url).netloc.rpartition("@")[2]


class _Deadline:
    """Calls ``cut`` from another thread when the time is up before the block ends."""

    def __init__(self, seconds: float, cut: Callable[[], None]) -> None:
        self._timer = threading.Timer(seconds, cut)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


class _Connection(http.client.HTTPSConnection):
    """A connection that another thread can cut at any moment, also during the TLS handshake."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, seconds: float, server: str) -> None:
        super().__init__(host, port, timeout=seconds, context=tls)
        self._tls = tls
        self._server = server
        self._ends_at = time.monotonic() + seconds
        # The standard library's own hook. Its function would give each address of a host the whole time.
        self._create_connection = self._reach
        self.was_cut = False

    def _reach(self, address: tuple[str, int], *_: object) -> socket.socket:
        last: OSError = TimeoutError()
        for family, kind, protocol, _name, found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            left = self._ends_at - time.monotonic()
            if left <= 0 or self.was_cut:
                break
            reached = socket.socket(family, kind, protocol)
            try:
                reached.settimeout(left)
                reached.connect(found)
            except OSError as error:
                reached.close()
                last = error
            else:
                return reached
        raise last

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)  # TCP, and a proxy's CONNECT
        self.sock = self._tls.wrap_socket(
            self.sock, server_hostname=self._server, do_handshake_on_connect=False
        )
        if self.was_cut:
            raise TimeoutError
        self.sock.do_handshake()

    def cut(self) -> None:
        """End the connection while another thread waits for it."""
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
        raise OperatorNeeded(
            "HTTPS_PROXY does not name a proxy", hint="its form is http://host:port"
        ) from None
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


def _check_status(status: int, headers: Mapping[str, str], doing: str) -> None:
    if status in _BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise TryLater(
            f"cannot {doing}: it answered {status}", wait_seconds=_wait_seconds(headers.get("retry-after"))
        )
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        raise OperatorNeeded(
            f"cannot {doing}: it answered {status}, a redirect, which is not followed",
            hint="check the endpoint",
        )


def _wait_seconds(retry_after: str | None) -> float | None:
    """From seconds or a date (RFC 9110 section 10.2.3); None for anything else."""
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


def _reason(error: Exception) -> str:
    """What went wrong, without the server's own words."""
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, OSError):
        return " ".join(str(error.strerror or error).split()) or type(error).__name__
    return "it does not speak HTTP as it must"

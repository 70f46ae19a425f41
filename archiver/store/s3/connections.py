"""Connections to one S3 server: kept open, replaced when the server closed them, bounded in time.

Owns sockets and TLS. Promises that a request is sent a second time only where
a kept connection turned out to be closed. Every error is one that botocore
raises. Leaves the words of the request to ``put.py`` and those of the answer
to ``http.py``.
"""

import os
import socket
import ssl
import weakref
from contextlib import ExitStack, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from botocore import exceptions as boto
from botocore.httpsession import where
from urllib3.util.wait import wait_for_read

from archiver.store.s3.http import Answer, BadAnswerError, read_answer

if TYPE_CHECKING:
    import boto3

__all__ = ["Connections", "host_header", "tls_as_botocore"]

# A socket's timeout applies to one call of sendall, however much that sends.
_SEND_BYTES = 128 * 1024

_USUAL_PORTS = {"http": 80, "https": 443}

# What a connection raises that the server closed while it was idle.
_CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class Connections:
    """As many connections as there are threads, of which ``most_idle`` are kept open."""

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext | None,
        *,
        most_idle: int,
        connect_timeout_seconds: float,
        read_timeout_seconds: float,
    ) -> None:
        """``url`` names scheme, host and port. ``tls`` is needed for https."""
        self.url = url
        self._tls = tls
        self._most_idle = most_idle
        self._connect_timeout_seconds = connect_timeout_seconds
        self._read_timeout_seconds = read_timeout_seconds
        self._idle: list[socket.socket] = []
        weakref.finalize(self, _close_all, self._idle)

    def ask(self, head: bytes, content: bytes) -> Answer:
        """Send one request and return its answer, of any status. Raises botocore's HTTPClientError."""
        try:
            if (connection := self._kept()) is not None:
                with suppress(*_CLOSED):
                    return self._ask(connection, head, content)
            return self._ask(self._open(), head, content)
        except boto.BotoCoreError:
            raise  # from _open; most of them are OSErrors, too
        except ssl.SSLError as error:
            raise boto.SSLError(endpoint_url=self.url, error=error) from error
        except TimeoutError as error:
            raise boto.ReadTimeoutError(endpoint_url=self.url, error=error) from error
        except (OSError, BadAnswerError) as error:
            raise boto.ConnectionClosedError(endpoint_url=self.url, error=error) from error

    def _kept(self) -> socket.socket | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            # No answer is due. What can be read there is the end, or an answer that nothing asked for.
            if not wait_for_read(connection, 0):
                return connection
            connection.close()

    def _open(self) -> socket.socket:
        to = urlsplit(self.url)
        host, port = to.hostname or "", to.port or _USUAL_PORTS[to.scheme]
        with ExitStack() as undo:
            try:
                connection = socket.create_connection((host, port), self._connect_timeout_seconds)
                undo.callback(connection.close)
                if self._tls is not None:
                    connection = self._tls.wrap_socket(connection, server_hostname=host)
                    undo.callback(connection.close)
            except ssl.SSLError as error:
                raise boto.SSLError(endpoint_url=self.url, error=error) from error
            except TimeoutError as error:
                raise boto.ConnectTimeoutError(endpoint_url=self.url, error=error) from error
            except (OSError, ValueError) as error:  # ValueError: not a name in DNS
                raise boto.EndpointConnectionError(endpoint_url=self.url, error=error) from error
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(self._read_timeout_seconds)
            undo.pop_all()
        return connection

    def _ask(self, connection: socket.socket, head: bytes, content: bytes) -> Answer:
        is_kept = False
        try:
            closed: OSError | None = None
            try:
                _send(connection, head, content)
            except (BrokenPipeError, ConnectionResetError) as error:
                closed = error  # the server may have answered first, and said why
            answer = read_answer(connection.recv)
            if closed is not None and answer.status < HTTPStatus.BAD_REQUEST:
                raise closed  # a success cannot be for a body that was not sent
            if not (closed or answer.is_last) and len(self._idle) < self._most_idle:
                self._idle.append(connection)
                is_kept = True
            return answer
        finally:
            if not is_kept:
                connection.close()


def _send(connection: socket.socket, head: bytes, content: bytes) -> None:
    """Send the head together with the body, or as much as fits: one system call for most requests."""
    view = memoryview(content)
    first = max(0, _SEND_BYTES - len(head))
    connection.sendall(head + view[:first])
    for start in range(first, len(view), _SEND_BYTES):
        connection.sendall(view[start : start + _SEND_BYTES])


def host_header(url: str) -> str:
    """The value of the Host header: with the port, unless it is the scheme's own."""
    to = urlsplit(url)
    host = f"[{to.hostname}]" if ":" in (to.hostname or "") else to.hostname or ""
    return host if to.port in (None, _USUAL_PORTS[to.scheme]) else f"{host}:{to.port}"


def tls_as_botocore(session: "boto3.session.Session") -> ssl.SSLContext:
    """TLS that trusts whom botocore trusts: AWS_CA_BUNDLE or its setting, REQUESTS_CA_BUNDLE, its own list.

    Raises OSError when that file cannot be read.
    """
    core = session._session  # boto3's own attributes leave this setting out
    bundle = core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    # Not create_default_context, whose newer rules refuse certificates that botocore accepts.
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.set_alpn_protocols(["http/1.1"])
    tls.load_verify_locations(cafile=bundle or where())
    return tls


def _close_all(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()

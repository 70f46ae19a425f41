"""The PUT of a small object, which is made for every message, without boto3's layers.

Owns that one request: its signature, its connections, and what its answer,
which ``http.py`` reads, means. Promises what boto3's ``put_object`` does, for
about a fifth of its CPU. The SHA-256 by which the caller knows an object is its
checksum and covered by the signature too, so that nothing is hashed here.

Decides nothing of its own about URLs, regions and styles of addressing: boto3
makes a first request, which is stopped before it is sent, and shows. Where
that one is not, header by header, what would be sent from here (S3 Express,
another signature, somebody's hooks), or goes by a proxy or with a client's
certificate, or where the server points to another region, boto3 must do it.

Leaves what errors mean to the caller: all are those that botocore raises.
"""

import hmac
import os
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256 as sha256_of
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from botocore import exceptions as boto
from botocore.auth import SIGV4_TIMESTAMP
from botocore.httpsession import where
from botocore.parsers import create_parser
from botocore.utils import get_environ_proxies
from urllib3.util.wait import wait_for_read

from archiver.store.s3.http import Answer, BadAnswerError, read_answer

if TYPE_CHECKING:
    import boto3
    from botocore.awsrequest import AWSPreparedRequest
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client

__all__ = ["SmallPut"]

# A socket's timeout is for one call of sendall, however much that sends.
_SEND_BYTES = 128 * 1024

# docs.aws.amazon.com/AmazonS3/latest/API/sigv4-auth-using-authorization-header.html
_AUTHORIZATION = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]+/\d{8}/([^/,]+)/([^/,]+)/aws4_request, .+")
_OF_SIGNATURE = {"authorization", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"}
_OF_BOTO3 = {"amz-sdk-invocation-id", "amz-sdk-request", "expect"}  # for its retries, and for large bodies

_USUAL_PORTS = {"http": 80, "https": 443}

# What boto3 answers by looking up the bucket's region, beside every redirection.
_ELSEWHERE = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}

# A connection that the server closed while it was idle.
_HUNG_UP = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What boto3's request showed. ``base_path`` is all of the path that comes before the key."""

    host: str
    base_path: str
    service: str
    region: str
    user_agent: str
    credentials: "Credentials"
    connections: "_Connections"


class SmallPut:
    """Puts objects as ``client``, made by ``session``, would. For any number of threads."""

    def __init__(self, session: "boto3.session.Session", client: "S3Client") -> None:
        self._session = session
        self._client = client
        self._plan: _Plan | None = None
        self._is_for_boto3 = False
        self._lock = threading.Lock()
        self._rehearsing = threading.local()
        client.meta.events.register("before-send.s3.PutObject", self._stop_rehearsal)

    def send(self, put: Mapping[str, Any], sha256: bytes) -> Mapping[str, str] | None:
        """The answer's headers, their names in lower case; or None where boto3 must do it.

        ``put`` is what boto3's ``put_object`` takes, its ``Body`` in octets,
        and must be safe to repeat: where a connection was closed while it was
        idle, the request is sent again on a new one. Raises what botocore
        raises, ClientError with the server's code foremost.
        """
        plan = self._plan
        if plan is None:
            with self._lock:
                plan = self._plan = self._plan or self._planned(put)
            if plan is None:
                return None
        answer = plan.connections.ask(_signed_head(plan, put, sha256), put["Body"])
        if HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
            return answer.headers
        if answer.status >= HTTPStatus.BAD_REQUEST:
            refusal = _PARSER.parse(
                {"status_code": answer.status, "headers": answer.headers, "body": answer.body}, _NO_SHAPE
            )
            if refusal.get("Error", {}).get("Code") not in _ELSEWHERE:
                raise boto.ClientError(refusal, "PutObject")
        self._plan = None  # boto3 remembers where it was sent to, and shows it the next time
        return None

    def _planned(self, put: Mapping[str, Any]) -> _Plan | None:
        if self._is_for_boto3:
            return None
        request = self._rehearse(put)
        plan = self._read(request, put) if request is not None else None
        self._is_for_boto3 = plan is None
        return plan

    def _rehearse(self, put: Mapping[str, Any]) -> "AWSPreparedRequest | None":
        self._rehearsing.now = True
        try:
            self._client.put_object(**put)
        except _RehearsedError as rehearsed:
            return rehearsed.request
        finally:
            self._rehearsing.now = False
        return None

    def _stop_rehearsal(self, request: "AWSPreparedRequest", **_: object) -> None:
        if getattr(self._rehearsing, "now", False):
            raise _RehearsedError(request)

    def _read(self, request: "AWSPreparedRequest", put: Mapping[str, Any]) -> _Plan | None:
        """The plan that boto3's request shows, or None where anything about it is unusual."""
        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        authorization = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
        ours = _headers(put) | {"user-agent": headers.get("user-agent", "")}
        theirs = {name: headers[name] for name in headers.keys() - _OF_SIGNATURE - _OF_BOTO3}
        base_url = request.url.removesuffix(_quoted(put["Key"]))
        config: Any = self._client.meta.config
        credentials = self._session.get_credentials()
        if (
            authorization is None
            or theirs != ours
            or base_url == request.url
            or "?" in base_url
            or credentials is None
            or config.client_cert
            or config.proxies
            or _has_proxy(self._client.meta.endpoint_url)
            or _has_proxy(request.url)
        ):
            return None
        try:
            tls = _tls(self._session) if base_url.startswith("https:") else None
        except OSError:
            return None  # no such file of authorities, or none that can be read: boto3 says so
        connections = _Connections(
            base_url,
            tls,
            most_idle=config.max_pool_connections,
            connect_timeout_seconds=config.connect_timeout,
            read_timeout_seconds=config.read_timeout,
        )
        region, service = authorization.groups()
        base_path = urlsplit(base_url).path
        host = _host_header(base_url)
        return _Plan(host, base_path, service, region, ours["user-agent"], credentials, connections)


class _RehearsedError(Exception):
    """Stops boto3 where it would send."""

    def __init__(self, request: "AWSPreparedRequest") -> None:
        super().__init__("rehearsed")
        self.request = request


def _signed_head(plan: _Plan, put: Mapping[str, Any], sha256: bytes) -> bytes:
    """The request without its body, which the signature covers too, by the SHA-256 that is known.

    botocore leaves the body out over https. All else is signed as it would:
    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    Raises HTTPClientError for what would not stay one header.
    """
    # Asked for each time: those of a role are renewed now and then.
    credentials = plan.credentials.get_frozen_credentials()
    path = plan.base_path + _quoted(put["Key"])
    digest = sha256.hex()
    timestamp = time.strftime(SIGV4_TIMESTAMP, time.gmtime())
    date = timestamp[:8]
    headers = {
        "host": plan.host,
        **_headers(put),
        "x-amz-content-sha256": digest,
        "x-amz-date": timestamp,
    }
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    names = sorted(headers)
    lines = [f"{name}:{headers[name]}\n" for name in names]
    canonical = f"PUT\n{path}\n\n{''.join(lines)}\n{';'.join(names)}\n{digest}"
    scope = f"{date}/{plan.region}/{plan.service}/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{timestamp}\n{scope}\n{sha256_of(canonical.encode()).hexdigest()}"
    key = _signing_key(credentials.secret_key, date, plan.region, plan.service)
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    headers["user-agent"] = plan.user_agent  # proxies may change it: botocore does not sign it either
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, "
        f"SignedHeaders={';'.join(names)}, Signature={signature}"
    )
    sent = [f"PUT {path} HTTP/1.1", *[f"{name}: {value}" for name, value in headers.items()], "", ""]
    text = "".join(sent)
    if not (text.isascii() and text.isprintable()):
        # Without what it is: a token, perhaps.
        raise boto.HTTPClientError(error=ValueError("not fit for a header"))
    return "\r\n".join(sent).encode()


# Of a day and of the secret: one of each, and those that take over from them.
@lru_cache(maxsize=4)
def _signing_key(secret_key: str, date: str, region: str, service: str) -> bytes:
    key = f"AWS4{secret_key}".encode()
    for part in (date, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


class _Connections:
    """Connections to one server; as many as there are threads, of which ``most_idle`` are kept open."""

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext | None,
        *,
        most_idle: int,
        connect_timeout_seconds: float,
        read_timeout_seconds: float,
    ) -> None:
        self._url = url
        self._tls = tls
        self._most_idle = most_idle
        self._connect_timeout_seconds = connect_timeout_seconds
        self._read_timeout_seconds = read_timeout_seconds
        self._idle: list[socket.socket] = []
        weakref.finalize(self, _close_all, self._idle)

    def ask(self, head: bytes, content: bytes) -> Answer:
        """One request and its answer, whatever that is. Raises botocore's HTTPClientError."""
        try:
            if (connection := self._kept()) is not None:
                with suppress(*_HUNG_UP):
                    return self._ask(connection, head, content)
            return self._ask(self._open(), head, content)
        except boto.BotoCoreError:
            raise  # of _open; most of them are OSErrors, too
        except ssl.SSLError as error:
            raise boto.SSLError(endpoint_url=self._url, error=error) from error
        except TimeoutError as error:
            raise boto.ReadTimeoutError(endpoint_url=self._url, error=error) from error
        except (OSError, BadAnswerError) as error:
            raise boto.ConnectionClosedError(endpoint_url=self._url, error=error) from error

    def _kept(self) -> socket.socket | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            # Nothing is due: what can be read there is the end, or an answer to no question.
            if not wait_for_read(connection, 0):
                return connection
            connection.close()

    def _open(self) -> socket.socket:
        to = urlsplit(self._url)
        host, port = to.hostname or "", to.port or _USUAL_PORTS[to.scheme]
        with ExitStack() as undo:
            try:
                connection = socket.create_connection((host, port), self._connect_timeout_seconds)
                undo.callback(connection.close)
                if self._tls is not None:
                    connection = self._tls.wrap_socket(connection, server_hostname=host)
                    undo.callback(connection.close)
            except ssl.SSLError as error:
                raise boto.SSLError(endpoint_url=self._url, error=error) from error
            except TimeoutError as error:
                raise boto.ConnectTimeoutError(endpoint_url=self._url, error=error) from error
            except (OSError, ValueError) as error:  # ValueError: a name that is none in the DNS
                raise boto.EndpointConnectionError(endpoint_url=self._url, error=error) from error
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(self._read_timeout_seconds)
            undo.pop_all()
        return connection

    def _ask(self, connection: socket.socket, head: bytes, content: bytes) -> Answer:
        is_kept = False
        try:
            hung_up: OSError | None = None
            try:
                _send(connection, head, content)
            except (BrokenPipeError, ConnectionResetError) as error:
                hung_up = error  # it may have said before why it wants no more
            answer = read_answer(connection.recv)
            if hung_up is not None and answer.status < HTTPStatus.BAD_REQUEST:
                raise hung_up  # no success of what was not sent
            if not (hung_up or answer.is_last) and len(self._idle) < self._most_idle:
                self._idle.append(connection)
                is_kept = True
            return answer
        finally:
            if not is_kept:
                connection.close()


def _send(connection: socket.socket, head: bytes, content: bytes) -> None:
    """The head goes together with the body, or what fits of it: one system call for most requests."""
    view = memoryview(content)
    first = max(0, _SEND_BYTES - len(head))
    connection.sendall(head + view[:first])
    for start in range(first, len(view), _SEND_BYTES):
        connection.sendall(view[start : start + _SEND_BYTES])


_PARSER = create_parser("rest-xml")
_NO_SHAPE: Any = None  # an error's answer has none


def _close_all(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def _headers(put: Mapping[str, Any]) -> dict[str, str]:
    """What is sent of it. None of the values has spaces that a signature would leave out."""
    return {
        "content-length": str(len(put["Body"])),
        "content-type": put["ContentType"],
        "if-none-match": put["IfNoneMatch"],
        "x-amz-checksum-sha256": put["ChecksumSHA256"],
        **{f"x-amz-meta-{name}": value for name, value in put["Metadata"].items()},
    }


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _quoted(name: str) -> str:
    return quote(name, safe="/~")


def _host_header(url: str) -> str:
    """As everybody sends it: with the port, unless that is the scheme's own."""
    to = urlsplit(url)
    host = f"[{to.hostname}]" if ":" in (to.hostname or "") else to.hostname or ""
    return host if to.port in (None, _USUAL_PORTS[to.scheme]) else f"{host}:{to.port}"


def _has_proxy(url: str) -> bool:
    return bool(get_environ_proxies(url).get(urlsplit(url).scheme))


def _tls(session: "boto3.session.Session") -> ssl.SSLContext:
    """Trusts whom botocore trusts: AWS_CA_BUNDLE or its setting, REQUESTS_CA_BUNDLE, then the usual ones."""
    core = session._session  # what boto3 itself shows of the settings leaves this one out
    bundle = core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    # Not create_default_context, whose newer rules refuse certificates that botocore accepts.
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.set_alpn_protocols(["http/1.1"])
    tls.load_verify_locations(cafile=bundle or where())
    return tls

"""The PUT of a small object, which is made for every message, without boto3's layers.

Owns that one request: its signature, its connections, its answer. Promises
what boto3's ``put_object`` does, for about a third of its CPU. The SHA-256 by
which the caller knows an object is its checksum and covered by the signature
too, so that nothing is hashed here.

Decides nothing of its own about URLs, regions and styles of addressing: boto3
makes a first request, which is stopped before it is sent, and shows. Where
that one is not, header by header, what would be sent from here (S3 Express,
another signature, somebody's hooks), or goes by a proxy or with a client's
certificate, or where the server points to another region, boto3 must do it.

Leaves what errors mean to the caller: all are those that botocore raises.
"""

import http.client
import os
import re
import ssl
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http import HTTPStatus
from socket import SO_KEEPALIVE, SOL_SOCKET
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from botocore import exceptions as boto
from botocore.auth import SIGV4_TIMESTAMP, S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import get_current_datetime
from botocore.httpsession import where
from botocore.parsers import create_parser
from botocore.utils import get_environ_proxies
from urllib3.util.wait import wait_for_read

if TYPE_CHECKING:
    import boto3
    from botocore.awsrequest import AWSPreparedRequest
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client

__all__ = ["SmallPut"]

# An error's XML has some hundred octets. What is longer is cut, and counts by its status.
_ANSWER_BYTES = 64 * 1024

# A socket's timeout is for one call of sendall, however much that sends.
_SEND_BYTES = 128 * 1024

# docs.aws.amazon.com/AmazonS3/latest/API/sigv4-auth-using-authorization-header.html
_AUTHORIZATION = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]+/\d{8}/([^/,]+)/([^/,]+)/aws4_request, .+")
_OF_SIGNATURE = {"authorization", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"}
_OF_BOTO3 = {"amz-sdk-invocation-id", "amz-sdk-request", "expect"}  # for its retries, and for large bodies

# Proxies may change it (botocore.auth.SIGNED_HEADERS_BLACKLIST).
_UNSIGNED = {"user-agent"}

# What boto3 answers by looking up the bucket's region, beside every redirection.
_ELSEWHERE = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}

# A connection that the server closed while it was idle.
_HUNG_UP = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


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
        with self._lock:
            plan = self._plan = self._plan or self._planned(put)
        if plan is None:
            return None
        path = plan.base_path + _quoted(put["Key"])
        # Asked for each time: those of a role are renewed now and then.
        signer = _Signer(plan.credentials.get_frozen_credentials(), plan.service, plan.region)
        headers = signer.sign_put(plan.host, path, _headers(put, plan.user_agent), sha256)
        answer = plan.connections.put(path, headers, put["Body"])
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
        ours = {name.lower(): value for name, value in _headers(put, headers.get("user-agent", "")).items()}
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


class _Signer(S3SigV4Auth):
    """Signs by botocore's arithmetic, but words the canonical request itself: that is most of the work.

    The body is covered, too, by the SHA-256 that is known; botocore leaves it
    out over https. What is signed is what botocore would sign:
    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """

    def sign_put(
        self, host: str, path: str, headers: Mapping[str, str], sha256: bytes
    ) -> list[tuple[str, str]]:
        """The headers of the request, with its signature. ``path`` is quoted, as it is sent."""
        request = AWSRequest()
        timestamp = request.context["timestamp"] = get_current_datetime().strftime(SIGV4_TIMESTAMP)
        digest = sha256.hex()
        added = {"X-Amz-Date": timestamp, "X-Amz-Content-SHA256": digest}
        if self.credentials.token:
            added["X-Amz-Security-Token"] = self.credentials.token
        sent = {**headers, **added}
        signed = {name.lower(): " ".join(value.split()) for name, value in sent.items()}
        signed["host"] = host
        names = sorted(signed.keys() - _UNSIGNED)
        lines = "".join(f"{name}:{signed[name]}\n" for name in names)
        canonical = f"PUT\n{path}\n\n{lines}\n{';'.join(names)}\n{digest}"
        signature = self.signature(self.string_to_sign(request, canonical), request)
        sent["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.scope(request)}, "
            f"SignedHeaders={';'.join(names)}, Signature={signature}"
        )
        return list(sent.items())


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
        self._idle: list[http.client.HTTPConnection] = []
        weakref.finalize(self, _close_all, self._idle)

    def put(self, path: str, headers: Sequence[tuple[str, str]], content: bytes) -> _Answer:
        """One request and its answer, whatever that is. Raises botocore's HTTPClientError."""
        try:
            response = None
            if (connection := self._kept()) is not None:
                with suppress(*_HUNG_UP):
                    response = self._ask(connection, path, headers, content)
            if connection is None or response is None:
                connection = self._open()
                response = self._ask(connection, path, headers, content)
            return self._answer(connection, response)
        except boto.BotoCoreError:
            raise  # of _open; most of them are OSErrors, too
        except ssl.SSLError as error:
            raise boto.SSLError(endpoint_url=self._url, error=error) from error
        except TimeoutError as error:
            raise boto.ReadTimeoutError(endpoint_url=self._url, error=error) from error
        except (OSError, http.client.HTTPException) as error:
            raise boto.ConnectionClosedError(endpoint_url=self._url, error=error) from error
        except ValueError:
            # Its own text shows the header: a token, perhaps.
            raise boto.HTTPClientError(error=ValueError("not fit for a header")) from None

    def _kept(self) -> http.client.HTTPConnection | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            # Nothing is due: what can be read there is the end, or an answer to no question.
            if connection.sock is not None and not wait_for_read(connection.sock, 0):
                return connection
            connection.close()

    def _open(self) -> http.client.HTTPConnection:
        to = urlsplit(self._url)
        host, timeout = to.hostname or "", self._connect_timeout_seconds
        if self._tls is None:
            connection = http.client.HTTPConnection(host, to.port, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection(host, to.port, timeout=timeout, context=self._tls)
        with ExitStack() as undo:
            undo.callback(connection.close)
            try:
                connection.connect()
            except ssl.SSLError as error:
                raise boto.SSLError(endpoint_url=self._url, error=error) from error
            except TimeoutError as error:
                raise boto.ConnectTimeoutError(endpoint_url=self._url, error=error) from error
            except (OSError, ValueError) as error:  # ValueError: a name that is none in the DNS
                raise boto.EndpointConnectionError(endpoint_url=self._url, error=error) from error
            connection.sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
            connection.sock.settimeout(self._read_timeout_seconds)
            undo.pop_all()
        return connection

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        path: str,
        headers: Sequence[tuple[str, str]],
        content: bytes,
    ) -> http.client.HTTPResponse:
        view = memoryview(content)
        hung_up: OSError | None = None
        with ExitStack() as undo:
            undo.callback(connection.close)
            connection.putrequest("PUT", path, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            try:
                connection.endheaders(
                    [view[start : start + _SEND_BYTES] for start in range(0, len(view), _SEND_BYTES)]
                )
            except (BrokenPipeError, ConnectionResetError) as error:
                hung_up = error  # it may have said before why it wants no more
            response = connection.getresponse()
            if hung_up is not None and response.status < HTTPStatus.BAD_REQUEST:
                raise hung_up  # no success of what was not sent
            undo.pop_all()
        return response

    def _answer(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> _Answer:
        with ExitStack() as undo:
            undo.callback(connection.close)
            body = response.read(_ANSWER_BYTES)
            # An answer without an end, or with more to come, spoils the connection for the next one.
            if response.isclosed() and connection.sock is not None and len(self._idle) < self._most_idle:
                self._idle.append(connection)
                undo.pop_all()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return _Answer(response.status, fields, body)


_PARSER = create_parser("rest-xml")
_NO_SHAPE: Any = None  # an error's answer has none


def _close_all(connections: list[http.client.HTTPConnection]) -> None:
    for connection in connections:
        connection.close()


def _headers(put: Mapping[str, Any], user_agent: str) -> dict[str, str]:
    """All that is sent but the signature, and what HTTP itself adds."""
    return {
        "User-Agent": user_agent,
        "Content-Length": str(len(put["Body"])),
        "Content-Type": put["ContentType"],
        "If-None-Match": put["IfNoneMatch"],
        "x-amz-checksum-sha256": put["ChecksumSHA256"],
        **{f"x-amz-meta-{name}": value for name, value in put["Metadata"].items()},
    }


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _quoted(name: str) -> str:
    return quote(name, safe="/~")


def _host_header(url: str) -> str:
    """As http.client sends it: with the port, unless that is the scheme's own."""
    to = urlsplit(url)
    host = f"[{to.hostname}]" if ":" in (to.hostname or "") else to.hostname or ""
    usual = {"http": 80, "https": 443}[to.scheme]
    return host if to.port in (None, usual) else f"{host}:{to.port}"


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

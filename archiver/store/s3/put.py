"""The PUT of a small object, which is made for every message, without boto3's layers.

Owns that one request and what its answer means. Promises what boto3's
``put_object`` does, for about a fifth of its CPU. The SHA-256 that names the
object is its checksum, and the signature covers it, so nothing is hashed here.

Decides nothing about URLs, regions and headers: boto3 shows them
(``rehearsal.py``), every ``PLAN_SECONDS`` for each kind of object. Where our
request could differ from boto3's, or where the server points to another region,
boto3 sends it. Leaves sockets to ``connections.py`` and the meaning of
errors to the caller: all of them are errors that botocore raises.
"""

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from botocore import exceptions as boto
from botocore.auth import SIGV4_TIMESTAMP
from botocore.parsers import create_parser

from archiver import observe
from archiver.store.s3.connections import Connections, tls_as_botocore
from archiver.store.s3.rehearsal import Plan, Refused, Rehearsal, object_headers, quoted
from archiver.store.s3.signature import Keys, authorization

if TYPE_CHECKING:
    import boto3
    from mypy_boto3_s3 import S3Client

__all__ = ["PLAN_SECONDS", "SmallPut"]

PLAN_SECONDS = 60.0
"""How long a rehearsal counts. A header that a hook takes from the clock, such as the end of a retention,
can be 60 seconds old. A refusal is reconsidered after the same time."""

_KINDS_KEPT = 64

# Parameters of one object. Puts that agree in all others are of one kind, and share a plan.
_OF_OBJECTS = {"Key", "Body", "ContentLength", "ChecksumSHA256", "Metadata"}

# Besides redirects, these make boto3 look up the bucket's region.
_ELSEWHERE = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}

_PARSER = create_parser("rest-xml")
_NO_SHAPE: Any = None  # an error's answer has none


@dataclass(frozen=True, slots=True)
class _Known:
    """The result of one kind of object's last rehearsal. Without a plan, boto3 sends them."""

    plan: Plan | None
    connections: Connections | None
    until: float


class SmallPut:
    """Puts objects as ``client``, made by ``session``, would. For any number of threads."""

    def __init__(
        self,
        session: "boto3.session.Session",
        client: "S3Client",
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._client = client
        self._monotonic = monotonic
        self._rehearsal = Rehearsal(session, client)
        self._lock = threading.Lock()
        self._known: dict[Hashable, _Known] = {}
        self._connections: dict[str, Connections] = {}
        self._refusals: set[str] = set()

    def send(self, put: Mapping[str, Any], sha256: bytes) -> Mapping[str, str] | None:
        """Return the answer's headers, their names in lower case, or None where boto3 must send it.

        ``put`` is what boto3's ``put_object`` takes, with its ``Body`` in bytes,
        and must be safe to repeat: where a connection was closed while it was
        idle, the request is sent again on a new one. Raises what botocore
        raises, ClientError with the server's code foremost.
        """
        known = self._plan_for(put)
        if known.plan is None or known.connections is None:
            return None
        answer = known.connections.ask(_signed_head(known.plan, put, sha256), put["Body"])
        if HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
            return answer.headers
        if answer.status >= HTTPStatus.BAD_REQUEST:
            refusal = _PARSER.parse(
                {"status_code": answer.status, "headers": answer.headers, "body": answer.body}, _NO_SHAPE
            )
            if refusal.get("Error", {}).get("Code") not in _ELSEWHERE:
                raise boto.ClientError(refusal, "PutObject")
        with self._lock:
            self._known.clear()  # boto3 follows, remembers the region, and shows it the next time
        return None

    def _plan_for(self, put: Mapping[str, Any]) -> _Known:
        kind = _kind(put)
        known = self._known.get(kind)
        if known is None or self._monotonic() >= known.until:
            with self._lock:
                known = self._known.get(kind)
                if known is None or self._monotonic() >= known.until:
                    if len(self._known) >= _KINDS_KEPT:
                        self._known.clear()
                    known = self._known[kind] = self._rehearse(put)
        return known

    def _rehearse(self, put: Mapping[str, Any]) -> _Known:
        until = self._monotonic() + PLAN_SECONDS
        try:
            plan = self._rehearsal.plan(put)
            return _Known(plan, self._connections_to(plan.url), until)
        except Refused as refused:
            reason = str(refused)
        if reason not in self._refusals:
            self._refusals.add(reason)
            observe.get_logger().info("store.fast_put_off", reason=reason)
        return _Known(None, None, until)

    def _connections_to(self, url: str) -> Connections:
        connections = self._connections.get(url)
        if connections is None:
            try:
                tls = tls_as_botocore(self._session) if url.startswith("https:") else None
            except OSError:
                raise Refused(
                    "the file of certificate authorities cannot be read"
                ) from None  # boto3 says why
            config: Any = self._client.meta.config
            connections = self._connections[url] = Connections(
                url,
                tls,
                most_idle=config.max_pool_connections,
                connect_timeout_seconds=config.connect_timeout,
                read_timeout_seconds=config.read_timeout,
            )
        return connections


def _kind(put: Mapping[str, Any]) -> Hashable:
    of_all = tuple((name, value) for name, value in put.items() if name not in _OF_OBJECTS)
    return of_all, tuple(put["Metadata"])


def _signed_head(plan: Plan, put: Mapping[str, Any], sha256: bytes) -> bytes:
    """The request without its body. The signature covers the body too, by its SHA-256.

    (botocore leaves the body out over https.) Raises HTTPClientError for a
    value that would not stay one header.
    """
    credentials = plan.credentials.get_frozen_credentials()
    path = plan.path + quoted(put["Key"])
    headers = {
        **plan.signed,
        **object_headers(put),
        "x-amz-content-sha256": sha256.hex(),
        "x-amz-date": time.strftime(SIGV4_TIMESTAMP, time.gmtime()),
    }
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    keys = Keys.of(credentials, plan.region, plan.service)
    signature = authorization(keys, path, headers)
    headers.update(plan.unsigned, authorization=signature)
    sent = [f"PUT {path} HTTP/1.1", *[f"{name}: {value}" for name, value in headers.items()], "", ""]
    text = "".join(sent)
    if not (text.isascii() and text.isprintable()):
        # Without the value: it may be a token.
        raise boto.HTTPClientError(error=ValueError("not fit for a header"))
    return "\r\n".join(sent).encode()

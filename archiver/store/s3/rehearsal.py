"""What boto3 would send for a small PUT, and whether ``put.py`` may send it instead.

boto3 makes the request and is stopped before it sends. So URL, region, style
of addressing and headers are boto3's own: encryption, tags, Object Lock, and
whatever a later boto3 adds by default. Two requests for different objects are
compared. A header that is the same in both is sent with every object. One that
follows from the object is made here. Any other is refused.

Promises that a plan is refused where our request could differ from boto3's.
``Refused`` names the reason, and never a header's value, which may be a secret.
"""

import base64
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256 as sha256_of
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from botocore.utils import get_environ_proxies

from archiver.store.s3.connections import host_header
from archiver.store.s3.signature import Keys, authorization

if TYPE_CHECKING:
    import boto3
    from botocore.awsrequest import AWSPreparedRequest
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client

__all__ = ["Plan", "Refused", "Rehearsal", "object_headers", "quoted"]

# docs.aws.amazon.com/AmazonS3/latest/API/sigv4-auth-using-authorization-header.html
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^,]+/\d{8}/([^/,]+)/([^/,]+)/aws4_request, SignedHeaders=([^,]+), .+"
)

# Made for each request.
_OF_SIGNATURE = {"authorization", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"}
_ALWAYS_SIGNED = {"host", "x-amz-content-sha256", "x-amz-date"}
# For boto3's own retries, and for large bodies.
_OF_BOTO3 = {"amz-sdk-invocation-id", "amz-sdk-request", "expect"}
# With one of these, the body would be sent in another form than it has here.
_OF_ENCODED_BODIES = {
    "content-encoding",
    "transfer-encoding",
    "x-amz-decoded-content-length",
    "x-amz-trailer",
}

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")

# From a key or digest to another one: the account, the first digits and the hash change.
_HEX = re.compile(r"(?<=/)[0-9a-f]{2,}(?=[/.])")
_OTHER_DIGITS = str.maketrans("0123456789abcdef", "123456789abcdef0")


class Refused(Exception):
    """Why boto3 must send these requests itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts that are the same in every request of one kind."""

    url: str
    """All of the URL that comes before the key."""
    path: str
    """The same for its path alone."""
    region: str
    service: str
    credentials: "Credentials"
    """Ask it for the keys each time: those of a role are renewed now and then."""
    signed: Mapping[str, str]
    """Headers that boto3 signs, by name in lower case; ``host`` is one of them."""
    unsigned: Mapping[str, str]
    """Headers that proxies may change, such as ``user-agent``."""


class Rehearsal:
    """Has ``client``, made by ``session``, show its requests. For any number of threads."""

    def __init__(self, session: "boto3.session.Session", client: "S3Client") -> None:
        self._session = session
        self._client = client
        self._rehearsing = threading.local()
        # Last, to see what all other hooks have made of the request.
        client.meta.events.register_last("before-send.s3.PutObject", self._stop)

    def plan(self, put: Mapping[str, Any]) -> Plan:
        """The plan for all objects that are put as this one. Raises Refused, and what botocore raises."""
        config: Any = self._client.meta.config
        if config.client_cert:
            raise Refused("a client certificate is configured")
        if config.proxies or _has_proxy(self._client.meta.endpoint_url):
            raise Refused("a proxy is configured")
        one, another = self._shown(put), self._shown(_another(put))
        if _has_proxy(one.base_url):
            raise Refused("a proxy is configured")
        names = one.headers.keys() | another.headers.keys()
        varying = sorted(name for name in names if one.headers.get(name) != another.headers.get(name))
        if varying:
            raise Refused(f"these headers differ from one object to the next: {', '.join(varying)}")
        if (one.base_url, one.region, one.service) != (another.base_url, another.region, another.service):
            raise Refused("URL or region differ from one object to the next")
        signed = {name: value for name, value in one.headers.items() if name in one.signed}
        return Plan(
            one.base_url,
            urlsplit(one.base_url).path,
            one.region,
            one.service,
            one.credentials,
            {"host": host_header(one.base_url), **signed},
            {name: value for name, value in one.headers.items() if name not in one.signed},
        )

    def _shown(self, put: Mapping[str, Any]) -> "_Shown":
        request = self._rehearse(put)
        headers = _checked_headers(request)
        found = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
        if found is None:
            raise Refused("boto3 does not sign these requests by AWS4-HMAC-SHA256 for one region")
        region, service, signed = found.groups()
        credentials = self._session.get_credentials()
        if credentials is None:
            raise Refused("the session has no credentials of its own")
        base_url = request.url.removesuffix(quoted(put["Key"]))
        if base_url == request.url or "?" in base_url:
            raise Refused("the URL does not end with the object's key")
        if request.method != "PUT" or _body(request) != put["Body"]:
            raise Refused("method or body are not those of the object")
        keys = Keys.of(credentials.get_frozen_credentials(), region, service)
        covered = {name: headers[name] for name in signed.split(";") if name in headers}
        covered.setdefault("host", host_header(request.url))
        path = urlsplit(request.url).path
        if (
            not covered.keys() >= _ALWAYS_SIGNED
            or authorization(keys, path, covered) != headers["authorization"]
        ):
            raise Refused("boto3 signs with other credentials than the session's, or in another way")
        for name, value in object_headers(put).items():
            if headers.pop(name, None) != value:
                raise Refused(f"{name} does not follow from the object")
        for name in _OF_SIGNATURE | _OF_BOTO3:
            headers.pop(name, None)
        return _Shown(base_url, region, service, credentials, headers, frozenset(signed.split(";")))

    def _rehearse(self, put: Mapping[str, Any]) -> "AWSPreparedRequest":
        self._rehearsing.now = True
        try:
            self._client.put_object(**put)
        except _RehearsedError as rehearsed:
            return rehearsed.request
        finally:
            self._rehearsing.now = False
        raise Refused("a hook answers these requests itself")

    def _stop(self, request: "AWSPreparedRequest", **_: object) -> None:
        if getattr(self._rehearsing, "now", False):
            raise _RehearsedError(request)


@dataclass(frozen=True, slots=True)
class _Shown:
    """One request that boto3 would send."""

    base_url: str
    region: str
    service: str
    credentials: "Credentials"
    headers: Mapping[str, str]
    """Those that neither follow from the object nor are made for each request."""
    signed: frozenset[str]
    """The names of all headers that the signature covers."""


class _RehearsedError(Exception):
    """Stops boto3 where it would send."""

    def __init__(self, request: "AWSPreparedRequest") -> None:
        super().__init__("rehearsed")
        self.request = request


def object_headers(put: Mapping[str, Any]) -> dict[str, str]:
    """The headers that follow from one object."""
    return {
        "content-length": str(len(put["Body"])),
        "x-amz-checksum-sha256": put["ChecksumSHA256"],
        **{f"x-amz-meta-{name}": value for name, value in put["Metadata"].items()},
    }


def quoted(key: str) -> str:
    """A key as it stands in a URL."""
    return quote(key, safe="/~")


def _another(put: Mapping[str, Any]) -> dict[str, Any]:
    """A put of the same kind: another account, another content."""
    body = put["Body"] + b"\n"
    return {
        **put,
        "Key": _HEX.sub(lambda found: found[0].translate(_OTHER_DIGITS), put["Key"]),
        "Body": body,
        "ContentLength": len(body),
        "ChecksumSHA256": base64.b64encode(sha256_of(body).digest()).decode(),
        "Metadata": {name: value.translate(_OTHER_DIGITS) for name, value in put["Metadata"].items()},
    }


def _checked_headers(request: "AWSPreparedRequest") -> dict[str, str]:
    """By name in lower case. Raises Refused for what would not be the same on our connection."""
    headers: dict[str, str] = {}
    for name, value in request.headers.items():
        lower = name.lower()
        if lower in headers:
            raise Refused(f"{lower} is there twice")
        headers[lower] = _text(value)
        # put.py checks headers made from the credentials, each time.
        if lower not in _OF_SIGNATURE and not _is_printable(lower, headers[lower]):
            raise Refused(f"{lower!a} is not a header of printable ASCII")
    encoded = sorted(_OF_ENCODED_BODIES & headers.keys())
    if headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
        encoded.append("x-amz-content-sha256")
    if encoded:
        raise Refused(f"the body would be encoded: {', '.join(encoded)}")
    if headers.get("host", host_header(request.url)) != host_header(request.url):
        raise Refused("the Host header does not follow from the URL")
    return headers


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _is_printable(name: str, value: str) -> bool:
    return bool(_NAME.fullmatch(name)) and value.isascii() and value.isprintable()


def _body(request: "AWSPreparedRequest") -> bytes | None:
    body: Any = request.body
    if isinstance(body, bytes | bytearray):
        return bytes(body)
    return bytes(body.getbuffer()) if isinstance(body, BytesIO) else None


def _has_proxy(url: str) -> bool:
    return bool(get_environ_proxies(url).get(urlsplit(url).scheme))

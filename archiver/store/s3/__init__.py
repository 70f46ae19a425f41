"""The store in a bucket of S3, or of whatever speaks its protocol.

Promises what the port promises, as far as the server does three things. It
refuses an existing key by ``If-None-Match: *``, also when a multipart upload is
completed. It refuses a body whose SHA-256 is not the one in
``x-amz-checksum-sha256``. A PUT that it answered is durable. Not every
S3-compatible server does all three.

Needs the rights s3:PutObject, s3:GetObject, s3:ListBucket and
s3:AbortMultipartUpload. A killed process can leave an incomplete multipart
upload: let a lifecycle rule remove those after some days.

Tries once: botocore's own retries are off. boto3 finds the credentials.
Small objects are uploaded by ``put.py``, all others by boto3.
"""

import base64
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from posixpath import splitext
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import boto3
import urllib3
from botocore import exceptions as boto
from botocore.config import Config
from botocore.parsers import ResponseParserError

from archiver import __version__
from archiver.errors import (
    ArchiverError,
    IntegrityError,
    MessageRefused,
    OperatorNeeded,
    TryLater,
    UsageError,
)
from archiver.store import (
    AddressingStyle,
    Body,
    ObjectDiffers,
    ObjectNotFound,
    PutResult,
    StoredObject,
    check_key,
    check_prefix,
    is_key,
)
from archiver.store.disk import failure
from archiver.store.s3.put import SmallPut
from archiver.store.s3.rotation import Rotating

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from botocore.awsrequest import AWSPreparedRequest
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, ListObjectsV2OutputTypeDef

__all__ = ["S3Store"]

_MIB = 1024 * 1024

# Smaller bodies take one request, larger ones parts: after a failure only a part is sent again.
_MULTIPART_BYTES = 64 * _MIB
_PART_BYTES = 16 * _MIB
_MOST_PARTS = 10_000  # docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html

# botocore sends every body with "Expect: 100-continue", and waits a round trip for the answer. That
# pays off where sending takes longer than a round trip: a refusal then comes before the body.
_EXPECT_BYTES = _MIB

_CHUNK_BYTES = 256 * 1024
_FILE_BUFFER_BYTES = 128 * 1024

_CONTENT_TYPES = {".eml": "message/rfc822", ".ndjson": "application/x-ndjson"}

_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile or role they come from"
_EXPIRED = "renew AWS_SESSION_TOKEN with its keys, or use a role that renews itself"
_RIGHTS = "grant s3:PutObject, s3:GetObject, s3:ListBucket and s3:AbortMultipartUpload to these credentials"
_BUCKET = "create the bucket, or correct ARCHIVER_STORE_URL or ARCHIVER_S3_ENDPOINT_URL"
_REGION = "set AWS_DEFAULT_REGION to the region of the bucket"
_ENDPOINT = "check ARCHIVER_S3_ENDPOINT_URL: the server there does not speak S3 correctly"
_STYLE = "set ARCHIVER_S3_ADDRESSING_STYLE=virtual: this server takes buckets by host name only"
_WEB_PAGE = (
    "the answer is a web page, not one of S3's: check ARCHIVER_S3_ENDPOINT_URL, and which proxy or firewall "
    "answers in the server's place"
)
_LIMIT = "raise the limit of the server, or of the proxy before it, for the size of a request"
_PROXY = "check HTTP_PROXY, HTTPS_PROXY and NO_PROXY, and the user and password in them"
_KMS = "grant kms:GenerateDataKey and kms:Decrypt for the key of this bucket to these credentials"
_DENY = (
    "a policy denies it explicitly: look at the policies of the bucket, the organisation and the VPC endpoint"
)
_QUOTA = "raise the quota of this bucket or user, or free some space"
_INCOMPLETE = (
    "this server lacks a part of S3 that the archive needs, such as conditional writes (If-None-Match: *); "
    "use another server, or a newer release of it"
)
_CERTIFICATE = "set AWS_CA_BUNDLE to the certificate of the authority that signed the server's"
_ORDER = "use a server that lists keys in the order of their bytes"
_UNREACHABLE = "check ARCHIVER_S3_ENDPOINT_URL, the network, and that the server is running"

# docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html. The numbers are for answers to HEAD,
# which have no body, so that only the status is known.
_LASTING = {
    "AccessDenied": _RIGHTS,
    "AllAccessDisabled": _RIGHTS,
    "AuthorizationHeaderMalformed": _REGION,
    "EntityTooLarge": _LIMIT,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "IllegalLocationConstraintException": _REGION,
    "InvalidAccessKeyId": _CREDENTIALS,
    "InvalidObjectState": "the object is in a cold storage class: restore it first",
    "InvalidToken": _EXPIRED,
    "NoSuchBucket": _BUCKET,
    "NotImplemented": _INCOMPLETE,
    "PathStyleDomainForbidden": _STYLE,
    "PermanentRedirect": _REGION,
    "QuotaExceeded": _QUOTA,
    "RequestTimeTooSkewed": "set this machine's clock",
    "SecondLevelDomainForbidden": _STYLE,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "TokenRefreshRequired": _EXPIRED,
    "301": _REGION,
    "401": _CREDENTIALS,
    "403": _RIGHTS,
    "404": _BUCKET,
    "407": _PROXY,
    "413": _LIMIT,
    "501": _INCOMPLETE,
}
# Refuses one object, not all of them.
_TOO_LARGE = {"EntityTooLarge", "413"}
_DAMAGED = {"BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}

# What a refusal's text says more exactly than its code.
_IN_TEXT = [
    (re.compile(r"virtual.hosted|path.style", re.IGNORECASE), _STYLE),
    (re.compile(r"\bkms:", re.IGNORECASE), _KMS),
    (re.compile(r"explicit deny", re.IGNORECASE), _DENY),
]
_PASSING = _DAMAGED | {
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "InternalError",
    "NoSuchUpload",  # a lifecycle rule removed it; a retry begins another one
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "408",
    "409",
    "425",
    "429",
}

# With a web page, these are no answers of S3.
_SAID_BY_NONE_OF_S3 = {301, 302, 303, 307, 308, 400, 401, 403, 404, 405}

# Requests that did not reach a server, or whose answer did not arrive. The first match counts.
_CLIENT_SIDE: list[tuple[type[Exception] | tuple[type[Exception], ...], type[ArchiverError], str]] = [
    ((boto.NoCredentialsError, boto.PartialCredentialsError), OperatorNeeded, _CREDENTIALS),
    (
        (boto.TokenRetrievalError, boto.SSOError),
        OperatorNeeded,
        "log in again, or use a role",
    ),
    # The machine's or pod's metadata service, or a helper program, can recover.
    ((boto.CredentialRetrievalError, boto.MetadataRetrievalError), TryLater, _CREDENTIALS),
    (boto.ProxyConnectionError, TryLater, _PROXY),
    ((boto.ConnectionError, boto.HTTPClientError), TryLater, _UNREACHABLE),
    ((boto.IncompleteReadError, urllib3.exceptions.HTTPError), TryLater, _UNREACHABLE),
    ((boto.ChecksumError, boto.FlexibleChecksumError), TryLater, "nothing to do, unless it happens often"),
    (ResponseParserError, OperatorNeeded, _ENDPOINT),
    (boto.BotoCoreError, OperatorNeeded, "check the AWS_* settings and ARCHIVER_S3_ENDPOINT_URL"),
]
_FOREIGN = (boto.ClientError, boto.BotoCoreError, ResponseParserError, urllib3.exceptions.HTTPError, OSError)


# What boto3 raises for settings that cannot be used.
_UNUSABLE = (boto.BotoCoreError, ValueError)


class _Connected(NamedTuple):
    """Made from one reading of the environment's files."""

    client: "S3Client"
    small: SmallPut


class S3Store:
    """Objects below ``prefix`` (which may be empty) of ``bucket``. For any number of threads.

    Without ``endpoint_url`` the server is Amazon's; without ``region`` the
    environment's region counts. ``addressing_style`` says whether buckets are in
    the path or the host name; None follows the AWS configuration, and without
    that uses the path where there is an ``endpoint_url``. ``max_connections`` are kept open: one for each
    thread that uses the store. Bodies above ``multipart_bytes`` are uploaded in
    parts of ``part_bytes``, or larger ones where 10,000 are not enough.
    ``session`` replaces the environment's boto3 session. Files of certificate
    authorities and credentials are read again when they change. Raises UsageError.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        addressing_style: AddressingStyle | None = None,
        max_connections: int = 32,
        multipart_bytes: int = _MULTIPART_BYTES,
        part_bytes: int = _PART_BYTES,
        connect_timeout_seconds: float = 10,
        read_timeout_seconds: float = 60,
        session: boto3.session.Session | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{check_prefix(prefix).removesuffix('/')}/" if prefix else ""
        self._multipart_bytes = multipart_bytes
        self._part_bytes = part_bytes
        if endpoint_url is not None:
            _check_endpoint(endpoint_url)
        self._expects = True

        def connected() -> _Connected:
            used = session or boto3.session.Session()
            style: Any = addressing_style or _style_of(used) or ("path" if endpoint_url else "auto")
            config = Config(
                user_agent_extra=f"archiver/{__version__}",
                connect_timeout=connect_timeout_seconds,
                read_timeout=read_timeout_seconds,
                max_pool_connections=max_connections,
                tcp_keepalive=True,
                retries={"total_max_attempts": 1, "mode": "standard"},
                # Amazon has a host name for each bucket; few other servers do.
                s3={"addressing_style": style},
                # The default adds a trailing CRC to every body, which many servers refuse.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            client = used.client("s3", endpoint_url=endpoint_url, region_name=region, config=config)
            # There are no settings for these two.
            for operation in ("PutObject", "UploadPart"):
                client.meta.events.register(f"before-send.s3.{operation}", self._expect_or_not)
            client.meta.events.register("before-call.s3.HeadBucket", _follow_no_redirect)
            return _Connected(client, SmallPut(used, client))

        try:
            files = _files_of(session)
            self._connected = Rotating(connected, files, _UNUSABLE, monotonic=monotonic)
        except _UNUSABLE as error:
            raise UsageError(f"cannot use S3 with these settings: {_one_line(str(error))}") from error
        self._where = f"{self.url} at {self._client.meta.endpoint_url}"

    @property
    def _client(self) -> "S3Client":
        return self._connected.current.client

    @property
    def _small(self) -> SmallPut:
        return self._connected.current.small

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".removesuffix("/")

    def put(self, key: str, body: Body) -> PutResult:
        name = self._name(key)
        with self._translated(f"write {key}"):
            try:
                if body.size > self._multipart_bytes:
                    # One round trip can save sending a large body for nothing.
                    if self.stat(key) is not None:
                        return self._compare(key, body)
                    return PutResult(True, self._put_in_parts(name, body))
                return PutResult(True, self._put_at_once(name, body))
            except boto.ClientError as error:
                if _code(error) in ("PreconditionFailed", "412"):
                    return self._compare(key, body)
                if _code(error) in _TOO_LARGE or _status(error) == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                    refusal = _refusal(error, f"write {key} in {self._where}")
                    raise MessageRefused(str(refusal), hint=_LIMIT) from error
                if _code(error) in _DAMAGED:
                    _check_body(body)  # was it damaged here, or on the way?
                raise

    @contextmanager
    def get(self, key: str) -> Iterator[Iterator[bytes]]:
        name = self._name(key)
        with self._translated(f"read {key}"):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=name)
            except boto.ClientError as error:
                if _code(error) == "NoSuchKey":
                    raise ObjectNotFound(f"{key} is not in {self._where}") from error
                raise
        with closing(answer["Body"]) as content:
            _required(answer, "ETag")
            yield self._chunks(key, content)

    def stat(self, key: str) -> StoredObject | None:
        name = self._name(key)
        with self._translated(f"look at {key}"):
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=name, ChecksumMode="ENABLED")
            except boto.ClientError as error:
                # An answer to HEAD does not say whether the key or the bucket is missing.
                self._look(name)
                if _status(error) == HTTPStatus.NOT_FOUND:
                    return None
                raise
        _required(head, "ETag")
        return StoredObject(
            key,
            head["ContentLength"],
            sha256=_sha256_of(head),
            version_id=head.get("VersionId"),
            modified_at=head.get("LastModified"),
        )

    def list(self, prefix: str, *, after: str = "", strangers: bool = False) -> Iterator[StoredObject]:
        last = after
        for page in self._pages(prefix, after):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._prefix)
                if strangers:
                    yield StoredObject(key, item["Size"], modified_at=item["LastModified"])
                    continue
                if not is_key(key):
                    continue  # a bucket may hold other things, such as a console's "folders"
                if key <= last:
                    # Some servers sort by the parts of a path: "a/x" before "a-b". A comparison of
                    # this listing with another would report objects as missing that are there.
                    raise OperatorNeeded(f"{self._where} lists {key} after {last}", hint=_ORDER)
                last = key
                yield StoredObject(key, item["Size"], modified_at=item["LastModified"])

    def names(self, prefix: str, *, after: str = "") -> Iterator[str]:
        for page in self._pages(prefix, prefix + after if after else "", Delimiter="/"):
            folders = [item["Prefix"] for item in page.get("CommonPrefixes", ())]
            objects = [item["Key"] for item in page.get("Contents", ())]
            for name in sorted(found.removeprefix(self._prefix + prefix) for found in folders + objects):
                # Servers differ in whether a folder's name starts after itself.
                if name != after:
                    yield name

    def _pages(self, prefix: str, after: str, **query: str) -> "Iterator[ListObjectsV2OutputTypeDef]":
        if after:
            query["StartAfter"] = self._prefix + after
        whole = self._prefix + check_prefix(prefix)
        paginator = self._client.get_paginator("list_objects_v2")
        pages = iter(paginator.paginate(Bucket=self._bucket, Prefix=whole, **query))  # type: ignore[arg-type]
        while True:
            with self._translated(f"list {prefix or 'everything'}"):
                page = next(pages, None)
            if page is None:
                return
            yield page

    def probe(self) -> None:
        """As the port says. Tests writing by a multipart upload that is begun and aborted."""
        name = f"{self._prefix}probe"
        with self._translated("use the bucket"):
            self._look(self._prefix)
            begun = self._client.create_multipart_upload(Bucket=self._bucket, Key=name)
            upload_id = _required(begun, "UploadId")
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id)

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _look(self, prefix: str) -> None:
        """Ask whether the bucket exists and lets us in: the cheapest request whose refusal has a reason."""
        self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, MaxKeys=1)

    def _put_at_once(self, name: str, body: Body) -> str | None:
        put: dict[str, Any] = {
            "Bucket": self._bucket,
            "Key": name,
            "ContentLength": body.size,
            "ContentType": _content_type(name),
            "ChecksumSHA256": _base64(body.sha256),
            "Metadata": {"sha256": body.sha256.hex()},
            "IfNoneMatch": "*",
        }
        if body.size < _EXPECT_BYTES:
            with body.open() as reader:
                content = reader.read(body.size)
            if len(content) != body.size:
                raise _damaged()
            if (headers := self._small.send(put | {"Body": content}, body.sha256)) is not None:
                _required(headers, "etag")
                return headers.get("x-amz-version-id")
        with body.open() as reader:
            part = io.BufferedReader(_Part(reader, 0, body.size), _FILE_BUFFER_BYTES)
            answer = self._send(self._client.put_object, part, put)
        _required(answer, "ETag")
        version_id: str | None = answer.get("VersionId")
        return version_id

    def _put_in_parts(self, name: str, body: Body) -> str | None:
        begun = self._client.create_multipart_upload(
            Bucket=self._bucket,
            Key=name,
            ContentType=_content_type(name),
            ChecksumAlgorithm="SHA256",
            Metadata={"sha256": body.sha256.hex()},
        )
        upload_id = _required(begun, "UploadId")
        try:
            parts = self._send_parts(name, upload_id, body)
        except BaseException:
            self._abort(name, upload_id)
            raise
        try:
            answer = self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=name,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
        except boto.ClientError as error:
            # Abort only after a clear refusal. If the answer was lost, or the server failed, the
            # object may exist or be about to: an abort could remove its parts.
            if _status(error) < HTTPStatus.INTERNAL_SERVER_ERROR:
                self._abort(name, upload_id)
            raise
        _required(answer, "ETag")
        return answer.get("VersionId")

    def _send_parts(self, name: str, upload_id: str, body: Body) -> "Sequence[CompletedPartTypeDef]":
        """Send the parts one after the other. Each is read twice: for its checksum, and to be sent."""
        part_bytes = max(self._part_bytes, -(-body.size // _MOST_PARTS))
        whole = hashlib.sha256()
        parts: list[CompletedPartTypeDef] = []
        with body.open() as reader:
            for start in range(0, body.size, part_bytes):
                size = min(part_bytes, body.size - start)
                checksum = hashlib.sha256()
                with io.BufferedReader(_Part(reader, start, size), _FILE_BUFFER_BYTES) as part:
                    while chunk := part.read(_CHUNK_BYTES):
                        checksum.update(chunk)
                        whole.update(chunk)
                    if start + size == body.size and whole.digest() != body.sha256:
                        raise _damaged()
                    query = {
                        "Bucket": self._bucket,
                        "Key": name,
                        "UploadId": upload_id,
                        "PartNumber": len(parts) + 1,
                        "ContentLength": size,
                        "ChecksumSHA256": _base64(checksum.digest()),
                    }
                    answer = self._send(self._client.upload_part, part, query)
                parts.append(
                    {
                        "PartNumber": len(parts) + 1,
                        "ETag": _required(answer, "ETag"),
                        "ChecksumSHA256": _base64(checksum.digest()),
                    }
                )
        return parts

    def _send(self, call: Callable[..., Any], part: BinaryIO, query: Mapping[str, Any]) -> Any:
        """Send a large body; once more, and from then on, without Expect if the server does not know that."""
        try:
            part.seek(0)
            return call(**query, Body=part)
        except boto.ClientError as error:
            # RFC 9110, section 10.1.1.
            if _status(error) != HTTPStatus.EXPECTATION_FAILED or not self._expects:
                raise
        self._expects = False
        part.seek(0)
        return call(**query, Body=part)

    def _expect_or_not(self, request: "AWSPreparedRequest", **_: object) -> None:
        # The signature does not cover this header.
        is_small = int(request.headers.get("Content-Length", _EXPECT_BYTES)) < _EXPECT_BYTES
        if is_small or not self._expects:
            del request.headers["Expect"]

    def _abort(self, name: str, upload_id: str) -> None:
        # The caller gets the failure that led here.
        with suppress(*_FOREIGN):
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id)

    def _compare(self, key: str, body: Body) -> PutResult:
        """Check an object that exists already: the caller will rely on it.

        It is read unless the server's own checksum proves that it is the same.
        """
        stored = self.stat(key)
        if stored is None:
            raise self._removed(key)
        if stored.size == body.size and (
            stored.sha256 == body.sha256 or self._digest(key, body.size) == body.sha256
        ):
            return PutResult(False, stored.version_id)
        raise ObjectDiffers(f"{key} is in {self._where} already, with other content")

    def _digest(self, key: str, size: int) -> bytes | None:
        """SHA-256 of an object as it is read, or None where it has more than ``size`` bytes."""
        digest = hashlib.sha256()
        try:
            with self.get(key) as chunks:
                for chunk in chunks:
                    digest.update(chunk)
                    size -= len(chunk)
                    if size < 0:
                        return None
        except ObjectNotFound as error:
            raise self._removed(key) from error
        return digest.digest()

    def _removed(self, key: str) -> TryLater:
        return TryLater(f"{key} was removed from {self._where} while it was being written again")

    def _chunks(self, key: str, content: Any) -> Iterator[bytes]:
        with self._translated(f"read {key}"):
            while chunk := content.read(_CHUNK_BYTES):
                yield chunk

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except _FOREIGN as error:
            raise self._translate(error, doing) from error

    def _translate(self, error: Exception, doing: str) -> ArchiverError:
        cause = error.kwargs.get("error") if isinstance(error, boto.HTTPClientError) else None
        if isinstance(cause, ArchiverError):
            return cause  # raised by the body while botocore was reading it
        trying = f"{doing} in {self._where}"
        if type(cause) is ValueError:
            # From http.client, whose text shows the header. It holds credentials: all others are made here.
            return OperatorNeeded(f"cannot {trying}: a header holds a line break", hint=_CREDENTIALS)
        if isinstance(error, boto.ClientError):
            return _refusal(error, trying)
        message = f"cannot {trying}: {_one_line(str(error))}"
        if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
            return OperatorNeeded(message, hint=_CERTIFICATE)
        for types, translation, hint in _CLIENT_SIDE:
            if isinstance(error, types):
                return translation(message, hint=hint)
        return failure(error, trying) if isinstance(error, OSError) else OperatorNeeded(message)


class _Part(io.RawIOBase):
    """Exactly ``size`` bytes of a reader, from ``start``. Raises IntegrityError if there are fewer."""

    def __init__(self, reader: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._reader = reader
        self._start = start
        self._size = size
        self._position = 0
        self._reader.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        wanted = min(len(target), self._size - self._position)
        data = self._reader.read(wanted)
        if wanted and not data:
            raise _damaged()
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        self._reader.seek(self._start + self._position)
        return self._position

    def tell(self) -> int:
        return self._position


def _follow_no_redirect(params: dict[str, Any], **_: object) -> None:
    """After a redirect, botocore asks for the bucket's region by HeadBucket.

    If a server or proxy redirects everything, it redirects that request too, and
    botocore would repeat it without end.
    """
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


def _files_of(session: boto3.session.Session | None) -> "Sequence[Path]":
    """The files that boto3 reads once: certificate authorities and, without a session, its configuration."""
    core = (session or boto3.session.Session())._session  # boto3's own attributes leave these out
    files = [core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")]
    if session is None:
        files += [core.get_config_variable(name) for name in ("credentials_file", "config_file")]
    return [Path(file).expanduser() for file in files if file]


def _style_of(session: boto3.session.Session) -> Any:
    """The addressing style in the profile of the AWS configuration, if it has one."""
    of_s3 = session._session.get_scoped_config().get("s3")  # boto3's own attributes leave this out
    return of_s3.get("addressing_style") if isinstance(of_s3, dict) else None


def _required(answer: Mapping[str, Any], name: str) -> str:
    """A field that S3 always sends, such as an ETag. Without it, the server may be any web server."""
    if not answer.get(name):
        raise OperatorNeeded(f"a request to S3 was answered without {name}", hint=_ENDPOINT)
    return str(answer[name])


def _check_endpoint(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError("ARCHIVER_S3_ENDPOINT_URL must look like https://host:port")
    if "@" in parts.netloc:
        raise UsageError(
            "ARCHIVER_S3_ENDPOINT_URL must not hold credentials: set AWS_ACCESS_KEY_ID and its secret key"
        )


def _check_body(body: Body) -> None:
    """Raise IntegrityError when size or SHA-256 are wrong: sending the body again would not help."""
    digest = hashlib.sha256()
    size = 0
    with body.open() as reader:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    if (size, digest.digest()) != (body.size, body.sha256):
        raise _damaged()


def _damaged() -> IntegrityError:
    return IntegrityError("the content changed between the wire and the store")


def _content_type(name: str) -> str:
    return _CONTENT_TYPES.get(splitext(name)[1], "application/octet-stream")


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode("ascii")


def _sha256_of(head: Any) -> bytes | None:
    """The SHA-256 that the server itself computed over the whole object, from an answer to HEAD.

    Metadata are what a client wrote, so they prove nothing. An object in parts
    has a checksum of its parts' checksums: its type says so, or its ETag, which
    then ends in "-" and the number of parts.
    """
    kind = head.get("ChecksumType") or ("COMPOSITE" if "-" in head["ETag"] else "FULL_OBJECT")
    with suppress(ValueError):
        digest = base64.b64decode(head.get("ChecksumSHA256", ""), validate=True)
        if kind == "FULL_OBJECT" and len(digest) == hashlib.sha256().digest_size:
            return digest
    return None


def _code(error: boto.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _refusal(error: boto.ClientError, trying: str) -> ArchiverError:
    """Translate an error answer. An unknown code counts by its status."""
    code, status = _code(error), _status(error)
    text = error.response.get("Error", {}).get("Message") or ""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    message = _one_line(f"cannot {trying}: {code or status} {text}")
    for pattern, hint in _IN_TEXT if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.NOT_FOUND else ():
        if pattern.search(text):
            return OperatorNeeded(message, hint=hint)
    is_page = "html" in headers.get("content-type", "")
    if is_page and status in _SAID_BY_NONE_OF_S3:
        return OperatorNeeded(message, hint=_WEB_PAGE)
    if code in _LASTING:
        return OperatorNeeded(message, hint=_LASTING[code])
    failed = status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED
    if failed or code in _PASSING or str(status) in _PASSING:
        wait = headers.get("retry-after", "")
        # RFC 9110, section 10.2.3: seconds; no store sends a date.
        return TryLater(message, wait_seconds=float(wait) if re.fullmatch(r"\d{1,6}", wait) else None)
    return OperatorNeeded(message, hint=_LASTING.get(str(status)))


def _one_line(text: str) -> str:
    """Text from others, fit for a log."""
    return re.sub(r"[^ -~]+", " ", text)[:500].strip()

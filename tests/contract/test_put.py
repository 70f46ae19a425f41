"""The PUT of a small object: what goes out, on which connection, and what becomes of every answer.

What it has in common with boto3's is in the store's contract.
"""

import hashlib
import re
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import boto3
import botocore.session
import pytest
import structlog
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import CredentialProvider, CredentialResolver, Credentials

from archiver.errors import IntegrityError, OperatorNeeded, TryLater, UsageError
from archiver.store import AddressingStyle
from archiver.store.s3 import S3Store
from archiver.store.s3.put import PLAN_SECONDS, SmallPut
from archiver.store.spool import BytesBody
from tests.harness.certificates import self_signed
from tests.harness.seaweedfs import SeaweedFS

pytestmark = pytest.mark.slow

KEY = "messages/7/ab/abcdef.eml"
BODY = BytesBody(b"From: a@example.com\r\n\r\nx\r\n")
DONE = b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 0\r\n\r\n'
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LARGEST = 1024 * 1024 - 1  # of those that are sent so


def refusal(status: int, code: str, more: str = "") -> bytes:
    text = f"<Error><Code>{code}</Code><Message>A sentence.</Message>{more}</Error>".encode()
    return b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text)


@dataclass(frozen=True)
class Request:
    """One that arrived. ``connection`` counts from 0."""

    connection: int
    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def scope(self) -> str:
        """KEY/DATE/REGION/SERVICE/aws4_request"""
        found = re.search("Credential=([^,]+)", self.headers["authorization"])
        assert found
        return found[1]


@dataclass(frozen=True)
class Then:
    """Send ``octets``, then "keep" the connection, "close" it, or "reset" it; or "stall"."""

    octets: bytes
    how: str = "keep"
    body_bytes: int | None = None  # of the request's, that are read before; None: all


class Scripted(socketserver.ThreadingTCPServer):
    """Answers the requests, on whatever connection, in the order of ``script``; further ones with success."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str = "127.0.0.1", certificate: tuple[Path, Path] | None = None) -> None:
        super().__init__((host, 0), _Handler)
        self.script: list[bytes | Then] = []
        self.requests: list[Request] = []
        self.connections = 0
        self.lines: list[socket.socket] = []  # of the requests
        self.stopping = threading.Event()
        self.to_expectations = CONTINUE
        self._tls: ssl.SSLContext | None = None
        if certificate:
            self.present(certificate)

    def present(self, certificate: tuple[Path, Path]) -> None:
        """Use this certificate for connections from now on."""
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(*certificate)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http{'s' if self._tls else ''}://{host!s}:{port}"

    def finish_request(self, request: Any, client_address: Any) -> None:
        number, self.connections = self.connections, self.connections + 1
        if self._tls is not None:
            try:
                request = self._tls.wrap_socket(request, server_side=True)
            except OSError:
                return  # this client does not trust us
        with request, request.makefile("rb") as reader, suppress(OSError):
            while self._answer_one(number, request, reader):
                pass

    def _answer_one(self, number: int, connection: socket.socket, reader: BinaryIO) -> bool:
        line = reader.readline().decode().strip()
        if not line:
            return False
        headers: dict[str, str] = {}
        while field_line := reader.readline().decode().strip():
            name, _, value = field_line.partition(": ")
            assert name.lower() not in headers
            headers[name.lower()] = value
        if "expect" in headers:
            connection.sendall(self.to_expectations)
            if self.to_expectations.startswith(b"HTTP/1.1 4"):
                self.requests.append(Request(number, line, headers, b""))
                return False
        step = self.script.pop(0) if self.script else DONE
        then = step if isinstance(step, Then) else Then(step)
        size = int(headers.get("content-length", 0)) if then.body_bytes is None else then.body_bytes
        self.requests.append(Request(number, line, headers, reader.read(size)))
        self.lines.append(connection)
        connection.sendall(then.octets)
        if then.how == "stall":
            self.stopping.wait()
        if then.how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return then.how == "keep"


class _Handler(socketserver.BaseRequestHandler):
    """Not used: the server itself has the script."""


@contextmanager
def serving(server: Scripted) -> Iterator[Scripted]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Scripted]:
    with serving(Scripted()) as running:
        yield running


@dataclass
class Rotating(CredentialProvider):
    """Credentials that change, as those of a role do."""

    keys: tuple[str, str] = ("key", "a secret")
    token: str | None = None

    def load(self) -> Credentials:
        provider = self

        class Current(Credentials):
            def get_frozen_credentials(self) -> Any:
                return Credentials(*provider.keys, provider.token).get_frozen_credentials()

        return Current(*self.keys, self.token)


def session(provider: Rotating | None = None, *, ca_file: Path | None = None) -> boto3.session.Session:
    core = botocore.session.Session()
    core.register_component("credential_provider", CredentialResolver([provider or Rotating()]))
    core.set_config_variable("region", "us-east-1")
    if ca_file is not None:
        core.set_config_variable("ca_bundle", str(ca_file))
    return boto3.session.Session(botocore_session=core)


def made_by_boto3(used: boto3.session.Session) -> list[str]:
    """The PUTs that boto3 makes from here on, the rehearsal included."""
    made: list[str] = []
    used.events.register("request-created.s3.PutObject", lambda request, **_: made.append(request.url))
    return made


def open_store(server: Scripted, used: boto3.session.Session | None = None, **more: Any) -> S3Store:
    return S3Store("mail", "some/prefix", endpoint_url=server.url, session=used or session(), **more)


def put_all(store: S3Store, count: int) -> None:
    for number in range(count):
        assert store.put(f"messages/{number}.eml", BODY).created


def signed_as_by_botocore(server: Scripted, request: Request, credentials: Credentials) -> dict[str, str]:
    """The headers that the signature covers; it must be the one that botocore makes of them."""
    method, path, _ = request.line.split()
    covered, signature = re.findall("SignedHeaders=(.+), Signature=(.+)", request.headers["authorization"])[0]
    headers = {name: request.headers[name] for name in covered.split(";")}
    theirs = AWSRequest(method, server.url + path, headers)
    theirs.context["timestamp"] = headers["x-amz-date"]
    signer = S3SigV4Auth(credentials, "s3", "us-east-1")
    to_sign = signer.string_to_sign(theirs, signer.canonical_request(theirs))
    assert signature == signer.signature(to_sign, theirs)
    return headers


# What goes out


@pytest.mark.parametrize("prefix", ["", "plain", "a+b/c=d", "50%/~x/it's(1)", "%41/&$,;@!*"])
def test_a_real_server_accepts_the_signature_of_any_key(s3: SeaweedFS, bucket: str, prefix: str) -> None:
    used = s3.session()
    made = made_by_boto3(used)
    store = S3Store(bucket, prefix, endpoint_url=s3.endpoint_url, session=used)
    for number, name in enumerate(["a", "b%20c", "d+e=f", "g~h'i(j)*!", "k&l$m,n;o:p@q", "r#s?t|u^v`w{x}y"]):
        key, body = f"messages/{name}", BytesBody(b"x" * number)
        assert store.put(key, body).created
        assert not store.put(key, body).created
        with store.get(key) as chunks:
            assert b"".join(chunks) == body.data
    assert len(made) == 2, "only the rehearsal"


@pytest.mark.parametrize("token", [None, "a/token+of=a role"])
@pytest.mark.parametrize("prefix", ["", "a+b/c=d", "50%/~x/it's(1)", "%41/&$,;@!*"])
def test_the_signature_is_botocore_s(server: Scripted, prefix: str, token: str | None) -> None:
    provider = Rotating(("key", "a secret"), token)
    store = S3Store("mail", prefix, endpoint_url=server.url, session=session(provider))
    put_all(store, 2)
    provider.keys = ("key", "another secret")
    put_all(store, 1)
    secrets = ["a secret", "a secret", "another secret"]
    for request, secret in zip(server.requests, secrets, strict=True):
        headers = signed_as_by_botocore(server, request, Credentials("key", secret, token))
        assert headers.get("x-amz-security-token") == token
        _, day, *rest = request.scope.split("/")
        assert rest == ["us-east-1", "s3", "aws4_request"]
        assert headers["x-amz-date"].startswith(f"{day}T")


@pytest.mark.parametrize("size", [0, 1, LARGEST])
def test_the_request_is_what_boto3_would_send(server: Scripted, size: int) -> None:
    store = open_store(server)
    body = BytesBody(b"\xff" * size)
    store.put(KEY, body)
    [request] = server.requests
    assert request.line == f"PUT /mail/some/prefix/{KEY} HTTP/1.1"
    assert request.body == body.data
    digest = hashlib.sha256(body.data)
    assert request.headers["x-amz-content-sha256"] == digest.hexdigest()
    assert request.headers["x-amz-meta-sha256"] == digest.hexdigest()
    assert request.headers["if-none-match"] == "*"
    assert request.headers["content-type"] == "message/rfc822"
    assert request.headers["host"] == server.url.removeprefix("http://")
    assert "archiver/" in request.headers["user-agent"]
    assert "expect" not in request.headers
    signed = re.search("SignedHeaders=([^,]+)", request.headers["authorization"])
    assert signed
    assert set(signed[1].split(";")) == request.headers.keys() - {"authorization", "user-agent"} - {
        "accept-encoding"
    }


def test_what_is_larger_asks_before_it_sends(server: Scripted) -> None:
    open_store(server).put(KEY, BytesBody(b"x" * (LARGEST + 1)))
    assert server.requests[0].headers["expect"] == "100-continue"


def test_credentials_that_were_renewed_are_used(server: Scripted) -> None:
    provider = Rotating(("first", "a secret"), token="one")
    store = open_store(server, session(provider))
    put_all(store, 2)
    provider.keys, provider.token = ("second", "another"), "two"
    put_all(store, 1)
    assert [
        (request.scope.split("/")[0], request.headers["x-amz-security-token"]) for request in server.requests
    ] == [
        ("first", "one"),
        ("first", "one"),
        ("second", "two"),
    ]
    assert all("x-amz-security-token" in request.headers["authorization"] for request in server.requests)


@pytest.mark.parametrize("more", ["\n", "\r\nX-Other: header"])
def test_a_token_with_a_line_break_is_not_shown(server: Scripted, more: str) -> None:
    store = open_store(server, session(Rotating(token="very secret" + more)))
    for attempt in (lambda: store.put(KEY, BODY), lambda: store.stat(KEY)):
        with pytest.raises(OperatorNeeded) as caught:
            attempt()
        assert "very secret" not in str(caught.value)
        assert "AWS_ACCESS_KEY_ID" in (caught.value.hint or "")


# What others add to the request


def with_parameters(used: boto3.session.Session, **parameters: Any) -> None:
    """Have every PUT ask for this, too."""
    used.events.register("before-parameter-build.s3.PutObject", lambda params, **_: params.update(parameters))


def with_header(used: boto3.session.Session, name: str, value: Callable[[AWSRequest], str]) -> None:
    """Have every PUT send this header, too, and sign it."""
    used.events.register(
        "before-sign.s3.PutObject", lambda request, **_: request.headers.add_header(name, value(request))
    )


@pytest.mark.parametrize(
    ("parameters", "headers"),
    [
        ({"ServerSideEncryption": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
        (
            {
                "ServerSideEncryption": "aws:kms",
                "SSEKMSKeyId": "arn:aws:kms:eu-central-1:1:key/2",
                "SSEKMSEncryptionContext": "e30=",
                "BucketKeyEnabled": True,
            },
            {
                "x-amz-server-side-encryption": "aws:kms",
                "x-amz-server-side-encryption-aws-kms-key-id": "arn:aws:kms:eu-central-1:1:key/2",
                "x-amz-server-side-encryption-context": "e30=",
                "x-amz-server-side-encryption-bucket-key-enabled": "true",
            },
        ),
        ({"Tagging": "kind=mail&of=a%20b"}, {"x-amz-tagging": "kind=mail&of=a%20b"}),
        (
            {
                "ObjectLockMode": "COMPLIANCE",
                "ObjectLockRetainUntilDate": "2036-01-01T00:00:00Z",
                "ObjectLockLegalHoldStatus": "ON",
            },
            {
                "x-amz-object-lock-mode": "COMPLIANCE",
                "x-amz-object-lock-retain-until-date": "2036-01-01T00:00:00Z",
                "x-amz-object-lock-legal-hold": "ON",
            },
        ),
        (
            {"StorageClass": "STANDARD_IA", "ExpectedBucketOwner": "123456789012", "ContentLanguage": "a  b"},
            {
                "x-amz-storage-class": "STANDARD_IA",
                "x-amz-expected-bucket-owner": "123456789012",
                "content-language": "a  b",
            },
        ),
    ],
    ids=["sse", "sse-kms", "tags", "object lock", "others"],
)
def test_headers_of_encryption_tags_and_locks_are_signed_and_sent_without_boto3(
    server: Scripted, parameters: dict[str, Any], headers: dict[str, str]
) -> None:
    used = session()
    with_parameters(used, **parameters)
    made = made_by_boto3(used)
    store = open_store(server, used)
    for number in range(3):
        assert store.put(f"messages/{number}.eml", BytesBody(b"x" * number)).created
    assert len(made) == 2, "only the rehearsal"
    for number, request in enumerate(server.requests):
        signed = signed_as_by_botocore(server, request, Credentials("key", "a secret"))
        assert headers.items() <= signed.items()
        assert request.body == b"x" * number


def test_a_header_that_boto3_may_add_by_default_is_sent_too(server: Scripted) -> None:
    used = session()
    with_header(used, "x-amz-request-payer", lambda _: "requester")
    used.events.register(
        "before-send.s3.PutObject", lambda request, **_: request.headers.update({"via": "unsigned"})
    )
    made = made_by_boto3(used)
    put_all(open_store(server, used), 2)
    assert len(made) == 2
    for request in server.requests:
        signed = signed_as_by_botocore(server, request, Credentials("key", "a secret"))
        assert signed["x-amz-request-payer"] == "requester"
        assert request.headers["via"] == "unsigned"
        assert "via" not in signed


def test_each_kind_of_object_has_its_own_headers(server: Scripted) -> None:
    used = session()

    def lock_messages(params: dict[str, Any], **_: object) -> None:
        if params["Key"].endswith(".eml"):
            params["ObjectLockLegalHoldStatus"] = "ON"

    used.events.register("before-parameter-build.s3.PutObject", lock_messages)
    made = made_by_boto3(used)
    store = open_store(server, used)
    for key in ("journal/a/1.ndjson", "messages/a/1.eml", "journal/a/2.ndjson", "messages/a/2.eml"):
        store.put(key, BODY)
    locks = [request.headers.get("x-amz-object-lock-legal-hold") for request in server.requests]
    assert locks == [None, "ON", None, "ON"]
    assert len(made) == 4


def test_what_a_hook_takes_from_the_clock_is_renewed(server: Scripted) -> None:
    used, time = session(), [1000.0]
    with_header(used, "x-amz-object-lock-retain-until-date", lambda _: str(time[0]))
    made = made_by_boto3(used)
    client = used.client("s3", endpoint_url=server.url)
    small = SmallPut(used, client, monotonic=lambda: time[0])
    put = {
        "Bucket": "mail",
        "Key": "messages/1.eml",
        "Body": BODY.data,
        "ContentLength": BODY.size,
        "ContentType": "message/rfc822",
        "ChecksumSHA256": "x",
        "Metadata": {"sha256": BODY.sha256.hex()},
    }
    for _ in range(4):
        assert small.send(put, BODY.sha256) is not None
        time[0] += PLAN_SECONDS / 2
    dates = [request.headers["x-amz-object-lock-retain-until-date"] for request in server.requests]
    assert dates == ["1000.0", "1000.0", "1060.0", "1060.0"]
    assert len(made) == 4
    assert {request.connection for request in server.requests} == {0}


def test_a_real_server_keeps_tags_and_locks(s3: SeaweedFS) -> None:
    s3.create_bucket("small-locked", object_lock=True)
    used = s3.session()
    until = datetime(2036, 1, 1, tzinfo=UTC)
    with_parameters(used, Tagging="kind=mail", ObjectLockMode="GOVERNANCE", ObjectLockRetainUntilDate=until)
    made, client = made_by_boto3(used), s3.session().client("s3", endpoint_url=s3.endpoint_url)
    store = S3Store("small-locked", endpoint_url=s3.endpoint_url, session=used)
    for number in range(2):
        key = f"messages/{number}.eml"
        assert store.put(key, BODY).created
        tags = client.get_object_tagging(Bucket="small-locked", Key=key)["TagSet"]
        assert tags == [{"Key": "kind", "Value": "mail"}]
        retention = client.get_object_retention(Bucket="small-locked", Key=key)["Retention"]
        assert retention == {"Mode": "GOVERNANCE", "RetainUntilDate": until}
    assert len(made) == 2


# What boto3 must do


def reverse_body(params: dict[str, Any], **_: object) -> None:
    body = params["Body"]
    params["Body"] = (body if isinstance(body, bytes) else body.read())[::-1]


def forge_signature(request: AWSRequest, **_: object) -> None:
    scope = "key/20260101/us-east-1/s3/aws4_request"
    forged = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=secret"
    request.headers["Authorization"] = forged


HOOKS: list[tuple[str, str, Callable[[boto3.session.Session], object]]] = [
    (
        "a header by object",
        "differ from one object to the next: x-amz-tagging",
        lambda used: with_header(used, "x-amz-tagging", lambda request: f"secret={hash(request.url)}"),
    ),
    (
        "an encoded body",
        "the body would be encoded: content-encoding",
        lambda used: with_header(used, "content-encoding", lambda _: "aws-chunked"),
    ),
    (
        "a name in another script",
        "not a header of printable ASCII",
        lambda used: with_header(used, "x-amz-meta-of", lambda _: "secr\xe9t"),
    ),
    (
        "another body",
        "body are not those of the object",
        lambda used: used.events.register("before-parameter-build.s3.PutObject", reverse_body),
    ),
    (
        "another signature",
        "in another way",
        lambda used: used.events.register("before-send.s3.PutObject", forge_signature),
    ),
    (
        "another checksum",
        "x-amz-checksum-sha256 does not follow from the object",
        lambda used: with_parameters(used, ChecksumSHA256="secret"),
    ),
]


@pytest.mark.parametrize(("reason", "hook"), [hook[1:] for hook in HOOKS], ids=[hook[0] for hook in HOOKS])
def test_what_cannot_be_carried_safely_is_boto3_s(
    server: Scripted, reason: str, hook: Callable[[boto3.session.Session], object]
) -> None:
    used = session()
    hook(used)
    made = made_by_boto3(used)
    store = open_store(server, used)
    with structlog.testing.capture_logs() as logs:
        for number in range(2):
            store.put(f"messages/ab{number}/1.eml", BytesBody(b"abc"))
    assert len(server.requests) == 2
    assert len(made) > 2, "each of them, beside the rehearsal"
    [told] = logs
    assert told["event"] == "store.fast_put_off"
    assert reason in told["reason"]
    assert "secr" not in str(told)


UPLOAD = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
UPLOADED = b'<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>'
FAILED_EXPECTATION = b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n"


def xml(text: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (
        len(text),
        text,
    )


def test_a_proxy_that_knows_no_expectation_is_asked_once(server: Scripted) -> None:
    """RFC 9110, section 10.1.1: 417 is sent by a server that cannot meet the expectation."""
    server.to_expectations = FAILED_EXPECTATION
    store, body = open_store(server), BytesBody(b"x" * (LARGEST + 1))
    for number in range(3):
        assert store.put(f"messages/{number}", body).created
    assert ["expect" in request.headers for request in server.requests] == [True, False, False, False]
    assert [request.body for request in server.requests[1:]] == [body.data] * 3


def test_a_part_is_sent_again_without_the_expectation(server: Scripted) -> None:
    server.to_expectations = FAILED_EXPECTATION
    body = BytesBody(b"x" * (LARGEST + 1) + b"y" * (LARGEST + 1))
    store = open_store(server, multipart_bytes=LARGEST + 1, part_bytes=LARGEST + 1)
    missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    server.script = [
        missing,
        xml(b"<ListBucketResult></ListBucketResult>"),
        xml(UPLOAD),
        DONE,
        DONE,
        xml(UPLOADED),
    ]
    assert store.put(KEY, body).created
    parts = [request for request in server.requests if "partNumber" in request.line]
    assert ["expect" in request.headers for request in parts] == [True, False, False]
    assert b"".join(request.body for request in parts) == body.data


def test_a_server_that_refuses_without_an_expectation_too_is_not_asked_for_ever(server: Scripted) -> None:
    server.to_expectations = FAILED_EXPECTATION
    server.script = [FAILED_EXPECTATION, FAILED_EXPECTATION]
    store = open_store(server)
    with pytest.raises(OperatorNeeded, match="417"):
        store.put(KEY, BytesBody(b"x" * (LARGEST + 1)))
    assert len(server.requests) == 2


@pytest.mark.parametrize("times", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [10, LARGEST + 1])
def test_any_number_of_interim_answers_is_one_answer(server: Scripted, times: int, size: int) -> None:
    server.to_expectations = CONTINUE * times
    if size < LARGEST:
        server.script = [CONTINUE * times + DONE] * 2
    store, body = open_store(server), BytesBody(b"x" * size)
    for number in range(2):
        assert store.put(f"messages/{number}", body).created
    assert [request.body for request in server.requests] == [body.data] * 2


CONFIGURED = "[default]\nregion = us-east-1\ns3 =\n  addressing_style = {}\n"


@pytest.mark.parametrize(
    ("configured", "setting", "host", "path"),
    [
        (None, None, "s3.test", "/mail/some"),
        (None, "virtual", "mail.s3.test", "/some"),
        ("virtual", None, "mail.s3.test", "/some"),
        ("path", None, "s3.test", "/mail/some"),
        ("virtual", "path", "s3.test", "/mail/some"),
        ("path", "virtual", "mail.s3.test", "/some"),
    ],
)
def test_a_bucket_is_named_as_the_settings_say(
    server: Scripted,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    configured: str | None,
    setting: AddressingStyle | None,
    host: str,
    path: str,
) -> None:
    (tmp_path / "config").write_text(CONFIGURED.format(configured) if configured else "")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("http_proxy", server.url)  # no other way to have names of our own
    store = S3Store(
        "mail", "some", endpoint_url="http://s3.test", session=session(), addressing_style=setting
    )
    put_all(store, 1)
    assert server.requests[0].line.split()[1] == f"http://{host}{path}/messages/0.eml"
    assert server.requests[0].headers.get("host", host) == host


def test_an_addressing_style_that_does_not_exist_is_wrong_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(CONFIGURED.format("sideways"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(UsageError, match="sideways"):
        S3Store("mail", endpoint_url="http://127.0.0.1:9", session=session())


def test_a_proxy_is_boto3_s(server: Scripted) -> None:
    program = (
        "import boto3\n"
        "from archiver.store.s3 import S3Store\n"
        "from archiver.store.spool import BytesBody\n"
        "session = boto3.session.Session('key', 'secret', region_name='us-east-1')\n"
        "store = S3Store('mail', endpoint_url='http://s3.example', session=session)\n"
        "store.put('a/b', BytesBody(b'x'))\n"
    )
    subprocess.run([sys.executable, "-c", program], env={"HTTP_PROXY": server.url}, check=True, timeout=60)
    assert [request.line for request in server.requests] == ["PUT http://s3.example/mail/a/b HTTP/1.1"]


def test_where_the_bucket_s_region_is_another_boto3_finds_it_once(server: Scripted) -> None:
    elsewhere = refusal(400, "AuthorizationHeaderMalformed", "<Region>eu-central-1</Region>")
    server.script = [elsewhere, elsewhere]
    put_all(open_store(server), 3)
    regions = [request.scope.split("/")[2] for request in server.requests]
    assert regions == ["us-east-1", "us-east-1", "eu-central-1", "eu-central-1", "eu-central-1"]


# On which connection


def test_a_connection_is_used_again(server: Scripted) -> None:
    server.script = [DONE, refusal(503, "SlowDown")]
    store = open_store(server)
    put_all(store, 1)
    with pytest.raises(TryLater):
        store.put(KEY, BODY)
    put_all(store, 1)
    assert [request.connection for request in server.requests] == [0, 0, 0]


def test_a_second_answer_is_not_taken_for_the_next_one(server: Scripted) -> None:
    server.script = [DONE + refusal(403, "AccessDenied")]
    store = open_store(server)
    put_all(store, 2)
    server.lines[-1].sendall(refusal(403, "AccessDenied"))
    put_all(store, 1)
    assert [request.connection for request in server.requests] == [0, 1, 2]


def test_a_connection_that_was_closed_meanwhile_is_replaced(server: Scripted) -> None:
    server.script = [Then(DONE, "close")] * 3
    put_all(open_store(server), 3)
    assert [request.connection for request in server.requests] == [0, 1, 2]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_kept_connection_that_gives_no_answer_is_replaced_once(server: Scripted, how: str) -> None:
    store = open_store(server)
    server.script = [DONE, Then(b"", how)]
    put_all(store, 2)
    assert [request.connection for request in server.requests] == [0, 0, 1]
    server.script = [Then(b"", how)] * 2
    with pytest.raises(TryLater):
        store.put(KEY, BODY)
    assert [request.connection for request in server.requests] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_new_connection_that_gives_no_answer_is_left_to_the_caller(server: Scripted, how: str) -> None:
    server.script = [Then(b"", how)]
    with pytest.raises(TryLater):
        open_store(server).put(KEY, BODY)
    assert len(server.requests) == 1


@pytest.mark.parametrize("beginning", [b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nETa"])
def test_half_an_answer_is_none_and_is_not_repeated_here(server: Scripted, beginning: bytes) -> None:
    server.script = [DONE, Then(beginning, "close")]
    store = open_store(server)
    put_all(store, 1)
    with pytest.raises((TryLater, OperatorNeeded)):
        store.put(KEY, BODY)
    assert len(server.requests) == 2


def test_a_server_that_hangs_up_in_the_midst_of_a_body_has_not_got_it(server: Scripted) -> None:
    server.script = [Then(b"", "reset", body_bytes=1000)]
    with pytest.raises(TryLater):
        open_store(server).put(KEY, BytesBody(b"x" * LARGEST))


def test_a_refusal_in_the_midst_of_a_body_is_heard(server: Scripted) -> None:
    # So little room that sending, as a rule, breaks before the answer is read.
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    store, body = open_store(server), BytesBody(b"x" * LARGEST)
    for _ in range(10):
        server.script = [Then(refusal(403, "AccessDenied"), "close", body_bytes=1000)]
        with pytest.raises(OperatorNeeded, match="AccessDenied"):
            store.put(KEY, body)


@pytest.mark.parametrize(
    "beginning", [b"", b"HTTP/1.1 200 OK\r\nETag:", b"HTTP/1.1 503 No\r\nContent-Length: 9\r\n\r\n<"]
)
def test_an_answer_that_does_not_come_is_given_up_in_time(server: Scripted, beginning: bytes) -> None:
    server.script = [Then(beginning, "stall")]
    store = open_store(server, read_timeout_seconds=0.2)
    before = time.monotonic()
    with pytest.raises(TryLater, match=r"(?i)timeout|timed out"):
        store.put(KEY, BODY)
    assert time.monotonic() - before < 5
    assert len(server.requests) == 1


def test_any_number_of_threads_may_put(server: Scripted) -> None:
    store = open_store(server, max_connections=2)
    threads = [threading.Thread(target=put_all, args=(store, 20)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 160
    assert all(request.body == BODY.data for request in server.requests)


@pytest.mark.parametrize("trusted", ["by its setting", "not", "but by another name"])
def test_a_server_s_certificate_is_verified(tmp_path: Path, trusted: str) -> None:
    certificate, key = self_signed(tmp_path)  # of 127.0.0.1
    host = "127.0.0.2" if trusted == "but by another name" else "127.0.0.1"
    used = session(ca_file=None if trusted == "not" else certificate)
    with serving(Scripted(host, (certificate, key))) as server:
        store = open_store(server, used)
        if trusted == "by its setting":
            put_all(store, 2)
            assert [request.connection for request in server.requests] == [0, 0]
            assert server.requests[0].headers["x-amz-content-sha256"] == BODY.sha256.hex()
        else:
            with pytest.raises(OperatorNeeded) as caught:
                store.put(KEY, BODY)
            assert "AWS_CA_BUNDLE" in (caught.value.hint or "")
            assert server.requests == []


# Files that change while the service runs


class Clock:
    """Goes on by two seconds whenever it is looked at: each look at the files is due."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 2
        return self.seconds


@pytest.mark.parametrize("how", ["written", "replaced", "behind a link"])
@pytest.mark.parametrize("size", [10, LARGEST + 1])
def test_another_authority_is_trusted_without_a_restart(tmp_path: Path, how: str, size: int) -> None:
    pairs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pairs.append(self_signed(tmp_path / name))
    bundle, body = tmp_path / "bundle.pem", BytesBody(b"x" * size)
    if how == "behind a link":  # as Kubernetes mounts a ConfigMap
        (tmp_path / "data").symlink_to("one", target_is_directory=True)
        bundle = tmp_path / "data" / pairs[0][0].name
    else:
        bundle.write_bytes(pairs[0][0].read_bytes())
    with serving(Scripted(certificate=pairs[0])) as server:
        store = open_store(server, session(ca_file=bundle), monotonic=Clock())
        assert store.put("messages/1", body).created
        server.present(pairs[1])
        server.script = [Then(DONE, "close")]
        with suppress(TryLater):
            store.put("messages/2", body)
        with pytest.raises((OperatorNeeded, TryLater), match="SSL"):  # or on a connection that was closed
            store.put("messages/3", body)
        if how == "written":
            bundle.write_bytes(b"-----BEGIN CERTIFICATE-----\nhalf")
            with pytest.raises((OperatorNeeded, TryLater)):
                store.put("messages/3", body)
            bundle.write_bytes(b"".join(certificate.read_bytes() for certificate, _ in pairs))
        elif how == "replaced":
            (tmp_path / "new").write_bytes(pairs[1][0].read_bytes())
            (tmp_path / "new").replace(bundle)
        else:
            (tmp_path / "new").symlink_to("two", target_is_directory=True)
            (tmp_path / "new").replace(tmp_path / "data")
        assert store.put("messages/3", body).created


def test_other_credentials_in_a_file_count_without_a_restart(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = secret\n"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_text(text.format("FIRST"))
    store = S3Store("mail", endpoint_url=server.url, region="us-east-1", monotonic=Clock())
    put_all(store, 1)
    file.write_text(text.format("THE-SECOND"))
    put_all(store, 1)
    with structlog.testing.capture_logs() as logs:
        file.write_text("[default\nhalf-written")
        put_all(store, 2)
    assert [each["event"] for each in logs] == ["store.rotation_failed"]
    file.unlink()
    file.write_text(text.format("THE-THIRD-ONE"))
    put_all(store, 1)
    assert [request.scope.partition("/")[0] for request in server.requests] == [
        "FIRST",
        "THE-SECOND",
        "THE-SECOND",
        "THE-SECOND",
        "THE-THIRD-ONE",
    ]


def test_files_that_did_not_change_make_no_other_client(server: Scripted, tmp_path: Path) -> None:
    certificate, _ = self_signed(tmp_path)
    with structlog.testing.capture_logs() as logs:
        put_all(open_store(server, session(ca_file=certificate), monotonic=Clock()), 5)
    assert logs == []
    assert {request.connection for request in server.requests} == {0}


# What becomes of answers


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 No\r\nContent-Length: 50000000\r\n\r\n<Error><Code>SlowDown</Code><Message>"
        + b"x" * 10_000_000,
        b"HTTP/1.1 200 OK\r\nETag: " + b"x" * 1_000_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"220 mail.example.com ESMTP\r\n",
    ],
)
def test_an_immoderate_answer_is_not_taken_in(server: Scripted, answer: bytes) -> None:
    server.script = [DONE, Then(answer, "close")]
    store = open_store(server)
    put_all(store, 1)
    tracemalloc.start()
    try:
        with pytest.raises(TryLater):
            store.put(KEY, BODY)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2_000_000
    put_all(store, 1)
    assert [request.connection for request in server.requests] == [0, 0, 1]


@pytest.mark.parametrize("code", ["BadDigest", "XAmzContentSHA256Mismatch"])
def test_a_refused_checksum_is_of_the_way_or_of_the_body(server: Scripted, code: str) -> None:
    @dataclass(frozen=True)
    class Changed(BytesBody):
        @property
        def size(self) -> int:
            return len(self.data)

        def open(self) -> BinaryIO:
            return BytesBody(self.data[:-1] + b"?").open()

    server.script = [refusal(400, code)] * 2
    store = open_store(server)
    with pytest.raises(TryLater):
        store.put(KEY, BODY)
    with pytest.raises(IntegrityError):
        store.put(KEY, Changed(BODY.data))


def test_a_body_that_ends_early_is_not_sent(server: Scripted) -> None:
    @dataclass(frozen=True)
    class Short(BytesBody):
        @property
        def size(self) -> int:
            return len(self.data) + 1

    with pytest.raises(IntegrityError):
        open_store(server).put(KEY, Short(b"x"))
    assert server.connections == 0


def test_a_version_is_reported(server: Scripted) -> None:
    server.script = [DONE.replace(b"ETag", b"X-Amz-Version-Id: v7\r\nETag")]
    assert open_store(server).put(KEY, BODY).version_id == "v7"

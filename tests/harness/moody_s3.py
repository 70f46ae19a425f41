"""An S3 endpoint on loopback that passes everything on to a real server, until it is in a mood.

Owns a listener and a thread for each connection. ``mood`` is asked for each
request, and says how that one is misbehaved to; without one the request and
its answer pass as they are, so that whatever is stored is in the real server.
"""

import contextlib
import http.client
import http.server
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from tests.harness.seaweedfs import SeaweedFS

_SERVER_SECONDS = 30.0
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with no time to linger: close sends RST
_XML = "<?xml version='1.0'?><Error><Code>{}</Code><Message>a mood</Message></Error>"
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding", "date", "server"}


@dataclass(frozen=True, slots=True)
class Answer:
    """Passes nothing on and answers this: an error if ``code`` is one, else a success that is none."""

    status: int
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hang:
    """Passes nothing on, says nothing for so long, and resets the connection."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ResetInBody:
    """Resets the connection after so many octets of the request's body; nothing is passed on."""

    octets: int


@dataclass(frozen=True, slots=True)
class LoseAnswer:
    """Passes the request on, and resets the connection in place of the answer."""


@dataclass(frozen=True, slots=True)
class Truncate:
    """Passes the request on, promises more in the answer than comes, and hangs up."""


@dataclass(frozen=True, slots=True)
class Trickle:
    """Passes the request on, and its answer back octet by octet, so long after each other."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Overwrite:
    """Passes the request on, and its answer back with these headers in place of the right ones."""

    headers: dict[str, str]


Mood = Answer | Hang | ResetInBody | LoseAnswer | Truncate | Trickle | Overwrite


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked. ``key`` is the path, the bucket's name in front."""

    method: str
    key: str


def in_good_mood(_: Request) -> Mood | None:
    return None


class MoodyS3:
    """A context manager. ``requests`` has all that was asked, ``moods`` counts what was misbehaved to."""

    def __init__(self, server: SeaweedFS) -> None:
        self.mood: Callable[[Request], Mood | None] = in_good_mood
        self.requests: list[Request] = []
        self.moods = 0
        self._to = urlsplit(server.endpoint_url).netloc
        self._listener = _Listener(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def mood_for(self, request: Request) -> Mood | None:
        self.requests.append(request)
        mood = self.mood(request)
        self.moods += mood is not None
        return mood

    def pass_on(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """The real server's answer."""
        connection = http.client.HTTPConnection(self._to, timeout=_SERVER_SECONDS)
        with contextlib.closing(connection):
            # The signature covers the Host that the client called.
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], owner: MoodyS3) -> None:
        super().__init__(address, _Handler)
        self.owner = owner


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def handle_one_request(self) -> None:
        # Clients hang up in the middle of what these tests do to them.
        self.close_connection = True
        with contextlib.suppress(OSError):
            super().handle_one_request()

    def log_message(self, *_: object) -> None:
        """The tests say what they saw."""

    def _serve(self) -> None:
        request = Request(self.command, urlsplit(self.path).path.lstrip("/"))
        mood = self.server.owner.mood_for(request)
        size = int(self.headers.get("content-length", 0))
        match mood:
            case Hang(seconds):
                time.sleep(seconds)
                return self._reset()
            case ResetInBody(octets):
                self.rfile.read(min(octets, size))
                return self._reset()
        body = self.rfile.read(size)
        if isinstance(mood, Answer):
            error = _XML.format(mood.code).encode() if mood.code else b""
            return self._answer(mood.status, {"ETag": '"none"', **mood.headers}, error)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        status, found, content = self.server.owner.pass_on(self.command, self.path, headers, body)
        match mood:
            case LoseAnswer():
                return self._reset()
            case Truncate():
                self._answer(status, {**found, "Content-Length": str(len(content) + 1000)}, content)
                self.close_connection = True
                return None
            case Overwrite(others):
                found = {name: value for name, value in found.items() if name.lower() not in others} | others
            case Trickle(seconds):
                self._pause_seconds = seconds
        return self._answer(status, found, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815 - the library's names

    _pause_seconds = 0.0

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
        given = {name.lower() for name in headers}
        lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() not in _HOP_BY_HOP]
        if "content-length" not in given and status not in (204, 304):
            lines.append(f"Content-Length: {len(content)}")
        octets = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if self.command != "HEAD":
            octets += content
        self.close_connection = False
        if self._pause_seconds:
            for octet in octets:
                self.wfile.write(bytes([octet]))
                time.sleep(self._pause_seconds)
            self._pause_seconds = 0.0
        else:
            self.wfile.write(octets)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        self.close_connection = True
        self.connection.close()

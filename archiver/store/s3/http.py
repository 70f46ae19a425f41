"""Reads the answer to a request of HTTP/1.1: its framing (RFC 9112), in bounded memory.

Reads at most ``_ANSWER_BYTES``, whatever a server sends. A head that is
malformed or has no end is an error. A body may be cut short, by that limit or
by the server: the status still counts. If it is unclear where the answer ends,
the connection is not used again.
"""

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

__all__ = ["Answer", "BadAnswerError", "read_answer"]

# A head has some hundred bytes, and so has an error's XML.
_ANSWER_BYTES = 64 * 1024
_READ_BYTES = 16 * 1024

# Section 2.2 lets a line end in LF alone. No pattern backtracks: time is linear in the input.
_BLANK_LINE = re.compile(rb"\n\r?\n")
_LINE_END = re.compile(rb"\n")
_HEAD = re.compile(
    rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: [^\0\r\n]*+)?+\r?\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\0\r\n]*+\r?\n)*+)\r?\n"
)
_LENGTH = re.compile(r"[0-9]{1,15}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*+(?:;[^\r\n]*+)?+\r?\n")


class BadAnswerError(Exception):
    """The answer is not HTTP, or broke off in the head."""


class Answer(NamedTuple):
    """One answer."""

    status: int
    headers: Mapping[str, str]
    """By name in lower case. The values of a repeated header are joined."""
    body: bytes
    is_last: bool
    """The connection ends here, or the next bytes on it may not be the next answer."""


def read_answer(receive: Callable[[int], bytes]) -> Answer:
    """Read the final answer. ``receive`` is a socket's ``recv``; its errors pass.

    Raises BadAnswerError, and ConnectionResetError where the connection was
    closed without an answer.
    """
    octets = _Octets(receive)
    status = 0
    while status < HTTPStatus.OK:
        version, status, headers = _head(octets)
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
        body, is_whole = b"", coding is None
    elif coding is not None and coding.lower() == "chunked":
        body, is_whole = _chunks(octets)
        is_whole = is_whole and length is None and version > 0  # section 6.1
    elif coding is not None or length is None:
        body, is_whole = octets.take(_ANSWER_BYTES), False  # until the server closes
    elif _LENGTH.fullmatch(length):
        body = octets.take(int(length))
        is_whole = len(body) == int(length)
    else:
        raise BadAnswerError("Content-Length is not a number")
    connection = headers.get("connection", "").lower()
    is_kept = "close" not in connection if version else "keep-alive" in connection
    return Answer(status, headers, body, not (is_whole and is_kept and octets.are_over))


def _head(octets: "_Octets") -> tuple[int, int, dict[str, str]]:
    """HTTP's minor version, the status, the headers."""
    octets.fill(len(b"HTTP/"))
    if not octets.rest:
        raise ConnectionResetError("closed without an answer")
    if not octets.rest.startswith(b"HTTP/"):  # a mail server's greeting would have no blank line
        raise BadAnswerError("the answer is not HTTP")
    found = _HEAD.fullmatch(octets.until(_BLANK_LINE))
    if found is None:
        raise BadAnswerError("the head of the answer is malformed")
    headers: dict[str, str] = {}
    for line in found[3].decode("latin-1").split("\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t\r")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return int(found[1]), int(found[2]), headers


def _chunks(octets: "_Octets") -> tuple[bytes, bool]:
    """The content of all chunks that arrived, and whether it is complete (section 7.1)."""
    chunks: list[bytes] = []
    while found := _CHUNK_SIZE.fullmatch(octets.until(_LINE_END)):
        size = int(found[1], 16)
        if not size:
            while (trailer := octets.until(_LINE_END)) not in (b"\r\n", b"\n", b""):
                pass
            return b"".join(chunks), bool(trailer)
        chunks.append(octets.take(size))
        if octets.until(_LINE_END) not in (b"\r\n", b"\n"):
            break
    return b"".join(chunks), False


class _Octets:
    """The bytes of one answer. ``rest`` was received, and is not taken yet."""

    def __init__(self, receive: Callable[[int], bytes]) -> None:
        self._receive = receive
        self._left = _ANSWER_BYTES
        self.rest = b""

    @property
    def are_over(self) -> bool:
        """Whether no more bytes are known. At the limit, TLS may hold some that the socket does not show."""
        return not self.rest and self._left > 0

    def _more(self) -> bool:
        """Receive more; return False at the end and at the limit."""
        received = self._receive(min(self._left, _READ_BYTES)) if self._left else b""
        self._left -= len(received)
        self.rest += received
        return bool(received)

    def fill(self, size: int) -> None:
        while len(self.rest) < size and self._more():
            pass

    def take(self, size: int) -> bytes:
        """Take ``size`` bytes, or fewer at the end."""
        self.fill(size)
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def until(self, end: re.Pattern[bytes]) -> bytes:
        """Take everything up to and including ``end``, or nothing if it does not arrive."""
        start = 0
        while not (found := end.search(self.rest, start)):
            start = max(0, len(self.rest) - len(b"\n\r"))
            if not self._more():
                return b""
        return self.take(found.end())

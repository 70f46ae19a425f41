"""Whatever a store answers, and however it is cut into reads, the same is made of it, and never too much."""

import http.client
import io
import socket
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from archiver.store.s3.http import Answer, BadAnswerError, read_answer

MOST = 64 * 1024

# What matters to framing comes up often; the others stand for all the rest.
HOSTILE = st.lists(
    st.sampled_from(
        [
            *(
                b"\r\n",
                b"\n",
                b"\r",
                b"\r\n\r\n",
                b" ",
                b":",
                b";",
                b",",
                b"\0",
                b"\xff",
                b"x",
                b"0",
                b"1",
                b"f",
            ),
            *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 503 No\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/"),
            *(
                b"Content-Length: ",
                b"Transfer-Encoding: chunked\r\n",
                b"Connection: close\r\n",
                b"ETag: x\r\n",
            ),
            b"y" * 40_000,
        ]
    ),
    max_size=30,
).map(b"".join)

NAMES = st.sampled_from(["ETag", "Server", "x-amz-request-id", "Date"])
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20)
STATUSES = st.sampled_from([200, 204, 301, 304, 400, 403, 412, 500, 503])
CONTENTS = st.lists(st.binary(min_size=1, max_size=40), max_size=4)
FRAMINGS = st.sampled_from(["length", "chunks", "end"])


class Line:
    """A connection on which ``octets`` come, at most as many at a time as ``sizes`` say, then the end."""

    def __init__(self, octets: bytes, sizes: list[int]) -> None:
        self._octets = octets
        self._sizes = sizes or [len(octets)]
        self._reads = 0
        self.received = 0

    def recv(self, size: int) -> bytes:
        size = min(size, self._sizes[self._reads % len(self._sizes)])
        self._reads += 1
        found = self._octets[self.received : self.received + size]
        self.received += len(found)
        return found


def outcome(octets: bytes, sizes: list[int]) -> tuple[Answer | type[Exception], int]:
    line = Line(octets, sizes)
    try:
        return read_answer(line.recv), line.received
    except (BadAnswerError, ConnectionResetError) as error:
        return type(error), line.received


@given(HOSTILE, st.booleans(), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_the_reads_make_no_difference(octets: bytes, is_begun: bool, sizes: list[int]) -> None:
    if is_begun:
        octets = b"HTTP/1.1 200 OK\r\n" + octets
    at_once, received = outcome(octets, [])
    in_parts, received_in_parts = outcome(octets, sizes)
    assert max(received, received_in_parts) <= MOST
    if isinstance(at_once, Answer) and isinstance(in_parts, Answer):
        assert at_once[:3] == in_parts[:3]
        assert at_once.is_last or not in_parts.is_last
        assert in_parts.is_last or received_in_parts <= received
    else:
        assert at_once == in_parts


@given(STATUSES, st.lists(st.tuples(NAMES, VALUES), max_size=4), CONTENTS, FRAMINGS)
def test_what_is_well_formed_is_read_as_everybody_reads_it(
    status: int, headers: list[tuple[str, str]], content: list[bytes], framing: str
) -> None:
    body = b"".join(content)
    has_body = status not in (204, 304)
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers)]
    if framing == "length" and has_body:
        lines.append(f"Content-Length: {len(body)}")
    if framing == "chunks" and has_body:
        lines.append("Transfer-Encoding: chunked")
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in content) + b"0\r\n\r\n"
    octets = "\r\n".join([*lines, "", ""]).encode() + (body if has_body else b"")

    answer = read_answer(Line(octets, []).recv)

    class Socket:
        def makefile(self, _: str) -> io.BytesIO:
            return io.BytesIO(octets)

    theirs = http.client.HTTPResponse(cast("socket.socket", Socket()), method="PUT")
    theirs.begin()
    assert (answer.status, answer.body) == (theirs.status, theirs.read())
    assert answer.headers == {name.lower(): theirs.getheader(name) for name, _ in theirs.getheaders()}
    assert answer.is_last == theirs.will_close

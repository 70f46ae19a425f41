"""Odd answers of HTTP: what is made of them, and whether the connection may be used again."""

from collections.abc import Iterator

import pytest

from archiver.store.s3.http import Answer, BadAnswerError, read_answer

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n"
ERROR = b"<Error><Code>SlowDown</Code></Error>"
MOST = 64 * 1024  # octets of an answer that are taken in


class Line:
    """A connection on which ``octets`` come, then the end."""

    def __init__(self, octets: bytes) -> None:
        self.octets = octets
        self.received = 0

    def recv(self, size: int) -> bytes:
        found = self.octets[self.received : self.received + size]
        self.received += len(found)
        return found


def read(octets: bytes) -> Answer:
    return read_answer(Line(octets).recv)


@pytest.mark.parametrize(
    ("octets", "status", "body", "is_last"),
    [
        (OK + b"Content-Length: 0\r\n\r\n", 200, b"", False),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200, b"", False),
        (b"HTTP/1.1 200 \r\ncontent-LENGTH:2  \r\n\r\nxy", 200, b"xy", False),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nxy", 200, b"xy", False),
        (b"HTTP/1.1 503 No\r\nContent-Length: %d\r\n\r\n%s" % (len(ERROR), ERROR), 503, ERROR, False),
        (b"HTTP/1.1 799 What\r\nContent-Length: 0\r\n\r\n", 799, b"", False),
        # None has a body, whatever it says.
        (b"HTTP/1.1 204 No\r\n\r\n", 204, b"", False),
        (b"HTTP/1.1 304 No\r\nContent-Length: 9\r\n\r\n", 304, b"", False),
        (b"HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n", 204, b"", True),
        # Before the final one.
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 0\r\n\r\n", 200, b"", False),
        (
            b"HTTP/1.1 102 Wait\r\nX: y\r\n\r\nHTTP/1.1 103 Hints\r\n\r\n"
            + OK
            + b"Content-Length: 0\r\n\r\n",
            200,
            b"",
            False,
        ),
        # In chunks.
        (CHUNKED + b"\r\n0\r\n\r\n", 200, b"", False),
        (
            CHUNKED + b'\r\n3\r\nabc\r\n00A ;x="y"\r\n0123456789\r\n0\r\nX: y\r\n\r\n',
            200,
            b"abc0123456789",
            False,
        ),
        (CHUNKED + b"\r\n3\nabc\n0\n\n", 200, b"abc", False),
        (CHUNKED.replace(b"chunked", b"Chunked") + b"\r\n1\r\na\r\n0\r\n\r\n", 200, b"a", False),
        # In chunks that break off, or are none: the status counts.
        (CHUNKED + b"\r\n3\r\nab", 200, b"ab", True),
        (CHUNKED + b"\r\n3\r\nabcd\r\n0\r\n\r\n", 200, b"abc", True),
        (CHUNKED + b"\r\n3\r\nabc\r\n0\r\n", 200, b"abc", True),
        (CHUNKED + b"\r\n3\r\nabc\r\n-1\r\n\r\n", 200, b"abc", True),
        (CHUNKED + b"\r\n3\r\nabc\r\n100000000\r\nd", 200, b"abc", True),
        (CHUNKED + b"\r\n", 200, b"", True),
        # Two lengths: whoever is in between may see another end.
        (CHUNKED + b"Content-Length: 3\r\n\r\n1\r\na\r\n0\r\n\r\n", 200, b"a", True),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200, b"", True),
        (OK + b"Transfer-Encoding: gzip, chunked\r\nContent-Length: 1\r\n\r\nabc", 200, b"abc", True),
        (CHUNKED + b"Transfer-Encoding: chunked\r\n\r\nabc", 200, b"abc", True),
        # Up to the end of the connection.
        (OK + b"\r\nabc", 200, b"abc", True),
        (b"HTTP/1.0 403 No\r\n\r\n" + ERROR, 403, ERROR, True),
        # Less than was said, or more.
        (b"HTTP/1.1 403 No\r\nContent-Length: 99\r\n\r\n" + ERROR, 403, ERROR, True),
        (OK + b"Content-Length: 2\r\n\r\nabc", 200, b"ab", True),
        (OK + b"Content-Length: 0\r\n\r\n" + OK, 200, b"", True),
        (CHUNKED + b"\r\n0\r\n\r\nx", 200, b"", True),
        # Who closes says so, and so does who of old does not.
        (OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n", 200, b"", True),
        (OK + b"Connection: Keep-Alive\r\nConnection: Close\r\nContent-Length: 0\r\n\r\n", 200, b"", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b"", True),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n", 200, b"", False),
    ],
)
def test_answers(octets: bytes, status: int, body: bytes, is_last: bool) -> None:
    answer = read(octets)
    assert (answer.status, answer.body, answer.is_last) == (status, body, is_last)


def test_headers_are_found_by_names_in_lower_case() -> None:
    answer = read(OK + b'ETag: "a:b"\r\nX-Empty:\r\nX-It: \t caf\xe9 \x85 \r\nx-it:2\r\n\r\n')
    assert answer.headers == {"etag": '"a:b"', "x-empty": "", "x-it": "caf\xe9 \x85, 2"}


@pytest.mark.parametrize(
    "octets",
    [
        b"2",
        b"220 mail.example.com ESMTP\r\n",
        b"HTTP/1.1 2",
        OK,
        OK + b"ETag: x\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 O\0K\r\n\r\n",
        b"\r\n" + OK + b"\r\n",
        OK + b"no colon\r\n\r\n",
        OK + b": no name\r\n\r\n",
        OK + b"Content-Length : 0\r\n\r\n",
        OK + b"X: y\r\n folded: z\r\n\r\n",
        OK + b"X: y\rContent-Length: 0\r\n\r\n",
        OK + b"X: \0\r\n\r\n",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Content-Length: +1\r\n\r\nx",
        OK + b"Content-Length: 1_0\r\n\r\n",
        OK + b"Content-Length: \xb2\r\n\r\nxx",
        OK + b"Content-Length:\r\n\r\n",
        OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
        OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_answer(octets: bytes) -> None:
    with pytest.raises(BadAnswerError):
        read(octets)


@pytest.mark.parametrize("octets", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_connection_that_was_closed_without_an_answer(octets: bytes) -> None:
    with pytest.raises(ConnectionResetError):
        read(octets)


@pytest.mark.parametrize(
    "octets",
    [
        OK + b"X: " + b"y" * 1_000_000,
        OK + b"X: y\r\n" * 100_000 + b"\r\n",
        OK + b":" * 1_000_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000 + OK + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 " + b" " * 1_000_000,
        b"HTTP/" * 100_000,
    ],
)
def test_a_head_has_bounds(octets: bytes) -> None:
    line = Line(octets)
    with pytest.raises((BadAnswerError, ConnectionResetError)):
        read_answer(line.recv)
    assert line.received <= MOST


@pytest.mark.parametrize(
    "beginning",
    [
        OK + b"Content-Length: 1000000\r\n\r\n",
        OK + b"\r\n",
        CHUNKED + b"\r\nF4240\r\n",
        CHUNKED + b"\r\n1;",
        CHUNKED + b"\r\n0\r\n",
    ],
)
def test_a_body_has_bounds(beginning: bytes) -> None:
    line = Line(beginning + b"x" * 1_000_000)
    answer = read_answer(line.recv)
    assert (answer.status, answer.is_last) == (200, True)
    assert line.received == MOST
    assert len(answer.body) < MOST


def test_of_many_small_chunks_only_so_many_are_taken() -> None:
    line = Line(CHUNKED + b"\r\n" + b"1\r\nx\r\n" * 100_000)
    answer = read_answer(line.recv)
    assert answer.is_last
    assert line.received == MOST
    assert set(answer.body) == set(b"x")


def test_at_the_limit_nobody_knows_what_follows() -> None:
    head = OK + b"Content-Length: %d\r\n\r\n"
    size = MOST - len(head % 10_000)
    answer = read(head % size + b"x" * size)
    assert (len(answer.body), answer.is_last) == (size, True)
    answer = read(head % (size - 1) + b"x" * (size - 1))
    assert (len(answer.body), answer.is_last) == (size - 1, False)


def test_no_more_is_waited_for_than_the_answer() -> None:
    def reads() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r"
        yield b"\n"
        pytest.fail("asked for more")

    coming = reads()
    assert not read_answer(lambda _: next(coming)).is_last

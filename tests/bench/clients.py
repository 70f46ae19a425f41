"""Clients to compare with: bare ones, which are the limits, and what others' libraries make of the work.

Each is a child process (``machine.serve``). Needs the standard library alone;
boto3 and obstore where they are asked for, since obstore lives in an
environment of its own. A bare client does what a protocol demands and nothing
else: it keeps nothing, checks nothing but that all came.
"""

import base64
import hashlib
import poplib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.machine import Work, serve

_HOST = "127.0.0.1"
_END = b"\r\n.\r\n"
_READ_BYTES = 256 * 1024
_LINE_OCTETS = 2**20  # poplib refuses lines above 2,048 octets, and mail has longer ones
_SILENT_SECONDS = 120.0


@contextmanager
def download(
    *, port: int, ca_file: str, password: str, users: list[str], count: int, window: int, threads: int
) -> Iterator[Work]:
    """``count`` messages of each mailbox, ``window`` RETRs under way (0: all at once), thrown away."""
    context = ssl.create_default_context(cafile=ca_file)

    def fetch(user: str) -> tuple[int, int]:
        with _line(port, context) as line:
            # A server that is not talked to before it has greeted and answered, as RFC 1939 has it.
            _ask(line, None, f"USER {user}", f"PASS {password}")
            return _retrieve(line, count, window or count)

    with ThreadPoolExecutor(threads) as pool:

        def work() -> dict[str, Any]:
            fetched = list(pool.map(fetch, users))
            return {"count": sum(each[0] for each in fetched), "octets": sum(each[1] for each in fetched)}

        yield work


@contextmanager
def idle(*, port: int, ca_file: str, password: str, users: list[str], threads: int) -> Iterator[Work]:
    """Log in, list by UIDL and LIST, and quit. ``octets`` are of the listings."""
    context = ssl.create_default_context(cafile=ca_file)

    def look(user: str) -> tuple[int, int]:
        with _line(port, context) as line:
            _ask(line, None, f"USER {user}", f"PASS {password}")
            return _list(line, then=b"QUIT\r\n")

    with ThreadPoolExecutor(threads) as pool:

        def work() -> dict[str, Any]:
            seen = list(pool.map(look, users))
            return {
                "count": len(seen),
                "listed": sum(each[0] for each in seen),
                "octets": sum(each[1] for each in seen),
            }

        yield work


@contextmanager
def one_of_many(*, port: int, ca_file: str, password: str, user: str) -> Iterator[Work]:
    """The listing of one mailbox, by UIDL and LIST, and a RETR of its last message."""
    context = ssl.create_default_context(cafile=ca_file)

    def work() -> dict[str, Any]:
        with _line(port, context) as line:
            _ask(line, None, f"USER {user}", f"PASS {password}")
            listed, _ = _list(line)
            line.sendall(b"RETR %d\r\nQUIT\r\n" % listed)
            octets = len(_until(line, _END))
            return {"count": 1, "listed": listed, "octets": octets}

    yield work


@contextmanager
def count_only(*, port: int, ca_file: str, password: str, user: str) -> Iterator[Work]:
    """Log in, STAT, quit: the least that tells whether a mailbox has grown."""
    context = ssl.create_default_context(cafile=ca_file)

    def work() -> dict[str, Any]:
        with _line(port, context) as line:
            _ask(line, None, f"USER {user}", f"PASS {password}")
            line.sendall(b"STAT\r\nQUIT\r\n")
            answer = _until(line, b"\r\n")
            return {"count": 1, "listed": int(answer.split()[1])}

    yield work


@contextmanager
def by_poplib(*, port: int, ca_file: str, password: str, user: str) -> Iterator[Work]:
    """A loop of the standard library's client: UIDL, then a RETR each, kept nowhere."""
    context = ssl.create_default_context(cafile=ca_file)
    poplib._MAXLINE = _LINE_OCTETS  # type: ignore[attr-defined]

    def work() -> dict[str, Any]:
        mailbox = poplib.POP3_SSL(_HOST, port, context=context, timeout=_SILENT_SECONDS)
        mailbox.user(user)
        mailbox.pass_(password)
        octets = 0
        entries = mailbox.uidl()[1]
        for entry in entries:
            number, _ = entry.split()
            octets += len(b"\r\n".join(mailbox.retr(int(number))[1])) + len(b"\r\n")
        mailbox.quit()
        return {"count": len(entries), "octets": octets}

    yield work


@contextmanager
def put_by_boto3(
    *, directory: str, count: int, threads: int, bucket: str, prefix: str, endpoint_url: str
) -> Iterator[Work]:
    """boto3's ``put_object`` with the same checksum, metadata and condition as the archiver's PUT."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        config=Config(max_pool_connections=threads, request_checksum_calculation="when_required"),
    )

    def put(name: str, body: bytes, digest: bytes) -> None:
        client.put_object(
            Bucket=bucket,
            Key=name,
            Body=body,
            ContentType="message/rfc822",
            ChecksumSHA256=base64.b64encode(digest).decode("ascii"),
            Metadata={"sha256": digest.hex()},
            IfNoneMatch="*",
        )

    with _putting(directory, count, threads, prefix, put) as work:
        yield work


@contextmanager
def put_by_obstore(
    *, directory: str, count: int, threads: int, bucket: str, prefix: str, endpoint_url: str
) -> Iterator[Work]:
    """obstore (Rust), which sends neither a checksum nor a condition here: the leanest PUT there is."""
    from obstore import put as obstore_put  # type: ignore[import-not-found]
    from obstore.store import S3Store  # type: ignore[import-not-found]

    store = S3Store(bucket, endpoint=endpoint_url, client_options={"allow_http": True})

    def put(name: str, body: bytes, digest: bytes) -> None:
        obstore_put(store, name, body, use_multipart=False)

    with _putting(directory, count, threads, prefix, put) as work:
        yield work


@contextmanager
def _putting(
    directory: str, count: int, threads: int, prefix: str, put: Callable[[str, bytes, bytes], None]
) -> Iterator[Work]:
    """The corpus in memory, its digests made, and every connection opened by a PUT that does not count."""
    bodies = [path.read_bytes() for path in sorted(Path(directory).iterdir())[:count]]
    digests = [hashlib.sha256(body).digest() for body in bodies]
    names = [f"{prefix}/{digest.hex()}.eml" for digest in digests]
    together = threading.Barrier(threads)

    def warm(number: int) -> None:
        together.wait()
        body = b"warm %d" % number
        put(f"warm-{prefix}/{number}", body, hashlib.sha256(body).digest())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(warm, range(threads)))

        def work() -> dict[str, Any]:
            for _ in pool.map(put, names, bodies, digests):
                pass
            return {"count": len(bodies), "octets": sum(map(len, bodies))}

        yield work


def _line(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection((_HOST, port), timeout=_SILENT_SECONDS)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(plain, server_hostname=_HOST)


def _ask(line: ssl.SSLSocket, *commands: str | None) -> None:
    """Commands whose answer is one line, one after the other; the first answer is the greeting."""
    for command in commands:
        if command is not None:
            line.sendall(f"{command}\r\n".encode())
        answer = _until(line, b"\r\n")
        if not answer.startswith(b"+OK"):
            raise ConnectionError(f"{command}: {answer!r}")


def _until(line: ssl.SSLSocket, end: bytes) -> bytes:
    heard = bytearray()
    while end not in heard[-_READ_BYTES - len(end) :]:
        octets = line.recv(_READ_BYTES)
        if not octets:
            raise ConnectionError(f"the server hung up after {bytes(heard[-80:])!r}")
        heard += octets
    return bytes(heard)


def _list(line: ssl.SSLSocket, then: bytes = b"") -> tuple[int, int]:
    """How many messages both listings show, and their octets."""
    line.sendall(b"UIDL\r\nLIST\r\n" + then)
    heard, ends, tail = 0, 0, b""
    lines = 0
    while ends < 2:
        octets = line.recv(_READ_BYTES)
        if not octets:
            raise ConnectionError("the server hung up in a listing")
        ends += (tail + octets).count(_END)
        lines += octets.count(b"\r\n")
        heard += len(octets)
        tail = octets[-len(_END) + 1 :]
    # Each listing has a line before its messages and one behind them; QUIT's answer may be here already.
    return (lines - 4) // 2, heard


def _retrieve(line: ssl.SSLSocket, count: int, window: int) -> tuple[int, int]:
    asked, ends, octets, tail = 0, 0, 0, b""
    while ends < count:
        wanted = min(count, ends + window)
        if wanted > asked and (wanted == count or wanted - asked >= window // 2):
            commands = b"".join(b"RETR %d\r\n" % number for number in range(asked + 1, wanted + 1))
            # All of them are 22 KB for 2,000 messages, which a socket's buffer takes at once.
            line.sendall(commands)
            asked = wanted
        read = line.recv(_READ_BYTES)
        if not read:
            break
        ends += (tail + read).count(_END)
        octets += len(read)
        tail = read[-len(_END) + 1 :]
    line.sendall(b"QUIT\r\n")
    return ends, octets


if __name__ == "__main__":
    serve(
        {
            "download": download,
            "idle": idle,
            "one-of-many": one_of_many,
            "count-only": count_only,
            "poplib": by_poplib,
            "boto3": put_by_boto3,
            "obstore": put_by_obstore,
        }
    )

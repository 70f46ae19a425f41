"""An S3 server that does no work: it takes objects, counts them and forgets them.

What a fleet's simulation sends its objects to, so that the store's share of
this machine is next to nothing. It keeps nothing and proves nothing; no test
of a promise may use it.
"""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection

from archiver.demo.processes import HOST

_BACKLOG = 512
_COUNTS = "/-/counts"
_BEGUN = (
    b"<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>1</UploadId>"
    b"</InitiateMultipartUploadResult>"
)
_EMPTY = (
    b"<ListBucketResult><Name>b</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated>"
    b"</ListBucketResult>"
)


_ANSWERS = {
    "POST": (b"200 OK", _BEGUN),
    "DELETE": (b"204 No Content", b""),
    "GET": (b"200 OK", _EMPTY),
}


@dataclass(frozen=True, slots=True)
class IdleStore:
    """The server, started."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "ARCHIVER_S3_ENDPOINT_URL": f"http://{HOST}:{self.port}",
            "ARCHIVER_STORE_URL": "s3://bucket/archive",
        }

    def counts(self) -> dict[str, int]:
        """How many requests came, by method."""
        connection = HTTPConnection(HOST, self.port)
        connection.request("GET", _COUNTS)
        found: dict[str, int] = json.loads(connection.getresponse().read())
        connection.close()
        return found


@contextmanager
def idle_store() -> Iterator[IdleStore]:
    """The server in a process of its own, until the end of the block."""
    command = [sys.executable, "-m", "tests.bench.idle_store"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("a pipe was asked for")
            yield IdleStore(json.loads(process.stdout.readline()))
        finally:
            process.kill()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: Counter[str]) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")
            method, target, _ = first.split(" ")
            fields = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            await reader.readexactly(int(fields.get("content-length", "0")))
            status, body = _answer(method, target, counts)
            sent = b"" if method == "HEAD" else body
            writer.write(
                b'HTTP/1.1 %s\r\nETag: "0"\r\nContent-Length: %d\r\n\r\n%s' % (status, len(sent), sent)
            )
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def _answer(method: str, target: str, counts: Counter[str]) -> tuple[bytes, bytes]:
    if target == _COUNTS:
        return b"200 OK", json.dumps(counts).encode()
    counts[method] += 1
    is_object = "?" not in target and target.count("/") > 1 and bool(target.rpartition("/")[2])
    if method in ("GET", "HEAD") and is_object:
        return b"404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>"
    return _ANSWERS.get(method, (b"200 OK", b""))


async def _main() -> None:
    counts: Counter[str] = Counter()
    server = await asyncio.start_server(
        lambda reader, writer: _serve(reader, writer, counts), HOST, 0, backlog=_BACKLOG
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main())

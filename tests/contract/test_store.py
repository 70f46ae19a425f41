"""The store's contract, the same for a directory and for a bucket of a real S3 server."""

import base64
import functools
import hashlib
import http.server
import io
import multiprocessing
import os
import random
import re
import resource
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import boto3
import botocore.session
import pytest
from botocore.config import Config
from botocore.credentials import CredentialResolver

from archiver.errors import ArchiverError, IntegrityError, MessageRefused, OperatorNeeded, TryLater
from archiver.store import Body, InvalidKey, NotAnObject, ObjectDiffers, ObjectNotFound, PutResult, Store
from archiver.store.filesystem import FilesystemStore
from archiver.store.retry import RetryingStore
from archiver.store.s3 import S3Store
from archiver.store.spool import BytesBody, Spool
from tests.harness.proxy import Proxy
from tests.harness.seaweedfs import SeaweedFS

MIB = 1024 * 1024
PART = 5 * MIB  # the smallest that S3 takes
EXPECT = 1024 * 1024  # from here on S3 is asked before a body is sent

KEY = "messages/7/ab/abcdef.eml"
_processes = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Directory:
    """Where a store is, in a form that another process can be given."""

    root: Path

    def open(self) -> FilesystemStore:
        return FilesystemStore(self.root)


@functools.cache  # a session reads much of botocore's data
def _session(access_key: str, secret_key: str) -> boto3.session.Session:
    return boto3.session.Session(access_key, secret_key, region_name="us-east-1")


@dataclass(frozen=True)
class Bucket:
    endpoint_url: str
    name: str
    access_key: str
    secret_key: str

    def open(self, *, session: boto3.session.Session | None = None, timeout_seconds: float = 60) -> S3Store:
        return S3Store(
            self.name,
            "some/prefix",
            endpoint_url=self.endpoint_url,
            multipart_bytes=PART,
            part_bytes=PART,
            read_timeout_seconds=timeout_seconds,
            session=session or self.session(),
        )

    def session(self) -> boto3.session.Session:
        return _session(self.access_key, self.secret_key)

    def uploads(self) -> list[str]:
        """The keys of multipart uploads that were neither completed nor aborted."""
        client = self.session().client("s3", endpoint_url=self.endpoint_url)
        answer = client.list_multipart_uploads(Bucket=self.name)
        return [upload["Key"] for upload in answer.get("Uploads", ())]


@pytest.fixture
def in_directory(tmp_path: Path) -> Directory:
    place = Directory(tmp_path / "archive")
    place.open().probe()
    return place


@pytest.fixture
def in_bucket(s3: SeaweedFS, bucket: str) -> Bucket:
    return Bucket(s3.endpoint_url, bucket, s3.access_key, s3.secret_key)


@pytest.fixture(params=["in_directory", pytest.param("in_bucket", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest) -> Directory | Bucket:
    found: Directory | Bucket = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def store(place: Directory | Bucket) -> Store:
    return place.open()


@dataclass(frozen=True)
class Liar:
    """A body that is not what it says."""

    data: bytes
    size: int
    sha256: bytes

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def read(store: Store, key: str) -> bytes:
    with store.get(key) as chunks:
        return b"".join(chunks)


def keys(store: Store, prefix: str = "", after: str = "") -> list[str]:
    return [stored.key for stored in store.list(prefix, after=after)]


# What is put is there, whole


@pytest.mark.parametrize(
    "size",
    [0, 1, EXPECT - 1, EXPECT, EXPECT + 1, PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART, 2 * PART + 1],
)
def test_an_object_of_any_size_comes_back_octet_for_octet(store: Store, size: int) -> None:
    data = content(size)
    assert store.put(KEY, BytesBody(data)).created
    assert read(store, KEY) == data
    stored = store.stat(KEY)
    assert stored is not None
    assert (stored.key, stored.size) == (KEY, size)
    assert stored.sha256 in (None, hashlib.sha256(data).digest())
    assert [(found.key, found.size) for found in store.list("")] == [(KEY, size)]


def test_a_large_object_goes_through_in_little_memory(store: Store, tmp_path: Path) -> None:
    with Spool(tmp_path, MIB, MIB).create() as message:
        for seed in range(40):
            message.write(content(MIB, seed))
        message.seal()
        store.put("first/warm.up", BytesBody(content(PART + 1)))
        tracemalloc.start()
        try:
            assert store.put(KEY, message).created
            digest = hashlib.sha256()
            with store.get(KEY) as chunks:
                for chunk in chunks:
                    digest.update(chunk)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert digest.digest() == message.sha256
        assert peak_bytes < PART


def test_what_is_not_there_is_said_to_be_missing(store: Store) -> None:
    store.put(KEY, BytesBody(b"beside it"))
    for key in ("messages/7/ab/other.eml", "messages/7/ab", KEY + "/deeper"):
        assert store.stat(key) is None
        with pytest.raises(ObjectNotFound), store.get(key):
            pass
    assert keys(store, "messages/8/") == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../up",
        "a/../../up",
        "a//b",
        "a/",
        ".incoming/x",
        "a/.b",
        "ü",
        "a b",
        "a\\b",
        "a\n",
        "a" * 801,
    ],
)
def test_a_key_that_leaves_the_store_is_refused(store: Store, key: str) -> None:
    for attempt in (
        lambda: store.put(key, BytesBody(b"x")),
        lambda: store.stat(key),
        lambda: store.get(key).__enter__(),
    ):
        with pytest.raises(InvalidKey):
            attempt()
    assert keys(store) == []


# Listing


def test_a_listing_is_ordered_and_begins_where_it_is_told(store: Store) -> None:
    expected = [f"journal/{account}/{number:012d}.ndjson" for account in (1, 10, 2) for number in range(3)]
    for key in random.Random(1).sample([*expected, KEY], len(expected) + 1):
        store.put(key, BytesBody(key.encode()))
    assert keys(store) == [*expected, KEY]
    assert keys(store, "journal/") == expected
    assert keys(store, "journal/1") == expected[:6]
    assert keys(store, "journal/1/") == expected[:3]
    assert keys(store, "journal/1/000000000001") == [expected[1]]
    assert keys(store, expected[4]) == [expected[4]]
    assert keys(store, "nothing") == []
    for position, key in enumerate(expected):
        assert keys(store, "journal/", after=key) == expected[position + 1 :]


def test_a_listing_of_several_pages_is_complete(store: Store) -> None:
    expected = [f"messages/7/{number % 16:02x}/{number:05d}.eml" for number in range(1100)]
    with ThreadPoolExecutor(8) as threads:
        assert all(
            result.created for result in threads.map(lambda key: store.put(key, BytesBody(b"x")), expected)
        )
    assert keys(store, "messages/") == sorted(expected)


def test_names_are_those_directly_below(store: Store) -> None:
    for key in ("a/b/1", "a/b/2", "a/c", "a/d/e/f", "b/1"):
        store.put(key, BytesBody(b"x"))
    assert list(store.names("a/")) == ["b/", "c", "d/"]
    assert list(store.names("a/", after="b/")) == ["c", "d/"]
    assert list(store.names("none/")) == []


STRANGE = ["a/new\nline", "a/\N{SNOWMAN}", "a/~", "a/.hidden", "a/\x7f"]


def test_strangers_are_listed_on_demand(place: Directory | Bucket) -> None:
    store = place.open()
    store.put("a/b", BytesBody(b"x"))
    for name in STRANGE:
        if isinstance(place, Directory):
            (place.root / name).write_bytes(b"x")
        else:
            client = place.session().client("s3", endpoint_url=place.endpoint_url)
            client.put_object(Bucket=place.name, Key=f"some/prefix/{name}", Body=b"x")
    assert keys(store, "a/") == ["a/b", "a/~"]
    assert {stored.key for stored in store.list("a/", strangers=True)} == {"a/b", *STRANGE}
    assert {f"a/{name}" for name in store.names("a/")} == {"a/b", *STRANGE}


def test_a_directory_sorts_by_whole_keys(in_directory: Directory) -> None:
    store = in_directory.open()
    expected = ["a-b", "a.b", "a/x", "a/y-z", "a/y/z", "a0"]
    for key in reversed(expected):
        store.put(key, BytesBody(b"x"))
    assert keys(store) == expected
    assert keys(store, after="a/x") == expected[3:]


def test_a_server_that_sorts_otherwise_is_found_out(in_bucket: Bucket) -> None:
    store = in_bucket.open()
    for key in ("a-b", "a/x"):
        store.put(key, BytesBody(b"x"))
    with pytest.raises(OperatorNeeded, match="lists a-b after a/x"):
        keys(store)


def test_what_others_left_there_is_no_object_of_ours(place: Directory | Bucket) -> None:
    store = place.open()
    store.put(KEY, BytesBody(b"x"))
    if isinstance(place, Directory):
        (place.root / ".DS_Store").write_bytes(b"x")
        (place.root / "messages" / "a b").write_bytes(b"x")
    else:
        client = place.session().client("s3", endpoint_url=place.endpoint_url)
        for name in ("some/prefix/messages/", "some/prefix/a b", "elsewhere"):
            client.put_object(Bucket=place.name, Key=name)
    assert keys(store) == [KEY]


# Written once


@pytest.mark.parametrize("size", [100, 2 * PART + 1])
def test_a_second_put_of_the_same_changes_nothing(store: Store, size: int) -> None:
    body = BytesBody(content(size))
    assert store.put(KEY, body).created
    before = store.stat(KEY)
    assert not store.put(KEY, body).created
    assert store.stat(KEY) == before


@pytest.mark.parametrize("size", [100, 2 * PART + 1])
@pytest.mark.parametrize("change", ["shorter", "longer", "other octets"])
def test_other_content_never_replaces_what_is_there(store: Store, size: int, change: str) -> None:
    first = content(size)
    second = {"shorter": first[:-1], "longer": first + b"x", "other octets": content(size, seed=1)}[change]
    assert store.put(KEY, BytesBody(first)).created
    with pytest.raises(ObjectDiffers):
        store.put(KEY, BytesBody(second))
    assert read(store, KEY) == first


def _race(store: Store, body: BytesBody) -> int:
    """How many of 16 threads that put the same at the same time are told that they created it."""
    ready = threading.Barrier(16)

    def put(_: int) -> PutResult:
        ready.wait()
        return store.put(KEY, body)

    with ThreadPoolExecutor(16) as threads:
        return [result.created for result in threads.map(put, range(16))].count(True)


def test_of_many_threads_one_creates(store: Store) -> None:
    body = BytesBody(content(100))
    assert _race(store, body) == 1
    assert read(store, KEY) == body.data


def test_of_many_threads_with_a_large_object_one_creates(place: Directory | Bucket) -> None:
    store, body = place.open(), BytesBody(content(PART + 1))
    created = _race(store, body)
    # SeaweedFS looks and completes in two steps, so that some may pass at once; with the same content.
    assert created == 1 if isinstance(place, Directory) else created >= 1
    assert read(store, KEY) == body.data
    assert not store.put(KEY, body).created


def test_of_many_threads_with_different_content_one_wins_and_the_others_hear_of_it(store: Store) -> None:
    ready = threading.Barrier(16)

    def put(seed: int) -> bool:
        body = BytesBody(content(100, seed))
        ready.wait()
        try:
            return store.put(KEY, body).created
        except ObjectDiffers:
            return False

    with ThreadPoolExecutor(16) as threads:
        created = list(threads.map(put, range(16)))
    assert created.count(True) == 1
    assert read(store, KEY) == content(100, created.index(True))


def _put_in_process(place: Directory | Bucket, key: str) -> bool:
    return place.open().put(key, BytesBody(key.encode() * 1000)).created


@pytest.mark.slow
def test_of_several_processes_one_creates(place: Directory | Bucket) -> None:
    names = [f"messages/7/{number % 3}/{number}.eml" for number in range(20) for _ in range(4)]
    with ProcessPoolExecutor(4, mp_context=_processes) as pool:
        created = list(pool.map(_put_in_process, [place] * len(names), names))
    assert sorted(name for name, new in zip(names, created, strict=True) if new) == sorted(set(names))
    assert keys(place.open()) == sorted(set(names))


# Damaged on the way


@pytest.mark.parametrize("size", [100, EXPECT + 1, 2 * PART + 1])
@pytest.mark.parametrize("lie", ["one bit", "too short", "too long"])
def test_a_body_that_is_not_what_it_says_leaves_nothing(
    place: Directory | Bucket, size: int, lie: str
) -> None:
    store = place.open()
    data = content(size)
    shown = {"one bit": data[:-1] + bytes([data[-1] ^ 1]), "too short": data[:-1], "too long": data}[lie]
    said = size - 1 if lie == "too long" else size
    with pytest.raises(IntegrityError):
        store.put(KEY, Liar(shown, said, hashlib.sha256(data).digest()))
    assert store.stat(KEY) is None
    assert keys(store) == []
    if isinstance(place, Bucket):
        assert place.uploads() == []
    assert store.put(KEY, BytesBody(data)).created


# Crashes


@dataclass(frozen=True)
class Stalling:
    """A body whose reader stops for ever when it is about to pass ``offset`` for the nth time."""

    data: bytes
    offset: int
    times: int
    reached: Connection
    passed: list[int]

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.data).digest()

    def open(self) -> BinaryIO:
        return _StallingReader(self)


class _StallingReader(io.BytesIO):
    def __init__(self, body: Stalling) -> None:
        super().__init__(body.data)
        self._body = body

    def read(self, size: int | None = -1) -> bytes:
        before = self.tell()
        data = super().read(size)
        if before <= self._body.offset < before + len(data):
            self._body.passed.append(before)
            if len(self._body.passed) == self._body.times:
                self._body.reached.send("half-way")
                threading.Event().wait()
        return data


def _put_and_stall(
    place: Directory | Bucket, size: int, offset: int, times: int, reached: Connection
) -> None:
    place.open().put(KEY, Stalling(content(size), offset, times, reached, []))


@pytest.mark.parametrize(
    ("kind", "size", "offset", "times"),
    [
        pytest.param("in_directory", MIB, MIB // 2, 1, id="directory"),
        # The first pass is for the signature, the second is the sending.
        pytest.param("in_bucket", MIB, MIB // 2, 2, id="s3", marks=pytest.mark.s3),
        # The first part has been sent, the second is being read.
        pytest.param("in_bucket", 2 * PART, PART + MIB, 1, id="s3 in parts", marks=pytest.mark.s3),
    ],
)
@pytest.mark.slow
def test_a_process_killed_in_the_midst_leaves_nothing_to_be_seen(
    request: pytest.FixtureRequest, kind: str, size: int, offset: int, times: int
) -> None:
    place: Directory | Bucket = request.getfixturevalue(kind)
    here, there = _processes.Pipe()
    process = _processes.Process(target=_put_and_stall, args=(place, size, offset, times, there))
    process.start()
    try:
        assert here.poll(60), "the process did not come that far"
        assert here.recv() == "half-way"
    finally:
        process.kill()
        process.join()
    here.close()
    there.close()

    store = place.open()
    assert store.stat(KEY) is None
    assert keys(store) == []
    store.probe()
    assert store.put(KEY, BytesBody(content(size))).created
    assert read(store, KEY) == content(size)


# Usable or not


def test_a_probe_leaves_nothing_behind(place: Directory | Bucket) -> None:
    store = place.open()
    store.probe()
    assert keys(store) == []
    if isinstance(place, Directory):
        assert [path.name for path in place.root.rglob("*")] == [".incoming"]
    else:
        assert place.uploads() == []


def _every_verb(store: Store) -> Iterator[ArchiverError]:
    for attempt in (
        lambda: store.put(KEY, BytesBody(b"x")),
        lambda: store.put(KEY, BytesBody(content(PART + 1))),
        lambda: store.stat(KEY),
        lambda: store.get(KEY).__enter__(),
        lambda: keys(store),
        store.probe,
    ):
        with pytest.raises(ArchiverError) as caught:
            attempt()
        yield caught.value


# In a directory


@pytest.mark.parametrize("root", ["{file}/below", "/proc/archive"])
def test_an_unusable_directory_is_for_the_operator(tmp_path: Path, root: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for error in _every_verb(FilesystemStore(Path(root.format(file=file)))):
        assert type(error) is OperatorNeeded
        assert error.hint


def test_an_archive_does_not_begin_anew_where_its_volume_went_away(tmp_path: Path) -> None:
    store = FilesystemStore(tmp_path / "volume" / "archive")
    for attempt in (
        lambda: store.put(KEY, BytesBody(b"x")),
        lambda: store.stat(KEY),
        lambda: store.get(KEY).__enter__(),
        lambda: keys(store),
    ):
        with pytest.raises(OperatorNeeded, match="No such file or directory"):
            attempt()
    assert not (tmp_path / "volume").exists()


def test_files_are_read_only_and_nothing_else_remains(in_directory: Directory) -> None:
    store = in_directory.open()
    store.put(KEY, BytesBody(b"x"))
    store.put(KEY, BytesBody(b"x"))
    [file] = [path for path in in_directory.root.rglob("*") if path.is_file()]
    assert file == in_directory.root / KEY
    assert (file.stat().st_mode & 0o777, file.stat().st_nlink) == (0o444, 1)
    assert in_directory.root.stat().st_mode & 0o027 == 0


def test_each_name_on_the_way_is_durable(in_directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of a name, too, once: of a second object only what is new."""
    root, synced = in_directory.root, list[Path]()
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", noting)
    store = in_directory.open()
    for key, directories in (
        ("messages/a/00/x", [root, root / "messages", root / "messages/a", root / "messages/a/00"]),
        ("messages/a/01/y", [root / "messages/a", root / "messages/a/01"]),
        ("messages/a/01/z", [root / "messages/a/01"]),
    ):
        synced.clear()
        store.put(key, BytesBody(key.encode()))
        file, *others = synced
        assert file.parent == root / ".incoming"
        assert others == directories


def test_a_directory_that_was_removed_is_made_again(in_directory: Directory) -> None:
    store = in_directory.open()
    store.put(KEY, BytesBody(b"x"))
    file = in_directory.root / KEY
    file.unlink()
    file.parent.rmdir()
    assert store.put(KEY, BytesBody(b"x")).created
    assert read(store, KEY) == b"x"


def test_only_what_a_dead_process_left_is_cleaned_away(in_directory: Directory) -> None:
    incoming = in_directory.root / ".incoming"
    for name, age_seconds in (("dead", 25 * 3600), ("alive", 23 * 3600)):
        (incoming / name).write_bytes(b"x")
        then = time.time() - age_seconds
        os.utime(incoming / name, (then, then))
    in_directory.open().probe()
    assert [path.name for path in incoming.iterdir()] == ["alive"]


def _link_to_file(file: Path, elsewhere: Path) -> None:
    (elsewhere / "file").write_bytes(b"x")
    file.symlink_to(elsewhere / "file")


def _socket(file: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(file.parent, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{here}/{file.name}")  # the whole path may be too long for a socket
        os.close(here)


IN_A_FILE_S_PLACE: dict[str, Callable[[Path, Path], object]] = {
    "link to the right content": _link_to_file,
    "link to itself": lambda file, _: file.symlink_to(file.name),
    "link to nothing": lambda file, _: file.symlink_to("nothing"),
    "link to a device": lambda file, _: file.symlink_to("/dev/zero"),
    "FIFO": lambda file, _: os.mkfifo(file),
    "socket": _socket,
    "directory": lambda file, _: file.mkdir(),
}


@pytest.mark.parametrize("plant", IN_A_FILE_S_PLACE.values(), ids=IN_A_FILE_S_PLACE)
def test_only_a_regular_file_is_an_object(
    in_directory: Directory, tmp_path: Path, plant: Callable[[Path, Path], object]
) -> None:
    store = in_directory.open()
    store.put("messages/7/ab/other.eml", BytesBody(b"beside it"))
    plant(in_directory.root / KEY, tmp_path)
    assert store.stat(KEY) is None
    is_directory = (in_directory.root / KEY).is_dir()
    with pytest.raises(ObjectNotFound if is_directory else NotAnObject), store.get(KEY):
        pass
    assert keys(store) == ["messages/7/ab/other.eml"]
    strangers = {f"{KEY}/" if is_directory else KEY}
    assert {stored.key for stored in store.list("", strangers=True)} - {".incoming/"} == {
        "messages/7/ab/other.eml",
        *strangers,
    }
    with pytest.raises(ObjectDiffers):
        store.put(KEY, BytesBody(b"x"))
    assert [path.name for path in (in_directory.root / ".incoming").iterdir()] == []


@pytest.mark.parametrize("part", ["messages", "messages/7", "messages/7/ab"])
@pytest.mark.parametrize("known", [False, True], ids=["new store", "store that wrote there before"])
def test_no_link_is_followed_on_the_way_to_an_object(
    in_directory: Directory, tmp_path: Path, part: str, known: bool
) -> None:
    store = in_directory.open()
    store.put(KEY, BytesBody(b"x"))
    elsewhere = tmp_path / "elsewhere"
    (in_directory.root / part).rename(elsewhere)
    (in_directory.root / part).symlink_to(elsewhere)
    store = store if known else in_directory.open()
    assert store.stat(KEY) is None
    assert keys(store) == keys(store, "messages/7/") == []
    assert [stored.key for stored in store.list("messages", strangers=True)] == [part]
    with pytest.raises(NotAnObject, match="symbolic link"), store.get(KEY):
        pass
    before = sorted(elsewhere.rglob("*"))
    for key in (KEY, "messages/7/ab/new.eml"):
        with pytest.raises(OperatorNeeded, match="symbolic link") as caught:
            store.put(key, BytesBody(b"x"))
        assert "mount" in (caught.value.hint or "")
    assert sorted(elsewhere.rglob("*")) == before
    assert [path.name for path in (in_directory.root / ".incoming").iterdir()] == []


def test_the_directory_itself_may_be_a_link(in_directory: Directory, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(in_directory.root)
    store = FilesystemStore(tmp_path / "link")
    store.probe()
    store.put(KEY, BytesBody(b"x"))
    assert read(in_directory.open(), KEY) == b"x"


def test_nothing_is_cleaned_away_or_written_behind_a_link(in_directory: Directory, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    (others / "old").write_bytes(b"x")
    os.utime(others / "old", (0, 0))
    (in_directory.root / ".incoming").rmdir()
    (in_directory.root / ".incoming").symlink_to(others)
    store = in_directory.open()
    for attempt in (store.probe, lambda: store.put(KEY, BytesBody(b"x"))):
        with pytest.raises(OperatorNeeded, match=r"\.incoming is a symbolic link"):
            attempt()
    assert [path.name for path in others.iterdir()] == ["old"]


def test_a_link_in_the_directory_of_incoming_files_is_not_followed(
    in_directory: Directory, tmp_path: Path
) -> None:
    (tmp_path / "old").write_bytes(b"x")
    link = in_directory.root / ".incoming" / "link"
    link.symlink_to(tmp_path / "old")
    os.utime(link, (0, 0), follow_symlinks=False)
    in_directory.open().probe()
    assert not link.is_symlink()
    assert (tmp_path / "old").exists()


def test_a_file_that_is_replaced_while_it_is_read_changes_nothing(in_directory: Directory) -> None:
    store = in_directory.open()
    store.put(KEY, BytesBody(b"x"))
    file = in_directory.root / KEY
    with store.get(KEY) as chunks:
        file.unlink()
        os.mkfifo(file)
        assert list(chunks) == [b"x"]
    assert store.stat(KEY) is None


def test_a_file_that_grows_without_end_is_read_to_its_end(in_directory: Directory) -> None:
    store = in_directory.open()
    store.put(KEY, BytesBody(b"x"))
    file = in_directory.root / KEY
    file.chmod(0o600)
    with store.get(KEY) as chunks:
        for _ in range(3):
            with file.open("ab") as growing:
                growing.write(b"more")
            next(chunks, None)
        assert next(chunks, None) is None
    with pytest.raises(ObjectDiffers):
        store.put(KEY, BytesBody(b"x"))


def test_a_hard_link_counts_by_its_content(in_directory: Directory, tmp_path: Path) -> None:
    store = in_directory.open()
    store.put("messages/7/ab/other.eml", BytesBody(b"x"))
    (tmp_path / "file").write_bytes(b"x")
    (in_directory.root / KEY).hardlink_to(tmp_path / "file")
    assert not store.put(KEY, BytesBody(b"x")).created
    (tmp_path / "file").write_bytes(b"y")
    stored = store.stat(KEY)
    assert stored is not None
    assert stored.sha256 is None, "it must be read"
    with pytest.raises(ObjectDiffers):
        store.put(KEY, BytesBody(b"x"))


@pytest.mark.parametrize(
    ("ahead_seconds", "is_believed"), [(-86400, True), (0, True), (120, False), (10 * 365 * 86400, False)]
)
def test_a_date_in_the_future_is_not_believed(
    in_directory: Directory, ahead_seconds: int, is_believed: bool
) -> None:
    now = 1_800_000_000.0
    store = FilesystemStore(in_directory.root, now=lambda: now)
    store.put(KEY, BytesBody(b"x"))
    then = now + ahead_seconds
    os.utime(in_directory.root / KEY, (then, then))
    for stored in (store.stat(KEY), *store.list("")):
        assert stored is not None
        assert (stored.modified_at is not None) == is_believed


def test_a_date_that_no_calendar_has_is_not_believed(in_directory: Directory) -> None:
    store = in_directory.open()
    store.put(KEY, BytesBody(b"x"))
    for then in (2**40, -(2**40)):
        with suppress(OSError):  # not every file system can hold it
            os.utime(in_directory.root / KEY, (then, then))
        assert keys(store) == [KEY]


def test_a_listing_opens_few_directories_however_deep_they_are(in_directory: Directory) -> None:
    store = in_directory.open()
    key, descriptors = "/".join(["d"] * 300), Path("/proc/self/fd")
    store.put(key, BytesBody(b"x"))
    before = len(list(descriptors.iterdir()))
    for stored in store.list(""):
        assert stored.key == key
        assert len(list(descriptors.iterdir())) <= before + 2
    assert len(list(descriptors.iterdir())) == before


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Writing beyond ``size`` fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_of_a_file_that_is_too_large_nothing_remains(in_directory: Directory) -> None:
    store = in_directory.open()
    with _largest_file(100_000):
        with pytest.raises(MessageRefused, match="File too large") as caught:
            store.put(KEY, BytesBody(content(MIB)))
        assert "ulimit" in (caught.value.hint or "")
        assert store.put("messages/small.eml", BytesBody(b"x")).created
    (in_directory.root / "messages/small.eml").unlink()
    (in_directory.root / "messages").rmdir()
    assert [path.name for path in in_directory.root.rglob("*")] == [".incoming"]
    assert store.put(KEY, BytesBody(content(MIB))).created


# In a bucket


def test_a_missing_bucket_is_named(in_bucket: Bucket) -> None:
    for error in _every_verb(replace(in_bucket, name="no-such-bucket").open()):
        assert type(error) is OperatorNeeded
        assert "s3://no-such-bucket/" in str(error)
        assert in_bucket.endpoint_url in str(error)
        assert error.hint
        assert "ARCHIVER_STORE_URL" in error.hint


@pytest.mark.parametrize("wrong", ["access_key", "secret_key"])
def test_wrong_credentials_are_for_the_operator(in_bucket: Bucket, wrong: str) -> None:
    place = replace(in_bucket, **{wrong: "something-else"})
    for error in _every_verb(place.open()):
        assert type(error) is OperatorNeeded
        assert error.hint
        assert "AWS_ACCESS_KEY_ID" in error.hint
        assert place.secret_key not in str(error) + error.hint


def test_no_credentials_are_for_the_operator(in_bucket: Bucket) -> None:
    core = botocore.session.Session()
    core.register_component("credential_provider", CredentialResolver([]))
    for error in _every_verb(in_bucket.open(session=boto3.session.Session(botocore_session=core))):
        assert type(error) is OperatorNeeded
        assert error.hint
        assert "AWS_ACCESS_KEY_ID" in error.hint


def test_a_dead_endpoint_is_given_up_after_a_few_attempts(in_bucket: Bucket) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, and not listening: connections are refused
        place = replace(in_bucket, endpoint_url=f"http://127.0.0.1:{unused.getsockname()[1]}")
        waits: list[float] = []
        store = RetryingStore(place.open(), 4, sleep=waits.append)
        for verb, error in enumerate(_every_verb(store), start=1):
            assert type(error) is TryLater
            assert len(waits) == 3 * verb


def test_a_silent_endpoint_is_given_up_in_time(in_bucket: Bucket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = replace(in_bucket, endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        before = time.monotonic()
        for error in _every_verb(place.open(timeout_seconds=0.2)):
            assert type(error) is TryLater
        assert time.monotonic() - before < 10


def test_a_put_whose_answer_was_lost_is_found_done(in_bucket: Bucket) -> None:
    with _relay(in_bucket) as (proxy, place):
        waits: list[float] = []
        store = RetryingStore(place.open(), sleep=waits.append)
        proxy.break_after(0, "cut")
        assert not store.put(KEY, BytesBody(b"x")).created
        assert len(waits) == 1
    assert read(in_bucket.open(), KEY) == b"x"


def test_a_completion_whose_answer_was_lost_is_found_done(in_bucket: Bucket) -> None:
    body = BytesBody(content(2 * PART))
    with _relay(in_bucket) as (proxy, place):
        session = boto3.session.Session(place.access_key, place.secret_key, region_name="us-east-1")
        session.events.register(
            "before-send.s3.CompleteMultipartUpload", lambda **_: proxy.break_after(0, "cut")
        )
        waits: list[float] = []
        assert not RetryingStore(place.open(session=session), sleep=waits.append).put(KEY, body).created
        assert len(waits) == 1
    assert read(in_bucket.open(), KEY) == body.data


def test_a_connection_cut_while_sending_is_tried_again(in_bucket: Bucket) -> None:
    body = BytesBody(content(3 * PART))
    with _relay(in_bucket) as (proxy, place):
        waits: list[float] = []
        proxy.break_after(2 * PART, "reset", direction="up")
        assert RetryingStore(place.open(), sleep=waits.append).put(KEY, body).created
        assert len(waits) == 1
    assert read(in_bucket.open(), KEY) == body.data
    assert in_bucket.uploads() == []


def test_a_connection_cut_while_reading_is_no_end_of_the_object(in_bucket: Bucket) -> None:
    in_bucket.open().put(KEY, BytesBody(content(3 * PART)))
    with _relay(in_bucket) as (proxy, place):
        proxy.break_after(PART, "cut")
        with pytest.raises(TryLater):
            read(place.open(), KEY)


class _Interrupted(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > PART:
            raise KeyboardInterrupt
        return super().read(size)


def test_an_interrupted_upload_is_aborted(in_bucket: Bucket) -> None:
    data = content(2 * PART)

    @dataclass(frozen=True)
    class Interrupting(Liar):
        def open(self) -> BinaryIO:
            return _Interrupted(self.data)

    with pytest.raises(KeyboardInterrupt):
        in_bucket.open().put(KEY, Interrupting(data, len(data), hashlib.sha256(data).digest()))
    assert in_bucket.uploads() == []


@pytest.mark.parametrize("size", [100, PART + 1])
def test_an_object_says_what_it_is(in_bucket: Bucket, size: int) -> None:
    store = in_bucket.open()
    client = in_bucket.session().client("s3", endpoint_url=in_bucket.endpoint_url)
    for key, content_type in (
        (KEY, "message/rfc822"),
        ("journal/7/000000000001.ndjson", "application/x-ndjson"),
    ):
        body = BytesBody(content(size))
        store.put(key, body)
        head = client.head_object(Bucket=in_bucket.name, Key=f"some/prefix/{key}")
        assert head["ContentType"] == content_type
        assert head["Metadata"] == {"sha256": body.sha256.hex()}
        stored = store.stat(key)
        assert stored is not None
        # Of parts, the server knows only a checksum of their checksums.
        assert stored.sha256 == (body.sha256 if size < PART else None)


def _plant(place: Bucket, data: bytes, claimed: bytes) -> None:
    """Put an object as a stranger can who has the right to write: with metadata, without a checksum."""
    config = Config(request_checksum_calculation="when_required")
    client = place.session().client("s3", endpoint_url=place.endpoint_url, config=config)
    metadata = {"sha256": hashlib.sha256(claimed).hexdigest()}
    client.put_object(Bucket=place.name, Key=f"some/prefix/{KEY}", Body=data, Metadata=metadata)


@pytest.mark.parametrize("size", [0, 100, EXPECT + 1, PART + 1])
def test_metadata_prove_nothing(in_bucket: Bucket, size: int) -> None:
    store, body = in_bucket.open(), BytesBody(content(size))
    _plant(in_bucket, content(size, seed=1) if size else b"x", claimed=body.data)
    stored = store.stat(KEY)
    assert stored is not None
    assert stored.sha256 is None
    with pytest.raises(ObjectDiffers):
        store.put(KEY, body)


@pytest.mark.parametrize("size", [0, 100, PART + 1])
def test_an_object_without_a_checksum_is_read(in_bucket: Bucket, size: int) -> None:
    body = BytesBody(content(size))
    _plant(in_bucket, body.data, claimed=b"something else")
    assert not in_bucket.open().put(KEY, body).created


@pytest.mark.parametrize("size", [100, PART + 1])
def test_a_version_is_reported_where_versions_are_kept(s3: SeaweedFS, in_bucket: Bucket, size: int) -> None:
    place = replace(in_bucket, name=f"{in_bucket.name}-locked")
    s3.create_bucket(place.name, object_lock=True)
    store = place.open()
    body: Body = BytesBody(content(size))
    first = store.put(KEY, body)
    assert first.created
    assert first.version_id
    assert store.put(KEY, body) == PutResult(False, first.version_id)


@contextmanager
def _relay(place: Bucket) -> Iterator[tuple[Proxy, Bucket]]:
    with Proxy(int(place.endpoint_url.rpartition(":")[2])) as proxy:
        yield proxy, replace(place, endpoint_url=f"http://{proxy.host}:{proxy.port}")


# What servers answer, and what that means


class _Answering(http.server.ThreadingHTTPServer):
    """Gives every request the same answer."""

    daemon_threads = True
    answer: tuple[int, dict[str, str], bytes]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Answering

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: Any, **__: Any) -> None:
        """Says nothing."""


@pytest.fixture
def answering() -> Iterator[_Answering]:
    with _Answering(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "expected", "hint"),
    [
        (301, "PermanentRedirect", OperatorNeeded, "AWS_DEFAULT_REGION"),
        (400, "AuthorizationHeaderMalformed", OperatorNeeded, "AWS_DEFAULT_REGION"),
        (400, "ExpiredToken", OperatorNeeded, "AWS_SESSION_TOKEN"),
        (400, "RequestTimeout", TryLater, ""),
        (400, "SomethingElse", OperatorNeeded, ""),
        (403, "AccessDenied", OperatorNeeded, "s3:PutObject"),
        (403, "InvalidAccessKeyId", OperatorNeeded, "AWS_ACCESS_KEY_ID"),
        (403, "RequestTimeTooSkewed", OperatorNeeded, "clock"),
        (403, "SignatureDoesNotMatch", OperatorNeeded, "AWS_ACCESS_KEY_ID"),
        (404, "NoSuchBucket", OperatorNeeded, "ARCHIVER_S3_ENDPOINT_URL"),
        (409, "ConditionalRequestConflict", TryLater, ""),
        (409, "OperationAborted", TryLater, ""),
        (429, "", TryLater, ""),
        (500, "InternalError", TryLater, ""),
        (501, "NotImplemented", OperatorNeeded, "conditional writes"),
        (502, "", TryLater, ""),
        (503, "SlowDown", TryLater, ""),
        (507, "XMinioStorageFull", TryLater, ""),
    ],
)
def test_a_refusal_says_what_happens_next(
    answering: _Answering, status: int, code: str, expected: type[ArchiverError], hint: str
) -> None:
    text = (
        f"<Error><Code>{code}</Code><Message>A sentence\n of theirs.</Message></Error>" if code else "<html>"
    )
    answering.answer = (status, {"Retry-After": "7", "Content-Type": "application/xml"}, text.encode())
    place = Bucket(f"http://127.0.0.1:{answering.server_port}", "mail", "key", "a secret")
    for error in _every_verb(place.open()):
        assert type(error) is expected
        assert hint in (error.hint or "")
        assert re.fullmatch(r"cannot [ -~]+", str(error)), "one line, no secret"
        assert "a secret" not in str(error)
        if isinstance(error, TryLater):
            assert error.wait_seconds == 7


@pytest.mark.parametrize(
    ("status", "code", "text", "hint"),
    [
        (
            403,
            "SecondLevelDomainForbidden",
            "Use virtual hosted style.",
            "ARCHIVER_S3_ADDRESSING_STYLE=virtual",
        ),
        (403, "AccessDenied", "Please use virtual-hosted-style.", "ARCHIVER_S3_ADDRESSING_STYLE=virtual"),
        (400, "InvalidRequest", "Path-style requests are off.", "ARCHIVER_S3_ADDRESSING_STYLE=virtual"),
        (403, "AccessDenied", "not authorized to perform: kms:GenerateDataKey", "kms:GenerateDataKey"),
        (403, "AccessDenied", "with an explicit deny in a resource-based policy", "policies of the bucket"),
        (403, "QuotaExceeded", "", "quota"),
        (407, "", "", "HTTPS_PROXY"),
    ],
)
def test_a_hint_names_what_the_text_means(
    answering: _Answering, status: int, code: str, text: str, hint: str
) -> None:
    page = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>" if code else ""
    answering.answer = (status, {"Content-Type": "application/xml"}, page.encode())
    for error in _every_verb(_of(answering).open()):
        assert type(error) is OperatorNeeded
        assert hint in (error.hint or "")


@pytest.mark.parametrize(("status", "code"), [(413, ""), (413, "EntityTooLarge"), (400, "EntityTooLarge")])
@pytest.mark.parametrize("size", [10, EXPECT + 1])
def test_what_is_too_large_is_refused_by_itself(
    answering: _Answering, status: int, code: str, size: int
) -> None:
    page = f"<Error><Code>{code}</Code></Error>" if code else "<html>nginx</html>"
    answering.answer = (status, {"Content-Type": "application/xml" if code else "text/html"}, page.encode())
    with pytest.raises(MessageRefused) as caught:
        _of(answering).open().put(KEY, BytesBody(content(size)))
    assert "limit" in (caught.value.hint or "")
    with pytest.raises(OperatorNeeded):
        _of(answering).open().stat(KEY)


@pytest.mark.parametrize("status", [301, 302, 400, 401, 403, 404, 405])
def test_a_web_page_is_no_refusal_by_a_store(answering: _Answering, status: int) -> None:
    answering.answer = (status, {"Content-Type": "text/html"}, b"<html>Blocked by the firewall</html>")
    for error in _every_verb(_of(answering).open()):
        assert type(error) is OperatorNeeded
        assert "web page" in (error.hint or "")


def _of(answering: _Answering) -> Bucket:
    return Bucket(f"http://127.0.0.1:{answering.server_port}", "mail", "key", "a secret")


_OF_THE_WHOLE = base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("headers", "is_proof"),
    [
        ({"x-amz-checksum-sha256": _OF_THE_WHOLE}, True),
        ({"x-amz-checksum-sha256": _OF_THE_WHOLE, "x-amz-checksum-type": "FULL_OBJECT"}, True),
        (
            {"x-amz-checksum-sha256": _OF_THE_WHOLE, "x-amz-checksum-type": "FULL_OBJECT", "ETag": '"x-2"'},
            True,
        ),
        ({"x-amz-checksum-sha256": _OF_THE_WHOLE, "x-amz-checksum-type": "COMPOSITE"}, False),
        ({"x-amz-checksum-sha256": f"{_OF_THE_WHOLE}-2"}, False),
        ({"x-amz-checksum-sha256": f"{_OF_THE_WHOLE}-2", "x-amz-checksum-type": "FULL_OBJECT"}, False),
        ({"x-amz-checksum-sha256": _OF_THE_WHOLE, "ETag": '"x-2"'}, False),
        ({"x-amz-checksum-sha256": base64.b64encode(bytes(31)).decode()}, False),
        ({"x-amz-checksum-sha256": "\u00fc"}, False),
        ({"x-amz-meta-sha256": bytes(range(32)).hex()}, False),
        ({"x-amz-checksum-crc64nvme": "AAAAAAAAAAA=", "x-amz-checksum-type": "FULL_OBJECT"}, False),
    ],
)
def test_only_a_checksum_of_the_whole_object_is_believed(
    answering: _Answering, headers: dict[str, str], is_proof: bool
) -> None:
    answering.answer = (200, {"ETag": '"x"', **headers}, b"")
    stored = _of(answering).open().stat(KEY)
    assert stored is not None
    assert stored.sha256 == (bytes(range(32)) if is_proof else None)


@pytest.mark.parametrize("page", [b"", b"<html>Welcome to the hotel's network</html>", b"<html>Welcome"])
def test_a_web_page_is_no_success(answering: _Answering, page: bytes) -> None:
    answering.answer = (200, {"Content-Type": "text/html"}, page)
    store = Bucket(f"http://127.0.0.1:{answering.server_port}", "mail", "key", "a secret").open()
    for attempt in (
        lambda: store.put(KEY, BytesBody(b"x")),
        lambda: store.put(KEY, BytesBody(content(PART + 1))),
        lambda: store.stat(KEY),
        lambda: store.get(KEY).__enter__(),
        store.probe,
    ):
        with pytest.raises((OperatorNeeded, TryLater)):
            attempt()

"""Keys, URLs and repetitions of the store; what stores do is in the contract."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from archiver.errors import ArchiverError, IntegrityError, OperatorNeeded, TryLater, UsageError
from archiver.store import (
    Body,
    InvalidKey,
    ObjectNotFound,
    PutResult,
    Store,
    StoredObject,
    check_prefix,
    is_key,
    open_store,
)
from archiver.store.filesystem import FilesystemStore
from archiver.store.retry import RetryingStore
from archiver.store.spool import BytesBody


@dataclass
class Failing:
    """A store that raises each of ``errors`` once, and passes on what comes after."""

    store: Store
    errors: list[ArchiverError] = field(default_factory=list)
    calls: int = 0
    url: str = "file:/somewhere"

    def _fail(self) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)

    def put(self, key: str, body: Body) -> PutResult:
        self._fail()
        return self.store.put(key, body)

    @contextmanager
    def get(self, key: str) -> Iterator[Iterator[bytes]]:
        self._fail()
        with self.store.get(key) as chunks:
            yield chunks

    def stat(self, key: str) -> StoredObject | None:
        self._fail()
        return self.store.stat(key)

    def list(self, prefix: str, *, after: str = "", strangers: bool = False) -> Iterator[StoredObject]:
        self._fail()
        for position, stored in enumerate(self.store.list(prefix, after=after, strangers=strangers)):
            if position == 3:
                self._fail()
            yield stored

    def names(self, prefix: str, *, after: str = "") -> Iterator[str]:
        self._fail()
        for position, name in enumerate(self.store.names(prefix, after=after)):
            if position == 3:
                self._fail()
            yield name

    def probe(self) -> None:
        self._fail()
        self.store.probe()


@pytest.fixture
def failing(tmp_path: Path) -> Failing:
    store = FilesystemStore(tmp_path)
    for number in range(10):
        store.put(f"a/{number}", BytesBody(b"x"))
    return Failing(store)


VERBS: list[Callable[[Store], object]] = [
    lambda store: store.put("a/new", BytesBody(b"x")),
    lambda store: store.get("a/1").__enter__(),
    lambda store: store.stat("a/1"),
    lambda store: list(store.list("a/")),
    lambda store: list(store.names("a/")),
    lambda store: store.probe(),
]


def most(_: float, high: float) -> float:
    return high


@pytest.mark.parametrize("verb", VERBS)
def test_what_may_work_later_is_repeated_with_growing_waits(
    failing: Failing, verb: Callable[[Store], object]
) -> None:
    failing.errors = [TryLater("busy") for _ in range(3)]
    waits: list[float] = []
    verb(RetryingStore(failing, sleep=waits.append, uniform=most))
    assert waits == [0.2, 0.4, 0.8]


@pytest.mark.parametrize("verb", VERBS)
def test_repeating_has_an_end(failing: Failing, verb: Callable[[Store], object]) -> None:
    failing.errors = [TryLater(f"busy {number}") for number in range(10)]
    waits: list[float] = []
    with pytest.raises(TryLater, match="busy 3"):
        verb(RetryingStore(failing, 4, sleep=waits.append, uniform=most))
    assert (failing.calls, len(waits)) == (4, 3)


@pytest.mark.parametrize(
    "error", [OperatorNeeded("denied"), IntegrityError("damaged"), ObjectNotFound("gone")]
)
@pytest.mark.parametrize("verb", VERBS)
def test_any_other_error_passes_at_once(
    failing: Failing, verb: Callable[[Store], object], error: ArchiverError
) -> None:
    failing.errors = [error]
    waits: list[float] = []
    with pytest.raises(type(error)) as caught:
        verb(RetryingStore(failing, sleep=waits.append))
    assert caught.value is error
    assert waits == []


def test_waits_are_drawn_from_nothing_to_a_bounded_most(failing: Failing) -> None:
    failing.errors = [TryLater("busy") for _ in range(7)]
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return low

    RetryingStore(failing, 8, base_seconds=1, most_seconds=5, sleep=lambda _: None, uniform=uniform).probe()
    assert drawn == [(0, 1), (0, 2), (0, 4), (0, 5), (0, 5), (0, 5), (0, 5)]


def test_a_wait_that_was_asked_for_is_kept(failing: Failing) -> None:
    failing.errors = [TryLater("slow down", wait_seconds=7)]
    waits: list[float] = []
    RetryingStore(failing, sleep=waits.append, uniform=most).probe()
    assert waits == [7.2]


def test_a_wait_beyond_the_time_left_is_left_to_the_caller(failing: Failing) -> None:
    failing.errors = [TryLater("slow down", wait_seconds=61)]
    waits: list[float] = []
    with pytest.raises(TryLater) as caught:
        RetryingStore(failing, total_seconds=60, sleep=waits.append).probe()
    assert caught.value.wait_seconds == 61
    assert (failing.calls, waits) == (1, [])


def test_time_that_the_calls_took_counts(failing: Failing) -> None:
    failing.errors = [TryLater("timeout") for _ in range(3)]
    clock = iter(range(0, 1000, 40))
    with pytest.raises(TryLater):
        RetryingStore(failing, total_seconds=60, sleep=lambda _: None, monotonic=lambda: next(clock)).probe()
    assert failing.calls == 2


def test_a_listing_that_breaks_goes_on_where_it_was(failing: Failing) -> None:
    store = RetryingStore(failing, sleep=lambda _: None)
    listing = store.list("a/")
    failing.errors = []
    expected = [f"a/{number}" for number in range(10)]
    assert [stored.key for stored in listing] == expected
    # The first call is the opening, the second is in the midst.
    failing.calls = 0
    failing.errors = [TryLater("busy"), TryLater("busy")]
    assert [stored.key for stored in store.list("a/")] == expected


def test_an_object_that_breaks_off_is_not_begun_again(failing: Failing) -> None:
    broken = TryLater("connection reset")

    @dataclass
    class Breaking(Failing):
        @contextmanager
        def get(self, key: str) -> Iterator[Iterator[bytes]]:
            self.calls += 1

            def chunks() -> Iterator[bytes]:
                yield b"x"
                raise broken

            yield chunks()

    store = Breaking(failing.store)
    with RetryingStore(store, sleep=lambda _: None).get("a/1") as chunks:
        assert next(chunks) == b"x"
        with pytest.raises(TryLater) as caught:
            next(chunks)
    assert caught.value is broken
    assert store.calls == 1


@pytest.mark.parametrize(
    "key", ["a", "messages/7/ab/x.eml", "journal/7/000000000001.ndjson", "a=b,c@d+e_f-(g)"]
)
def test_keys(key: str) -> None:
    assert is_key(key)
    assert check_prefix(key) == key
    assert check_prefix(key + "/") == key + "/"


@pytest.mark.parametrize("prefix", ["/", "a//", "../", "a/..", "ü", "/a"])
def test_prefixes_that_lead_nowhere(prefix: str) -> None:
    with pytest.raises(InvalidKey):
        check_prefix(prefix)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:/var/archive", "/var/archive"),
        ("file:///var/archive", "/var/archive"),
        ("file:archive", str(Path.cwd() / "archive")),
        ("file:./a b/%20", str(Path.cwd() / "a b/%20")),
    ],
)
def test_a_directory_s_url(url: str, path: str) -> None:
    assert open_store(url).url == f"file:{path}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://mail", "s3://mail"),
        ("s3://mail/", "s3://mail"),
        ("s3://mail/some/prefix", "s3://mail/some/prefix"),
        ("s3://mail/some/prefix/", "s3://mail/some/prefix"),
    ],
)
def test_a_bucket_s_url(url: str, shown: str) -> None:
    store = open_store(url, s3_endpoint_url="http://127.0.0.1:9", s3_region="us-east-1", max_connections=3)
    assert store.url == shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "archive",
        "/var/archive",
        "file:",
        "file://host/path",
        "file://",
        "http://host/bucket",
        "s3:bucket",
        "s3://",
        "s3:///prefix",
        "s3://b",
        "s3://mail?x=y/prefix",
        "s3://mail//prefix",
        "s3://mail/a/../b",
        "s3://user:sesame@mail/prefix",
    ],
)
def test_any_other_url_is_wrong_use(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["host:9000", "ftp://host", "https://", "https://user:sesame@host"])
def test_a_wrong_endpoint_is_wrong_use(endpoint: str) -> None:
    with pytest.raises(UsageError, match="ARCHIVER_S3_ENDPOINT_URL") as caught:
        open_store("s3://mail", s3_endpoint_url=endpoint)
    assert "sesame" not in str(caught.value)


def test_boto3_is_loaded_only_for_a_bucket() -> None:
    code = "import sys, archiver.store as s; s.open_store('file:x'); sys.exit('botocore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

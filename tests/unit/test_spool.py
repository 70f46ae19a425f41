"""The spool: a budget of memory that holds, and messages that read back as they were written."""

import errno
import hashlib
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archiver.errors import MessageRefused, OperatorNeeded, TryLater
from archiver.store.disk import failure
from archiver.store.spool import BytesBody, Spool, SpooledMessage

KIB = 1024


def filled(spool: Spool, data: bytes, size_hint: int | None = None) -> SpooledMessage:
    message = spool.create(size_hint)
    message.write(data)
    message.seal()
    return message


def descriptors() -> int:
    """How many files this process has open, where the system tells."""
    return sum(1 for directory in ("/proc/self/fd", "/dev/fd") for _ in Path(directory).glob("*"))


def read(message: SpooledMessage) -> bytes:
    with message.open() as reader:
        return reader.read()


def test_a_small_message_stays_in_memory(tmp_path: Path) -> None:
    with filled(Spool(tmp_path, 100 * KIB, 50 * KIB), b"x" * 40 * KIB) as message:
        assert message.in_memory
        assert (message.size, message.sha256) == (40 * KIB, hashlib.sha256(b"x" * 40 * KIB).digest())
        assert read(message) == b"x" * 40 * KIB


def test_a_message_over_its_own_limit_moves_to_a_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000 * KIB, 50 * KIB)
    with spool.create() as message:
        message.write(b"x" * 50 * KIB)
        assert spool.memory_in_use >= 50 * KIB
        message.write(b"y")
        assert spool.memory_in_use == 0
        assert not message.in_memory
        message.seal()
        assert read(message) == b"x" * 50 * KIB + b"y"


def test_a_message_moves_to_a_file_when_others_hold_the_memory(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 64 * KIB, 64 * KIB)
    with filled(spool, b"x" * 60 * KIB) as first:
        with filled(spool, b"y" * 60 * KIB) as second:
            assert (first.in_memory, second.in_memory) == (True, False)
        first.close()
        with filled(spool, b"z" * 60 * KIB) as third:
            assert third.in_memory


@pytest.mark.parametrize("hint", [-1, 0, 10, 100 * KIB, 2**70])
def test_a_size_that_a_server_invents_changes_nothing_but_the_place(tmp_path: Path, hint: int) -> None:
    spool = Spool(tmp_path, 100 * KIB, 50 * KIB)
    with filled(spool, b"x" * 1000, hint) as message:
        assert message.in_memory == (hint <= 50 * KIB)
        assert read(message) == b"x" * 1000
    assert spool.memory_in_use == 0


def test_a_file_has_no_name(tmp_path: Path) -> None:
    with filled(Spool(tmp_path, 0, 0), b"x" * 1000) as message:
        assert not message.in_memory
        assert list(tmp_path.iterdir()) == []


def test_closing_gives_memory_and_descriptors_back_and_may_be_repeated(tmp_path: Path) -> None:
    before = descriptors()
    spool = Spool(tmp_path, 64 * KIB, 64 * KIB)
    messages = [filled(spool, b"x" * 40 * KIB) for _ in range(5)]
    assert spool.memory_in_use >= 40 * KIB
    for message in messages:
        message.close()
        message.close()
    assert spool.memory_in_use == 0
    assert descriptors() == before


@pytest.mark.parametrize("memory", [0, 1000 * KIB], ids=["file", "memory"])
def test_readers_are_independent_and_survive_the_message(tmp_path: Path, memory: int) -> None:
    data = os.urandom(300 * KIB)
    spool = Spool(tmp_path, memory, memory)
    with filled(spool, data) as message, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: read(message), range(32))) == [data] * 32
        first, second = message.open(), message.open()
    with first, second, filled(Spool(tmp_path, 0, 0), b"another file"):
        assert first.read(5) == data[:5]
        assert first.seek(-5, os.SEEK_END) == len(data) - 5
        assert first.read() == data[-5:]
        assert (first.read(), first.tell()) == (b"", len(data))
        assert second.read() == data


def test_what_is_not_sealed_cannot_be_read_and_what_is_cannot_be_written(tmp_path: Path) -> None:
    with Spool(tmp_path, 64 * KIB, 64 * KIB).create() as message:
        message.write(b"x")
        with pytest.raises(ValueError, match="not sealed"):
            message.open()
        with pytest.raises(ValueError, match="not sealed"):
            _ = message.sha256
        message.seal()
        with pytest.raises(ValueError, match="sealed"):
            message.write(b"x")
        with pytest.raises(ValueError, match="sealed"):
            message.seal()
    with pytest.raises(ValueError, match="closed"):
        message.open()


def test_a_chunk_may_be_reused_at_once(tmp_path: Path) -> None:
    for memory in (0, 64 * KIB):
        buffer = bytearray(b"first ")
        with Spool(tmp_path, memory, memory).create() as message:
            message.write(memoryview(buffer))
            buffer[:] = b"second"
            message.write(buffer)
            message.seal()
            assert read(message) == b"first second"


@settings(max_examples=100, deadline=None)
@given(
    budget=st.integers(0, 200 * KIB),
    share=st.integers(0, 100 * KIB),
    messages=st.lists(
        st.tuples(
            st.none() | st.integers(-1, 2**40),
            st.lists(st.integers(0, 40 * KIB), max_size=5),
        ),
        max_size=6,
    ),
)
def test_whatever_is_written_reads_back_within_the_budget(
    budget: int, share: int, messages: list[tuple[int | None, list[int]]]
) -> None:
    spool = Spool(None, budget, share)
    with ExitStack() as stack:
        for number, (hint, sizes) in enumerate(messages):
            message = stack.enter_context(spool.create(hint))
            expected = b""
            for size in sizes:
                chunk = bytes([number]) * size
                message.write(chunk)
                expected += chunk
                assert spool.memory_in_use <= budget
            message.seal()
            assert read(message) == expected
            assert message.size == len(expected)
            assert message.sha256 == hashlib.sha256(expected).digest()
    assert spool.memory_in_use == 0


def test_the_budget_holds_for_many_threads(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 256 * KIB, 64 * KIB)

    def one(number: int) -> bool:
        data = bytes([number]) * 60 * KIB
        with spool.create() as message:
            for start in range(0, len(data), 1000):
                message.write(data[start : start + 1000])
                if spool.memory_in_use > 256 * KIB:
                    return False
            message.seal()
            return read(message) == data

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(one, range(200)))
    assert spool.memory_in_use == 0


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond ``size`` fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "size", [100_000, 1_000_000], ids=["found out when sealed", "found out while writing"]
)
def test_a_message_too_large_for_a_file_is_refused_when_it_has_arrived(tmp_path: Path, size: int) -> None:
    spool = Spool(tmp_path, 0, 0)
    with largest_file(50_000), spool.create() as message:
        for _ in range(3):
            message.write(b"x" * size)
        with pytest.raises(MessageRefused, match=str(tmp_path)) as caught:
            message.seal()
        assert "ulimit" in (caught.value.hint or "")
        with spool.create() as small:
            small.write(b"x")
            small.seal()
            assert small.size == 1


def test_a_message_too_large_to_move_to_a_file_gives_the_memory_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 500 * KIB, 200 * KIB)
    message = spool.create()
    message.write(b"x" * 200 * KIB)
    with largest_file(50_000):
        message.write(b"x")
        assert spool.memory_in_use == 0
        with pytest.raises(MessageRefused):
            message.seal()
    message.close()


def test_a_missing_directory_is_for_the_operator(tmp_path: Path) -> None:
    with pytest.raises(OperatorNeeded, match="missing") as caught:
        Spool(tmp_path / "missing", 0, 0).create(1000)
    assert caught.value.hint


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO])
def test_what_the_system_lacks_for_now_is_worth_another_try(number: int) -> None:
    error = failure(OSError(number, os.strerror(number)), "write /archive")
    assert type(error) is TryLater
    assert str(error) == f"cannot write /archive: {os.strerror(number)}"
    assert error.hint


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR])
def test_what_the_system_forbids_is_for_the_operator(number: int) -> None:
    error = failure(OSError(number, os.strerror(number)), "write /archive")
    assert type(error) is OperatorNeeded
    assert error.hint


def test_octets_in_memory_are_a_body_too() -> None:
    body = BytesBody(b"a segment")
    assert (body.size, body.sha256) == (9, hashlib.sha256(b"a segment").digest())
    for _ in range(2):
        with body.open() as reader:
            assert reader.read() == b"a segment"
    assert "segment" not in repr(body)

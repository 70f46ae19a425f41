"""Log lines: a JSON object a line, and never in the way of the work."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from archiver import observe

_SCRIPT = """
import logging
from archiver.observe import get_logger, log_json
log_json("info")
log = get_logger()
log.debug("not.told")
log.info("poll.ended", new=2, at_path={"a": object})
try:
    raise OSError("no room")
except OSError:
    log.exception("poll.crashed")
logging.getLogger("library").warning("half %d", 1)
logging.getLogger("library").info("not told")
print("went on")
"""


def _run(stderr: Path) -> str:
    with stderr.open("w") as file:
        return subprocess.run(
            [sys.executable, "-c", _SCRIPT], stdout=subprocess.PIPE, stderr=file, text=True, check=True
        ).stdout


def test_each_line_is_an_object_with_its_level(tmp_path: Path) -> None:
    assert _run(tmp_path / "log") == "went on\n"
    ended, broke, library = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (ended["event"], ended["level"], ended["new"]) == ("poll.ended", "info", 2)
    assert ended["at"].endswith("Z")
    assert (broke["event"], broke["level"]) == ("poll.crashed", "error")
    assert "OSError: no room" in broke["exception"]
    assert (library["event"], library["level"], library["logger"]) == ("half 1", "warning", "library")


def test_a_log_that_has_no_room_is_in_nobodys_way() -> None:
    """Linux has a file that is always full: full(4)."""
    assert _run(Path("/dev/full")) == "went on\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe that holds one page."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    yield read, write
    os.close(write)
    os.close(read)


def ignored(_: int) -> None:
    """For tests that look at the lines alone."""


def dropped() -> float:
    (family,) = observe.LOG_LINES_DROPPED.collect()
    return next(sample.value for sample in family.samples if sample.name.endswith("_total"))


def test_a_pipe_without_a_reader_holds_up_nothing_and_what_is_lost_is_counted(pipe: tuple[int, int]) -> None:
    before = dropped()
    gaps: list[int] = []
    lines = observe.Lines(pipe[1], gaps.append, lines=50, characters=10**6)
    for number in range(1000):
        lines.write(f"{number:0500}\n")
    lost = dropped() - before
    assert 1000 - 50 - 10 <= lost < 1000
    assert not lines.drain(still_seconds=0.05)
    assert gaps == []
    # The reader comes back: the oldest lines are there, whole, and the gap is reported once.
    with os.fdopen(os.dup(pipe[0])) as reader:
        kept = 1000 - int(lost)
        assert [int(reader.readline()) for _ in range(kept)] == list(range(kept))
        assert lines.drain()
    assert gaps == [lost]


def test_long_lines_are_bounded_by_their_sum(pipe: tuple[int, int]) -> None:
    before = dropped()
    lines = observe.Lines(pipe[1], ignored, characters=100_000)
    for _ in range(20):
        lines.write("x" * 9_999 + "\n")
    assert dropped() - before == 10
    with os.fdopen(os.dup(pipe[0])) as reader:
        while not lines.drain(still_seconds=0.05):
            reader.read(4096)


def test_a_pipe_that_does_not_block_loses_nothing(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    lines = observe.Lines(pipe[1], ignored)
    for number in range(200):
        lines.write(f"{number:099}\n")
    with os.fdopen(os.dup(pipe[0])) as reader:
        assert [int(reader.readline()) for _ in range(200)] == list(range(200))


_MANY = """
import sys
from archiver.observe import get_logger, log_json
log_json("info")
for number in range(5000):
    get_logger().info("poll.ended", number=number)
print("\\udc80 bytes of a stranger", file=sys.stderr)
raise SystemExit("the last word")
"""


def test_an_orderly_exit_loses_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", _MANY], capture_output=True, text=True, check=False)
    *lines, stranger, last = ended.stderr.splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(5000))
    assert (stranger, last) == ("\\udc80 bytes of a stranger", "the last word")


def test_an_exit_does_not_wait_for_a_pipe_without_a_reader(pipe: tuple[int, int]) -> None:
    ended = subprocess.run([sys.executable, "-c", _MANY], stderr=pipe[1], timeout=30, check=False)
    assert ended.returncode == 1


def test_a_reader_that_went_away_is_in_nobodys_way() -> None:
    read, write = os.pipe()
    os.close(read)
    before = dropped()
    lines = observe.Lines(write, ignored)
    lines.write("to nobody\n")
    assert lines.drain()
    assert dropped() - before == 1
    os.close(write)

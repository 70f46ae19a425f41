"""Log lines: a JSON object a line, and never in the way of the work."""

import json
import subprocess
import sys
from pathlib import Path

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

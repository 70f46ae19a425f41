"""Where a run writes, so that nobody's figures are of what the disk remembers; and a disk with a journal.

ext4 without a journal gives no new file the inode of one that was removed just
now, and looks at every one of these, for each new file, until the removal has
been on the disk for a minute (``recently_deleted`` in fs/ext4/ialloc.c of
Linux 6). To remove what one contender wrote would cost the next one more than
its own work. So all of it stays until the run ends, and the next run waits.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.machine import BenchError, file_system

WITHOUT_A_JOURNAL = "ext4 without a journal"
_REMEMBERED_SECONDS = 60.0
_SUPERUSERS_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


@contextmanager
def scratch(place: Path, *, patient: bool) -> Iterator[Path]:
    """A directory for what a run writes, removed at its end, with what one left that was broken off.

    ``patient`` is to wait until the disk has forgotten what the last run removed.
    """
    directory, removed = place / "scratch", place / "removed"
    if patient and removed.exists() and file_system(place) == WITHOUT_A_JOURNAL:
        time.sleep(max(0.0, removed.stat().st_mtime + _REMEMBERED_SECONDS - time.time()))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield directory
    finally:
        _unmount_below(directory)
        shutil.rmtree(directory, ignore_errors=True)
        os.sync()
        removed.touch()


def with_journal(directory: Path, octets: int) -> Path:
    """An ext4 with a journal and room for so much, in a file in ``directory``, mounted until the run ends.

    Raises BenchError where there can be none: it takes root, and a loop device.
    """
    image, mounted = directory / "journaled.img", directory / "journaled"
    mounted.mkdir()
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, octets)
    _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
    _run("mount", "-o", "loop", str(image), str(mounted))
    return mounted


def _run(*command: str) -> None:
    program = shutil.which(command[0], path=_SUPERUSERS_PATH)
    if program is None:
        raise BenchError(f"there is no {command[0]}")
    ended = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise BenchError(f"{command[0]}: {ended.stderr.strip()}")


def _unmount_below(directory: Path) -> None:
    below = f"{directory.resolve()}/"
    for line in Path("/proc/mounts").read_text().splitlines():
        if (mounted := line.split()[1]).startswith(below):
            _run("umount", mounted)

"""A small disk that tests fill up: a tmpfs in a mount namespace of its own.

Owns the process that keeps the namespace, with which the disk goes. Programs
see the disk that run ``under`` it; the tests themselves reach its files at
``seen``. Wants root's right to mount.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_FILLER = "filler"
_CHUNK_OCTETS = 4096


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A disk at ``path`` for whoever runs ``under`` it."""

    path: Path
    seen: Path
    under: tuple[str, ...]

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Leave no more room than that."""
        filler = self.seen / _FILLER
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(_CHUNK_OCTETS)):
                pass
        if leave_bytes:
            with filler.open("r+b") as file:
                file.truncate(max(0, filler.stat().st_size - leave_bytes))

    def make_room(self) -> None:
        (self.seen / _FILLER).unlink()


def why_not() -> str | None:
    """Why there is none here, or None when there is."""
    try:
        tried = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return "no unshare(1): Linux alone has mount namespaces"
    return None if tried.returncode == 0 else "mounting a small disk wants root's right to do so"


@contextmanager
def small_disk(path: Path, octets: int) -> Iterator[SmallDisk]:
    """A disk of so many octets, mounted at ``path``."""
    path.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size={octets} tmpfs '{path}' && echo mounted && exec cat"
    keeper = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with keeper:
        if keeper.stdout is None or keeper.stdout.readline() != b"mounted\n":
            raise RuntimeError("the small disk could not be mounted")
        yield SmallDisk(
            path,
            Path(f"/proc/{keeper.pid}/root{path}"),
            ("nsenter", f"--mount=/proc/{keeper.pid}/ns/mnt", "--wdns=/", "--"),
        )
        keeper.kill()

"""Real ``archiver`` processes, in an environment made from nothing.

Owns the processes it starts: whatever still runs when the ``Cli`` is closed is
killed. Nothing of the environment of the tests reaches them, so that what a
process knows is what its test gave it.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

COMMAND_SECONDS = 120.0
_LOOK_SECONDS = 0.01
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def wait_for(
    look: Callable[[], T], what: str, *, seconds: float = 30.0, every_seconds: float = _LOOK_SECONDS
) -> T:
    """What ``look`` gives as soon as it is true. Raises TimeoutError, naming ``what``, after so long."""
    ends_at = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > ends_at:
            raise TimeoutError(f"after {seconds:g} s still not: {what}")
        time.sleep(every_seconds)
    return found


@dataclass(frozen=True, slots=True)
class Ended:
    """What a command left behind."""

    code: int
    out: bytes
    err: str

    @property
    def json(self) -> list[dict[str, Any]]:
        """The objects on standard output, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]


class Running:
    """A process that was started. ``started_at`` is of the monotonic clock."""

    def __init__(self, process: "subprocess.Popen[bytes]", out: Path, err: Path) -> None:
        self.started_at = time.monotonic()
        self._process = process
        self._out = out
        self._err = err

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def log(self, event: str = "") -> list[dict[str, Any]]:
        """The lines of its log so far, or those of one ``event``. Raises ValueError for what is not JSON."""
        # A line that is being written has no end yet.
        whole, _, _ = self._err.read_bytes().rpartition(b"\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line for line in lines if not event or line["event"] == event]

    def peak_resident_bytes(self) -> int | None:
        """The most memory that it ever had resident, so far (proc(5), VmHWM); None once it has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        found = _PEAK.search(status)
        return int(found[1]) * 1024 if found else None

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self._process.kill()
        self._process.wait()

    def wait(self, seconds: float = COMMAND_SECONDS) -> Ended:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        code = self._process.wait(seconds)
        return Ended(code, self._out.read_bytes(), self._err.read_text(errors="replace"))


class Cli:
    """The command ``archiver``, run in ``directory``, with nothing in the environment but what is given.

    ``under`` is a program, with its own arguments, that runs each of them which is under no other.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str], under: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self._under = under
        self.environment = {"PATH": os.defpath, "HOME": str(directory), "LC_ALL": "C.UTF-8", **environment}
        self._output = directory / "output"
        self._output.mkdir(parents=True)
        self._running: list[Running] = []

    def start(
        self,
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        given: bytes = b"",
        under: tuple[str, ...] = (),
    ) -> Running:
        """Start a command: ``environment`` comes on top, ``given`` is its standard input.

        ``under`` is a program, with its own arguments, that runs it.
        """
        name = f"{len(self._running):04}-{arguments[0]}"
        out, err, stdin = (self._output / f"{name}.{kind}" for kind in ("out", "err", "in"))
        stdin.write_bytes(given)
        with stdin.open("rb") as reader, out.open("wb") as result, err.open("wb") as said:
            process = subprocess.Popen(
                [*(under or self._under), sys.executable, "-m", "archiver", *arguments],
                stdin=reader,
                stdout=result,
                stderr=said,
                cwd=self.directory,
                env=self.environment | dict(environment or {}),
            )
        running = Running(process, out, err)
        self._running.append(running)
        return running

    def run(
        self,
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        given: bytes = b"",
        under: tuple[str, ...] = (),
        seconds: float = COMMAND_SECONDS,
    ) -> Ended:
        """Run a command to its end, whatever that is."""
        return self.start(*arguments, environment=environment, given=given, under=under).wait(seconds)

    def do(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, given: bytes = b""
    ) -> Ended:
        """Run a command to its good end, and with nothing to complain of."""
        ended = self.run(*arguments, environment=environment, given=given)
        assert (ended.code, ended.err) == (0, ""), f"{arguments}: {ended}"
        return ended

    def output(self) -> dict[str, bytes]:
        """All that its processes ever said: the content of each stream by its name."""
        return {path.name: path.read_bytes() for path in self._output.iterdir() if path.suffix != ".in"}

    def close(self) -> None:
        for running in self._running:
            if not running.has_ended:
                running.kill()


@contextmanager
def cli(directory: Path, environment: Mapping[str, str], under: tuple[str, ...] = ()) -> Iterator[Cli]:
    """A ``Cli`` whose processes are gone at the end."""
    made = Cli(directory, environment, under)
    try:
        yield made
    finally:
        made.close()

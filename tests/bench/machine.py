"""What work costs on this machine: seconds, CPU of the client and of everything, peak memory.

Owns how a child process is run and measured. Programs of others are measured
from their start to their end, with every process that they start. Clients in
Python (``clients.py``, ``ours.py``) get ready first, are told to go, and tell
their own costs, so that an interpreter's start is not taken for a protocol's
speed; ``start_seconds`` keeps it apart.
"""

import contextlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_TICKS = os.sysconf("SC_CLK_TCK")
_LOOK_SECONDS = 0.02
_SAID_CHARACTERS = 2000
CHILD_SECONDS = 240.0
"""What takes longer hangs."""


class BenchError(Exception):
    """A measurement that would not be true: somebody failed, or did not do the whole work."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one piece of work. ``peak_bytes`` is of the client, all its processes at once."""

    seconds: float
    client_cpu_seconds: float
    machine_cpu_seconds: float
    peak_bytes: int
    start_seconds: float = 0.0
    """Of the client's process, before it went to work; not in ``seconds``."""
    told: dict[str, Any] = field(default_factory=dict)
    """What the client says that it did."""


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None, given: bytes = b"") -> Cost:
    """A program from its start to its good end. Raises BenchError."""
    with tempfile.TemporaryFile() as said:
        machine, began = machine_cpu_seconds(), time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if given else subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=None if environment is None else os.environ | dict(environment),
        )
        with _watched(process) as peak:
            try:
                process.communicate(given or None, timeout=CHILD_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode != 0:
            said.seek(0)
            words = said.read().decode(errors="replace")[-_SAID_CHARACTERS:]
            raise BenchError(f"{command[0]} ended with code {process.returncode}: {words}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, cpu, machine_cpu_seconds() - machine, max(peak))


class Child:
    """A client in Python that is ready, and waits to be told to ``go``. A context manager."""

    def __init__(
        self,
        module: str,
        work: str,
        *,
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
        **arguments: object,
    ) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [python, "-m", module, work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=os.environ | dict(environment or {}),
        )
        self._limit = threading.Timer(CHILD_SECONDS, self._process.kill)
        self._limit.start()
        self._name = f"{module} {work}"
        self._tell(arguments)
        try:
            self._hear()
        except BaseException:
            self.close()
            raise
        self._start_seconds = time.perf_counter() - began

    def go(self) -> None:
        """Let it work."""
        self._machine = machine_cpu_seconds()
        self._tell("go")

    def cost(self) -> Cost:
        """Wait for its good end. Raises BenchError."""
        told = self._hear()
        return Cost(
            seconds=told.pop("seconds"),
            client_cpu_seconds=told.pop("cpu_seconds"),
            machine_cpu_seconds=machine_cpu_seconds() - self._machine,
            peak_bytes=told.pop("peak_bytes"),
            start_seconds=self._start_seconds,
            told=told,
        )

    def close(self) -> None:
        self._limit.cancel()
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, what: object) -> None:
        if self._process.stdin is None:
            raise RuntimeError("a pipe was asked for")
        with contextlib.suppress(BrokenPipeError):  # its end is told by what it does not answer
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        if self._process.stdout is None:
            raise RuntimeError("a pipe was asked for")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            words = self._said.read().decode(errors="replace")[-_SAID_CHARACTERS:]
            raise BenchError(f"{self._name} ended with code {self._process.returncode}: {words}")
        heard: dict[str, Any] = json.loads(line)
        return heard


def measured(module: str, work: str, **arguments: Any) -> Cost:
    """One client's work from go to its end. Raises BenchError."""
    with Child(module, work, **arguments) as child:
        child.go()
        return child.cost()


Work = Callable[[], dict[str, Any]]


def serve(works: Mapping[str, Callable[..., contextlib.AbstractContextManager[Work]]]) -> None:
    """The child's side: get ready what the command line names, wait for go, work, tell the costs."""
    arguments = json.loads(sys.stdin.readline())
    with works[sys.argv[1]](**arguments) as work:
        print(json.dumps({}), flush=True)  # noqa: T201
        sys.stdin.readline()
        cpu, began = _own_cpu_seconds(), time.perf_counter()
        told = work()
        seconds = time.perf_counter() - began
        costs = {
            "seconds": seconds,
            "cpu_seconds": _own_cpu_seconds() - cpu,
            "peak_bytes": peak_bytes_of(os.getpid()),
        }
        print(json.dumps(costs | told), flush=True)  # noqa: T201


def machine_cpu_seconds() -> float:
    """What all processors of this machine have worked so far (proc(5): not idle, not waiting for a disk)."""
    with Path("/proc/stat").open() as stat:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, stat.readline().split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS


def cpu_seconds_of(pid: int) -> float:
    """What a process, its descendants and those of them that it has waited for have used so far.

    What lives is asked by its clock, in nanoseconds; what has ended stands in
    ``/proc/PID/stat`` (proc(5), cutime and cstime), in steps of 10 ms.
    """
    total = 0.0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            # Linux's number of a process's clock: what clock_getcpuclockid(3) makes of its id.
            total += time.clock_gettime(~each << 3 | 2) + sum(map(int, fields[13:15])) / _TICKS
    return total


def described(place: Path) -> dict[str, str]:
    """This machine in words, for whoever compares figures; its disk is where ``place`` is."""
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    return {
        "processors": f"{os.cpu_count()} x {names[0] if names else platform.machine()}",
        "memory": f"{int(memory[1]) / 1024**2:.0f} GiB" if memory else "unknown",
        "system": f"{system}, Linux {platform.release()}",
        "disk": file_system(place),
        "python": platform.python_version(),
    }


def file_system(place: Path) -> str:
    """What an fsync goes to. One without a journal has another price for it, and for a new file."""
    place = place.resolve()
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    device, _, kind = max(
        (mount for mount in mounts if place.is_relative_to(mount[1])), key=lambda mount: len(mount[1])
    )
    if kind != "ext4":
        return kind
    journals = Path("/proc/fs/jbd2").glob(f"{Path(device).resolve().name}-*")
    return kind if any(journals) else f"{kind} without a journal"


def version_of(*command: str) -> str | None:
    """The first number with dots that a program says of itself; None where it cannot be started."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CHILD_SECONDS)
    except OSError:
        return None
    found = re.search(r"\d+(?:\.\d+)+", said.stdout + said.stderr)
    return found[0] if found else None


def _own_cpu_seconds() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


@contextlib.contextmanager
def _watched(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Peaks seen so far. ``ru_maxrss`` would not do: a child begins with its parent's (getrusage(2))."""
    peaks, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_SECONDS):
            peaks[0] = max(peaks[0], sum(map(peak_bytes_of, tree(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()


def tree(pid: int) -> list[int]:
    """A process and its descendants, itself first."""
    found, ahead = [], [pid]
    while ahead:
        found.append(each := ahead.pop())
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                ahead += map(int, (task / "children").read_text().split())
    return found


def peak_bytes_of(pid: int) -> int:
    """The most memory that a process had resident so far (proc(5), VmHWM); 0 once it has ended."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        if found:
            return int(found[1]) * 1024
    return 0

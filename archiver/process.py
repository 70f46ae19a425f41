"""This process's name, whether another process of this machine is alive, and unused memory.

A lease names its owner. If that process ran on this machine and was killed, its
accounts need not wait until the lease expires.
"""

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def name_owner() -> str:
    """A name for this process that is never used again: machine, process id, and when it started."""
    return "/".join([socket.gethostname(), _namespace(), str(os.getpid()), _started(os.getpid()) or "-"])


def is_dead(owner: str) -> bool:
    """Whether the named process has ended, as far as this machine knows.

    A wrong answer would not harm the archive, since the token decides; it would
    only end another worker's poll. Without /proc the answer is False, and the
    lease decides.
    """
    host, namespace, pid, started = (owner.split("/") + [""] * 4)[:4]
    if host != socket.gethostname() or namespace in ("", "-") or namespace != _namespace():
        return False
    return pid.isdecimal() and started.isdecimal() and _started(int(pid)) != started


@contextmanager
def private_files(*, group_reads: bool) -> Iterator[None]:
    """What this process makes meanwhile is for its user alone, or also for its group to read.

    SQLite and temporary files have no other way to get such a mode from the start.
    """
    former = os.umask(0o027 if group_reads else 0o077)
    try:
        yield
    finally:
        os.umask(former)


def give_back_memory() -> bool:
    """Return unused memory from the C library to the kernel. True if there was any.

    Otherwise glibc keeps free pages that lie between long-lived objects, more of
    them each hour: https://man7.org/linux/man-pages/man3/malloc_trim.3.html.
    Other C libraries have no such call, and nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


def _namespace() -> str:
    # Two containers may have the same name and process ids. So may two machines
    # made from one image. Only the boot id distinguishes those: the first
    # namespace has the same number on every Linux.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}-{str(Path('/proc/self/ns/pid').readlink()).strip('pid:[]')}"
    except OSError:
        return "-"


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot (proc(5), field 22); None if it does not exist."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return None
    # The second field is a name in parentheses, which may contain anything.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]

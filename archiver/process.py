"""Who this process is, whether another of this machine still lives, and what memory it keeps.

A lease names its owner. When a process of this very machine was killed, its
accounts need not wait for the lease to run out.
"""

import ctypes
import os
import socket
from pathlib import Path


def name_owner() -> str:
    """A name for this process that no other one has or will have: machine, process and its start."""
    return "/".join([socket.gethostname(), _namespace(), str(os.getpid()), _started(os.getpid()) or "-"])


def is_dead(owner: str) -> bool:
    """Whether the named process is known to have ended: true only where this machine can tell.

    A wrong answer would do no harm to the archive (the token decides), only to
    another's poll. Without /proc nothing is known, and the lease decides.
    """
    host, namespace, pid, started = (owner.split("/") + [""] * 4)[:4]
    if host != socket.gethostname() or namespace in ("", "-") or namespace != _namespace():
        return False
    return pid.isdecimal() and started.isdecimal() and _started(int(pid)) != started


def give_back_memory() -> bool:
    """Have the C library give the kernel what it holds free; true if there was any.

    Between pieces that live long glibc keeps free pages for ever, more of them
    each hour: https://man7.org/linux/man-pages/man3/malloc_trim.3.html. Other C
    libraries have no such call, and nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


def _namespace() -> str:
    # Two containers may share a name and count their processes apart. So may
    # two machines made from one image: only the boot tells those apart, as the
    # first namespace has the same number on every Linux.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}-{str(Path('/proc/self/ns/pid').readlink()).strip('pid:[]')}"
    except OSError:
        return "-"


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot (proc(5), field 22); None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return None
    # The second field is a name in parentheses that may hold anything.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]

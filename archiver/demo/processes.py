"""Private servers as child processes: their user, their ports, and how they end.

Owns the process from its start until its whole group has ended. Servers such as
Dovecot and PostgreSQL refuse to run as root. If root starts them, they run as
the user ``nobody``, who must own their files and be able to reach them.
"""

import contextlib
import os
import pwd
import secrets
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from archiver.errors import OperatorNeeded

HOST = "127.0.0.1"

# Below the usual ephemeral ranges (32768 on Linux, 49152 elsewhere), so that no outgoing connection
# takes a port between the check and the server's start.
_FIRST_PORT, _PORTS = 20_000, 12_000
_POLL_SECONDS = 0.01
_SAID_CHARACTERS = 2000


def _nobody() -> pwd.struct_passwd | None:
    """The user that servers run as; None for the current user."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def owner() -> tuple[int, int]:
    """The user id and group id that a server started by ``start`` has."""
    nobody = _nobody()
    return (nobody.pw_uid, nobody.pw_gid) if nobody else (os.geteuid(), os.getegid())


def unreachable(directory: Path) -> str | None:
    """Why a server started by ``start`` cannot enter ``directory``; None if it can."""
    if _nobody() is None:
        return None
    for parent in directory.resolve().parents:
        if parent.exists() and not parent.stat().st_mode & stat.S_IXOTH:
            return f"it would run as the user `nobody`, who may not enter {parent}"
    return None


def give(path: Path) -> None:
    """Give ``path``, and everything below it, to the server's user."""
    if _nobody() is None:
        return
    uid, gid = owner()
    os.chown(path, uid, gid)
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            os.chown(Path(directory, name), uid, gid, follow_symlinks=False)


def free_ports(count: int) -> list[int]:
    """Different TCP ports on loopback on which nothing listens at this moment."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = _FIRST_PORT + secrets.randbelow(_PORTS)
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                ports.append(port)
        return ports


def start(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """Start a server without root's rights, in a process group of its own; its output goes to ``output``."""
    nobody = _nobody()
    with output.open("ab") as said:
        return subprocess.Popen(  # noqa: S603 - the command is ours, not a user's
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd="/",
            start_new_session=True,
            user=nobody.pw_uid if nobody else None,
            group=nobody.pw_gid if nobody else None,
            extra_groups=[] if nobody else None,
        )


def wait_until(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], output: Path, *, seconds: float
) -> None:
    """Wait until ``ready`` returns True. Raises OperatorNeeded with the end of ``output`` if it does not."""
    deadline = time.monotonic() + seconds
    while not ready():
        ended = process.poll()
        if ended is not None or time.monotonic() > deadline:
            why = f"ended with code {ended}" if ended is not None else f"was not ready after {seconds:.0f} s"
            said = output.read_text(errors="replace")[-_SAID_CHARACTERS:].strip()
            raise OperatorNeeded(f"a private server {why}: {said}")
        time.sleep(_POLL_SECONDS)


def stop(process: subprocess.Popen[bytes], *, gracefully: int = signal.SIGTERM, seconds: float) -> None:
    """End a server with the signal ``gracefully``, or kill its process group after ``seconds``.

    A server that ends by the signal ends its children first. Does nothing if it has already ended.
    """
    if process.poll() is not None:
        return
    process.send_signal(gracefully)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

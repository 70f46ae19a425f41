"""What the operating system says of a disk, translated once; and what makes a write durable.

Shared by the spool and the directory store. ``durable`` is fsync(2), and the
stronger call where fsync does not reach the platter.
"""

import errno
import os
import sys
from pathlib import Path

from archiver.errors import ArchiverError, OperatorNeeded, TryLater

# Room, handles and quotas come back; a worn cable may be plugged in again.
_PASSING = {
    errno.ENOSPC: "free some space on that disk, or use a larger one",
    errno.EDQUOT: "raise the quota of this user, or free some space",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or use another file system",
    errno.EMFILE: "raise the limit of open files (ulimit -n) of this process",
    errno.ENFILE: "raise the limit of open files of this machine (fs.file-max)",
    errno.ENOMEM: "give this machine or container more memory",
    errno.EIO: "look at the kernel's log: the disk or the network below it fails",
    errno.ESTALE: "look at the network file system: its server forgot the handle",
    errno.ETIMEDOUT: "look at the network file system: its server does not answer",
    errno.EINTR: "nothing to do: a signal came in between",
    errno.EAGAIN: "nothing to do: it was busy",
    errno.EBUSY: "nothing to do: it was busy",
}

_LASTING = {
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there, on a file system that knows hard links",
    errno.EROFS: "mount that file system for writing",
    errno.ENOENT: "create the directory, or mount the volume that holds it",
    errno.ENOTDIR: "choose a path whose every part is a directory",
    errno.EEXIST: "choose a path that is a directory",
    errno.ENOTSUP: "choose a local file system: this one knows no hard links",
    errno.EINVAL: "choose a local file system: this one cannot make a directory durable",
}


def failure(error: OSError, doing: str) -> ArchiverError:
    """The error to raise for an OSError met while ``doing`` something, such as "write /spool"."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    message = f"cannot {doing}: {reason}"
    if error.errno in _PASSING:
        return TryLater(message, hint=_PASSING[error.errno])
    return OperatorNeeded(message, hint=_LASTING.get(error.errno or 0))


def durable(descriptor: int) -> None:
    """Returns when what was written to this file or directory survives a power cut. Raises OSError."""
    if sys.platform == "darwin":
        import fcntl

        # fsync(2) of macOS: "the drive itself may not physically write the data for quite some time".
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def durable_directory(path: Path) -> None:
    """Returns when the names in this directory survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        durable(descriptor)
    finally:
        os.close(descriptor)

"""Translates the operating system's errors about disks, and makes writes durable.

Shared by the spool and the directory store. ``durable`` is fsync(2), or the
stronger call where fsync does not reach the disk.
"""

import errno
import os
import sys
from pathlib import Path

from archiver.errors import ArchiverError, MessageRefused, OperatorNeeded, TryLater

# Space, handles and quotas become free again; a cable can be plugged in again.
_PASSING = {
    errno.ENOSPC: "free some space on that disk, or use a larger one",
    errno.EDQUOT: "raise the quota of this user, or free some space",
    errno.EMFILE: "raise the limit of open files (ulimit -n) of this process",
    errno.ENFILE: "raise the limit of open files of this machine (fs.file-max)",
    errno.ENOMEM: "give this machine or container more memory",
    errno.EIO: "check the kernel's log: the disk, or the network to it, is failing",
    errno.ESTALE: "check the network file system: its server lost the handle",
    errno.ETIMEDOUT: "check the network file system: its server does not answer",
    errno.EINTR: "nothing to do: a signal interrupted the call",
    errno.EAGAIN: "nothing to do: it was busy",
    errno.EBUSY: "nothing to do: it was busy",
}

_TOO_LARGE = "raise the limit of a file's size (ulimit -f), or use another file system"

_LASTING = {
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there, on a file system with hard links",
    errno.EROFS: "mount that file system for writing",
    errno.ENOENT: "create the directory, or mount the volume that holds it",
    errno.ENOTDIR: "choose a path whose every part is a directory",
    errno.EEXIST: "choose a path that is a directory",
    errno.ENOTSUP: "choose a local file system: this one has no hard links",
    errno.EINVAL: "choose a local file system: this one cannot make a directory durable",
}


def failure(error: OSError, doing: str) -> ArchiverError:
    """The error to raise for an OSError. ``doing`` follows "cannot": "write /spool"."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    message = f"cannot {doing}: {reason}"
    if error.errno == errno.EFBIG:
        return MessageRefused(message, hint=_TOO_LARGE)  # smaller ones can be written
    if error.errno in _PASSING:
        return TryLater(message, hint=_PASSING[error.errno])
    return OperatorNeeded(message, hint=_LASTING.get(error.errno or 0))


def durable(descriptor: int) -> None:
    """Return when this file or directory would survive a power cut. Raises OSError."""
    if sys.platform == "darwin":
        import fcntl

        # fsync(2) of macOS: "the drive itself may not physically write the data for quite some time".
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def durable_directory(path: Path) -> None:
    """Return when the names in this directory would survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        durable(descriptor)
    finally:
        os.close(descriptor)

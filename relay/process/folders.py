"""Whether something can be made in a folder: asked without making anything that anybody could see, and why not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import sys
from typing import Final

READ_ONLY: Final = (
    "its file system is mounted read-only; name a place that may be written, or let this one be (under systemd, "
    "ReadWritePaths=)"
)
"""What to say where a mode and an owner have nothing to do with it."""

NO_INODE: Final = "no inode is left on its disk (df -i)"
NO_SPACE: Final = "no space is left on its disk (df)"

_LONG_BYTES: Final = struct.calcsize("l")
_GET_FLAGS: Final = 2 << 30 | _LONG_BYTES << 16 | ord("f") << 8 | 1
"""FS_IOC_GETFLAGS of linux/fs.h, `_IOR('f', 1, long)`; some processors count otherwise, and then nothing is found."""

_ATTRIBUTES: Final = {0x10: ("immutable", "i"), 0x20: ("append-only", "a")}
"""FS_IMMUTABLE_FL and FS_APPEND_FL, and what chattr(1) calls them."""


def can_make_files_in(folder: str) -> bool:
    """Make a file without a name there, which leaves no trace: not even in the folder's time of change.

    False says little: some file systems know no such files, and where they do, something may refuse them. Then only
    trying tells, and what there is against it.
    """
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError:
        return False
    return True


def is_read_only(path: str) -> bool:
    """Whether the file system of what is at `path` is mounted so, for this process at least; False if nobody tells."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def why_fixed(path: str) -> str | None:
    """What to say of a file or a folder in which an attribute forbids changes, to root as well; None if none is found.

    It is opened and closed, with which this process loses the locks that it has on it, as fcntl(2) has it.
    """
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    flags = bytearray(_LONG_BYTES)
    try:
        with contextlib.suppress(OSError):  # a file system without attributes
            fcntl.ioctl(fd, _GET_FLAGS, flags)
    finally:
        os.close(fd)
    held = int.from_bytes(flags, sys.byteorder)
    for flag, (word, letter) in _ATTRIBUTES.items():
        if held & flag:
            return f"{path} is {word} (lsattr), whatever its mode and owner; chattr -{letter} it, or name another place"
    return None


def has_no_inode(folder: str) -> bool:
    """Whether no further file can be made there, whatever space is left; some file systems have no such number."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    return status.f_files > 0 and status.f_favail == 0


def why_refused(error: OSError, folder: str, *files: str) -> str | None:
    """What to say where the file system refuses to make or change one of `files` in `folder`, and no mode and no owner
    has to do with it; None where they may have, or something else."""
    if error.errno == errno.EROFS:
        return READ_ONLY
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NO_INODE if has_no_inode(folder) else NO_SPACE
    if error.errno == errno.EPERM:
        return next(filter(None, map(why_fixed, (folder, *files))), None)
    return None

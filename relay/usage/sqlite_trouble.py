"""What SQLite or the system has against a database, as a `Trouble`; apart, since SQLite takes 1.5 MB of memory."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from typing import Final

from relay.process.folders import NO_INODE, READ_ONLY, has_no_inode, is_read_only
from relay.usage.sqlite import sqlite3
from relay.usage.trouble import LOCKED_PATIENCE, Trouble

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)

_BEGINNING_BYTES: Final = 1 << 16
"""More than an empty database has, and than its -shm begins with."""

_STEP_BYTES: Final = 1 << 15
"""By so much a -shm grows, and the others by less."""


def trouble_of(error: Exception, path: str, *, waited: bool = True) -> Trouble:
    """Say in words what SQLite or the system has against writing to the database.

    Args:
        error: what was raised.
        path: the database file.
        waited: whether a lock was waited for.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC and has_no_inode(_folder(path)):
            return _full(NO_INODE)
        return _full() if error.errno in _NO_SPACE else Trouble(f"cannot be used ({error.strerror or text})")
    # By their texts, which have not changed in many years: Python 3.10 does not tell the codes.
    if "locked" in text or text == "locking protocol":
        line = "another program holds its lock"
        return Trouble(line, kind="locked", passing=True, patience=LOCKED_PATIENCE, waited=waited and "locked" in text)
    limit = _limit_reached(path) if "disk" in text else None
    if limit is not None:
        return Trouble(f"the limit of file sizes is {limit} bytes; raise it (ulimit -f, LimitFSIZE=)", kind="limit")
    if "disk is full" in text or _disk_is_full(path):
        return _full()
    if "unable to open" in text and has_no_inode(_folder(path)):
        return _full(NO_INODE)
    if "malformed" in text or "not a database" in text:
        return damaged(text)
    if "readonly" in text and is_read_only(_folder(path)):
        return Trouble(READ_ONLY)
    if "readonly" in text:
        return Trouble("it cannot be written; change its mode or owner, or those of its folder")
    if isinstance(error, sqlite3.IntegrityError):  # two rows have drawn the same number; the next time they will not
        return Trouble(f"cannot be used ({text})", kind="drawn", passing=True, patience=LOCKED_PATIENCE)
    return Trouble(f"cannot be used ({text})")


def damaged(reason: str) -> Trouble:
    """Return the trouble of a file that is broken."""
    remedy = "repair it, or move it away together with its -wal and -shm to have a new one made"
    return Trouble(f"it is damaged ({reason}); {remedy}", kind="damaged")


def _full(line: str = "no space is left on its disk") -> Trouble:
    return Trouble(line, kind="full", passing=True)


def _limit_reached(path: str) -> int | None:
    """How large a file of this process may be, if the database, or what is beside it, would have to be larger; bytes.

    SQLite says "disk I/O error" to that, too, and the kernel what it says of a full disk.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return None
    sizes = [_BEGINNING_BYTES]
    for beside in ("", "-wal", "-shm"):
        with contextlib.suppress(OSError):
            sizes.append(os.path.getsize(os.path.realpath(path) + beside) + _STEP_BYTES)
    return limit if limit < max(sizes) else None


def _disk_is_full(path: str) -> bool:
    """SQLite says "disk I/O error" too when there is no space for its -shm file."""
    try:
        return os.statvfs(_folder(path)).f_bavail == 0
    except OSError:
        return False


def _folder(path: str) -> str:
    return os.path.dirname(os.path.realpath(path))

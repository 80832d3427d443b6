"""Whether another worker still lives, told by a lock that it holds: its lifeline.

Each worker holds a lock on one byte of the database file, a byte of its own far behind the file's end, and says in the
table `lifeline` which. The kernel drops the lock with the process, however that ends, and tells everybody who asks on
the same machine, whatever PID namespace (container) or user they are of, and with or without /proc.

They are locks of the open file description (fcntl_locking(2)): it is the watched file's own, so neither SQLite, whose
locks are the process's, nor anybody who closes the file takes them away. A kernel or file system that has none of these
leaves workers without lifelines: then `processes` has to tell.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

_FLOCK: Final = struct.Struct("hhqqi")
"""struct flock: type, whence, start, length, process id."""

_FIRST: Final = 1 << 62
_COUNT: Final = 1 << 40
"""Where the bytes are. SQLite's own are at 2^30 (PENDING_BYTE of its os.h)."""


def new_byte() -> int:
    """Return the number of a byte, at random: nobody else's."""
    return _FIRST + int.from_bytes(os.urandom(8), "big") % _COUNT


def hold(fd: int, byte: int) -> bool:
    """Hold that byte until `fd`, the database file, is closed; False where there are no such locks."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError:
        return False
    return True


def is_held(fd: int, byte: int) -> bool:
    """Tell whether somebody else holds that byte.

    Raises:
        OSError: there are no such locks.
    """
    return _is_locked(fd, byte, 1)


def is_any_held(fd: int) -> bool:
    """Tell whether somebody else holds any lifeline; False where there are no such locks."""
    try:
        return _is_locked(fd, _FIRST, _COUNT)
    except OSError:
        return False


def _is_locked(fd: int, start: int, length: int) -> bool:
    # Asked for a lock of the other kind, which each of them is in the way of.
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK

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

_MOST: Final = 1000
"""So many are counted; no relay has as many workers."""


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


def count_held(fd: int) -> int:
    """Tell how many lifelines others hold; 0 where there are no such locks.

    The kernel names any one lock in a range, so each that is found parts the range in two.
    """
    found = 0
    ranges = [(_FIRST, _COUNT)]
    while ranges and found < _MOST:
        start, length = ranges.pop()
        try:
            lock = _lock_in(fd, start, length) if length > 0 else None
        except OSError:
            return 0
        if lock is None:
            continue
        byte, bytes_locked = lock
        if bytes_locked == 1:  # a whole file is locked by somebody else
            found += 1
            ranges += [(start, byte - start), (byte + 1, start + length - byte - 1)]
    return found


def _is_locked(fd: int, start: int, length: int) -> bool:
    return _lock_in(fd, start, length) is not None


def _lock_in(fd: int, start: int, length: int) -> tuple[int, int] | None:
    """The first byte and the length of a lock in that range, if there is any."""
    # Asked for a lock of the other kind, which each of them is in the way of.
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, _, first, count, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else (first, count)

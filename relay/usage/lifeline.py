"""Whether another worker still lives, told by a lock that it holds: its lifeline.

Each worker holds a lock on one byte of the database file, a byte of its own far behind the file's end, and says in the
table `lifeline` which. The kernel drops the lock with the process, however that ends, and tells everybody who asks on
the same machine, whatever PID namespace (container) or user they are of, and with or without /proc.

A second byte, as far behind the first one for everybody, is held by who has *signed on*: has come to write that it is
there. So what a worker has left of itself is told from one that has only begun, also where somebody has taken its row.

A third one is held by who *holds records back*: has some that it cannot write into the database. Of all that a worker
tells, that cannot be told in there.

They are locks of the open file description (fcntl_locking(2)): it is the watched file's own, so neither SQLite, whose
locks are the process's, nor anybody who closes the file takes them away. A kernel or file system that has none of these
leaves workers without lifelines: then `processes` has to tell.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from typing import Final

_FLOCK: Final = struct.Struct("hhqqi")
"""struct flock: type, whence, start, length, process id."""

_FIRST: Final = 1 << 62
_COUNT: Final = 1 << 40
"""Where the bytes are. SQLite's own are at 2^30 (PENDING_BYTE of its os.h)."""

_SIGNED_ON: Final = _COUNT
"""So far behind a worker's byte is that which says that it has signed on."""

_HOLDS_BACK: Final = 2 * _COUNT
"""And so far that which says that it holds records back."""

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


def held(fd: int) -> set[int]:
    """The bytes of all others who hold a lifeline; none where there are no such locks."""
    return set(_held(fd, _FIRST))


def count_held(fd: int) -> int:
    """Tell how many lifelines others hold; 0 where there are no such locks."""
    return len(held(fd))


def sign_on(fd: int, byte: int) -> None:
    """Let others see, until `fd` is closed, that the worker with that byte has signed on, if there are such locks."""
    hold(fd, byte + _SIGNED_ON)


def sign_off(fd: int, byte: int) -> None:
    """Let others see it no longer."""
    _let_go(fd, byte + _SIGNED_ON)


def signed_on(fd: int) -> set[int]:
    """The bytes of all others who have signed on; none where there are no such locks."""
    return {byte - _SIGNED_ON for byte in _held(fd, _FIRST + _SIGNED_ON)}


def hold_back(fd: int, byte: int) -> None:
    """Let others see, until `fd` is closed, that the worker with that byte holds records back."""
    hold(fd, byte + _HOLDS_BACK)


def hold_nothing_back(fd: int, byte: int) -> None:
    """Let others see it no longer."""
    _let_go(fd, byte + _HOLDS_BACK)


def count_holding_back(fd: int) -> int:
    """Tell how many others hold records back; 0 where there are no such locks."""
    return len(_held(fd, _FIRST + _HOLDS_BACK))


def _let_go(fd: int, byte: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))


def _held(fd: int, first: int) -> list[int]:
    """Which bytes others hold of those that begin with `first`.

    The kernel names any one lock in a range, so each that is found parts the range in two.
    """
    found: list[int] = []
    ranges = [(first, _COUNT)]
    while ranges and len(found) < _MOST:
        start, length = ranges.pop()
        try:
            lock = _lock_in(fd, start, length) if length > 0 else None
        except OSError:
            return []
        if lock is None:
            continue
        byte, bytes_locked = lock
        if bytes_locked == 1:  # a whole file is locked by somebody else
            found.append(byte)
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

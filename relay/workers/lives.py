"""Which workers live, asked of the kernel.

Each worker locks a byte of a file that all have open, in memory and without a name, and the kernel releases it in the
moment in which the process ends, however that happens; a process that stands still keeps it. Which byte, is the
worker's identity: a number that no other worker has or ever had, also none with the same process id. So whoever is
dead stays dead.

It is a lock of an open file description (fcntl(2), F_OFD_SETLK), one that this process has opened for itself. The
common kind would be lost with the first file descriptor of the file that the process closes, and each sibling gives a
newcomer one more.
"""

from __future__ import annotations

import fcntl
import os
import struct

_FLOCK = struct.Struct("hhqqi")  # type, whence, start, length, pid: struct flock of fcntl(2), offsets of 64 bits
_RANDOM_BITS = 40  # and below 2**22 of a process id: 62 in all, which are an offset in a file

_MOST_REMEMBERED = 1000


def pid_of(worker: int) -> int:
    """The process id of a worker, by its identity."""
    return worker >> _RANDOM_BITS


class Lives:
    """The lives of all workers of a relay; from now on we are one of them, until `close`.

    Args:
        fd: the file, which stays the caller's.

    Raises OSError.
    """

    def __init__(self, fd: int) -> None:
        self.me = os.getpid() << _RANDOM_BITS | int.from_bytes(os.urandom(_RANDOM_BITS // 8), "big")
        self._dead: set[int] = set()
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _lock_on(self.me))
        except OSError:
            os.close(self._fd)
            raise

    def has(self, worker: int) -> bool:
        """Whether a worker lives, by its identity."""
        if worker == self.me:
            return True
        if worker in self._dead:
            return False
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _lock_on(worker)))
        if kind != fcntl.F_UNLCK:
            return True
        if len(self._dead) == _MOST_REMEMBERED:
            self._dead.clear()
        self._dead.add(worker)
        return False

    def close(self) -> None:
        """Be dead, as far as the others can tell."""
        os.close(self._fd)


def _lock_on(worker: int) -> bytes:
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, worker, 1, 0)

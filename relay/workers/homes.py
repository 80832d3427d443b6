"""Which worker a token lives with, and when it last met its match: what all workers of a relay know in common.

A token's home is the worker where its first client waits, and the kernel keeps that in mind for all.

The workers of a relay have a few files open together, in memory and without names. Each token stands for a byte
in one of them, far beyond its end. Who lets a client wait locks the byte of its token (fcntl(2), advisory record
locking), which only one process can do at a time; who finds it locked learns by whom. The kernel releases the locks of
a process in the moment in which it ends, however that happens: there is no table to repair, and nothing to agree upon.

A worker that stands still keeps its locks. So a token has several bytes: the first that is not held by somebody who is
absent counts. A home with another byte than the first is one for the time being, and tries again (see `siblings`), so
that when the sleeper wakes all who wait for a token come together again.

Closing any file descriptor of a file releases all locks that the process has on it. So there is one of each; whoever
gets them once more, and closes those, has to settle its tokens anew.

When two sides are matched, the other connections that wait for their token, the spares, are closed. But some may be
under way between workers at that moment, or wait where a worker stands still. So the first file also holds a table that
all workers read and write: when each token was last matched. Whoever had asked for its partner before that is a spare,
wherever it turns up. The table needs no locks: a home writes before it gives the token up, and reads once it has it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence

FILES = 32
"""The kernel keeps the locks of a file in a list, so this is by how much the way through them is cut short."""

BYTES_OF_A_TOKEN = 4
"""How many workers may stand still at once, less one, without keeping the clients of a token apart."""

MATCHES = 1 << 16
PLACES_OF_A_TOKEN = 4
"""Places for matches, and in how many of them a token's may be. A new one takes the oldest of its four, which is then
forgotten: with a thousand pairs a second, of those matched a second ago not one in a million."""

_PRIME = (1 << 61) - 1
_HEAD = struct.Struct("=dQ")  # when they were made, key
_MATCH = struct.Struct("=QQ")  # the token's number XOR the next, so that a half-written pair is no match; when, in ns
_PLACES = struct.Struct(f"={2 * PLACES_OF_A_TOKEN}Q")  # so many of those
_TABLE_END = _HEAD.size + MATCHES * _MATCH.size
_FLOCK = struct.Struct("hhqqi")  # type, whence, start, length, pid: struct flock of fcntl(2), offsets of 64 bits
_MFD_NOEXEC_SEAL = 0x8  # include/uapi/linux/memfd.h; vm.memfd_noexec in the kernel's sysctl documentation
_EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB


class Homes:
    """The homes of all tokens, as the worker with these `fds` sees them; they are its own from now on. `made` is when
    the first worker of the relay made them, in seconds of CLOCK_MONOTONIC."""

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = tuple(fds)
        self._pid = os.getpid()
        self._table = mmap.mmap(self.fds[0], _TABLE_END)
        self.made: float
        self._key: int  # secret, or somebody could choose tokens that all fall into one list
        self.made, self._key = _HEAD.unpack_from(self._table)

    @classmethod
    def make(cls) -> Homes:
        """New ones, for the first worker of a relay; raises OSError when there are no file descriptors for them."""
        fds = [_memory_file() for _ in range(FILES)]
        key = 1 + int.from_bytes(os.urandom(16), "big") % (_PRIME - 1)
        os.ftruncate(fds[0], _TABLE_END)
        os.pwrite(fds[0], _HEAD.pack(time.monotonic(), key), 0)
        return cls(fds)

    def settle(self, token: bytes, is_there: Callable[[int], bool]) -> tuple[int, bool]:
        """Find the home of `token`, or become it.

        Returns the process id of the home, and whether that is certain: if not, we are home for the time being, and
        have to ask again. `is_there` says of a process id other than our own whether it is of a worker that can be
        home.
        """
        fd, first = self._place_of(token)
        for byte in range(first, first + BYTES_OF_A_TOKEN):
            if _lock(fd, byte):
                return self._pid, byte == first
            holder = _holder(fd, byte, 1)
            if holder is None and _lock(fd, byte):  # it was released just now
                return self._pid, byte == first
            if holder is not None and is_there(holder):
                return holder, True
        return self._pid, False

    def holder(self, token: bytes) -> int | None:
        """The process id of a worker that is home to `token`, unless it is this one; None if nobody is."""
        fd, first = self._place_of(token)
        return _holder(fd, first, BYTES_OF_A_TOKEN)

    def give_up(self, token: bytes) -> None:
        """Be home to `token` no longer; nothing happens if we are not."""
        fd, first = self._place_of(token)
        fcntl.lockf(fd, fcntl.LOCK_UN, BYTES_OF_A_TOKEN, first)

    def note_match(self, token: bytes, when: float) -> None:
        """Tell all workers that two sides were matched for `token`, at `when` in seconds of CLOCK_MONOTONIC."""
        number = self._number_of(token)
        nanoseconds = int(when * 1e9)
        first = _first_place_of_match(number)
        held = _PLACES.unpack_from(self._table, first)
        times = held[1::2]
        place = times.index(min(times))
        for own, (mixed, before) in enumerate(zip(held[::2], times, strict=True)):
            if mixed ^ before == number:
                place = own
        _MATCH.pack_into(self._table, first + place * _MATCH.size, number ^ nanoseconds, nanoseconds)

    def last_match(self, token: bytes) -> float:
        """When any worker last matched two sides for `token`, as far as that is not forgotten; 0 if it is."""
        number = self._number_of(token)
        held = _PLACES.unpack_from(self._table, _first_place_of_match(number))
        latest = 0  # of several that workers have written at the same time
        for mixed, nanoseconds in zip(held[::2], held[1::2], strict=True):
            if mixed ^ nanoseconds == number and nanoseconds > latest:
                latest = nanoseconds
        return latest / 1e9

    def close(self) -> None:
        """Be home to nothing any more, and let go of the files."""
        self._table.close()
        for fd in self.fds:
            os.close(fd)

    def _place_of(self, token: bytes) -> tuple[int, int]:
        """The file, and the first byte in it, that stand for `token`."""
        number = self._number_of(token)
        return self.fds[number % FILES], number * BYTES_OF_A_TOKEN

    def _number_of(self, token: bytes) -> int:
        """A number below 2**61 that nobody can tell without the key: universal hashing (Carter and Wegman, 1979)."""
        return int.from_bytes(token, "big") * self._key % _PRIME


def _first_place_of_match(number: int) -> int:
    return _HEAD.size + number % (MATCHES // PLACES_OF_A_TOKEN) * _PLACES.size


def _memory_file() -> int:
    """A new memfd_create(2) file, of the harmless kind where the kernel knows it: some machines allow no other."""
    try:
        return os.memfd_create("relay-homes", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3
            raise
        return os.memfd_create("relay-homes", os.MFD_CLOEXEC)


def _lock(fd: int, byte: int) -> bool:
    try:
        fcntl.lockf(fd, _EXCLUSIVE, 1, byte)
    except OSError:
        return False  # somebody else has it; or, very rarely, the kernel has no memory for another (ENOLCK)
    return True


def _holder(fd: int, byte: int, length: int) -> int | None:
    """The process that keeps us from locking any of these bytes, or None if we could."""
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, length, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, wanted))
    return None if kind == fcntl.F_UNLCK else int(pid)

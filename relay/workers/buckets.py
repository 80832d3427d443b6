"""Who owns which key: a hash table in the memory that all workers share.

A key falls into one of `ROOTS` buckets of `SLOTS` slots. When that is full, it has four more below it, and which of
them the key falls into, its next two bits tell; so on for `LEVELS` levels. Nothing ever moves from one bucket to
another, and to find a key takes the same time however many there are, but for a bucket or two more on the way. The file
is as large as all levels from the beginning, and takes memory for those that were needed.

**Locks.** Whoever takes a key, or decides by what it finds that it may not, holds the lock on the byte of the file that
stands for the root meanwhile, which is for a few microseconds (fcntl(2), advisory record locking). The kernel keeps the
locks of a file in a list and walks that: here it has one entry for each worker at the most. It releases what a process
held when that ends, wherever it was. To drop a key takes no lock: while its owner lives, nobody else touches its slot.

**Crashes.** Each change takes effect with its last store, of eight aligned bytes, so whoever is killed in the middle
has changed nothing. What dead workers own is anybody's: who wants such a key takes it, and who finds a bucket full
looks for such slots.

**Standing still.** A worker that does not run (SIGSTOP, a debugger, no processor for it) while it holds a lock keeps
the others out. They wait for less than half a millisecond, are told that it could not be found out now, and do not wait
there again for a tenth of a second. Dropping never waits, nor does `look`, which tells what can be seen from outside.

**Order.** Other processors may see the stores of one in any order (ARM) unless something keeps them in order. Here it
is the spin lock with which the kernel guards the file's list of locks: whoever locks or unlocks a root goes through it,
and who goes through it sees what those who went before had stored before. So under a root's lock one sees all that was
done under it before. And `fence`, which goes through it as well, divides what was stored before it from a key
dropped after it: who has taken that key, and left the lock, has gone through the spin lock after the one who dropped
it (the key was not dropped before that went in, nor seen as dropped before the other came out), and so sees the former,
too. What `look` says may be older, or mixed of old and new; it is a hint.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, lockf

from relay.workers.lives import Lives

ROOTS = 1 << 13
SLOTS = 15
LEVELS = 4
"""122 880 slots in the roots, ten million in all. With 150 000 keys most of them are found in the second bucket."""

PATIENCE_SECONDS = 0.0004
"""How long to wait for a root that somebody else has locked: a hundred times as long as that takes, as a rule."""

STUCK_SECONDS = 0.1
"""How long not to wait again for one that did not come free in that time."""

BURY_SECONDS = 10.0
"""How often, at the most, a full bucket is searched for what the dead have left."""

# A bucket: the keys, 0 for a free slot; whether there are buckets below; the owners; when it was last searched for the
# dead, in nanoseconds of CLOCK_MONOTONIC. All are words of 64 bits in the machine's own order.
_KEYS_AND_MORE = struct.Struct(f"{SLOTS + 1}Q")
_MORE = SLOTS
_OWNER = SLOTS + 1  # from a key to its owner
_SEARCHED = 2 * SLOTS + 1
_BUCKET = 8 * (_SEARCHED + 1)
_STARTS: list[int] = [ROOTS * _BUCKET * (4**level - 1) // 3 for level in range(LEVELS)]

SIZE_OF_ROOTS = ROOTS * _BUCKET
SIZE: int = ROOTS * _BUCKET * (4**LEVELS - 1) // 3
"""Bytes of the table; all zeros is an empty one. The roots must have their memory from the beginning (`reserve`)."""

_EXCLUSIVE = LOCK_EX | LOCK_NB
_BELOW_ROOT = 2 + ROOTS.bit_length() - 1  # where the bits of a key begin that tell its way down


def root_of(key: int) -> int:
    """The number of the root that a key falls into. Keys that differ in their last two bits only fall into four
    different ones, so that a worker that stands still is in the way of one of them at the most."""
    return (key >> 2 ^ (key & 3) * 0x555) % ROOTS


class Buckets:
    """The table that begins at the byte `start`, a multiple of 8, of the file `fd`, which is mapped as `memory`.

    Args:
        lives: who we are, and which owners live.

    Keys are of 64 bits and the highest is set; owners are identities of workers (see `lives`).
    """

    def __init__(self, fd: int, memory: mmap.mmap, start: int, lives: Lives) -> None:
        self._fd = fd
        self._memory = memory
        self._starts = [start + level for level in _STARTS]
        self._lives = lives
        self._me = lives.me
        self._view = memoryview(memory)
        self._words = self._view.cast("Q")
        self._stuck: dict[int, float] = {}  # until when not to wait for them, in monotonic seconds

    def take(self, key: int) -> int | None:
        """The living owner of `key`: from now on it is us, if there was none. None when that cannot be found out at
        the moment, or there is no memory for one more."""
        root = root_of(key)
        try:
            lockf(self._fd, _EXCLUSIVE, 1, root)
        except OSError:  # somebody else has it; or, very rarely, the kernel has no memory for another (ENOLCK)
            if not self._enter_in_time(root):
                return None
        try:
            return self._find_or_own(root, key)
        finally:
            lockf(self._fd, LOCK_UN, 1, root)

    def drop(self, key: int) -> bool:
        """Own `key` no longer; False, and nothing happens, if we do not."""
        slot = self._find(root_of(key), key)
        if not slot or self._words[slot + _OWNER] != self._me:
            return False
        self._words[slot] = 0
        return True

    def fence(self) -> None:
        """Let what we have stored so far be seen by whoever takes a key that we drop from now on."""
        lockf(self._fd, LOCK_UN, 1, 0)  # which we have not locked

    def look(self, key: int) -> int:
        """The owner of `key`, dead or alive, 0 if there is none; a hint, since nobody is kept from changing it."""
        slot = self._find(root_of(key), key)
        return self._words[slot + _OWNER] if slot else 0

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._view.release()

    def _enter_in_time(self, root: int) -> bool:
        now = time.monotonic()
        if self._stuck.get(root, 0.0) > now:
            return False
        until = now + PATIENCE_SECONDS
        while time.monotonic() < until:
            os.sched_yield()  # it may have been about to go on here
            try:
                lockf(self._fd, _EXCLUSIVE, 1, root)
            except OSError:
                continue
            self._stuck.pop(root, None)
            return True
        self._stuck[root] = until + STUCK_SECONDS
        return False

    def _find(self, root: int, key: int) -> int:
        """The slot of `key` (the number of its word), 0 if it has none."""
        index, further = root, key >> _BELOW_ROOT
        for start in self._starts:
            at = start + index * _BUCKET
            held = _KEYS_AND_MORE.unpack_from(self._memory, at)
            if key in held:
                return (at >> 3) + held.index(key)
            if not held[_MORE]:
                return 0
            index, further = index << 2 | further & 3, further >> 2
        return 0

    def _find_or_own(self, root: int, key: int) -> int | None:
        words = self._words
        free = 0
        index, further = root, key >> _BELOW_ROOT
        for start in self._starts:
            at = start + index * _BUCKET
            held = _KEYS_AND_MORE.unpack_from(self._memory, at)
            if key in held:
                slot = (at >> 3) + held.index(key)
                if not self._lives.has(words[slot + _OWNER]):
                    words[slot + _OWNER] = self._me
                return words[slot + _OWNER]
            if not free and 0 in held and held.index(0) != _MORE:
                free = (at >> 3) + held.index(0)
            if not held[_MORE]:
                break
            index, further = index << 2 | further & 3, further >> 2
        free = free or self._make_room(root, key)
        if not free:
            return None
        words[free + _OWNER] = self._me
        words[free] = key
        return self._me

    def _make_room(self, root: int, key: int) -> int:
        """A free slot for `key`, where all are taken that it could have now; 0 if there is no memory for more."""
        words = self._words
        index, further = root, key >> _BELOW_ROOT
        for level, start in enumerate(self._starts):
            first = (start + index * _BUCKET) >> 3
            free = self._bury(first)
            if free:
                return free
            index, further = index << 2 | further & 3, further >> 2
            if not words[first + _MORE]:
                return self._grow(first, level + 1, index)
        return 0

    def _grow(self, above: int, level: int, index: int) -> int:
        """Put four buckets below the one whose first slot is `above`, of which the key's is `index`; the latter's first
        slot, 0 if there can be none."""
        if level == LEVELS or not reserve(self._fd, self._starts[level] + (index & ~3) * _BUCKET, 4 * _BUCKET):
            return 0
        self._words[above + _MORE] = 1
        return (self._starts[level] + index * _BUCKET) >> 3

    def _bury(self, first: int) -> int:
        """Free what the dead own in a full bucket; one of the slots, 0 if there is none or it is too early to look."""
        words = self._words
        now = time.monotonic_ns()
        if words[first + _SEARCHED] and now - words[first + _SEARCHED] < BURY_SECONDS * 1e9:
            return 0
        words[first + _SEARCHED] = now
        free = 0
        living = set()
        for slot in range(first, first + SLOTS):
            owner = words[slot + _OWNER]
            if owner in living:
                continue
            if self._lives.has(owner):
                living.add(owner)
            else:
                words[slot] = 0
                free = slot
        return free


def reserve(fd: int, start: int, length: int) -> bool:
    """See that there is memory for a part of a file; without it the first touch would end the process (SIGBUS). False
    when there is none."""
    try:
        os.posix_fallocate(fd, start, length)
    except OSError as error:
        # Where it is not allowed, the memory comes with the first touch, as it mostly does.
        return error.errno not in (errno.ENOSPC, errno.ENOMEM)
    return True

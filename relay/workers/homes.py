"""Which worker a token lives with, and when it last met its match: what all workers of a relay know in common.

A token's home is the worker where its first client waits. The workers have two files open together, in memory and
without names. One is a table in which each worker enters the tokens it is home to (`buckets`), and the table of matches
(`matches`); by the other the kernel tells who lives (`lives`), so that nobody need clear up after a worker that has
died: what it has entered counts no longer.

A worker that stands still is alive, and so are its entries. So a token has several places in the table: the first that
is not owned by somebody who is absent counts. A home at another place than the first is one for the time being, and
tries again (see `tokens`), so that when the sleeper wakes all who wait for a token come together again. It is the same
for the few tokens whose place cannot be entered, since a worker stands still in the middle of changing it.

When two sides are matched, the other connections that wait for their token, the spares, are closed. But some may be
under way between workers at that moment, or wait where a worker stands still. Whoever had asked for its partner before
the match is a spare, wherever it turns up. So a home notes a match before it gives the token up, and whoever is home
next reads when it has it.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence

from relay.workers import buckets, matches
from relay.workers.buckets import Buckets, reserve
from relay.workers.lives import Lives, pid_of
from relay.workers.matches import Matches

FILES = 2
"""The tables; and which workers live."""

PLACES = 4
"""How many workers may stand still at once, less one, without keeping the clients of a token apart."""

FURTHER_SECONDS = 5.0
"""Who is home at a further place than the first says so at least each second, unless it stands still itself."""

_PRIME = (1 << 61) - 1
_HEAD = struct.Struct("=dQ")  # when they were made, key
_MOMENT = struct.Struct("d")
_LAST_FURTHER = _HEAD.size  # when somebody has last become, or stayed, home at a further place than the first
_MATCHES_START = 4096
_BUCKETS_START = _MATCHES_START + matches.SIZE
_SIZE = _BUCKETS_START + buckets.SIZE
_SIZE_AT_FIRST = _BUCKETS_START + buckets.SIZE_OF_ROOTS
_NOT_ZERO = 1 << 63
_MFD_NOEXEC_SEAL = 0x8  # include/uapi/linux/memfd.h; vm.memfd_noexec in the kernel's sysctl documentation


class Homes:
    """The homes of all tokens, as the worker with these `fds` sees them; they are its own from now on. `made` is when
    the first worker of the relay made them, in seconds of CLOCK_MONOTONIC.

    Raises OSError.
    """

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = tuple(fds)
        self._pid = os.getpid()
        self._lives = Lives(self.fds[1])
        self._me = self._lives.me
        try:
            self._memory = mmap.mmap(self.fds[0], _SIZE)
        except OSError:
            self._lives.close()
            raise
        self.made: float
        self._key: int  # secret, or somebody could choose tokens that all fall into one bucket
        self.made, self._key = _HEAD.unpack_from(self._memory)
        self._buckets = Buckets(self.fds[0], self._memory, _BUCKETS_START, self._lives)
        self._matches = Matches(self._memory, _MATCHES_START)
        self._further: dict[int, set[int]] = {}  # keys at further places than the first that are ours, by the first
        self._last_token, self._last_number = b"", 0  # several questions about one come in a row, as a rule

    @classmethod
    def make(cls) -> Homes:
        """New ones, for the first worker of a relay; raises OSError when there are no file descriptors for them, or
        no memory."""
        fds: list[int] = []
        try:
            fds += (_memory_file() for _ in range(FILES))
            os.ftruncate(fds[0], _SIZE)
            if not reserve(fds[0], 0, _SIZE_AT_FIRST):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            key = 1 + int.from_bytes(os.urandom(16), "big") % (_PRIME - 1)
            os.pwrite(fds[0], _HEAD.pack(time.monotonic(), key), 0)
            return cls(fds)
        except OSError:
            for fd in fds:
                os.close(fd)
            raise

    @staticmethod
    def made_when(fds: Sequence[int]) -> float:
        """When those that have these file descriptors were made, in seconds of CLOCK_MONOTONIC."""
        made: float = _HEAD.unpack(os.pread(fds[0], _HEAD.size, 0))[0]
        return made

    def settle(self, token: bytes, is_there: Callable[[int], bool]) -> tuple[int, bool]:
        """Find the home of `token`, or become it.

        Returns the process id of the home, and whether that is certain: if not, we are home for the time being, and
        have to ask again. `is_there` says of a process id other than our own whether it is of a worker that can be
        home.
        """
        first = self._first_place_of(token)
        for key in range(first, first + PLACES):
            owner = self._buckets.take(key)
            if owner is None:
                owner = self._buckets.look(key)
            if owner == self._me:
                if key != first:
                    self._note_further(first, key)
                return self._pid, key == first
            if owner and is_there(pid_of(owner)):
                return pid_of(owner), True
        return self._pid, False

    def is_ours(self, token: bytes) -> bool:
        """Whether we are home to `token` for certain, as `settle` would find for twice as much: nobody takes from a
        worker what it is home to."""
        return self._buckets.look(self._first_place_of(token)) == self._me

    def _note_further(self, first: int, key: int) -> None:
        self._further.setdefault(first, set()).add(key)
        _MOMENT.pack_into(self._memory, _LAST_FURTHER, time.monotonic())

    def holder(self, token: bytes) -> int | None:
        """The process id of a worker that is home to `token`, unless it is this one; None if nobody is, as far as
        can be seen from outside: it may change in this moment."""
        first = self._first_place_of(token)
        of_use = PLACES if self._further_are_of_use(time.monotonic()) else 1
        for key in range(first, first + of_use):
            owner = self._buckets.look(key)
            if owner and owner != self._me and self._lives.has(owner):
                return pid_of(owner)
        return None

    def _further_are_of_use(self, now: float) -> bool:
        """Whether places after the first may have an owner: as a rule none has, as long as nobody stands still."""
        last: float = _MOMENT.unpack_from(self._memory, _LAST_FURTHER)[0]
        return now - last < FURTHER_SECONDS

    def give_up(self, token: bytes) -> bool:
        """Be home to `token` no longer; nothing happens if we are not. Returns whether we were so for certain, at its
        first place: then nobody else was, unless somebody has stood still lately."""
        first = self._first_place_of(token)
        was_ours = self._buckets.drop(first)
        if self._further:
            for key in self._further.pop(first, ()):
                self._buckets.drop(key)
        return was_ours

    def match(self, token: bytes, when: float) -> int | None:
        """Tell all workers that two sides were matched for `token`, at `when` in seconds of CLOCK_MONOTONIC, and be
        home to it no longer. Returns what `holder` says then."""
        self._matches.note(self._number_of(token), when)
        self._buckets.fence()
        was_ours = self.give_up(token)
        return None if was_ours and not self._further_are_of_use(when) else self.holder(token)

    def last_match(self, token: bytes) -> float:
        """When any worker last matched two sides for `token`, as far as that is not forgotten; 0 if it is."""
        return self._matches.last(self._number_of(token))

    def close(self) -> None:
        """Be home to nothing any more, and let go of the files."""
        self._buckets.close()
        self._memory.close()
        self._lives.close()
        for fd in self.fds:
            os.close(fd)

    def _first_place_of(self, token: bytes) -> int:
        """The first of the `PLACES` keys, one after the other, that stand for `token` in the table."""
        return self._number_of(token) * PLACES | _NOT_ZERO

    def _number_of(self, token: bytes) -> int:
        """A number below 2**61 that nobody can tell without the key, as in universal hashing (Carter and Wegman, 1979).

        Tokens that differ modulo the prime never share one. Those that do not always do, whatever the key: only who
        knows somebody's token can choose such a one, and could as well come with that token itself."""
        if token != self._last_token:
            self._last_token, self._last_number = token, int.from_bytes(token, "big") * self._key % _PRIME
        return self._last_number


def _memory_file() -> int:
    """A new memfd_create(2) file, of the harmless kind where the kernel knows it: some machines allow no other."""
    try:
        return os.memfd_create("relay-homes", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3
            raise
        return os.memfd_create("relay-homes", os.MFD_CLOEXEC)

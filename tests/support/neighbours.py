"""What tests that run side by side on one machine agree on: whose turn it is, and which ports and user are whose.

They agree by locks on bytes of one file in the folder for temporary files, so that they do across the processes of one
run, and across runs of several checkouts. Such a lock (F_SETLK in fcntl(2)) goes with its process, however that ends,
and is not inherited by what the process starts.

Each process of a run side by side has a turn for each of its tests. An ordinary test's turn is shared with those of its
neighbours; one that is marked `alone` has the machine to itself. Who wants to be alone waits until those that have a
turn have ended, and meanwhile nobody gets one; so nobody waits for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCKS = Path(tempfile.gettempdir()) / "relay-gevent-tests.lock"

# What the bytes of that file stand for.
_TURNSTILE = 0  # who waits for a turn, one at a time
_ROOM = 1  # who has a turn
_NUMBERS = 2  # from here on: who has which number

NUMBERS = 64
"""So many processes may have ports and a user of their own."""

_USERS = 60_706  # from here to 61183 systemd's "Users, Groups, UIDs and GIDs" says: unused


@contextlib.contextmanager
def turn(*, alone: bool) -> Iterator[None]:
    """Wait for a turn, with neighbours or without, and have it for the length of the block."""
    locks: int = _opened(os.getpid())
    fcntl.lockf(locks, fcntl.LOCK_EX, 1, _TURNSTILE)
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, 1, _ROOM)
    finally:
        fcntl.lockf(locks, fcntl.LOCK_UN, 1, _TURNSTILE)
    try:
        yield
    finally:
        fcntl.lockf(locks, fcntl.LOCK_UN, 1, _ROOM)


def own_share(of: range) -> range:
    """Return a part of `of` that no other process of tests on this machine has, for as long as this one lives."""
    return of[_own_number(os.getpid()) :: NUMBERS]


def own_user() -> int:
    """Return the id of a user whom nobody is, nor is another process of tests, for as long as this one lives."""
    return _USERS + _own_number(os.getpid())


@functools.cache
def _own_number(pid: int) -> int:
    """The number of this process, whose id is `pid`; AssertionError when there are more processes than numbers."""
    locks = _opened(pid)
    first = secrets.randbelow(NUMBERS)  # what was another's a moment ago may still be busy
    for number in (*range(first, NUMBERS), *range(first)):
        with contextlib.suppress(BlockingIOError, PermissionError):  # either, says fcntl(2)
            fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _NUMBERS + number)
            return int(number)
    raise AssertionError(f"more than {NUMBERS} processes want ports of their own")


@functools.cache
def _opened(pid: int) -> int:
    """The file, opened once: to close it anywhere in the process would give up all its locks."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with contextlib.suppress(FileExistsError):
        made: int = os.open(LOCKS, flags | os.O_CREAT | os.O_EXCL, 0o666)
        os.fchmod(made, 0o666)  # whatever the umask: another user's tests are neighbours as well
        return made
    return os.open(LOCKS, flags)

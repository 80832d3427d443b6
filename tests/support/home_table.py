"""What the homes' table holds, read as it lies in the memory that the workers share."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from relay.workers.buckets import _BUCKET, _MORE, _OWNER, _STARTS, ROOTS, SLOTS
from relay.workers.homes import _BUCKETS_START, _SIZE
from relay.workers.lives import pid_of
from tests.support.harness import Relay

_WORDS = struct.Struct(f"{_BUCKET // 8}Q")


def entries(fd: int, pid: int, start: int = _BUCKETS_START, size: int = _SIZE) -> int:
    """How many keys the process `pid` owns in the table of a memory file."""
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory:
        return sum(pid_of(owner) == pid for owner in _owners(memory, start))


def buckets_in_use(fd: int, start: int = _BUCKETS_START, size: int = _SIZE) -> int:
    """How many buckets the table has by now."""
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory:
        return sum(1 for _ in _buckets(memory, start))


def _owners(memory: mmap.mmap, start: int) -> Iterator[int]:
    for words in _buckets(memory, start):
        for slot in range(SLOTS):
            if words[slot]:
                yield words[slot + _OWNER]


def _buckets(memory: mmap.mmap, start: int) -> Iterator[tuple[int, ...]]:
    """All that are reached from the roots."""
    reached = [(0, index) for index in range(ROOTS)]
    for level, index in reached:
        words = _WORDS.unpack_from(memory, start + _STARTS[level] + index * _BUCKET)
        yield words
        if words[_MORE]:
            reached += [(level + 1, index * 4 + below) for below in range(4)]


def tokens_of(worker: Relay) -> int:
    """How many tokens a worker of a relay is home to; a token's further places count as well."""
    for link in Path(f"/proc/{worker.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if "relay-homes" in os.readlink(link) and link.stat().st_size == _SIZE:
                fd = os.open(link, os.O_RDWR)
                try:
                    return entries(fd, worker.pid)
                finally:
                    os.close(fd)
    raise AssertionError(f"worker {worker.pid} has no homes")

"""What a worker of a test does for its clients, counted by the worker itself; and how much of it in one go.

    workers.env = counting(tmp_path)            # before they start
    begin_anew(tmp_path, worker.pid)
    ...
    assert work_of(tmp_path, worker.pid).looks < 100

Seconds depend on the machine, those of CPU less than others; how often something is done does not. The worker imports
`sitecustomize` first, as every Python does, and that wraps what is counted.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gevent

from relay.clients.farewell import Farewell
from relay.clients.matching import Matching
from relay.workers.homes import Homes
from relay.workers.household import Household
from tests.support.harness import CHECKOUT

_COUNTS = struct.Struct("=QQd")


class Work(NamedTuple):
    """Since the worker began: how often it looked for a token's home, and for how many clients at the most it did
    something in one iteration of its event loop; and how many seconds of CPU the longest iteration took."""

    looks: int
    most_at_once: int
    longest: float


def counting(folder: Path) -> dict[str, str]:
    """Return the environment for workers that count in `folder`."""
    first = folder / "counting"
    first.mkdir()
    text = f"from tests.support.work_counter import count_here\ncount_here({str(first)!r})\n"
    (first / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": f"{first}:{CHECKOUT}"}


def work_of(folder: Path, pid: int) -> Work:
    """Return what a worker with that environment has counted so far."""
    return Work(*_COUNTS.unpack((folder / "counting" / str(pid)).read_bytes()))


def begin_anew(folder: Path, pid: int) -> None:
    """Let a worker count from 0."""
    with (folder / "counting" / str(pid)).open("r+b") as counts:
        counts.write(bytes(_COUNTS.size))


def count_here(folder: str) -> None:
    """Count in this process from now on."""
    fd = os.open(os.path.join(folder, str(os.getpid())), os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, _COUNTS.size)
    counts = mmap.mmap(fd, _COUNTS.size)
    os.close(fd)
    at_once = 0
    began = 0.0

    def look() -> None:
        something(1)

    def something(looks: int = 0) -> None:
        nonlocal at_once
        at_once += 1
        before, most_at_once, longest = _COUNTS.unpack_from(counts)
        _COUNTS.pack_into(counts, 0, before + looks, max(most_at_once, at_once), longest)

    def next_iteration() -> None:
        nonlocal at_once, began
        now = time.thread_time()
        looks, most_at_once, longest = _COUNTS.unpack_from(counts)
        if began and now - began > longest:
            _COUNTS.pack_into(counts, 0, looks, most_at_once, now - began)
        at_once, began = 0, now

    for way in ("settle", "is_ours"):
        _wrap(Homes, way, look)
    for kind, method in ((Matching, "leave"), (Household, "handed_on"), (Farewell, "close")):
        _wrap(kind, method, something)
    # The loop calls this before it waits for what comes next; the watcher must not be collected.
    count_here.watcher = gevent.get_hub().loop.prepare()  # type: ignore[attr-defined]
    count_here.watcher.start(next_iteration)  # type: ignore[attr-defined]


def _wrap(kind: type, method: str, before: Callable[[], None]) -> None:
    wrapped = getattr(kind, method)

    def counted(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401  # whatever it takes and gives
        before()
        return wrapped(*arguments, **named)

    setattr(kind, method, counted)

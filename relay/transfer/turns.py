"""Whose turn it is to move bytes, and how many.

One thread moves the bytes of all pairs. What a pump moves in one turn is a trade: the more, the cheaper is a gigabyte;
the less, the shorter everybody else waits. So a pump that still has bytes after its turn queues here, and of that queue
one pump goes at a time; between two, the sockets are looked at, and whoever has only a little to move goes first. And
as long as there is somebody who moves only a little, the turns of the others are smaller.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

import gevent

LARGEST_TURN = 1 << 20
"""Bytes a pump moves in a turn; never more, since this also bounds what rests in the relay. Kernel work, too, is dear
in small turns: at 8 pairs a quarter of this costs twice the CPU, for a splice loop in C as well as here."""

CONSIDERATE_TURN = 256 << 10
CONSIDERATE_FOR = 64
"""Bytes a pump moves in a turn instead while somebody has moved only a little in one of the last so many turns."""

SMALLEST_TURN = 128 << 10
"""Bytes a pump moves in a turn however many are busy."""

ROUND_BYTES = 256 << 20
"""Once so many pumps are busy that they would move more than this in a round, their turns become smaller. What bounds
the others' wait is not the round, since only one pump of it goes at a time, but busy pairs wait for each other."""


class Turns:
    """The queue of the pumps that have more to move, and the bytes that all pumps have moved."""

    def __init__(self) -> None:
        self.moved = 0
        """Bytes that all pumps of this process have moved since it started."""
        self._considerate = 0
        self._hub = gevent.get_hub()
        self._queue: deque[Any] = deque()
        self._timer = self._hub.loop.timer(0.0)

    def busy(self) -> bool:
        """Whether a pump waits for its turn."""
        return bool(self._queue)

    def size(self) -> int:
        """Bytes that a pump may move in the turn it is about to have."""
        if self._considerate:
            self._considerate -= 1
            largest = CONSIDERATE_TURN
        else:
            largest = LARGEST_TURN
        return min(largest, max(SMALLEST_TURN, ROUND_BYTES // (len(self._queue) + 1)))

    def moved_little(self) -> None:
        """A pump has moved only a little, and its source has no more: bytes that somebody waits for, perhaps."""
        self._considerate = CONSIDERATE_FOR

    def wait(self) -> None:
        """Let the event loop look at all sockets, and the pumps go that have queued before the calling greenlet."""
        pump = gevent.getcurrent()
        self._queue.append(pump)
        if len(self._queue) == 1:
            self._timer.start(self._next, update=False)
        try:
            self._hub.switch()
        except BaseException:  # this greenlet is being ended, it must not be switched to any more
            with contextlib.suppress(ValueError):  # its turn may have come in the same iteration of the loop
                self._queue.remove(pump)
            raise

    def _next(self) -> None:
        """Runs in the hub, once per iteration of the loop while somebody queues."""
        self._timer.stop()
        if not self._queue:
            return
        pump = self._queue.popleft()
        if self._queue:
            self._timer.start(self._next, update=False)
        # Behind those that this iteration has woken: they have waited for input, and most of them move little.
        self._hub.loop.run_callback(pump.switch)

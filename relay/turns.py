"""Whose turn it is to move bytes, and how many.

One thread moves the bytes of all pairs. What a pump moves in one turn is a trade: the more, the fewer turns (and so
Python) a gigabyte takes; the less, the shorter everybody else waits. So a pump that still has bytes after its turn
queues here, and of that queue one pump goes at a time; between two, the sockets are looked at, and whoever has only a
little to move goes first.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import gevent

LARGEST_TURN = 1 << 20
"""Bytes a pump moves in a turn when nobody else is busy; never more, since this also bounds what rests in the relay."""

SMALLEST_TURN = 256 << 10
"""Bytes a pump moves in a turn however many are busy."""


class Turns:
    """The queue of the pumps that have more to move, and the bytes that all pumps have moved."""

    def __init__(self) -> None:
        self.moved = 0
        """Bytes that all pumps of this process have moved since it started."""
        self._hub = gevent.get_hub()
        self._queue: deque[Any] = deque()
        self._timer = self._hub.loop.timer(0.0)

    def size(self) -> int:
        """Bytes that a pump may move in the turn it is about to have: its share of what one pump alone may move."""
        return max(SMALLEST_TURN, LARGEST_TURN // (len(self._queue) + 1))

    def wait(self) -> None:
        """Let the event loop look at all sockets, and the pumps go that have queued before the calling greenlet."""
        pump = gevent.getcurrent()
        self._queue.append(pump)
        if len(self._queue) == 1:
            self._timer.start(self._next, update=False)
        try:
            self._hub.switch()
        except BaseException:  # this greenlet is being ended, it must not be switched to any more
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
        pump.switch()

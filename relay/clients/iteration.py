"""What an iteration of the event loop does for clients without a partner, and what waits for the next one.

Thousands may leave, or say something, in the same moment, and the event loop would call for each of them before it
looks after anybody else. But what is readable now is so in the next iteration, too: so who is called when it has been
long enough returns, and is called again.
"""

from __future__ import annotations

import time

from relay.clients.client import EventLoop

SLICE_SECONDS = 0.0015


class Iteration:
    """How long the present iteration of an event loop has been busy with those who ask here."""

    def __init__(self, loop: EventLoop) -> None:
        self._now = loop.now
        self._began = 0.0
        self._until = 0.0

    def is_over(self) -> bool:
        """Whether whoever is called should wait for the next iteration; False for the first in each."""
        began = self._now()  # the loop's own time, which stands still during an iteration
        if began != self._began:
            self._began = began
            self._until = time.monotonic() + SLICE_SECONDS
            return False
        return time.monotonic() >= self._until

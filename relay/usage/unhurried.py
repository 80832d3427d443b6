"""Lines for the relay's log that do not say when: with `--blur-usage`, what happens to records is told later.

A trouble shows when a record is to be written, so when a connection ends; the time of the line would be the time of
that. So lines are passed on only at moments that were fixed when the relay started, each telling of all since the last.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Final

from relay.usage.writer import Warn

LEAST_SECONDS: Final = 60.0
MOST_SECONDS: Final = 600.0
"""A line comes at most so late, however coarse the blur: an operator has to know that the disk is full."""


MOST_LINES: Final = 50
"""Lines of one moment that are passed on, from its first and as many from its last; those in between, as when a disk is
full and not full many times a second, are counted."""


class Unhurried:
    """Takes lines at any time, on any thread, and passes them on every so often.

    Args:
        warn: writes a line to the log.
        blur_seconds: as `--blur-usage` has it: lines come so far apart, within the limits above.
    """

    def __init__(self, warn: Warn, blur_seconds: int) -> None:
        self._warn = warn
        self._seconds = min(max(LEAST_SECONDS, float(blur_seconds)), MOST_SECONDS)
        self._began = time.monotonic()
        self._lines: list[str] = []
        self._latest: deque[str] = deque(maxlen=MOST_LINES)  # of those that come after so many
        self._further = 0
        self._timer: threading.Timer | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __call__(self, line: str) -> None:
        """Keep a line until the next moment."""
        with self._lock:
            if len(self._lines) < MOST_LINES:
                self._lines.append(line)
            else:
                self._latest.append(line)
                self._further += 1
            if self._timer is None and not self._closed:
                passed = (time.monotonic() - self._began) % self._seconds
                timer = threading.Timer(self._seconds - passed, self._pass_on)
                timer.daemon = True
                with contextlib.suppress(RuntimeError, MemoryError):  # no thread is to be had: with a later line
                    timer.start()
                    self._timer = timer
        if self._closed:
            self._pass_on()

    def _pass_on(self) -> None:
        with self._lock:
            left_out = self._further - len(self._latest)
            between = [f"{left_out} further lines about trouble with recording are left out"] if left_out else []
            lines = [*self._lines, *between, *self._latest]
            self._lines, self._further = [], 0
            self._latest.clear()
            self._timer = None
        for line in lines:
            self._warn(line)

    def close(self) -> None:
        """Pass on what is left, and whatever comes yet at once."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
        self._pass_on()

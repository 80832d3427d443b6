"""Lines for the relay's log that do not say when: with `--blur-usage`, what happens to records is told later.

A trouble shows when a record is to be written, so when a connection ends; the time of the line would be the time of
that. So lines are passed on only at moments that were fixed when the relay started, each telling of all since the last.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from relay.usage.writer import Warn

LEAST_SECONDS: Final = 60.0
MOST_SECONDS: Final = 600.0
"""A line comes at most so late, however coarse the blur: an operator has to know that the disk is full."""


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
        self._timer: threading.Timer | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __call__(self, line: str) -> None:
        """Keep a line until the next moment."""
        with self._lock:
            self._lines.append(line)
            if self._timer is None and not self._closed:
                passed = (time.monotonic() - self._began) % self._seconds
                self._timer = threading.Timer(self._seconds - passed, self._pass_on)
                self._timer.daemon = True
                self._timer.start()
        if self._closed:
            self._pass_on()

    def _pass_on(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
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

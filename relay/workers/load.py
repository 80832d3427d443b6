"""How much of a processor the event loop would use, if it had one to itself."""

from __future__ import annotations

import time

FULL_LOAD = 1.0
"""The load of a worker that should not get more."""


class Load:
    """The load from one time it is asked for to the next."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._wanted = _wanted_seconds()

    def lately(self) -> float:
        """The part of the time, 0 to 1 or a little more, in which the event loop ran or waited for a processor."""
        since, wanted = self._since, self._wanted
        self._since, self._wanted = time.monotonic(), _wanted_seconds()
        return (self._wanted - wanted) / max(self._since - since, 1e-3)


def _wanted_seconds() -> float:
    """Since the process began. On a machine that others use, too, a saturated process does not get a whole processor;
    so what it had to wait for one counts as well (the kernel's Documentation/scheduler/sched-stats.rst)."""
    try:
        with open("/proc/self/schedstat", encoding="ascii") as schedstat:  # of the first thread, which has the loop
            ran, waited, _ = schedstat.read().split()
        return (int(ran) + int(waited)) / 1e9
    except (OSError, ValueError):  # a kernel that does not count it
        return time.process_time()

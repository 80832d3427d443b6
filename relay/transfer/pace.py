"""How fast bytes may be moved where the operator has set a rate: pure, the clock is the caller's.

Whoever wants to move bytes reserves them and is told how long to wait first. Reservations are kept in the order in
which they are made, and each is for no more than a moment's worth; so all who share a pace get the same of it.
(This is the generic cell rate algorithm, ITU-T I.371, with bytes for cells.)
"""

from __future__ import annotations

MOMENT = 0.05
"""Seconds: what is reserved at a time is at most what may be moved in this, and a pace is never further ahead."""

LEAST_BYTES = 512
"""Nobody reserves less, however slow the pace; system calls for single bytes would be a waste."""


ROUND = 0.5
"""Seconds in which everybody who shares a pace has had a portion, as far as `LEAST_BYTES` allows that."""


class Pace:
    """A rate in bytes a second, which `sharers` share."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.sharers = 1
        self._free_at = 0.0

    def portion(self) -> int:
        """How many bytes to reserve at a time."""
        return max(LEAST_BYTES, int(self.rate * min(MOMENT, ROUND / self.sharers)))

    def reserve(self, size: int, now: float) -> float:
        """Reserve `size` bytes; returns the seconds to wait before they may be moved."""
        starts = max(self._free_at, now)
        self._free_at = starts + size / self.rate
        return starts - now

    def give_back(self, size: int) -> None:
        """Give back `size` reserved bytes that were not moved."""
        self._free_at -= size / self.rate

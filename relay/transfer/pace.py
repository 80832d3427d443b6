"""How fast bytes may be moved where the operator has set a rate: pure, the clock is the caller's.

Whoever wants to move bytes does so when the pace holds nobody back, at most a portion at a time, and what it has moved
is charged. Until that time has passed the pace holds everybody back. (This is the generic cell rate algorithm, ITU-T
I.371, with bytes for cells.) Those whom it holds back stand in a line, and nothing is reserved for them before it is
their turn: what somebody might want and does not have takes nothing from the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

MOMENT = 0.05
"""Seconds: what is reserved at a time is at most what may be moved in this, and a pace is never further ahead."""

LEAST_BYTES = 512
"""Nobody reserves less, however slow the pace; system calls for single bytes would be a waste."""


ROUND = 0.5
"""Seconds in which everybody who shares a pace has had a portion, as far as `LEAST_BYTES` allows that."""

SLACK = 0.002
"""Seconds that a pace may be ahead and hold nobody back yet: waiting for less costs more time than it takes, and a rate
that is higher than what is moved would be felt."""

Who = TypeVar("Who", bound=Hashable)


class Pace:
    """A rate in bytes a second, which `sharers` share at the moment."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.sharers = 1
        self._free_at = 0.0

    def portion(self) -> int:
        """How many bytes to reserve at a time."""
        return max(LEAST_BYTES, int(self.rate * min(MOMENT, ROUND / self.sharers)))

    def holds_back(self, now: float) -> bool:
        """Whether nothing may be moved yet."""
        return self._free_at > now + SLACK

    def free_in(self, now: float) -> float:
        """Seconds until it holds nobody back; 0 if it does not."""
        return max(0.0, self._free_at - SLACK - now)

    def reserve(self, size: int, now: float) -> float:
        """Reserve `size` bytes; returns the seconds to wait before they may be moved.

        Time that nobody has used before `now` is lost; who has waited, and comes late, says an earlier one.
        """
        starts = max(self._free_at, now)
        self._free_at = starts + size / self.rate
        return starts - now

    def give_back(self, size: int) -> None:
        """Give back `size` reserved bytes that were not moved."""
        self._free_at -= size / self.rate


class Line(Generic[Who]):
    """Those whom a pace holds back, in the order in which they have come."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._waiting: OrderedDict[Who, Callable[[], int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def holds_back(self, now: float) -> bool:
        """Whether somebody who comes now has to join."""
        return bool(self._waiting) or self.pace.holds_back(now)

    def join(self, who: Who, has: Callable[[], int]) -> None:
        """Put `who` at the end; `has` is asked, when it is its turn, how many bytes there are to move."""
        self._waiting[who] = has
        self.pace.sharers = len(self._waiting)

    def leave(self, who: Who) -> None:
        """`who` waits no more; nothing happens if it does not."""
        self._waiting.pop(who, None)
        self.pace.sharers = max(1, len(self._waiting))

    def take_due(self, now: float) -> Iterator[tuple[Who, int]]:
        """Those whose turn it is, and how many bytes were reserved for each; they stand here no more."""
        while self._waiting and not self.pace.holds_back(now):
            who, has = self._waiting.popitem(last=False)
            size = min(self.pace.portion(), max(LEAST_BYTES, has()))
            # They have waited, so that it is late now is nobody's loss; but what was long ago is not saved up.
            self.pace.reserve(size, now - MOMENT)
            self.pace.sharers = max(1, len(self._waiting))
            yield who, size

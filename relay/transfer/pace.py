"""How fast bytes may be moved where the operator has set a rate: pure, the clock is the caller's.

Whoever wants to move bytes does so when the pace holds nobody back, at most a portion at a time, and what it has moved
is charged. Until that time has passed the pace holds everybody back. (This is the generic cell rate algorithm, ITU-T
I.371, with bytes for cells.) Those whom it holds back stand in a line, and nothing is reserved for them before it is
their turn: what somebody might want and does not have takes nothing from the others. Who has only a little goes first,
as it does wherever a relay shares something.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import chain, islice, repeat
from typing import Generic, TypeVar

MOMENT = 0.05
"""Seconds: what is reserved at a time of a pace that is shared is at most what may be moved in this."""

WORTHWHILE_BYTES = 64 << 10
"""Of a pace that nobody shares so much is reserved at a time, or what may be moved in a `ROUND`: there a small portion
would be nobody's gain, and to wait for one costs the same, however small."""

LEAST_BYTES = 512
"""Nobody reserves less, however slow the pace; system calls for single bytes would be a waste."""


ROUND = 0.5
"""Seconds in which everybody in a line has had a portion, as far as `LEAST_BYTES` allows that."""

SLACK = 0.002
"""Seconds that a pace may be ahead and hold nobody back yet: waiting for less costs more time than it takes, and a rate
that is higher than what is moved would be felt."""

LOOKED_AT = 500
"""Of those in a line, the first so many are asked what they have, and the others taken to have as much: it is done anew
in every moment, and so before these come to their turn."""

LITTLE_BYTES = 4 << 10
LITTLE = 0.5
"""Who has no more than that goes before those in the line, as long as all these together move no more than such a part
of the rate."""

PARTS = 16
"""How finely workers tell what is wanted of a rate that they share: in such parts of an equal one."""

Who = TypeVar("Who", bound=Hashable)


class Pace:
    """A rate in bytes a second."""

    __slots__ = ("_free_at", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._free_at = 0.0

    def portion(self) -> int:
        """How many bytes to reserve at a time."""
        return max(LEAST_BYTES, int(self.rate * MOMENT))

    def portion_alone(self) -> int:
        """The same for a pace that nobody shares."""
        return max(self.portion(), min(WORTHWHILE_BYTES, int(self.rate * ROUND)))

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
        self._portion = 0
        self._portion_until = -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def holds_back(self, now: float) -> bool:
        """Whether somebody who comes now has to join."""
        return bool(self._waiting) or self.pace.holds_back(now)

    def join(self, who: Who, has: Callable[[], int]) -> None:
        """Put `who` at the end; `has` is asked, when it is its turn, how many bytes there are to move."""
        self._waiting[who] = has

    def leave(self, who: Who) -> None:
        """`who` waits no more; nothing happens if it does not."""
        self._waiting.pop(who, None)

    def ask_all(self) -> Iterator[tuple[Who, float]]:
        """All of them, and how many bytes each has to move; after the first `LOOKED_AT`, as many as these on the
        average."""
        sizes = [has() for has in islice(self._waiting.values(), LOOKED_AT)]
        return zip(self._waiting, chain(sizes, repeat(sum(sizes) / max(1, len(sizes)))), strict=False)

    def take_due(self, now: float) -> Iterator[tuple[Who, int]]:
        """Those whose turn it is, and how many bytes are reserved for each; unless something goes wrong with that, they
        stand here no more."""
        while self._waiting and not self.pace.holds_back(now):
            if now >= self._portion_until:
                self._portion, self._portion_until = self._find_portion(), now + MOMENT
            who, has = next(iter(self._waiting.items()))
            size = min(self._portion, max(LEAST_BYTES, has()))
            yield who, size
            # They have waited, so that it is late now is nobody's loss; but what was long ago is not saved up.
            self.pace.reserve(size, now - MOMENT)
            del self._waiting[who]

    def _find_portion(self) -> int:
        """How many bytes everybody may have, so that all of them have had what they have, or as much, in a round."""
        first = sorted(max(LEAST_BYTES, has()) for has in islice(self._waiting.values(), LOOKED_AT))
        left = self.pace.rate * ROUND * len(first) / len(self._waiting)
        for number, size in enumerate(first):
            share = left / (len(first) - number)
            if size > share:
                return min(self.pace.portion(), max(LEAST_BYTES, int(share)))
            left -= size
        return self.pace.portion()

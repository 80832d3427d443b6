"""Who has to be done by when: pure, driven by whoever has the clock.

Thousands of clients wait at a time and each has a deadline, but next to none is ever met. A timer each would cost more
memory than the client itself, so deadlines are kept by the second: one set for each second in which somebody is due.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Due(Protocol):
    """Somebody with a deadline; the slot belongs to `Deadlines`."""

    due: int


D = TypeVar("D", bound=Due)


class Deadlines(Generic[D]):
    """Deadlines in whole seconds of a monotonic clock; nobody is due before its deadline, or over a second after it."""

    def __init__(self) -> None:
        self._by_second: dict[int, set[D]] = {}

    def __iter__(self) -> Iterator[D]:
        """Everybody who has a deadline, in no order; deadlines may change while the caller goes through them."""
        return iter([somebody for due in self._by_second.values() for somebody in due])

    def set(self, somebody: D, when: float) -> None:
        """Give `somebody` the deadline `when` (seconds), in place of any other."""
        self.clear(somebody)
        somebody.due = math.ceil(when)
        self._by_second.setdefault(somebody.due, set()).add(somebody)

    def clear(self, somebody: D) -> None:
        """Take the deadline of `somebody` away; nothing happens when it has none."""
        due = self._by_second.get(somebody.due)
        if due is not None:
            due.discard(somebody)
            if not due:
                del self._by_second[somebody.due]

    def take_due(self, now: float) -> Iterator[D]:
        """Everybody whose deadline has come at `now` (seconds), the most overdue first; each has none from then on.
        Deadlines may change while the caller goes through them: whoever's is cleared does not come."""
        for second in sorted(second for second in self._by_second if second <= now):
            while due := self._by_second.get(second):
                somebody = due.pop()
                if not due:
                    del self._by_second[second]
                yield somebody

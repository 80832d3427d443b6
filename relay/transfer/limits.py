"""What the operator allows to a pair, and turns that keep to it."""

from __future__ import annotations

import time

import gevent

from relay.clients.bounds import Bound
from relay.process.dataclass import dataclass
from relay.transfer.ending import Pumps
from relay.transfer.pace import Pace
from relay.transfer.turns import Turns


class Cut(gevent.GreenletExit):  # type: ignore[misc]  # gevent has no types
    """Ends a pair that has met a bound of the operator's."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self.bound = bound


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows to a pair, in bytes and bytes a second; None is no limit. `relay_pace` is shared."""

    pair_bytes: int | None = None
    pair_rate: int | None = None
    relay_pace: Pace | None = None


class Allowance:
    """What is left to one pair of its `limits`."""

    def __init__(self, limits: Limits) -> None:
        self._since = time.monotonic()
        self._pair_bytes = limits.pair_bytes
        own = None if limits.pair_rate is None else Pace(limits.pair_rate)
        self.held_back = 0.0
        """Seconds for which its bytes have waited for these."""
        self._paces = [pace for pace in (own, limits.relay_pace) if pace is not None]

    def part_held_back(self) -> float:
        """`held_back`, of the time since this began to count; from 0 to 1."""
        return min(1.0, self.held_back / max(time.monotonic() - self._since, 1e-3))

    def turn(self, pumps: Pumps, which: int, turns: Turns) -> None:
        """Give one of the pumps a turn that keeps to the limits; waits for that, in its pair's greenlet.

        Raises Cut when they allow none any more, and OSError as the pump does.
        """
        pump = pumps[which]
        most = min([turns.size(), *(pace.portion() for pace in self._paces)])
        if self._pair_bytes is not None:
            most = min(most, self._pair_bytes - sum(pump.moved + pump.held for pump in pumps))
            if most <= 0 and not pump.untaken:
                harmless = pump.without_payload()  # it was exactly what is allowed, and its end is no byte
                if harmless is None:
                    raise Cut(Bound.PAIR_BYTES)
                most = harmless
        now = time.monotonic()
        delay = max((pace.reserve(most, now) for pace in self._paces), default=0.0)
        before = pump.moved + pump.held
        try:
            if delay > 0:
                self.held_back += delay
                gevent.sleep(delay)
            pump.turn(most)
        finally:
            unused = most - (pump.moved + pump.held - before)
            for pace in self._paces:
                pace.give_back(unused)

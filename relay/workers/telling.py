"""What this worker tells the database of itself, and when: not at all while nothing happens.

How many pairs there are and how many wait is told within a second; everything else, such as the bytes of a transfer
that goes on, every five seconds while something moves or has changed, and once more afterwards, so that what is told
last is how it stays. Whoever looks at the relay live (`relay.status`) reads it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import gevent

from relay.clients.bounds import Bound, BoundsMet
from relay.clients.farewell import Farewell
from relay.clients.matching import Matching
from relay.clients.places import Places
from relay.clients.reception import Reception
from relay.transfer.pairs import Pairs
from relay.transfer.slices import in_slices
from relay.usage.told import Description
from relay.workers.load import Load

EVERY_SECONDS: Final = 4.5
"""Asked once a second, so this is every five."""


LEAST_LOAD_SECONDS: Final = 0.5
"""Over less than this, a load says little."""


class Telling:
    """Watches the parts of a worker, and has them told.

    Args:
        places, reception, matching, farewell, pairs, bounds_met: what there is to tell of.
        kept: returns how many records have waited for the JSON lines for longer than a moment.
        silent: returns how many siblings live and do not answer.
        refresh: has the database written, on another thread, which asks for `described`.
    """

    def __init__(
        self,
        *,
        places: Places,
        reception: Reception,
        matching: Matching,
        farewell: Farewell,
        pairs: Pairs,
        bounds_met: BoundsMet,
        kept: Callable[[], int],
        silent: Callable[[], int],
        refresh: Callable[[], None],
    ) -> None:
        self._places = places
        self._reception = reception
        self._matching = matching
        self._farewell = farewell
        self._pairs = pairs
        self._bounds_met = bounds_met
        self._kept = kept
        self._silent = silent
        self._refresh = refresh
        self._load: Load | None = None
        """From the first second on: what it takes to start is no load."""
        self._load_at = self._load_lately = 0.0
        self._records = 0
        self._told: tuple[int, int] | None = None
        self._state: tuple[int, ...] = ()
        self._settled = False
        self._told_at = float("-inf")
        self._greenlet: gevent.Greenlet | None = None
        pairs.load = lambda: self.described.gauges["load"]
        self.described = self._describe()
        """Replaced as a whole; read on any thread."""

    def recorded(self) -> None:
        """A record was queued. With it goes how many pairs there are then."""
        self._records += 1
        if self._told is not None:
            self._told = self._counts()

    def forget(self) -> None:
        """What was told may not be what is written: tell it again soon."""
        self._told = None

    def every_second(self, now: float) -> None:
        """Tell what is to be told; `now` in monotonic seconds."""
        state = self._state_now()
        if self._load is None:
            self._load = Load()
            self._load_at = now
        if self._counts() == self._told and (
            now - self._told_at < EVERY_SECONDS or (state == self._state and self._settled)
        ):
            return
        if self._greenlet:  # still counting: it tells what there is then
            return
        self._settled = state == self._state
        self._state = state
        self._told = self._counts()
        self._told_at = now
        self._greenlet = gevent.spawn(self._tell)

    def _tell(self) -> None:
        for _ in in_slices(self._pairs.count()):
            pass
        self.described = self._describe()
        self._refresh()

    def close(self) -> None:
        """Describe the worker once more, when nothing is left in it; the last thing that is written is this."""
        if self._greenlet is not None:
            self._greenlet.kill()
        for _ in self._pairs.count():
            pass
        self.described = self._describe()

    def _counts(self) -> tuple[int, int]:
        return len(self._pairs), len(self._matching)

    def _state_now(self) -> tuple[int, ...]:
        """What differs when something has happened; the load alone is nothing that has."""
        return (
            self._pairs.turns.moved,
            self._places.taken,
            len(self._reception),
            self._records,
            sum(self._farewell.turned_away.values()),
            sum(self._bounds_met.ever.values()),
            self._kept(),
            self._silent(),
        )

    def _describe(self) -> Description:
        now = time.monotonic()
        if self._load is not None and now - self._load_at >= LEAST_LOAD_SECONDS:
            self._load_lately, self._load_at = self._load.lately(), now
        gauges = {
            "connections": self._places.taken,
            "connections_limit": self._places.most,
            "load": round(self._load_lately, 3),
            "handshakes": len(self._reception),
            "held_bytes": self._pairs.held_bytes,
            "kept_records": self._kept(),
            "silent_siblings": self._silent(),
        }
        counters = {"bytes": self._pairs.counted}
        counters |= {f"refused.{kind}": count for kind, count in self._farewell.turned_away.items()}
        counters |= {f"bound.{bound.name.lower()}": self._bounds_met.ever[bound] for bound in Bound}
        if self._pairs.paths is not None:
            counters |= self._pairs.paths.counters()
        return Description(gauges, counters)

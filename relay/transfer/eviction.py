"""Who gives way when there is no place for newcomers.

What waits, and what is paired, may do so for hours without a byte; so whoever takes all places once would keep
everybody out for as long. Instead, when all are taken and somebody stands at the door, connections are ended that have
been idle for a while: first of the source that has the most, and of those the most idle. Who moves something is never
ended for that, and who has few connections comes last. A machine that has an IPv4 and an IPv6 address is two sources,
and a thousand machines are a thousand: it is the same for them.

All connections are looked through once, in slices, whenever it is needed; so it costs nothing while there are places.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import gevent

from relay.clients.bounds import Bound
from relay.clients.client import Client
from relay.clients.matching import Matching
from relay.clients.places import Places
from relay.transfer.pair import Pair
from relay.transfer.pairs import Pairs

IDLE_SECONDS = 5.0
"""Nobody gives way who has done something within this time."""

PART_AT_A_TIME = 64
LEAST_AT_A_TIME = 16
"""In one look, at most so small a part of all places is made free, but so many at the least."""

SLICE_SECONDS = 0.001
"""How long the look goes on before everybody else gets their turn."""

Candidate: TypeAlias = tuple[int, float, int, Client | Pair]
"""How many connections its source has, how long it has been idle, a number to tell equals apart, and who it is."""


class Eviction:
    """Makes places free.

    Args:
        places: which are taken, and by whom.
        matching, pairs: those who have them.
        is_awaited: whether somebody stands at the door. If that is so in one second and in the next, no other worker
            has a place either.
    """

    def __init__(self, places: Places, matching: Matching, pairs: Pairs, is_awaited: Callable[[], bool]) -> None:
        self._places = places
        self._matching = matching
        self._pairs = pairs
        self._is_awaited = is_awaited
        self._was_awaited = False
        self._look: gevent.Greenlet | None = None

    def every_second(self) -> None:
        """Look for somebody who gives way, if it has come to that."""
        was_awaited, self._was_awaited = self._was_awaited, self._places.is_full() and self._is_awaited()
        if self._was_awaited and was_awaited and not self._look:
            self._look = gevent.spawn(self._make_room)

    def close(self) -> None:
        """Look no more."""
        if self._look is not None:
            gevent.kill(self._look)

    def _make_room(self) -> None:
        found = sorted(self._candidates(), key=lambda candidate: candidate[:3], reverse=True)
        wanted = max(LEAST_AT_A_TIME, self._places.most // PART_AT_A_TIME)
        freed = 0
        for _, _, _, who in found:
            if freed >= wanted:
                return
            freed += self._end(who)

    def _candidates(self) -> Iterator[Candidate]:
        """Everybody who may have to give way; lets others have their turn now and then."""
        until = time.monotonic() + SLICE_SECONDS
        for number, who in enumerate([*self._matching, *self._pairs]):
            now = time.monotonic()
            if now > until:
                gevent.sleep(0)
                now = time.monotonic()
                until = now + SLICE_SECONDS
            idle = _idle(who, now)
            if idle >= IDLE_SECONDS:
                yield self._heaviest_source_of(who), idle, number, who

    def _heaviest_source_of(self, who: Client | Pair) -> int:
        sources = who.sources if isinstance(who, Pair) else (who.source,)
        return max(self._places.count_of(source) for source in sources)

    def _end(self, who: Client | Pair) -> int:
        """End a connection, or the two of a pair, unless it has ended or done something meanwhile; returns how many
        places that gave."""
        if _idle(who, time.monotonic()) < IDLE_SECONDS:
            return 0
        if isinstance(who, Pair):
            if who not in self._pairs:
                return 0
            who.cut(Bound.PLACES)
            return 2
        if who not in self._matching:
            return 0
        self._places.bounds_met.note(Bound.PLACES)
        self._matching.evict(who)
        return 1


def _idle(who: Client | Pair, now: float) -> float:
    """For how long somebody has done nothing, in seconds."""
    return who.idle_for(now) if isinstance(who, Pair) else now - who.asked

"""Who gives way when there is no place for newcomers.

What waits, and what is paired, may do so for hours without a byte; so whoever takes all places once would keep
everybody out for as long. Instead, when all are taken and somebody stands at the door, each newcomer is let in, and
somebody is ended for it:

- first of all those who have been sent away, and only linger so that this arrives (`farewell`), and those who take
  nothing of what is left of a transfer that is over (`arrears`): at once, whosesoever, and for anybody;
- then of the sources that have the most. They are told apart by how many times `FEW` they have, to a factor of two. The
  networks of one site have it together. Within the site those of them that have about the same number are a crowd, and
  of these the one that has the most together comes first (see `sites`), as it was at the last look;
- of those, whoever has been idle longest, and for `IDLE_SECONDS` at the least. A transfer is idle as long as no more
  than `LITTLE_BYTES` of it have arrived: otherwise a byte now and then would keep a place. Who moves more is never
  ended, nor who would, and waits for a rate of the operator's most of the time;
- but a source that has many (see `MANY_OF`) is one of a few that have it all. What it has need only have been idle for
  `BRIEF_SECONDS`: otherwise it would keep its places by coming back every few seconds;
- and a newcomer is turned away when only smaller sources than its own have anybody idle, or others of the same size. So
  who fills the relay with what moves cannot drive out those who wait. Of its own, half of the idle may give way to it:
  the other half is kept for smaller ones, which might never be served if those who come back all the time had all. But
  a source that has `MOST_OF` is a proxy: it gets it all, and that it has many does not matter.

Who comes through a proxy is a newcomer once the proxy has said whose it is, and not before: until then nobody gives way
to it, and it is one more than there are places (`origins`).

A machine that has an IPv4 and an IPv6 address is two sources, and a thousand machines are a thousand: it is the same
for them, and none of them keeps a place with little. Each of this machine's own connections, which nobody counts, is
like one of a small source.

All connections are looked through, in slices, when it has come to that, and what is found serves for many newcomers. So
it costs nothing while there are places, and the same for each newcomer, however many connections there are, when not.
What each transfer had moved is only known since the first of these looks: so it is looked again soon, until that says
something.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from heapq import heappop, heapreplace, nsmallest
from itertools import chain
from typing import TypeAlias

import gevent

from relay.clients.bounds import FEW, Bound, rank_of
from relay.clients.client import Client
from relay.clients.farewell import Farewell
from relay.clients.matching import Matching
from relay.clients.places import Places
from relay.clients.reception import Reception
from relay.clients.sources import site_of
from relay.transfer.lumps import IDLE_SECONDS, LITTLE_BYTES
from relay.transfer.pair import Pair
from relay.transfer.pairs import Pairs
from relay.transfer.slices import in_slices

BRIEF_SECONDS = 1.0

MANY_OF = 64
"""A source has many when it has more than a few connections and such a part of all places."""

MOST_OF_TIME = 0.5
"""Who has waited for a rate for more than such a part of the time wants to move more than little. A rate that holds
back the few bytes of a moment says nothing."""

RANKS = 64
"""More than a number of connections has bits."""

MOST_OF = 3
"""A source has most when it has such a part of all places. None has, unless the operator allows it."""

LEAST_FOUND = 256
FOUND_OF = 16
"""What a look finds: at most such a part of all places, and so many at the least."""

GOOD_SECONDS = 30.0
"""How long what a look has found is good for. It is checked again when it is used, but there may be others by then."""

PAUSE = 20
"""How many times as long as a look took the next one has to wait: when everything moves, it would find nobody again."""

Idler: TypeAlias = tuple[int, float, int, Client | Pair]
"""The rank of its source, how long it has been idle, both negative, so that the first of a heap is the first to go; a
number to tell equals apart, and who it is."""

Past: TypeAlias = tuple[int, float, float]
"""What a transfer had moved and how long it had been held back by a rate, and when that was."""


class Eviction:
    """Has somebody give way to newcomers: it is what `Places.makes_room` asks.

    Args:
        places: which are taken, and by whom.
        farewell, reception, matching, pairs: those who have them.
        is_awaited: whether somebody stands at the door.
        is_room_elsewhere: whether another worker has a place.
        on_ready: called when somebody has been found who would give way.
    """

    def __init__(
        self,
        places: Places,
        farewell: Farewell,
        reception: Reception,
        matching: Matching,
        pairs: Pairs,
        *,
        is_awaited: Callable[[], bool],
        is_room_elsewhere: Callable[[], bool],
        on_ready: Callable[[], None],
    ) -> None:
        self._places = places
        self._farewell = farewell
        self._reception = reception
        self._matching = matching
        self._pairs = pairs
        self._is_awaited = is_awaited
        self._is_room_elsewhere = is_room_elsewhere
        self._on_ready = on_ready
        self._many = max(FEW, places.most // MANY_OF)
        self._most = places.most // MOST_OF
        self._found: list[Idler] = []
        self._found_of: dict[bytes | None, list[Idler]] = {}
        self._crowds: dict[bytes, dict[int, int]] = {}
        self._found_at = 0.0
        self._pasts: dict[Pair, Past] = {}
        self._pasts_begin = 0.0
        self._look_again_at = 0.0
        self._was_crowded = False
        self._has_served = False
        self._look: gevent.Greenlet | None = None
        places.makes_room = self._make_room

    def is_ready(self) -> bool:
        """Whether newcomers may be let in though all places are taken, since somebody would give way, and not to those
        who are here already and as good as named."""
        now = time.monotonic()
        waiting = self._reception.unnamed_within(BRIEF_SECONDS, now)
        over = self._farewell.lingering + self._pairs.arrears.still()
        if waiting >= over + len(self._found) or self._is_room_elsewhere():
            return False
        if over:
            return True
        return now < self._found_at + GOOD_SECONDS and self._first(self._found) is not None

    def every_second(self) -> None:
        """Look for those who would give way, if it has come to that."""
        was_crowded, self._was_crowded = self._was_crowded, self._is_crowded()
        self._has_served = False
        now = time.monotonic()
        age = now - self._found_at
        if age > GOOD_SECONDS:
            self._found.clear()
            self._found_of.clear()
            self._crowds.clear()
            self._pasts.clear()
            self._pasts_begin = now
        if self._places.is_full() and self.is_ready():
            self._on_ready()  # whom somebody unnamed kept from being let in
        is_early = self._found_at <= self._pasts_begin + IDLE_SECONDS
        is_useful = (not self._found or is_early or age > GOOD_SECONDS / 2) and now >= self._look_again_at
        # To be crowded once may be a moment in which the door is just about to be opened.
        if self._was_crowded and was_crowded and is_useful and not self._look:
            self._look = gevent.spawn(self._look_around)

    def _is_crowded(self) -> bool:
        if not self._places.is_full() or self._is_room_elsewhere():
            return False
        return self._has_served or self._is_awaited()

    def close(self) -> None:
        """Look no more."""
        if self._look is not None:
            gevent.kill(self._look)

    # Finding

    def _look_around(self) -> None:
        began = time.monotonic()
        most = max(LEAST_FOUND, self._places.most // FOUND_OF)
        self._crowds = self._crowds_now()
        found = nsmallest(most, self._idlers())
        self._found_of = self._shares_of(found)
        self._found = found
        self._found_at = time.monotonic()
        self._look_again_at = self._found_at + PAUSE * (self._found_at - began)
        if found:
            self._on_ready()

    def _crowds_now(self) -> dict[bytes, dict[int, int]]:
        """How many connections those networks of a site have together that have about the same number, by its bits;
        of the sites that have more than a few."""
        crowds: dict[bytes, dict[int, int]] = {}
        for network, count in in_slices(self._places.counts()):
            site = site_of(network)
            if site != network and self._places.count_at_site(network) >= FEW:
                crowd = crowds.setdefault(site, {})
                bits = count.bit_length()
                crowd[bits] = crowd.get(bits, 0) + count
        return crowds

    def _shares_of(self, found: list[Idler]) -> dict[bytes | None, list[Idler]]:
        """Of those that were found, whoever may give way to newcomers of its own site."""
        by_site: dict[bytes | None, list[Idler]] = {}
        of_proxies = set()
        for idler in found:
            source = self._source_of(idler[-1])
            by_site.setdefault(_site_of(source), []).append(idler)
            if self._places.count_of(source) >= self._most:
                of_proxies.add(_site_of(source))
        return {site: idlers if site in of_proxies else idlers[1::2] for site, idlers in by_site.items()}

    def _idlers(self) -> Iterator[Idler]:
        """Everybody who might give way."""
        pasts: dict[Pair, Past] = {}  # anew each time: of those that are over, nothing is kept
        everybody: Iterator[Client | Pair] = chain(self._reception, self._matching, self._pairs)
        for number, who in enumerate(in_slices(everybody)):
            if not self._is_here(who):  # any more
                continue
            rank, idle = self._standing_of(who, time.monotonic())
            if isinstance(who, Pair):
                pasts[who] = self._pasts[who]
            if idle is not None:
                yield -rank, -idle, number, who
        self._pasts = pasts

    def _source_of(self, who: Client | Pair) -> bytes | None:
        """Whose it is; of a pair, the side whose source has more."""
        return max(who.sources, key=self._size_of) if isinstance(who, Pair) else who.source

    def _size_of(self, source: bytes | None) -> tuple[int, int]:
        return self._places.count_at_site(source), self._places.count_of(source)

    def _rank(self, source: bytes | None, newcomers: int = 0) -> int:
        """The rank of a source, if it had so many more: 0 where its site has a few, and higher each time that there are
        twice as many at the site, or, where that is equal, in the crowd that it is of there."""
        at_site, count = (size + newcomers for size in self._size_of(source))
        rank = rank_of(at_site)
        if not rank:
            return 0
        crowds = self._crowds.get(_site_of(source) or b"", {})
        return rank * RANKS + rank_of(max(count, crowds.get(count.bit_length(), 0)))

    def _standing_of(self, who: Client | Pair, now: float) -> tuple[int, float | None]:
        """The rank of somebody's source, and how long it has been idle; None if that is not long enough."""
        source = self._source_of(who)
        at_site, count = self._size_of(source)
        is_one_of_few = at_site >= self._many and count < self._most
        idle = self._idle_for(who, now) if isinstance(who, Pair) else now - (who.asked or who.arrived)
        return self._rank(source), idle if idle >= (BRIEF_SECONDS if is_one_of_few else IDLE_SECONDS) else None

    def _idle_for(self, pair: Pair, now: float) -> float:
        """For how many seconds it has moved little, as far as that is known."""
        idle = pair.idle_for(now)
        moved, held_back = pair.asked_moved, pair.held_back
        past = self._pasts.get(pair) or (moved, held_back, now - idle)
        # Whoever begins after long to wait for a rate need not do so for as long again.
        would_move_more = held_back - past[1] > MOST_OF_TIME * min(now - past[2], IDLE_SECONDS) and moved > past[0]
        if would_move_more or moved - past[0] > LITTLE_BYTES:
            past = moved, held_back, now
        self._pasts[pair] = past
        since = past[-1]
        if since < pair.paid_until and pair.owed:
            since = pair.paid_until
        return now - since

    # Giving way

    def _make_room(self, source: bytes | None) -> bool:
        if all(self._cut_short() for _ in range(self._places.per_newcomer)):  # one for each place that it takes
            return True
        found = self._found
        first = self._first(found)
        if first is None:
            return False  # there was somebody when the door let it in, but it is only known now whose it is
        rank = self._rank(source, newcomers=1)
        if first[0] < rank or first[0] == rank > 0:
            found = self._found_of.get(_site_of(source), [])
            first = self._first(found)
            if first is None or first[1] < IDLE_SECONDS:
                return False
        heappop(found)
        self._has_served = True
        self._end(first[-1])
        return True

    def _cut_short(self) -> bool:
        """End at once one that is over and on record already, if there is one."""
        if self._farewell.lingering:
            self._places.bounds_met.note(Bound.LINGERING)
            self._farewell.cut_short()
            return True
        is_cut = self._pairs.arrears.cut_short()
        if is_cut:
            self._places.bounds_met.note(Bound.ARREARS)
        return is_cut

    def _first(self, found: list[Idler]) -> tuple[int, float, Client | Pair] | None:
        """Whoever of these is to give way first, its rank, and how long it has been idle by now; it is left there."""
        now = time.monotonic()
        while found:
            was, idle_then, number, who = found[0]
            rank, idle = self._standing_of(who, now) if self._is_here(who) else (0, None)
            if idle is None:
                heappop(found)
                continue
            if rank and _site_of(self._source_of(who)) in self._crowds:
                # Within the site as it was at the look: of a crowd, networks that have lost one would seem small.
                rank += -was % RANKS - rank % RANKS
            if rank >= -was:
                return rank, idle, who
            heapreplace(found, (-rank, idle_then, number, who))  # others may have more by now
        return None

    def _is_here(self, who: Client | Pair) -> bool:
        if isinstance(who, Pair):
            return who in self._pairs
        return who in self._matching or who in self._reception

    def _end(self, who: Client | Pair) -> None:
        if isinstance(who, Pair):
            who.cut(Bound.PLACES)
            return
        self._places.bounds_met.note(Bound.PLACES)
        (self._matching if who in self._matching else self._reception).evict(who)


def _site_of(source: bytes | None) -> bytes | None:
    return None if source is None else site_of(source)

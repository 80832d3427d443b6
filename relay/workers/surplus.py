"""What a worker has too much of, and siblings that have places for it.

``--max-connections`` and ``--max-waiting`` are each worker's own. But they hold for newcomers: what a sibling hands on,
since it leaves, or since the partner waits here, comes in as long as there are file descriptors. If that stayed where
it came to, newcomers would have the places that have become free elsewhere, and the relay more connections than all its
workers' places: then the next worker that leaves would find no room for what it holds. So

- as soon as a sibling has places, it is given what is too much here: transfers first, those at rest before the others,
  then those who wait, and then those whose handshake is not whole;
- until it has that, it keeps these places: none is a newcomer's (`Surplus.kept`);
- and what came from a worker that has left counts again when somebody has come in its place (`Places.guests`). Who has
  too much gives that one an equal part of all it has, so that whoever leaves next holds about as much as the others;
  and an equal part of what a source has that has more here than it may: otherwise what it may have there was no use to
  those whose partners wait here.

So all workers together never have much more than all of them may have.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import gevent

from relay.clients.client import Client
from relay.clients.matching import Matching
from relay.clients.places import Places
from relay.process.one_by_one import one_by_one
from relay.transfer.pair import Pair
from relay.transfer.pairs import Pairs
from relay.transfer.slices import in_slices
from relay.workers.handing_on import HandingOn, wait_for
from relay.workers.link import CONNECTIONS_OF_A_PAIR, Link
from relay.workers.siblings import Siblings

WORD_SECONDS = 1.2
"""Within how long everybody says how it is, whatever it has let in meanwhile."""


def _anybody(client: Client) -> bool:
    return True


class Surplus:
    """Gives away what this worker has too much of, and keeps places for what others have.

    Args:
        siblings: who is there, and what they may have more, or have too much of.
        handing_on: takes people out of the rooms.
        places, matching, pairs: who is here, and may be.
    """

    def __init__(
        self, siblings: Siblings, handing_on: HandingOn, *, places: Places, matching: Matching, pairs: Pairs
    ) -> None:
        self._siblings = siblings
        self._handing_on = handing_on
        self._places = places
        self._matching = matching
        self._pairs = pairs
        self._giving: gevent.Greenlet | None = None
        self._crowded: dict[bytes, int] = {}  # sources, and how many of each are to be given to who has come
        self._is_uneven = False  # whether somebody has come, and has not been given its part
        self._before = 0  # how many places there were before something was last given away
        self._freed_until = 0.0  # monotonic seconds

    def kept(self) -> int:
        """How many places are kept: for what siblings have too much of, our part if others have places for it, too; and
        for what they may have to give back, since newcomers were quicker there than what was given."""
        spare = self._places.spare
        if spare <= 0 or self._siblings.alone:
            return 0
        freed = 0
        if self._giving or time.monotonic() < self._freed_until:
            freed = max(0, spare - self._before)
        too_many, takers = 0, 1
        for link in self._siblings.live:
            if not link.has_said:
                return spare  # who knows; in a moment we do
            if link.spare is not None:
                too_many += max(0, -link.spare)
                takers += link.spare > 0
        return min(spare, freed + -(-too_many // takers))

    def give(self, *, is_replaced: bool) -> None:
        """Give away what is too much here, as far as somebody has places for it; soon, in a greenlet. `is_replaced`:
        and what sources have too much, since somebody has come in the place of a worker that has left."""
        if is_replaced:
            workers = 1 + len(self._siblings.live)
            count_of = self._places.count_of
            self._crowded |= {source: count_of(source) // workers for source in self._places.settle_guests()}
            self._is_uneven = True
        if self._places.spare >= 0 and self._matching.spare >= 0 and not self._crowded:
            self._is_uneven = False
        elif not self._giving and not self._siblings.leaving and self._takers():
            self._giving = gevent.spawn(self._give)

    def _takers(self) -> list[Link]:
        """Those who have places, the one with most of them first."""
        with_places = (link for link in self._siblings.live if link.spare is not None and link.has_places(1))
        return sorted(with_places, key=_spare_of, reverse=True)

    def _give(self) -> None:
        """Give away what is too much; and to who has come in another's place at the least its part, if it is."""
        workers = 1 + len(self._siblings.live)
        is_uneven, self._is_uneven = self._is_uneven, False
        self._before = max(0, self._spare())
        connections = self._places.taken // workers if is_uneven and self._places.spare < 0 else 0
        waiting = len(self._matching) // workers if is_uneven and self._matching.spare < 0 else 0
        waited = len(self._matching)
        for link in self._takers()[:1] if self._crowded else ():
            connections -= self._give_what_sources_have_too_much(link)
        for link in self._takers():
            connections -= self._give_some(max(connections, -self._spare()), link)
            left = waiting - (waited - len(self._matching))
            self._give_those_who_wait(max(left, -self._matching.spare), link)
        self._freed_until = time.monotonic() + WORD_SECONDS

    def _spare(self) -> int:
        """How many connections less than it may have this worker has when those have gone that are on their way."""
        return self._places.spare + sum(link.under_way for link in self._siblings.live)

    def _give_what_sources_have_too_much(self, link: Link) -> int:
        """Give a sibling, as far as it has places, its part of that; what cannot be given now is to be tried again.
        Returns how many connections went."""
        self._crowded = {source: part for source, part in self._crowded.items() if self._places.is_crowded(source)}
        left = dict(self._crowded)
        chosen: list[Pair] = []
        for pair in in_slices(sorted(self._pairs.movable(), key=lambda pair: pair.greenlet is not None)):
            if CONNECTIONS_OF_A_PAIR * (1 + len(chosen)) > _spare_of(link):
                break
            if any(left.get(source or b"", 0) > 0 for source in pair.sources):
                chosen.append(pair)
                _take_off(left, *pair.sources)
        went = self._give_pairs(chosen, link)
        number = sum(part for part in self._crowded.values() if part > 0)
        went += self._give_those_who_wait(number, link, self._has_too_much)
        went += self._give_newcomers(number, link, self._has_too_much)
        for source, part in [*self._crowded.items()]:
            if part <= 0 or link.has_places(CONNECTIONS_OF_A_PAIR):  # or there is nobody who could go
                del self._crowded[source]
                self._places.forget_guests(source)
        self._places.guests_have_gone(went)
        return went

    def _has_too_much(self, client: Client) -> bool:
        return self._crowded.get(client.source or b"", 0) > 0

    def _give_some(self, connections: int, link: Link) -> int:
        """Give so many connections to a sibling, as far as it has places: transfers first, then those who wait, and
        then newcomers. Returns how many went."""
        left = min(connections, _spare_of(link))
        if left <= 0:
            return 0
        # A transfer that has one too many is given, too, if there are places for both.
        most = min(-(-left // CONNECTIONS_OF_A_PAIR), _spare_of(link) // CONNECTIONS_OF_A_PAIR)
        went = self._give_pairs(self._pairs.movable(most), link)
        went += self._give_those_who_wait(left - went, link)
        went += self._give_newcomers(left - went, link)
        self._places.guests_have_gone(went)
        return went

    def _give_pairs(self, pairs: list[Pair], link: Link) -> int:
        went = self._handing_on.hand_on_many_pairs(pairs, link)
        for pair in went:
            _take_off(self._crowded, *pair.sources)
        return CONNECTIONS_OF_A_PAIR * len(went)

    def _give_those_who_wait(self, number: int, link: Link, wants: Callable[[Client], bool] = _anybody) -> int:
        """Give so many of those who wait to a sibling, as far as it has places for them; or only whom it `wants`.
        Returns how many went."""
        went = 0

        def give(token: bytes) -> bool:
            nonlocal went
            wait_for(link)
            if went >= number or link.spare_waiting <= 0 or not link.has_places(1) or self._siblings.leaving:
                return False
            if any(map(wants, self._matching.waiting_for(token))):
                went += self._uproot(token, link, is_given=True)
            return True

        if number > 0:
            one_by_one(in_slices(self._matching.tokens()), give, "in giving away who waits")
        return went

    def _give_newcomers(self, number: int, link: Link, wants: Callable[[Client], bool] = _anybody) -> int:
        """The same with those whose handshake is not whole."""
        went = 0

        def is_to_go(client: Client) -> bool:
            nonlocal went
            if went >= number or not wants(client):
                return False
            went += 1
            _take_off(self._crowded, client.source)
            return True

        if number > 0:
            self._handing_on.hand_on_newcomers(is_to_go, link)
        return went

    def _uproot(self, token: bytes, link: Link, *, is_given: bool) -> int:
        clients = self._matching.waiting_for(token)
        for client in clients:
            self._handing_on.uproot(client, link, is_given=is_given)
            _take_off(self._crowded, client.source)
        return len(clients)

    def has_space_for(self, token: bytes) -> bool:
        """Hand those who wait for `token` on to a sibling where fewer wait than may; False if there is none."""
        if self._siblings.leaving:
            return False
        for link in self._takers():
            if link.spare_waiting > 0:
                self._uproot(token, link, is_given=False)
                return True
        return False

    def close(self) -> None:
        """Give nothing away any more."""
        if self._giving is not None:
            gevent.kill(self._giving)


def _spare_of(link: Link) -> int:
    return link.spare or 0


def _take_off(parts: dict[bytes, int], *sources: bytes | None) -> None:
    """Connections from these sources have been given away."""
    for source in sources:
        if source is not None and source in parts:
            parts[source] -= 1

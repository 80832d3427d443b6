"""What siblings ask of this worker, and what it asks of them: clients and transfers that move house.

It knows the rooms that clients and transfers are in, and decides who goes where; `siblings` and `parcels` see that
nobody is lost on the way.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import gevent

from relay.clients.bounds import Bound
from relay.clients.client import Client
from relay.clients.door import LOOK_SECONDS, Door
from relay.clients.farewell import Farewell
from relay.clients.matching import Matching
from relay.clients.places import Places
from relay.clients.reception import Reception
from relay.clients.speech import Ending
from relay.process.one_by_one import do_it, one_by_one
from relay.transfer.pair import Pair
from relay.transfer.pairs import Pairs
from relay.transfer.slices import in_slices
from relay.transfer.state import PairState
from relay.workers.balance import Balance
from relay.workers.handing_on import HandingOn, once_ready
from relay.workers.language import Standing
from relay.workers.link import CONNECTIONS_OF_A_PAIR, Link
from relay.workers.load import FULL_LOAD, Load
from relay.workers.run_dir import RunDir
from relay.workers.siblings import Siblings
from relay.workers.surplus import Surplus

MOST_HOPS = 8
"""A client that has been handed on so often stays where it is for a second, in which the siblings may find out who is
there: they do not all learn of a change in the same moment."""

AGAIN_SECONDS = 0.05
"""When to look again for the home of a newcomer's token, if it is not certain: another worker may just have been kept
from running in the middle of a change. If it is still not certain then, once a second."""

T = TypeVar("T")


class Household:
    """Who lives here, for the siblings; it is `relay.workers.siblings.AtHome`, and `relay.clients.matching.Elsewhere`.

    Args:
        run_dir: where the siblings are.
        terms: returns what they must have in common with us.
        places, reception, matching, pairs, farewell: the rooms of this worker.
        on_change: called when somebody has come or gone, or a transfer has arrived that has to be handed on.
        on_gone: called when a sibling is here no longer, so that what all workers record is to be written anew.
    """

    def __init__(
        self,
        run_dir: RunDir,
        terms: Callable[[], Mapping[str, str]],
        *,
        places: Places,
        reception: Reception,
        matching: Matching,
        pairs: Pairs,
        farewell: Farewell,
        on_change: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        self.siblings = Siblings(run_dir, terms, self)
        self.give_up = self.siblings.tokens.give_up
        self.matched = self.siblings.tokens.matched
        self.last_match = self.siblings.tokens.last_match
        self.sibling_gone = on_gone
        self._places = places
        self._reception = reception
        self._matching = matching
        self._pairs = pairs
        self._farewell = farewell
        self._on_change = on_change
        self._handing_on = HandingOn(self.siblings, reception, matching, pairs, self.dismiss)
        self.hand_everything_on = self._handing_on.hand_everything_on
        self._surplus = Surplus(self.siblings, self._handing_on, places=places, matching=matching, pairs=pairs)
        places.kept = self._surplus.kept
        self._door: Door | None = None
        self._looks_after_door = gevent.get_hub().loop.timer(LOOK_SECONDS, LOOK_SECONDS)
        self._to_look_at: dict[bytes, None] = {}
        self._looking: gevent.Greenlet | None = None
        self._sharing: gevent.Greenlet | None = None
        self._balance: Balance[Pair] = Balance()
        self._load = Load()
        self._parts, self._lately = 0, FULL_LOAD
        matching.elsewhere = self
        pairs.moves_on = self._moves_on_at_once

    def open(self, door: Door, *listeners: socket.socket | None) -> None:
        """Take part in the relay, whose listening sockets (`relay.workers.estate.Listeners`) this worker has; behind
        `door` are those of clients."""
        self._door = door
        self._looks_after_door.start(door.look_after_it)
        self.siblings.announce(*listeners)

    def leave(self) -> None:
        """Tell everybody that we leave, and hear what room they have; to be called from a greenlet."""
        self.siblings.leave()
        self.siblings.wait_for_farewells()

    def moves_on(self) -> bool:
        """Whether we leave, and there is somebody to hand things to."""
        return self.siblings.leaving and not self.siblings.alone

    def _moves_on_at_once(self) -> bool:
        """The same, for a pair that has just arrived: then `hand_everything_on` is to see it."""
        if self.moves_on():
            self._handing_on.pairs_came = True
            self._on_change()
            return True
        return False

    def close(self) -> None:
        """End all links."""
        steps = (self._looks_after_door.stop, self._stop_greenlets, self.siblings.close, self._handing_on.close)
        one_by_one(steps, do_it, "in leaving the siblings")

    def _stop_greenlets(self) -> None:
        for greenlet in (self._looking, self._sharing):
            if greenlet is not None:
                gevent.kill(greenlet)
        self._surplus.close()

    # Handing on

    def sees_home(self, client: Client) -> bool:
        """Hand `client`, whose handshake is whole, to the worker that its token lives with; False when that is us."""
        if client.hops > MOST_HOPS:
            self.siblings.tokens.doubt(client.token)
            return False
        home = self.siblings.tokens.home(client.token)
        if home is None:
            if client.token in self.siblings.tokens.uncertain:
                self._look_soon({client.token: None}, AGAIN_SECONDS)
            return False
        if not home.is_trusted and (client.hops or not home.is_full):
            self.siblings.tokens.doubt(client.token)
            return False
        self._handing_on.hand_on(client, home)
        return True

    def _share_work(self, load: float, link: Link) -> None:
        surplus = self._balance.surplus(list(self._pairs), load, link.load, in_slices)
        self._handing_on.hand_on_pairs(surplus, link)

    def has_space_for(self, client: Client) -> bool:
        """Hand `client`, which waits here, where too many do, on to a sibling where not so many wait."""
        return self._surplus.has_space_for(client.token)

    # Taking in

    def take_in(self, client: Client, link: Link) -> None:
        """A sibling has handed `client` on."""
        self._places.take(client.source)
        self._welcome(link, client.source)
        link.is_relieved_of(1, waiting=bool(client.token))
        if not link.leaving and self._places.has_too_many(client.source):
            # A source can choose tokens that all live with us, or come to where just too many wait. It cannot choose
            # where workers leave, or have too much.
            if not client.is_given:
                self._places.bounds_met.note(Bound.PER_SOURCE)
                self.dismiss(client)
                return
            self._places.welcome_guests((client.source,), until_replaced=False)
        self.take_back(client)

    def has_room(self, connections: int) -> bool:
        """Whether there are descriptors for so many connections."""
        return self._places.room >= connections

    def send_partners(self, tokens: list[bytes], link: Link) -> None:
        """Those who wait here for `tokens` go to their partners, who found no room here, at a sibling that has some."""
        for token in tokens:
            for client in self._matching.waiting_for(token):
                if link.has_room(1):
                    self._handing_on.uproot(client, link, is_given=True)

    def standing(self) -> Standing:
        """How this worker is, for its siblings."""
        spare = (self._places.spare, self._matching.spare)
        return Standing(self._parts, self._lately, self._places.room, self._places.free, spare=spare)

    @property
    def is_filling(self) -> bool:
        """Whether this worker may soon have more than it should."""
        return 2 * self._places.spare < self._places.most

    def take_back(self, client: Client) -> None:
        """A client is here anew."""
        if not client.token:
            client.is_given = False  # where it goes from here it has yet to say
        link = self.siblings.any_with_room(1) if self.moves_on() and not client.token else None
        if client.token:
            self._matching.readmit(client)
        elif link is not None:
            self._handing_on.hand_on(client, link)
        else:
            self._reception.expect(client)

    def dismiss(self, client: Client) -> None:
        """`client` belongs elsewhere and cannot be handed on: nobody can come to it here."""
        self._farewell.end(client, client.speech.lonely() if client.token else Ending("errory"))

    def take_in_pair(self, state: PairState, sides: Sequence[socket.socket], fds: Sequence[int], link: Link) -> None:
        """A sibling has handed on a pair in mid-transfer."""
        self._pairs.take_in(state, sides, fds)
        link.is_relieved_of(CONNECTIONS_OF_A_PAIR)
        self._welcome(link, state.first_source, state.second_source)

    def _welcome(self, link: Link, *sources: bytes | None) -> None:
        """Connections from `sources` have come over `link`: guests, for a while, if it is because that worker
        leaves."""
        if link.leaving:
            self._places.welcome_guests(sources, until_replaced=not link.is_replaced)

    def take_back_pair(self, pair: Pair) -> None:
        """A sibling could not take `pair`."""
        self._pairs.take_back(pair)

    def handed_on(self, client: Client) -> None:
        """A sibling has confirmed that `client` is its own now."""
        client.sock.close()
        self._places.give_back(client.source)

    def handed_on_pair(self, pair: Pair) -> None:
        """A sibling has confirmed that `pair` is its own now."""
        self._pairs.handed_on(pair)

    # What else siblings say

    def sibling_is_well(self, *, is_new: bool) -> None:
        """Give it what we have too much of, and it has places for. If it is new, one that has left is replaced."""
        self._surplus.give(is_replaced=is_new)

    def siblings_changed(self) -> None:
        """Look again where those belong of whom it was not certain, and who of them is a spare."""
        if not self.siblings.leaving:
            self._look_soon(self.siblings.tokens.uncertain)
            if self._door is not None:
                self._door.shared = not self.siblings.alone
                self._door.take_turn()  # whose it is may be unclear now
        self._on_change()

    def look_again(self, tokens: Mapping[bytes, None]) -> None:
        """Look again where those belong who wait for these tokens."""
        if not self.siblings.leaving:
            self._look_soon(tokens)

    def was_absent(self) -> None:
        """Look again where everybody belongs, within a second or two."""
        gevent.spawn(self._doubt_everybody)

    def _doubt_everybody(self) -> None:
        for token in in_slices(self._matching.tokens()):
            self.siblings.tokens.doubt(token)

    def _look_soon(self, tokens: Mapping[bytes, None], seconds: float = 0.0) -> None:
        """See those who wait for `tokens` to where they belong by now, within so many seconds and some more."""
        self._to_look_at.update(tokens)
        if self._to_look_at and not self._looking:
            self._looking = gevent.spawn_later(seconds, self._look)

    def _look(self) -> None:
        for token in in_slices(_popped_from(self._to_look_at)):
            if self.siblings.leaving:
                return  # and everybody is handed on
            if not self._matching.waiting_for(token):
                self.give_up(token)
                continue
            tokens = self.siblings.tokens
            home = None if tokens.are_ours(token) else once_ready(partial(tokens.home, token))
            if home is None:
                self._matching.dismiss_spares(token)
                continue
            if not home.is_trusted:
                self.siblings.tokens.doubt(token)
                continue
            for client in self._matching.waiting_for(token):
                self._handing_on.uproot(client, home, is_given=False)

    def matched_elsewhere(self, token: bytes) -> None:
        """A sibling has matched two sides for `token`."""
        self._matching.dismiss_spares(token)

    def turn_at_the_door(self, passed_by: int) -> None:
        """A sibling has passed the door on to us."""
        assert self._door is not None
        if self.siblings.leaving or not self._door.has_room():
            if self.siblings.pass_the_door_on(passed_by + 1):
                return
            if self._places.is_full():
                self._places.bounds_met.note(Bound.CONNECTIONS)  # and so are all the others
        self._door.take_turn()

    # By the clock

    def every_second(self, parts: int) -> None:
        """Tell the siblings how we are, `parts` being what our transfers want of --relay-rate; and share
        the work with the one that has the least."""
        assert self._door is not None
        load = self._load.lately()
        self._parts, self._lately = parts, load if self._door.has_room() else FULL_LOAD
        self.siblings.every_second(self.standing())
        if self.siblings.leaving:
            self._on_change()  # somebody may have room by now
            return
        link = self.siblings.idlest(CONNECTIONS_OF_A_PAIR)
        if link is not None and not self._sharing:
            self._sharing = gevent.spawn(self._share_work, load, link)


def _popped_from(things: dict[T, None]) -> Iterator[T]:
    """All `things`, of which there may be more meanwhile, until there are none."""
    while things:
        yield things.popitem()[0]

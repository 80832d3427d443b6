"""Clients and transfers that go to a sibling: one that lives elsewhere, or everybody, when this worker leaves.

A mistake with one of them costs no other its partner.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from functools import partial

import gevent

from relay.clients.client import Client
from relay.clients.matching import Matching
from relay.clients.reception import Reception
from relay.process import log
from relay.process.one_by_one import one_by_one
from relay.transfer.pair import Pair
from relay.transfer.pairs import Pairs
from relay.transfer.slices import REST_SECONDS, in_slices
from relay.workers.link import CONNECTIONS_OF_A_PAIR, Link
from relay.workers.siblings import Siblings


class HandingOn:
    """Takes people out of the rooms of this worker, and gives them to the links of others.

    Args:
        siblings: who is there.
        reception, matching, pairs: the rooms.
        dismiss: ends a client that is in no room, and that nobody else will ever see to.
    """

    def __init__(
        self,
        siblings: Siblings,
        reception: Reception,
        matching: Matching,
        pairs: Pairs,
        dismiss: Callable[[Client], None],
    ) -> None:
        self.pairs_came = False
        """Whether transfers have arrived while everybody is handed on: they are to be, like everybody."""
        self._siblings = siblings
        self._reception = reception
        self._matching = matching
        self._pairs = pairs
        self._dismiss = dismiss
        self._epoll = select.epoll.fromfd(os.dup(gevent.get_hub().loop.fileno()))

    def close(self) -> None:
        """Let go of what it has open."""
        self._epoll.close()

    def hand_on(self, client: Client, home: Link) -> None:
        """Hand on a client that is in no room any more; of a mistake it is the end."""
        try:
            if client.watcher is not None:
                self._stop_watching(client.sock)
                client.stop_listening()
            home.hand_client(client)
        except Exception:  # whatever it is, nobody else would ever see to this client
            log.tell_mistake("a mistake with a client that is to be handed on, and is sent away")
            self._dismiss(client)

    def uproot(self, client: Client, home: Link, *, is_given: bool) -> None:
        """Hand on a client that waits here and belongs elsewhere now; `is_given` is whether only we wanted that."""
        self._matching.leave(client)
        client.hops, client.is_given = 0, is_given
        self.hand_on(client, home)

    def _hand_on_pair(self, pair: Pair, sibling: Link) -> None:
        """Give a pair in mid-transfer to a sibling; after a mistake it goes on here."""
        try:
            self._give(pair, sibling)
        except Exception:
            self._pairs.go_on(pair)
            raise

    def _give(self, pair: Pair, sibling: Link) -> None:
        pair.detach()
        if pair not in self._pairs:
            return  # it has ended meanwhile, or somebody else has handed it on
        if not sibling.live:
            self._pairs.begin(pair)
            return
        self._stop_watching(pair.first)
        self._stop_watching(pair.second)
        self._pairs.let_go(pair)
        sibling.hand_pair(pair)

    def hand_on_pairs(self, pairs: list[Pair], link: Link) -> None:
        """Give these to one sibling, as far as it has places; to be called from a greenlet."""

        def hand_on(pair: Pair) -> None:
            if link.has_places(CONNECTIONS_OF_A_PAIR) and not pair.stays:
                self._hand_on_pair(pair, link)

        one_by_one(in_slices(pairs), hand_on, "in handing on a transfer")

    def hand_on_many_pairs(self, pairs: list[Pair], link: Link) -> list[Pair]:
        """Give these, however many, to one sibling, as far as it has places; to be called from a greenlet. Returns
        those that went."""
        went: list[Pair] = []

        def hand_on(pair: Pair) -> None:
            wait_for(link)
            if link.has_places(CONNECTIONS_OF_A_PAIR):
                self._hand_on_pair(pair, link)
                went.append(pair)
            else:
                self._pairs.go_on(pair)

        one_by_one(self._pairs.letting_go(pairs), hand_on, "in handing on a transfer")
        return went

    def hand_on_newcomers(self, wants: Callable[[Client], bool], link: Link) -> None:
        """Give those whose handshake is not whole, and whom `wants` wants, to one sibling, as far as it has places; to
        be called from a greenlet."""

        def hand_on(client: Client) -> bool:
            wait_for(link)
            if not link.has_places(1):
                return False
            if client in self._reception and client.claim is None and wants(client):
                self._reception.let_go(client)
                client.is_given = True
                self.hand_on(client, link)
            return True

        one_by_one(in_slices(self._reception), hand_on, "in handing on a newcomer")

    def hand_everything_on(self) -> bool:
        """Give everybody who is here to the siblings, as far as these have room; to be called from a greenlet. Returns
        whether they had it for all; whoever found none stays, and a pair among them has to begin again."""
        found_room = [self._hand_on_all_pairs(), self._hand_on_newcomers(), self._hand_on_those_who_wait()]
        return all(found_room) and not any(pair.stays for pair in self._pairs)

    def _hand_on_all_pairs(self) -> bool:
        self.pairs_came = False
        return one_by_one(
            self._pairs.letting_go(self._pairs.movable()), self._find_room_for_pair, "in handing on a transfer"
        )

    def _find_room_for_pair(self, pair: Pair) -> bool:
        link = once_ready(partial(self._siblings.any_with_room, CONNECTIONS_OF_A_PAIR))
        if link is not None:
            self._hand_on_pair(pair, link)
        return link is not None

    def _hand_on_newcomers(self) -> bool:
        return one_by_one(in_slices(self._reception), self._find_room_for_newcomer, "in handing on a newcomer")

    def _find_room_for_newcomer(self, client: Client) -> bool:
        link = once_ready(partial(self._siblings.any_with_room, 1))
        if link is not None and client in self._reception:
            self._reception.let_go(client)
            self.hand_on(client, link)
        return link is not None

    def _hand_on_those_who_wait(self) -> bool:
        tokens = in_slices(self._matching.tokens())
        return one_by_one(tokens, self._find_room_for_token, "in handing on those who wait")

    def _find_room_for_token(self, token: bytes) -> bool:
        if self.pairs_came and not self._hand_on_all_pairs():
            return False
        heir = once_ready(partial(self._siblings.tokens.heir, token))
        if heir is not None:
            for client in self._matching.waiting_for(token):
                self.uproot(client, heir, is_given=True)
        return heir is not None

    def _stop_watching(self, sock: socket.socket) -> None:
        """Make the event loop's epoll forget a socket that lives on in another process. It would go on to report it
        when we close ours, since what it watches is the open connection and not our number for it: epoll(7)."""
        try:
            self._epoll.unregister(sock)
        except OSError:
            pass  # it was never watched


def wait_for(link: Link) -> None:
    """Until this sibling is not laden."""
    while link.live and link.laden:
        gevent.sleep(REST_SECONDS)


def once_ready(choose: Callable[[], Link | None]) -> Link | None:
    """The sibling that `choose` says, as soon as that is not laden; asked again until then."""
    while (link := choose()) is not None and link.laden:
        gevent.sleep(REST_SECONDS)
    return link

"""What is handed on, while it is under way.

Handing on never leaves a connection without an owner, nor with two:

- the sender keeps its copies of the sockets until the receiver has confirmed, and takes everything back when
  the link ends before that;
- the receiver confirms first and acts then;
- a worker that was stopped (SIGSTOP, a suspended machine) may find old parcels when it wakes. So a parcel is good for
  `PARCEL_GOOD_SECONDS` only, and the sender takes it back when it is older than `PARCEL_LOST_SECONDS`, which is more;
- it may be stopped at any moment, also when it has just found a parcel good. So a `claim` goes with each, which only
  one of both can make: who finds that the other one has made it leaves the parcel to that one, whatever either says;
- where there can be no claim, or the other worker knows of none, a sender that ends a link first sees to it that
  nothing can be confirmed over it any more, and reads what has been.

What becomes of a client that was handed here, or comes back, is decided `AtHome`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import gevent

from relay.clients.client import Client, Recorded
from relay.clients.proxied import unpack
from relay.process.one_by_one import one_by_one
from relay.transfer.pair import Pair
from relay.transfer.slices import in_slices
from relay.transfer.state import PairState
from relay.workers import claim
from relay.workers.estate import Estate
from relay.workers.language import (
    CONFIRMED,
    REFUSED,
    Envelope,
    HandedClient,
    Misunderstood,
    decode_answer,
    decode_clients,
    decode_envelope,
    decode_pair,
    encode_answer,
    kind_of,
)
from relay.workers.link import CONNECTIONS_OF_A_PAIR, Link, Parcel

PARCEL_GOOD_SECONDS = 1.0
"""How old a parcel may be when it is opened."""

PARCEL_LOST_SECONDS = 2.0
"""How old a parcel has to be before it is taken back from a sibling that is silent but may wake at any moment."""


class Receiver(Protocol):
    """What this worker does with what comes to it."""

    def take_in(self, client: Client, link: Link) -> None:
        """A sibling has handed this client on, over `link`; it is ours now."""

    def take_back(self, client: Client) -> None:
        """A sibling could not take this client."""

    def dismiss(self, client: Client) -> None:
        """This client cannot be handed on, to nobody."""

    def take_in_pair(self, state: PairState, sides: Sequence[socket.socket], fds: Sequence[int], link: Link) -> None:
        """The same for a pair, with its sockets and pipes in the order of `language.encode_pair`; if it raises, these
        are still the caller's."""

    def take_back_pair(self, pair: Pair) -> None:
        """A sibling could not take this pair."""

    def has_room(self, connections: int) -> bool:
        """Whether this worker can take so many connections."""

    def send_partners(self, tokens: list[bytes], link: Link) -> None:
        """Those who asked for these tokens found no room here; they are over there."""

    def handed_on(self, client: Client) -> None:
        """A sibling has taken this client over; our copy of its socket is to be closed."""

    def handed_on_pair(self, pair: Pair) -> None:
        """The same for a pair."""


class Parcels:
    """Parcels that come, and those that were confirmed, refused or lost."""

    def __init__(self, receiver: Receiver, estate: Estate) -> None:
        self._receiver = receiver
        self._estate = estate
        self._serial = 0
        self._back: deque[Client | Pair] = deque()
        self._taking_back: gevent.Greenlet | None = None

    def envelope(self) -> Envelope:
        """What goes on the next parcel."""
        self._serial += 1
        return Envelope(self._serial, time.monotonic())

    def take_clients(self, link: Link, packet: bytes, fds: list[int]) -> None:
        """An ``H`` has come; raises Misunderstood."""
        envelope = decode_envelope(packet)
        clients = decode_clients(packet)
        came = len(fds)
        with _claim_beside(envelope, fds) as offered, sockets_of(fds, len(clients)) as socks:
            complete = came == len(clients) + envelope.offers_claim and len(socks) == len(clients)
            if not self._accepts(link, envelope, offered, len(clients), complete=complete):
                close_all(fds)
                if _is_good(envelope):
                    self._receiver.send_partners([handed.token for handed in clients if handed.token], link)
                return
            arrived = list(zip(clients, socks, strict=True))
            socks.clear()  # each is its client's from here on, and closed with it, also when something goes wrong
            one_by_one(arrived, lambda one: self._take_in(*one, link), "with a client that a sibling has handed on")

    def _take_in(self, handed: HandedClient, sock: socket.socket, link: Link) -> None:
        self._receiver.take_in(_client_from(handed, sock), link)

    def take_pair(self, link: Link, packet: bytes, fds: list[int]) -> None:
        """A ``P`` has come; raises Misunderstood."""
        envelope = decode_envelope(packet)
        state = decode_pair(packet)
        came = len(fds)
        with _claim_beside(envelope, fds) as offered, sockets_of(fds, CONNECTIONS_OF_A_PAIR) as sides:
            complete = came == state.fds + envelope.offers_claim and len(sides) == CONNECTIONS_OF_A_PAIR
            if not self._accepts(link, envelope, offered, CONNECTIONS_OF_A_PAIR, complete=complete):
                close_all(fds)
                return
            try:
                self._receiver.take_in_pair(state, sides, fds, link)
            except Exception:
                close_all(fds)  # as the sides are
                raise
            sides.clear()

    def _accepts(
        self, link: Link, envelope: Envelope, offered: int | None, connections: int, *, complete: bool
    ) -> bool:
        """Confirm or refuse a parcel, with which this claim was `offered`. Once it is confirmed it is ours, and the
        sender closes its copies."""
        # To confirm later than now would be too late: the sender might take it back meanwhile. To refuse never is.
        if complete and _is_good(envelope) and self._receiver.has_room(connections):
            if offered is None and link.confirm(envelope.serial):
                return True
            if offered is not None and claim.make(offered):
                if not link.confirm(envelope.serial):
                    link.say(encode_answer(CONFIRMED, envelope.serial))
                return True
        link.say(encode_answer(REFUSED, envelope.serial))  # too old, or there was no room for all that came
        return False

    def confirmed(self, link: Link, serial: int) -> None:
        """A sibling has taken a parcel over."""
        parcel = link.no_longer_under_way(serial)
        if parcel is None:
            return
        if time.monotonic() - parcel.sent < PARCEL_GOOD_SECONDS / 4:
            link.be_less_gentle()
        self._handed_on(link, parcel)

    def _handed_on(self, link: Link, parcel: Parcel) -> None:
        if parcel.pair is not None:
            link.handed_pairs += 1
            self._receiver.handed_on_pair(parcel.pair)
        link.handed_clients += len(parcel.clients)
        for client in parcel.clients:
            self._receiver.handed_on(client)

    def refused(self, link: Link, serial: int) -> None:
        """A sibling could not take a parcel: it is ours again."""
        parcel = link.no_longer_under_way(serial)
        if parcel is None:
            return
        if time.monotonic() - parcel.sent > PARCEL_GOOD_SECONDS:
            link.be_gentle()  # it may have room, but was late to open it
        else:
            link.refused_at = time.monotonic()
            link.is_full = True
        for client in parcel.clients:
            client.hops += 1
        self.have_back([parcel])

    def is_unfit(self, link: Link, parcel: Parcel) -> None:
        """A parcel can never be sent. Who is to blame for it is found by sending each alone, and not handed on any
        more."""
        if parcel.pair is not None:
            parcel.pair.stays = True
            self.have_back([parcel])
        elif len(parcel.clients) > 1:
            for client in parcel.clients:
                link.hand_alone(client)
        else:
            self._receiver.dismiss(parcel.clients[0])

    def have_back(self, parcels: list[Parcel]) -> None:
        """These are ours again, soon; the transfers before the clients, who have no partner."""
        self._back.extendleft(parcel.pair for parcel in parcels if parcel.pair is not None)
        self._back.extend(client for parcel in parcels for client in parcel.clients)
        if self._back and not self._taking_back:
            self._taking_back = gevent.spawn(self._take_back)

    def _take_back(self) -> None:
        one_by_one(in_slices(self._coming_back()), self._take_one_back, "with one whom nobody could take")

    def _coming_back(self) -> Iterator[Client | Pair]:
        while self._back:
            yield self._back.popleft()

    def _take_one_back(self, somebody: Client | Pair) -> None:
        if isinstance(somebody, Pair):
            self._receiver.take_back_pair(somebody)
        else:
            self._receiver.take_back(somebody)

    def end(self, link: Link) -> None:
        """We are about to end this link: what is under way over it, and the sibling has not taken, is ours again,
        soon."""
        one_by_one(link.hear_out(), lambda packet: self._heard_last(link, packet), "in ending a link")
        self.take_back(link)

    def take_back(self, link: Link, older_than: float = 0.0) -> None:
        """What is under way over this link since more than so many seconds, and the sibling has not taken, is ours
        again, soon; and what has not left yet."""
        unsent = link.take_back_unsent()
        ours, taken = link.take_back(older_than)
        self.have_back(unsent + ours)
        one_by_one(taken, lambda parcel: self._handed_on(link, parcel), "with what a sibling has taken")

    def _heard_last(self, link: Link, packet: bytes) -> None:
        if kind_of(packet) == CONFIRMED:  # what it has handed on stays its own, since we have not confirmed it
            with contextlib.suppress(Misunderstood):  # of one that does not speak like a worker
                self.confirmed(link, decode_answer(packet))

    def close(self) -> None:
        """Have at once what was to come back."""
        one_by_one(self._coming_back(), self._take_one_back, "with one whom nobody could take")


def _is_good(envelope: Envelope) -> bool:
    """Whether a parcel is not too old to be opened."""
    return time.monotonic() - envelope.sent <= PARCEL_GOOD_SECONDS


def _client_from(handed: HandedClient, sock: socket.socket) -> Client:
    client = Client(sock, handed.started, handed.arrived)
    client.asked, client.token, client.side = handed.asked, handed.token, handed.side
    client.received, client.hops, client.is_given = handed.received, handed.hops, handed.is_given
    client.source, client.recorded = handed.source, Recorded(handed.recorded)
    client.speech = unpack(handed.packed_speech)
    return client


@contextlib.contextmanager
def _claim_beside(envelope: Envelope, fds: list[int]) -> Iterator[int | None]:
    """The claim that came with a parcel, the last of these file descriptors, which is taken out of `fds`, and closed in
    the end; None if it came without."""
    offered = fds.pop() if envelope.offers_claim and fds else None
    try:
        yield offered
    finally:
        if offered is not None:
            os.close(offered)


@contextlib.contextmanager
def sockets_of(fds: list[int], most: int) -> Iterator[list[socket.socket]]:
    """The sockets of the first of these file descriptors, `most` of them, which are taken out of `fds`.

    Fewer when one cannot be looked at. Those that are still in the list in the end are closed.
    """
    socks: list[socket.socket] = []
    try:
        with contextlib.suppress(OSError):
            while fds and len(socks) < most:
                socks.append(socket.socket(fileno=fds[0]))
                del fds[0]
        yield socks
    finally:
        for sock in socks:
            sock.close()


def close_all(fds: list[int]) -> None:
    """Close these file descriptors, and empty the list."""
    while fds:
        os.close(fds.pop())

"""From accept to a whole handshake: a newcomer says what it wants, or is turned away.

A client costs no greenlet: one libev watcher calls in here when it has something to say. So everything in this file
runs in the hub and must not wait.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from relay.clients.bounds import Bound
from relay.clients.client import Client, EventLoop
from relay.clients.deadlines import Deadlines
from relay.clients.farewell import Farewell
from relay.clients.handshake import Handshake, Refusal
from relay.clients.iteration import Iteration
from relay.clients.origins import Origins
from relay.clients.places import Places
from relay.clients.sites import Sites
from relay.clients.speech import PLAIN, Ending, Speech
from relay.options import Options
from relay.process import log
from relay.process.dataclass import replace
from relay.process.one_by_one import one_by_one


class Reception:
    """Clients whose handshake is not whole.

    Args:
        loop: the event loop.
        options: the operator's bounds and patience.
        places: where a newcomer's place comes from.
        farewell: takes those who are turned away.
        admit: takes those whose handshake is whole, for good; it raises nothing.
    """

    def __init__(
        self, loop: EventLoop, options: Options, places: Places, farewell: Farewell, admit: Callable[[Client], None]
    ) -> None:
        self._loop = loop
        self._options = options
        self._places = places
        self._origins = Origins(options, places)
        self._farewell = farewell
        self._admit = admit
        self._shaking: dict[Client, None] = {}  # in the order in which they came
        self._sites: Sites[Client] = Sites(places.count_at_site)
        self._deadlines: Deadlines[Client] = Deadlines()
        self._unheard: dict[Client, None] = {}  # whom the system refuses to watch, until it is tried again
        self._closed = False
        self._iteration = Iteration(loop, self._hear)
        self._on_readable = self._heard  # bound once, and not for every client

    def __iter__(self) -> Iterator[Client]:
        """Everybody whose handshake is awaited; they may go meanwhile."""
        return iter([*self._shaking])

    def __len__(self) -> int:
        """How many there are."""
        return len(self._shaking)

    def __contains__(self, client: Client) -> bool:
        return client in self._shaking

    def unnamed_within(self, seconds: float, now: float) -> int:
        """How many who have come in the last so many seconds are here beyond all places, since it is not known yet
        whose they are (see `origins`); `now` in monotonic seconds."""
        return self._origins.came_within(seconds, now)

    def accepted(self, sock: socket.socket, address: tuple[Any, ...], speech: Speech = PLAIN) -> None:
        """Somebody has connected from `address`, who speaks like this; `sock` is non-blocking."""
        client = self._origins.let_in(sock, address[0], speech)
        if client is None:
            sock.close()
            return
        self.expect(client)
        unnamed = self._origins.oldest_too_many()
        if unnamed is not None:
            self._shake_hands(unnamed)  # what has come counts, however late we are to look
            if self._origins.is_unnamed(unnamed):
                self._places.bounds_met.note(Bound.UNNAMED)
                self.evict(unnamed)

    def expect(self, client: Client) -> None:
        """Hear what `client`, which has just connected, or was handed on, has to say."""
        if self._closed:
            self.let_go(client)
            self._farewell.end(client, client.speech.refusal(Refusal.BAD_HANDSHAKE))
            return
        self._deadlines.set(client, client.arrived + self._options.handshake_timeout)
        self._shake_hands(client)

    def _heard(self, client: Client) -> None:
        if not client.is_heard:
            self._unheard[client] = None
        self._iteration.see_to(client)

    def _hear(self, client: Client) -> None:
        if client in self._shaking:
            self._shake_hands(client)

    def _shake_hands(self, client: Client) -> None:
        try:
            verdict = self._hear_out(client)
        except Exception:  # whatever it is, it is of this one, and others come
            log.tell_mistake("a mistake with somebody who has just come, and is sent away")
            verdict = Ending("errory", gone=True)
        if verdict is None:
            self._expect_more(client)
            return
        self.let_go(client)
        if isinstance(verdict, Handshake):
            client.token, client.side, client.received = verdict.token, verdict.side, b""
            client.asked = time.monotonic()
            self._admit(client)
        else:
            self._farewell.end(client, verdict)

    def _hear_out(self, client: Client) -> Handshake | Ending | None:
        """What `client` has come to say, or how it ends; None when there is more to come."""
        try:
            verdict = client.speech.hear(client)
            while client.claim is not None:
                if not self._origins.settle(client):
                    return Ending(None, gone=True)
                if client in self._shaking:
                    self._sites.enter(client)  # now that it is known whose it is
                if verdict is None:
                    verdict = client.speech.hear(client)
        except BlockingIOError:
            return None
        return verdict

    def _expect_more(self, client: Client) -> None:
        """Wait for the rest of a handshake. When too many are awaited, the oldest of the site that has the most gives
        way, or, where all have few, the oldest of all: it has had the most time, and an honest one needs no longer than
        a round trip."""
        if client in self._shaking:
            return
        self._listen(client)
        self._shaking[client] = None
        self._sites.enter(client)
        if len(self._shaking) > self._options.max_handshakes:
            oldest = self._sites.first_to_go() or next(iter(self._shaking))
            self._shake_hands(oldest)  # what has come counts, however late we are to look
            if oldest in self._shaking:
                self._places.bounds_met.note(Bound.HANDSHAKES)
                self._turn_away(oldest)

    def _listen(self, client: Client) -> None:
        """Hear when `client` says more; if that is refused, it is tried every second."""
        client.listen(self._loop, self._on_readable)
        if not client.is_heard:
            self._unheard[client] = None

    def let_go(self, client: Client) -> None:
        """`client` is somebody else's from now on; its watcher is as it was."""
        self._deadlines.clear(client)
        self._shaking.pop(client, None)
        self._sites.leave(client)
        self._origins.forget(client)

    def _turn_away(self, client: Client) -> None:
        if self._origins.is_unnamed(client):
            self.evict(client)  # it has no place in which it could linger
            return
        self.let_go(client)
        self._farewell.end(client, client.speech.refusal(Refusal.BAD_HANDSHAKE))

    def evict(self, client: Client) -> None:
        """End the connection of somebody who is here, at once, for its place."""
        self.let_go(client)
        self._farewell.end(client, replace(client.speech.refusal(Refusal.BAD_HANDSHAKE), gone=True))

    def close(self) -> Iterator[None]:
        """Turn away everybody who is here, one with each step, and who will come."""
        self._closed = True
        return self._turn_all_away()

    def _turn_all_away(self) -> Iterator[None]:
        for client in self:
            if client in self._shaking:
                self._turn_away(client)
            yield

    def cut_off(self) -> None:
        """End all connections at once."""
        one_by_one(self, self._cut_off, "in ending one whose handshake is not whole")

    def _cut_off(self, client: Client) -> None:
        self.let_go(client)
        try:
            self._farewell.finish(client, "errory")
        finally:
            self._farewell.close(client)

    def see_off(self, now: float) -> Iterator[None]:
        """Turn away those who have taken too long, one with each step, and listen again to whom we could not; `now` in
        monotonic seconds."""
        for client in [*self._unheard]:
            del self._unheard[client]
            if client in self._shaking:
                self._listen(client)
                self._shake_hands(client)
            yield
        for client in self._deadlines.take_due(now):
            # What has come counts, however late we are to look.
            self._shaking.pop(client, None)
            self._sites.leave(client)
            self._shake_hands(client)
            if client in self._shaking:
                self._turn_away(client)
            yield

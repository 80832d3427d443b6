"""Those whose handshake is whole: each meets its partner, waits for it, or turns out to be a spare.

`waiting_room` has the rules of who matches whom; this is what follows from them for the connections. All of it runs in
the hub and must not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from relay.clients.bounds import Bound
from relay.clients.client import Client, EventLoop
from relay.clients.deadlines import Deadlines
from relay.clients.farewell import Farewell
from relay.clients.iteration import Iteration
from relay.clients.pings import Pings
from relay.clients.places import Places
from relay.clients.sites import Sites
from relay.clients.waiting_room import WaitingRoom
from relay.options import Options
from relay.process import log
from relay.process.dataclass import replace
from relay.process.one_by_one import one_by_one


class Elsewhere(Protocol):
    """The other workers, as far as somebody without a partner is concerned."""

    def sees_home(self, client: Client) -> bool:
        """Hand `client` on to the worker that its token lives with. False when that is this one; asking makes it so
        when it is nobody else."""

    def has_space_for(self, client: Client) -> bool:
        """Hand `client`, which waits here, where too many do, on to a worker where not so many wait; False if there is
        none."""

    def give_up(self, token: bytes) -> None:
        """`token` lives here no longer: nobody waits for it."""

    def matched(self, token: bytes) -> None:
        """Two sides were matched for `token`, and nobody waits for it here any more."""

    def last_match(self, token: bytes) -> float:
        """When two sides were last matched for `token` at any worker, in monotonic seconds, 0 if that is forgotten:
        who had asked before that, and is not one of them, is a spare."""


class Nowhere:
    """No other workers, for one that is alone."""

    def sees_home(self, client: Client) -> bool:
        """Every token lives here."""
        return False

    def has_space_for(self, client: Client) -> bool:
        """There is none."""
        return False

    def give_up(self, token: bytes) -> None:
        """Nobody minds."""

    def matched(self, token: bytes) -> None:
        """Nobody needs to know."""

    def last_match(self, token: bytes) -> float:
        """Nobody is under way when a token is matched, so there are no spares but those who wait."""
        return 0.0


class Matching:
    """Clients that wait for their partners, and how they meet.

    Args:
        loop: the event loop.
        options: the operator's bounds and patience.
        places: where bounds that were met are noted, and guests of other workers counted.
        farewell: takes those who go without a partner.
        pings: pings those who speak WebSocket.
        on_match: takes two that have met, the one that waited first; their watchers are as they were. If it raises,
            they are not taken.
    """

    def __init__(
        self,
        loop: EventLoop,
        options: Options,
        places: Places,
        farewell: Farewell,
        pings: Pings,
        on_match: Callable[[Client, Client], None],
    ) -> None:
        self.elsewhere: Elsewhere = Nowhere()
        self._loop = loop
        self._options = options
        self._places = places
        self._note = places.bounds_met.note
        self._farewell = farewell
        self._on_match = on_match
        self._room: WaitingRoom[Client] = WaitingRoom(Sites(places.count_at_site))
        self._deadlines: Deadlines[Client] = Deadlines()
        self._unheard: dict[Client, None] = {}  # whom the system refuses to watch, until it is tried again
        self._closed = False
        self._pings = pings
        self._iteration = Iteration(loop, self._hear)
        self._on_readable = self._heard  # bound once, and not for every client

    def __len__(self) -> int:
        """How many wait."""
        return len(self._room)

    @property
    def spare(self) -> int:
        """How many more may wait here; negative for as many as are too many."""
        return self._options.max_waiting - len(self._room)

    def __iter__(self) -> Iterator[Client]:
        """Everybody who waits; they may go meanwhile."""
        return iter(self._room)

    def __contains__(self, client: Client) -> bool:
        return client in self._room.all_for(client.token)

    def tokens(self) -> list[bytes]:
        """What they wait for."""
        return self._room.tokens()

    def waiting_for(self, token: bytes) -> list[Client]:
        """Who waits for `token`; they may go meanwhile."""
        return self._room.all_for(token)

    def admit(self, client: Client, *, asks_now: bool = True) -> None:
        """See a client whose handshake is whole to its token's home. `asks_now` is whether it has become whole in this
        moment; otherwise the client may have left or spoken meanwhile.

        It is in somebody's hands then, whatever goes wrong with it.
        """
        try:
            self._see_home(client, asks_now=asks_now)
        except Exception:
            log.tell_mistake("a mistake with one whose handshake is whole; it is sent away")
            if client.sock.fileno() >= 0 and client not in self:
                self._deadlines.clear(client)
                self._send_away(client)

    def _see_home(self, client: Client, *, asks_now: bool) -> None:
        # Over WebSocket one may have said what it wants and left in one breath, and only here is that known.
        if (client.speech.reader is not None or not asks_now) and self._judge(client):
            return
        if self._room.waiting_for(client.token) or not self.elsewhere.sees_home(client):
            self._meet(client, asks_now=asks_now)

    def readmit(self, client: Client) -> None:
        """The same for one that was under way between workers."""
        self.admit(client, asks_now=False)

    def _meet(self, client: Client, *, asks_now: bool) -> None:
        """Pair `client`, or let it wait."""
        if asks_now and not self._room.waiting_for(client.token):
            self._wait(client)  # whatever was matched, was matched before
            return
        last_match = self.elsewhere.last_match(client.token)
        if client.asked < last_match:
            self._vacate(client.token)
            self._farewell.turn_away(client)
            return
        while (partner := self._room.partner_for(client)) is not None:
            if partner.asked < last_match:
                self.dismiss(partner)
            elif partner.speech.interruption(partner) is not None:
                self._interrupted(partner)
            else:
                if not self._judge(client):  # it may have gone before anybody had time to look
                    self._match(partner, client)
                return
            if not self._room.waiting_for(client.token):
                self.admit(client, asks_now=asks_now)  # nobody is home to it now
                return
        self._wait(client)

    def _wait(self, client: Client) -> None:
        if self._closed:  # nobody will come any more
            self._farewell.turn_away(client)
            return
        if self._room.waiting_for(client.token) >= self._options.max_waiting_per_token:
            # Only who knows the token can do this, and so to nobody but itself and its partner. The oldest gives way:
            # the newest is the likeliest to be alive.
            self._note(Bound.PER_TOKEN)
            self.dismiss(self._room.oldest_for(client.token))
        self._deadlines.set(client, client.arrived + self._options.wait_timeout)
        self._room.enter(client)
        self._listen(client)
        if client.speech.reader is not None:
            client.speech.be_pinged(self._pings, client.sock)
        if self.spare + self._places.guests < 0 and not self.elsewhere.has_space_for(client):
            # Somebody who waits gives way. Were newcomers turned away instead, whoever fills the room once would own it
            # for as long as clients may wait.
            self._note(Bound.WAITING)
            self.dismiss(self._room.first_to_go())

    def _listen(self, client: Client) -> None:
        """Hear when `client`, which waits, leaves or says something; if that is refused, it is tried every second."""
        client.listen(self._loop, self._on_readable)
        if not client.is_heard:
            self._unheard[client] = None

    def _listen_again(self) -> Iterator[None]:
        """Try once more with those who could not be listened to, one with each step."""
        for client in [*self._unheard]:
            del self._unheard[client]
            if client in self:
                self._listen(client)
            yield

    def leave(self, client: Client) -> None:
        """Take out of the waiting room somebody who is not matched; its watcher is as it was."""
        self._deadlines.clear(client)
        client.speech.be_silent()
        self._room.leave(client)
        self._vacate(client.token)

    def dismiss(self, client: Client) -> None:
        """Send away somebody who waits here."""
        self.leave(client)
        self._farewell.turn_away(client)

    def evict(self, client: Client) -> None:
        """End the connection of somebody who waits here, at once, for its place."""
        self.leave(client)
        self._farewell.end(client, replace(client.speech.lonely(), gone=True))

    def _vacate(self, token: bytes) -> None:
        """Be home to `token` no longer if nobody waits for it here."""
        if not self._room.waiting_for(token):
            self.elsewhere.give_up(token)

    def _heard(self, client: Client) -> None:
        if not client.is_heard:
            self._unheard[client] = None
        self._iteration.see_to(client)

    def _hear(self, client: Client) -> None:
        if client in self:
            self._interrupted(client)

    def _interrupted(self, client: Client) -> None:
        """A waiting client has left, or has said something before it was told ``ok``."""
        if client.speech.interruption(client) is not None:  # no false alarm
            self.leave(client)
            self._judge(client)

    def _judge(self, client: Client) -> bool:
        """Turn away `client`, which does not wait here, if it has left or spoken, as far as the kernel knows by now."""
        ending = client.speech.interruption(client)
        if ending is None:
            return False
        self._farewell.end(client, ending)
        return True

    def _match(self, waited: Client, newcomer: Client) -> None:
        self._room.leave(waited)
        self._deadlines.clear(waited)
        waited.speech.be_silent()
        spares = self._room.take_all(newcomer.token)
        for spare in spares:
            self._deadlines.clear(spare)
        # From here on they are in no room: whatever goes wrong with one of them, each comes into other hands.
        unserved = spares
        try:
            self.elsewhere.matched(newcomer.token)
        except Exception:
            log.tell_mistake("a mistake in telling the other workers of a match")
        try:
            self._on_match(waited, newcomer)
        except Exception:
            log.tell_mistake("a mistake with two that have met; they are sent away")
            unserved = [waited, newcomer, *spares]
        for client in unserved:
            self._send_away(client)

    def _send_away(self, client: Client) -> None:
        """Turn away somebody who is in no room, whatever goes wrong."""
        try:
            self._farewell.turn_away(client)
        except Exception:
            log.tell_mistake("a mistake with one who is sent away; the connection is ended")
            if client.sock.fileno() >= 0:
                self._farewell.close(client)

    def dismiss_spares(self, token: bytes) -> None:
        """`token` was matched elsewhere: send those away who had asked before."""
        last_match = self.elsewhere.last_match(token)
        if not last_match:
            return
        for client in self._room.all_for(token):
            if client.asked < last_match:
                self.dismiss(client)

    def close(self) -> Iterator[None]:
        """Send away everybody who waits, those for one token with each step, and who would wait; those who still meet
        somebody are paired."""
        self._closed = True
        return self._dismiss_all()

    def _dismiss_all(self) -> Iterator[None]:
        for token in self._room.tokens():
            for client in self._room.all_for(token):
                self.dismiss(client)
            yield

    def cut_off(self) -> None:
        """End the connections of all who wait at once."""
        one_by_one(self, self.evict, "in ending one who waits")

    def see_off(self, now: float) -> Iterator[None]:
        """Send away those who have waited too long, one with each step, and listen to those who could not be listened
        to; `now` in monotonic seconds."""
        yield from self._listen_again()
        for client in self._deadlines.take_due(now):
            self.dismiss(client)
            yield

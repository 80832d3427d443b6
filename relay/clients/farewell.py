"""Ways to go without a partner: the record, the last words, and the lingering close in which they arrive.

Closing a socket with unread input sends a reset, which can overtake and destroy the reply. So whoever is sent away gets
the reply and the end of the stream, and the relay reads on for a moment. That is a courtesy: when all places are taken,
it ends for a newcomer.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from relay.clients.client import Client, EventLoop, Recorded
from relay.clients.iteration import Iteration
from relay.clients.places import Places
from relay.clients.speech import Ending
from relay.process.one_by_one import one_by_one
from relay.usage.record import Mood, Record

LINGER_SECONDS = 2.0
LINGER_BYTES = 384 << 10
"""How long the relay keeps the connection of a client it has turned away, and how many bytes it reads meanwhile.
Whoever sends more has to wait in its own backlog until the time is over: it would only be back the sooner."""

KINDS = ("bad_handshake", "left_before_handshake", "impatient", "no_partner", "left_waiting")
"""How a connection can end without a partner: what it said was no handshake, or came too late; it left before one; it
spoke before it was told ok; no partner came, or another of its side was matched; it left while it waited."""

_scrap = mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE)  # takes memory as it fills


def kind_of(ending: Ending) -> str:
    """Which of `KINDS` an ending with a record is."""
    if ending.mood == "lonely":
        return "left_waiting" if ending.gone else "no_partner"
    if ending.impatient:
        return "impatient"
    return "left_before_handshake" if ending.gone else "bad_handshake"


class Farewell:
    """Ends connections that have no partner; those that linger are its own.

    Args:
        loop: the event loop.
        places: where the connection's place goes.
        record: takes the record of each.
    """

    def __init__(self, loop: EventLoop, places: Places, record: Callable[[Record], None]) -> None:
        self._loop = loop
        self._places = places
        self._record = record
        self.turned_away: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        """Those on record since the beginning, by kind."""
        self._lingering: OrderedDict[Client, float] = OrderedDict()  # until when, the first of them soonest
        self._iteration = Iteration(loop, self._discard)
        self._on_readable = self._iteration.see_to  # bound once, and not for every client

    @property
    def lingering(self) -> int:
        """How many linger."""
        return len(self._lingering)

    def end(self, client: Client, ending: Ending) -> None:
        """End a connection in this way."""
        try:
            if ending.mood is not None and self.finish(client, ending.mood):
                self.turned_away[kind_of(ending)] += 1
            if ending.bound is not None:
                self._places.bounds_met.note(ending.bound)
        finally:
            self._take_leave(client, ending)

    def _take_leave(self, client: Client, ending: Ending) -> None:
        if ending.gone:
            with contextlib.suppress(OSError):
                client.sock.send(ending.words)
            self.close(client)
        else:
            self._send_away(client, ending.words)

    def turn_away(self, client: Client) -> None:
        """Send `client` away for want of a partner."""
        self.end(client, client.speech.lonely())

    def finish(self, client: Client, mood: Mood) -> bool:
        """Record a connection that ends without a partner; False if it was a health check (see `Recorded`), which
        nothing tells of."""
        if client.recorded is Recorded.WITH_A_PARTNER:
            return False
        if client.recorded is Recorded.WITH_A_BYTE and not client.received and not client.token:
            return False
        self._record(Record(client.started, time.monotonic() - client.arrived, None, 0, mood))
        return True

    def _send_away(self, client: Client, reply: bytes) -> None:
        """Say `reply`, end the stream, and read on for a moment so that both arrive."""
        client.stop_listening()
        try:
            if reply:
                client.sock.send(reply)
            client.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(client)
            return
        client.discarded = 0
        self._lingering[client] = time.monotonic() + LINGER_SECONDS
        client.listen(self._loop, self._on_readable)  # if that is refused, it is closed when its time is over
        self._places.look_again()

    def close(self, client: Client) -> None:
        """End the connection at once."""
        client.stop_listening()
        client.sock.close()
        self._places.give_back(client.source)

    def see_off(self, now: float) -> Iterator[None]:
        """End the connections that have lingered long enough, one with each step; `now` in monotonic seconds."""
        while self._lingering and next(iter(self._lingering.values())) <= now:
            self.cut_short()
            yield

    def cut_short(self) -> None:
        """End at once the connection that has lingered longest; there is one. It is on record already."""
        client, _ = self._lingering.popitem(last=False)
        self.close(client)

    def close_all(self) -> None:
        """End those that linger at once."""
        one_by_one(range(len(self._lingering)), lambda _: self.cut_short(), "in ending one that lingers")

    def _discard(self, client: Client) -> None:
        """A client that lingers says something, or has ended its stream."""
        if client not in self._lingering:  # it was late, and its time is over
            return
        try:
            count = client.sock.recv_into(_scrap)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        client.discarded += count
        if count == 0:
            del self._lingering[client]
            self.close(client)
        elif client.discarded > LINGER_BYTES:
            client.stop_listening()

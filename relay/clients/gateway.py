"""A gateway in place of the matching: whoever has a whole handshake becomes a TCP client of the upstream.

It knows no tokens and no partners. A client is here while its connection upstream is being made; then the two are a
pair, in which the upstream's ``ok`` is the first thing that the client hears. All of it runs in the hub.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator

from relay.clients import frames
from relay.clients.bounds import Bound
from relay.clients.client import Client, EventLoop, Watcher
from relay.clients.farewell import Farewell
from relay.clients.frames import Close
from relay.clients.matching import Matching
from relay.clients.pings import Pings
from relay.clients.places import Places
from relay.clients.proxy_header import write_proxy_header
from relay.clients.speech import Ending
from relay.clients.upstream import Address, Connection, Upstream, dial, lacks_port
from relay.options import Options
from relay.process import log
from relay.process.dataclass import dataclass

CONNECT_SECONDS = 3.0
"""How long one address is tried."""

TRY_AGAIN_LATER = 1013
"""The Close for a client when no address could be reached (RFC 6455, 11.7, as registered with IANA)."""


@dataclass(slots=True)
class Call:
    """A connection upstream that is being made."""

    untried: list[Address]
    address: Address | None = None
    sock: Connection | None = None
    watcher: Watcher | None = None
    why: Bound = Bound.UPSTREAM
    """What keeps its client from being carried, when no address is left to try."""

    def let_go(self) -> Connection | None:
        """Watch the socket no more, and return it."""
        if self.watcher is not None:
            self.watcher.stop()
            self.watcher.close()
            self.watcher = None
        sock, self.sock = self.sock, None
        return sock


class Gateway(Matching):
    """See the head of this file, and for the arguments `Matching`.

    Args:
        on_reached: takes a client and its connection upstream, whose place is taken.
    """

    def __init__(
        self,
        loop: EventLoop,
        options: Options,
        places: Places,
        farewell: Farewell,
        pings: Pings,
        on_reached: Callable[[Client, socket.socket], None],
    ) -> None:
        super().__init__(loop, options, places, farewell, pings, _never)
        assert options.upstream is not None
        self._upstream = Upstream(options.upstream)
        self._names_clients = options.send_proxy
        self._on_reached = on_reached
        self._calls: dict[Client, Call] = {}

    def _see_home(self, client: Client, *, asks_now: bool) -> None:  # who is a spare, the relay upstream finds out
        """Connect upstream for `client`."""
        if self._judge(client):
            return
        if self._closed:
            self._farewell.turn_away(client)
            return
        self._calls[client] = Call(self._upstream.in_turn())
        self._room.enter(client)
        self._listen(client)
        self._try_next(client)

    def leave(self, client: Client) -> None:
        """See `Matching.leave`: what is being made for it is given up."""
        self._hang_up(self._calls.pop(client))
        super().leave(client)

    def _vacate(self, token: bytes) -> None:
        """No token lives here."""

    def _hang_up(self, call: Call) -> None:
        sock = call.let_go()
        if sock is not None:
            sock.abort()
            self._places.give_back(None)

    def _try_next(self, client: Client) -> None:
        call = self._calls[client]
        self._deadlines.set(client, time.monotonic() + CONNECT_SECONDS)  # first: whatever goes wrong, it is seen to
        while call.untried:
            call.address = call.untried.pop(0)
            try:
                call.sock = dial(call.address)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    call.why = Bound.NO_WAY_UPSTREAM
                elif lacks_port(error, call.address):
                    call.why = Bound.NO_PORT_UPSTREAM
                else:
                    self._upstream.failed(call.address)
                continue
            self._places.take(None)  # which it was promised, at the door
            call.watcher = self._loop.io(call.sock.fileno(), 2)
            call.watcher.start(self._answered, client)
            return
        self.leave(client)
        self._note(call.why)
        self._farewell.end(client, Ending("lonely", frames.close(Close(TRY_AGAIN_LATER))))

    def _answered(self, client: Client) -> None:
        """The upstream has taken or refused a connection."""
        call = self._calls[client]
        assert call.sock is not None
        words = (write_proxy_header(client.source) if self._names_clients else b"") + _line(client)
        try:
            refusal = call.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            has_heard = not refusal and call.sock.send(words) == len(words)
        except OSError:
            has_heard = False
        if not has_heard:
            self._fail(client)
            return
        sock = call.let_go()
        assert sock is not None
        sock.said = len(words)
        self.leave(client)
        client.stop_listening()
        try:
            self._on_reached(client, sock)
        except Exception:
            log.tell_mistake("a mistake with one that is to be carried; it is sent away")
            sock.close()
            self._places.give_back(None)
            self._farewell.end(client, Ending("lonely", frames.close(Close(TRY_AGAIN_LATER))))

    def _fail(self, client: Client) -> None:
        call = self._calls[client]
        if call.address is not None:
            self._upstream.failed(call.address)
        self._hang_up(call)
        self._try_next(client)

    def see_off(self, now: float) -> Iterator[None]:
        """Try another address for those whose last one takes too long, one with each step, and listen to those who
        could not be listened to; `now` in monotonic seconds."""
        yield from self._listen_again()
        for client in self._deadlines.take_due(now):
            self._fail(client)
            yield


def _never(waited: Client, newcomer: Client) -> None:
    raise AssertionError("nobody is matched at a gateway")


def _line(client: Client) -> bytes:
    side = b"" if client.side is None else b" for side " + client.side
    return b"please relay " + client.token + side + b"\n"

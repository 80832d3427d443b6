"""The connection of two workers of one relay: packets in order, sockets beside them, and what is not yet confirmed.

It is a SEQPACKET connection in the run directory (unix(7)). Clients are handed on in batches: all that an iteration of
the event loop brings for one sibling makes one packet. What the packets say is in `language`; what follows from
them, whoever has the link decides (see `siblings`).
"""

from __future__ import annotations

import array
import contextlib
import errno
import math
import mmap
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import gevent

from relay.clients.client import Client
from relay.process.dataclass import dataclass
from relay.transfer.pair import Pair
from relay.workers import claim
from relay.workers.language import (
    CLIENT_BYTES,
    CLIENTS_PER_PACKET,
    CONFIRMED,
    LARGEST_PACKET,
    OFFERS_CLAIM,
    Envelope,
    Greeting,
    Standing,
    encode_answer,
    encode_clients,
    encode_pair,
)
from relay.workers.load import FULL_LOAD

CONNECTIONS_OF_A_PAIR = 2

DISTRUST_SECONDS = 3.0
"""How long a sibling that has refused something is not believed that it has room."""

CLIENTS_AT_A_TIME = 32
"""Clients in a packet, at the most: to take them in keeps the other worker's event loop for about a millisecond. More
would save next to nothing."""

MOST_UNDER_WAY = 256
"""When many move house, so many connections may be on their way to a worker at a time. It takes them in in ten
milliseconds, and what comes behind them, a transfer perhaps, waits for that."""

LEAST_UNDER_WAY = 8
"""The same for a worker that is so slow that parcels are too old when it opens them."""

READ_SECONDS = 0.001
MOST_READ_SECONDS = 0.05
"""How long to take in what a sibling hands on before everybody else gets their turn: half as long as everybody else
took the last time, but no less than the one and no more than the other."""

_PASSING = (errno.ETOOMANYREFS, errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
"""Too many sockets are under way; or the link has ended, which reading finds out."""

_LASTING = (errno.EBADF, errno.EMSGSIZE)
"""The parcel itself is to blame: it would be the same the next time."""

_ANCILLARY_BYTES = socket.CMSG_SPACE(CLIENTS_PER_PACKET * array.array("i").itemsize)

_buffer = mmap.mmap(-1, LARGEST_PACKET, mmap.MAP_PRIVATE)  # takes memory as it fills: most packets are a few bytes
_view = memoryview(_buffer)


class Correspondent(Protocol):
    """Whoever has the link."""

    def envelope(self) -> Envelope:
        """What goes on the next parcel."""

    def heard(self, link: Link, packet: bytes, fds: list[int]) -> None:
        """A packet has come over `link`, with `fds` beside it."""

    def came_back(self, parcel: Parcel) -> None:
        """What was to be handed on cannot be, and is ours again."""

    def is_unfit(self, link: Link, parcel: Parcel, error: Exception) -> None:
        """A parcel can never be sent over a link, and is ours again."""

    def lost(self, link: Link) -> None:
        """A link has ended."""


@dataclass(slots=True)
class Parcel:
    """What is handed on in one packet: clients, or one pair."""

    clients: list[Client]
    pair: Pair | None = None
    sent: float = 0.0  # monotonic seconds
    claim: int | None = None

    def offer_claim(self, envelope: Envelope) -> list[int]:
        """The claim that goes with it, if there can be one, as `envelope` says then."""
        if self.claim is None:
            try:
                self.claim = claim.offer()
            except OSError:
                return []
        envelope.serial |= OFFERS_CLAIM
        return [self.claim]

    def take_back(self) -> bool:
        """Whether it is ours again, and the sibling cannot take it any more; False if it has: then its word of that is
        on its way, or was never sent. One without a claim is taken to be ours."""
        is_ours = self.claim is None or claim.make(self.claim)
        self.drop_claim()
        return is_ours

    def drop_claim(self) -> None:
        """It is decided whose it is."""
        if self.claim is not None:
            os.close(self.claim)
            self.claim = None

    @property
    def connections(self) -> int:
        """How many connections change hands with it."""
        return len(self.clients) if self.pair is None else CONNECTIONS_OF_A_PAIR


class Link:
    """The connection to one sibling.

    It is known by its `greeting`, None until it has come. `ready` is whether it accepts connections, `leaving` whether
    it is about to end, `silent` whether it has stopped answering; `parts`, `load`, `places`, `reads_past` and
    `makes_claims` are what it last said of itself, and `room`, `spare` and `spare_waiting` are that less what was
    handed there since, the last two with what has come from there; `refused_at` is when it last refused something.
    """

    def __init__(self, owner: Correspondent, sock: socket.socket, pid: int, *, opened_by_sibling: bool) -> None:
        self.pid = pid
        self.opened_by_sibling = opened_by_sibling
        self.closed = False
        self.greeting: Greeting | None = None
        self.ready = False
        self.leaving = False
        self.silent = False
        self.said_farewell = False
        self.seconds_unheard = 0
        self.unconfirmed: dict[int, Parcel] = {}
        self.under_way = 0
        """How many connections we have handed to it that it has not confirmed."""
        self._most_under_way = MOST_UNDER_WAY
        self.parts = 0
        self.reads_past = False
        self.makes_claims = False
        self.load = FULL_LOAD
        self.room = 0
        self.places = 0
        self.has_said = False
        """Whether it has said how it is, since it was ready."""
        self.spare: int | None = None
        """How many connections it may have more, negative for as many as it has too many; None if it does not say."""
        self.spare_waiting = 0
        """The same of those who wait."""
        self.is_replaced = False
        """Whether, since it leaves, somebody has come in its place."""
        self.refused_at = -math.inf  # monotonic seconds
        self.is_full = False
        """Whether, then, it had no room: it hands its own on to us instead, as far as we have."""
        self.handed_clients = 0
        self.handed_pairs = 0
        self._owner = owner
        self._sock = sock
        self._outbox: deque[Parcel | bytes] = deque()
        self._next_clients: list[Client] = []
        self._unread_since = math.inf  # when reading was left off before the end, in seconds of CPU
        sock.setblocking(False)
        loop = gevent.get_hub().loop
        self._run_callback = loop.run_callback
        self._new_watcher = loop.io
        self._reads = loop.io(sock.fileno(), 1)
        self._reads.start(self._read_some)
        self._writes = loop.io(sock.fileno(), 2)

    @property
    def live(self) -> bool:
        """Whether this sibling can be home to tokens."""
        return self.ready and not self.leaving and not self.silent and not self.closed

    @property
    def busy(self) -> bool:
        """Whether something of ours is on its way and not yet confirmed."""
        return bool(self.unconfirmed or self._outbox or self._next_clients)

    @property
    def prompt(self) -> bool:
        """Whether the sibling has answered of late, and everything that was sent to it."""
        return self.seconds_unheard <= 1 and not self.unconfirmed

    @property
    def stuck(self) -> bool:
        """Whether the sibling has made no room for what is to be said."""
        return bool(self._outbox)

    def has_room(self, connections: int) -> bool:
        """Whether this sibling can be home to tokens, and take so many connections."""
        return self.live and self.room >= connections and self.is_trusted

    def has_places(self, connections: int) -> bool:
        """The same, without having more than it may have then."""
        return (self.spare is None or self.spare >= connections) and self.has_room(connections)

    @property
    def is_trusted(self) -> bool:
        """Whether it has refused nothing of late: to try again at once would only hold up what it refuses."""
        return time.monotonic() - self.refused_at > DISTRUST_SECONDS

    @property
    def handed_something(self) -> bool:
        """Whether it has taken anything over that is worth telling."""
        return bool(self.handed_clients or self.handed_pairs)

    @property
    def laden(self) -> bool:
        """Whether so much is under way to this sibling that what can wait should."""
        return self.under_way >= self._most_under_way

    def be_gentle(self) -> None:
        """Have only half as much under way to this sibling."""
        self._most_under_way = max(LEAST_UNDER_WAY, self._most_under_way // 2)

    def be_less_gentle(self) -> None:
        """Have a little more under way again, up to `MOST_UNDER_WAY`."""
        self._most_under_way = min(MOST_UNDER_WAY, self._most_under_way + 1)

    def is_like(self, standing: Standing) -> None:
        """It has said how it is."""
        self.has_said = True
        self.parts, self.load = standing.parts, standing.load
        self.room, self.places = standing.room, standing.places
        self.reads_past, self.makes_claims = standing.reads_past, standing.makes_claims
        if standing.spare is not None:  # what is under way is yet to come to it
            self.spare, self.spare_waiting = (spare - self.under_way for spare in standing.spare)

    def is_relieved_of(self, connections: int, *, waiting: int = 0) -> None:
        """So many of its connections, of which so many waited, are ours now."""
        self.spare_waiting += waiting
        if self.spare is not None:
            self.spare += connections

    # Saying

    def hand_client(self, client: Client) -> None:
        """Hand `client` on, with whatever else this iteration of the loop brings."""
        if not self._next_clients:
            self._run_callback(self._send_clients)
        self._next_clients.append(client)
        self._is_handed(1)
        self.spare_waiting -= bool(client.token)

    def hand_alone(self, client: Client) -> None:
        """Hand on `client`, which could not be sent together with others."""
        self.under_way += 1
        self.say(Parcel([client]))

    def hand_pair(self, pair: Pair) -> None:
        """Hand `pair` on, which has let go of its sockets."""
        self._is_handed(CONNECTIONS_OF_A_PAIR)
        self.say(Parcel([], pair))

    def _is_handed(self, connections: int) -> None:
        self.room -= connections
        self.under_way += connections
        if self.spare is not None:
            self.spare -= connections

    def say(self, message: Parcel | bytes) -> None:
        """Send a message, or queue it behind those that the sibling has not made room for."""
        self._outbox.append(message)
        if len(self._outbox) == 1:
            self._send()

    def _send_clients(self) -> None:
        clients, self._next_clients = self._next_clients, []
        batch: list[Client] = []
        size = 0
        for client in clients:
            batch.append(client)
            size += _size_of(client)
            if len(batch) == CLIENTS_AT_A_TIME or size > CLIENT_BYTES:
                self.say(Parcel(batch))
                batch, size = [], 0
        if batch:
            self.say(Parcel(batch))

    def _send(self) -> None:
        try:
            while self._outbox:
                message = self._outbox[0]
                if isinstance(message, Parcel):
                    self._send_parcel(message)
                else:
                    self._sock.send(message)
                self._outbox.popleft()
        except BlockingIOError:
            if not self._writes.active:
                self._writes.start(self._send)
            return
        except MemoryError:
            return  # it is tried again every second
        except OSError as error:
            if not isinstance(self._outbox[0], Parcel) or error.errno in _PASSING:
                return
            self._refuse_to_send()
            return
        self._writes.stop()

    def _refuse_to_send(self) -> None:
        """No socket can be handed on now: those that were to be must not stand still until one can."""
        self.refused_at = time.monotonic()
        self.is_full = False
        for parcel in self.take_back_unsent():
            self._owner.came_back(parcel)
        self._send()

    def _send_parcel(self, parcel: Parcel) -> None:
        """Send it; or give it back if it can never be sent, since whoever is in it, and behind it, is served nowhere
        meanwhile. Raises OSError or MemoryError when another one would fare no better."""
        envelope = self._owner.envelope()
        try:
            with contextlib.ExitStack() as files:
                packet, fds = _packed(envelope, parcel, files, with_past=self.reads_past, with_claim=self.makes_claims)
                self._sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        except MemoryError:
            raise
        except Exception as error:  # whatever it is, those behind it are not to blame
            if isinstance(error, OSError) and (error.errno not in _LASTING or self.closed):
                raise
            self.under_way -= parcel.connections
            parcel.drop_claim()
            self._owner.is_unfit(self, parcel, error)
            return
        parcel.sent = envelope.sent
        self.unconfirmed[envelope.serial] = parcel

    def keep_reading(self) -> None:
        """Watch the link again where nobody does: gevent stops a watcher after a mistake in what it has called, and
        libev one that the kernel refuses to watch (see `relay.clients.client.Watcher`); to be called once a second."""
        if not self._reads.active and not self.closed:
            self._reads.close()
            self._reads = self._new_watcher(self._sock.fileno(), 1)
            self._reads.start(self._read_some)

    def send_again(self) -> None:
        """Try once more what could not be sent."""
        if self._outbox:
            self._send()

    # Hearing

    def _read_some(self) -> None:
        """Take in what has come, for a moment. Were it one packet in each iteration of the event loop, a worker that
        moves much would be given its siblings' transfers more slowly than they can be handed on."""
        began = time.thread_time()
        until = began + min(max(READ_SECONDS, (began - self._unread_since) / 2), MOST_READ_SECONDS)
        while self.read() and not self.closed:
            now = time.thread_time()
            if now >= until:
                self._unread_since = now
                return
        self._unread_since = math.inf

    def read(self) -> bool:
        """Take in a packet that has come; when there are more, the event loop calls again. False if there was none."""
        try:
            size, ancillary = self._receive()
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        if size == 0:
            self._owner.lost(self)
            return False
        self.seconds_unheard = 0
        self._owner.heard(self, bytes(_view[:size]), _fds_in(ancillary))
        return True

    def _receive(self) -> tuple[int, list[tuple[int, int, bytes]]]:
        """Receive a packet into `_buffer`; returns its size, and what came beside it."""
        for _ in range(2):
            with contextlib.suppress(ConnectionResetError):  # it has died with something unread: that is told once, and
                size, ancillary, _, _ = self._sock.recvmsg_into([_buffer], _ANCILLARY_BYTES)  # before what it had said
                return size, ancillary
        return 0, []

    def has_spoken(self) -> bool:
        """Whether something has come that we have not read yet."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass  # which reading finds out
        return True

    def hear_out(self) -> list[bytes]:
        """Let the sibling say nothing more, and return what it has said and nobody has read. So of each parcel it is
        certain whose it is: from here on the sibling cannot confirm it, and what it has confirmed is in here. And to
        close a link unread would tell the sibling of a reset, before what we have confirmed."""
        packets = []
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
            with contextlib.suppress(ConnectionResetError):  # see `_receive`
                self._sock.recv(1, socket.MSG_PEEK)
            while size := self._sock.recv_into(_view):  # sockets that are beside it the kernel closes
                packets.append(bytes(_view[:size]))
        return packets

    def no_longer_under_way(self, serial: int) -> Parcel | None:
        """The parcel with that serial number, which the sibling has answered; None if there is none any more."""
        parcel = self.unconfirmed.pop(serial, None)
        if parcel is not None:
            self.under_way -= parcel.connections
            parcel.drop_claim()
        return parcel

    def confirm(self, serial: int) -> bool:
        """Send ``C``, past everything that is queued; False when that is not possible now."""
        try:
            self._sock.send(encode_answer(CONFIRMED, serial))
        except OSError:
            return False
        return True

    def welcome(self, greeting: Greeting, fds: Sequence[int]) -> bool:
        """Answer a newcomer's greeting, and give it these file descriptors; False when that is not possible."""
        try:
            socket.send_fds(self._sock, [greeting.encode()], list(fds))
        except OSError:
            return False  # it has gone again; or too many sockets are under way (ETOOMANYREFS)
        return True

    # Ending

    def take_back_unsent(self) -> list[Parcel]:
        """Everything that was to be handed on and has not left yet; it is ours again."""
        parcels = [message for message in self._outbox if isinstance(message, Parcel)]
        self._outbox = deque(message for message in self._outbox if not isinstance(message, Parcel))
        for parcel in parcels:
            parcel.drop_claim()
        if self._next_clients:
            parcels.append(Parcel(self._next_clients))
            self._next_clients = []
        self.under_way -= sum(parcel.connections for parcel in parcels)
        return parcels

    def take_back(self, older_than: float = 0.0) -> tuple[list[Parcel], list[Parcel]]:
        """Of everything that was sent more than `older_than` seconds ago and is not confirmed, what is ours again, and
        what the sibling has taken all the same."""
        before = time.monotonic() - older_than
        late = [serial for serial, parcel in self.unconfirmed.items() if parcel.sent <= before]
        parcels = [self.unconfirmed.pop(serial) for serial in late]
        self.under_way -= sum(parcel.connections for parcel in parcels)
        ours: list[Parcel] = []
        taken: list[Parcel] = []
        for parcel in parcels:
            (ours if parcel.take_back() else taken).append(parcel)
        return ours, taken

    def close(self) -> None:
        """End the link."""
        self.closed = True
        for watcher in (self._reads, self._writes):
            watcher.stop()
            watcher.close()
        self._sock.close()


def _size_of(client: Client) -> int:
    """How many bytes of a packet what `client` has said may take."""
    try:
        return len(client.packed_speech)
    except Exception:
        return 0  # when it is to be packed, it is seen that it cannot be


def _packed(
    envelope: Envelope, parcel: Parcel, files: contextlib.ExitStack, *, with_past: bool, with_claim: bool
) -> tuple[bytes, list[int]]:
    """A parcel as a packet, and the file descriptors beside it, of which `files` closes what was opened for it."""
    if parcel.pair is None:
        fds = [client.sock.fileno() for client in parcel.clients]
        offered = parcel.offer_claim(envelope) if with_claim else []
        return encode_clients(envelope, parcel.clients), fds + offered
    state, fds = parcel.pair.pack(files)
    offered = parcel.offer_claim(envelope) if with_claim else []
    return encode_pair(envelope, state, with_past=with_past), fds + offered


def readiest(links: Iterable[Link], connections: int) -> Link | None:
    """Of those that have room for so many connections, the one that has the most and is not `laden`, if there is one;
    None if none has room."""
    return min(
        (link for link in links if link.has_room(connections)),
        key=lambda link: (link.laden, -link.room),
        default=None,
    )


def _fds_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return fds.tolist()

"""The places of this worker: how many connections it has, whose they are, and whether there is one for another.

Both who waits and who is in a transfer takes a place, from accept until the socket is closed or in other hands. A
gateway's client takes two: the second one, which is its connection upstream's, is promised to it as soon as it comes.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection

from relay.clients.bounds import Bound, BoundsMet, Sources
from relay.clients.sources import is_loopback, is_same, source_of
from relay.options import Options

GUESTS_SECONDS = 30.0
"""How long those that a leaving worker has handed on do not count when it is about places for newcomers: by then
another worker has started in its place, or is not to come."""


class Places:
    """Counts connections, all of them and by source.

    Args:
        options: the operator's bounds.
        bounds_met: is told of each that keeps somebody out.
        on_free: called when places have become free, or may be made free.
    """

    def __init__(self, options: Options, bounds_met: BoundsMet, on_free: Callable[[], None]) -> None:
        self.taken = 0
        self.makes_room: Callable[[bytes | None], bool] = lambda source: True
        """Has somebody give way to a newcomer from that source, when all places are taken; False if nobody need."""
        self.look_who_has_left: Callable[[], None] = lambda: None
        """Ends the transfers whose ends the kernel tells of already."""
        self.promised: Callable[[], int] = lambda: 0
        """How many places are not taken yet, but promised to whoever is here."""
        self.kept: Callable[[], int] = lambda: 0
        """How many places are kept for what siblings have too many of (see `relay.workers.surplus`)."""
        self.per_newcomer = 1 if options.upstream is None else 2
        """How many a newcomer takes in the end."""
        self.most = options.max_connections
        self._most_held = options.most_held
        self.guests = 0
        """How many, that a worker which has left handed on, take no places of newcomers."""
        self._guests_until = 0.0  # monotonic seconds
        self.bounds_met = bounds_met
        self._counts_own = options.bounds_loopback
        self._sources = Sources(options.max_per_source, options.max_new_per_source)
        self.count_of = self._sources.count
        """How many connections from a source are here; 0 for one that nobody counts."""
        self.count_at_site = self._sources.count_at_site
        """The same of all sources of its site together."""
        self.counts = self._sources.counts
        """The sources that have any, and how many."""
        self.is_crowded = self._sources.is_crowded
        """Whether a source has more connections here than it may, guests and all."""
        self.forget_guests = self._sources.forget_guests
        """Of what a source has here a part is on its way to where it may have more."""
        self._on_free = on_free

    def is_full(self) -> bool:
        """Whether there is no place for a newcomer."""
        return self._left() < self.per_newcomer

    def _left(self) -> int:
        """How many places are left for newcomers; negative when more are taken than there are."""
        return min(self.spare + self.guests - self.kept(), self._most_held - self.taken - self.promised())

    @property
    def free(self) -> int:
        """For how many newcomers there are places."""
        return max(0, self._left() // self.per_newcomer)

    @property
    def spare(self) -> int:
        """How many connections less than it may have this worker has, guests and all; negative if it has more."""
        return self.most - self.taken - self.promised()

    @property
    def room(self) -> int:
        """For how many connections that siblings hand on there are descriptors."""
        return max(0, self._most_held - self.taken - self.promised())

    def source_of(self, host: str, *, own: bool) -> bytes | None:
        """Whom a connection from the numeric address `host` counts for; None for one that nobody counts, since it is
        this machine's `own`."""
        return None if own and not self._counts_own else source_of(host)

    def admits(self, source: bytes | None) -> bool:
        """Whether a new connection from `source` may come in; if so, somebody may have given way to it."""
        bound = self._bound_of(source)
        if bound is None and self.is_full() and not self.makes_room(source):
            bound = Bound.CROWDED
        if bound is not None:
            self.bounds_met.note(bound)
        return bound is None

    def admits_here(self, source: bytes | None, *, is_surplus: bool) -> bool:
        """Count a connection for `source` that is here already, and was nobody's; False when that may have no more.

        `is_surplus`: it was let in although all places were taken. Only now is it known who is to give way to it, and
        whether anybody is: so somebody may have, or it may not stay.
        """
        bound = self._bound_of(source)
        if bound is None and is_surplus and self._left() < 0 and not self.makes_room(source):
            bound = Bound.CROWDED
        if bound is not None:
            self.bounds_met.note(bound)
        elif source is not None:
            self._sources.add(source)
        return bound is None

    def _bound_of(self, source: bytes | None) -> Bound | None:
        """The bound that keeps another connection from `source` out.

        Many may be let in before the event loop gets as far as those who have left meanwhile. So who makes one transfer
        after the other, and never has more than a few connections, would seem to have them all."""
        bound = None if source is None else self._sources.refuses(source)
        if source is None or bound is not Bound.PER_SOURCE:
            return bound
        self.look_who_has_left()
        return bound if self._sources.has_its_share(source) else None

    def take(self, source: bytes | None) -> None:
        """A connection from `source` is here."""
        self.taken += 1
        if source is not None:
            self._sources.add(source)

    def welcome_guests(self, sources: Collection[bytes | None], *, until_replaced: bool) -> None:
        """Connections from these `sources` that are here have come from a worker that leaves: for a while they do not
        count as to what their sources may have. And `until_replaced`, that is, until somebody comes in that worker's
        place, they take none of the places that there are for newcomers, nor does anybody give way because of them."""
        for source in sources:
            if source is not None:
                self._sources.add_guest(source)
        self._guests_until = time.monotonic() + GUESTS_SECONDS
        if until_replaced:
            self.guests += len(sources)

    def guests_have_gone(self, number: int) -> None:
        """So many of them are on their way to another worker: what they took here newcomers do not get."""
        self.guests = max(0, self.guests - number)

    def settle_guests(self) -> list[bytes]:
        """There is somebody in the place of the worker that has left, so guests count like everybody. Returns the
        sources that have more than they may then; their guests do not count yet."""
        self.guests = 0
        return self._sources.settle_guests()

    def has_too_many(self, source: bytes | None) -> bool:
        """Whether more connections from `source` are here than may be; siblings may have handed them on."""
        return source is not None and self._sources.has_too_many(source)

    def give_back(self, *sources: bytes | None) -> None:
        """Connections from `sources` are here no longer."""
        self.taken -= len(sources)
        for source in sources:
            if source is not None:
                self._sources.remove(source)
        self._on_free()

    def look_again(self) -> None:
        """Somebody has come into a state in which it would give way at once: there may be room for a newcomer."""
        if self.is_full():
            self._on_free()

    def next_second(self) -> None:
        """Forget who has come; to be called every second."""
        self._sources.next_second()
        if time.monotonic() > self._guests_until:
            self.guests = 0
            self._sources.forget_all_guests()


def in_user_namespace() -> bool:
    """Whether this process is in another user namespace than the machine's own, as in a rootless container
    (user_namespaces(7)).

    There clients may all come from an address of its own, if a port handler outside connects on their behalf.
    """
    try:
        with open("/proc/self/uid_map") as file:
            return file.read().split() != ["0", "0", "4294967295"]
    except OSError:
        return False


def is_own(host: str, sock: socket.socket) -> bool:
    """Whether a client at the canonical address `host`, for whom `sock` is here, is on this machine: it came over the
    loopback, or from the address that it came to."""
    if is_loopback(host):
        return True  # as with every proxy and every check on this machine; to ask the kernel takes 1.5 µs
    try:
        here: str = sock.getsockname()[0]
    except OSError:
        return False  # it has just gone
    return is_same(host, here)

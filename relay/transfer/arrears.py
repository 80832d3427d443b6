"""What transfers that are over still owe: bytes on their way to somebody who has not taken them.

Closing a socket leaves them to the kernel: up to megabytes, which it keeps for as long as the peer answers, though that
may never read. No process has that socket then, and no bound of ours counts it: one source would have as much of the
kernel's memory as it liked, a transfer after the other, until honest connections had none. So a side that has not taken
all keeps its socket and a place of its source until it has, or has taken nothing for `ARREARS_SECONDS`; then it is
reset. The transfer is over and on record all the same. When all places are taken, those give way who are idle, as
`lumps` has it: as with transfers, a byte now and then keeps no place.

Such a side may still say something, which nobody hears: its stream is left unread, and read away before the socket is
closed, since the kernel answers what is unread then, and whatever comes to a stream that was shut down, with a reset.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from relay.clients.deadlines import Deadlines
from relay.clients.places import Places
from relay.process.one_by_one import one_by_one
from relay.transfer.ending import unacknowledged
from relay.transfer.lumps import IDLE_SECONDS, LITTLE_BYTES, paid_until

ARREARS_SECONDS = 300.0
"""For how long somebody may take nothing of what it is owed; who reads slowly has as long as it likes."""

SMALL_BYTES = 4 << 10
SMALL_SECONDS = 60.0
"""So much is left to the kernel, for so long: as a rule it is an end of stream that is under way. Otherwise who makes
one transfer after the other would have no place left for the next one."""

FIRST_LOOK_SECONDS = 1.0
"""How soon to look whether all has arrived: as a rule it was only under way. Later looks are ever more seldom."""

Side: TypeAlias = "tuple[socket.socket, bytes | None]"
"""One side of a transfer, and whom it counts for."""

_RESET = struct.pack("ii", 1, 0)

_MOST_READ_AWAY = 16
_scrap = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE)  # takes no memory, since nothing is written to it


class _Debt:
    """One side that is owed something."""

    __slots__ = ("due", "noted", "owed", "paid_until", "since", "sock", "source")

    def __init__(self, sock: socket.socket, source: bytes | None, owed: int, now: float, paid_until: float) -> None:
        self.sock = sock
        self.source = source
        self.owed = self.noted = owed
        self.since = now
        """Since when it has taken nothing, as far as that is known; monotonic seconds."""
        self.paid_until = max(now, paid_until)
        self.due = 0

    def see(self, owed: int, now: float) -> tuple[float, float]:
        """So much is owed now; returns for how many seconds it has been idle, which may be negative, and for how many
        it has taken nothing."""
        if owed < self.owed:
            self.owed, self.since = owed, now
        if self.noted - owed > LITTLE_BYTES:
            self.paid_until = paid_until(self.paid_until, self.noted - owed, now)
            self.noted = owed
        return now - self.paid_until, now - self.since


class Arrears:
    """Those who are owed something.

    Args:
        places: where each of them has a place.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._debts: set[_Debt] = set()
        self._still: OrderedDict[_Debt, None] = OrderedDict()  # who would give way, in the order in which that was seen
        self._deadlines: Deadlines[_Debt] = Deadlines()
        self._is_closed = False

    def __len__(self) -> int:
        """How many they are."""
        return len(self._debts)

    def still(self) -> int:
        """How many of them would give way, if all of these still do; if there are any, the first does."""
        now = time.monotonic()
        while self._still:
            debt = next(iter(self._still))
            unpaid, _ = debt.see(unacknowledged(debt.sock), now)
            if unpaid >= IDLE_SECONDS:
                break
            del self._still[debt]  # it has taken something since it was looked at
        return len(self._still)

    def take_over(self, sides: Sequence[Side], paid_by: Callable[[float], float]) -> None:
        """These `sides` of a transfer that is over are about to be closed, and those whose peers have not taken all are
        closed here: they are detached then, and hear the end of the stream. `paid_by` tells until when what has arrived
        has paid, as is known now (see `lumps`)."""
        owed = [unacknowledged(sock) for sock, _ in sides]
        now = time.monotonic()
        paid = paid_by(now) if max(owed) > SMALL_BYTES else now  # once, while all of their sockets are there
        for (sock, source), size in zip(sides, owed, strict=True):
            if size > SMALL_BYTES and not self._is_closed:
                self._take_over(sock, source, size, now, paid)
            elif size:
                _leave_to_the_kernel(sock, SMALL_SECONDS if size <= SMALL_BYTES else ARREARS_SECONDS)

    def _take_over(self, sock: socket.socket, source: bytes | None, owed: int, now: float, paid: float) -> None:
        with contextlib.suppress(OSError):  # as closing it would
            sock.shutdown(socket.SHUT_WR)
        debt = _Debt(socket.socket(fileno=sock.detach()), source, owed, now, paid)
        self._places.take(source)
        self._debts.add(debt)
        self._deadlines.set(debt, now + FIRST_LOOK_SECONDS)

    def refuse(self, sock: socket.socket) -> None:
        """`sock` is about to be closed, and its peer was waited for long enough: it is owed nothing any more, but for a
        few bytes that are only under way."""
        owed = unacknowledged(sock)
        if owed > SMALL_BYTES:
            _have_reset(sock)
        elif owed:
            _leave_to_the_kernel(sock, SMALL_SECONDS)

    def collect(self, now: float) -> Iterator[None]:
        """Look at those whose time has come, one with each step; `now` in monotonic seconds."""
        for debt in self._deadlines.take_due(now):
            if debt in self._debts:
                self._look_at(debt, now)
            yield

    def _look_at(self, debt: _Debt, now: float) -> None:
        owed = unacknowledged(debt.sock)
        if not owed:
            self._close(debt)
            return
        unpaid, stood = debt.see(owed, now)
        if unpaid < IDLE_SECONDS:
            self._still.pop(debt, None)
        elif debt not in self._still:
            self._still[debt] = None
            self._places.look_again()
        if stood >= ARREARS_SECONDS:
            self._reset(debt)
        else:
            self._deadlines.set(debt, now + max(FIRST_LOOK_SECONDS, min(abs(unpaid) / 2, ARREARS_SECONDS - stood)))

    def cut_short(self) -> bool:
        """Let go of one that would give way, if there is one."""
        if not self.still():
            return False
        self._reset(next(iter(self._still)))
        return True

    def close(self) -> None:
        """Leave all of them to the kernel, those who are still to come as well, for as long as they could be here."""
        self._is_closed = True
        one_by_one([*self._debts], self._leave, "in leaving to the kernel what somebody is owed")

    def _leave(self, debt: _Debt) -> None:
        _leave_to_the_kernel(debt.sock, ARREARS_SECONDS)
        self._close(debt)

    def _reset(self, debt: _Debt) -> None:
        _have_reset(debt.sock)
        self._close(debt)

    def _close(self, debt: _Debt) -> None:
        self._debts.discard(debt)
        self._still.pop(debt, None)
        self._deadlines.clear(debt)
        try:
            _read_away(debt.sock)
            debt.sock.close()
        finally:
            self._places.give_back(debt.source)


def _have_reset(sock: socket.socket) -> None:
    """Have closing `sock` reset the connection. Source: socket(7), SO_LINGER."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _leave_to_the_kernel(sock: socket.socket, seconds: float) -> None:
    """Have the kernel see to it, but for no longer than that, when `sock` is closed, as it is about to be. Source:
    tcp(7), TCP_USER_TIMEOUT, milliseconds."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
    _read_away(sock)


def _read_away(sock: socket.socket) -> None:
    """Read what `sock` has to say that nobody hears, if that is not too much, without copying it. Source: tcp(7),
    MSG_TRUNC."""
    with contextlib.suppress(OSError):
        for _ in range(_MOST_READ_AWAY):
            if sock.recv_into(_scrap, 0, socket.MSG_DONTWAIT | socket.MSG_TRUNC) < len(_scrap):
                return

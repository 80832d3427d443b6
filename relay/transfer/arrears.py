"""What transfers that are over still owe: bytes on their way to somebody who has not taken them.

Closing a socket leaves them to the kernel: up to megabytes, which it keeps for as long as the peer answers, though that
may never read. No process has that socket then, and no bound of ours counts it: one source would have as much of the
kernel's memory as it liked, a transfer after the other, until honest connections had none. So a side that has not taken
all keeps its socket and a place of its source until it has, or has taken nothing for `ARREARS_SECONDS`; then it is
reset. The transfer is over and on record all the same. When all places are taken, those who have taken nothing for
`STILL_SECONDS` give way.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Iterator

from relay.clients.deadlines import Deadlines
from relay.clients.places import Places
from relay.process.one_by_one import one_by_one
from relay.transfer.ending import unacknowledged

ARREARS_SECONDS = 60.0
"""For how long somebody may take nothing of what it is owed; who reads slowly has as long as it likes."""

SMALL_BYTES = 4 << 10
"""So much is left to the kernel, for as long: as a rule it is an end of stream that is under way. Otherwise who makes
one transfer after the other would have no place left for the next one."""

STILL_SECONDS = 5.0

FIRST_LOOK_SECONDS = 1.0
"""How soon to look whether all has arrived: as a rule it was only under way. Later looks are ever more seldom."""

_RESET = struct.pack("ii", 1, 0)


class _Debt:
    """One side that is owed something."""

    __slots__ = ("due", "owed", "since", "sock", "source")

    def __init__(self, sock: socket.socket, source: bytes | None, owed: int, now: float) -> None:
        self.sock = sock
        self.source = source
        self.owed = owed
        self.since = now
        """Since when it has taken nothing, as far as that is known; monotonic seconds."""
        self.due = 0


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

    @property
    def still(self) -> int:
        """How many of them would give way."""
        return len(self._still)

    def take_over(self, sock: socket.socket, source: bytes | None) -> None:
        """`sock`, of a transfer that is over, is about to be closed, and is closed here if its peer has not taken all;
        `source` is where that is from. It is detached then, and hears the end of the stream."""
        owed = unacknowledged(sock)
        if not owed:
            return
        if owed <= SMALL_BYTES or self._is_closed:
            _bound(sock)
            return
        with contextlib.suppress(OSError):  # as closing it would
            sock.shutdown(socket.SHUT_RDWR)
        now = time.monotonic()
        debt = _Debt(socket.socket(fileno=sock.detach()), source, owed, now)
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
            _bound(sock)

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
        if owed < debt.owed:
            debt.owed, debt.since = owed, now
            self._still.pop(debt, None)
        stood = now - debt.since
        if stood >= STILL_SECONDS and debt not in self._still:
            self._still[debt] = None
            self._places.look_again()
        if stood >= ARREARS_SECONDS:
            self._reset(debt)
        else:
            self._deadlines.set(debt, now + max(FIRST_LOOK_SECONDS, min(stood / 2, ARREARS_SECONDS - stood)))

    def cut_short(self) -> None:
        """Let go of one that would give way; there is one."""
        self._reset(next(iter(self._still)))

    def close(self) -> None:
        """Leave all of them to the kernel, those who are still to come as well, for as long as they could be here."""
        self._is_closed = True
        one_by_one([*self._debts], self._leave_to_the_kernel, "in leaving to the kernel what somebody is owed")

    def _leave_to_the_kernel(self, debt: _Debt) -> None:
        _bound(debt.sock)
        self._close(debt)

    def _reset(self, debt: _Debt) -> None:
        _have_reset(debt.sock)
        self._close(debt)

    def _close(self, debt: _Debt) -> None:
        self._debts.discard(debt)
        self._still.pop(debt, None)
        self._deadlines.clear(debt)
        try:
            debt.sock.close()
        finally:
            self._places.give_back(debt.source)


def _have_reset(sock: socket.socket) -> None:
    """Have closing `sock` reset the connection. Source: socket(7), SO_LINGER."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _bound(sock: socket.socket) -> None:
    """Have the kernel wait no longer either, when `sock` is closed. Source: tcp(7), TCP_USER_TIMEOUT, milliseconds."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(ARREARS_SECONDS * 1000))

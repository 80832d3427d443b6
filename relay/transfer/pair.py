"""Two clients glued: a pump in each direction, one greenlet that waits for both, and how it ends.

A pair is over

- when both sides have ended their streams and all they sent was delivered;
- or when one has, and the other has acknowledged it all and then sends nothing for `HALF_CLOSED_SECONDS`;
- or when one has ended its stream and then gone altogether, as soon as the other has acknowledged all it sent;
- at once when either side is reset before that, or turns out to be dead.

A side that does not read stops its partner, and nothing else: that may last as long as it likes, as long as its host
still answers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gevent
from gevent.select import poll

from relay.clients.bounds import Bound
from relay.transfer.pace import Pace
from relay.transfer.pipes import Pipe, PipePool
from relay.transfer.pump import INPUT, OVER, ROOM, TURN, Pump
from relay.transfer.state import PairState
from relay.transfer.turns import Turns

HALF_CLOSED_SECONDS = 10.0
"""How long the second side may say nothing once it has all of the first one's stream."""

STALL_CHECK_SECONDS = 1.0
"""How often a pair with a side that does not read looks whether both are still there: such a side's partner is not
being read from, and so poll(2) does not tell of its reset."""

DEAD_SECONDS = 300.0
"""A side that has not acknowledged anything for so long while it was owed bytes is gone. A living one that does not
read answers the kernel's zero-window probes, at least every two minutes (TCP_RTO_MAX)."""

QUIET_SECONDS = 0.1
"""When nothing has happened to a pair for so long, it does without its greenlet, unless a side is still owed bytes.
Then it looks, once a second, whether that side is dead: keepalive does not, being silent while anything is
unacknowledged, and TCP itself tries for a quarter of an hour (tcp_retries2)."""

_TCP_INFO_LAST_ACK_RECV = 56  # offset of tcpi_last_ack_recv, milliseconds, in struct tcp_info of linux/tcp.h


LOOK_BACK_TURNS = 4
"""While one direction has turn after turn, poll(2) is not asked about the other; every so many turns it is tried."""


class Detached(gevent.GreenletExit):  # type: ignore[misc]  # gevent has no types
    """Thrown into a pair's greenlet to make it let go of the pair, as it is, between two turns."""


class Quiet(Exception):
    """There is nothing to wait for but that either side says something."""


class Cut(gevent.GreenletExit):  # type: ignore[misc]  # gevent has no types
    """Ends a pair that has met a bound of the operator's."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self.bound = bound


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows to a pair, in bytes and bytes a second; None is no limit. `relay_pace` is shared."""

    pair_bytes: int | None = None
    pair_rate: int | None = None
    relay_pace: Pace | None = None


class Pair:
    """Two connections that are one transfer.

    `started` (seconds since the epoch) and `arrived` (monotonic seconds) are the first side's; `waiting_time` is how
    long it was alone, in seconds. `limits` are the operator's, if there are any; `sources` are where the sides come
    from (see `bounds`), for whoever counts. `on_over` is called with the pair, once, from its greenlet, when it is over
    and its sockets are closed; then `cut_by` is the bound that ended it, if one did.
    """

    __slots__ = (
        "_idle_since",
        "_moved_a_second_ago",
        "_moved_then",
        "_pace",
        "_watchers",
        "arrived",
        "cut_by",
        "first",
        "greenlet",
        "limits",
        "on_over",
        "pumps",
        "second",
        "sources",
        "started",
        "turns",
        "waiting_time",
    )

    def __init__(
        self,
        first: socket.socket,
        second: socket.socket,
        *,
        started: float,
        arrived: float,
        waiting_time: float,
        pipes: PipePool,
        turns: Turns,
        on_over: Callable[[Pair], None],
        limits: Limits | None = None,
        sources: tuple[bytes | None, bytes | None] = (None, None),
    ) -> None:
        self.first = first
        self.second = second
        self.started = started
        self.arrived = arrived
        self.waiting_time = waiting_time
        self.turns = turns
        self.on_over = on_over
        self.limits = limits
        self.sources = sources
        self.cut_by: Bound | None = None
        self._pace = None if limits is None or limits.pair_rate is None else Pace(limits.pair_rate)
        self._moved_then = 0
        self._moved_a_second_ago = 0
        self._idle_since = 0.0
        self.pumps = (Pump(first, second, pipes, turns), Pump(second, first, pipes, turns))
        self.greenlet: gevent.Greenlet | None = None
        self._watchers: list[Any] = []

    @property
    def started_pumping(self) -> bool:
        """Whether the pair looks after itself, with a greenlet or, while it is quiet, without."""
        return self.greenlet is not None or bool(self._watchers)

    @property
    def moved(self) -> int:
        """Bytes delivered so far, both directions."""
        there, back = self.pumps
        return there.moved + back.moved

    def start(self) -> None:
        """Begin to pump, or go on: with a greenlet as soon as there is something to move or to end."""
        for pump in self.pumps:
            pump.resume()
        if all(pump.waits == INPUT for pump in self.pumps):
            self._listen()
        else:
            self._wake()

    def _wake(self) -> None:
        self._stop_listening()
        self._idle_since = 0.0  # so that it is not cut before its greenlet runs: that would never record it
        self.greenlet = gevent.spawn(self._pump_until_over)

    def detach(self) -> None:
        """Make the pair's greenlet let go of it, between two turns; to be called from another greenlet."""
        self._stop_listening()
        while self.greenlet is not None:
            # The greenlet may fall quiet before this reaches it, and the pair even begin anew.
            greenlet = self.greenlet
            greenlet.kill(Detached)
            if self.greenlet is greenlet:
                self.greenlet = None
            self._stop_listening()

    def was_busy(self) -> bool:
        """Whether anything has moved since this was last asked."""
        before, self._moved_a_second_ago = self._moved_a_second_ago, self.moved
        return self.moved != before

    def cut_if_idle(self, now: float, seconds: float) -> None:
        """End the pair if nothing has moved for so long; to be asked regularly, `now` being monotonic seconds."""
        moved = self.moved
        if moved != self._moved_then or not self._idle_since:
            self._moved_then, self._idle_since = moved, now
        elif now - self._idle_since > seconds:
            if self._watchers:
                self.cut_by = Bound.IDLE
                self._end()
            elif self.greenlet is not None:
                self.greenlet.kill(Cut(Bound.IDLE), block=False)

    def pack(self) -> tuple[PairState, list[int]]:
        """This pair as it is, for another process, and the file descriptors that go with it; after `detach`."""
        (there, there_fds), (back, back_fds) = (pump.pack() for pump in self.pumps)
        state = PairState(self.started, self.arrived, self.waiting_time, there, back)
        return state, [self.first.fileno(), self.second.fileno(), *there_fds, *back_fds]

    def unpack(self, state: PairState, pipes: Sequence[Pipe]) -> None:
        """Go on where a pair in another process was; `pipes` are those that hold bytes, in the order of the pumps."""
        left = list(pipes)
        for pump, pump_state in zip(self.pumps, (state.there, state.back), strict=True):
            pump.unpack(pump_state, left.pop(0) if pump_state.held and not pump_state.rest else None)

    def close(self) -> None:
        """Close both sockets and give up what is still held."""
        for pump in self.pumps:
            pump.abandon()
        self.first.close()
        self.second.close()

    def _pump_until_over(self) -> None:
        try:
            try:
                self._pump()
            except OSError:
                self._deliver_what_fits()
        except Detached:
            return
        except Quiet:
            self.greenlet = None
            self._listen()
            return
        except Cut as cut:
            self.cut_by = cut.bound
        except BaseException:
            self._end()
            raise
        self._end()

    def _listen(self) -> None:
        """Do without a greenlet until either side says something again. It costs ten times what is left of an idle
        pair without it, and pairs may be idle for hours."""
        io = gevent.get_hub().loop.io
        self._watchers = [io(sock.fileno(), 1) for sock in (self.first, self.second)]
        for watcher in self._watchers:
            watcher.start(self._wake)

    def _stop_listening(self) -> None:
        for watcher in self._watchers:
            watcher.stop()
            watcher.close()
        self._watchers = []

    def _end(self) -> None:
        self._stop_listening()
        self.close()
        self.on_over(self)

    def _pump(self) -> None:
        """Give the pumps their turns until the pair is over; raises OSError when a side was reset or is dead."""
        there, back = self.pumps
        poller = poll()
        watched: tuple[int, int] | None = None
        ready: dict[int, int] = {}
        turns = 0
        while not self._is_over():
            if there.waits == TURN or back.waits == TURN:
                self.turns.wait()
                turns += 1
                for pump in self.pumps:
                    if pump.waits == TURN or (pump.waits != OVER and turns % LOOK_BACK_TURNS == 0):
                        self._turn(pump)
                continue
            if watched != (there.waits, back.waits):
                watched = (there.waits, back.waits)
                self._watch(poller)
            has_everything = self._is_half_closed() and not self._owes()
            ready = dict(poller.poll(self._patience(happened=bool(ready))))
            if not ready:
                if has_everything:
                    return
                self._look_for_the_dead()
                if self._is_quiet():
                    raise Quiet
            for pump in self.pumps:
                waits_at = pump.sink if pump.waits == ROOM else pump.source
                if pump.waits > 0 and ready.get(waits_at.fileno(), 0) & pump.waits:
                    self._turn(pump)

    def _turn(self, pump: Pump) -> None:
        if self.limits is None:
            pump.turn(self.turns.size())
        else:
            self._turn_within(self.limits, pump)

    def _turn_within(self, limits: Limits, pump: Pump) -> None:
        """Give `pump` a turn that keeps to the limits; raises Cut when they allow none any more."""
        paces = [pace for pace in (self._pace, limits.relay_pace) if pace is not None]
        most = min([self.turns.size(), *(pace.portion() for pace in paces)])
        if limits.pair_bytes is not None:
            most = min(most, limits.pair_bytes - self.moved - sum(pump.held for pump in self.pumps))
            if most <= 0 and not pump.held:
                if _has_more(pump.source):
                    raise Cut(Bound.PAIR_BYTES)
                most = 1  # it was exactly what is allowed, and its end is no byte
        now = time.monotonic()
        delay = max((pace.reserve(most, now) for pace in paces), default=0.0)
        before = pump.moved + pump.held
        try:
            if delay > 0:
                gevent.sleep(delay)
            pump.turn(most)
        finally:
            unused = most - (pump.moved + pump.held - before)
            for pace in paces:
                pace.give_back(unused)

    def _watch(self, poller: poll) -> None:
        """Tell `poller` what the pumps wait for."""
        there, back = self.pumps
        for sock, out_of_it, into_it in ((self.first, there, back), (self.second, back, there)):
            events = (out_of_it.waits == INPUT and INPUT) | (into_it.waits == ROOM and ROOM)
            if events:
                poller.register(sock, events)
            else:
                with contextlib.suppress(KeyError):
                    poller.unregister(sock)

    def _patience(self, *, happened: bool) -> int:
        """How long to wait for the sockets, in milliseconds; `happened` is whether the last time was not in vain."""
        if any(pump.waits == ROOM or pump.discards for pump in self.pumps):
            return int(STALL_CHECK_SECONDS * 1000)
        if self._is_half_closed():
            return int(HALF_CLOSED_SECONDS * 1000)
        return int((QUIET_SECONDS if happened else STALL_CHECK_SECONDS) * 1000)

    def _is_over(self) -> bool:
        """Whether nothing can be delivered any more, in either direction."""
        there, back = self.pumps
        if there.waits == OVER or back.waits == OVER:
            return there.waits == back.waits or ((there.discards or back.discards) and not self._owes())
        return False

    def _is_half_closed(self) -> bool:
        """Whether one stream is over, and of the other everything that came was delivered."""
        there, back = self.pumps
        return {there.waits, back.waits} == {OVER, INPUT}

    def _is_quiet(self) -> bool:
        """Whether neither stream is over, nothing is on its way in either, and so nothing can happen but input."""
        return all(pump.waits == INPUT and not pump.discards and not _unacknowledged(pump.sink) for pump in self.pumps)

    def _owes(self) -> bool:
        """Whether the end of a stream that is over, or something before it, is still on its way."""
        return any(pump.waits == OVER and _unacknowledged(pump.sink) for pump in self.pumps)

    def _look_for_the_dead(self) -> None:
        """Find out about a side that poll(2) is not asked about, or whose host has gone while it was owed bytes.

        Raises OSError when there is one.
        """
        for pump in self.pumps:
            if pump.waits == ROOM:
                error = pump.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error not in (0, errno.EPIPE):  # EPIPE: it had ended its stream before, and that is still delivered
                    raise OSError(error, os.strerror(error))
            if _unacknowledged(pump.sink) and _silence(pump.sink) > DEAD_SECONDS:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def _deliver_what_fits(self) -> None:
        """After a reset: let through what had arrived before it, as far as that takes no waiting."""
        for pump in self.pumps:
            with contextlib.suppress(OSError):
                if pump.waits != OVER:
                    pump.turn(self.turns.size())


def _has_more(sock: socket.socket) -> bool:
    """Whether bytes have come over `sock` that nobody has read; False at the end of its stream."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def _silence(sock: socket.socket) -> float:
    """Seconds since the peer of `sock` last acknowledged anything, a keepalive probe too. Source: tcp(7), TCP_INFO."""
    tcp_info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_LAST_ACK_RECV + 4)
    (milliseconds,) = struct.unpack_from("=I", tcp_info, _TCP_INFO_LAST_ACK_RECV)
    return float(milliseconds) / 1000


def _unacknowledged(sock: socket.socket) -> int:
    """Bytes that were written to `sock` and have not arrived, an end of stream being one. Source: tcp(7), SIOCOUTQ."""
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(answer, sys.byteorder)

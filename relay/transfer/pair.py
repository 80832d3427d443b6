"""Two clients glued: a pump in each direction, who waits for both, and how it ends.

A pair that has much to move has a greenlet, which waits with `gevent.select.poll` and queues for its `turns`. Once
nothing has happened for a moment it does without, and is at `rest`: quiet, or passing small messages, or standing still
since a side does not read. So only who moves much costs what a greenlet costs, and holds a pipe.

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
from select import EPOLLET, EPOLLIN, EPOLLOUT, POLLERR, POLLHUP
from typing import TYPE_CHECKING, TypeAlias

import gevent
from gevent.select import poll

from relay.clients.bounds import Bound
from relay.transfer.pace import Pace
from relay.transfer.pipes import PipePool
from relay.transfer.pump import INPUT, OVER, ROOM, TURN, Pump
from relay.transfer.rest import Rest
from relay.transfer.state import PairState
from relay.transfer.turns import Turns

if TYPE_CHECKING:
    from relay.clients.frames import FrameReader
    from relay.clients.pings import Pings
    from relay.transfer.framed import FramedPump

HALF_CLOSED_SECONDS = 10.0
"""How long the second side may say nothing once it has all of the first one's stream."""

GONE_CHECK_SECONDS = 1.0
"""How often a pair of which one side has ended its stream and gone looks whether the other has acknowledged it all."""

DEAD_SECONDS = 300.0
"""A side that has not acknowledged anything for so long while it was owed bytes is gone. A living one that does not
read answers the kernel's zero-window probes, at least every two minutes (TCP_RTO_MAX)."""

DEAD_CHECKS = 15
"""How often, in that time, a pair of which a side is owed bytes looks whether that side is dead: keepalive does not,
being silent while anything is unacknowledged, and TCP itself tries for a quarter of an hour (tcp_retries2)."""

MUCH_BYTES = 256 << 10
QUIET_SECONDS = 0.1
"""When a pair has moved less than this in that time, it does without its greenlet; and a pump that has moved nothing,
since its receiver takes nothing, gives its pipe to somebody who does."""

_TCP_INFO_LAST_ACK_RECV = 56  # offset of tcpi_last_ack_recv, milliseconds, in struct tcp_info of linux/tcp.h


class Detached(gevent.GreenletExit):  # type: ignore[misc]  # gevent has no types
    """Thrown into a pair's greenlet to make it let go of the pair, as it is, between two turns."""


class Quiet(Exception):
    """Not much has happened for a while."""


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
    from (see `bounds`), for whoever counts; `readers` is where the frames are of those that speak WebSocket. `on_over`
    is called with the pair, once, when it is over and its sockets are closed; then `cut_by` is the bound that ended it,
    if one did.
    """

    __slots__ = (
        "_delivered",
        "_idle_since",
        "_moved_a_second_ago",
        "_moved_then",
        "_pace",
        "arrived",
        "cut_by",
        "due",
        "first",
        "greenlet",
        "limits",
        "on_over",
        "pumps",
        "rest",
        "second",
        "sources",
        "started",
        "turns",
        "waiting_time",
        "watched",
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
        rest: Rest,
        on_over: Callable[[Pair], None],
        limits: Limits | None = None,
        sources: tuple[bytes | None, bytes | None] = (None, None),
        readers: Readers = (None, None),
    ) -> None:
        self.first = first
        self.second = second
        self.started = started
        self.arrived = arrived
        self.waiting_time = waiting_time
        self.turns = turns
        self.rest = rest
        self.due = 0
        self.watched: tuple[int, int] | None = None
        self._delivered: tuple[int, bool] | None = None
        self.on_over = on_over
        self.limits = limits
        self.sources = sources
        self.cut_by: Bound | None = None
        self._pace = None if limits is None or limits.pair_rate is None else Pace(limits.pair_rate)
        self._moved_then = 0
        self._moved_a_second_ago = 0
        self._idle_since = 0.0
        self.pumps = _pumps(first, second, pipes, turns, readers)
        self.greenlet: gevent.Greenlet | None = None

    @property
    def started_pumping(self) -> bool:
        """Whether the pair looks after itself, with a greenlet or at rest."""
        return self.greenlet is not None or self.watched is not None

    @property
    def speaks_websocket(self) -> bool:
        """Whether either side does."""
        return any(pump.reader is not None for pump in self.pumps)

    def be_pinged(self, pings: Pings) -> None:
        """Have the sides that speak WebSocket pinged."""
        for pump in self.pumps:
            if not isinstance(pump, Pump) and pump.frames_out:
                pings.add(pump, time.monotonic())

    @property
    def moved(self) -> int:
        """Bytes delivered so far, both directions."""
        there, back = self.pumps
        return there.moved + back.moved

    def start(self) -> None:
        """Begin to pump, or go on: at rest, until there is much to move."""
        for pump in self.pumps:
            pump.resume()
        if any(pump.waits == TURN for pump in self.pumps):
            self._wake()
        else:
            self._go_to_rest()

    def detach(self) -> None:
        """Make the pair let go of its sockets, between two turns; to be called from another greenlet."""
        self.rest.forget(self)
        while self.greenlet is not None:
            # The greenlet may fall quiet before this reaches it, and the pair even begin anew.
            greenlet = self.greenlet
            greenlet.kill(Detached)
            if self.greenlet is greenlet:
                self.greenlet = None
            self.rest.forget(self)

    def was_busy(self) -> bool:
        """Whether anything has moved since this was last asked."""
        before, self._moved_a_second_ago = self._moved_a_second_ago, self.moved
        return self.moved != before

    def idle_for(self, now: float) -> float:
        """For how many seconds nothing has moved, as far as that is known: since the last time but one that somebody
        asked. `now` is in monotonic seconds."""
        moved = self.moved
        if moved != self._moved_then or not self._idle_since:
            self._moved_then, self._idle_since = moved, now
        return now - self._idle_since

    def cut(self, bound: Bound) -> None:
        """End the pair, which has met a bound of the operator's."""
        if self.watched is not None:
            self.cut_by = bound
            self._end()
        elif self.greenlet is not None:
            self.greenlet.kill(Cut(bound), block=False)

    def pack(self) -> tuple[PairState, list[int]]:
        """This pair as it is, for another process, and the file descriptors that go with it; after `detach`."""
        (there, there_fds), (back, back_fds) = (pump.pack() for pump in self.pumps)
        first_frames, second_frames = (
            b"" if pump.reader is None else pump.reader.state.encode() for pump in self.pumps
        )
        state = PairState(self.started, self.arrived, self.waiting_time, there, back, first_frames, second_frames)
        return state, [self.first.fileno(), self.second.fileno(), *there_fds, *back_fds]

    def unpack(self, state: PairState, fds: Sequence[int]) -> None:
        """Go on where a pair in another process was; `fds` are those that came with the pumps, in their order."""
        there, back = self.pumps
        there.unpack(state.there, fds[: state.there.fds])
        back.unpack(state.back, fds[state.there.fds :])

    def close(self) -> None:
        """Close both sockets and give up what is still held."""
        for pump in self.pumps:
            pump.abandon()
        self.first.close()
        self.second.close()

    def _end(self) -> None:
        self.rest.forget(self)
        self.close()
        self.on_over(self)

    # At rest (what `rest` has to know)

    @property
    def fds(self) -> tuple[int, int]:
        """The file descriptors of the first and the second side."""
        return self.first.fileno(), self.second.fileno()

    @property
    def events(self) -> tuple[int, int]:
        """What the pumps wait for, at the first and at the second side."""
        there, back = self.pumps
        return _events(there, back), _events(back, there)

    def _go_to_rest(self) -> None:
        for pump in self.pumps:
            pump.put_away()
        self.rest.watch(self)
        self._plan_to_look_around()

    def attend(self, fd: int, events: int) -> None:
        """Something has happened to the side with that descriptor while the pair rests."""
        if self.limits is not None:
            self._wake()
            return
        there, back = self.pumps
        out_of, into = (there, back) if there.source.fileno() == fd else (back, there)
        much = False
        try:
            if not events & (EPOLLIN | EPOLLOUT):
                _raise_error_of(out_of.source)
            if into.waits == ROOM:
                much = into.sip()
            if out_of.waits == INPUT:
                much = out_of.sip() or much
        except OSError:
            self._deliver_what_fits()
            self._end()
            return
        if much:
            self._wake()
        elif out_of.waits == into.waits == INPUT and self.watched == _BOTH_INPUT and not out_of.discards:
            if not self.due:
                self.rest.look_at(self, time.monotonic() + DEAD_SECONDS / DEAD_CHECKS)
        elif self._is_over():
            self._end()
        else:
            self.rest.watch(self)
            self._plan_to_look_around()

    def _plan_to_look_around(self) -> None:
        """See to it that the pair ends when nothing happens, if it has to."""
        there, back = self.pumps
        if self._is_one_gone():
            patience = GONE_CHECK_SECONDS
        elif OVER in (there.waits, back.waits):
            patience = HALF_CLOSED_SECONDS
        elif any(pump.waits == ROOM or _unacknowledged(pump.sink) for pump in self.pumps):
            patience = DEAD_SECONDS / DEAD_CHECKS
        else:
            return  # keepalive finds out
        self._delivered = (self.moved, self._is_half_closed() and not self._owes())
        self.rest.look_at(self, time.monotonic() + patience)

    def look_around(self, now: float) -> None:
        """Nothing may have happened for a while: end what is over or dead, by the clock."""
        self.due = 0
        if self._delivered == (self.moved, True):
            self._end()  # the one side has ended its stream, the other has it all, and has said nothing since
            return
        try:
            self._look_for_the_dead()
        except OSError:
            self._deliver_what_fits()
            self._end()
            return
        if self._is_over():
            self._end()
        else:
            self._plan_to_look_around()

    # With much to move

    def _wake(self) -> None:
        self.rest.forget(self)
        self._idle_since = 0.0  # so that it is not cut before its greenlet runs: that would never record it
        self.greenlet = gevent.spawn(self._pump_until_over)

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
            self._go_to_rest()
            return
        except Cut as cut:
            self.cut_by = cut.bound
        except BaseException:
            self._end()
            raise
        self._end()

    def _pump(self) -> None:
        """Give the pumps their turns until the pair is over; raises OSError when a side was reset or is dead, and
        Quiet when not much has happened for a while."""
        poller = poll()
        watched: tuple[int, int] | None = None
        moved = [pump.moved for pump in self.pumps]
        look_back_at = time.monotonic() + QUIET_SECONDS
        for pump in self.pumps:
            if pump.waits == INPUT:
                pump.waits = TURN  # whatever has woken this pair
        while not self._is_over():
            now = time.monotonic()
            if now >= look_back_at:
                look_back_at = now + QUIET_SECONDS
                moved = self._look_back(moved)
            if any(pump.waits == TURN for pump in self.pumps):
                self._take_turns()
                continue
            if watched != self.events:
                watched = self.events
                for sock, events in zip((self.first, self.second), watched, strict=True):
                    _poll_for(poller, sock, events)
            ready = dict(poller.poll(QUIET_SECONDS * 1000))
            for pump in self.pumps:
                waits_at = pump.sink if pump.waits == ROOM else pump.source
                if pump.waits > 0 and ready.get(waits_at.fileno(), 0) & (pump.waits | POLLERR | POLLHUP):
                    self._turn(pump)

    def _look_back(self, before: list[int]) -> list[int]:
        """Find out what has become of the pumps that had moved so much `before`; returns what they have moved by now.

        Raises Quiet if that is not much.
        """
        moved = [pump.moved for pump in self.pumps]
        if all(pump.waits != TURN for pump in self.pumps) and sum(moved) - sum(before) < MUCH_BYTES:
            raise Quiet
        for pump, now, then in zip(self.pumps, moved, before, strict=True):
            if pump.waits == ROOM and now == then:
                pump.put_away()
        return moved

    def _take_turns(self) -> None:
        """Let the pumps that have more to move queue, and look at the other direction each time."""
        for pump in self.pumps:
            if pump.waits == OVER:
                continue
            if self.limits is None and pump.waits == TURN:
                self.turns.wait(pump)
            else:
                if pump.waits == TURN:
                    self.turns.wait()
                self._turn(pump)

    def _turn(self, pump: Pump | FramedPump) -> None:
        if self.limits is None:
            pump.turn(self.turns.size())
        else:
            self._turn_within(self.limits, pump)

    def _turn_within(self, limits: Limits, pump: Pump | FramedPump) -> None:
        """Give `pump` a turn that keeps to the limits; raises Cut when they allow none any more."""
        paces = [pace for pace in (self._pace, limits.relay_pace) if pace is not None]
        most = min([self.turns.size(), *(pace.portion() for pace in paces)])
        if limits.pair_bytes is not None:
            most = min(most, limits.pair_bytes - self.moved - sum(pump.held for pump in self.pumps))
            if most <= 0 and not pump.held:
                if pump.has_more():
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

    def _is_over(self) -> bool:
        """Whether nothing can be delivered any more, in either direction."""
        there, back = self.pumps
        if there.waits == OVER or back.waits == OVER:
            return there.waits == back.waits or (self._is_one_gone() and not self._owes())
        return False

    def _is_one_gone(self) -> bool:
        """Whether one side hears nothing any more, so that the other's end of stream need not be waited for: unless it
        was sent a Close, since it answers that, and takes it amiss when nobody is there to hear it."""
        return any(pump.discards and not pump.held for pump in self.pumps) and not any(
            pump.waits == OVER and pump.frames_out for pump in self.pumps
        )

    def _is_half_closed(self) -> bool:
        """Whether one stream is over, and of the other everything that came was delivered."""
        there, back = self.pumps
        return {there.waits, back.waits} == {OVER, INPUT}

    def _owes(self) -> bool:
        """Whether the end of a stream that is over, or something before it, is still on its way."""
        return any(pump.waits == OVER and _unacknowledged(pump.sink) for pump in self.pumps)

    def _look_for_the_dead(self) -> None:
        """Find out about a side that is not watched for input, or whose host has gone while it was owed bytes.

        Raises OSError when there is one.
        """
        for pump in self.pumps:
            if pump.waits == ROOM:
                _raise_error_of(pump.source)
            if _unacknowledged(pump.sink) and _silence(pump.sink) > DEAD_SECONDS:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def _deliver_what_fits(self) -> None:
        """After a reset: let through what had arrived before it, as far as that takes no waiting."""
        for pump in self.pumps:
            with contextlib.suppress(OSError):
                if pump.waits != OVER:
                    pump.turn(self.turns.size())


Readers: TypeAlias = "tuple[FrameReader | None, FrameReader | None]"
"""Where the frames of the first and of the second side are; None for one that does not speak WebSocket."""


def _pumps(
    first: socket.socket, second: socket.socket, pipes: PipePool, turns: Turns, readers: Readers
) -> tuple[Pump | FramedPump, Pump | FramedPump]:
    """A pump in each direction."""
    if readers == (None, None):
        return Pump(first, second, pipes, turns), Pump(second, first, pipes, turns)
    from relay.transfer.framed import FramedPump  # not before: most relays have no WebSocket

    there = FramedPump(first, second, turns, readers[0], frames_out=readers[1] is not None)
    back = FramedPump(second, first, turns, readers[1], frames_out=readers[0] is not None)
    there.other, back.other = back, there
    return there, back


_BOTH_INPUT = (INPUT, INPUT)


def _events(out_of: Pump | FramedPump, into: Pump | FramedPump) -> int:
    """What to watch a side for, as poll(2) and epoll_ctl(2) have it; see `rest` for a side that is not to be read."""
    return (INPUT if out_of.waits == INPUT else 0) | (ROOM if into.waits == ROOM else 0) or EPOLLET


def _poll_for(poller: poll, sock: socket.socket, events: int) -> None:
    if events == EPOLLET:
        with contextlib.suppress(KeyError):
            poller.unregister(sock)
    else:
        poller.register(sock, events)


def _raise_error_of(sock: socket.socket) -> None:
    """Raise the OSError that `sock` has come to, if it has."""
    try:
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except OSError:
        return  # where it is refused, reading or writing tells
    if error not in (0, errno.EPIPE):  # EPIPE: it had ended its stream before, and that is still delivered
        raise OSError(error, os.strerror(error))


def _silence(sock: socket.socket) -> float:
    """Seconds since the peer of `sock` last acknowledged anything, a keepalive probe too; 0 where the kernel does not
    tell. Source: tcp(7), TCP_INFO."""
    try:
        tcp_info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_LAST_ACK_RECV + 4)
    except OSError:
        return 0.0
    (milliseconds,) = struct.unpack_from("=I", tcp_info, _TCP_INFO_LAST_ACK_RECV)
    return float(milliseconds) / 1000


def _unacknowledged(sock: socket.socket) -> int:
    """Bytes that were written to `sock` and have not arrived, an end of stream being one; 0 where the kernel does not
    tell. Source: tcp(7), SIOCOUTQ."""
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)

"""Two clients glued: a pump in each direction, who waits for both, and how it ends.

A pair that has much to move has a greenlet, which waits with `gevent.select.poll` and queues for its `turns`. Once
nothing has happened for a moment it does without, and is at `rest`: quiet, or passing small messages, or standing still
since a side does not read. So only who moves much costs what a greenlet costs, and holds a pipe.

How it ends is in `ending`, and what an operator may allow to it in `limits`.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable, Sequence
from select import EPOLLET, EPOLLIN, EPOLLOUT, POLLERR, POLLHUP, POLLNVAL
from typing import TYPE_CHECKING, TypeAlias

import gevent
from gevent.select import poll

from relay.clients.bounds import Bound
from relay.transfer import ending, lumps
from relay.transfer.ending import Pumps
from relay.transfer.limits import Allowance, Cut, LimitedPump, Limits, has_come
from relay.transfer.pipes import PipePool
from relay.transfer.pump import INPUT, OVER, ROOM, TURN, Pump
from relay.transfer.rest import Rest
from relay.transfer.state import PairState, Past
from relay.transfer.turns import PROMPT_FOR, HeldBack, NoMemory, Turns

if TYPE_CHECKING:
    from relay.clients.frames import FrameReader
    from relay.clients.pings import Pings
    from relay.transfer.framed import FramedPump

MUCH_BYTES = 256 << 10
QUIET_SECONDS = 0.1
"""When a pair has moved less than this in that time, it does without its greenlet; and a pump that has moved nothing,
since its receiver takes nothing, gives its pipe to somebody who does."""


REFUSED_SECONDS = 0.01
"""How long a pair with much to move waits when the kernel refuses to watch its sockets, and then looks for itself."""

SHORT_SECONDS = 0.05
"""How long a pair waits that needs memory and finds none, before it tries again."""


class Detached(gevent.GreenletExit):  # type: ignore[misc]  # gevent has no types
    """Thrown into a pair's greenlet to make it let go of the pair, as it is, between two turns."""


class Quiet(Exception):
    """Not much has happened for a while."""


class Pair:
    """Two connections that are one transfer.

    `started` (seconds since the epoch) and `arrived` (monotonic seconds) are the first side's; `waiting_time` is how
    long it was alone, in seconds. `limits` are the operator's, if there are any; `sources` are where the sides come
    from (see `bounds`), for whoever counts; `readers` is where the frames are of those that speak WebSocket. `on_over`
    is called with the pair, once, when it is over and its sockets are closed; then `cut_by` is the bound that ended it,
    if one did. `counted` is what of it whoever counts bytes has counted; `stays` is whether it cannot move to another
    process.
    """

    __slots__ = (
        "_allowance",
        "_idle_since",
        "_spoke",
        "_standing",
        "_was_owed",
        "arrived",
        "asked_moved",
        "counted",
        "cut_by",
        "due",
        "first",
        "greenlet",
        "on_ending",
        "on_over",
        "paid_until",
        "pumps",
        "rest",
        "second",
        "sources",
        "started",
        "stays",
        "turns",
        "waited_in_vain",
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
        self._standing: tuple[ending.Standing, float] | None = None  # and since when (monotonic seconds)
        self._spoke = -2 * PROMPT_FOR  # at rest: after how many turns of all, and which side; see `attend`
        self.on_over = on_over
        self.on_ending: Callable[[Pair], None] | None = None
        """Called with the pair just before, when its sockets are still open."""
        self.sources = sources
        self.cut_by: Bound | None = None
        self.stays = False
        self.waited_in_vain = False
        """Whether it ends since a side has not taken what is on its way for as long as that is waited for."""
        self.asked_moved = 0
        """Bytes that had arrived when `idle_for` was last asked."""
        self.paid_until = 0.0
        """From when on, as was known then, a pair is idle that is owed something; see `lumps`."""
        self._was_owed = False
        self.counted = 0
        self._idle_since = 0.0
        if limits is None:
            self._allowance = None
            self.pumps = _pumps(first, second, pipes, turns, readers)
        else:
            self._allowance = Allowance(limits)
            self.pumps = _limited_pumps(first, second, pipes, turns, readers, self._allowance)
        self.greenlet: gevent.Greenlet | None = None

    @property
    def started_pumping(self) -> bool:
        """Whether the pair looks after itself, with a greenlet or at rest."""
        return self.greenlet is not None or self.watched is not None

    @property
    def is_stranded(self) -> bool:
        """Whether its greenlet has ended and the pair has not: gevent's end before they begin if there is no memory."""
        return self.greenlet is not None and self.greenlet.dead

    def start_anew(self) -> None:
        """Go on after that."""
        self.greenlet = None
        self.start()

    @property
    def speaks_websocket(self) -> bool:
        """Whether either side does."""
        there, back = self.pumps
        return there.reader is not None or back.reader is not None

    def be_pinged(self, pings: Pings) -> None:
        """Have the sides that speak WebSocket pinged."""
        for pump in self.pumps:
            if not isinstance(pump, Pump) and pump.frames_out:
                pings.add(pump, time.monotonic())

    def be_silent(self, pings: Pings) -> None:
        """Say nothing to them that nobody else has said: somebody else may be about to."""
        for pump in self.pumps:
            if not isinstance(pump, Pump):
                pings.remove(pump)

    @property
    def moved(self) -> int:
        """Bytes delivered so far, both directions."""
        there, back = self.pumps
        return there.moved + back.moved

    @property
    def owed(self) -> int:
        """Bytes that are on their way to either side and have not arrived, as far as the kernel tells."""
        return sum(pump.untaken + ending.unacknowledged(pump.sink) for pump in self.pumps)

    def start(self) -> None:
        """Begin to pump, or go on: at rest, until there is much to move."""
        there, back = self.pumps
        there.resume()
        back.resume()
        if there.waits == TURN or back.waits == TURN:
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

    def detach_soon(self) -> None:
        """Have the pair let go of its sockets in the next iteration of the event loop, so that many pairs can do it in
        one. `detach` has to follow: as a rule it finds nothing left to do."""
        self.rest.forget(self)
        greenlet = self.greenlet
        if greenlet is not None:
            if greenlet.gr_frame is None:
                self.greenlet = None  # it has not begun, and never will
            greenlet.kill(Detached, block=False)

    def idle_for(self, now: float) -> float:
        """For how many seconds nothing has arrived, as far as that is known: since the last time but one that somebody
        asked. `now` is in monotonic seconds.

        What was moved is no measure: a slow receiver takes steadily what was written to its socket long ago, megabytes
        at once."""
        owed = self.owed
        moved = sum(pump.taken for pump in self.pumps) - owed
        if moved != self.asked_moved or not self._idle_since:
            if self._was_owed:  # or else it may all be in a buffer by now, and nobody reads that
                self.paid_until = lumps.paid_until(self.paid_until, moved - self.asked_moved, now)
            self.asked_moved, self._idle_since = moved, now
        self._was_owed = owed > 0
        return now - self._idle_since

    def paid_by(self, now: float) -> float:
        """`paid_until`, as is known now."""
        self.idle_for(now)
        return self.paid_until

    def cut(self, bound: Bound) -> None:
        """End the pair, which has met a bound of the operator's."""
        if self.greenlet is None:  # it rests, or waits for another worker to take it
            if not self.is_closed:
                self.cut_by = bound
                self._end()
        else:
            has_begun = self.greenlet.gr_frame is not None
            self.greenlet.kill(Cut(bound), block=False)
            if not has_begun:  # and so never will, to record this
                self.greenlet = None
                self.cut_by = bound
                self._end()

    def pack(self, files: contextlib.ExitStack) -> tuple[PairState, list[int]]:
        """This pair as it is, for another process, and the file descriptors that go with it; after `detach`. What was
        opened to go with it `files` closes here: the other process has its own descriptors of it."""
        (there, there_fds), (back, back_fds) = (pump.pack(files) for pump in self.pumps)
        first_frames, second_frames = (
            b"" if pump.reader is None else pump.reader.state.encode() for pump in self.pumps
        )
        times = (self.started, self.arrived, self.waiting_time)
        charged = () if self._allowance is None else (self._allowance.wasted, self._allowance.framing)
        self.idle_for(time.monotonic())  # nobody may have asked yet
        past = Past(self.asked_moved, self._idle_since, *charged)
        state = PairState(*times, there, back, first_frames, second_frames, *self.sources, past)
        return state, [self.first.fileno(), self.second.fileno(), *there_fds, *back_fds]

    def unpack(self, state: PairState, fds: Sequence[int]) -> None:
        """Go on where a pair in another process was; `fds` are those that came with the pumps, in their order."""
        there, back = self.pumps
        there.unpack(state.there, fds[: state.there.fds])
        back.unpack(state.back, fds[state.there.fds :])
        self.asked_moved, self._idle_since = state.past.moved, state.past.idle_since
        self.paid_until = self._idle_since + lumps.MOST_SECONDS  # how much it was then is not known here
        if self._allowance is not None:
            self._allowance.wasted, self._allowance.framing = state.past.wasted, state.past.framing

    @property
    def held_back(self) -> float:
        """Seconds for which bytes have waited for a rate of the operator's."""
        return 0.0 if self._allowance is None else self._allowance.held_back

    @property
    def part_held_back(self) -> float:
        """Of the time that this pair has been with this worker, the part for which bytes have waited for one; what they
        waited at another worker, that one took with it."""
        return 0.0 if self._allowance is None else self._allowance.part_held_back()

    @property
    def is_closed(self) -> bool:
        """Whether it is over, or somebody else's."""
        return self.first.fileno() < 0

    def close(self) -> None:
        """Close both sockets and give up what is still held."""
        try:
            for pump in self.pumps:
                pump.abandon()
            if self._allowance is not None:
                self._allowance.pumps = ()  # which have it
        finally:
            self.first.close()
            self.second.close()

    def give_up(self) -> None:
        """End the pair, which has no greenlet, after a fault of ours; nothing happens when it is over."""
        if not self.is_closed:
            self._end()

    def _end(self) -> None:
        # Whatever goes wrong here, it is over and on record.
        try:
            self.rest.forget(self)
            for pump in self.pumps:
                if not isinstance(pump, Pump):
                    pump.take_leave()
            if self.on_ending is not None:
                self.on_ending(self)
        finally:
            try:
                self.close()
            finally:
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
        there, back = self.pumps
        there.put_away()
        back.put_away()
        self.rest.watch(self)
        if self.watched == _BOTH_INPUT and not (there.discards or back.discards):
            # What was sent a moment ago may be on its way: asking the kernel now is dearer than looking later.
            self.rest.look_at(self, time.monotonic() + ending.until_dead_check())
        else:
            self._settle()

    def attend(self, fd: int, events: int) -> None:
        """Something has happened to the side with that descriptor while the pair rests."""
        there, back = self.pumps
        out_of, into = (there, back) if there.source.fileno() == fd else (back, there)
        much = False
        spoke, before = self.turns.had << 1 | (out_of is there), self._spoke
        if (spoke ^ before) & 1 and spoke - before < 2 * PROMPT_FOR:
            self.turns.converse()
        self._spoke = spoke
        try:
            if not events & (EPOLLIN | EPOLLOUT):
                if not out_of.has_ended:
                    ending.raise_error_of(out_of.source)
                elif into.waits != OVER and ending.has_gone(out_of.source):
                    into.begin_to_discard()
            if into.waits == ROOM:
                much = into.sip()
            if out_of.waits == INPUT:
                much = out_of.sip() or much
        except OSError:
            self._deliver_what_fits()
            self._end()
            return
        except (NoMemory, HeldBack):
            much = True  # so it has a greenlet, which can wait
        if much:
            self._wake()
        elif out_of.waits == into.waits == INPUT and self.watched == _BOTH_INPUT and not out_of.discards:
            if not self.due:
                self.rest.look_at(self, time.monotonic() + ending.until_dead_check())
        elif ending.is_over(self.pumps):
            self._end()
        else:
            self.rest.settle_soon(self)

    def settle(self) -> None:
        """Be watched for what the pumps wait for now, and see to it that the pair ends when nothing happens, if it has
        to."""
        self.rest.watch(self)
        self._settle()

    def _settle(self) -> None:
        now = time.monotonic()
        self._stands_too_long(now)  # so that it is known since when it does
        self._plan_to_look_around(now)

    def _plan_to_look_around(self, now: float) -> None:
        """Of a pair of which it is known since when it has stood where it does."""
        since, seconds = (now, math.inf) if self._standing is None else (self._standing[1], self._standing[0][-1])
        patience = ending.patience(self.pumps, now - since)
        if patience is None:
            return
        when = min(now + patience, since + seconds)
        if not self.due or when + 1 < self.due:  # whoever says something does not put off what is planned
            self.rest.look_at(self, when)

    def _stands_too_long(self, now: float) -> bool:
        """Whether the pair is where it may not stay, and has been there for as long as it may."""
        standing = ending.standing(self.pumps)
        if standing is None:
            self._standing = None
            return False
        if self._standing is None or self._standing[0] != standing:
            self._standing = standing, now
        _, on_its_way, seconds = standing
        is_too_long = now - self._standing[1] >= seconds
        self.waited_in_vain = is_too_long and on_its_way > 0
        return is_too_long

    def look_around(self, now: float) -> None:
        """Nothing may have happened for a while: end what is over or dead, by the clock."""
        self.due = 0
        if self._stands_too_long(now):
            self._end()
            return
        try:
            ending.look_for_the_dead(self.pumps)
        except OSError:
            self._deliver_what_fits()
            self._end()
            return
        if ending.is_over(self.pumps):
            self._end()
        else:
            self._plan_to_look_around(now)

    # With much to move

    def _wake(self) -> None:
        self.rest.forget(self)
        self.greenlet = gevent.spawn(self._pump_until_over)

    def _pump_until_over(self) -> None:
        try:
            try:
                self._pump()
            except OSError:
                self._deliver_what_fits()
            except Quiet:
                self.greenlet = None
                self._go_to_rest()
                return
        except Detached:
            self.greenlet = None
            return
        except Cut as cut:
            self.cut_by = cut.bound
        except BaseException:
            self.give_up()
            raise
        self._end()

    def _pump(self) -> None:
        """Give the pumps their turns until the pair is over or stands too long; raises OSError when a side was reset or
        is dead, and Quiet when not much has happened for a while."""
        poller = poll()
        watched: tuple[int, int] | None = None
        moved = [pump.moved for pump in self.pumps]
        look_back_at = time.monotonic() + QUIET_SECONDS
        if self._allowance is None:  # or else each direction may have to stand in a line, and not for nothing
            for pump in self.pumps:
                if pump.waits == INPUT:
                    pump.waits = TURN  # whatever has woken this pair
        while not ending.is_over(self.pumps):
            now = time.monotonic()
            if now >= look_back_at:
                look_back_at = now + QUIET_SECONDS
                if self._stands_too_long(now):
                    return
                moved = self._look_back(moved)
            if any(pump.waits == TURN for pump in self.pumps):
                self._take_turns()
                continue
            if watched != self.events:
                watched = self.events
                for sock, events in zip((self.first, self.second), watched, strict=True):
                    _poll_for(poller, sock, events)
            ready = dict(poller.poll(QUIET_SECONDS * 1000))
            if POLLNVAL in ready.values():  # libev's word for a socket that the kernel refuses to watch
                gevent.sleep(REFUSED_SECONDS)
            for which, pump in enumerate(self.pumps):
                waits_at = pump.sink if pump.waits == ROOM else pump.source
                if pump.waits > 0 and ready.get(waits_at.fileno(), 0) & (pump.waits | POLLERR | POLLHUP | POLLNVAL):
                    if self.turns.busy():
                        pump.waits = TURN
                    else:
                        self._turn(which)

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
        for which, pump in enumerate(self.pumps):
            if pump.waits == OVER:
                continue
            if pump.waits == TURN:
                try:
                    if self._allowance is None:
                        self.turns.wait(pump)
                    else:
                        self._allowance.take_turns(pump, self.turns)
                except NoMemory:
                    gevent.sleep(SHORT_SECONDS)
                except HeldBack:
                    pass  # it waits for that before its next turn
            elif self._allowance is None:
                self._turn(which)
            else:
                self._glance(pump)

    def _turn(self, which: int) -> None:
        self.turns.look_at_others()
        try:
            self.pumps[which].turn(self.turns.size())
        except NoMemory:
            gevent.sleep(SHORT_SECONDS)
        except HeldBack:
            self.pumps[which].waits = TURN

    def _glance(self, pump: Pump | FramedPump) -> None:
        """Where there are limits: let a pump that waits for something move a little, and queue if there is more. What
        its source has to say counts also while the rate is used up for the other direction; but where there is nothing
        it stands in no line."""
        try:
            has_more = pump.sip()
        except NoMemory:
            has_more = True
        except HeldBack:
            has_more = has_come(pump)
        if has_more:
            pump.waits = TURN

    def _deliver_what_fits(self) -> None:
        """After a reset: let through what had arrived before it, as far as that takes no waiting, be it for a rate:
        past that it would be all others who wait."""
        for pump in self.pumps:
            with contextlib.suppress(OSError, NoMemory, HeldBack, Cut):
                if pump.waits == OVER:
                    continue
                try:
                    pump.turn(self.turns.size())
                except HeldBack:
                    pump.sip()  # a little goes before those who wait


Readers: TypeAlias = "tuple[FrameReader | None, FrameReader | None]"
"""Where the frames of the first and of the second side are; None for one that does not speak WebSocket."""


def _pumps(first: socket.socket, second: socket.socket, pipes: PipePool, turns: Turns, readers: Readers) -> Pumps:
    """A pump in each direction."""
    if readers == (None, None):
        return Pump(first, second, pipes, turns), Pump(second, first, pipes, turns)
    from relay.transfer.framed import FramedPump  # not before: most relays have no WebSocket

    there = FramedPump(first, second, turns, readers[0], frames_out=readers[1] is not None)
    back = FramedPump(second, first, turns, readers[1], frames_out=readers[0] is not None)
    there.other, back.other = back, there
    return there, back


def _limited_pumps(
    first: socket.socket,
    second: socket.socket,
    pipes: PipePool,
    turns: Turns,
    readers: Readers,
    allowance: Allowance,
) -> Pumps:
    """The same, which keep to that `allowance`."""
    if readers == (None, None):
        pumps = LimitedPump(first, second, pipes, turns), LimitedPump(second, first, pipes, turns)
        for pump in pumps:
            pump.allowance = allowance
        allowance.pumps = pumps
        return pumps
    from relay.transfer.limited_framed import LimitedFramedPump  # as above

    there = LimitedFramedPump(first, second, turns, readers[0], frames_out=readers[1] is not None)
    back = LimitedFramedPump(second, first, turns, readers[1], frames_out=readers[0] is not None)
    there.other, back.other = back, there
    there.allowance = back.allowance = allowance
    allowance.pumps = there, back
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

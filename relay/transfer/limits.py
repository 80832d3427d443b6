"""What the operator allows to a pair, and pumps that keep to it.

As long as no limit holds a pair back it is as any other: it rests, sips, and queues for turns. What it reads is charged
when it is known, and so is what it reads and throws away, since nobody is there to get it. A rate counts what a
WebSocket client sends as it comes off the wire, with its frames, and when it does: what is looked at later, a few
frames in each turn, waits for no rate any more. Otherwise who sends tiny frames would stand in the line for each few of
them, as one who wants as much as any other. Of the bytes that a pair may move, what such a client sends besides payload
(headers, pings, frames with nothing in them) counts as far as it is more than the payload.

A pump that is held back moves nothing and says so with `HeldBack`; its pair then waits, with its greenlet, in the order
in which all such have come.
"""

from __future__ import annotations

import fcntl
import select
import sys
import termios
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent

from relay.clients.bounds import Bound
from relay.process.dataclass import dataclass
from relay.transfer.ending import Pumps, raise_error_of
from relay.transfer.pace import LITTLE, LITTLE_BYTES, MOMENT, PARTS, Line, Pace
from relay.transfer.pump import COPY_BYTES, Pump
from relay.transfer.turns import HeldBack, Turns

if TYPE_CHECKING:
    from relay.transfer.framed import FramedPump


class Cut(gevent.GreenletExit):  # type: ignore[misc]  # gevent has no types
    """Ends a pair that has met a bound of the operator's."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self.bound = bound


MOST_OF_A_SECOND = 0.5

GROWTH = 4
"""Who may have been short of its worker's part of a rate wants so many times what it has moved: of a part that was far
too small a few seconds make a fair one, and who would not have moved more leaves the others a fair one, too."""


class _Place:
    """A place in the line: the greenlet that waits there, and what was reserved for it when its turn had come."""

    __slots__ = ("allowance", "granted", "greenlet", "since")

    def __init__(self, greenlet: Any, allowance: Allowance) -> None:  # noqa: ANN401  # gevent has no types
        self.greenlet = greenlet
        self.allowance = allowance
        self.granted = 0
        self.since = time.monotonic()  # from when on its wait has not been noted


class SharedPace:
    """A pace that all pairs of this worker share, and the greenlets that it holds back."""

    def __init__(self, rate: float) -> None:
        self.pace = Pace(rate)
        self.line: Line[_Place] = Line(self.pace)
        self.little = Pace(rate * LITTLE)
        """Of those who go before the line."""
        self._moved: dict[Allowance, float] = {}  # by whom, in this second
        self._waited: dict[Allowance, float] = {}  # who, and for how many seconds of it
        self._level = rate  # bytes a second that an equal part of the whole rate was
        self._hub = gevent.get_hub()
        self._timer = self._hub.loop.timer(0.0)

    def set_rate(self, rate: float) -> None:
        """From now on it is so many bytes a second."""
        self.pace.rate = rate
        self.little.rate = rate * LITTLE
        self._plan()

    def wait(self, allowance: Allowance, has: Callable[[], int]) -> int:
        """Wait for the calling greenlet's turn in the line; returns how many bytes are reserved for it then. For `has`
        see `Line.join`."""
        place = _Place(gevent.getcurrent(), allowance)
        self.line.join(place, has)
        try:
            if len(self.line) == 1:
                self._plan()
            self._hub.switch()
        except BaseException:  # this greenlet is being ended, it must not be switched to any more
            place.greenlet = None
            self.line.leave(place)
            self.give_back(place.granted)
            raise
        finally:
            self._note_wait_of(place)
        return place.granted

    def give_back(self, size: int) -> None:
        """Give back `size` reserved bytes that were not moved: somebody else may move some at once."""
        self.pace.give_back(size)
        if size > 0:
            self._plan()

    def note(self, allowance: Allowance, moved: float) -> None:
        """So many bytes have been moved, and charged here."""
        self._moved[allowance] = self._moved.get(allowance, 0) + moved

    def note_wait(self, allowance: Allowance, seconds: float) -> None:
        """For so long it has stood in the line."""
        self._waited[allowance] = self._waited.get(allowance, 0) + seconds

    def _note_wait_of(self, place: _Place) -> None:
        now = time.monotonic()
        self.note_wait(place.allowance, now - place.since)
        place.since = now

    def every_second(self, relay_rate: float, share_of: Callable[[int], float]) -> int:
        """Take what is this worker's of a rate that all workers share, until this is called again.

        Who has moved as much as an equal part of that rate was, or wants it, wants an equal part; who wants less, only
        that much of one. So what somebody leaves is the others' (max-min fairness). `share_of` tells, of how many
        `PARTS` of such a part are wanted here, which share of the whole that is. Returns how many those are.
        """
        parts = round(PARTS * sum(min(1.0, wanted / self._level) for wanted in self._wanted()))
        self._moved.clear()
        self._waited.clear()
        share = share_of(parts)
        self.set_rate(relay_rate * share)
        others = max(parts, PARTS) * (1 / share - 1)
        self._level = relay_rate / max(1.0, (parts + others) / PARTS)
        return parts

    def _wanted(self) -> Iterator[float]:
        """How many bytes a second each wants to move, as far as what it has done in this second tells.

        That is what it has moved, and what it has if it stands in the line now. To have waited is no want of more: the
        last few of 5000 bytes wait as long as any others. More than that wants only who has waited for most of the
        second and has moved about as much as anybody here, since who moves less than others in the same line has less.
        """
        has: dict[Allowance, float] = {}
        for place, size in self.line.ask_all():
            self._note_wait_of(place)
            has[place.allowance] = size
        most = max(self._moved.values(), default=0.0)
        for allowance in self._moved.keys() | has.keys():
            moved = self._moved.get(allowance, 0.0)
            is_short = self._waited.get(allowance, 0.0) > MOST_OF_A_SECOND and moved >= most / 2
            yield (GROWTH if is_short else 1) * moved + has.get(allowance, 0.0)

    def _plan(self) -> None:
        self._timer.close()
        if self.line:
            self._timer = self._hub.loop.timer(self.pace.free_in(time.monotonic()))
            self._timer.start(self._go_on)

    def _go_on(self) -> None:
        try:
            for place, size in self.line.take_due(time.monotonic()):
                self._hub.loop.run_callback(_switch_to, place)  # if there is no memory for it, it waits on
                place.granted = size
        finally:
            self._plan()

    def close(self) -> None:
        """Let go of the timer."""
        self._timer.close()


def _switch_to(place: _Place) -> None:
    if place.greenlet is not None:  # and was not ended meanwhile
        place.greenlet.switch()


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows to a pair, in bytes and bytes a second; None is no limit. `relay_pace` is shared."""

    pair_bytes: int | None = None
    pair_rate: int | None = None
    relay_pace: SharedPace | None = None


class Allowance:
    """What is left to one pair of its `limits`; `pumps` are that pair's."""

    __slots__ = (
        "_granted",
        "_has_waited",
        "_own",
        "_pair_bytes",
        "_shared",
        "_since",
        "_waited",
        "_waits_since",
        "framing",
        "pumps",
        "wasted",
    )

    def __init__(self, limits: Limits) -> None:
        self.pumps: Pumps | tuple[()] = ()
        self._since = time.monotonic()
        self._pair_bytes = limits.pair_bytes
        self._own = None if limits.pair_rate is None else Pace(limits.pair_rate)
        self._has_waited = False  # for its own pace, and has moved nothing since
        self._shared = limits.relay_pace
        self._granted = 0  # bytes that are reserved at the shared pace
        self._waited = 0.0
        self._waits_since: float | None = None
        self.wasted = 0
        """Bytes of payload that were read and thrown away."""
        self.framing = 0
        """Bytes that were read of WebSocket clients and are no payload."""

    @property
    def held_back(self) -> float:
        """Seconds for which its bytes have waited for a rate, up to now."""
        since = self._waits_since
        return self._waited if since is None else self._waited + time.monotonic() - since

    def part_held_back(self) -> float:
        """`held_back`, of the time since this began to count; from 0 to 1."""
        return min(1.0, self.held_back / max(time.monotonic() - self._since, 1e-3))

    def take_turns(self, pump: Pump | FramedPump, turns: Turns) -> None:
        """Wait until no rate holds `pump` back, and let it queue for its `turns`; in its pair's greenlet.

        Raises as a turn does; and where it had to wait, what has become of its source meanwhile: reading would tell
        only when all has been read that came before.
        """
        # What rests was charged when it was read.
        has_waited = not (pump.untaken or pump.unread) and self._wait(pump)
        try:
            if has_waited and not pump.has_ended:
                raise_error_of(pump.source)
            turns.wait(pump)
        finally:
            if self._granted and self._shared is not None:  # it has had no turn
                granted, self._granted = self._granted, 0
                self._shared.give_back(granted)

    def _wait(self, pump: Pump | FramedPump) -> bool:
        """Wait for as long as a rate holds `pump` back; returns whether one did."""
        held_back = False
        self._waits_since = began = time.monotonic()
        try:
            if self._own is not None and self._own.holds_back(began):
                gevent.sleep(self._own.free_in(began))
                self._has_waited = held_back = True
            if self._shared is not None and self._shared.line.holds_back(time.monotonic()):
                self._granted = self._shared.wait(self, partial(_has, pump))
                held_back = True
        finally:
            self._waits_since = None
            self._waited += time.monotonic() - began
        return held_back

    def turn(self, pump: Pump | FramedPump, move: Callable[[int], None], most: int) -> None:
        """Have `pump` `move` up to `most` bytes, as far as the limits allow that now.

        Raises as a turn does, HeldBack when a rate allows nothing at the moment, and Cut when nothing is left.
        """
        now = time.monotonic()
        size = self._allowed(pump, most, now)
        if not size and not pump.untaken:
            if self._left() > 0:
                raise HeldBack
            # It was exactly what is allowed, and its end is no byte; but not if what has no payload was as much.
            harmless = pump.without_payload() if self._taken() > self.framing else None
            if harmless is None:
                raise Cut(Bound.PAIR_BYTES)
            size = harmless
        before = self._read_by(pump)
        try:
            move(size)
        finally:
            self._charge(self._read_by(pump) - before, now)

    def sip(self, pump: Pump | FramedPump, move: Callable[[int], bool]) -> bool:
        """The same for a sip; raises HeldBack also when nothing is left. What was charged when it was read goes on in
        any case."""
        now = time.monotonic()
        size = self._allowed(pump, COPY_BYTES, now)
        goes_first = not size and self._may_go_first(now)
        if goes_first and self._shared is not None:
            size = min(LITTLE_BYTES, self._shared.little.portion(), self._left())
        if size <= 0 and not pump.untaken:
            raise HeldBack
        before = self._read_by(pump)
        try:
            return move(max(0, size))
        finally:
            read = self._read_by(pump) - before
            self._charge(read, now)
            if goes_first and self._shared is not None:
                self._shared.little.reserve(read, now)

    def _may_go_first(self, now: float) -> bool:
        """Whether it is only those in the line who hold this back, and a little may go before them."""
        return (
            self._shared is not None
            and not self._shared.little.holds_back(now)
            and (self._own is None or not self._own.holds_back(now))
        )

    def _left(self) -> int:
        """Bytes that the pair may still read."""
        if self._pair_bytes is None:
            return sys.maxsize
        return self._pair_bytes - max(self._taken(), self.framing)

    def _taken(self) -> int:
        """Bytes of payload that the pair has read, whatever has become of them."""
        return sum(pump.taken for pump in self.pumps) + self.wasted

    def _read_by(self, pump: Pump | FramedPump) -> int:
        """Bytes that have come from the source of `pump` while this has counted, as they came off the wire, and a
        constant."""
        return pump.taken + pump.unread + self.wasted + self.framing

    def _allowed(self, pump: Pump | FramedPump, most: int, now: float) -> int:
        """Of `most` bytes, how many `pump` may read `now`; of what it has read already, one at the least."""
        if self._pair_bytes is not None:
            most = max(0, min(most, self._left()))
        return self._allowed_by_rates(most, now) or min(most, pump.unread, 1)

    def _allowed_by_rates(self, most: int, now: float) -> int:
        if self._own is not None:
            if self._own.holds_back(now):
                return 0
            most = min(most, self._own.portion_alone())
        if self._shared is not None:
            if self._granted:
                return min(most, self._granted)
            if self._shared.line.holds_back(now):
                return 0
            most = min(most, self._shared.pace.portion())
        return most

    def _charge(self, read: int, now: float) -> None:
        if self._own is not None:
            self._own.reserve(read, now - MOMENT if self._has_waited else now)
            self._has_waited = False
        if self._shared is not None:
            if self._granted:
                granted, self._granted = self._granted, 0
                self._shared.give_back(granted - read)
            else:
                self._shared.pace.reserve(read, now)
            if read:
                self._shared.note(self, read)


class LimitedPump(Pump):
    """A pump that keeps to the `allowance` of its pair."""

    __slots__ = ("allowance",)

    allowance: Allowance

    def turn(self, most: int) -> None:
        """As `Pump.turn`; raises HeldBack and Cut, too."""
        self.allowance.turn(self, super().turn, most)

    def sip(self, most: int = COPY_BYTES) -> bool:
        """As `Pump.sip`; raises HeldBack, too."""
        return self.allowance.sip(self, super().sip)

    def _throw_away(self, size: int) -> None:
        self.allowance.wasted += size


def _has(pump: Pump | FramedPump) -> int:
    """How many bytes there are for `pump` to move, as far as the kernel tells."""
    try:
        answer = fcntl.ioctl(pump.source.fileno(), termios.FIONREAD, bytes(4))
    except (OSError, ValueError):  # refused, or closed
        return 0  # and then what is reserved for everybody
    return pump.held + int.from_bytes(answer, sys.byteorder)


def has_come(pump: Pump | FramedPump) -> bool:
    """Whether the source of `pump` has said something, or has ended, as far as the kernel tells."""
    asked = select.poll()
    asked.register(pump.source, select.POLLIN)
    return bool(asked.poll(0))

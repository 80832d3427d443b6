"""Whose turn it is to move bytes, and how many.

One thread moves the bytes of all pairs. What a pump moves in one turn is a trade: the more, the cheaper is a gigabyte;
the less, the shorter everybody else waits. So a pump that still has bytes after its turn queues here, and its turns run
right in the event loop, one pump after the other. Between two calls the sockets are looked at, and whoever has only a
little to move goes first.

The time is shared: in each iteration of the loop the queue gets one turn at the least, and goes on until it has had
`SHARE` of what everything else has taken since. Otherwise thousands of pairs that each say one byte now and then would
leave one turn, in each iteration, to all that move gigabytes. So would hundreds that send nothing but tiny frames, and
whose turns take longer than one of a megabyte: these are dear, and served in between like those who move a little. And
as long as there is somebody who moves only a little, the turns of the others are smaller, and smaller still while two
sides converse.

What is shared is the time that this thread has had the processor for. While another program has it, bytes arrive, but
nobody here has had anything of it: by the clock on the wall, the queue would be owed that time as well, and go on for
as long before it lets the sockets be looked at.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import gevent

LARGEST_TURN = 1 << 20
"""Bytes a pump moves in a turn; never more, since this also bounds what rests in the relay. Kernel work, too, is dear
in small turns: at 8 pairs a quarter of this costs twice the CPU, for a splice loop in C as well as here."""

CONSIDERATE_TURN = 256 << 10
CONSIDERATE_FOR = 64
"""Bytes a pump moves in a turn instead while somebody has moved only a little in one of the last so many turns."""

PROMPT_TURN = 64 << 10
PROMPT_FOR = 8
"""And while two sides converse, that is, one of them has answered the other within so many turns: each waits for us
then, and the turn under way is most of what it waits for. A gigabyte is half as dear again in such turns, so it is not
enough that somebody says something: thousands who do, and wait for no answer, would leave less to all who move much."""

SMALLEST_TURN = 128 << 10
"""Bytes a pump moves in a turn however many are busy, if nobody converses."""

ROUND_BYTES = 256 << 20
"""Once so many pumps are busy that they would move more than this in a round, their turns become smaller. What bounds
the others' wait is not the round, since only one pump of it goes at a time, but busy pairs wait for each other."""

SHARE = 0.75
"""What the queue gets of the time, as a part of what everything else takes. Those who are served between two turns are
part of that, and may take as much as the turns: so these come to three times what an iteration began with at most."""

LEAST_SECONDS = 0.0005
"""What it gets in an iteration of the event loop at the least: an iteration costs as much as a small turn."""

BURST_SECONDS = 0.002
"""How long those who move a little may be served in a row between two turns, if they had little for a while."""

HELD_BYTES = 64 << 20
WARY_TURN = 64 << 10
"""When so many bytes rest in the relay, for receivers that do not take them, a turn takes no more than this, so that
whoever stalls next leaves less behind."""

TURNS_IN_A_ROW = 4
"""How many turns a pump has before its pair looks after its other direction."""

TURN = 0
"""What a pump `waits` for that has more to move; see `relay.transfer.pump`."""


class NoMemory(Exception):
    """A pump has no memory for what it may have to keep. Nothing was read or lost; try again later."""


class HeldBack(Exception):
    """A limit of the operator's allows a pump nothing at the moment. Nothing was read or lost; see `limits`."""


class Moving(Protocol):
    """A pump."""

    waits: int

    @property
    def is_dear(self) -> bool:
        """Whether a turn of it takes long for the bytes that it moves."""

    def turn(self, most: int) -> None:
        """Move up to `most` bytes, and set `waits`; what it raises is its greenlet's."""


class _Place:
    """A place in the queue: the greenlet that waits there, and the pump that has its turns, if it is not the greenlet
    itself that moves something."""

    __slots__ = ("error", "greenlet", "pump", "turns")

    def __init__(self, greenlet: Any, pump: Moving | None) -> None:  # noqa: ANN401  # gevent has no types
        self.greenlet = greenlet
        self.pump = pump
        self.turns = TURNS_IN_A_ROW
        self.error: BaseException | None = None


class Turns:
    """The queue of the pumps that have more to move, and the bytes that all pumps have moved."""

    def __init__(self) -> None:
        self.moved = 0
        """Bytes that all pumps of this process have moved since it started."""
        self.held = 0
        """Bytes that pumps have put away, since their receivers do not take them."""
        self.look_at_others: Callable[[], bool] = lambda: False
        """Called before each turn: serve a few who have only a little to move; returns whether there was anybody."""
        self.had = 0
        """How many turns pumps have had."""
        self._considerate = 0
        self._prompt = 0
        self._hub = gevent.get_hub()
        self._queue: deque[_Place] = deque()
        self._dear: deque[_Place] = deque()  # of whose pump `is_dear`
        self._timer = self._hub.loop.timer(0.0)
        self._ahead = 0.0  # seconds that those who are looked at in between have had, and the queue has not
        self._last = 0.0  # when the queue has last had its time, or began

    def busy(self) -> bool:
        """Whether a pump waits for its turn."""
        return bool(self._queue or self._dear)

    def size(self) -> int:
        """Bytes that a pump may move in the turn it is about to have."""
        if self.held > HELD_BYTES:
            return WARY_TURN
        self.had += 1
        if self._prompt:
            self._prompt -= 1
            return PROMPT_TURN
        if self._considerate:
            self._considerate -= 1
            largest = CONSIDERATE_TURN
        else:
            largest = LARGEST_TURN
        return min(largest, max(SMALLEST_TURN, ROUND_BYTES // (len(self._queue) + 1)))

    def moved_little(self) -> None:
        """A pump has moved only a little, and its source has no more: bytes that somebody waits for, perhaps."""
        self._considerate = CONSIDERATE_FOR

    def converse(self) -> None:
        """A side has just answered the other one, which waits for that, and so on, perhaps."""
        self._prompt = PROMPT_FOR

    def wait(self, pump: Moving | None = None) -> None:
        """Let the event loop look at all sockets, and the pumps go that have queued before.

        Then `pump` has its turns, until it has no more to move or had `TURNS_IN_A_ROW`. Without one, the calling
        greenlet goes on when its turn has come.

        Raises what the pump did: OSError as a rule, but whatever else it is ends that pair, and nobody else's turns.
        """
        place = _Place(gevent.getcurrent(), pump)
        if not self.busy() or not self._timer.active:
            self._last = time.thread_time()
            self._timer.start(self._next, update=False)
        self._line_up(place)
        try:
            self._hub.switch()
        except BaseException:  # this greenlet is being ended, it must not be switched to any more
            place.greenlet = None
            for queue in (self._queue, self._dear):
                with contextlib.suppress(ValueError):  # its turn may have come in the same iteration of the loop
                    queue.remove(place)
            if place.error is not None and not isinstance(place.error, (NoMemory, HeldBack)):  # nothing to wait for now
                raise place.error from None  # the socket tells it only once
            raise
        if place.error is not None:
            raise place.error

    def _line_up(self, place: _Place) -> None:
        (self._dear if place.pump is not None and place.pump.is_dear else self._queue).append(place)

    def _next(self) -> None:
        """Runs in the hub, once per iteration of the loop while somebody queues."""
        self._timer.stop()
        now = time.thread_time()
        left = max(LEAST_SECONDS, SHARE * (now - self._last))
        try:
            while self.busy():
                while self._ahead <= 0:
                    found = self.look_at_others()
                    if self._queue and self._dear:
                        self._give_a_turn(self._dear)
                    looked = time.thread_time()
                    self._ahead += looked - now
                    left += SHARE * (looked - now)
                    now = looked
                    if not found:
                        break
                self._give_a_turn(self._queue or self._dear)
                ended = time.thread_time()
                self._ahead = max(self._ahead - (ended - now), -BURST_SECONDS)
                left -= ended - now
                now = ended
                if left <= 0:
                    break
        finally:  # whatever has gone wrong, the queue goes on
            self._last = now
            if self.busy():
                self._timer.start(self._next, update=False)

    def _give_a_turn(self, queue: deque[_Place]) -> None:
        place = queue.popleft()
        pump = place.pump
        if pump is not None:
            try:
                pump.turn(self.size())
            except BaseException as error:  # whatever it is, it is raised where that pump is waited for
                place.error = error
            else:
                place.turns -= 1
                if pump.waits == TURN and place.turns:
                    self._line_up(place)
                    return
        # Behind those that this iteration has woken: they have waited for input, and most of them move little.
        try:
            self._hub.loop.run_callback(_go_on, place)
        except BaseException:  # there is no memory for it
            place.pump = None  # which has had its turns
            queue.appendleft(place)
            raise


def _go_on(place: _Place) -> None:
    if place.greenlet is not None:  # and was not ended meanwhile
        place.greenlet.switch()

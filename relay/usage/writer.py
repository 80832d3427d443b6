"""The thread behind each destination: takes what is queued, has it written, and keeps it while that does not work.

Whoever records only puts into the queue. The thread writes at once when something comes, but begins a turn no sooner
than 10 ms after the one before, and 30 when that was a large one; what is queued meanwhile goes into that turn. So a
busy relay pays for a few dozen turns a second, however many connections end, and a quiet one has each record on disk at
once.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from queue import SimpleQueue
from typing import Final, Protocol

from relay.process.memory import no_thread
from relay.usage.record import Record
from relay.usage.sign import Sign
from relay.usage.trouble import LOCKED_PATIENCE, Trouble, UsageError

Warn = Callable[[str], None]
"""Writes one line to the relay's log; called on any thread."""

TURN_SECONDS: Final = 0.01
LARGE_TURN: Final = 16
"""Records in a turn, after which the next one is put off for longer: most of what a turn costs does not depend on how
many there are, and each time it takes the interpreter from the event loop."""
LARGE_TURN_SECONDS: Final = 0.03
FIRST_BACKOFF: Final = 0.05
LONGEST_BACKOFF: Final = 1.0

MOST_KEPT: Final = 500_000
"""Records that are kept while a destination does not work, a hundred megabytes or so; further ones are lost to it."""

START_PATIENCE: Final = 1.0
"""How long a start waits for a destination that is locked, before it goes on without; seconds."""

ATTEMPT_PATIENCE: Final = 5.0
"""How long a start waits for the end of the first attempt, which says whether the operator has made a mistake. A slow
disk may need a while to make a database; seconds."""


LAST_SECONDS: Final = 1.0
"""How long a destination has that is not known to be in trouble, once the end is wanted at once; and again after each
turn that went well. More than an attempt takes that waits for a lock or a reader."""


class Request(enum.Enum):
    """What can be queued besides records."""

    REFRESH = "write the current table"
    TICK = "the same, and note the time"
    LEAVE = "write all there is, sign off, end"


class Destination(Protocol):
    """Where records are written. Its methods are called on the writer's thread only."""

    name: str
    """What the operator knows it by, in the log."""

    option: str
    """The option that it comes from, with the value."""

    def write(self, kept: deque[Record], requests: AbstractSet[Request]) -> None:
        """Write the records and do what is requested; take out of `kept`, from the left, what is safely written.

        Raises:
            Trouble: something is left. This is called again later, with all that is left and more.
        """

    def close(self) -> None:
        """Let go of the destination; nothing is written after it."""


class Writer:
    """Feeds one destination from a queue, on a thread of its own.

    Args:
        destination: what to write to.
        warn: writes a line to the relay's log.
        sign: what is given while records are held back.
        tells_how_long: whether `warn` may be told how long a trouble has lasted: it begins when a record is written, so
            when a client has gone, and its end may be known to everybody.
    """

    def __init__(self, destination: Destination, warn: Warn, sign: Sign, *, tells_how_long: bool = True) -> None:
        self._destination = destination
        self._warn = warn
        self._queue: SimpleQueue[Record | Request] = SimpleQueue()
        self.request = self._queue.put
        self._kept: deque[Record] = deque()
        self._requests: set[Request] = {Request.REFRESH}
        self._outage = _Outage(destination.name, warn, sign, tells_how_long=tells_how_long)
        self._taken = 0  # records, since the start; counted on the thread that records
        self._written = 0  # of these; counted on the writer's thread
        self._lost = 0  # others, for want of room, since the start; counted on the thread that records
        self._told_lost = 0  # of these, what the log has been told; counted on the writer's thread
        self._backoff = FIRST_BACKOFF
        self._first_attempt = threading.Event()
        self._first_success = threading.Event()
        self._starting = True
        self._mistake: Trouble | None = None
        self._start_lock = threading.Lock()
        self._leaving = threading.Event()
        self._deadline = float("inf")
        self._hurried: float | None = None
        self._went_well = 0.0
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"writer of {destination.name}", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until its destination was written for the first time.

        That is for a second at most while something passing is in the way, and five if nothing is known yet.

        Raises:
            UsageError: it never will be, as things are.
        """
        until = time.monotonic() + START_PATIENCE
        try:
            self._thread.start()
        except RuntimeError:
            raise UsageError(f"{self._destination.option}: {no_thread()}") from None
        self._first_attempt.wait(ATTEMPT_PATIENCE)
        self._first_success.wait(max(0.0, until - time.monotonic()))
        with self._start_lock:
            self._starting = False
        if self._mistake is not None:
            self._thread.join()
            raise UsageError(f"{self._destination.option}: {self._mistake.line}")

    def record(self, record: Record) -> None:
        """Queue a record, unless far too many wait already; never waits. To be called on one thread."""
        if self._taken - self._written < MOST_KEPT:
            self._taken += 1
            self._queue.put(record)
            return
        if self._lost == self._told_lost:
            self._warn(
                f"{self._destination.name}: {MOST_KEPT} records are kept, there is no room for more; "
                "further ones are lost until it works again"
            )
        self._lost += 1

    @property
    def kept(self) -> int:
        """Records that wait since the destination is in trouble, 0 while it is not; read on any thread."""
        return self._taken - self._written if self._outage.reason else 0

    @property
    def kept_for_long(self) -> int:
        """The same, and 0 while it has been in trouble for a moment only."""
        return self.kept if time.monotonic() - self._outage.since >= LOCKED_PATIENCE else 0

    def held_back(self) -> str:
        """What is lost if the process ends now, in one line; an empty one while nothing is in the way for long."""
        if not self._outage.is_told or not self.kept:
            return ""
        return (
            f"{self._destination.name}: {self.kept} records are held back, and lost unless they can be written before "
            f"this worker ends: {self._outage.reason}"
        )

    def leave(self, deadline: float) -> None:
        """Have everything written that was queued, and the thread end, by `deadline` (of the monotonic clock)."""
        self._deadline = deadline
        self._queue.put(Request.LEAVE)
        self._leaving.set()

    def hurry(self) -> None:
        """Have the thread end once something is in the way, and not wait for that to be over; may be called at any
        moment, such as in a signal's handler."""
        self._hurried = time.monotonic()

    def _is_over(self) -> bool:
        """Whether there is no more time, as far as the end has been asked for."""
        now = time.monotonic()
        hurried = self._hurried
        late = hurried is not None and now >= max(hurried, self._went_well) + LAST_SECONDS
        return now >= self._deadline or late

    def wait(self) -> int:
        """Wait for the end of the thread, until the deadline at most, or until it has made no progress in a hurry.

        Returns:
            how many records could not be written; the log says so too.
        """
        while self._thread.is_alive() and not self._is_over():
            self._thread.join(FIRST_BACKOFF)  # and no longer, since in between somebody may want it at once
        unwritten = self._taken - self._written + self._lost - self._told_lost
        if unwritten:
            reason = self._outage.reason or "there was not enough time"
            self._warn(f"{self._destination.name}: {unwritten} records are lost, the relay had to end before: {reason}")
        return unwritten

    def _run(self) -> None:
        try:
            while not self._ended:
                self._take()
                began = time.monotonic()
                wait = self._turn()
                self._pause(began + wait - time.monotonic())
        finally:
            self._destination.close()
            self._first_attempt.set()
            self._first_success.set()

    def _take(self) -> None:
        """Take what is queued; wait for something when nothing is left to do."""
        queued = [] if self._kept or self._requests else [self._queue.get()]
        # No one else takes from the queue, so there is at least as much as it says.
        queued += [self._queue.get() for _ in range(self._queue.qsize())]
        for item in queued:
            if isinstance(item, Record):
                self._kept.append(item)
            else:
                self._requests.add(item)

    def _turn(self) -> float:
        """Have everything written; return how many seconds after the beginning of this turn the next may begin."""
        before = len(self._kept)
        trouble = self._write()
        written = before - len(self._kept)
        self._written += written
        if trouble is not None:
            return self._in_trouble(trouble, written)
        self._went_well = time.monotonic()
        self._outage.over(written)
        self._tell_what_was_lost()
        self._backoff = FIRST_BACKOFF
        self._ended = Request.LEAVE in self._requests
        self._requests.clear()
        self._first_success.set()
        self._first_attempt.set()
        return TURN_SECONDS if written < LARGE_TURN else LARGE_TURN_SECONDS

    def _write(self) -> Trouble | None:
        try:
            self._destination.write(self._kept, self._requests)
        except Trouble as trouble:
            return trouble
        except Exception as error:  # a mistake in this program must not end the thread, and all records with it
            return Trouble(f"cannot be written: {error!r}", passing=True)
        return None

    def _tell_what_was_lost(self) -> None:
        lost = self._lost - self._told_lost
        if lost:
            self._told_lost += lost
            self._warn(f"{self._destination.name}: {lost} records are lost, there was no room to keep them")

    def _in_trouble(self, trouble: Trouble, written: int) -> float:
        if self._ends_the_start(trouble):
            return 0.0
        self._first_attempt.set()
        self._outage.goes_on(trouble, written, len(self._kept))
        is_known = self._hurried is not None and self._outage.is_told
        self._ended = self._leaving.is_set() and (is_known or self._is_over())
        if trouble.waited:
            return 0.0
        wait = self._backoff
        self._backoff = min(2 * wait, LONGEST_BACKOFF)
        return wait

    def _ends_the_start(self, trouble: Trouble) -> bool:
        """Tell whether someone still waits for this destination to work, and hears now that it does not."""
        with self._start_lock:
            if trouble.passing or not self._starting or self._first_success.is_set():
                return False
            self._mistake = trouble
            self._ended = True
            return True

    def _pause(self, seconds: float) -> None:
        if seconds <= 0 or self._ended:
            return
        if seconds <= LARGE_TURN_SECONDS or self._leaving.is_set():
            time.sleep(min(seconds, FIRST_BACKOFF))
        elif self._kept:
            self._leaving.wait(seconds)
        else:
            self._wait_for_first(seconds)

    def _wait_for_first(self, seconds: float) -> None:
        """Wait in a trouble that holds nothing back yet. What comes first is tried soon, so that others see that it is
        held back."""
        until = time.monotonic() + seconds
        while self._queue.empty() and (left := until - time.monotonic()) > 0:
            if self._leaving.wait(min(left, FIRST_BACKOFF)):
                break


class _Outage:
    """What the operator is told of a destination in trouble: each kind of trouble once, and once that it is over."""

    def __init__(self, name: str, warn: Warn, sign: Sign, *, tells_how_long: bool) -> None:
        self.reason = ""
        self._name = name
        self._warn = warn
        self._sign = sign
        self._tells_how_long = tells_how_long
        self.since = 0.0
        """When it began, in monotonic seconds."""
        self._written = 0
        self._told: set[str] = set()

    @property
    def is_told(self) -> bool:
        """Whether it has lasted long enough to be told of; read on any thread."""
        return bool(self._told)

    def goes_on(self, trouble: Trouble, written: int, kept: int) -> None:
        now = time.monotonic()
        if not self.reason:
            self.since = now
        self.reason = trouble.line
        self._written += written
        if trouble.kind not in self._told and now - self.since >= trouble.patience:
            self._told.add(trouble.kind)
            self._warn(f"{self._name}: {trouble.line}; records are kept until it works again ({kept} now)")
        if kept:  # from the first attempt on, however short it may be: nobody can tell beforehand
            self._sign.give(self._name)
        else:
            self._sign.take_back(self._name)

    def over(self, written: int) -> None:
        if self._told:
            after = f" after {time.monotonic() - self.since:.0f} s" if self._tells_how_long else ""
            kept = self._written + written
            self._warn(f"{self._name}: works again{after}; the {kept} records kept until now are written")
        if self.reason:
            self._sign.take_back(self._name)
        self.reason = ""
        self._written = 0
        self._told.clear()

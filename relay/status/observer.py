"""The thread that reads one database: every five seconds, and at once when somebody asks and the last is too old.

It is a real thread, so that a database that is locked, or a disk that hangs, holds up neither the visitors nor the
other databases. What it has read is one value, replaced as a whole.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from relay.process.shown import shown
from relay.report.periods import Day
from relay.report.tally import Sums
from relay.status.history import History, connections_without_row, count, counting, today
from relay.status.rates import FINE_SECONDS
from relay.status.reading import Reading
from relay.status.recount import Recount
from relay.status.source import Source, Unreadable

T = TypeVar("T")

NOT_ASKED_YET: Final = "it was not read yet"


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a database.

    Attributes:
        path: as the operator gave it, to be read.
        at: when it was last tried to read it, in monotonic seconds.
        reading: of that time; None when it could not be read then, and `trouble` says why.
        days: its history, None while that is being counted for the first time.
    """

    path: str
    at: float
    reading: Reading | None
    trouble: str
    days: dict[Day, Sums] | None


class Observer:
    """Watches one database.

    Args:
        source: reads it.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.seen = Seen(shown(source.path), float("-inf"), None, NOT_ASKED_YET, None)
        self._wanted = threading.Event()
        self._ended = False
        self._history: History | None = None
        self._recount = Recount()
        self._thread = threading.Thread(target=self._run, name=f"observer of {source.path}", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Watch no longer; returns at once, unless it is just reading."""
        self._ended = True
        self._wanted.set()
        self._thread.join(1.0)

    def ask(self) -> None:
        """Have it read now."""
        self._wanted.set()

    def _run(self) -> None:
        while not self._ended:
            self._look()
            self._bring_up_to_date()
            self._wait()

    def _wait(self) -> None:
        self._wanted.wait(max(0.0, self.seen.at + FINE_SECONDS - time.monotonic()))
        self._wanted.clear()

    def _look(self) -> None:
        path = shown(self._source.path)
        try:
            reading = self._source.read()
        except Unreadable as reason:
            self.seen = Seen(path, time.monotonic(), None, shown(str(reason)), None)
        else:
            self._recount.saw(reading)
            days = None
            if self._history is not None:
                if self._recount.is_of(reading):
                    self._history.note(reading.all_time, today(reading.at))
                days = self._history.days
            self.seen = Seen(path, time.monotonic(), reading, "", days)

    def _bring_up_to_date(self) -> bool:
        """Count all rows if it is time to; return whether that was tried."""
        reading = self.seen.reading
        if reading is None:
            return False
        if self._recount.wants_rows(reading, time.monotonic()):
            self._look_at_rows(reading)
        if not self._recount.wants_count(reading, time.monotonic()):
            return False
        self._count(reading)
        return True

    def _look_at_rows(self, reading: Reading) -> None:
        began = time.monotonic()
        try:
            missing = self._ask(connections_without_row)
        except Unreadable:
            missing = None
        now = time.monotonic()
        self._recount.saw_rows(reading, missing, now, now - began)

    def _count(self, reading: Reading) -> None:
        sign = self._recount.sign(reading)
        history = History()
        steps = counting(self._ask, reading.all_time, history)
        began, processor = time.monotonic(), time.thread_time()
        try:
            if not count(steps, self._pause):
                return
        except Unreadable:
            now = time.monotonic()
            self._recount.failed(now, now - began)
            return
        cost = time.thread_time() - processor
        self._look()
        if self.seen.reading is not None:
            history.counted_with(self.seen.reading.all_time)
        self._history = history
        self._recount.counted(sign, reading.written, time.monotonic(), cost)
        self._look()

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        return self._source.ask(lambda connection, _: question(connection))

    def _pause(self, seconds: float) -> bool:
        """Between two steps of a count: let others go on for as long as it took, and look at what is new."""
        self._wanted.wait(seconds)
        if self._wanted.is_set() or time.monotonic() - self.seen.at >= FINE_SECONDS:
            self._wanted.clear()
            self._look()
        return self._ended

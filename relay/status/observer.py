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
from relay.status.history import History, count, counting, today
from relay.status.rates import FINE_SECONDS
from relay.status.reading import Reading
from relay.status.source import Source, Unreadable

T = TypeVar("T")

COUNT_AGAIN_AFTER: Final = 6 * 3600.0
"""Seconds after which all rows are counted anew, in case that somebody has changed them."""

PATIENCE: Final = 100.0
"""When rows cannot be counted to the end (one of the file's pages is damaged, somebody locks it), that is tried again
after so many times as long as it took."""

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
        self._count_at = 0.0
        self._not_before = 0.0  # to be counted, since that failed
        self._imported = 0
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
            if self._is_to_be_counted():
                self._count()
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
            days = None
            if self._history is not None:
                days = self._history.by_day(reading.all_time, today(reading.at))
            self.seen = Seen(path, time.monotonic(), reading, "", days)

    def _is_to_be_counted(self) -> bool:
        reading = self.seen.reading
        now = time.monotonic()
        if reading is None or now < self._not_before:
            return False
        history = self._history
        return (
            history is None
            or now >= self._count_at
            or reading.imported != self._imported
            or reading.all_time.connections < history.least  # it is another file
        )

    def _count(self) -> None:
        reading = self.seen.reading
        assert reading is not None
        history = History()
        steps = counting(self._ask, reading.all_time, history)
        began = time.monotonic()
        try:
            if not count(steps, self._pause):
                return
        except Unreadable:
            now = time.monotonic()
            self._not_before = now + PATIENCE * (now - began)
            return
        self._look()
        if self.seen.reading is not None:
            history.counted_with(self.seen.reading.all_time)
        self._history = history
        self._imported = reading.imported
        self._count_at = time.monotonic() + COUNT_AGAIN_AFTER
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

"""All that is shown, of one moment; and who gathers it from the databases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gevent

from relay.report.periods import Day
from relay.report.tally import Sums
from relay.status.health import Health, Staff, judge
from relay.status.history import plus, today
from relay.status.observer import Observer, Seen
from relay.status.rates import DAY, HOUR, WINDOWS, Point, Rates
from relay.status.reading import Reading, together
from relay.status.source import Source

FRESH = 1.0
"""A reading of so many seconds ago will do for whoever asks now."""

PATIENCE = 0.5
"""Seconds for which a visitor waits for a newer one."""

PLOTS: tuple[tuple[str, int, int], ...] = (("10 minutes", 600, 60), ("hour", HOUR, 60), ("day", DAY, 72))
"""Title, seconds and stretches of each plot."""


@dataclass(frozen=True, slots=True)
class View:
    """What is known at one moment.

    Attributes:
        at: seconds since the epoch.
        seen: each database.
        reading: all that could be read together, None if none could.
        rates: bytes a second over each of `WINDOWS`; None where that long is not known yet.
        plots: the points of each of `PLOTS`.
        days: the last days, None while they are being counted.
    """

    at: float
    health: Health
    seen: tuple[Seen, ...]
    reading: Reading | None
    rates: dict[str, float | None]
    plots: dict[str, list[Point]]
    days: dict[Day, Sums] | None
    today: Day


class Lookout:
    """Watches databases and remembers.

    Args:
        paths: of the databases.
        workers: how many workers each relay should have, if that was said.
    """

    def __init__(self, paths: Sequence[Path], workers: int | None = None) -> None:
        self._observers = [Observer(Source(path)) for path in paths]
        self._rates = [Rates() for _ in paths]
        self._staffs = [Staff(workers) for _ in paths]
        self._noted = [float("-inf")] * len(paths)
        self._greenlet: gevent.Greenlet | None = None

    def start(self) -> None:
        """Begin to watch."""
        for observer in self._observers:
            observer.start()
        self._greenlet = gevent.spawn(self._remember)

    def close(self) -> None:
        """Watch no longer."""
        if self._greenlet is not None:
            self._greenlet.kill()
        for observer in self._observers:
            observer.close()

    def _remember(self) -> None:
        while True:
            self._note()
            gevent.sleep(0.5)

    def _note(self) -> None:
        for number, observer in enumerate(self._observers):
            seen = observer.seen
            if seen.reading is None or seen.at == self._noted[number]:
                continue
            self._noted[number] = seen.at
            reading = seen.reading
            self._rates[number].note(
                seen.at, reading.bytes, reading.since_start.connections, reading.connected, reading.waiting
            )
            self._staffs[number].note(
                seen.at, reading.workers_running, reading.unwritten, reading.holding or 0, reading.silent
            )

    def view(self, *, plots: bool = True) -> View:
        """What is known now; waits a moment, in the calling greenlet, for what is newer. Without `plots`, only what
        the last readings say."""
        asked = time.monotonic()
        late = [observer for observer in self._observers if asked - observer.seen.at > FRESH]
        for observer in late:
            observer.ask()
        while any(observer.seen.at < asked for observer in late) and time.monotonic() - asked < PATIENCE:
            gevent.sleep(0.002)
        self._note()
        seen = tuple(observer.seen for observer in self._observers)
        at = time.time()
        return View(
            at=at,
            health=judge(seen, self._staffs, time.monotonic()),
            seen=seen,
            reading=together([one.reading for one in seen if one.reading is not None]),
            rates={name: self._rate(seconds) for name, seconds in WINDOWS},
            plots={title: self._points(seconds, count) for title, seconds, count in PLOTS} if plots else {},
            days=_days(seen),
            today=today(at),
        )

    def _rate(self, seconds: int) -> float | None:
        known = [rate for rates in self._rates if (rate := rates.bytes_per_second(seconds)) is not None]
        return sum(known) if known else None

    def _points(self, seconds: int, count: int) -> list[Point]:
        each = [points for rates in self._rates if (points := rates.points(seconds, count))]
        return [_together(points) for points in zip(*each, strict=True)]


def _together(points: Sequence[Point]) -> Point:
    known = [point for point in points if point.rate is not None]
    if not known:
        return points[0]
    return Point(
        points[0].ago,
        sum(point.rate or 0.0 for point in known),
        sum(point.pairs or 0.0 for point in known),
        sum(point.waiting or 0.0 for point in known),
    )


def _days(seen: Sequence[Seen]) -> dict[Day, Sums] | None:
    known = [one.days for one in seen if one.days is not None]
    if not known:
        return None
    days: dict[Day, Sums] = {}
    for one in known:
        for day, sums in one.items():
            days[day] = plus(days[day], sums) if day in days else sums
    return days

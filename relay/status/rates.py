"""What is remembered of the readings, and the rates that follow from it. Pure; the clock is the caller's.

The last hour is remembered by the 5 seconds, the last day by the minute. What is remembered grows: a service that
starts anew counts from zero again, and so does another database, and neither is a rate below zero.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

FINE_SECONDS = 5.0
COARSE_SECONDS = 60.0
HOUR = 3600
DAY = 86_400

WINDOWS: tuple[tuple[str, int], ...] = (
    ("10 s", 10),
    ("1 min", 60),
    ("5 min", 300),
    ("15 min", 900),
    ("1 h", HOUR),
    ("1 day", DAY),
)
"""Over which rates are told."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is remembered of a reading; `at` in monotonic seconds. `moved` and `ended`, bytes and connections, only
    ever grow."""

    at: float
    moved: float
    ended: float
    pairs: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Point:
    """A stretch of a plot: when it begins, in seconds before now, and what there was; None where nobody looked."""

    ago: float
    rate: float | None
    pairs: float | None
    waiting: float | None


class Rates:
    """Remembers readings of one or several databases."""

    def __init__(self) -> None:
        self._fine: deque[Sample] = deque(maxlen=int(HOUR / FINE_SECONDS) + 3)
        self._coarse: deque[Sample] = deque(maxlen=int(DAY / COARSE_SECONDS) + 3)
        self._counted: tuple[float, float] | None = None
        self._moved = 0.0
        self._ended = 0.0

    def note(self, now: float, moved: float, ended: float, pairs: int, waiting: int) -> None:
        """Remember what was read at `now`."""
        if self._fine and now - self._fine[-1].at < FINE_SECONDS * 0.9:
            return
        if self._counted is not None:
            self._moved += _growth(self._counted[0], moved)
            self._ended += _growth(self._counted[1], ended)
        self._counted = (moved, ended)
        sample = Sample(now, self._moved, self._ended, pairs, waiting)
        self._fine.append(sample)
        if not self._coarse or now - self._coarse[-1].at >= COARSE_SECONDS * 0.99:
            self._coarse.append(sample)

    def bytes_per_second(self, seconds: int) -> float | None:
        """The rate over the last so many seconds; None while that long is not known."""
        return _rate(self._samples(seconds), seconds)

    def points(self, seconds: int, count: int) -> list[Point]:
        """The last so many seconds in `count` stretches, the oldest first."""
        samples = self._samples(seconds)
        if not samples:
            return []
        now = samples[-1].at
        step = seconds / count
        times = [sample.at for sample in samples]
        points = []
        for number in range(count):
            begin = now - seconds + number * step
            points.append(_point(samples, times, begin, begin + step, seconds - number * step))
        return points

    def _samples(self, seconds: int) -> Sequence[Sample]:
        return [*self._fine] if seconds <= HOUR else [*self._coarse, *([self._fine[-1]] if self._fine else [])]


def _growth(before: float, now: float) -> float:
    return now - before if now >= before else now


def _rate(samples: Sequence[Sample], seconds: int) -> float | None:
    if not samples:
        return None
    latest = samples[-1]
    # A sample may come a little late, so the window is a little wider than it says rather than empty.
    earlier = [sample for sample in samples if latest.at - sample.at >= seconds * 0.95]
    if not earlier:
        return None
    return (latest.moved - earlier[-1].moved) / (latest.at - earlier[-1].at)


def _point(samples: Sequence[Sample], times: Sequence[float], begin: float, end: float, ago: float) -> Point:
    first, last = bisect_right(times, begin) - 1, bisect_right(times, end) - 1
    if first < 0 or last <= first:
        return Point(ago, None, None, None)
    seen = samples[first + 1 : last + 1]
    seconds = samples[last].at - samples[first].at
    return Point(
        ago,
        (samples[last].moved - samples[first].moved) / seconds,
        max(sample.pairs for sample in seen),
        max(sample.waiting for sample in seen),
    )

"""Connections by day. This is the one thing that needs all rows of `usage`, so it is done in the background, some
thousand rows at a time, each in a short transaction; and seldom, since what comes later is known from `all_time`.

What a count finds and what `all_time` says may differ by the connections that ended meanwhile: these are of the day on
which that is seen. A later count puts those right that had started on another one. Some of them the count has met,
since rows are in no order: so many as are counted beyond those of `all_time` that had a row when it began.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from relay.report.by_other_hands import whole
from relay.report.periods import EPOCH_DAY, Day, confined_day
from relay.report.tally import Sums

T = TypeVar("T")

ROWS: Final = 20_000
"""In one go."""

END: Final = "SELECT rowid FROM usage WHERE rowid > ? ORDER BY rowid LIMIT 1 OFFSET ?"
LAST: Final = "SELECT max(rowid) FROM usage"
FIRST: Final = "SELECT min(rowid) FROM usage"
COUNT: Final = """
    SELECT CAST(coalesce(started, 0) / 86400 AS INTEGER), result, count(*),
        sum(min(max(CAST(coalesce(bytes, 0) AS INTEGER), 0), 1 << 48))
    FROM usage WHERE rowid > ? AND rowid <= ? GROUP BY 1, 2
"""
"""No connection moves more than 2^48 bytes; SQLite's sum() fails where one does not fit into 63 bits."""

WITHOUT_ROW: Final = (
    "SELECT coalesce((SELECT connections FROM all_time ORDER BY rowid LIMIT 1), 0) - (SELECT count(*) FROM usage)"
)
"""Of a table's pages SQLite reads only the heads for that, see sqlite3BtreeCount() in its btree.c."""

NOTHING: Final = Sums(0, 0, 0, 0, 0)
MOST_DAYS: Final = 31
"""So many days are kept, the latest."""


@dataclass(slots=True)
class History:
    """The last days, in UTC, as they were counted.

    Attributes:
        days: what was counted, and what has been seen to end since. Never changed, but replaced as a whole.
        of: the `all_time` that goes with these days: what a later one has more than this has ended since.
        met: so many of those that are not in `of` are in the days all the same, as they ended during the count; until
            it is over.
    """

    days: dict[Day, Sums] = field(default_factory=dict)
    of: Sums = NOTHING
    met: int = 0

    def counted_with(self, all_time: Sums) -> None:
        """Note `all_time` as it is after the count. If it has fewer connections than before, somebody has changed it:
        then it is this `all_time` that later ones are compared with."""
        if all_time.connections < self.of.connections:
            self.of = all_time
        elif self.met:
            self.of = plus(self.of, _part(_minus(all_time, self.of), self.met))
        self.met = 0

    def note(self, all_time: Sums, today: Day) -> None:
        """Put what has ended since on the day that it is now, when `all_time` is this."""
        since = _minus(all_time, self.of)
        if since.connections > 0:
            self.days = {**self.days, today: plus(self.days.get(today, NOTHING), since)}
        self.of = all_time


def today(now: float) -> Day:
    """The day of a moment, in seconds since the epoch."""
    return int(now // 86_400) + EPOCH_DAY


class Reader(Protocol):
    """Has something read in a transaction of its own."""

    def __call__(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """The answer."""


def count(steps: Iterator[None], pause: Callable[[float], bool]) -> bool:
    """Take all steps of a count, and rest after each for as long as it took; False when `pause` says to stop."""
    began = time.monotonic()
    for _ in steps:
        if pause(time.monotonic() - began):
            return False
        began = time.monotonic()
    return True


def counting(read: Reader, all_time: Sums, into: History) -> Iterator[None]:
    """Count all rows, some with each step; when it is over, `into` is the history. `all_time` is of the beginning."""
    first, last = read(_extent)
    without_row = read(connections_without_row)
    days: dict[Day, Sums] = {}
    if first is not None and last is not None:
        begin = first - 1
        while begin < last:
            begin = _count_some(read, begin, last, days)
            yield
    latest = sorted(days)[-MOST_DAYS:]
    counted = _total(days)
    into.days = {day: days[day] for day in latest}
    if without_row == 0:
        into.of = counted
        return
    # Rows that somebody has deleted are of no day, and not of today; nor are those that `all_time` never knew of.
    into.of = all_time
    into.met = max(0, counted.connections + without_row - all_time.connections)


def _extent(connection: sqlite3.Connection) -> tuple[int | None, int | None]:
    return connection.execute(FIRST).fetchone()[0], connection.execute(LAST).fetchone()[0]


def connections_without_row(connection: sqlite3.Connection) -> int:
    """How many connections of `all_time` have no row in `usage`, as those of rows that were deleted; below zero where
    rows are more. It stays the same whatever the relay records."""
    (missing,) = connection.execute(WITHOUT_ROW).fetchone()
    return whole(missing)


def _count_some(read: Reader, begin: int, last: int, days: dict[Day, Sums]) -> int:
    def some(connection: sqlite3.Connection) -> tuple[int, list[tuple[int, object, int, int]]]:
        found = connection.execute(END, (begin, ROWS - 1)).fetchone()
        end = last if found is None else min(last, found[0])
        return end, connection.execute(COUNT, (begin, end)).fetchall()

    end, rows = read(some)
    for since_epoch, result, connections, size in rows:
        day = confined_day(since_epoch + EPOCH_DAY)
        sums = Sums(
            connections,
            size,
            connections if result == "happy" else 0,
            connections if result == "lonely" else 0,
            connections if result == "errory" else 0,
        )
        days[day] = plus(days.get(day, NOTHING), sums)
    return end


def plus(one: Sums, other: Sums) -> Sums:
    """Both added up."""
    return Sums(
        one.connections + other.connections,
        one.bytes + other.bytes,
        one.happy + other.happy,
        one.lonely + other.lonely,
        one.errory + other.errory,
    )


def _minus(one: Sums, other: Sums) -> Sums:
    return Sums(
        max(0, one.connections - other.connections),
        max(0, one.bytes - other.bytes),
        max(0, one.happy - other.happy),
        max(0, one.lonely - other.lonely),
        max(0, one.errory - other.errory),
    )


def _part(of: Sums, connections: int) -> Sums:
    """So many of the connections of a sum, with what is theirs of the rest as if all were alike."""
    connections = min(connections, of.connections)
    if connections == 0:
        return NOTHING

    def share(number: int) -> int:
        return number * connections // of.connections

    happy = share(of.happy)
    lonely = share(of.happy + of.lonely) - happy
    errory = share(of.happy + of.lonely + of.errory) - happy - lonely  # so that the moods add up, whatever is rounded
    return Sums(connections, share(of.bytes), happy, lonely, errory)


def _total(days: dict[Day, Sums]) -> Sums:
    total = NOTHING
    for sums in days.values():
        total = plus(total, sums)
    return total

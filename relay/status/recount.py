"""When all rows of a database are counted again, so that its days are right within a minute and cost little.

What ends is of today, as `all_time` tells, and needs no count. These do, and each has a sign that is cheap to read:

- another file has been put in its place, or somebody has imported rows: the reading's `origin`;
- a new day has begun, or somebody has set the clock: what ended lately may have started on another day;
- sums of `all_time` went back: they, or the rows, are others now;
- `all_time` and the number of rows differ by another number than before: rows were deleted or added without the sums,
  or the other way round. The number alone takes a fiftieth of what counting by day does.

Whatever has no sign (transfers over midnight, rows that somebody has changed) is found by counting now and then, as
long as anybody writes. Nothing here reads anything; the observer says what it has read, and when.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from relay.report.periods import Day
from relay.report.tally import Sums
from relay.status.history import today
from relay.status.reading import Reading

AT_A_SIGN: Final = 10.0
"""Upon a sign they are counted when so many times as long has passed as a processor took for the last count."""

WITHOUT: Final = 100.0
"""The same without a sign: a hundredth of a processor goes into it."""

SECONDS_BETWEEN: Final = 30.0
"""At the least, between two counts without a sign."""

ROWS_EVERY: Final = 20.0
"""Seconds between two looks at how many rows there are, at the least."""

ROWS_PART: Final = 100.0
"""And so many times as long as such a look took."""

PATIENCE: Final = 100.0
"""When rows cannot be counted to the end (one of the file's pages is damaged, somebody locks it), that is tried again
after so many times as long as it took."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What tells that rows of other days may have come, gone or changed, once it is another.

    Attributes:
        origin: of the reading.
        day: today.
        setbacks: how often sums have been seen to go back.
        missing: connections of `all_time` that have no row; None when that is not known.
    """

    origin: object
    day: Day
    setbacks: int
    missing: int | None


class Recount:
    """Of one database. All times are monotonic seconds."""

    def __init__(self) -> None:
        self._all_time: Sums | None = None  # as it was last seen
        self._setbacks = 0
        self._missing: int | None = None
        self._rows_not_before = float("-inf")
        self._rows_written: object = None  # the reading's `written` when rows were last looked at
        self._counted: Sign | None = None
        self._counted_written: object = None
        self._cost = 0.0
        self._at = 0.0
        self._not_before = float("-inf")  # since a count failed

    def saw(self, reading: Reading) -> None:
        """Note what was read."""
        if self._all_time is not None and _went_back(self._all_time, reading.all_time):
            self._setbacks += 1
        self._all_time = reading.all_time

    def wants_rows(self, reading: Reading, now: float) -> bool:
        """Whether the number of rows is to be looked at."""
        return now >= self._rows_not_before and reading.written != self._rows_written

    def saw_rows(self, reading: Reading, missing: int | None, now: float, took: float) -> None:
        """Note how many connections have no row; None when that could not be read. It is over at `now`."""
        if missing is not None:
            self._missing = missing
        self._rows_written = reading.written
        self._rows_not_before = now + max(ROWS_EVERY, ROWS_PART * took)

    def sign(self, reading: Reading) -> Sign:
        """Everything of this moment; to be kept when a count begins, and handed to `counted`."""
        return Sign(reading.origin, today(reading.at), self._setbacks, self._missing)

    def wants_count(self, reading: Reading, now: float) -> bool:
        """Whether all rows are to be counted."""
        if now < self._not_before:
            return False
        if self._counted is None:
            return True
        if self.sign(reading) != self._counted:
            return now >= self._at + AT_A_SIGN * self._cost
        return reading.written != self._counted_written and now >= self._at + max(
            SECONDS_BETWEEN, WITHOUT * self._cost
        )

    def counted(self, sign: Sign, written: object, now: float, cost: float) -> None:
        """Note a count that is over.

        Args:
            sign: as it was when the count began.
            written: the reading's, then.
            now: the time.
            cost: seconds of a processor that it took.
        """
        self._counted, self._counted_written, self._at, self._cost = sign, written, now, cost

    def failed(self, now: float, took: float) -> None:
        """Note a count that came to nothing after so many seconds."""
        self._not_before = now + PATIENCE * took

    def is_of(self, reading: Reading) -> bool:
        """Whether what `all_time` has more than when rows were counted has ended since, and was not brought there."""
        return self._counted is not None and reading.origin == self._counted.origin


def _went_back(before: Sums, now: Sums) -> bool:
    return any(after < earlier for earlier, after in zip(before.named().values(), now.named().values(), strict=True))

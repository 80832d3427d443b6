"""Days, weeks and months: which one a moment belongs to, and what each is called.

Pure, apart from asking the C library for the local time zone. A day is a proleptic ordinal (`date.toordinal`): small,
sortable, the same number in every process. Days begin at midnight of the local time zone (the environment's TZ, else
the machine's), or of UTC when asked for. Weeks begin on Monday, as ISO 8601 counts them. A week or month is named by
its first day.

The database has to say the day of each of millions of rows, and knows no time zones. So it is told the zone's offsets
from UTC during the stretch of time in question, and adds them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal, get_args

Span = Literal["day", "week", "month"]
SPANS: tuple[Span, ...] = get_args(Span)

Day = int  # proleptic ordinal
EPOCH_DAY: Day = date(1970, 1, 1).toordinal()
DAY = 86400  # seconds

# What lies outside (a broken clock, other hands) is counted on the first or last of these days.
EARLIEST = 0  # seconds since the epoch
LATEST = 4102444800  # the year 2100
FIRST_DAY, LAST_DAY = EPOCH_DAY, EPOCH_DAY + LATEST // DAY
# No zone has changed its clock and changed it back within so short a time.
STEP = 7 * DAY


@dataclass(frozen=True, slots=True)
class Offset:
    """The time zone's distance from UTC, in seconds east of it, `since` a moment in seconds since the epoch."""

    since: int
    seconds: int


def confined(moment: object) -> int:
    """Return the moment, as a database gave it, within the years for which days are counted."""
    return int(min(max(moment, EARLIEST), LATEST)) if isinstance(moment, int | float) else EARLIEST


def confined_day(day: float) -> Day:
    """Return the day within those years."""
    return int(min(max(day, FIRST_DAY), LAST_DAY))


def is_utc() -> bool:
    """Return whether the local time zone has never been anything but UTC."""
    return time.tzname == ("UTC", "UTC")


def offset_at(moment: int, utc: bool) -> int:
    """Return the seconds east of UTC at that moment, of the local zone unless `utc`."""
    return 0 if utc else time.localtime(moment).tm_gmtoff


def offsets(first: int, last: int, utc: bool) -> list[Offset]:
    """Return the offsets that hold between two moments: the one at `first`, and each change up to `last`."""
    found = [Offset(first, offset_at(first, utc))]
    low = first
    while not utc and low < last:
        high = min(low + STEP, last)
        if offset_at(high, utc) != found[-1].seconds:
            found.append(_change(low, high))
        low = high
    return found


def _change(low: int, high: int) -> Offset:
    """Return the change between two moments whose offsets differ, by halving."""
    before = offset_at(low, utc=False)
    while high - low > 1:
        middle = (low + high) // 2
        if offset_at(middle, utc=False) == before:
            low = middle
        else:
            high = middle
    return Offset(high, offset_at(high, utc=False))


def day_of(moment: float, utc: bool) -> Day:
    """Return the day of a moment in seconds since the epoch."""
    known = confined(moment)
    return EPOCH_DAY + (known + offset_at(known, utc)) // DAY


def first_day(day: Day, span: Span) -> Day:
    """Return the first day of the day, week or month that holds `day`."""
    if span == "week":
        return day - date.fromordinal(day).weekday()
    if span == "month":
        return date.fromordinal(day).replace(day=1).toordinal()
    return day


def latest(count: int, until: Day, span: Span) -> list[Day]:
    """Return the first days of the last `count` days, weeks or months, in order; `until` is a day of the last one. None
    begins before the first day that is counted, but the one that it is in."""
    firsts = [first_day(until, span)]
    while len(firsts) < count and firsts[-1] > FIRST_DAY:
        firsts.append(first_day(firsts[-1] - 1, span))
    return firsts[::-1]


def last_day(first: Day, span: Span) -> Day:
    """Return the last day of the day, week or month that begins with `first`."""
    if span == "week":
        return first + 6
    if span == "month":
        inside_next = date.fromordinal(first) + timedelta(days=31)
        return inside_next.replace(day=1).toordinal() - 1
    return first


def label(first: Day, span: Span) -> str:
    """Return how people write the day, week or month: 2026-11-20, 2026-W47 or 2026-11."""
    day = date.fromordinal(first)
    if span == "week":
        year, week, _ = day.isocalendar()
        return f"{year}-W{week:02d}"
    return day.strftime("%Y-%m") if span == "month" else day.isoformat()


def parse_span(text: str) -> Span:
    """Return the span of that name.

    Raises:
        ValueError: there is none.
    """
    for span in SPANS:
        if span == text:
            return span
    raise ValueError(text)

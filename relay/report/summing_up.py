"""From the days that were counted to what is told: the last days, weeks or months, and everything together. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relay.report.database import Now
from relay.report.periods import Day, Span, first_day, latest
from relay.report.spread import Spread
from relay.report.tally import Spreads, Sums, Tally, add_sums, spreads

__all__ = ["PeriodReport", "Report", "Spread", "Spreads", "Sums", "sum_up"]


@dataclass(frozen=True, slots=True)
class PeriodReport:
    """A day, week or month, by its first day."""

    first: Day
    sums: Sums
    spreads: Spreads


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is told of one database, or of several together.

    Attributes:
        paths: of the databases.
        made: seconds since the epoch.
        zone: the name of the time zone that days are counted in.
        spreads: of all transfers that have a row.
        periods: in the order of time.
    """

    paths: Sequence[str]
    made: float
    zone: str
    now: Now
    since_start: Sums
    all_time: Sums
    spreads: Spreads
    span: Span
    periods: Sequence[PeriodReport]


def sum_up(tallies: Mapping[Day, Tally], span: Span, last: int | None, today: Day) -> list[PeriodReport]:
    """Return the days, weeks or months to tell of, in order.

    Args:
        tallies: by day, their values sorted.
        last: how many, up to the one that `today` is in, the empty ones too; None for all that have a connection.
        today: in the zone in which the days were counted.

    Where nothing was counted there is nothing to tell of.
    """
    if not tallies:
        return []
    by_first: dict[Day, list[Tally]] = {}
    for day, tally in tallies.items():
        by_first.setdefault(first_day(day, span), []).append(tally)
    chosen = sorted(by_first) if last is None else latest(last, today, span)
    return [_period(first, by_first.get(first, [])) for first in chosen]


def _period(first: Day, days: Sequence[Tally]) -> PeriodReport:
    return PeriodReport(first, add_sums(day.sums() for day in days), spreads(day.values for day in days))

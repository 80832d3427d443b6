"""Exact percentiles over many values, without sorting them all at once.

Values are kept as runs: packed arrays, each sorted and of bounded length. Two million values of eight bytes are 16 MB
that way; as one sorted Python list they would be 64. A percentile over any number of runs is found by
halving the range of values and asking each run how many of its values lie below, so the values of a month come from
the runs of its days and nothing is merged.

A percentile is the nearest-rank one: the smallest value that at least that share of all values does not exceed. It is
always a value that occurred.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import TypeVar

RUN_LENGTH = 65536  # values sorted at once: bounds the memory that sorting takes

Run = Sequence[float]  # ascending
Values = TypeVar("Values", "array[int]", "array[float]")


@dataclass(frozen=True, slots=True)
class Spread:
    """How a quantity is spread: seconds or bytes, in the unit of the values."""

    median: float
    p95: float


def sort_runs(values: Values) -> None:
    """Sort each stretch of RUN_LENGTH values in place; what is nearly sorted already takes little time."""
    for start in range(0, len(values), RUN_LENGTH):
        stretch = values[start : start + RUN_LENGTH]
        values[start : start + RUN_LENGTH] = array(values.typecode, sorted(stretch))


def runs_of(values: Values) -> list[Run]:
    """Return the runs of values that `sort_runs` has sorted."""
    if len(values) <= RUN_LENGTH:
        return [values]
    return [values[start : start + RUN_LENGTH] for start in range(0, len(values), RUN_LENGTH)]


def percentile(runs: Sequence[Run], percent: int) -> float:
    """Return the smallest value such that at least `percent` (1 to 100) in a hundred of all values are not above it.

    Each round compares with the weighted median of the runs' middles, which leaves at least a quarter of the values
    that are still in question behind: some fifty rounds for two million values at the very worst.

    Raises:
        ValueError: there is no value at all.
    """
    open_from = [0] * len(runs)
    open_to = [len(run) for run in runs]
    count = sum(open_to)
    if count == 0:
        raise ValueError("a percentile of nothing")
    rank = -(-count * percent // 100)  # from 1
    while True:
        pivot = _weighted_middle(runs, open_from, open_to)
        first_equal = [bisect_left(*each) for each in zip(runs, repeat(pivot), open_from, open_to)]
        first_above = [bisect_right(*each) for each in zip(runs, repeat(pivot), first_equal, open_to)]
        if rank <= sum(first_equal):
            open_to = first_equal
        elif rank > sum(first_above):
            open_from = first_above
        else:
            return pivot


def _weighted_middle(runs: Sequence[Run], open_from: Sequence[int], open_to: Sequence[int]) -> float:
    stretches = zip(runs, open_from, open_to, strict=True)
    middles = sorted((run[(low + high) // 2], high - low) for run, low, high in stretches if low < high)
    reached = list(accumulate(length for _, length in middles))
    return middles[bisect_left(reached, reached[-1] / 2)][0]


def spread_of(runs: Sequence[Run]) -> Spread | None:
    """Return median and 95th percentile of all values of the runs; None when there are none."""
    if not any(len(run) for run in runs):
        return None
    return Spread(median=percentile(runs, 50), p95=percentile(runs, 95))

"""The pace of --pair-rate and --relay-rate, without a clock."""

from __future__ import annotations

from heapq import heapify, heapreplace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.transfer.pace import LEAST_BYTES, MOMENT, ROUND, Pace

RATES = st.floats(1_000, 1e9)
ROUNDED = 1 + 1e-12  # by so much a float may be off


def move(pace: Pace, wanted: list[float], seconds: float) -> list[int]:
    """What each of several movers gets in so long, when mover `n` wants `wanted[n]` of each portion it reserves."""
    got = [0] * len(wanted)
    turns = [(0.0, number) for number in range(len(wanted))]
    heapify(turns)
    while (now := turns[0][0]) < seconds:
        _, number = turns[0]
        size = pace.portion()
        delay = pace.reserve(size, now)
        if now + delay < seconds:
            moved = int(size * wanted[number])
            got[number] += moved
            pace.give_back(size - moved)
        # Who has nothing to move asks again a little later.
        heapreplace(turns, (now + delay + (0.001 if wanted[number] < 1 else 1e-9), number))
    return got


@given(RATES, st.integers(1, 30))
def test_all_together_never_move_more_than_the_rate_and_a_portion_ahead(rate: float, movers: int) -> None:
    pace = Pace(rate)
    pace.sharers = movers
    moved = sum(move(pace, [1.0] * movers, 2.0))
    assert moved <= rate * 2.0 * ROUNDED + pace.portion()
    assert moved >= rate * 2.0 * 0.9 - (movers + 1) * pace.portion()


@given(RATES, st.integers(2, 30))
def test_all_who_want_as_much_as_they_can_get_the_same(rate: float, movers: int) -> None:
    pace = Pace(rate)
    pace.sharers = movers
    got = move(pace, [1.0] * movers, 3.0)
    assert max(got) - min(got) <= pace.portion()


def test_what_one_does_not_move_the_others_get() -> None:
    pace = Pace(1e6)
    idle, busy, other = move(pace, [0.0, 1.0, 1.0], 4.0)
    assert idle == 0
    assert busy + other == pytest.approx(4e6, rel=0.1)
    assert busy == pytest.approx(other, rel=0.1)


@given(RATES)
def test_after_a_silence_nothing_is_saved_up(rate: float) -> None:
    pace = Pace(rate)
    assert pace.reserve(pace.portion(), 0.0) == 0.0
    assert pace.reserve(pace.portion(), 1000.0) == 0.0
    assert pace.reserve(pace.portion(), 1000.0) == pytest.approx(pace.portion() / rate)


@given(RATES, st.integers(1, 100_000))
def test_a_portion_is_a_moments_worth_and_a_round_of_all_is_short(rate: float, sharers: int) -> None:
    pace = Pace(rate)
    pace.sharers = sharers
    assert pace.portion() <= max(LEAST_BYTES, rate * MOMENT)
    assert pace.portion() == LEAST_BYTES or pace.portion() * sharers <= rate * ROUND * ROUNDED

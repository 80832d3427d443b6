"""The pace of --pair-rate and --relay-rate, without a clock."""

from __future__ import annotations

import math
from heapq import heapify, heapreplace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.transfer.pace import LEAST_BYTES, LOOKED_AT, MOMENT, ROUND, SLACK, WORTHWHILE_BYTES, Line, Pace

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
    moved = sum(move(pace, [1.0] * movers, 2.0))
    assert moved <= rate * 2.0 * ROUNDED + pace.portion()
    assert moved >= rate * 2.0 * 0.9 - (movers + 1) * pace.portion()


@given(RATES, st.integers(2, 30))
def test_all_who_want_as_much_as_they_can_get_the_same(rate: float, movers: int) -> None:
    pace = Pace(rate)
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


@given(RATES, st.lists(st.integers(0, 1 << 22), min_size=1, max_size=1000))
@settings(deadline=None)
def test_a_portion_is_a_moments_worth_at_the_most_and_a_round_of_all_is_short(rate: float, have: list[int]) -> None:
    line: Line[int] = Line(Pace(rate))
    for who, size in enumerate(have):
        line.join(who, lambda size=size: size)  # type: ignore[misc]
    portion = line._find_portion()
    assert LEAST_BYTES <= portion <= max(LEAST_BYTES, rate * MOMENT)
    if len(have) <= LOOKED_AT and portion > LEAST_BYTES:
        assert sum(max(LEAST_BYTES, min(size, portion)) for size in have) <= rate * ROUND * ROUNDED + len(have)


@given(RATES)
def test_alone_a_portion_is_worth_its_wait_and_no_wait_is_longer_than_a_round(rate: float) -> None:
    portion = Pace(rate).portion_alone()
    assert portion >= min(WORTHWHILE_BYTES, int(rate * ROUND))
    assert portion <= max(rate * ROUND, LEAST_BYTES)


def test_who_has_little_makes_no_portion_smaller_than_it_takes() -> None:
    line: Line[int] = Line(Pace(1e8))
    for who in range(300):
        line.join(who, lambda: 5000)
    for who in range(300, 340):
        line.join(who, lambda: 1 << 22)
    assert line._find_portion() == pytest.approx((1e8 * ROUND - 300 * 5000) / 40, rel=0.001)


class Mover:
    """Somebody who has so many bytes to move."""

    def __init__(self, has: float) -> None:
        self.has = has
        self.moved = 0
        self.turns: list[float] = []


def run(pace: Pace, movers: list[Mover], seconds: float, late: float = 0.0) -> None:
    """Let those move for so long who have stood up at the same moment; every wait takes `late` seconds more."""
    line: Line[Mover] = Line(pace)
    for mover in movers:
        line.join(mover, lambda mover=mover: int(min(mover.has, 1 << 30)))  # type: ignore[misc]
    now = 0.0
    while now < seconds and len(line):
        for mover, size in [*line.take_due(now)]:
            moved = int(min(size, mover.has))
            mover.has -= moved
            mover.moved += moved
            mover.turns.append(now)
            pace.give_back(size - moved)
            if mover.has:
                line.join(mover, lambda mover=mover: int(min(mover.has, 1 << 30)))  # type: ignore[misc]
        now += max(1e-6, pace.free_in(now)) + late


def test_a_byte_of_each_of_many_takes_no_more_than_these_bytes_from_who_has_much() -> None:
    pace = Pace(1e7)
    much, few = Mover(math.inf), [Mover(1) for _ in range(300)]
    run(pace, [much, *few], 2.0)
    assert all(mover.moved == 1 for mover in few)
    assert max(mover.turns[-1] for mover in few) < MOMENT + SLACK + 300 * 2e-6
    assert much.moved == pytest.approx(2e7, rel=0.05)


@given(st.floats(1e6, 1e9), st.integers(2, 200))
@settings(deadline=None, max_examples=20)
def test_many_who_begin_at_once_have_all_had_a_portion_within_a_round(rate: float, movers: int) -> None:
    pace = Pace(rate)
    all_of_them = [Mover(math.inf) for _ in range(movers)]
    run(pace, all_of_them, 3.0)
    for mover in all_of_them:
        pauses = [after - before for before, after in zip([0.0, *mover.turns], [*mover.turns, 3.0], strict=True)]
        assert max(pauses) <= ROUND + 2 * MOMENT
    moved = [mover.moved for mover in all_of_them]
    assert sum(moved) <= rate * (3.0 + MOMENT + 2 * SLACK)
    assert max(moved) - min(moved) <= rate * MOMENT


def test_who_is_called_late_gets_the_rate_all_the_same() -> None:
    mover = Mover(math.inf)
    run(Pace(1e6), [mover], 10.0, late=0.01)
    assert mover.moved == pytest.approx(1e7, rel=0.02)


def test_but_what_was_long_ago_is_not_saved_up() -> None:
    pace = Pace(1e6)
    line: Line[str] = Line(pace)
    pace.reserve(1000, 0.0)
    line.join("somebody", lambda: 1 << 20)
    assert [size for _, size in line.take_due(1000.0)] == [int(1e6 * MOMENT)]
    line.join("the same", lambda: 1 << 20)
    assert len([*line.take_due(1000.0)]) == 1
    line.join("again", lambda: 1 << 20)
    assert not [*line.take_due(1000.0)]


def test_who_leaves_the_line_takes_nothing_with_it() -> None:
    pace = Pace(1e6)
    line: Line[str] = Line(pace)
    pace.reserve(50_000, 0.0)
    for who in ("a", "b", "c"):
        line.join(who, lambda: 1 << 20)
    assert line.holds_back(0.0)
    line.leave("b")
    line.leave("nobody")
    assert [who for now in (0.05, 0.5) for who, _ in line.take_due(now)] == ["a", "c"]
    assert not line.holds_back(1.0)


def test_of_a_long_line_the_first_are_asked_what_they_have_and_the_others_taken_to_have_as_much() -> None:
    line: Line[int] = Line(Pace(1e6))
    assert not [*line.ask_all()]
    for who in range(LOOKED_AT + 2):
        line.join(who, lambda who=who: 1 if who < LOOKED_AT // 2 else 3)  # type: ignore[misc]
    half = LOOKED_AT // 2
    assert [*line.ask_all()] == [*enumerate([1] * half + [3] * half + [2] * 2)]


def test_as_long_as_somebody_stands_in_the_line_nobody_goes_before_it() -> None:
    line: Line[str] = Line(Pace(1e6))
    assert not line.holds_back(0.0)
    line.join("somebody", lambda: 1)
    assert line.holds_back(0.0)

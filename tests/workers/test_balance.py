"""Which transfers a busy worker hands on, and that real workers end up with about as much to do each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.workers.balance import BUSY, MOST_AT_ONCE, WORTH_IT, Balance


@dataclass(eq=False)
class Transfer:
    """One that moves `rate` bytes a second."""

    rate: int
    moved: int = 0

    def go_on(self) -> None:
        """For a second."""
        self.moved += self.rate


def surplus_of(rates: list[int], load: float, other_load: float, seconds: int = 2) -> list[int]:
    """The rates of what is to go in the last of so many seconds; nothing may be before."""
    balance: Balance[Transfer] = Balance()
    transfers = [Transfer(rate) for rate in rates]
    for _ in range(seconds - 1):
        assert balance.surplus(transfers, load, other_load) == []
        for transfer in transfers:
            transfer.go_on()
    return [transfer.rate for transfer in balance.surplus(transfers, load, other_load)]


@pytest.mark.parametrize(
    ("rates", "load", "other_load", "gone"),
    [
        ([100] * 8, 1.0, 0.0, [100] * 4),
        ([100, 100], 1.0, 0.0, [100]),
        ([100, 100], 0.95, 0.05, [100]),
        ([100, 100, 100], 1.0, 0.0, [100]),
        ([100], 1.0, 0.0, []),
        ([900, 100], 1.0, 0.0, [100]),
        ([600, 100, 100, 100, 100], 1.0, 0.0, [600]),
        ([100, 0, 0], 1.0, 0.0, []),
        ([100, 100], 1.0, 0.9, []),
        ([100, 100], 0.5, 0.0, []),
        ([0, 0], 1.0, 0.0, []),
        ([], 1.0, 0.0, []),
    ],
)
def test_so_many_go_that_both_have_about_as_much_to_do(
    rates: list[int], load: float, other_load: float, gone: list[int]
) -> None:
    assert surplus_of(rates, load, other_load) == gone


def test_nothing_goes_before_it_is_known_what_moves() -> None:
    balance: Balance[Transfer] = Balance()
    transfers = [Transfer(100), Transfer(100)]
    assert balance.surplus(transfers, 1.0, 0.0) == []
    for transfer in transfers:
        transfer.go_on()
    assert len(balance.surplus(transfers, 1.0, 0.0)) == 1
    for transfer in transfers:
        transfer.go_on()
    assert balance.surplus(transfers, 1.0, 0.0) == []  # and after some have gone it begins anew


def test_a_transfer_that_has_just_come_does_not_go() -> None:
    balance: Balance[Transfer] = Balance()
    old = [Transfer(100), Transfer(100)]
    balance.surplus(old, 1.0, 0.0)
    for transfer in old:
        transfer.go_on()
    newcomer = Transfer(0, moved=1_000_000)
    assert newcomer not in balance.surplus([*old, newcomer], 1.0, 0.0)


@given(
    st.lists(st.integers(0, 10**9), max_size=30),
    st.floats(0, 1.2, allow_nan=False),
    st.floats(0, 1.2, allow_nan=False),
)
def test_what_goes_never_turns_the_difference_round_by_more_than_it_was(
    rates: list[int], load: float, other_load: float
) -> None:
    gone = surplus_of(rates, load, other_load)
    if load < BUSY or load - other_load < WORTH_IT:
        assert gone == []
    moved = load * sum(gone) / max(sum(rates), 1)
    before, after = load - other_load, load - other_load - 2 * moved
    assert not gone or abs(after) < before
    assert len(gone) <= MOST_AT_ONCE


def test_however_many_transfers_there_are_they_are_gone_through_in_slices() -> None:
    passed: list[int] = []

    def in_slices(transfers: Iterable[Transfer]) -> Iterator[Transfer]:
        passed.append(0)
        for transfer in transfers:
            passed[-1] += 1
            yield transfer

    balance: Balance[Transfer] = Balance()
    transfers = [Transfer(100) for _ in range(50)]
    assert balance.surplus(transfers, 1.0, 0.0, in_slices) == []
    for transfer in transfers:
        transfer.go_on()
    assert len(balance.surplus(transfers, 1.0, 0.0, in_slices)) == MOST_AT_ONCE
    assert passed == [50, 0, 50, *range(50, 50 - MOST_AT_ONCE, -1)]

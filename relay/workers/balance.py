"""Which transfers go to a worker with less to do: pure, the clock is the caller's.

Who accepts a client, and who is home to its token, is settled before anybody knows how much a transfer will move. So
that several large ones do not share one processor while another is idle, a worker that has been busy for two seconds
hands transfers on, of those that move most, until both have about as much to do. One that keeps a processor busy all
alone stays: elsewhere it would be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

BUSY = 0.6
"""The load (see `load`) of a worker that has more to do than is good."""

WORTH_IT = 0.3
"""How much lower a sibling's has to be."""

MOST_AT_ONCE = 8

T = TypeVar("T", bound="Transfer")


class Transfer(Protocol):
    """What has to be known of a transfer; one is equal to itself alone."""

    @property
    def moved(self) -> int:
        """Bytes so far."""

    def __hash__(self) -> int: ...


class Balance(Generic[T]):
    """What this worker's transfers moved from one second to the next, while it was busy."""

    def __init__(self) -> None:
        self._before: Mapping[T, int] = {}

    def surplus(
        self,
        transfers: Collection[T],
        load: float,
        other_load: float,
        in_slices: Callable[[Iterable[T]], Iterable[T]] = iter,
    ) -> list[T]:
        """The transfers that should go to a sibling, when this worker's load has been `load` during the last second
        and the sibling's `other_load`; to be asked once a second. They are gone through as `in_slices` has it."""
        before, self._before = self._before, {}
        if load < BUSY or load - other_load < WORTH_IT:
            return []
        rates: dict[T, int] = {}
        now: dict[T, int] = {}
        for transfer in in_slices(transfers):
            moved = now[transfer] = transfer.moved
            rate = moved - before.get(transfer, moved)
            if rate > 0:
                rates[transfer] = rate
        chosen = _chosen(rates, load, (load - other_load) / 2, in_slices)
        if not chosen:
            self._before = now  # else begin anew, with what the others say when these have gone
        return chosen


def _chosen(
    rates: dict[T, int], load: float, wanted: float, in_slices: Callable[[Iterable[T]], Iterable[T]]
) -> list[T]:
    """Those that make up `wanted` of the `load` that all of `rates` are, roughly: rather a little more than none."""
    total = sum(rates.values())
    chosen: list[T] = []
    while len(chosen) < MOST_AT_ONCE:
        # To sort all of them would take the event loop many times a slice.
        best, most = None, 0
        for transfer in in_slices(rates):
            rate = rates[transfer]
            if most < rate and load * rate < 1.5 * wanted * total:
                best, most = transfer, rate
        if best is None:
            break
        chosen.append(best)
        wanted -= load * most / total
        del rates[best]
    return chosen

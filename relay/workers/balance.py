"""Which transfers go to a worker with less to do: pure, the clock is the caller's.

Who accepts a client, and who is home to its token, is settled before anybody knows how much a transfer will move. So
that several large ones do not share one processor while another is idle, a worker that has been busy for two seconds
hands transfers on, of those that move most, until both have about as much to do. One that keeps a processor busy all
alone stays: elsewhere it would be the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

    def surplus(self, transfers: Collection[T], load: float, other_load: float) -> list[T]:
        """The transfers that should go to a sibling, when this worker's load has been `load` during the last second
        and the sibling's `other_load`; to be asked once a second."""
        before, self._before = self._before, {}
        if load < BUSY or load - other_load < WORTH_IT:
            return []
        self._before = {transfer: transfer.moved for transfer in transfers}
        rates = {transfer: moved - before[transfer] for transfer, moved in self._before.items() if transfer in before}
        chosen = _chosen(rates, load, (load - other_load) / 2)
        if chosen:
            self._before = {}  # begin anew, with what the others say when these have gone
        return chosen


def _chosen(rates: Mapping[T, int], load: float, wanted: float) -> list[T]:
    """Those that make up `wanted` of the `load` that all of `rates` are, roughly: rather a little more than none."""
    total = sum(rates.values())
    chosen: list[T] = []
    for transfer in sorted(rates, key=lambda one: rates[one], reverse=True):
        share = load * rates[transfer] / max(total, 1)
        if 0 < share < 1.5 * wanted and len(chosen) < MOST_AT_ONCE:
            chosen.append(transfer)
            wanted -= share
    return chosen

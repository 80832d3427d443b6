"""What a pair packs of itself to move to another process: pure values, and how they look in a packet the workers'
language decides.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PumpState:
    """One direction of a pair. `held` bytes rest in it: in its pipe, which travels along, unless they are `rest`."""

    moved: int
    held: int
    over: bool
    splices: bool
    rest: bytes


@dataclass(frozen=True, slots=True)
class PairState:
    """A pair in mid-transfer, but for its sockets and pipes; the times are those of `relay.transfer.pair.Pair`."""

    started: float
    arrived: float
    waiting_time: float
    there: PumpState
    back: PumpState

    @property
    def fds(self) -> int:
        """How many file descriptors travel beside it."""
        return 2 + sum(2 for pump in (self.there, self.back) if pump.held and not pump.rest)

"""What is told of a period: connections by mood, bytes, and how size and times of its transfers are spread.

Pure. A tally of a week, or of all time, is made by adding tallies: nothing in it has to be counted again.

Size, waiting time and total time are those of transfers, which are the `happy` connections: of the others none has
a size or a partner to wait for, and their hours of waiting in vain would bury the numbers one wants to see.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from relay.report.spread import Spread, runs_of, sort_runs, spread_of


@dataclass(frozen=True, slots=True)
class Sums:
    """What the one-row tables `since_reboot` and `all_time` hold, and what a period adds up to."""

    connections: int
    bytes: int
    happy: int
    lonely: int
    errory: int

    def named(self) -> dict[str, int]:
        """As the JSON documents have it."""
        return {
            "connections": self.connections,
            "happy": self.happy,
            "lonely": self.lonely,
            "errory": self.errory,
            "bytes": self.bytes,
        }


def add_sums(parts: Iterable[Sums]) -> Sums:
    """Return what all of them hold together."""
    each = list(parts)
    return Sums(
        connections=sum(part.connections for part in each),
        bytes=sum(part.bytes for part in each),
        happy=sum(part.happy for part in each),
        lonely=sum(part.lonely for part in each),
        errory=sum(part.errory for part in each),
    )


@dataclass(slots=True)
class Values:
    """Size (bytes), waiting time and total time (seconds) of transfers, in the order of the rows."""

    sizes: array[int] = field(default_factory=lambda: array("q"))
    waits: array[float] = field(default_factory=lambda: array("d"))
    totals: array[float] = field(default_factory=lambda: array("d"))

    def sort(self) -> None:
        """Sort the values, so that `spreads` can be asked."""
        sort_runs(self.sizes)
        sort_runs(self.waits)
        sort_runs(self.totals)

    def extend(self, other: Values) -> None:
        """Take the values of the other in."""
        self.sizes.extend(other.sizes)
        self.waits.extend(other.waits)
        self.totals.extend(other.totals)


@dataclass(slots=True)
class Tally:
    """One period while it is being counted."""

    happy: int = 0
    lonely: int = 0
    errory: int = 0
    other: int = 0  # a mood that this version does not know
    bytes: int = 0
    values: Values = field(default_factory=Values)

    def add_unpaired(self, mood: str | None, connections: int, size: int) -> None:
        """Count connections that were no transfers; `size` is the bytes of each (0, except in imported history)."""
        if mood == "lonely":
            self.lonely += connections
        elif mood == "errory":
            self.errory += connections
        else:
            self.other += connections
        self.bytes += connections * size

    def settle(self) -> None:
        """Count the transfers from their values, once all are there, and sort the values."""
        self.happy = len(self.values.sizes)
        self.bytes += sum(self.values.sizes)
        self.values.sort()

    def extend(self, other: Tally) -> None:
        """Take in what was counted elsewhere of the same period."""
        self.happy += other.happy
        self.lonely += other.lonely
        self.errory += other.errory
        self.other += other.other
        self.bytes += other.bytes
        self.values.extend(other.values)

    def sums(self) -> Sums:
        """Return the counts."""
        connections = self.happy + self.lonely + self.errory + self.other
        return Sums(connections, self.bytes, self.happy, self.lonely, self.errory)


@dataclass(frozen=True, slots=True)
class Spreads:
    """Size in bytes, waiting and total time in seconds; None when there was no transfer."""

    size: Spread | None
    waiting_time: Spread | None
    total_time: Spread | None


def spreads(parts: Iterable[Values]) -> Spreads:
    """Return the spreads over all parts together; each has to be sorted."""
    parts = list(parts)
    return Spreads(
        size=spread_of([run for part in parts for run in runs_of(part.sizes)]),
        waiting_time=spread_of([run for part in parts for run in runs_of(part.waits)]),
        total_time=spread_of([run for part in parts for run in runs_of(part.totals)]),
    )

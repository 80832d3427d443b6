"""What a usage database said at one moment. Pure.

A worker describes itself in two lots of numbers, by name: gauges, of the moment, and counters, since the service began.
Names that this version does not know are kept, and those that are missing (an earlier release of the relay has none of
them) are simply not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from relay.report.counters import Numbers, added
from relay.report.tally import Sums

STALE_AFTER = 600
"""Seconds; a worker that lives notes the time every 300, whatever happens."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker as it last described itself; `lives` is what the kernel says of it now.

    Its number, `pid`, is that of its own PID namespace: in two containers over one volume two have the same. With
    `start`, when it began as its kernel counts it, no two that live have.
    """

    pid: int
    start: str
    lives: bool
    connected: int
    waiting: int
    partial_bytes: int
    gauges: Numbers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """All that the small tables say.

    Attributes:
        at: seconds since the epoch.
        refreshed: when a worker last noted the time; None when none ever has.
        began: when the service started, in seconds since the epoch; None when no worker has said so.
        counters: of all workers since then, those that are gone included.
        written: another one once anybody has written to the database.
        origin: which file it is, and what was brought into it from Twisted relays: another one once rows have come that
            no worker has recorded there.
        disk_is_full: nothing more fits on the database's disk.
        unwritten: how many workers more live, which could not write into the database since they began.
        holding: how many workers hold records back that they cannot write into the database; None when nobody can tell.
    """

    at: float
    connected: int
    waiting: int
    partial_bytes: int
    refreshed: int | None
    began: int | None
    since_start: Sums
    all_time: Sums
    workers: tuple[Worker, ...]
    counters: Numbers
    written: object = ()
    origin: object = ()
    disk_is_full: bool = False
    unwritten: int = 0
    holding: int | None = None

    @property
    def names(self) -> list[str]:
        """What to call each of the workers that live: by its number, and its start where two have the same number."""
        numbers = Counter(worker.pid for worker in self.living)
        return [
            str(worker.pid) if numbers[worker.pid] == 1 else f"{worker.pid} (start {worker.start})"
            for worker in self.living
        ]

    @property
    def living(self) -> list[Worker]:
        """The workers that live and have described themselves."""
        return [worker for worker in self.workers if worker.lives]

    @property
    def workers_running(self) -> int:
        """How many workers live, whether they have described themselves or not."""
        return len(self.living) + self.unwritten

    @property
    def bytes(self) -> float:
        """Bytes relayed since the service began; never less than in an earlier reading of the same service.

        Workers count them as they move. But those of an earlier release do not, and one that is killed takes its last
        seconds with it; what is on record counts anyway. Neither of the two ever goes back, so the larger does not.
        """
        return max(self.counters.get("bytes", 0), self.since_start.bytes)

    def ended(self, mood: str) -> float:
        """Connections that have ended in this mood since the service began; what is said of `bytes` holds for these,
        too. When somebody overwrites the database's -wal, rows are lost, and the workers still know of them."""
        return max(self.counters.get(f"mood.{mood}", 0), self.since_start.named()[mood])

    def is_stale(self) -> bool:
        """Whether workers have missed two of their times to write."""
        return self.refreshed is None or self.at - self.refreshed > STALE_AFTER

    @property
    def silent(self) -> int:
        """How many workers live and do not answer the others, as these say; that it may have said so itself before it
        fell silent makes it no more."""
        return int(max((worker.gauges.get("silent_siblings", 0) for worker in self.living), default=0))

    def gauge(self, name: str) -> float | None:
        """A gauge of all living workers together; None when none of them has it."""
        values = [worker.gauges[name] for worker in self.living if name in worker.gauges]
        return sum(values) if values else None


def _added_sums(sums: Iterable[Sums]) -> Sums:
    each = list(sums)
    return Sums(
        connections=sum(one.connections for one in each),
        bytes=sum(one.bytes for one in each),
        happy=sum(one.happy for one in each),
        lonely=sum(one.lonely for one in each),
        errory=sum(one.errory for one in each),
    )


def together(readings: list[Reading]) -> Reading | None:
    """Several machines' relays as one; None when there is none."""
    if len(readings) <= 1:
        return readings[0] if readings else None
    return Reading(
        at=max(reading.at for reading in readings),
        connected=sum(reading.connected for reading in readings),
        waiting=sum(reading.waiting for reading in readings),
        partial_bytes=sum(reading.partial_bytes for reading in readings),
        refreshed=max((reading.refreshed for reading in readings if reading.refreshed is not None), default=None),
        began=min((reading.began for reading in readings if reading.began is not None), default=None),
        since_start=_added_sums(reading.since_start for reading in readings),
        all_time=_added_sums(reading.all_time for reading in readings),
        workers=tuple(worker for reading in readings for worker in reading.workers),
        counters=added({**reading.counters, "bytes": reading.bytes} for reading in readings),
        disk_is_full=any(reading.disk_is_full for reading in readings),
        unwritten=sum(reading.unwritten for reading in readings),
        holding=sum(reading.holding or 0 for reading in readings),
    )

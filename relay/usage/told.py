"""What a worker tells of itself for those who look at the relay live, beside its share of `current`.

Two lots of numbers, by name: gauges, of the moment, and counters, which only grow as long as the worker lives. Each
worker has a row of `worker_status`. When one leaves, or is found to be dead, its counters are added to those of
`service`, in the same transaction that drops its row; so the sum over all rows never goes back until the service starts
anew, whoever comes and goes. Workers of an earlier release know nothing of this: what they leave behind of a row, the
next that does takes care of.

That holds to the last digit, since whoever collects counters takes a sum that is less for one that began anew: all
counters are whole numbers, or multiples of `STEP`, which come to the same in whatever order they are added. Sums of an
earlier release were any fractions: each is rounded up when it is settled, and the sum over all rows when it is read
(`relay.report.counters`), so that what is read does not go back as these become fewer.

Nothing in here is about one client, and sizes are blurred as everywhere. No time of a client's doing is kept.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from relay.process.dataclass import dataclass, field

if TYPE_CHECKING:  # SQLite takes 1.5 MB, and a relay without a database does without it
    import sqlite3

    from relay.usage.rows import Row

SIZES: Final = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 10_000_000_000, 100_000_000_000)
"""Where sizes are divided, in bytes; a value counts for the least bound that it is not above."""

SECONDS: Final = (0.1, 0.3, 1, 3, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)
"""Where times are."""

HISTOGRAMS: Final[Mapping[str, tuple[int, Sequence[float]]]] = {
    "size": (3, SIZES),
    "waiting": (2, SECONDS),
    "total": (1, SECONDS),
}
"""Of what in a row of `usage` there are counts by bucket: its place there, and the bounds."""

STEP: Final = 1 / 1024
"""Sums of times are told in multiples of this, in seconds. A float holds these exactly up to 2^43 seconds, which ten
thousand transfers at a time come to in 27 years."""

_MOST: Final = 1 << 63
"""No worker counts so far."""

_TELL: Final = "REPLACE INTO worker_status (pid, process_start, gauges, counters) VALUES (?, ?, ?, ?)"
_ASK_GAUGES: Final = "SELECT gauges FROM worker_status WHERE pid = ? AND process_start = ?"
_ASK: Final = "SELECT counters FROM worker_status WHERE pid = ? AND process_start = ?"
_DROP: Final = "DELETE FROM worker_status WHERE pid = ? AND process_start = ?"
_ORPHANS: Final = (
    "SELECT pid, process_start FROM worker_status WHERE NOT EXISTS (SELECT 1 FROM worker_share "
    "WHERE worker_share.pid = worker_status.pid AND worker_share.process_start = worker_status.process_start)"
)
_SERVICE: Final = "SELECT began, counters FROM service WHERE id = 1"
_SET_SERVICE: Final = "REPLACE INTO service (id, began, counters) VALUES (1, ?, ?)"


BLUR: Final = "blur_seconds"
"""The gauge that says by how much a worker rounds what it records; 0 when it does not."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker tells of itself."""

    gauges: Mapping[str, float] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)


class Histograms:
    """Counts connections by mood, and transfers by what is in their rows: a microsecond for each."""

    def __init__(self) -> None:
        self._moods = dict.fromkeys(("happy", "lonely", "errory"), 0)
        self._counts = {name: [0] * (len(bounds) + 1) for name, (_, bounds) in HISTOGRAMS.items()}
        self._sums: dict[str, float] = dict.fromkeys(HISTOGRAMS, 0)

    def note(self, rows: Sequence[Row]) -> None:
        """Count rows that are written."""
        for row in rows:
            self._moods[row[4]] += 1
        happy = [row for row in rows if row[4] == "happy"]
        for name, (place, bounds) in HISTOGRAMS.items():
            counts = self._counts[name]
            total: float = 0
            for row in happy:
                value = row[place]
                if value is not None:
                    counts[bisect_left(bounds, value)] += 1
                    total += value  # type: ignore[operator]
            self._sums[name] += total

    def counters(self) -> dict[str, float]:
        """The counts, by name: of each bucket for itself, and the sum of all values, rounded down to a `STEP`."""
        counters: dict[str, float] = {f"mood.{mood}": count for mood, count in self._moods.items()}
        for name, (_, bounds) in HISTOGRAMS.items():
            counters |= {f"{name}.{bound}": n for bound, n in zip((*bounds, "inf"), self._counts[name], strict=True)}
            total = self._sums[name]
            counters[f"{name}.sum"] = total if isinstance(total, int) else math.floor(total / STEP) * STEP
        return counters


def tell(connection: sqlite3.Connection, worker: tuple[int, str], told: Description) -> None:
    """Write the row of a worker, which is known by its process id and its start."""
    connection.execute(_TELL, (*worker, json.dumps(dict(told.gauges)), json.dumps(dict(told.counters))))


def blur_of(connection: sqlite3.Connection, worker: tuple[int, str]) -> int | None:
    """Return by how many seconds a worker rounds what it records, 0 for not at all; None where it does not say, as one
    of an earlier version."""
    row = connection.execute(_ASK_GAUGES, worker).fetchone()
    seconds = None if row is None else _numbers(row[0]).get(BLUR)
    return seconds if isinstance(seconds, int) else None


def settle(connection: sqlite3.Connection, worker: tuple[int, str]) -> None:
    """Drop the row of a worker that is gone, if it has one, and keep what it has counted."""
    row = connection.execute(_ASK, worker).fetchone()
    if row is None:
        return
    connection.execute(_DROP, worker)
    began, counters = connection.execute(_SERVICE).fetchone() or (None, None)
    total = _numbers(counters)
    for name, value in _numbers(row[0]).items():
        total[name] = total.get(name, 0) + value
    connection.execute(_SET_SERVICE, (began, json.dumps(total)))


def settle_orphans(connection: sqlite3.Connection) -> None:
    """Do so for those whose share somebody has dropped who knows nothing of these rows."""
    for pid, start in connection.execute(_ORPHANS).fetchall():
        settle(connection, (pid, start))


def begin_anew(connection: sqlite3.Connection) -> None:
    """The service starts: nothing is counted yet."""
    connection.execute("DELETE FROM worker_status")
    connection.execute(_SET_SERVICE, (int(time.time()), "{}"))


def service_began(connection: sqlite3.Connection) -> int | None:
    """When it did, in seconds since the epoch; None where nobody has said so."""
    began, _ = connection.execute(_SERVICE).fetchone() or (None, None)
    return began if isinstance(began, int) else None


def _numbers(text: object) -> dict[str, float]:
    """What is a number in the JSON of a row, fractions rounded up to a `STEP`; somebody may have written there."""
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    if type(found) is not dict:
        return {}
    return {name: _exact(value) for name, value in found.items() if type(value) in (int, float) and 0 <= value <= _MOST}


def _exact(value: float) -> float:
    return value if isinstance(value, int) else math.ceil(value / STEP) * STEP

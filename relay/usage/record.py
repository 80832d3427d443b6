"""One finished connection, and the blur that hides when it was and how much it moved.

Pure: no clock, no file, no thread. Whatever is written about a client passes through `blur` or `blur_size`.
"""

from __future__ import annotations

from typing import Literal

from relay.process.dataclass import dataclass

Mood = Literal["happy", "lonely", "errory"]

_TEN_KB = 10_000
_ONE_MB = 1_000_000
_HUNDRED_MB = 100_000_000
_ONE_GB = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """One finished connection; a pair is one.

    Attributes:
        started: when the first side connected, in seconds since the epoch.
        total_time: seconds from then to the last close.
        waiting_time: seconds from then until the second side connected; None when no second side came.
        total_bytes: bytes relayed, both directions together.
        mood: how it went, as the design's protocol table says.
    """

    started: float
    total_time: float
    waiting_time: float | None
    total_bytes: int
    mood: Mood


@dataclass(frozen=True, slots=True)
class Current:
    """What one worker holds at the moment: its share of the `current` table.

    Attributes:
        connected: pairs.
        waiting: connections with a good handshake that are not yet paired.
        partal_bytes: bytes relayed so far by pairs that are not yet over.
    """

    connected: int
    waiting: int
    partal_bytes: int


def blur_size(size: int) -> int:
    """Round a number of bytes up: below 1 MB to 10 kB, below 1 GB to 1 MB, from there on to 100 MB. 0 stays 0."""
    step = _TEN_KB if size < _ONE_MB else _ONE_MB if size < _ONE_GB else _HUNDRED_MB
    return -(-size // step) * step


def blur(record: Record, seconds: int | None) -> Record:
    """Return what may be written of a record under `--blur-usage SECONDS`; None leaves it as it is.

    `started` becomes a whole number, a multiple of `seconds`, less than `seconds` before the truth. The two durations
    stay exact: without an exact start they fix no moment of the clock.
    """
    if seconds is None:
        return record
    return Record(
        int(record.started) // seconds * seconds,
        record.total_time,
        record.waiting_time,
        blur_size(record.total_bytes),
        record.mood,
    )

"""Bytes and seconds as people write them. Pure. Sizes are in powers of ten, as everywhere in the relay."""

from __future__ import annotations


def size(count: float) -> str:
    """Return a number of bytes in three digits: 0 B, 10 kB, 1.05 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{three_digits(count)} {unit}"
        count /= 1000
    return f"{three_digits(count)} PB"


def duration(seconds: float) -> str:
    """Return a time of two parts at most: 0.14 ms, 214 ms, 46.8 s, 3m05s, 1h02m, 2d03h."""
    if seconds <= 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{three_digits(seconds * 1000)} ms"
    if seconds < 59.95:
        return f"{three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days}d{hours:02d}h"


def three_digits(value: float) -> str:
    """Return the value with three significant digits where it is below a thousand; whole numbers without a fraction."""
    if value >= 99.95 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"

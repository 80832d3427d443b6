"""Counters and gauges of workers, as `relay.usage.told` has them written: JSON objects, read with care. Pure, but for
`read_counters`."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Final

Numbers = Mapping[str, float]
"""By name."""

MOST: Final = 1 << 63
"""No worker counts so far."""

STEP: Final = 1 / 1024
"""Fractions are multiples of this; `relay.usage.told` says why."""

_NAME: Final = re.compile(r"[A-Za-z0-9_.+-]{1,100}")
_BOUND: Final = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,20})?(?:e[+-]?[0-9]{1,2})?|inf")

TOLD: Final = "SELECT counters FROM worker_status LIMIT 1000"
SERVICE: Final = "SELECT counters FROM service ORDER BY rowid LIMIT 1"


def numbers_of(text: object) -> dict[str, float]:
    """The numbers in a JSON object, by names such as workers give, and nothing else that may be in there."""
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if _NAME.fullmatch(name) and _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST


def added(lots: Iterable[Numbers]) -> dict[str, float]:
    """Numbers of the same names, added up; the sum is the same in whatever order they come, and never less when two of
    them are one: fractions that are no multiples of a `STEP`, as an earlier release has them, are rounded up together.
    """
    by_name: dict[str, list[float]] = {}
    for numbers in lots:
        for name, value in numbers.items():
            by_name.setdefault(name, []).append(value)
    return {name: _sum(values) for name, values in by_name.items()}


def _sum(values: list[float]) -> float:
    if all(isinstance(value, int) for value in values):
        return sum(values)
    return math.ceil(math.fsum(values) / STEP) * STEP


def below(counters: Numbers, prefix: str) -> dict[str, float]:
    """The counters whose names begin with that and a dot, by the rest of the name."""
    begin = f"{prefix}."
    return {name.removeprefix(begin): value for name, value in counters.items() if name.startswith(begin)}


def by_bound(counters: Numbers, prefix: str) -> list[tuple[float, str, float]]:
    """The counters below `prefix` that are buckets: what is in each at the most, its name, how many; in order."""
    named = below(counters, prefix).items()
    return sorted((float(name), name, count) for name, count in named if _BOUND.fullmatch(name))


def read_counters(connection: sqlite3.Connection) -> dict[str, float]:
    """Those of all workers since the service began; none where workers of an earlier release made the database."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    rows = connection.execute(TOLD).fetchall() if "worker_status" in tables else []
    rows += connection.execute(SERVICE).fetchall() if "service" in tables else []
    return added(numbers_of(text) for (text,) in rows)

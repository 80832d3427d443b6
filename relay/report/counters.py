"""Counters and gauges of workers, as `relay.usage.told` has them written: JSON objects, read with care. Pure, but for
`read_counters`."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

Numbers = Mapping[str, float]
"""By name."""

TOLD: Final = "SELECT counters FROM worker_status LIMIT 1000"
SERVICE: Final = "SELECT counters FROM service ORDER BY rowid LIMIT 1"


def numbers_of(text: object) -> dict[str, float]:
    """The numbers in a JSON object, and nothing else that may be in there."""
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def added(lots: Iterable[Numbers]) -> dict[str, float]:
    """Numbers of the same names, added up."""
    total: Counter[str] = Counter()
    for numbers in lots:
        for name, value in numbers.items():
            total[name] += value  # type: ignore[assignment]  # a Counter takes fractions as well
    return dict(total)


def below(counters: Numbers, prefix: str) -> dict[str, float]:
    """The counters whose names begin with that and a dot, by the rest of the name."""
    begin = f"{prefix}."
    return {name.removeprefix(begin): value for name, value in counters.items() if name.startswith(begin)}


def read_counters(connection: sqlite3.Connection) -> dict[str, float]:
    """Those of all workers since the service began; none where workers of an earlier release made the database."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    rows = connection.execute(TOLD).fetchall() if "worker_status" in tables else []
    rows += connection.execute(SERVICE).fetchall() if "service" in tables else []
    return added(numbers_of(text) for (text,) in rows)

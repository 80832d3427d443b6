"""The view for programs: one JSON document; docs/status.md describes it. Pure.

Whole numbers are whole, times are seconds, sizes bytes; what is not known is null.
"""

from __future__ import annotations

import json
from datetime import date
from typing import Any

from relay.status.reading import Reading
from relay.status.view import View


def as_json(view: View) -> str:
    """Return the view as a JSON object, indented; ends with a newline."""
    reading = view.reading
    document = {
        "made": round(view.at),
        "healthy": view.health.is_well,
        "state": view.health.state,
        "complaints": [{"kind": one.kind, "words": one.words} for one in view.health.complaints],
        "databases": [
            {"path": one.path, "readable": one.reading is not None, "trouble": one.trouble or None} for one in view.seen
        ],
        "now": None if reading is None else _now(reading),
        "bytes_per_second": view.rates,
        "since_start": None if reading is None else _since_start(reading),
        "all_time": None if reading is None else reading.all_time.named(),
        "workers": [] if reading is None else _workers(reading),
        "days": None if view.days is None else _days(view),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _now(reading: Reading) -> dict[str, Any]:
    return {
        "connected": reading.connected,
        "waiting": reading.waiting,
        "partial_bytes": reading.partial_bytes,
        "refreshed": reading.refreshed,
        **{name: reading.gauge(name) for name in ("connections", "connections_limit", "handshakes", "held_bytes")},
        "kept_records": reading.gauge("kept_records"),
    }


def _since_start(reading: Reading) -> dict[str, Any]:
    return {"began": reading.began, **reading.since_start.named(), "counters": dict(sorted(reading.counters.items()))}


def _workers(reading: Reading) -> list[dict[str, Any]]:
    return [
        {
            "pid": worker.pid,
            "start": worker.start,
            "connected": worker.connected,
            "waiting": worker.waiting,
            "partial_bytes": worker.partial_bytes,
            **worker.gauges,
        }
        for worker in reading.living
    ]


def _days(view: View) -> list[dict[str, Any]]:
    return [
        {"day": date.fromordinal(day).isoformat(), **sums.named()} for day, sums in sorted((view.days or {}).items())
    ]

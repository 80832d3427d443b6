"""The report for programs: one JSON document, or CSV rows. Pure.

Whole numbers are whole, times are seconds, sizes are bytes, and what is not known is null in JSON and empty in CSV.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from relay.report.periods import label, last_day
from relay.report.summing_up import PeriodReport, Report, Spread, Spreads

CSV_COLUMNS = (
    *("span", "period", "from", "to"),
    *("connected", "waiting", "partial_bytes"),
    *("connections", "happy", "lonely", "errory", "bytes"),
    *("size_median", "size_p95", "waiting_time_median", "waiting_time_p95", "total_time_median", "total_time_p95"),
)


def as_json(report: Report) -> str:
    """Return the report as a JSON object, indented; ends with a newline."""
    now = report.now
    document = {
        "database": ", ".join(report.paths),
        "databases": list(report.paths),
        "made": int(report.made),
        "time_zone": report.zone,
        "now": {
            "connected": now.connected,
            "waiting": now.waiting,
            "partial_bytes": now.partial_bytes,
            "refreshed": now.refreshed,
            "stale": now.is_stale(report.made),
        },
        "since_start": report.since_start.named(),
        "all_time": {**report.all_time.named(), **_spreads(report.spreads)},
        "by": report.span,
        "periods": [_period(period, report) for period in report.periods],
    }
    return json.dumps(document, indent=2) + "\n"  # ASCII, whatever the encoding of standard output


def as_csv(report: Report) -> str:
    """Return a row for now, one since the start, one for all time and one for each period, after one of names."""
    now = report.now
    rows: list[dict[str, Any]] = [
        {"span": "now", "connected": now.connected, "waiting": now.waiting, "partial_bytes": now.partial_bytes},
        {"span": "since_start", **report.since_start.named()},
        {"span": "all_time", **report.all_time.named(), **_flat(_spreads(report.spreads))},
    ]
    rows += [{"span": report.span, **_flat(_period(period, report))} for period in report.periods]
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _period(period: PeriodReport, report: Report) -> dict[str, Any]:
    return {
        "period": label(period.first, report.span),
        "from": date.fromordinal(period.first).isoformat(),
        "to": date.fromordinal(last_day(period.first, report.span)).isoformat(),
        **period.sums.named(),
        **_spreads(period.spreads),
    }


def _spreads(spreads: Spreads) -> dict[str, dict[str, float] | None]:
    return {
        "size": _spread(spreads.size),
        "waiting_time": _spread(spreads.waiting_time),
        "total_time": _spread(spreads.total_time),
    }


def _spread(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else {"median": spread.median, "p95": spread.p95}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping with {"size": {"median": 1}} as {"size_median": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{name}_{inner}": number for inner, number in value.items()})
        elif value is not None:
            flat[name] = value
    return flat

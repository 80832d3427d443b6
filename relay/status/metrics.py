"""The view for Prometheus, in its text format.

Counters are those that the workers and the database keep, since the service began; nothing is counted here, so that
this program may start anew without any of them going back. Each has the label `database`, with several of which one
cannot be read its numbers are missing and the others' are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from relay.report.counters import Numbers, below, by_bound
from relay.status.health import Kind
from relay.status.reading import Reading
from relay.status.view import View

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MOODS = ("happy", "lonely", "errory")

HISTOGRAMS = (
    ("size", "transfer_size_bytes", "Sizes of transfers, both directions together, as recorded."),
    ("waiting", "transfer_waiting_seconds", "How long the first side of a transfer waited for the second."),
    ("total", "transfer_duration_seconds", "How long transfers took, from the first connection to the last close."),
)
"""What the counters' names begin with, and what each is called here."""

PATHS = (
    ("path_rtt", "path_round_trip_seconds", "Round trips of both sides of large transfers."),
    ("path_resent", "path_resent_ratio", "Part of what went to the receivers of large transfers that was sent again."),
    ("path_rate", "path_rate_bytes_per_second", "How fast large transfers were."),
)
"""The same, of --measure-paths; of these no sum is known."""

LABELLED = (
    ("path_limit", "path_limited", "by", "Large transfers by what limited them: sender, receiver, path, or relay."),
    ("refused", "refusals", "kind", "Connections that were turned away without a partner."),
    ("bound", "bounds_met", "bound", "How often a bound of the operator's was met."),
)

WORKER_GAUGES = (
    ("connections", "worker_connections", "Connections that the worker has open."),
    ("connections_limit", "worker_connections_limit", "Connections that the worker may have, --max-connections."),
    ("load", "worker_load_ratio", "Part of a processor that the worker's event loop wanted lately."),
    ("handshakes", "worker_handshakes", "Clients that have not said yet what they want."),
    ("held_bytes", "worker_held_bytes", "Bytes that wait in the relay for a receiver that does not take them."),
    ("kept_records", "worker_kept_records", "Records that could not be written as JSON lines yet."),
    ("silent_siblings", "worker_silent_siblings", "Other workers that live and do not answer this one."),
)


class _Collector:
    """One view, as prometheus_client asks for it."""

    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """Return all families."""
        yield from _of_all(self._view)
        readings = [(one.path, one.reading) for one in self._view.seen if one.reading is not None]
        yield from _gauges(readings)
        yield from _worker_gauges(readings)
        yield from _counters(readings)
        yield from _histograms(readings)


def exposition(view: View) -> bytes:
    """Return what Prometheus is to read."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(view))
    return generate_latest(registry)


_Readings = list[tuple[str, Reading]]


def _name(name: str) -> str:
    return f"relay_gevent_{name}"


def _of_all(view: View) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        _name("healthy"), "1 if /healthz has nothing to complain of, else 0.", value=float(view.health.is_well)
    )
    complaints = GaugeMetricFamily(_name("complaint"), "1 for each kind of complaint that there is.", labels=["kind"])
    for kind in get_args(Kind):
        complaints.add_metric([kind], float(any(one.kind == kind for one in view.health.complaints)))
    yield complaints
    readable = GaugeMetricFamily(_name("database_readable"), "1 if the database could be read.", labels=["database"])
    for one in view.seen:
        readable.add_metric([one.path], float(one.reading is not None))
    yield readable


def _gauges(readings: _Readings) -> Iterator[Metric]:
    gauges: tuple[tuple[str, str, Callable[[Reading], float | None]], ...] = (
        ("workers", "Workers that live.", lambda reading: reading.workers_running),
        ("pairs", "Transfers at the moment.", lambda reading: reading.connected),
        ("waiting_clients", "Clients that wait for a partner.", lambda reading: reading.waiting),
        ("partial_bytes", "Bytes relayed so far by transfers not yet over.", lambda reading: reading.partial_bytes),
        ("start_time_seconds", "When the service started, since the epoch.", lambda reading: reading.began),
        ("refreshed_time_seconds", "When a worker last noted the time.", lambda reading: reading.refreshed),
    )
    for name, says, value in gauges:
        family = GaugeMetricFamily(_name(name), says, labels=["database"])
        for path, reading in readings:
            number = value(reading)
            if number is not None:
                family.add_metric([path], float(number))
        yield family


def _worker_gauges(readings: _Readings) -> Iterator[Metric]:
    for key, name, says in WORKER_GAUGES:
        family = GaugeMetricFamily(_name(name), says, labels=["database", "pid", "start"])
        for path, reading in readings:
            for worker in reading.living:
                if key in worker.gauges:
                    family.add_metric([path, str(worker.pid), worker.start], worker.gauges[key])
        yield family


def _counters(readings: _Readings) -> Iterator[Metric]:
    moved = CounterMetricFamily(_name("relayed_bytes"), "Bytes relayed, both directions.", labels=["database"])
    ended = CounterMetricFamily(_name("connections"), "Connections that ended.", labels=["database", "mood"])
    for path, reading in readings:
        moved.add_metric([path], reading.bytes)
        for mood in MOODS:
            ended.add_metric([path, mood], reading.ended(mood))
    yield moved
    yield ended
    for prefix, name, label, says in LABELLED:
        family = CounterMetricFamily(_name(name), says, labels=["database", label])
        for path, reading in readings:
            for kind, count in sorted(below(reading.counters, prefix).items()):
                family.add_metric([path, kind], count)
        yield family


def _histograms(readings: _Readings) -> Iterator[Metric]:
    for prefix, name, says in (*HISTOGRAMS, *PATHS):
        family = HistogramMetricFamily(_name(name), says, labels=["database"])
        for path, reading in readings:
            buckets = _cumulative(reading.counters, prefix)
            if buckets:
                family.add_metric([path], buckets, reading.counters.get(f"{prefix}.sum"))
        yield family


def _cumulative(counters: Numbers, prefix: str) -> list[tuple[str, float]]:
    """The buckets of a histogram as Prometheus has them, each with all that is smaller."""
    buckets = []
    so_far = 0.0
    for _, name, count in by_bound(counters, prefix):
        so_far += count
        buckets.append(("+Inf" if name == "inf" else name, so_far))
    return buckets

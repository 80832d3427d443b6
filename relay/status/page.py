"""The view for a person: one HTML page, whole as it is, which a script replaces by a newer one. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from html import escape

from relay.report.counters import below
from relay.report.paths import Bucket, paths_of
from relay.report.tally import Sums
from relay.report.units import duration, size
from relay.status import plots
from relay.status.dress import SCRIPT, STYLE
from relay.status.observer import Seen
from relay.status.rates import Point
from relay.status.reading import Reading, Worker
from relay.status.view import PLOTS, View

MOODS = (
    ("happy", "both sides came, and were connected"),
    ("lonely", "the partner never came, or it was a spare connection"),
    ("errory", "no good handshake, or something said too early"),
)
DAYS = 14

AGO = {"10 minutes": "10 minutes ago", "hour": "an hour ago", "day": "a day ago"}
"""Where each of `PLOTS` begins."""

UNKNOWN = "–"


def as_html(view: View) -> str:
    """Return the page."""
    main = "".join([_head(view), *_sections(view)])
    title = "relay: well" if view.health.is_well else "relay: look after it"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="{_icon(view)}">\n'
        '<noscript><meta http-equiv="refresh" content="10"></noscript>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        '<p id="silent" role="alert" hidden></p>\n'
        f"<main>\n{main}</main>\n"
        '<footer><p>For programs: <a href="metrics">metrics</a>, <a href="status.json">status.json</a>, '
        '<a href="healthz">healthz</a>. Nothing here is about any client.</p></footer>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _icon(view: View) -> str:
    colour = "%231a7f4b" if view.health.is_well else "%23c0322b"
    return (
        "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
        f"%3Ccircle cx='8' cy='8' r='7' fill='{colour}'/%3E%3C/svg%3E"
    )


def _head(view: View) -> str:
    bad = "" if view.health.is_well else " bad"
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(view.at))
    return (
        f'<h1>Transit relay, {made}</h1>\n<p class="state{bad}" role="status">{escape(view.health.state)}</p>\n'
        + _tiles(view)
    )


def _sections(view: View) -> Iterable[str]:
    reading = view.reading
    yield _how_fast(view)
    if reading is not None:
        yield f'<div class="two">{_how_many(view)}{_moods(reading)}</div>\n'
        yield f'<div class="two">{_bounds(reading)}{_refusals(reading)}</div>\n'
        yield _workers(reading)
        yield _paths(reading)
    yield _by_day(view)
    if len(view.seen) > 1:
        yield _databases(view)


# The pieces


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>\n"


def _tiles(view: View) -> str:
    reading = view.reading
    if reading is None:
        return ""
    began = "" if reading.began is None else f"up for {duration(max(0.0, view.at - reading.began))}"
    open_now, limit = reading.gauge("connections"), reading.gauge("connections_limit")
    places = "" if open_now is None or not limit else f"{open_now:.0f} of {limit:.0f} connections"
    held = reading.gauge("held_bytes")
    waits = "" if not held else f"{size(held)} wait in the relay"
    tiles = (
        ("transfers now", str(reading.connected), f"{size(reading.partial_bytes)} so far"),
        ("clients waiting", str(reading.waiting), places),
        ("at the moment", _rate(view.rates["10 s"]), waits or "over the last 10 seconds"),
        ("since the start", size(reading.bytes), began),
    )
    return (
        '<dl class="tiles">'
        + "".join(
            f'<div class="tile"><dt>{name}</dt><dd>{value}<small>{small}</small></dd></div>'
            for name, value, small in tiles
        )
        + "</dl>\n"
    )


def _rate(rate: float | None) -> str:
    return UNKNOWN if rate is None else f"{size(rate)}/s"


def _how_fast(view: View) -> str:
    rates = "".join(f"<div><dt>last {name}</dt><dd>{_rate(rate)}</dd></div>" for name, rate in view.rates.items())
    figures = "".join(_rate_plot(title, view.plots[title]) for title, _, _ in PLOTS if title in view.plots)
    return _section("How fast", f'<dl class="rates">{rates}</dl>', f'<div class="three">{figures}</div>')


def _rate_plot(title: str, points: list[Point]) -> str:
    top = plots.top_of(points, lambda point: point.rate)
    known = any(point.rate is not None for point in points)
    return _figure(
        f"last {title}", f"up to {size(top)}/s" if known else "not seen yet", title,
        plots.area(points, top, f"bytes a second in the last {title}", rate=lambda point: point.rate),
    )  # fmt: skip


def _figure(title: str, scale: str, span: str, drawing: str) -> str:
    return (
        f"<figure><figcaption>{title}<span>{scale}</span></figcaption>{drawing}"
        f'<div class="axis"><span>{AGO[span]}</span><span>now</span></div></figure>'
    )


def _how_many(view: View) -> str:
    title = PLOTS[1][0]
    points = view.plots.get(title, [])
    top = plots.top_of(points, lambda point: point.pairs, lambda point: point.waiting)
    known = any(point.pairs is not None for point in points)
    drawing = plots.area(
        points,
        top,
        f"transfers and waiting clients in the last {title}",
        waiting=lambda point: point.waiting,
        pairs=lambda point: point.pairs,
    )
    keys = '<p><span class="key pairs">transfers</span> &nbsp; <span class="key waiting">clients waiting</span></p>'
    return _section(
        "Transfers and who waits",
        keys,
        _figure(f"last {title}", f"up to {top:g}" if known else "not seen yet", title, drawing),
    )


def _moods(reading: Reading) -> str:
    since, ever = reading.since_start, reading.all_time
    rows = "".join(
        f'<tr><th class="words"><span class="key {mood}">{mood}</span>: {says}</th>'
        f"<td>{getattr(since, mood)}</td><td>{getattr(ever, mood)}</td></tr>"
        for mood, says in MOODS
    )
    parts = [(mood, float(getattr(since, mood))) for mood, _ in MOODS]
    return _section(
        "How connections ended",
        plots.bar(parts, sum(value for _, value in parts), "parts of the moods since the start"),
        '<table><thead><tr><th class="words">a transfer counts once</th><th>since start</th><th>all time</th></tr>'
        f"</thead><tbody>{rows}</tbody></table>",
    )


def _bounds(reading: Reading) -> str:
    return _section("Bounds met", _counted(reading, "bound", "no bound was met since the start"))


def _refusals(reading: Reading) -> str:
    return _section("Turned away", _counted(reading, "refused", "nobody was turned away since the start"))


def _counted(reading: Reading, prefix: str, nothing: str) -> str:
    counted = below(reading.counters, prefix)
    if not counted:
        return '<p class="faint">The workers have not said; those of an earlier release do not.</p>'
    rows = "".join(
        f'<tr><th class="words">{escape(name.replace("_", " "))}</th><td>{count:.0f}</td></tr>'
        for name, count in sorted(counted.items(), key=lambda item: -item[1])
        if count
    )
    return f"<table><tbody>{rows}</tbody></table>" if rows else f'<p class="faint">{nothing.capitalize()}.</p>'


def _workers(reading: Reading) -> str:
    if not reading.living:
        says = "Those that live could not write since they began" if reading.unwritten else "None lives"
        return _section("Workers", f'<p class="faint">{says}.</p>')
    rows = "".join(_worker(name, worker) for name, worker in zip(reading.names, reading.living, strict=True))
    return _section(
        "Workers",
        '<div class="wide"><table><thead><tr><th>process</th><th>load</th><th>transfers</th><th>waiting</th>'
        "<th>shaking hands</th><th>connections</th><th>bytes held</th><th>records kept</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>",
    )


def _worker(name: str, worker: Worker) -> str:
    gauges = worker.gauges
    load = f"{gauges['load']:.0%}" if "load" in gauges else UNKNOWN
    connections = UNKNOWN
    if "connections" in gauges:
        connections = f"{gauges['connections']:.0f} of {gauges.get('connections_limit', 0):.0f}"
    held = size(gauges["held_bytes"]) if "held_bytes" in gauges else UNKNOWN
    cells = (load, worker.connected, worker.waiting, _whole(gauges, "handshakes"), connections, held,
             _whole(gauges, "kept_records"))  # fmt: skip
    return f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _whole(gauges: Mapping[str, float], name: str) -> str:
    return f"{gauges[name]:.0f}" if name in gauges else UNKNOWN


def _paths(reading: Reading) -> str:
    paths = paths_of(reading.counters)
    if paths is None:
        return ""
    if not paths.transfers:
        return _section("Paths", f"<p>{escape(paths.advice)}</p>")
    limits = tuple(Bucket(name, count) for name, count in paths.limits.items())
    tables = "".join(
        _bucket_table(title, buckets)
        for title, buckets in (
            ("limited by", limits),
            ("round trip up to", paths.rtt),
            ("sent again up to", paths.resent),
            ("rate up to", paths.rate),
        )
    )
    return _section("Paths", f"<p>{escape(paths.advice)}</p>", f'<div class="four">{tables}</div>')


def _bucket_table(title: str, buckets: Sequence[Bucket]) -> str:
    most = max((bucket.count for bucket in buckets), default=0.0)
    rows = "".join(
        f"<tr><th>{escape(bucket.bound)}</th><td>{bucket.count:.0f}</td>"
        f'<td class="graph">{plots.bar([("part", bucket.count)], most, "")}</td></tr>'
        for bucket in buckets
    )
    return f'<table><thead><tr><th colspan="3">{escape(title)}</th></tr></thead><tbody>{rows}</tbody></table>'


def _by_day(view: View) -> str:
    if view.days is None:
        return _section("By day", '<p class="faint">The days are being counted.</p>') if view.reading else ""
    shown = [(day, view.days.get(day)) for day in range(view.today, view.today - DAYS, -1)]
    most = max((sums.bytes for _, sums in shown if sums is not None), default=0)
    rows = "".join(_day(date.fromordinal(day), sums, most) for day, sums in shown)
    return _section(
        "By day",
        '<div class="wide"><table><thead><tr><th>day (UTC)</th><th>transfers</th><th>lonely</th><th>errory</th>'
        f'<th>relayed</th><th class="words"></th></tr></thead><tbody>{rows}</tbody></table></div>',
    )


def _day(day: date, sums: Sums | None, most: int) -> str:
    if sums is None:
        sums = Sums(0, 0, 0, 0, 0)
    drawing = plots.bar([("part", float(sums.bytes))], float(most), f"{size(sums.bytes)} relayed")
    return (
        f"<tr><th>{day.strftime('%a')} {day.isoformat()}</th><td>{sums.happy}</td><td>{sums.lonely}</td>"
        f'<td>{sums.errory}</td><td>{size(sums.bytes)}</td><td class="graph">{drawing}</td></tr>'
    )


def _databases(view: View) -> str:
    rows = "".join(
        f'<tr><th class="words">{escape(one.path)}</th><td class="words">{escape(_says(one))}</td></tr>'
        for one in view.seen
    )
    return _section("Databases", f"<table><tbody>{rows}</tbody></table>")


def _says(seen: Seen) -> str:
    return seen.trouble if seen.reading is None else f"{seen.reading.workers_running} workers live"

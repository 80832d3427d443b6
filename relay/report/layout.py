"""The table that people read, with bars where a terminal has room for them. Pure: from a `Report` to text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relay.report.periods import label
from relay.report.summing_up import PeriodReport, Report, Spread, Spreads, Sums
from relay.report.units import duration, size

NARROWEST_BAR = 10  # columns; with less room there are no bars
WIDEST_BAR = 50
GAP = "  "

BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Screen:
    """What the table may use.

    Attributes:
        width: in columns; None for as wide as it comes, and no bars: a file or a pipe.
        colours: escape sequences for colours.
        blocks: signs beyond ASCII.
    """

    width: int | None = None
    colours: bool = False
    blocks: bool = False


@dataclass(frozen=True, slots=True)
class _Mood:
    name: str
    colour: str
    block: str
    ascii: str


MOODS = (
    _Mood("happy", "\x1b[32m", "█", "#"),
    _Mood("lonely", "\x1b[33m", "▒", "="),
    _Mood("errory", "\x1b[31m", "░", "-"),
)

Row = Sequence[str]


def table(report: Report, screen: Screen) -> str:
    """Return the whole report; ends with a newline."""
    blocks = [
        [_painted(f"relay-gevent usage, {', '.join(report.paths)}", BOLD, screen)],
        [_now(report)],
        _sums(report),
        _transfers(report),
        *_periods(report, screen),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks) + "\n"


def _now(report: Report) -> str:
    now = report.now
    pairs = f"{now.connected:,} {'pair' if now.connected == 1 else 'pairs'}"
    told = f"now: {pairs} connected, {now.waiting:,} waiting, {size(now.partial_bytes)} under way"
    if now.refreshed is None:
        return f"{told} (never refreshed: has a relay used this database yet?)"
    age = duration(abs(report.made - now.refreshed))
    if now.is_stale(report.made):
        if now.refreshed > report.made:
            return f"{told} (but refreshed {age} from now, by a clock that was wrong: is the relay running?)"
        return f"{told} (but not refreshed for {age}: is the relay running?)"
    return f"{told} (refreshed {duration(report.made - now.refreshed)} ago)"


def _sums(report: Report) -> list[str]:
    head = ["", *SUM_HEADS]
    return _aligned([head, ["since the start", *_cells(report.since_start)], ["all time", *_cells(report.all_time)]])


SUM_HEADS = ("connections", *(mood.name for mood in MOODS), "bytes")


def _cells(sums: Sums) -> list[str]:
    counts = (sums.connections, sums.happy, sums.lonely, sums.errory)
    return [*(f"{count:,}" for count in counts), size(sums.bytes)]


def _transfers(report: Report) -> list[str]:
    spreads = report.spreads
    rows = [
        ["size", *_spread(spreads.size, size)],
        ["waiting time", *_spread(spreads.waiting_time, duration)],
        ["total time", *_spread(spreads.total_time, duration)],
    ]
    return _aligned([["transfers (happy)", "50 %", "95 %"], *rows])


def _spread(spread: Spread | None, unit: Callable[[float], str]) -> list[str]:
    return ["-", "-"] if spread is None else [unit(spread.median), unit(spread.p95)]


SPREAD_HEADS = ("size 50 %", "95 %", "waiting 50 %", "95 %", "total 50 %", "95 %")


def _spread_cells(spreads: Spreads) -> list[str]:
    return [
        *_spread(spreads.size, size),
        *_spread(spreads.waiting_time, duration),
        *_spread(spreads.total_time, duration),
    ]


def _periods(report: Report, screen: Screen) -> list[list[str]]:
    """Return one block, or two where the screen is too narrow to have counts and spreads side by side."""
    heading = f"by {report.span}, {report.zone}"
    if not report.periods:
        return [[f"{heading}: nothing yet"]]
    labels = [heading, *(label(period.first, report.span) for period in report.periods)]
    counts = [SUM_HEADS, *(_cells(period.sums) for period in report.periods)]
    spreads = [SPREAD_HEADS, *(_spread_cells(period.spreads) for period in report.periods)]
    wide = _aligned([[name, *left, *right] for name, left, right in zip(labels, counts, spreads, strict=True)])
    if screen.width is None or len(wide[0]) + len(GAP) + NARROWEST_BAR <= screen.width:
        return [_with_bars(wide, report.periods, screen)]
    left = _aligned([[name, *cells] for name, cells in zip(labels, counts, strict=True)])
    right = _aligned([[name, *cells] for name, cells in zip(labels, spreads, strict=True)])
    return [_with_bars(left, report.periods, screen), right]


def _with_bars(lines: list[str], periods: Sequence[PeriodReport], screen: Screen) -> list[str]:
    if screen.width is None:
        return lines
    room = min(screen.width - len(lines[0]) - len(GAP), WIDEST_BAR)
    if room < NARROWEST_BAR:
        return lines
    most = max(period.sums.connections for period in periods)
    bars = [bar(period.sums, most, room, screen) for period in periods]
    legend = "  ".join(f"{_painted(_sign(mood, screen), mood.colour, screen)} {mood.name}" for mood in MOODS)
    return [*((line + GAP + right).rstrip() for line, right in zip(lines, ["", *bars], strict=True)), legend]


def bar(sums: Sums, most: int, width: int, screen: Screen) -> str:
    """Return the bar of a period: as long as its connections, of `most` that fill the width, parted by mood."""
    if sums.connections == 0:
        return ""
    length = max(1, round(width * sums.connections / most))
    known = max(1, sums.happy + sums.lonely + sums.errory)
    parts, drawn, so_far = [], 0, 0
    for mood, connections in zip(MOODS, (sums.happy, sums.lonely, sums.errory), strict=True):
        so_far += connections
        until = round(length * so_far / known)
        parts.append(_painted(_sign(mood, screen) * (until - drawn), mood.colour, screen))
        drawn = until
    return "".join(parts)


def _sign(mood: _Mood, screen: Screen) -> str:
    return mood.block if screen.blocks else mood.ascii


def _painted(text: str, colour: str, screen: Screen) -> str:
    return f"{colour}{text}{PLAIN}" if screen.colours and text else text


def _aligned(rows: Sequence[Row]) -> list[str]:
    """Return the rows as lines of one length: the first cell to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        GAP.join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]

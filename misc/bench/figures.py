"""What was measured, what it is compared with, and whether the goal holds. Pure: no processes, no files.

A *figure* is one number (CPU seconds per GiB with one pair) that several *peers* are measured for, once a round. Peers
are compared within a round, so that a machine that gets slower meanwhile changes both sides of a ratio; the median of
these ratios is what a goal is about.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Sense = Literal["at most", "at least"]

# A figure that could not be measured in a round is None there; the other rounds still count.
Series = list[float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """A promise about one peer's figure.

    `against` names the peer, and `against_figure` the figure (the same, when it is None), that it is divided by. With
    neither, `limit` is in the unit of the figure itself.
    """

    sense: Sense
    limit: float
    against: str | None = None
    against_figure: str | None = None

    @property
    def is_ratio(self) -> bool:
        return self.against is not None or self.against_figure is not None


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, as a row of the issue names it. `of` is the peer that the goals are about."""

    name: str
    title: str
    unit: str
    digits: int
    goals: tuple[Goal, ...] = ()
    of: str = "relay"

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(slots=True)
class Samples:
    """Every number of a run, by figure and peer, in the order of the rounds."""

    series: dict[str, dict[str, Series]] = field(default_factory=dict)

    def add(self, figure: str, peer: str, value: float | None) -> None:
        self.series.setdefault(figure, {}).setdefault(peer, []).append(value)

    def of(self, figure: str, peer: str) -> Series:
        return self.series.get(figure, {}).get(peer, [])

    def peers(self, figure: str) -> list[str]:
        return list(self.series.get(figure, {}))


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some numbers, the smallest and the largest, and how many there were."""

    median: float
    least: float
    most: float
    count: int


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """None when nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.median(known), min(known), max(known), len(known))


def ratios(above: Series, below: Series) -> list[float]:
    """The quotient of each round in which both were measured."""
    return [a / b for a, b in zip(above, below, strict=False) if a is not None and b]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal, the number it is held against (None: not measured), and what that says."""

    goal: Goal
    reached: Spread | None

    @property
    def holds(self) -> bool | None:
        if self.reached is None:
            return None
        if self.goal.sense == "at most":
            return self.reached.median <= self.goal.limit
        return self.reached.median >= self.goal.limit


def judge(figure: Figure, goal: Goal, samples: Samples) -> Verdict:
    own = samples.of(figure.name, figure.of)
    if not goal.is_ratio:
        return Verdict(goal, spread_of(own))
    other = samples.of(goal.against_figure or figure.name, goal.against or figure.of)
    return Verdict(goal, spread_of(ratios(own, other)))


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: a figure of one peer, or a comparison with another figure."""

    figure: str
    peer: str
    median: str
    spread: str
    ratio: str
    ratio_spread: str
    goal: str
    holds: str

    HEAD = ("figure", "peer", "median", "spread", "relay/peer", "spread", "goal", "holds")

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.figure, self.peer, self.median, self.spread, self.ratio, self.ratio_spread, self.goal, self.holds)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _between(spread: Spread | None, digits: int) -> str:
    return "" if spread is None else f"{spread.least:.{digits}f}–{spread.most:.{digits}f}"


def _said(goal: Goal, unit: str) -> str:
    sign = "≤" if goal.sense == "at most" else "≥"
    return f"{sign} {goal.limit:g}" + ("" if goal.is_ratio or not unit else f" {unit}")


def _word(verdicts: Sequence[Verdict]) -> str:
    held = [verdict.holds for verdict in verdicts]
    if not held:
        return ""
    if None in held:
        return "not measured"
    return "yes" if all(held) else "NO"


def _peer_line(figure: Figure, peer: str, samples: Samples) -> Line:
    values = samples.of(figure.name, peer)
    spread = spread_of(values)
    own = peer == figure.of
    goals = [
        goal
        for goal in figure.goals
        if goal.against_figure is None and (goal.against == peer or (own and not goal.is_ratio))
    ]
    quotient = None if own else spread_of(ratios(samples.of(figure.name, figure.of), values))
    missing = sum(value is None for value in values)
    return Line(
        figure="",
        peer=peer,
        median="failed" if spread is None else _number(spread.median, figure.digits),
        spread=_between(spread, figure.digits) + (f", {missing} failed" if missing and spread else ""),
        ratio="" if quotient is None else f"{quotient.median:.2f}",
        ratio_spread=_between(quotient, 2),
        goal=", ".join(_said(goal, figure.unit) for goal in goals),
        holds=_word([judge(figure, goal, samples) for goal in goals]),
    )


def _growth_line(figure: Figure, goal: Goal, samples: Samples, titles: dict[str, str]) -> Line:
    verdict = judge(figure, goal, samples)
    other = goal.against_figure or figure.name
    return Line(
        figure="",
        peer=f"{figure.of}, against “{titles.get(other, other)}”",
        median="",
        spread="",
        ratio="" if verdict.reached is None else f"{verdict.reached.median:.2f}",
        ratio_spread=_between(verdict.reached, 2),
        goal=_said(goal, figure.unit),
        holds=_word([verdict]),
    )


def lines_of(figures: Sequence[Figure], samples: Samples) -> list[Line]:
    """The table of some figures: one line for each peer, and one for each goal against another figure."""
    titles = {figure.name: figure.title for figure in figures}
    lines: list[Line] = []
    for figure in figures:
        block = [_peer_line(figure, peer, samples) for peer in samples.peers(figure.name)]
        block += [
            _growth_line(figure, goal, samples, titles)
            for goal in figure.goals
            if goal.against_figure and samples.of(goal.against_figure, goal.against or figure.of)
        ]
        if block and samples.of(figure.name, figure.of) == []:
            block = [line for line in block if line.median]
        for number, line in enumerate(block):
            lines.append(Line(figure.heading if number == 0 else "", *line.cells[1:]))
    return lines


def as_text(lines: Sequence[Line]) -> str:
    """A table for a terminal."""
    rows = [Line.HEAD, *(line.cells for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(Line.HEAD))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def as_markdown(lines: Sequence[Line]) -> str:
    """The same table for a page."""
    rows = [Line.HEAD, tuple("---" for _ in Line.HEAD), *(line.cells for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def verdicts_of(figures: Sequence[Figure], samples: Samples) -> list[tuple[Figure, Verdict]]:
    """Every goal whose figure was measured at all."""
    return [
        (figure, judge(figure, goal, samples))
        for figure in figures
        if samples.of(figure.name, figure.of)
        for goal in figure.goals
    ]

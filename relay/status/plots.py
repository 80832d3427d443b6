"""Plots as inline SVG: shapes only, which stretch to any width; what is written beside them is the page's. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from relay.status.rates import Point

WIDTH, HEIGHT = 600, 100
"""Of the drawing, in its own units."""

Value = Callable[[Point], "float | None"]


def nice_top(value: float) -> float:
    """The least of 1, 2 or 5 times a power of ten that is not below the value; 1 for nothing."""
    if value <= 0:
        return 1.0
    power = 1.0
    while power < value:
        power *= 10
    while power / 10 >= value:
        power /= 10
    return next(top for top in (power / 5, power / 2, power) if top >= value)


def top_of(points: Sequence[Point], *values: Value) -> float:
    """Where the scale of a plot of these ends."""
    known = [number for value in values for point in points if (number := value(point)) is not None]
    return nice_top(max(known, default=0.0))


def area(points: Sequence[Point], top: float, label: str, **series: Value) -> str:
    """A plot with an area for each series, named by its CSS class; nothing is drawn where nothing is known."""
    shapes = "".join(
        f'<path class="{name}" d="{_outline(points, top, value)}"/>'
        f'<path class="{name} edge" d="{_edge(points, top, value)}"/>'
        for name, value in series.items()
    )
    lines = "".join(f'<path class="grid" d="M0 {y}H{WIDTH}"/>' for y in (0.5, HEIGHT / 2, HEIGHT - 0.5))
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{lines}{shapes}</svg>'
    )


def bar(parts: Sequence[tuple[str, float]], whole: float, label: str) -> str:
    """A bar of parts side by side, each named by its CSS class; as long as their part of `whole`."""
    x = 0.0
    shapes = []
    for name, value in parts:
        width = value / whole * WIDTH if whole > 0 else 0.0
        if width > 0:
            shapes.append(f'<rect class="{name}" x="{x:.1f}" width="{max(width, 1.0):.1f}" height="10"/>')
        x += width
    return (
        f'<svg class="bar" viewBox="0 0 {WIDTH} 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(shapes)}</svg>'
    )


def _runs(points: Sequence[Point], top: float, value: Value) -> list[list[tuple[float, float, float]]]:
    """Stretches in which the value is known, each as (left, right, height) of its steps."""
    step = WIDTH / max(len(points), 1)
    runs: list[list[tuple[float, float, float]]] = [[]]
    for number, point in enumerate(points):
        known = value(point)
        if known is None:
            runs.append([])
        else:
            runs[-1].append((number * step, (number + 1) * step, HEIGHT - known / top * (HEIGHT - 1)))
    return [run for run in runs if run]


def _outline(points: Sequence[Point], top: float, value: Value) -> str:
    return "".join(
        f"M{run[0][0]:.1f} {HEIGHT}" + "".join(f"V{y:.1f}H{right:.1f}" for _, right, y in run) + f"V{HEIGHT}Z"
        for run in _runs(points, top, value)
    )


def _edge(points: Sequence[Point], top: float, value: Value) -> str:
    return "".join(
        f"M{run[0][0]:.1f} {run[0][2]:.1f}" + "".join(f"V{y:.1f}H{right:.1f}" for _, right, y in run)
        for run in _runs(points, top, value)
    )

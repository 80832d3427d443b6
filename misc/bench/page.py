"""What a run leaves behind: its samples, its plots, and the tables of docs/performance.md."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from figures import Figure, Samples, Series, Spread, as_markdown, lines_of, spread_of, verdicts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# A page holds `<!-- run: NAME -->` … `<!-- end -->`; what is between is written anew. NAME is `machine`, `goals`, or
# names of figures, or their beginnings followed by *, separated by blanks.
MARKED = re.compile(r"(<!-- run: (?P<names>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Run:
    """All samples, and the machine in a few lines."""

    samples: Samples
    machine: list[str]


def write_run(run: Run, path: Path) -> None:
    path.write_text(json.dumps({"machine": run.machine, "series": run.samples.series}, indent=1) + "\n")


def read_run(path: Path) -> Run:
    told = json.loads(path.read_text())
    return Run(Samples(told["series"]), told["machine"])


def _chosen(names: str, figures: Sequence[Figure]) -> list[Figure]:
    def matches(figure: Figure) -> bool:
        return any(
            figure.name == name or (name.endswith("*") and figure.name.startswith(name[:-1])) for name in names.split()
        )

    return [figure for figure in figures if matches(figure)]


def _goals_said(run: Run, figures: Sequence[Figure]) -> str:
    verdicts = verdicts_of(figures, run.samples)
    held = sum(verdict.holds is True for _, verdict in verdicts)
    return f"{held} of {len(verdicts)} goals hold."


def write_page(run: Run, figures: Sequence[Figure], path: Path) -> None:
    """Fills the page's marked places with this run's tables. What stands around them stays."""

    def fill(marked: re.Match[str]) -> str:
        names = marked["names"].strip()
        if names == "machine":
            content = "\n".join(f"- {line}" for line in run.machine)
        elif names == "goals":
            content = _goals_said(run, figures)
        else:
            content = as_markdown(lines_of(_chosen(names, figures), run.samples))
        return f"{marked[1]}{content}\n{marked[3]}"

    path.write_text(MARKED.sub(fill, path.read_text()))


# ---- plots ----

# Each peer keeps its colour and mark in all plots.
LOOKS = {
    "relay": ("#d62728", "o"),
    "before": ("#ff9896", "o"),
    "Twisted": ("#1f77b4", "s"),
    "HAProxy": ("#2ca02c", "^"),
    "C loop": ("#7f7f7f", "v"),
    "direct": ("#bcbd22", "x"),
}


def _points(samples: Samples, prefix: str, peer: str, counts: Sequence[int]) -> list[tuple[int, Spread]]:
    points = []
    for count in counts:
        series: Series = samples.of(f"{prefix}{count}", peer)
        spread = spread_of(series)
        if spread is not None:
            points.append((count, spread))
    return points


def _draw_lines(axes: Axes, samples: Samples, prefix: str, counts: Sequence[int], linestyle: str = "-") -> None:
    """A line for each peer, with bars from the smallest to the largest of the rounds."""
    for peer, (colour, mark) in LOOKS.items():
        points = _points(samples, prefix, peer, counts)
        if not points:
            continue
        medians = [spread.median for _, spread in points]
        below = [spread.median - spread.least for _, spread in points]
        above = [spread.most - spread.median for _, spread in points]
        axes.errorbar(
            [max(count, 0.5) for count, _ in points],
            medians,
            yerr=(below, above),
            color=colour,
            marker=mark,
            linestyle=linestyle,
            capsize=3,
            label=peer + (" p50" if linestyle == ":" else ""),
        )


def _finish(figure: Canvas, axes: Axes, title: str, unit: str, below: str, path: Path) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel(below)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _number_of_pairs(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([max(count, 0.5) for count in counts], [str(count) for count in counts])
    axes.minorticks_off()


def draw_plots(run: Run, folder: Path) -> None:
    """Draws cost.png, throughput.png and latency.png into a folder. Needs matplotlib (the `bench` extra)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for name, prefix, title, unit in (
        ("cost", "cpu-", "CPU of the relay", "CPU seconds per GiB"),
        ("throughput", "rate-", "Throughput", "MB/s, all pairs together"),
    ):
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        counts = (1, 8, 64, 256)
        _draw_lines(axes, run.samples, prefix, counts)
        _number_of_pairs(axes, counts)
        axes.set_ylim(bottom=0)
        _finish(figure, axes, title, unit, "bulk pairs", folder / f"{name}.png")
        pyplot.close(figure)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    beside = (0, 1, 8, 64, 256)
    _draw_lines(axes, run.samples, "p99-", beside)
    _draw_lines(axes, run.samples, "p50-", beside, linestyle=":")
    _number_of_pairs(axes, beside)
    axes.set_yscale("log")
    _finish(figure, axes, "Round trip of 16 bytes, p99 and p50", "µs", "bulk pairs beside it", folder / "latency.png")
    pyplot.close(figure)

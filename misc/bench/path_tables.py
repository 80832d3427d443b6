"""What `make bench-paths` measures: cells (which paths), settings (which relay, told what), and the tables of both.

Pure: no processes, and no files but the one of settings.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfers import Clients, Leg, Outcome, Setting

NEAR = Leg(rtt_ms=2, mbit=1000)
CONGESTION = "net.ipv4.tcp_congestion_control"
QDISC = "net.core.default_qdisc"
WMEM, RMEM = "net.ipv4.tcp_wmem", "net.ipv4.tcp_rmem"
BUFFERS = {WMEM: "4096 16384 {}", RMEM: "4096 131072 {}"}

STOCK = Clients()
ROOMY = Clients({name: value.format(32 << 20) for name, value in BUFFERS.items()})
"""Clients with buffers of 32 MiB; for what comes in, that is Linux's own default since 6.18."""


@dataclass(frozen=True)
class Cell:
    """Which client is far, and how its path is. The other one's is NEAR."""

    side: str
    rtt_ms: float
    mbit: float = 200
    loss: float = 0
    queue_ms: float = 60
    clients: Clients = STOCK

    def legs(self) -> tuple[Leg, Leg]:
        """The sender's path and the receiver's."""
        far = Leg(self.rtt_ms, self.mbit, self.loss, queue_ms=self.queue_ms)
        return (far, NEAR) if self.side == "sender" else (NEAR, far)

    @property
    def parts(self) -> list[str]:
        """What there is to say of it."""
        path = [f"{self.rtt_ms:g} ms", f"{self.mbit:g} Mbit/s", f"{self.loss:g} %", f"queue {self.queue_ms:g} ms"]
        return [f"{self.side} far", *path, f"clients {'of 32 MiB' if self.clients is ROOMY else 'stock'}"]

    @property
    def title(self) -> str:
        """All of it."""
        return ", ".join(self.parts)


@dataclass(frozen=True)
class Sample:
    """One transfer."""

    table: str
    cell: str
    setting: str
    outcome: Outcome

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Sample:
        """What `as_json` was made of."""
        return cls(told["table"], told["cell"], told["setting"], Outcome(**told["outcome"]))


@dataclass(frozen=True)
class Table:
    """Cells, each measured with each setting; `about` says in a line what is to be seen."""

    name: str
    about: str
    cells: Sequence[Cell]
    settings: Sequence[Setting]

    def only(self, names: Sequence[str]) -> Table:
        """With these settings, or with all when `names` is empty."""
        return dataclasses.replace(self, settings=[each for each in self.settings if not names or each.name in names])

    def without(self, unwanted: Callable[[Setting], bool]) -> Table:
        """Without some settings."""
        return dataclasses.replace(self, settings=[each for each in self.settings if not unwanted(each)])

    def without_qdisc(self) -> Table:
        """For a kernel without it: settings lose it, and those that differ from others by nothing else go."""
        kept = self.without(lambda each: each.name == f"all but {_short_name(QDISC)}" or each in (FQ, TWISTED_FQ))
        return dataclasses.replace(kept, settings=[dataclasses.replace(each, qdisc=None) for each in kept.settings])

    def _label(self, cell: Cell) -> str:
        """What tells a cell from the others."""
        varies = [len(set(column)) > 1 for column in zip(*(other.parts for other in self.cells), strict=True)]
        return ", ".join(part for part, does in zip(cell.parts, varies, strict=True) if does)

    def _in_common(self) -> str:
        columns = zip(*(cell.parts for cell in self.cells), strict=True)
        return ", ".join(column[0] for column in columns if len(set(column)) == 1)

    def _rows(self, samples: Sequence[Sample]) -> list[list[str]]:
        mine = [sample for sample in samples if sample.table == self.name]
        names = [setting.name for setting in self.settings if any(sample.setting == setting.name for sample in mine)]
        rows = [["Mbit/s, whole (second half)", *names]]
        for cell in self.cells:
            figures = [figure(mine, cell.title, name) for name in names]
            if any(found is not None for found in figures):
                rows.append([self._label(cell), *("" if found is None else _written(found) for found in figures)])
        return rows

    def as_text(self, samples: Sequence[Sample]) -> str:
        """For a terminal."""
        rows = self._rows(samples)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([f"{self.name}: {self.about} ({self._in_common()})", *lines])

    def as_markdown(self, samples: Sequence[Sample]) -> str:
        """For a page."""
        head, *rows = self._rows(samples)
        lines = [f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows]]
        return "\n".join([f"In all rows: {self._in_common()}.", "", *lines])


@dataclass(frozen=True)
class Figure:
    """Medians over the rounds, in Mbit/s: of the whole transfer, and of its second half."""

    whole: float
    later: float


def figure(samples: Sequence[Sample], cell: str, setting: str) -> Figure | None:
    """What was measured, or None when nothing was."""
    found = [sample.outcome for sample in samples if (sample.cell, sample.setting) == (cell, setting)]
    if not found:
        return None
    return Figure(statistics.median(each.mbit for each in found), statistics.median(each.later for each in found))


def _written(found: Figure) -> str:
    return f"{_short(found.whole)} ({_short(found.later)})"


def _short(mbit: float) -> str:
    return f"{mbit:.0f}" if mbit >= 9.95 else f"{mbit:.1f}"


# Settings.


def read_sysctl(path: Path) -> dict[str, str]:
    """The settings of a file for sysctl.d(5), in its order."""
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and line[0] not in "#;")
    return {name.strip(): " ".join(value.split()) for name, _, value in pairs}


def told(name: str, lines: Mapping[str, str]) -> Setting:
    """Our relay on a host with these lines of a file for sysctl.d(5)."""
    rest = {line: value for line, value in lines.items() if line not in (CONGESTION, QDISC)}
    return Setting(name, sysctl=rest, congestion=lines.get(CONGESTION, "cubic"), qdisc=lines.get(QDISC))


def _short_name(line: str) -> str:
    return line.rpartition(".")[2]


TWISTED = Setting("Twisted", kind="twisted")
TWISTED_FQ = Setting("Twisted, fq", kind="twisted", qdisc="fq")
RELAY = Setting("relay")
FQ = Setting(_short_name(QDISC), qdisc="fq")


def main_settings(lines: Mapping[str, str]) -> list[Setting]:
    """Both relays as installed, and ours with the settings of docs/tuning.md."""
    buffers = {line: value for line, value in lines.items() if line in (WMEM, RMEM)}
    bbr = lines.get(CONGESTION, "bbr")
    return [
        TWISTED,
        RELAY,
        told("buffers", buffers),
        Setting(f"--congestion-control {bbr}", congestion=bbr, by_option=True),
        told("all", lines),
    ]


def each_line(lines: Mapping[str, str]) -> list[Setting]:
    """Each line alone, and all but it."""
    alone = [told(_short_name(line), {line: value}) for line, value in lines.items()]
    rest = [
        told(f"all but {_short_name(line)}", {other: value for other, value in lines.items() if other != line})
        for line in lines
    ]
    return [RELAY, *alone, *rest, told("all", lines)]


def sizes(lines: Mapping[str, str]) -> list[Setting]:
    """All, with other ends of both buffers: in MiB."""
    return [
        told(f"{mib} MiB", {**lines, **{name: value.format(mib << 20) for name, value in BUFFERS.items()}})
        for mib in (4, 8, 16, 32, 64)
    ]


# Tables.

SIDES = ("receiver", "sender")
LINE = [Cell(side, 150, mbit=500, clients=clients) for clients in (ROOMY, STOCK) for side in SIDES]
LOSSY = [Cell("receiver", 80, loss=0.5, clients=clients) for clients in (ROOMY, STOCK)]


def tables(lines: Mapping[str, str], *, quick: bool = False) -> list[Table]:
    """All tables, with the settings `lines`; when `quick`, of each only the first cell and the last."""
    main = main_settings(lines)
    every = [Cell(side, rtt, loss=loss) for side in SIDES for rtt in (20, 80, 150) for loss in (0, 0.1, 0.5, 2)]
    queues = [Cell("receiver", rtt, queue_ms=queue) for rtt in (20, 80) for queue in (5, 15, 60)]
    found = [
        Table("loss", "one packet in so many lost on the far client's path, both ways", every, main),
        Table("line", "a long fast path without loss, with clients whose own buffers are larger or not", LINE, main),
        Table("lines", "each line of the settings alone, and all but it", [*LINE[:2], *LOSSY], each_line(lines)),
        Table("queue", "no loss but where the queue is full", queues, [TWISTED_FQ, *main]),
        Table("sizes", "both buffers, up to so much", [*LINE[:2], LOSSY[0]], sizes(lines)),
    ]
    if quick:
        found = [dataclasses.replace(table, cells=[table.cells[0], table.cells[-1]]) for table in found]
    return found


# Goals.


def goals(samples: Sequence[Sample]) -> list[str]:
    """What the two goals come to, a line each, as far as they were measured."""
    said = []
    lossy = LOSSY[1].title
    of_loss = [sample for sample in samples if sample.table == "loss"]
    twisted = figure(of_loss, lossy, "Twisted")
    for setting in sorted({sample.setting for sample in of_loss if sample.setting.startswith(("--cong", "all"))}):
        ours = figure(of_loss, lossy, setting)
        if ours and twisted:
            ratio = ours.whole / twisted.whole
            said.append(f"{lossy}, {setting}: {ratio:.1f} × Twisted as installed (goal: ≥ 10, {_verdict(ratio >= 10)})")
    cell = LINE[0]
    tuned = figure([sample for sample in samples if sample.table == "line"], cell.title, "all")
    if tuned:
        share = tuned.later / cell.mbit
        said.append(
            f"{cell.title}, all: {share:.2f} of the line once under way (goal: ≥ 0.85, {_verdict(share >= 0.85)})"
        )
    return said


def _verdict(holds: bool) -> str:
    return "holds" if holds else "missed"

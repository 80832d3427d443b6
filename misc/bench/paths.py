"""Measures relays between clients that are far away, over simulated paths.

Usage:
  paths.py [options] [--only TABLE]...
  paths.py --list
  paths.py --help

A relay stands between a sender and a receiver, each on a host of its own (a network namespace); between them and the
relay is a path with delay, a rate, a queue and loss (wan.c). One of the two is far, the other near. Our relay and the
Twisted one are measured as they are on a stock Debian, and ours with the settings of etc/sysctl.d/relay-gevent.conf.
A figure is what the receiver got, in 10^6 bits a second, the median of the rounds.

It needs root, TUN devices and network namespaces, gcc, and the programs ip, ss and tc (iproute2).

Options:
  --only TABLE      Measure this table only; may be given again. See --list.
  --settings NAMES  Only these columns, separated by commas.
  --seconds N       How long each transfer goes [default: 10].
  --rounds N        How often each is measured, with other chances of loss each time [default: 3].
  --quick           The corners of each table, once, for 3 seconds at most: to see that everything works.
  --patient         Repeat a transfer that others disturbed, up to four times.
  --relay CHECKOUT  The relay's source, else the one this file belongs to.
  --sysctl FILE     The settings to measure, else those of the checkout this file belongs to.
  --json FILE       Keep all samples.
  --from FILE       Measure nothing: take the samples that --json kept.
  --markdown FILE   Write the tables into this page, between its markers.
  --list            The tables.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from docopt import docopt
from machine import first_line, hardware, version
from page import MARKED
from path_tables import QDISC, Cell, Sample, Table, goals, read_sysctl, tables
from peers import Peer, PeerError, why_missing
from transfers import Outcome, Setting, WanError, has_qdisc, measure, not_allowed

HERE = Path(__file__).resolve().parents[2]
SYSCTL = Path("etc") / "sysctl.d" / "relay-gevent.conf"


class Mistake(Exception):
    """What the person who called it has to change, on one line."""


def note(line: str) -> None:
    """What is going on, for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def measure_table(table: Table, checkout: Path, seconds: float, rounds: int, tries: int) -> list[Sample]:
    """Each cell with each of its settings, in turn."""
    samples: list[Sample] = []
    for turn in range(rounds):
        for cell in table.cells:
            for setting in table.settings:
                outcome = measure_patiently(tries, setting, cell, checkout, seconds, turn + 1)
                if outcome is not None:
                    samples.append(Sample(table.name, cell.title, setting.name, outcome))
    return samples


def measure_patiently(
    tries: int, setting: Setting, cell: Cell, checkout: Path, seconds: float, seed: int
) -> Outcome | None:
    """One transfer; while others disturb it, again, and then the one that they disturbed least. One that failed is
    noted, and is None."""
    sender, receiver = cell.legs()
    outcomes: list[Outcome] = []
    try:
        while len(outcomes) < tries and not (outcomes and not outcomes[-1].is_disturbed):
            outcomes.append(
                measure(setting, sender, receiver, checkout=checkout, seconds=seconds, seed=seed, clients=cell.clients)
            )
    except (PeerError, WanError, OSError) as failed:
        note(f"FAILED: {cell.title}, {setting.name}: {failed}")
    return min(outcomes, key=lambda outcome: (outcome.is_disturbed, outcome.others), default=None)


def conditions(samples: list[Sample], seconds: float, rounds: int, minutes: float) -> list[str]:
    """On what, with what and how it was measured."""
    disturbed = sum(sample.outcome.is_disturbed for sample in samples)
    commit = first_line("git", "describe", "--always", "--dirty", "--abbrev=10", cwd=HERE)
    programs = ["gevent", "Twisted", "magic-wormhole-transit-relay"]
    return [
        f"run: {time.strftime('%Y-%m-%d')}, commit {commit}, {rounds} rounds of {seconds:g} s in {minutes:.0f} minutes",
        f"machine: {hardware()}",
        f"programs: {', '.join(f'{name} {version(name)}' for name in programs)}",
        f"disturbed: {disturbed} of {len(samples)} transfers, by others on this machine",
    ]


def chosen(words: dict[str, str | list[str] | bool | None]) -> list[Table]:
    """The tables with what was chosen of them. Raises Mistake for what names nothing."""
    found = tables(read_sysctl(Path(str(words["--sysctl"] or HERE / SYSCTL))), quick=bool(words["--quick"]))
    only, settings = words["--only"], words["--settings"]
    assert isinstance(only, list)
    for name in only:
        if name not in {table.name for table in found}:
            raise Mistake(f"--only {name}: no table is called so; see --list")
    names = str(settings).split(",") if settings else []
    for name in names:
        if name not in {setting.name for table in found for setting in table.settings}:
            raise Mistake(f"--settings {name}: no setting is called so; see --list")
    picked = [table.only(names) for table in found if not only or table.name in only]
    return [table for table in picked if table.settings]


def possible(picked: list[Table]) -> list[Table]:
    """What of the tables can be measured here. Raises Mistake when nothing can."""
    if reason := not_allowed():
        raise Mistake(reason)
    if missing := why_missing(Peer("Twisted", "twisted")):
        note(f"no Twisted relay: {missing}")
        picked = [table.without(lambda setting: setting.kind == "twisted") for table in picked]
    wanted = {setting.qdisc for table in picked for setting in table.settings if setting.qdisc is not None}
    if missing_ones := {name for name in wanted if not has_qdisc(name)}:
        note(f"this kernel has no {', '.join(missing_ones)}: measured without {QDISC}")
        picked = [table.without_qdisc() for table in picked]
    return picked


def _positive(words: dict[str, str | list[str] | bool | None], option: str) -> float:
    try:
        number = float(str(words[option]))
    except ValueError:
        number = 0
    if not 0 < number <= 3600:
        raise Mistake(f"{option} {words[option]}: give a number above 0, and up to 3600")
    return number


def measure_all(picked: list[Table], words: dict[str, str | list[str] | bool | None]) -> tuple[list[str], list[Sample]]:
    """Measure, print each table when it is there, and return the conditions and all samples."""
    seconds, rounds = _positive(words, "--seconds"), int(_positive(words, "--rounds"))
    if words["--quick"]:
        seconds, rounds = min(seconds, 3), 1
    checkout = Path(str(words["--relay"] or HERE)).resolve()
    if not (checkout / "relay" / "__init__.py").exists():
        raise Mistake(f"--relay {checkout}: no relay/ in this folder")
    began = time.monotonic()
    samples: list[Sample] = []
    for table in possible(picked):
        note(f"{table.name}: {len(table.cells) * len(table.settings) * rounds} transfers of {seconds:g} s")
        measured = measure_table(table, checkout, seconds, rounds, 5 if words["--patient"] else 1)
        samples += measured
        print("\n" + table.as_text(measured), flush=True)
    return conditions(samples, seconds, rounds, (time.monotonic() - began) / 60), samples


def write_page(page: Path, found: list[Table], told: list[str], samples: list[Sample]) -> None:
    """Fill the page's marked places with the tables of this run; what stands around them, and other tables, stay."""
    new = {table.name: table.as_markdown(samples) for table in found if any(s.table == table.name for s in samples)}
    new["machine"] = "\n".join(f"- {line}" for line in told)
    new["goals"] = "\n".join(f"- {line}" for line in goals(samples))

    def fill(marked: re.Match[str]) -> str:
        content = new.get(marked["names"].strip())
        return marked[0] if content is None else f"{marked[1]}{content}\n{marked[3]}"

    page.write_text(MARKED.sub(fill, page.read_text()))


def main() -> int:
    words = docopt(__doc__ or "")
    try:
        picked = chosen(words)
        if words["--list"]:
            for table in picked:
                print(f"{table.name:10} {table.about}\n{'':10} {', '.join(setting.name for setting in table.settings)}")
            return 0
        if words["--from"]:
            kept = json.loads(Path(words["--from"]).read_text())
            told, samples = kept["conditions"], [Sample.from_json(each) for each in kept["samples"]]
            for table in picked:
                print("\n" + table.as_text(samples))
        else:
            told, samples = measure_all(picked, words)
    except (Mistake, PeerError, OSError) as problem:
        print(f"bench-paths: error: {problem}", file=sys.stderr)
        return 2
    print("\n" + "\n".join([*goals(samples), *told]))
    if words["--json"]:
        kept = {"conditions": told, "samples": [sample.as_json() for sample in samples]}
        Path(words["--json"]).write_text(json.dumps(kept, indent=1) + "\n")
    if words["--markdown"]:
        write_page(Path(words["--markdown"]), picked, told, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())

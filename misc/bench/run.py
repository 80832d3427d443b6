"""Measures the relay beside its peers; USAGE says how."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from clients import Load, compile_programs
from docopt import docopt
from figures import Figure, Samples, as_text, lines_of, verdicts_of
from machine import Conditions, describe
from page import Run, draw_plots, read_run, write_page, write_run
from peers import Peer, PeerError, Server, compile_relay, why_missing
from rows import QUICK, Bench, Case, Group, Scale, groups
from web_rows import web_groups

USAGE = """Usage:
  run.py [options] [--only NAME]... [--relay CHECKOUT]...
  run.py --list
  run.py --help

All peers run on this machine's loopback, started and ended by the benchmark: our relay, the Twisted relay, HAProxy
with splice, a loop in C (that splices, or for WebSocket takes masks off and writes headers), and a direct connection. A
row gives each peer's median over the rounds and its spread, and the median of the ratios within each round, which is
what a goal is about.

Options:
  --only NAME       Measure this group or case only; may be given again. See --list.
  --peers NAMES     Measure these peers only, separated by commas: relay, before, twisted, haproxy, c, direct.
  --relay CHECKOUT  The relay's source, else the one this file belongs to. Given twice: the first is called “before”,
                    the second “relay”, and both are measured side by side.
  --rounds N        Alternating rounds [default: 7].
  --quick           Small and short: to see that everything works. The figures mean little.
  --copy            Clients send from their own memory instead of by sendfile.
  --patient         Repeat a bulk or round trip measurement that others disturbed, up to four times.
  --pin             Peers on the first core, clients on the others.
  --json FILE       Keep all samples.
  --from FILE       Measure nothing: take the samples that --json kept.
  --plots DIR       Draw cost and latency against the number of pairs, and pairing against those who wait.
  --markdown FILE   Write the tables into this page, between its markers.
  --list            Names for --only.
"""

HERE = Path(__file__).resolve().parents[2]


class Mistake(Exception):
    """What the person who called it has to change, on one line."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to measure, as the command line says."""

    names: frozenset[str]
    kinds: frozenset[str]
    checkouts: list[Path]
    rounds: int

    def of(self, all_groups: tuple[Group, ...]) -> list[Group]:
        """The groups with what was chosen of their cases and peers."""
        chosen = []
        for group in all_groups:
            cases = tuple(case for case in group.cases if not self.names or {group.name, case.name} & self.names)
            peers = tuple(peer for peer in group.peers if not self.kinds or kind_of(peer) in self.kinds)
            if cases and peers:
                chosen.append(Group(group.name, cases, peers, group.once))
        return chosen


def every_group(checkouts: list[Path], scale: Scale) -> tuple[Group, ...]:
    return (*groups(checkouts, scale), *web_groups(checkouts))


def kind_of(peer: Peer) -> str:
    return "before" if peer.name.startswith("before") else peer.kind


def note(line: str) -> None:
    """What is going on, for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def measure_once(bench: Bench, case: Case, peer: Peer, server: Server | None, samples: Samples) -> None:
    """Adds one number to each of the case's figures that this peer has, or None to all when it failed."""
    try:
        if case.measure_fresh is not None:
            values = case.measure_fresh(bench, peer)
        else:
            assert case.measure is not None
            assert server is not None
            values = case.measure(bench, server)
    except (PeerError, OSError) as failed:
        note(f"FAILED: {case.name}, {peer.name}: {failed}")
        for figure in case.figures:
            samples.add(figure.name, peer.name, None)
        return
    for name, value in values.items():
        samples.add(name, peer.name, value)


def start_peers(bench: Bench, group: Group, stack: contextlib.ExitStack) -> dict[Peer, Server | None]:
    """The group's peers that can be had here; started, when its cases want them running."""
    running: dict[Peer, Server | None] = {}
    for peer in group.peers:
        missing = why_missing(peer)
        if missing is not None:
            note(f"{group.name}: no {peer.name}: {missing}")
        elif group.cases[0].measure_fresh is not None:
            running[peer] = None
        else:
            try:
                running[peer] = stack.enter_context(bench.start(peer))
            except PeerError as failed:
                note(f"FAILED: {group.name}, {peer.name}: {failed}")
    return running


def measure_group(bench: Bench, group: Group, rounds: int, samples: Samples) -> None:
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        running = start_peers(bench, group, stack)
        for turn in range(1 if group.once else rounds):
            order = list(running) if turn % 2 == 0 else list(reversed(running))
            for case in group.cases:
                for peer in order:
                    measure_once(bench, case, peer, running[peer], samples)
    note(f"{group.name}: {time.monotonic() - begun:.0f} s")


def measure_all(choice: Choice, scale: Scale, *, copy: bool, pin: bool, patient: bool) -> Run:
    """Measures what was chosen and prints each group's table when it is there."""
    begun = time.monotonic()
    samples = Samples()
    cpus = sorted(os.sched_getaffinity(0))
    pinned = pin and len(cpus) > 1
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as name:
        folder = Path(name)
        program, c_loops = compile_programs(folder)
        for checkout in choice.checkouts:
            compile_relay(checkout)
        load = Load(
            program, cpus=",".join(map(str, cpus[1:])) if pinned else None, copies=copy, tries=5 if patient else 1
        )
        bench = Bench(load, c_loops, folder, scale, relay_cpus=str(cpus[0]) if pinned else None)
        for group in choice.of(every_group(choice.checkouts, scale)):
            measure_group(bench, group, choice.rounds, samples)
            print("\n" + as_text(lines_of(figures_of([group]), samples)), flush=True)
    conditions = Conditions(
        rounds=choice.rounds,
        minutes=(time.monotonic() - begun) / 60,
        measurements=load.runs,
        disturbed=load.disturbed,
        clients="copying" if copy else "sendfile",
        pinned=pinned,
    )
    return Run(samples, describe(choice.checkouts[-1], conditions))


def figures_of(some: list[Group]) -> list[Figure]:
    return [figure for group in some for case in group.cases for figure in case.figures]


def print_summary(run: Run, figures: list[Figure]) -> None:
    verdicts = verdicts_of(figures, run.samples)
    held = sum(verdict.holds is True for _, verdict in verdicts)
    titles = {figure.name: f"“{figure.title}”" for figure in figures}
    print(f"\n{held} of {len(verdicts)} goals hold.")
    for figure, verdict in verdicts:
        if not verdict.holds:
            goal = verdict.goal
            than = f" × {goal.against or titles[goal.against_figure or '']}" if goal.is_ratio else f" {figure.unit}"
            reached = "not measured" if verdict.reached is None else f"{verdict.reached.median:.3g}"
            print(f"  missed: {figure.title}: {goal.sense} {goal.limit:g}{than}; it is {reached}")
    print("\n" + "\n".join(run.machine))


def choice_of(words: dict[str, str | list[str] | bool | None]) -> Choice:
    """Raises Mistake for what names nothing."""
    only, kinds, relays = words["--only"], words["--peers"], words["--relay"]
    assert isinstance(only, list)
    assert isinstance(relays, list)
    checkouts = [Path(path).resolve() for path in relays] or [HERE]
    if len(checkouts) > 2:
        raise Mistake("--relay may be given twice, not more often")
    for checkout in checkouts:
        if not (checkout / "relay" / "__init__.py").exists():
            raise Mistake(f"--relay {checkout}: no relay/ in this folder")
    known = {name for group in every_group(checkouts, Scale()) for name in (group.name, *(c.name for c in group.cases))}
    for name in only:
        if name not in known:
            raise Mistake(f"--only {name}: nothing is called so; see --list")
    rounds = str(words["--rounds"])
    if not rounds.isdecimal() or int(rounds) < 1:
        raise Mistake(f"--rounds {rounds}: not a positive whole number")
    chosen = frozenset(str(kinds).lower().split(",")) if kinds else frozenset()
    return Choice(frozenset(only), chosen, checkouts, int(rounds))


def raise_fd_limit() -> int:
    """The limit of open files, as high as it may be, for us and all we start."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def main() -> int:
    words = docopt(USAGE)
    try:
        choice = choice_of(words)
        if words["--list"]:
            for group in every_group(choice.checkouts, Scale()):
                print(f"{group.name:10} {' '.join(case.name for case in group.cases)}")
            return 0
        scale = (QUICK if words["--quick"] else Scale()).within(raise_fd_limit())
        if words["--from"]:
            run = read_run(Path(words["--from"]))
        else:
            run = measure_all(choice, scale, copy=words["--copy"], pin=words["--pin"], patient=words["--patient"])
        present(run, figures_of(list(every_group(choice.checkouts, scale))), words)
    except (Mistake, PeerError) as problem:
        print(f"bench: error: {problem}", file=sys.stderr)
        return 2
    return 0


def present(run: Run, figures: list[Figure], words: dict[str, str]) -> None:
    """Prints the summary, and writes what was asked for."""
    if words["--from"]:
        print(as_text(lines_of(figures, run.samples)))
    print_summary(run, figures)
    if words["--json"]:
        write_run(run, Path(words["--json"]))
    if words["--plots"]:
        draw_plots(run, Path(words["--plots"]))
    if words["--markdown"]:
        write_page(run, figures, Path(words["--markdown"]))


if __name__ == "__main__":
    sys.exit(main())

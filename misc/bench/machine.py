"""On what, with what and how a run was measured, in lines for people."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from peers import haproxy_path


@dataclass(frozen=True, slots=True)
class Conditions:
    """How a run was made. `disturbed`: measurements while others used more than a quarter of a core."""

    rounds: int
    minutes: float
    measurements: int
    disturbed: int
    clients: str
    pinned: bool


def first_line(*command: str, cwd: Path | None = None) -> str:
    """What a program prints first: "none" without the program, "unknown" when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    except FileNotFoundError:
        return "none"
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else "unknown"


def version(distribution: str) -> str:
    """Of what pip has installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _from_file(path: str, pattern: str) -> str:
    found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    return found.group(1).strip() if found else "unknown"


def _haproxy_version() -> str:
    program = haproxy_path()
    if program is None:
        return "none"
    return first_line(program, "-v").removeprefix("HAProxy version ").split(" ")[0]


def hardware() -> str:
    """The machine in one line."""
    gib = int(_from_file("/proc/meminfo", r"^MemTotal:\s+(\d+)")) / (1 << 20)
    model = _from_file("/proc/cpuinfo", r"^model name\s*:(.*)")
    virtual = "virtual machine, " if "hypervisor" in Path("/proc/cpuinfo").read_text() else ""
    return f"{virtual}{os.cpu_count()} cores, {model}, {gib:.0f} GiB, Linux {platform.release()}"


def _programs() -> str:
    of_python = ["gevent", "Twisted", "magic-wormhole-transit-relay"]
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in of_python)]
    return ", ".join([*versions, f"HAProxy {_haproxy_version()}", first_line("cc", "--version")])


def describe(checkout: Path, conditions: Conditions) -> list[str]:
    """The machine, the programs and the conditions."""
    commit = first_line("git", "describe", "--always", "--dirty", "--abbrev=10", cwd=checkout)
    place = "peers on the first core, clients on the others" if conditions.pinned else "nothing pinned to a core"
    user = "root" if os.geteuid() == 0 else "an ordinary user"
    rounds = f"{conditions.rounds} rounds in {conditions.minutes:.0f} minutes"
    disturbed = f"{conditions.disturbed} of {conditions.measurements} measurements"
    return [
        f"run: {time.strftime('%Y-%m-%d')}, commit {commit}, {rounds}",
        f"machine: {hardware()}",
        f"programs: {_programs()}",
        f"clients: {conditions.clients}; {place}; as {user}",
        f"disturbed: {disturbed}, in which others used more than a quarter of a core",
    ]

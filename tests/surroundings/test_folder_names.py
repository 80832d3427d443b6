"""A folder of any name: `supervisord -c` in it works, and nothing of the name is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.harness import wait_until
from tests.support.hostile import honest_transfer
from tests.support.supervised import supervised

NAMES = [
    "plain",
    "it's",
    'a "quoted" one',
    "$HOME $(touch RAN)",
    "`touch RAN`",
    "'; touch RAN; '",
    '"; touch RAN; "',
    "100%",
    "%(here)s %s %%",
    " ;comment #comment",
    "new\nline",
    "back\\slash, KEY=value",
    "-*?[x]{a,b}~<>|&!()ü",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_relay_runs_in_a_folder_of_any_name_and_nothing_of_the_name_does(name: str) -> None:
    with supervised(name=name) as service:
        honest_transfer(service.port)
        lines = service.relay_folder / "usage.jsonl"
        wait_until(lambda: lines.read_text().endswith("\n"), 5, "the JSON line")
        assert json.loads(lines.read_text())["mood"] == "happy"
        wait_until(lambda: service.query("SELECT result FROM usage") == [("happy",)], 5, "the row")
        above = service.home.parent
        assert [path for path in above.iterdir() if path != service.home] == []
        assert list(above.rglob("RAN")) == []
        assert in_place(service.home) == WRITTEN


WRITTEN = {
    "var/relay-0.log",
    "var/relay-1.log",
    "var/status.log",
    "var/supervisor.sock",
    "var/supervisord.log",
    "var/supervisord.pid",
    "var/relay/usage.jsonl",
    "var/relay/usage.sqlite",
    "var/relay/usage.sqlite-shm",
    "var/relay/usage.sqlite-wal",
    "var/relay/run/lock",
}
"""What is below `var/` while a relay runs, besides the sockets of its workers."""


def in_place(home: Path) -> set[str]:
    """Return the names of all files below var/ but the workers' sockets, as seen from the folder above it."""
    files = [path for path in (home / "var").rglob("*") if not path.is_dir()]
    return {str(path.relative_to(home)) for path in files if not path.name.startswith("worker-")}

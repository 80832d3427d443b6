"""Transfers that go on while something happens to the relay, and whether each has been recorded once.

load = Load(workers.port)
with beside(load.run):
    ...
    load.wait_for_more()
assert in_lines(workers.json_lines.read_text()) == Counter(load.sizes)
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import Counter
from pathlib import Path

from tests.support.harness import query, wait_until, whole_lines
from tests.support.hostile import honest_transfer


class Load:
    """Small transfers one after another, each of a size of its own, so that a record tells which it is of."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sizes: list[int] = []
        self.may_be_cut = False
        """Whether a transfer that is under way may fail; those are not in `sizes`."""

    def run(self, over: threading.Event) -> None:
        """Until `over`; every byte of each is checked."""
        while not over.is_set():
            size = len(self.sizes) + 1
            may_be_cut = self.may_be_cut
            try:
                honest_transfer(self.port, size)  # and an answer of six bytes
            except (AssertionError, OSError):
                if not (may_be_cut or self.may_be_cut):
                    raise
            else:
                self.sizes.append(size + 6)

    def wait_for_more(self, count: int = 15) -> None:
        """Return when so many more have been made."""
        goal = len(self.sizes) + count
        wait_until(lambda: len(self.sizes) >= goal, 20, f"{goal} transfers")


def in_database(path: Path) -> Counter[int]:
    """The sizes of all transfers that a database has, each as often as it is there; none while it is being made."""
    try:
        return Counter(size for (size,) in query(path, "SELECT bytes FROM usage"))
    except sqlite3.OperationalError:
        return Counter()


def in_lines(text: str) -> Counter[int]:
    """The same of JSON lines."""
    return Counter(json.loads(line)["total_bytes"] for line in whole_lines(text))

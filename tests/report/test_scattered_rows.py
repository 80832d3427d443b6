"""relay-usage reads a database whose rows have random numbers, older ones in order before them, or any numbers."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from relay.report import scan
from relay.report.database import opened
from relay.usage.rows import draw_numbers
from relay.usage.schema import open_database

DAY = 86_400
BEGAN = 1_790_000_000 // DAY * DAY


def fill(path: Path, numbers: Sequence[int | None]) -> None:
    """Write a row for each number, of ten days by turns; None leaves the number to SQLite."""
    with closing(open_database(str(path))) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for place, number in enumerate(numbers):
            row = (number, BEGAN + place % 10 * DAY + 60, 1.0 + place, 0.5, 10_000, ("happy", "lonely")[place % 3 // 2])
            connection.execute(
                "INSERT INTO usage (rowid, started, total_time, waiting_time, bytes, result) VALUES (?, ?, ?, ?, ?, ?)",
                row,
            )
        connection.execute("COMMIT")


def random_numbers(count: int) -> list[int | None]:
    return list(draw_numbers(count))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows to a block that a small table has many."""
    monkeypatch.setattr(scan, "BLOCK", 100)


@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize(
    "numbers",
    [
        [],
        [None],
        [2**63 - 1],
        [0, 2**63 - 1],
        random_numbers(1000),
        [None] * 500 + random_numbers(500),
        [None] * 100,
        [None] * 101,
        [*range(-50, 250)],
    ],
    ids=["none", "one", "the last number", "both ends", "random", "old and new", "a block", "one more", "negative"],
)
def test_every_row_is_counted_once_whatever_its_number(
    tmp_path: Path, numbers: list[int | None], processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    path = tmp_path / "usage.sqlite"
    fill(path, numbers)
    with opened(path) as database:
        summary = database.summary()
        tallies = scan.count(database, summary.first_row, summary.last_row, utc=True)
    days = Counter(place % 10 for place in range(len(numbers)))
    assert sorted(tally.sums().connections for tally in tallies.values()) == sorted(days.values())
    happy = sum(place % 3 != 2 for place in range(len(numbers)))
    assert sum(tally.sums().happy for tally in tallies.values()) == happy
    totals = sorted(total for tally in tallies.values() for total in tally.values.totals)
    assert totals == [1.0 + place for place in range(len(numbers)) if place % 3 != 2]


def test_a_block_has_at_most_so_many_rows_whatever_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    fill(path, [None] * 350 + random_numbers(350))
    with opened(path) as database:
        summary = database.summary()
        blocks = scan.blocks_of(database, summary.first_row, summary.last_row)
        with closing(sqlite3.connect(path)) as connection:
            counts = [
                connection.execute("SELECT count(*) FROM usage WHERE rowid BETWEEN ? AND ?", block).fetchone()[0]
                for block in blocks
            ]
    assert counts == [100] * 7
    assert all(end + 1 == begin for (_, end), (begin, _) in pairwise(blocks))

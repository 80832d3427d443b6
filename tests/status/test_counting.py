"""How often relay-status counts all rows of `usage`: once, and seldom again."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

import pytest

from relay.status.history import today
from relay.status.observer import Observer
from relay.status.source import Source
from relay.usage.schema import open_database

HAPPY = "INSERT INTO usage VALUES (?, 1.0, 1.0, 1000, 'happy')"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of a relay that has served nobody yet."""
    path = tmp_path / "usage.sqlite"
    with contextlib.closing(open_database(str(path))) as database:
        database.execute("INSERT INTO all_time VALUES (0, 0, 0, 0, 0)")
    return path


def write(path: Path, statement: str, *rows: tuple[float, ...]) -> None:
    """Write into it, by other hands."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.executemany(statement, rows)


def looked(observer: Observer) -> bool:
    """Have it look, and count if it wants to; return whether it has counted."""
    observer._look()
    wants = observer._is_to_be_counted()
    if wants:
        observer._count()
    return wants


def connections_of_today(observer: Observer) -> int:
    assert observer.seen.days is not None
    sums = observer.seen.days.get(today(time.time()))
    return 0 if sums is None else sums.connections


def test_rows_that_all_time_does_not_know_of_are_counted_once(path: Path) -> None:
    write(path, HAPPY, *[(86_400.0 * day,) for day in range(1, 6)])
    observer = Observer(Source(path))
    assert looked(observer)
    assert not looked(observer)
    assert connections_of_today(observer) == 0
    write(path, HAPPY, (time.time(),))
    write(path, "UPDATE all_time SET connections = connections + 1, bytes = bytes + ?, mood_happy = 1", (1000,))
    assert not looked(observer)
    assert connections_of_today(observer) == 1, "what ends since then is known without counting"


def test_another_file_is_counted_and_so_is_one_whose_sums_went_back(path: Path) -> None:
    write(path, HAPPY, *[(86_400.0,)] * 3)
    write(path, "UPDATE all_time SET connections = ?", (3,))
    observer = Observer(Source(path))
    assert looked(observer)
    assert not looked(observer)
    write(path, "UPDATE all_time SET connections = ?", (2,))
    assert looked(observer)
    assert not looked(observer)


def test_rows_that_cannot_be_counted_are_not_tried_all_the_time(path: Path) -> None:
    write(path, HAPPY, *[(86_400.0,)] * 5000)
    page_bytes = 4096
    with path.open("r+b") as file:
        file.seek(-page_bytes, 2)
        file.write(b"\xff" * page_bytes)
    observer = Observer(Source(path))
    assert looked(observer)
    assert observer.seen.reading is not None, "the small tables are whole"
    assert observer.seen.days is None
    assert not looked(observer)
    observer._not_before = time.monotonic()
    assert looked(observer), "later it is tried again"

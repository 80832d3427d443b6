"""The days that relay-status shows, when rows of other days than today come, go or change; and how often it counts."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from relay.report.tally import Sums
from relay.status import recount
from relay.status.history import today
from relay.status.observer import Observer
from relay.status.recount import Recount
from relay.status.source import Source
from relay.usage.schema import open_database
from tests.status.test_parts import READING
from tests.support.harness import CHECKOUT

DAY = 86_400
NOW = time.time() // 1
TODAY = today(NOW)


class Database:
    """A usage database, written to as workers and others do, and what relay-status makes of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.closing(open_database(str(path))) as database:
            database.execute("INSERT INTO all_time VALUES (0, 0, 0, 0, 0)")
        self.observer = Observer(Source(path))

    def write(self, *statements: str) -> None:
        """Write into it."""
        with contextlib.closing(sqlite3.connect(self.path)) as database, database:
            for statement in statements:
                database.execute(statement)

    def record(self, *days_ago: int, first: int = 1) -> None:
        """Record a connection that began so many days ago, as workers do, at numbers from `first` on."""
        for number, days in enumerate(days_ago, first):
            self.write(
                f"INSERT INTO usage (rowid, started, total_time, waiting_time, bytes, result) "
                f"VALUES ({number}, {NOW - days * DAY:.0f}, 1, 1, 10, 'happy')",
                "UPDATE all_time SET connections = connections + 1, mood_happy = mood_happy + 1, bytes = bytes + 10",
            )

    def look(self) -> None:
        """Have it looked at, once."""
        self.observer._look()

    def days(self) -> dict[int, int]:
        """The connections by how many days ago, after one more look, and a count if that is wanted."""
        self.look()
        self.observer._bring_up_to_date()
        return self.shown()

    def shown(self) -> dict[int, int]:
        """The same, as it was at the last look."""
        days = self.observer.seen.days
        assert days is not None
        return {TODAY - day: sums.connections for day, sums in days.items()}


def back_up(source: Path, to: Path) -> None:
    """Do what `.backup` and `.restore` of sqlite3 do."""
    with contextlib.closing(sqlite3.connect(source)) as one, contextlib.closing(sqlite3.connect(to)) as other:
        one.backup(other)


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """One whose rows are looked at each time. Without a sign it is not counted again as long as a test lasts."""
    monkeypatch.setattr(recount, "ROWS_EVERY", 0.0)
    monkeypatch.setattr(recount, "ROWS_PART", 0.0)
    monkeypatch.setattr(recount, "AT_A_SIGN", 0.0)
    monkeypatch.setattr(recount, "SECONDS_BETWEEN", 3600.0)
    monkeypatch.setattr(time, "time", lambda: NOW)
    return Database(tmp_path / "usage.sqlite")


def test_a_second_import_is_of_the_days_of_its_rows_and_not_of_today(database: Database, tmp_path: Path) -> None:
    twisted = tmp_path / "twisted.sqlite"
    with contextlib.closing(sqlite3.connect(twisted)) as old:
        old.executescript(
            "CREATE TABLE version (version INTEGER); INSERT INTO version VALUES (1); CREATE TABLE current (x);"
            "CREATE TABLE usage (started, total_time, waiting_time, total_bytes, result)"
        )

    def bring_in(count: int, days_ago: int) -> None:
        with contextlib.closing(sqlite3.connect(twisted)) as old, old:
            row = (NOW - days_ago * DAY, 1.5, 0.5, 10, "happy")
            old.executemany("INSERT INTO usage VALUES (?, ?, ?, ?, ?)", [row] * count)
        command = [sys.executable, str(CHECKOUT / "misc" / "import-twisted-usage"), str(twisted), str(database.path)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    bring_in(3, days_ago=6)
    assert database.days() == {6: 3}
    bring_in(4, days_ago=5)
    database.look()
    assert database.shown() == {6: 3}, "before they are counted they are of no day"
    assert database.days() == {6: 3, 5: 4}


def test_what_ended_before_midnight_stays_on_its_day(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    database.record(0)
    assert database.days() == {0: 1}
    database.record(0, 0, first=2)
    assert database.days() == {0: 3}
    monkeypatch.setattr(time, "time", lambda: NOW + DAY)
    database.look()
    assert database.shown() == {0: 3}, "without a count"
    database.record(-1, first=4)
    database.look()
    assert database.shown() == {0: 3, -1: 1}


def test_a_transfer_over_midnight_is_of_the_day_on_which_it_began(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.record(1)
    assert database.days() == {1: 1}
    database.record(1, first=2)
    database.look()
    assert database.shown() == {1: 1, 0: 1}, "nothing tells of it"
    monkeypatch.setattr(recount, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(recount, "WITHOUT", 0.0)
    assert database.days() == {1: 2}


def test_when_the_clock_is_set_the_days_are_counted_again(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW + 3 * DAY)
    database.record(0)
    assert database.days() == {0: 1}
    database.record(0, first=2)
    database.look()
    assert database.shown() == {0: 1, -3: 1}
    monkeypatch.setattr(time, "time", lambda: NOW)
    assert database.days() == {0: 2}


def test_rows_that_are_deleted_are_of_no_day_any_more(database: Database) -> None:
    database.record(8, 2, 8, 0)
    assert database.days() == {8: 2, 2: 1, 0: 1}
    database.write(f"DELETE FROM usage WHERE started < {NOW - 7 * DAY}")
    assert database.days() == {2: 1, 0: 1}
    database.record(0, first=5)
    database.look()
    assert database.shown() == {2: 1, 0: 2}


def test_sums_that_are_put_right_from_the_rows_are_not_of_today(database: Database) -> None:
    database.record(2, 3)
    assert database.days() == {2: 1, 3: 1}
    database.write("DELETE FROM all_time")
    assert database.days() == {2: 1, 3: 1}
    database.write("INSERT INTO all_time SELECT sum(bytes), count(*), count(*), 0, 0 FROM usage")
    assert database.days() == {2: 1, 3: 1}


@pytest.mark.parametrize("more", [0, 5])
def test_a_copy_that_is_put_in_its_place_is_counted(database: Database, tmp_path: Path, more: int) -> None:
    database.record(2, 0)
    assert database.days() == {2: 1, 0: 1}
    other = Database(tmp_path / "copy.sqlite")
    other.record(*[4] * (2 + more))
    os.replace(other.path, database.path)
    assert database.days() == {4: 2 + more}


def test_a_copy_that_is_restored_into_the_same_file_is_counted(database: Database, tmp_path: Path) -> None:
    database.record(2)
    copy = tmp_path / "copy.sqlite"
    back_up(database.path, copy)
    database.record(1, 1, first=2)
    assert database.days() == {2: 1, 1: 2}
    back_up(copy, database.path)
    assert database.days() == {2: 1}


# How often.


def counted_once(cost: float) -> Recount:
    """One that has counted a database, at the time 0, which took so many seconds of a processor."""
    plan = Recount()
    plan.saw(READING)
    plan.saw_rows(READING, 0, 0.0, 0.0)
    assert plan.wants_count(READING, 0.0)
    plan.counted(plan.sign(READING), READING.written, 0.0, cost)
    return plan


def test_while_nobody_writes_nothing_is_counted() -> None:
    plan = counted_once(1.0)
    assert not plan.wants_rows(READING, 1e9)
    assert not plan.wants_count(READING, 1e9)


@pytest.mark.parametrize(("cost", "after"), [(0.001, 30), (0.6, 60), (2.0, 200)])
def test_a_database_that_is_written_to_costs_a_hundredth_of_a_processor(cost: float, after: float) -> None:
    plan = counted_once(cost)
    later = replace(READING, written="later")
    assert not plan.wants_count(later, after - 0.1)
    assert plan.wants_count(later, after + 0.1)


def test_upon_a_sign_a_database_of_two_million_rows_is_counted_in_less_than_a_minute_but_not_all_the_time() -> None:
    plan = counted_once(1.8)
    later = replace(READING, origin="another file")
    assert not plan.wants_count(later, 17.9)
    assert plan.wants_count(later, 18.1)
    plan.counted(plan.sign(later), later.written, 20.0, 1.8)
    assert not plan.wants_count(later, 1e9)
    assert not plan.wants_count(READING, 37.9)
    assert plan.wants_count(READING, 38.1)


def test_a_sign_that_comes_while_rows_are_counted_has_them_counted_once_more() -> None:
    plan = Recount()
    plan.saw(replace(READING, all_time=Sums(1, 10, 1, 0, 0)))
    sign = plan.sign(READING)
    plan.saw(READING)
    plan.counted(sign, READING.written, 1.0, 0.0)
    assert plan.wants_count(READING, 1.1)


def test_looking_at_the_number_of_rows_takes_a_hundredth_of_the_time() -> None:
    plan = counted_once(1.0)
    later = replace(READING, written="later")
    assert not plan.wants_rows(later, 19.9)
    assert plan.wants_rows(later, 20.1)
    plan.saw_rows(later, None, 21.0, 0.5)
    assert not plan.wants_rows(READING, 70.9)
    assert plan.wants_rows(READING, 71.1)
    assert not plan.wants_count(later, 25.0), "what could not be read tells nothing"

"""What relay-status makes of a database whose rows and sums do not agree: how often it counts, and what goes back."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import time
from pathlib import Path

import pytest

from relay.report.tally import Sums
from relay.status import history, recount
from relay.status.history import History, counting, today
from relay.status.observer import Observer
from relay.status.source import Source
from relay.usage.schema import open_database
from tests.support.harness import wait_until
from tests.support.usage_worker import UsageWorker

HAPPY = "INSERT INTO usage VALUES (?, 1.0, 1.0, 1000, 'happy')"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database of a relay that has served nobody yet; after a count, a sign has it counted at once."""
    monkeypatch.setattr(recount, "AT_A_SIGN", 0.0)
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
    return observer._bring_up_to_date()


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


@pytest.mark.parametrize("without_row", [0, 3, 5000, -3, -5000])
def test_what_ends_during_a_count_is_counted_once_however_many_rows_were_deleted_or_added(
    path: Path, without_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "ROWS", 100)
    draw = random.Random(7)

    def end(connection: sqlite3.Connection, count: int, started: float) -> None:
        rows = [(draw.getrandbits(62), started) for _ in range(count)]
        connection.executemany("INSERT INTO usage (rowid, started, bytes, result) VALUES (?, ?, 1000, 'happy')", rows)
        connection.execute("UPDATE all_time SET connections = connections + ?", (count,))

    def all_time(connection: sqlite3.Connection) -> Sums:
        (connections,) = connection.execute("SELECT connections FROM all_time").fetchone()
        return Sums(connections, 1000 * connections, connections, 0, 0)

    now = time.time()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as relay:
        end(relay, 6000, now - 3 * 86_400)
        relay.execute("UPDATE all_time SET connections = connections + ?", (without_row,))
        into, ended = History(), 0
        for _ in counting(lambda question: question(relay), all_time(relay), into):
            end(relay, 5, now)
            ended += 5
        counted = into.days[today(now)].connections
        assert 0 < counted < ended, "the count has met some"
        into.counted_with(all_time(relay))
        for _ in range(2):
            into.note(all_time(relay), today(now))
            assert into.days[today(now)] == Sums(ended, 1000 * ended, ended, 0, 0)


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
    observer._recount._not_before = time.monotonic()
    assert looked(observer), "later it is tried again"


def test_counters_of_workers_that_live_do_not_go_back_when_a_wal_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"

    def record(count: int, total: int) -> None:
        """Have it record so many, which makes so many in all, and tell of them."""
        worker.ask(f"record {count} 10 happy")
        wait_until(lambda: source.read().since_start.happy == total, what="its rows")
        worker.ask("refresh")
        wait_until(lambda: source.read().counters["mood.happy"] == total, what="its counters")

    with UsageWorker("--usage-db", str(path)) as worker:
        source = Source(path)
        record(5, 5)
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        record(50, 55)
        with Path(f"{path}-wal").open("r+b") as wal:
            wal.write(os.urandom(os.stat(wal.fileno()).st_size))
        worker.ask("record 1 10 lonely")
        wait_until(lambda: _lonely(path) == 1, what="the row that came later")
        worker.ask("refresh")
        wait_until(lambda: source.read().counters["mood.lonely"] == 1, what="its counters")
        reading = source.read()
        assert reading.since_start.happy == 5, "what was lost is lost"
        assert (reading.ended("happy"), reading.counters["size.inf"]) == (55, 0)
        assert reading.counters["size.sum"] == 550


def test_a_service_that_was_nowhere_but_in_a_wal_that_is_overwritten_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    with UsageWorker("--usage-db", str(path)) as worker:
        worker.ask("record 9 10 happy")
        worker.ask("close 10")
    source = Source(path)
    assert source.read().since_start.happy == 9
    time.sleep(1.1)  # a service is known by the second in which it began
    with UsageWorker("--usage-db", str(path)) as worker:
        worker.ask("record 5 10 happy")
        wait_until(lambda: source.read().since_start.happy == 5, what="its rows")
        with Path(f"{path}-wal").open("r+b") as wal:
            wal.write(os.urandom(os.stat(wal.fileno()).st_size))
        worker.ask("record 1 10 lonely")
        wait_until(lambda: _lonely(path) == 1, what="the row that came later")
        assert source.read().since_start.happy == 0, "those of the service before are not of this one"


def _lonely(path: Path) -> int:
    """Asked without writing: in the moment in which the worker lets go of it, whoever else has the file open would copy
    into it what the -wal was overwritten with."""
    uri = f"file:{path}?mode=ro"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM usage WHERE result = 'lonely'").fetchone()[0])
    return 0

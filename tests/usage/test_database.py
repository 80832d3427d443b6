"""The database of one worker: its tables, its troubles, and which files it takes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import pytest

from relay.usage import schema
from relay.usage.record import Current, Record
from relay.usage.recorder import UsageError, open_recorder
from relay.usage.writer import START_PATIENCE
from tests.support.harness import wait_until
from tests.support.usage_disk import disk_of, fill
from tests.support.usage_records import (
    assert_sums_agree,
    delete_database,
    holding_the_lock,
    numbers,
    record_numbers,
    recording,
    rows,
    wait_for_rows,
)

NOBODY = 65534


def wait_for_warnings(warnings: list[str], count: int) -> None:
    wait_until(lambda: len(warnings) >= count, what=f"{count} warnings; there are {warnings}")


# What is written


def test_the_tables_that_others_read_have_exactly_their_names_and_columns(tmp_path: Path) -> None:
    with recording(tmp_path / "db"):
        sums = ["bytes", "connections", "mood_happy", "mood_lonely", "mood_errory"]
        expected = {
            "current": ["connected", "waiting", "partal_bytes"],
            "since_reboot": sums,
            "all_time": sums,
            "usage": ["started", "total_time", "waiting_time", "bytes", "result"],
        }
        for table, columns in expected.items():
            assert [row[1] for row in rows(tmp_path / "db", f"pragma_table_info('{table}')")] == columns
        for table in ("current", "since_reboot", "all_time"):
            assert len(rows(tmp_path / "db", table)) == 1
        assert rows(tmp_path / "db", "pragma_application_id") == [(0x52474556,)]
        assert rows(tmp_path / "db", "pragma_user_version") == [(1,)]
        assert rows(tmp_path / "db", "pragma_journal_mode") == [("wal",)]


def test_a_finished_connection_is_in_all_four_tables(tmp_path: Path) -> None:
    with recording(tmp_path / "db", current=lambda: Current(3, 4, 5)) as recorder:
        recorder.record(Record(1_800_000_123.5, 12.25, None, 0, "lonely"))
        recorder.record(Record(1_800_000_124.5, 2.5, 0.75, 12_345, "happy"))
        recorder.record(Record(1_800_000_125.5, 0.5, None, 0, "errory"))
        wait_for_rows(tmp_path / "db", 3)
        assert rows(tmp_path / "db", "usage") == [
            (1_800_000_123.5, 12.25, None, 0, "lonely"),
            (1_800_000_124.5, 2.5, 0.75, 12_345, "happy"),
            (1_800_000_125.5, 0.5, None, 0, "errory"),
        ]
        assert rows(tmp_path / "db", "since_reboot") == [(12_345, 3, 1, 1, 1)]
        assert rows(tmp_path / "db", "all_time") == [(12_345, 3, 1, 1, 1)]
        assert rows(tmp_path / "db", "current") == [(3, 4, 5)]


def test_with_blur_every_table_shows_blurred_starts_and_sizes_only(tmp_path: Path) -> None:
    with recording(tmp_path / "db", blur=600, current=lambda: Current(1, 0, 1_000_001)) as recorder:
        recorder.record(Record(1_800_000_123.5, 12.25, 0.5, 10_001, "happy"))
        recorder.record(Record(1_800_000_700.5, 12.25, 0.5, 1, "happy"))
        wait_for_rows(tmp_path / "db", 2)
        assert sorted(rows(tmp_path / "db", "usage", "started, bytes, typeof(started)")) == [
            (1_800_000_000, 20_000, "integer"),
            (1_800_000_600, 10_000, "integer"),
        ]
        assert rows(tmp_path / "db", "all_time", "bytes") == [(30_000,)]
        assert rows(tmp_path / "db", "since_reboot", "bytes") == [(30_000,)]
        assert rows(tmp_path / "db", "current", "partal_bytes") == [(2_000_000,)]
        assert rows(tmp_path / "db", "worker_share", "partal_bytes") == [(2_000_000,)]


def test_current_follows_a_refresh_and_only_a_tick_notes_the_time(tmp_path: Path) -> None:
    held = [Current(0, 0, 0)]
    with recording(tmp_path / "db", current=lambda: held[0]) as recorder:
        with closing(sqlite3.connect(tmp_path / "db")) as other, other:
            other.execute("UPDATE refreshed SET at = 1")
        held[0] = Current(7, 8, 9)
        recorder.refresh_current()
        wait_until(lambda: rows(tmp_path / "db", "current") == [(7, 8, 9)], what="the refresh")
        assert rows(tmp_path / "db", "refreshed") == [(1,)]
        recorder.refresh_current(tick=True)
        wait_until(lambda: rows(tmp_path / "db", "refreshed") != [(1,)], what="the tick")
        assert abs(rows(tmp_path / "db", "refreshed")[0][0] - time.time()) < 60


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 1000, 10_000, 25_001])
def test_any_number_of_records_at_once_is_written_whole(tmp_path: Path, count: int) -> None:
    with recording(tmp_path / "db") as recorder:
        with holding_the_lock(tmp_path / "db"):
            record_numbers(recorder, *range(count))
        wait_for_rows(tmp_path / "db", count)
        assert numbers(tmp_path / "db") == list(range(count))
        assert_sums_agree(tmp_path / "db")


def test_since_reboot_begins_with_the_service_and_all_time_goes_on(tmp_path: Path) -> None:
    for run in (1, 2, 3):
        with recording(tmp_path / "db") as recorder:
            assert rows(tmp_path / "db", "since_reboot") == [(0, 0, 0, 0, 0)]
            record_numbers(recorder, 10, 20)
            wait_for_rows(tmp_path / "db", 2 * run)
            assert rows(tmp_path / "db", "since_reboot") == [(30, 2, 2, 0, 0)]
            assert rows(tmp_path / "db", "all_time") == [(30 * run, 2 * run, 2 * run, 0, 0)]


def test_an_orderly_end_leaves_no_share_and_nobody_connected(tmp_path: Path) -> None:
    with recording(tmp_path / "db", current=lambda: Current(1, 2, 3)):
        assert rows(tmp_path / "db", "current") == [(1, 2, 3)]
    assert rows(tmp_path / "db", "current") == [(0, 0, 0)]
    assert rows(tmp_path / "db", "worker_share") == []


@pytest.mark.parametrize("umask", [0o777, 0o277, 0o477])
def test_a_umask_that_would_keep_its_owner_out_does_not(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with recording(tmp_path / "db") as recorder:
            record_numbers(recorder, 1)
            wait_for_rows(tmp_path / "db", 1)
            modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("db*")}
    finally:
        os.umask(before)
    assert modes == {0o600}


def test_the_mode_of_the_file_and_of_those_beside_it_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with recording(tmp_path / "db") as recorder:
            record_numbers(recorder, 1)
            wait_for_rows(tmp_path / "db", 1)
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"db": 0o640, "db-wal": 0o640, "db-shm": 0o640}


# A lock, a full disk


def test_a_lock_is_told_of_once_and_every_record_is_there_once_afterwards(tmp_path: Path) -> None:
    warnings: list[str] = []
    with recording(tmp_path / "db", warnings) as recorder:
        with holding_the_lock(tmp_path / "db"):
            record_numbers(recorder, *range(500))
            wait_for_warnings(warnings, 1)
            assert "another program holds its lock; records are kept until it works again (500 now)" in warnings[0]
            record_numbers(recorder, *range(500, 1000))
        wait_for_warnings(warnings, 2)
        assert "works again" in warnings[1]
        wait_for_rows(tmp_path / "db", 1000)
        assert numbers(tmp_path / "db") == list(range(1000))
        assert_sums_agree(tmp_path / "db")
    assert len(warnings) == 2


def test_a_short_lock_is_nothing_to_speak_of(tmp_path: Path) -> None:
    warnings: list[str] = []
    with recording(tmp_path / "db", warnings) as recorder:
        for number in range(5):
            with holding_the_lock(tmp_path / "db"):
                record_numbers(recorder, number)
            wait_for_rows(tmp_path / "db", number + 1)
    assert warnings == []


def test_a_relay_starts_with_a_locked_database_and_records_when_it_is_free(tmp_path: Path) -> None:
    with recording(tmp_path / "db"):
        pass
    with holding_the_lock(tmp_path / "db"):
        recorder = open_recorder(
            usage_db=str(tmp_path / "db"),
            log_fd=None,
            blur_seconds=None,
            current=lambda: Current(0, 0, 0),
            warn=lambda line: None,
        )
        record_numbers(recorder, 1, 2, 3)
    wait_for_rows(tmp_path / "db", 3)
    assert recorder.close(5) == 0


def test_a_trouble_that_shows_after_a_start_with_a_locked_database_does_not_end_recording(tmp_path: Path) -> None:
    path = tmp_path / "db"
    warnings: list[str] = []
    with recording(path):
        pass
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with recording(path, warnings) as recorder:
            other.execute("ALTER TABLE all_time RENAME TO elsewhere")
            other.execute("COMMIT")
            record_numbers(recorder, 1, 2, 3)
            wait_until(lambda: any("all_time" in line for line in warnings), what="the word that a table is missing")
            other.execute("ALTER TABLE elsewhere RENAME TO all_time")
            wait_for_rows(path, 3)
            assert_sums_agree(path)


def test_a_close_ends_in_time_and_tells_how_many_records_a_lock_cost(tmp_path: Path) -> None:
    warnings: list[str] = []
    with recording(tmp_path / "db"):
        pass
    with recording(tmp_path / "db", warnings) as recorder:
        record_numbers(recorder, 1)
        wait_for_rows(tmp_path / "db", 1)
        with holding_the_lock(tmp_path / "db"):
            record_numbers(recorder, 2, 3, 4)
            assert recorder.close(2) == 3
    assert "3 records are lost, the relay had to end before: another program holds its lock" in warnings[-1]


def test_other_programs_read_while_the_relay_writes(tmp_path: Path) -> None:
    with recording(tmp_path / "db") as recorder:
        with closing(sqlite3.connect(f"file:{tmp_path / 'db'}?mode=ro", uri=True, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM usage").fetchall() == [(0,)]
            record_numbers(recorder, *range(100))
            wait_for_rows(tmp_path / "db", 100)
            assert reader.execute("SELECT count(*) FROM usage").fetchall() == [(0,)]
        assert_sums_agree(tmp_path / "db")


def test_a_full_disk_keeps_every_record_until_there_is_space(small_disk: Path) -> None:
    warnings: list[str] = []
    path = small_disk / "db"
    with recording(path, warnings) as recorder:
        record_numbers(recorder, 0)
        wait_for_rows(path, 1)
        fill(small_disk / "ballast")
        record_numbers(recorder, *range(1, 1000))
        wait_for_warnings(warnings, 1)
        assert "no space is left on its disk" in warnings[0]
        record_numbers(recorder, *range(1000, 2000))
        (small_disk / "ballast").unlink()
        wait_for_warnings(warnings, 2)
        assert "works again" in warnings[1]
        wait_for_rows(path, 2000)
        assert sorted(numbers(path)) == list(range(2000))
        assert_sums_agree(path)
    assert len(warnings) == 2


def test_a_relay_starts_on_a_full_disk_and_records_when_there_is_space(small_disk: Path) -> None:
    warnings: list[str] = []
    path = small_disk / "db"
    fill(small_disk / "ballast")
    with recording(path, warnings) as recorder:
        record_numbers(recorder, *range(10))
        wait_for_warnings(warnings, 1)
        assert "no space is left on its disk" in warnings[0]
        (small_disk / "ballast").unlink()
        wait_for_warnings(warnings, 2)
        wait_for_rows(path, 10)
        assert numbers(path) == list(range(10))


# A transaction that fails, in ways that cannot be had for the asking


class _FailingConnection(sqlite3.Connection):
    """Says that a statement failed: before it is carried out, or afterwards, which is the worse of the two."""

    fails_before = ""
    fails_after = ""

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:  # noqa: ANN401 - as SQLite's own
        if _FailingConnection.fails_before and sql.startswith(_FailingConnection.fails_before):
            _FailingConnection.fails_before = ""
            raise sqlite3.OperationalError("disk I/O error")
        cursor = super().execute(sql, *values)
        if _FailingConnection.fails_after and sql.startswith(_FailingConnection.fails_after):
            _FailingConnection.fails_after = ""
            raise sqlite3.OperationalError("disk I/O error")
        return cursor


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[_FailingConnection]:
    real = sqlite3.connect

    def connect(
        database: str, *, uri: bool = False, isolation_level: Literal["IMMEDIATE"] | None = None, timeout: float = 5.0
    ) -> sqlite3.Connection:
        factory = (
            _FailingConnection if threading.current_thread() is not threading.main_thread() else sqlite3.Connection
        )
        return real(database, uri=uri, isolation_level=isolation_level, timeout=timeout, factory=factory)

    monkeypatch.setattr("relay.usage.sqlite.sqlite3.connect", connect)
    monkeypatch.setattr(_FailingConnection, "fails_before", "")
    monkeypatch.setattr(_FailingConnection, "fails_after", "")
    return _FailingConnection


@pytest.mark.parametrize("when", ["fails_before", "fails_after"])
@pytest.mark.parametrize(
    "statement", ["BEGIN", "INSERT INTO usage", "UPDATE since_reboot", "UPDATE all_time", "UPDATE current", "COMMIT"]
)
def test_a_statement_that_fails_neither_loses_nor_doubles_a_record(
    tmp_path: Path, failing: type[_FailingConnection], statement: str, when: str
) -> None:
    warnings: list[str] = []
    with recording(tmp_path / "db", warnings) as recorder:
        record_numbers(recorder, 1, 2, 3)
        wait_for_rows(tmp_path / "db", 3)
        setattr(failing, when, statement)
        record_numbers(recorder, 4, 5, 6)
        wait_for_warnings(warnings, 2)
        record_numbers(recorder, 7)
        wait_for_rows(tmp_path / "db", 7)
        assert numbers(tmp_path / "db") == [1, 2, 3, 4, 5, 6, 7]
        assert_sums_agree(tmp_path / "db")


def test_a_mistake_in_the_program_keeps_the_records_too(tmp_path: Path) -> None:
    warnings: list[str] = []
    broken = [False]

    def current() -> Current:
        if broken[0]:
            raise ZeroDivisionError
        return Current(0, 0, 0)

    with recording(tmp_path / "db", warnings, current=current) as recorder:
        broken[0] = True
        record_numbers(recorder, 1, 2, 3)
        wait_for_warnings(warnings, 1)
        assert "ZeroDivisionError" in warnings[0]
        broken[0] = False
        wait_for_warnings(warnings, 2)
        assert numbers(tmp_path / "db") == [1, 2, 3]


# The file goes away under the relay


@pytest.mark.parametrize("remove", [delete_database, Path.unlink], ids=["with -wal and -shm", "alone"])
def test_a_deleted_database_is_begun_anew_and_the_log_says_what_is_lost(
    tmp_path: Path, remove: Callable[[Path], None]
) -> None:
    warnings: list[str] = []
    path = tmp_path / "db"
    with recording(path, warnings, current=lambda: Current(1, 2, 3)) as recorder:
        record_numbers(recorder, 1, 2, 3)
        wait_for_rows(path, 3)
        remove(path)
        record_numbers(recorder, 4, 5)
        wait_until(path.exists, what="a new file")
        wait_until(lambda: schema_is_there(path), what="its tables")
        wait_for_rows(path, 2)
        record_numbers(recorder, 6)
        wait_for_rows(path, 3)
        assert numbers(path) == [4, 5, 6]
        assert_sums_agree(path)
        assert rows(path, "current") == [(1, 2, 3)]
    assert len(warnings) == 1
    assert "the file was deleted while the relay ran; what it held (3 connections in all) is lost" in warnings[0]
    assert rows(path, "pragma_integrity_check") == [("ok",)]


def schema_is_there(path: Path) -> bool:
    try:
        return rows(path, "usage") is not None
    except sqlite3.OperationalError:
        return False


def test_a_database_that_was_moved_away_keeps_all_it_held(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = tmp_path / "db"
    with recording(path, warnings) as recorder:
        record_numbers(recorder, 1, 2, 3)
        wait_for_rows(path, 3)
        path.rename(tmp_path / "old")
        record_numbers(recorder, 4)
        wait_for_warnings(warnings, 1)
        wait_for_rows(path, 1)
    assert "moved away while the relay ran; what it held (3 connections in all) stays in it" in warnings[0]
    assert numbers(path) == [4]
    assert numbers(tmp_path / "old") == [1, 2, 3]
    for name in (path, tmp_path / "old"):
        assert rows(name, "pragma_integrity_check") == [("ok",)]


@pytest.mark.parametrize("read", [False, True], ids=["unread", "being read"])
def test_a_database_that_was_replaced_goes_on_from_the_one_in_its_place(tmp_path: Path, read: bool) -> None:
    warnings: list[str] = []
    path = tmp_path / "db"
    with recording(tmp_path / "backup") as recorder:
        record_numbers(recorder, 10, 20)
        wait_for_rows(tmp_path / "backup", 2)
    with recording(path, warnings) as recorder, ExitStack() as stack:
        record_numbers(recorder, 1, 2)
        wait_for_rows(path, 2)
        if read:  # so that the former one's -wal cannot be emptied, and still holds its pages
            reader = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM usage").fetchall() == [(2,)]
        record_numbers(recorder, 3)
        wait_for_rows(path, 3)
        (tmp_path / "backup").rename(path)  # and the former one's -wal stays beside it
        record_numbers(recorder, 4)
        wait_for_warnings(warnings, 1)
        wait_for_rows(path, 3)
    assert "the file was deleted while the relay ran; what it held (3 connections in all) is lost" in warnings[0]
    assert numbers(path) == [10, 20, 4]
    assert_sums_agree(path)
    assert rows(path, "pragma_integrity_check") == [("ok",)]


def test_a_database_that_was_emptied_is_begun_anew(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = tmp_path / "db"
    with recording(path, warnings) as recorder:
        record_numbers(recorder, 1, 2, 3)
        wait_for_rows(path, 3)
        os.truncate(path, 0)
        record_numbers(recorder, 4)
        wait_for_warnings(warnings, 1)
        wait_for_rows(path, 1)
    assert numbers(path) == [4]
    assert_sums_agree(path)
    assert rows(path, "pragma_integrity_check") == [("ok",)]


def test_a_wal_that_was_removed_costs_no_record(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = tmp_path / "db"
    with recording(path, warnings) as recorder:
        record_numbers(recorder, 1, 2, 3)
        wait_for_rows(path, 3)
        Path(f"{path}-wal").unlink()
        Path(f"{path}-shm").unlink()
        record_numbers(recorder, 4)
        wait_for_warnings(warnings, 1)
        wait_for_rows(path, 4)
        assert numbers(path) == [1, 2, 3, 4]
    assert "its -wal was removed while the relay ran; nothing is lost" in warnings[0]
    assert rows(path, "pragma_integrity_check") == [("ok",)]


def test_a_folder_that_was_removed_is_waited_for(tmp_path: Path) -> None:
    warnings: list[str] = []
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "db"
    with recording(path, warnings) as recorder:
        shutil.rmtree(folder)
        record_numbers(recorder, 1, 2)
        wait_for_warnings(warnings, 1)
        assert f"its folder {folder} does not exist; make it" in warnings[0]
        folder.mkdir()
        wait_for_warnings(warnings, 3)
        assert "deleted while the relay ran" in warnings[1]
        assert "works again" in warnings[2]
        assert numbers(path) == [1, 2]


@pytest.mark.parametrize("beginning", [0, 4096], ids=["all of it", "all but the first page"])
def test_a_damaged_database_is_told_of_once_and_records_are_kept_until_it_is_moved_away(
    tmp_path: Path, beginning: int
) -> None:
    warnings: list[str] = []
    path = tmp_path / "db"
    with recording(path, warnings) as recorder:
        record_numbers(recorder, *range(2000))
        wait_for_rows(path, 2000)
        with closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        with path.open("r+b") as file:
            file.seek(beginning)
            file.write(os.urandom(path.stat().st_size - beginning))
        if beginning:  # the relay's SQLite reads a page again only when another process has changed the file
            with closing(sqlite3.connect(path)) as other, other:
                other.execute("PRAGMA user_version = 1")
        record_numbers(recorder, 2000, 2001)
        wait_for_warnings(warnings, 1)
        assert "it is damaged" in warnings[0]
        assert "repair it, or move it away" in warnings[0]
        record_numbers(recorder, 2002)
        assert len(warnings) == 1
        for name in ("db-wal", "db-shm", "db"):  # the last one last: then new ones are made
            if (tmp_path / name).exists():
                (tmp_path / name).rename(tmp_path / f"broken-{name}")
        wait_for_warnings(warnings, 3)
        assert "moved away" in warnings[1]
        assert "works again" in warnings[2]
        wait_for_rows(path, 3)
        assert numbers(path) == [2000, 2001, 2002]
        assert_sums_agree(path)


# Which files are taken


def refusal(path: Path | str) -> str:
    warnings: list[str] = []
    with pytest.raises(UsageError) as refused, recording(Path(path), warnings):
        pass
    assert warnings == []  # the error is the only line
    text = str(refused.value)
    assert text.startswith(f"--usage-db {path}: ")
    assert "\n" not in text
    return text


def assert_refused_and_left_alone(path: Path, words: str) -> None:
    before = path.read_bytes()
    beside = sorted(path.parent.iterdir())
    assert words in refusal(path)
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == beside


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("these are my notes\n" * 500)
    assert_refused_and_left_alone(path, "it is not an SQLite database; give another file")


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a database takes longer than a start waits for one that is locked."""
    real = sqlite3.connect

    def connect(*arguments: Any, **keywords: Any) -> sqlite3.Connection:  # noqa: ANN401 - as SQLite's own
        if threading.current_thread() is not threading.main_thread():
            time.sleep(START_PATIENCE + 0.5)
        connection: sqlite3.Connection = real(*arguments, **keywords)
        return connection

    monkeypatch.setattr("relay.usage.sqlite.sqlite3.connect", connect)


@pytest.mark.usefixtures("slow_disk")
def test_on_a_slow_disk_a_start_waits_until_it_knows_whether_the_database_can_be_used(tmp_path: Path) -> None:
    with recording(tmp_path / "db"):
        assert rows(tmp_path / "db", "all_time") == [(0, 0, 0, 0, 0)]  # so the tables are there
    path = tmp_path / "notes"
    path.write_text("these are my notes\n" * 500)
    assert_refused_and_left_alone(path, "it is not an SQLite database; give another file")


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "bookmarks"
    with closing(sqlite3.connect(path)) as other, other:
        other.execute(f"PRAGMA journal_mode = {mode}")
        other.execute("CREATE TABLE usage (started, bytes)")
    assert_refused_and_left_alone(path, "it is another program's database; give another file")


def test_the_twisted_relays_database_is_refused_and_the_importer_named(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    with closing(sqlite3.connect(path)) as other, other:
        other.executescript(
            "CREATE TABLE version (version INTEGER NOT NULL); CREATE TABLE current (connected INTEGER);"
            "CREATE TABLE usage (started INTEGER, total_bytes INTEGER);"
        )
    assert_refused_and_left_alone(path, "misc/import-twisted-usage")


def test_a_database_of_a_newer_relay_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with recording(path):
        pass
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("PRAGMA user_version = 2")
    assert_refused_and_left_alone(path, "a newer relay-gevent made it (schema 2, this one knows 1)")


def test_a_database_with_a_table_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with recording(path):
        pass
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("DROP TABLE all_time")
    assert "its table all_time lacks bytes, connections" in refusal(path)


def test_a_damaged_database_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with recording(path) as recorder:
        record_numbers(recorder, *range(2000))
        wait_for_rows(path, 2000)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(os.urandom(20_000))
    assert "it is damaged" in refusal(path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"its folder {tmp_path / 'missing'} does not exist; make it" in refusal(tmp_path / "missing" / "db")


def test_a_folder_or_a_device_or_a_file_used_as_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "it is a folder; name a file" in refusal(tmp_path)
    assert "it is not a regular file" in refusal("/dev/null")
    assert "is not a folder; name a file in one" in refusal(tmp_path / "file" / "db")


@pytest.mark.parametrize(
    ("of_folder", "of_file", "words"),
    [
        (0o555, None, "cannot be written, and SQLite makes two files there"),
        (0o555, 0o666, "cannot be written, and SQLite makes two files there"),
        (0o777, 0o444, "it cannot be written; change its mode or owner"),
    ],
    ids=["no file in a folder for reading", "a file in a folder for reading", "a file for reading"],
)
def test_what_may_not_be_written_is_refused(open_folder: Path, of_folder: int, of_file: int | None, words: str) -> None:
    folder = open_folder / "folder"
    folder.mkdir()
    if of_file is not None:
        with recording(folder / "db"):
            pass
        (folder / "db").chmod(of_file)
    folder.chmod(of_folder)
    if os.geteuid() != 0:
        assert words in refusal(folder / "db")
        return
    # Root may write anywhere, so this is asked as an ordinary user, in a process of its own.
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os._exit(0 if words in refusal(folder / "db") else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_read_only_file_system_is_refused(small_disk: Path) -> None:
    with recording(small_disk / "db"):
        pass
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for database in ("db", "another"):
        assert "its file system is mounted read-only" in refusal(small_disk / database)


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_disk_without_a_free_inode_is_a_full_one(tmp_path: Path, left: int) -> None:
    with disk_of(f"1m,nr_inodes={left}", tmp_path) as disk:
        warnings: list[str] = []
        with recording(disk / "db", warnings) as recorder:
            recorder.record(Record(1.0, 2.0, None, 0, "lonely"))
            wait_until(lambda: "no inode is left on its disk (df -i)" in "".join(warnings), 10, "it says so")
            subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(disk)], check=True)
            wait_until(lambda: "works again" in "".join(warnings), 10, "it goes on")
        with closing(sqlite3.connect(disk / "db")) as database:
            assert database.execute("SELECT count(*) FROM usage").fetchone() == (1,)


def test_an_empty_file_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / "db").touch(mode=0o600)
    with recording(tmp_path / "db") as recorder:
        record_numbers(recorder, 1)
        wait_for_rows(tmp_path / "db", 1)
    assert stat.S_IMODE((tmp_path / "db").stat().st_mode) == 0o600


def test_a_database_without_tables_counts_as_missing(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "db")) as other:
        other.execute("PRAGMA journal_mode = wal")
        other.execute("VACUUM")
    with recording(tmp_path / "db") as recorder:
        record_numbers(recorder, 1)
        wait_for_rows(tmp_path / "db", 1)


def test_a_leftover_wal_of_a_database_that_was_removed_is_not_taken_for_the_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with recording(path) as recorder:
        record_numbers(recorder, 1, 2, 3)
        wait_for_rows(path, 3)
        shutil.copy(f"{path}-wal", tmp_path / "wal")
        shutil.copy(f"{path}-shm", tmp_path / "shm")
    path.unlink()
    shutil.copy(tmp_path / "wal", f"{path}-wal")
    shutil.copy(tmp_path / "shm", f"{path}-shm")
    with recording(path) as recorder:
        record_numbers(recorder, 4)
        wait_for_rows(path, 1)
        assert numbers(path) == [4]


def test_the_path_may_be_a_symbolic_link_and_hold_any_character(tmp_path: Path) -> None:
    real = tmp_path / os.fsdecode("odd name?#%20&é".encode() + b"\xff")  # not UTF-8, which names need not be
    (tmp_path / "link").symlink_to(real)
    with recording(tmp_path / "link") as recorder:
        record_numbers(recorder, 1)
        wait_until(real.exists, what="the file")
    with closing(schema.open_database(str(real))) as opened:
        assert opened.execute("SELECT bytes FROM usage").fetchall() == [(1,)]


def test_another_program_may_open_the_database_as_the_relay_does(tmp_path: Path) -> None:
    with closing(schema.open_database(str(tmp_path / "db"))) as opened:
        assert opened.execute("SELECT * FROM imported").fetchall() == []
        assert opened.execute("SELECT * FROM all_time").fetchall() == []
    with pytest.raises(UsageError, match=r"^/dev/null: it is not a regular file"):
        schema.open_database("/dev/null")

"""The two destinations side by side, the start and the end, and what recording costs the relay."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Set as AbstractSet
from contextlib import closing
from pathlib import Path

import pytest

from relay.usage.record import Current, Record
from relay.usage.recorder import UsageError
from relay.usage.sign import Sign
from relay.usage.trouble import LOCKED_PATIENCE, Trouble
from relay.usage.writer import Request, Writer
from tests.support.harness import wait_until
from tests.support.usage_records import (
    append_to,
    holding_the_lock,
    numbered,
    numbers_of_lines,
    record_numbers,
    recorder_of,
    rows,
    wait_for_rows,
)
from tests.support.usage_worker import UsageWorker


def writer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("writer of")]


def test_a_record_is_the_same_in_the_database_and_in_its_line(tmp_path: Path) -> None:
    fd = append_to(tmp_path / "log")
    recorder = recorder_of(tmp_path / "db", fd, [])
    record_numbers(recorder, *range(100))
    assert recorder.close(5) == 0
    os.close(fd)
    assert numbers_of_lines((tmp_path / "log").read_bytes()) == list(range(100))
    assert rows(tmp_path / "db", "usage", "bytes") == [(number,) for number in range(100)]


def test_a_log_that_stalls_for_too_long_loses_records_but_no_memory_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.usage.writer.MOST_KEPT", 300)
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    warnings: list[str] = []
    recorder = recorder_of(tmp_path / "db", write_end, warnings)
    for number in range(1000):
        record_numbers(recorder, number)
        if number % 100 == 99:
            wait_for_rows(tmp_path / "db", number + 1)
            # Nobody reads the log: it has written what there was room for, and what comes now is kept, or lost.
            wait_until(lambda: any("; records are kept" in warning for warning in warnings), what="it is in trouble")
    assert any("300 records are kept, there is no room for more" in warning for warning in warnings)
    os.set_blocking(read_end, False)
    with open(read_end, "rb", buffering=0) as reader:
        lines = b""

        def read_on() -> bytes:
            nonlocal lines
            lines += reader.read(65536) or b""
            return lines

        wait_until(lambda: read_on() and any("there was no room to keep them" in warning for warning in warnings))
        record_numbers(recorder, 1000)
        wait_until(lambda: read_on().endswith(b"\n") and numbers_of_lines(lines)[-1] == 1000, what="the last one")
        assert recorder.close(5) == 0
    os.close(write_end)
    numbers = numbers_of_lines(lines)
    lost = 1001 - len(numbers)
    assert numbers == [*range(1000 - lost), 1000]
    assert 300 < len(numbers) < 1000
    assert any(f"{lost} records are lost, there was no room to keep them" in warning for warning in warnings)


def test_a_stalled_log_does_not_hold_up_the_database(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    warnings: list[str] = []
    recorder = recorder_of(tmp_path / "db", write_end, warnings)
    record_numbers(recorder, *range(1000))
    wait_for_rows(tmp_path / "db", 1000)
    # The lines that were in the pipe are not lost: they are there for who reads. The others were never written.
    left = recorder.close(0.5)
    os.close(write_end)
    with open(read_end, "rb") as reader:
        assert numbers_of_lines(reader.read()) == list(range(1000 - left))
    assert left > 0
    assert any(f"{left} records are lost" in warning for warning in warnings)


def test_a_locked_database_does_not_hold_up_the_log(tmp_path: Path) -> None:
    fd = append_to(tmp_path / "log")
    recorder = recorder_of(tmp_path / "db", fd, [])
    with holding_the_lock(tmp_path / "db"):
        record_numbers(recorder, *range(1000))
        wait_until(lambda: (tmp_path / "log").read_bytes().count(b"\n") == 1000, what="all lines")
        assert rows(tmp_path / "db", "usage") == []
    wait_for_rows(tmp_path / "db", 1000)
    assert recorder.close(5) == 0
    os.close(fd)


class Refusing:
    """A destination that takes nothing while it `refuses`, which for an hour is nothing to speak of."""

    name = "a destination"
    option = "--usage-db a-destination"

    def __init__(self) -> None:
        self.refuses = False
        self.attempts = 0  # that failed

    def write(self, kept: deque[Record], requests: AbstractSet[Request]) -> None:
        """Take everything, or nothing."""
        if self.refuses:
            self.attempts += 1
            raise Trouble("it refuses", passing=True, patience=3600.0)
        kept.clear()

    def close(self) -> None:
        """Nothing is open."""


class Given(Sign):
    """Who gives the sign."""

    def __init__(self) -> None:
        super().__init__()
        self.by: set[str] = set()

    def give(self, name: str) -> None:
        """Note it."""
        self.by.add(name)

    def take_back(self, name: str) -> None:
        """Note it."""
        self.by.discard(name)


def test_what_one_attempt_could_not_write_is_known_to_be_held_back_until_all_is_written() -> None:
    destination, sign = Refusing(), Given()
    warnings: list[str] = []
    writer = Writer(destination, warnings.append, sign)
    writer.start()
    destination.refuses = True
    writer._backoff = 3600.0  # as far as pauses go that get longer and longer
    writer.request(Request.REFRESH)
    wait_until(lambda: destination.attempts == 1, what="the first attempt")
    assert sign.by == set(), "nothing is held back yet"
    writer.record(numbered(1))
    wait_until(lambda: sign.by == {destination.name}, what="the sign")
    assert warnings == [], "it is nothing to speak of yet"
    destination.refuses = False
    writer.leave(time.monotonic() + 5)
    assert writer.wait() == 0
    assert sign.by == set()


def test_what_is_told_in_the_database_of_records_that_wait_is_about_lines_and_not_of_a_moment(
    tmp_path: Path,
) -> None:
    read_end, write_end = os.pipe()
    warnings: list[str] = []
    recorder = recorder_of(tmp_path / "db", write_end, warnings)
    database = f"usage database {tmp_path / 'db'}: "
    with holding_the_lock(tmp_path / "db"):
        record_numbers(recorder, 1)
        wait_until(lambda: any(warning.startswith(database) for warning in warnings), what="the lock is told of")
        assert recorder.kept_lines() == 0
    wait_for_rows(tmp_path / "db", 1)
    os.close(read_end)
    record_numbers(recorder, 2)
    wait_until(lambda: any("its reader is gone" in warning for warning in warnings), what="the lines are in trouble")
    assert recorder._log is not None
    recorder._log._outage.since = time.monotonic() + 60.0  # however long this test takes
    assert recorder.kept_lines() == 0
    recorder._log._outage.since = time.monotonic() - LOCKED_PATIENCE
    assert recorder.kept_lines() == 1
    recorder.hurry()
    recorder.close(0.1)
    os.close(write_end)


def test_recording_only_queues_even_when_both_destinations_are_stuck(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    recorder = recorder_of(tmp_path / "db", write_end, [])
    with holding_the_lock(tmp_path / "db"):
        # More than a pipe holds, and nobody reads: if record() waited for anything, this would never end.
        record_numbers(recorder, *range(20_000))
        recorder.refresh_current()
        recorder.refresh_current(tick=True)
        assert recorder.close(1) == 20_000
    wait_until(lambda: writer_threads() == [], what="the end of the attempts that were under way")
    os.close(write_end)
    os.close(read_end)


def test_in_a_hurry_what_works_is_written_to_the_end_and_what_does_not_is_given_up(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    warnings: list[str] = []
    recorder = recorder_of(tmp_path / "db", write_end, warnings)
    with holding_the_lock(tmp_path / "db"):
        record_numbers(recorder, *range(1000))
        wait_until(lambda: any("; records are kept" in warning for warning in warnings), what="the log is in trouble")
    recorder.hurry()
    left = recorder.close(3600)
    os.close(write_end)
    with open(read_end, "rb") as reader:
        assert numbers_of_lines(reader.read()) == list(range(1000 - left))
    assert any(f"{left} records are lost" in warning for warning in warnings)
    assert len(rows(tmp_path / "db", "usage")) == 1000
    assert not writer_threads()


def test_nothing_is_left_running_after_a_close(tmp_path: Path) -> None:
    fd = append_to(tmp_path / "log")
    before = len(os.listdir("/proc/self/fd"))
    recorder = recorder_of(tmp_path / "db", fd, [])
    assert len(writer_threads()) == 2
    record_numbers(recorder, 1)
    assert recorder.close(5) == 0
    assert writer_threads() == []
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)
    # The last one to leave tidies up, so that a single file is the whole database.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db", "log"]


def test_a_database_that_is_refused_leaves_nothing_running(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("my notes")
    before = len(os.listdir("/proc/self/fd"))
    fd = append_to(tmp_path / "log")
    with pytest.raises(UsageError):
        recorder_of(tmp_path / "notes", fd, [])
    os.close(fd)
    assert writer_threads() == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_recorder_of_nothing_takes_records_and_forgets_them() -> None:
    recorder = recorder_of(None, None, [])
    recorder.record(numbered(1))
    recorder.refresh_current(tick=True)
    assert recorder.close(1) == 0


def test_what_is_written_survives_a_kill(tmp_path: Path) -> None:
    fd = append_to(tmp_path / "log")
    with UsageWorker("--usage-db", str(tmp_path / "db"), "--log-fd", str(fd), pass_fds=(fd,)) as worker:
        worker.ask("record 10 1 happy")
        wait_for_rows(tmp_path / "db", 10)
        wait_until(lambda: (tmp_path / "log").read_bytes().count(b"\n") == 10, what="the lines")
        worker.kill()
    os.close(fd)
    with closing(sqlite3.connect(tmp_path / "db")) as other:
        assert other.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert len(rows(tmp_path / "db", "usage")) == 10


def test_nothing_that_is_written_with_blur_holds_an_exact_time(tmp_path: Path) -> None:
    fd = append_to(tmp_path / "log")
    recorder = recorder_of(tmp_path / "db", fd, [], blur=86_400, current=lambda: Current(1, 1, 123_456_789))
    recorder.record(numbered(123_456_789))
    wait_for_rows(tmp_path / "db", 1)
    recorder.close(5)
    os.close(fd)
    written = (tmp_path / "db").read_bytes() + (tmp_path / "log").read_bytes()
    assert b"123456789" not in written
    assert (123_456_789).to_bytes(4, "big") not in written
    assert (1_800_000_000).to_bytes(4, "big") not in written  # 1 800 000 000.25, of which nothing may be left
    assert b"1800000000" not in written
    started = rows(tmp_path / "db", "usage", "started")[0][0]
    assert started == 1_800_000_000 // 86_400 * 86_400

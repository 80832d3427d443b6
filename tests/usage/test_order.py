"""With blur, neither the order of rows nor the times of other things say when a connection ended."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from relay.usage import rows as rows_module
from relay.usage.record import Record
from relay.usage.recorder import Recorder
from relay.usage.unhurried import LEAST_SECONDS, MOST_LINES, MOST_SECONDS, Unhurried
from tests.support.harness import CHECKOUT, Relay, Workers, connect, met, read_to_end, wait_until
from tests.support.usage_records import assert_sums_agree, holding_the_lock, recorder_of, recording, rows, wait_for_rows
from tests.support.usage_worker import UsageWorker

DOCUMENTATION = CHECKOUT / "docs" / "usage-logs.md"


def record_in_order(recorder: Recorder, *ends: int) -> None:
    """Record connections that ended one after another; blur leaves their durations, by which they are told."""
    for end in ends:
        recorder.record(Record(1_800_000_000.25, float(end), 0.25, 10_000, "happy"))


def ends(path: Path) -> list[int]:
    """Which connections there are, in the order of their rows."""
    return [int(total_time) for (total_time,) in rows(path, "usage", "total_time")]


def agreement(values: list[int]) -> float:
    """How much a sequence is in order: 1 when it ascends, -1 when it descends, about 0 when it is in none."""
    return statistics.correlation(range(len(values)), [float(value) for value in values])


@pytest.mark.parametrize("at_once", [1, 500], ids=["one at a time", "all at once"])
def test_blurred_rows_are_in_no_order(tmp_path: Path, at_once: int) -> None:
    with recording(tmp_path / "db", blur=60) as recorder:
        for begin in range(0, 500, at_once):
            record_in_order(recorder, *range(begin, begin + at_once))
            wait_for_rows(tmp_path / "db", begin + at_once)
        found = ends(tmp_path / "db")
        assert sorted(found) == list(range(500))
        assert abs(agreement(found)) < 0.25
        assert_sums_agree(tmp_path / "db")


def test_exact_rows_are_in_the_order_in_which_connections_ended(tmp_path: Path) -> None:
    with recording(tmp_path / "db") as recorder:
        record_in_order(recorder, *range(500))
        wait_for_rows(tmp_path / "db", 500)
        assert ends(tmp_path / "db") == list(range(500))
        assert rows(tmp_path / "db", "usage", "rowid") == [(number,) for number in range(1, 501)]


def test_rows_that_were_in_order_before_stay_and_new_ones_come_in_none(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with recording(path) as recorder:
        record_in_order(recorder, *range(100))
        wait_for_rows(path, 100)
    with recording(path, blur=60) as recorder:
        record_in_order(recorder, *range(100, 400))
        wait_for_rows(path, 400)
        found = ends(path)
        assert found[:100] == list(range(100))
        assert abs(agreement(found[100:])) < 0.3
        assert_sums_agree(path)


def test_the_order_of_old_rows_is_taken_away_as_the_documentation_says(tmp_path: Path) -> None:
    path = tmp_path / "db"
    (command,) = re.findall(r"^ +sqlite3 .* '(BEGIN IMMEDIATE; .*)'$", DOCUMENTATION.read_text(), re.MULTILINE)
    with recording(path) as recorder:
        record_in_order(recorder, *range(500))
        wait_for_rows(path, 500)
        with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as other:
            other.executescript(command)
        record_in_order(recorder, 500)
        wait_for_rows(path, 501)
        found = ends(path)
        assert sorted(found) == list(range(501))
        assert abs(agreement(found[:500])) < 0.25
        assert rows(path, "pragma_integrity_check") == [("ok",)]


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="needs sqlite3(1): apt-get install sqlite3")
@pytest.mark.parametrize(("begin", "deleted"), [("DELETE FROM usage WHERE", {11}), ("BEGIN IMMEDIATE", set())])
def test_a_printed_command_that_writes_waits_for_the_relay(tmp_path: Path, begin: str, deleted: set[int]) -> None:
    path = tmp_path / "usage.sqlite"
    (command,) = re.findall(rf"^ +(sqlite3 .*['\"]{begin}.*)$", DOCUMENTATION.read_text(), re.MULTILINE)
    with recording(path, blur=60) as recorder:
        record_in_order(recorder, *range(11))
        recorder.record(Record(1_000_000_000.0, 11.0, 0.25, 10_000, "happy"))  # in 2001
        wait_for_rows(path, 12)
        with holding_the_lock(path):
            process = subprocess.Popen(["/bin/sh", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)  # in which it would have given up
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == (0, "")
        assert set(ends(path)) == set(range(12)) - deleted


@pytest.mark.parametrize("count", [1, 2], ids=["one worker", "two workers"])
def test_a_relay_leaves_no_order_of_ends(tmp_path: Path, count: int) -> None:
    with Workers(tmp_path, "--blur-usage", "60", count=count) as workers:
        for number in range(90):
            left, right = met(workers.port)
            with left, right:
                left.sendall(bytes(10_000 * number + 1))
                left.shutdown(socket.SHUT_WR)
                while right.recv(1 << 20):
                    pass
            workers.wait_for_rows("usage", number + 1)
        found = [row["bytes"] for row in workers.rows("usage")]
    assert sorted(found) == [10_000 * number for number in range(1, 91)]
    assert abs(agreement(found)) < 0.5


def test_a_number_that_is_taken_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rows_module.draw_numbers
    drawn = [[7], [7], [7]]
    monkeypatch.setattr(rows_module, "draw_numbers", lambda count: drawn.pop() if drawn else real(count))
    warnings: list[str] = []
    with recording(tmp_path / "db", warnings, blur=60) as recorder:
        for end in (0, 1):
            record_in_order(recorder, end)
            wait_for_rows(tmp_path / "db", end + 1)
        assert drawn == []
        assert_sums_agree(tmp_path / "db")
    assert warnings == []


def test_numbers_are_drawn_from_all_that_a_row_may_have() -> None:
    drawn = rows_module.draw_numbers(10_000)
    assert len(set(drawn)) == 10_000
    assert min(drawn) >= 0
    assert max(drawn) < 2**63
    assert 0.4 < sum(number > 2**62 for number in drawn) / 10_000 < 0.6


def test_the_rows_of_a_transaction_are_few_statements() -> None:
    assert max(rows_module._INSERT_NUMBERED) * 6 <= 999


class _CommitFailsAfterwards(sqlite3.Connection):
    """Says once that a COMMIT failed, when it was carried out."""

    armed = False

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        cursor = super().execute(sql, *values)  # type: ignore[arg-type]
        if sql == "COMMIT" and _CommitFailsAfterwards.armed:
            _CommitFailsAfterwards.armed = False
            raise sqlite3.OperationalError("disk I/O error")
        return cursor


def test_blurred_rows_whose_commit_is_in_doubt_are_neither_lost_nor_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect

    def connect(database: str, **keywords: object) -> sqlite3.Connection:
        mine = threading.current_thread() is threading.main_thread()
        connection: sqlite3.Connection = real(
            database,
            factory=sqlite3.Connection if mine else _CommitFailsAfterwards,
            **keywords,  # type: ignore[call-overload]
        )
        return connection

    monkeypatch.setattr("relay.usage.sqlite.sqlite3.connect", connect)
    with recording(tmp_path / "db", blur=60) as recorder:
        record_in_order(recorder, 1)
        wait_for_rows(tmp_path / "db", 1)
        _CommitFailsAfterwards.armed = True
        record_in_order(recorder, 2, 3, 4)
        wait_until(lambda: not _CommitFailsAfterwards.armed, what="the COMMIT that is in doubt")
        record_in_order(recorder, 5)
        wait_until(lambda: 5 in ends(tmp_path / "db"), what="the one that comes after it")
        assert sorted(ends(tmp_path / "db")) == [1, 2, 3, 4, 5]
        assert_sums_agree(tmp_path / "db")


# Times of other things


def test_no_event_of_a_client_sets_the_time_of_the_last_tick(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with UsageWorker("--usage-db", str(path), "--blur-usage", "60") as worker:
        (began,) = rows(path, "refreshed")
        wait_until(lambda: time.time() > began[0] + 2, what="two seconds to pass")
        for end in ("", "-wal", "-shm"):
            os.unlink(f"{path}{end}")
        worker.ask("record 1 10 happy")  # which finds that a new file has to be made
        wait_until(lambda: path.exists() and is_one_row(path), what="a row in the new file")
        assert rows(path, "refreshed") == [began]


def is_one_row(path: Path) -> bool:
    with contextlib.suppress(sqlite3.Error):
        return len(rows(path, "usage")) == 1
    return False


@pytest.mark.parametrize(("blur", "seconds"), [(1, 60), (300, 300), (86_400, 600)])
def test_a_line_about_records_comes_at_a_moment_that_was_fixed_before(
    monkeypatch: pytest.MonkeyPatch, blur: int, seconds: float
) -> None:
    now = [1000.0]
    delays: list[float] = []
    pending: list[Callable[[], None]] = []

    class Timer:
        daemon = False

        def __init__(self, delay: float, function: Callable[[], None]) -> None:
            delays.append(delay)
            pending.append(function)

        def start(self) -> None:
            assert self.daemon

        def cancel(self) -> None:
            pending.clear()

    monkeypatch.setattr("relay.usage.unhurried.time.monotonic", lambda: now[0])
    monkeypatch.setattr("relay.usage.unhurried.threading.Timer", Timer)
    said: list[str] = []
    unhurried = Unhurried(said.append, blur)
    for after in (0.5, 7.25, seconds - 0.5):
        now[0] = 1000.0 + after
        unhurried(f"after {after}")
    assert said == []
    assert delays == [seconds - 0.5], "one for all"
    now[0] = 1000.0 + seconds
    pending.pop()()
    assert len(said) == 3
    now[0] += seconds * 2.25
    unhurried("later")
    assert delays[1:] == [seconds * 0.75]
    unhurried.close()
    unhurried("after the end")
    assert said[3:] == ["later", "after the end"]
    assert LEAST_SECONDS <= seconds <= MOST_SECONDS


def test_of_very_many_troubles_the_first_and_the_last_are_told_and_the_others_counted() -> None:
    said: list[str] = []
    unhurried = Unhurried(said.append, 60)
    for number in range(1000):
        unhurried(str(number))
    assert said == []
    unhurried.close()
    told = [*map(str, range(MOST_LINES)), *map(str, range(1000 - MOST_LINES, 1000))]
    assert [line for line in said if line.isdigit()] == told
    assert said[MOST_LINES] == f"{1000 - 2 * MOST_LINES} further lines about trouble with recording are left out"


def test_a_trouble_is_told_later_and_at_the_end_at_the_latest(tmp_path: Path) -> None:
    path = tmp_path / "db"
    warnings: list[str] = []
    recorder = recorder_of(path, None, warnings, blur=60)
    with holding_the_lock(path):
        record_in_order(recorder, 1)
        wait_until(lambda: len(threads_called("Timer")) > 0, what="a line that waits to be said")
        assert warnings == []
    wait_for_rows(path, 1)
    assert recorder.close(5) == 0
    assert len(warnings) == 2
    assert "another program holds its lock; records are kept" in warnings[0]
    assert "works again; the 1 records" in warnings[1], "and not after how long: it began with the end of a connection"
    wait_until(lambda: not threads_called("Timer"), what="the end of the timer")


def test_where_no_thread_is_to_be_had_a_trouble_costs_no_record_and_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(timer: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    path = tmp_path / "db"
    warnings: list[str] = []
    recorder = recorder_of(path, None, warnings, blur=60)
    monkeypatch.setattr(threading.Timer, "start", refuse)
    with holding_the_lock(path):
        record_in_order(recorder, 1)
        wait_until(recorder.held_back, what="it is held back, and the line could not be told")
    wait_for_rows(path, 1)
    monkeypatch.undo()
    with holding_the_lock(path):
        record_in_order(recorder, 1)
        wait_until(lambda: len(threads_called("Timer")) > 0, what="a line that waits to be said")
    wait_for_rows(path, 2)
    assert recorder.close(5) == 0
    assert len(warnings) == 4


def threads_called(word: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, getattr(threading, word))]


def test_without_blur_a_trouble_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "db"
    warnings: list[str] = []
    with recording(path, warnings) as recorder:
        with holding_the_lock(path):
            record_in_order(recorder, 1)
            wait_until(lambda: warnings, what="a line")
        assert "another program holds its lock; records are kept" in warnings[0]


def test_a_bound_that_is_met_is_told_of_at_the_end_of_a_short_life_and_not_when_it_was(tmp_path: Path) -> None:
    with Relay(tmp_path, "--blur-usage", "600", "--max-handshakes", "1", "--grace", "0", recording=True) as relay:
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(connect(relay.port)) for _ in range(5)]
            for sock in slow[:4]:
                assert read_to_end(sock) == b"bad handshake\n"
            told_by = time.monotonic() + 2.5  # it looks every second at what there is to be told
            wait_until(lambda: time.monotonic() > told_by, what="that to have been twice")
            assert "--max-handshakes" not in relay.log_text()
        relay.stop()
        assert relay.log_text().count("--max-handshakes: turned away") == 1

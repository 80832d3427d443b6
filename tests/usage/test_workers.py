"""Several processes on one database: together they are one relay, whoever comes, goes or is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import threading
from collections import deque
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from relay.usage import lifeline, processes
from relay.usage.database import Database
from relay.usage.processes import is_living, process_start
from relay.usage.told import Description
from relay.usage.writer import Request
from tests.support.harness import wait_until
from tests.support.usage_records import (
    assert_sums_agree,
    holding_the_lock,
    nobody,
    numbered,
    numbers,
    recording,
    rows,
)
from tests.support.usage_worker import UsageWorker


def on(path: Path) -> UsageWorker:
    return UsageWorker("--usage-db", str(path))


def since_reboot(path: Path) -> int:
    (row,) = rows(path, "since_reboot", "connections")
    return int(row[0])


def test_eight_processes_write_5000_records_each_and_the_sums_agree(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with ExitStack() as stack:
        workers = [stack.enter_context(on(path)) for _ in range(8)]
        for number, worker in enumerate(workers):
            worker.ask(f"current {number} 1 1000")
            # 5 times 1000, so that the transactions of all are mixed.
            for mood in ("happy", "lonely", "errory", "happy", "happy"):
                worker.ask(f"record 1000 {number + 1} {mood}")
        threads = [threading.Thread(target=worker.ask, args=("close 60",)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in workers:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
            worker.process.stdin = None
            assert worker.end() == 0
    assert [worker.warnings for worker in workers] == [""] * 8
    assert len(numbers(path)) == 40_000
    assert_sums_agree(path)
    assert rows(path, "all_time") == [(36 * 5000, 40_000, 24_000, 8000, 8000)]
    assert rows(path, "since_reboot") == rows(path, "all_time")
    assert rows(path, "current") == [(0, 0, 0)]
    assert rows(path, "worker_share") == []


def test_workers_that_all_start_at_once_begin_one_service(tmp_path: Path) -> None:
    path = tmp_path / "db"
    for service in (1, 2):
        with ExitStack() as stack:
            workers = [on(path) for _ in range(8)]  # all started before the first has answered
            for worker in workers:
                stack.enter_context(worker)
                worker.ask("record 10 1 happy")
            for worker in workers:
                assert worker.ask("close 30") == "0"
        assert since_reboot(path) == 80
        assert len(numbers(path)) == 80 * service


def test_the_service_does_not_go_on_with_a_worker_that_has_begun_and_not_signed_on_yet(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as former:
        former.ask("record 5 1 happy")
        assert former.ask("close 30") == "0"
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        with holding_the_lock(path):
            late = on(path)
            stack.push(late)
            wait_until(lambda: lifeline.count_held(file.fileno()) == 1, what="its lifeline")
            os.kill(late.pid, signal.SIGSTOP)
        first = stack.enter_context(on(path))
        assert since_reboot(path) == 0
        first.ask("record 1 1 happy")
        os.kill(late.pid, signal.SIGCONT)
        assert late.answer() == "ready"
        late.ask("record 1 1 happy")
        assert first.ask("close 30") == late.ask("close 30") == "0"
    assert since_reboot(path) == 2, "they are one service"


def test_the_service_does_not_go_on_with_a_worker_that_has_signed_off_and_still_has_the_file_open(
    tmp_path: Path,
) -> None:
    path = tmp_path / "db"
    with closing(Database(str(path), None, nobody, Description, print)) as former:
        former.write(deque([numbered(1)]), {Request.LEAVE})
        assert since_reboot(path) == 1
        with on(path):
            assert since_reboot(path) == 0


def test_the_service_does_not_go_on_with_a_worker_that_is_about_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db"
    with on(path) as former:
        former.ask("record 1 1 happy")
        wait_until(lambda: since_reboot(path) == 1, what="its record")
        # As when it was killed, and the kernel has not closed its files yet.
        monkeypatch.setattr("relay.usage.shares.is_ending", lambda pid, start: pid == former.pid)
        with recording(path):
            assert since_reboot(path) == 0


def test_current_is_the_sum_over_the_workers_that_live(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as one, on(path) as other:
        one.ask("current 1 2 30")
        one.ask("refresh")
        other.ask("current 10 20 300")
        other.ask("refresh")
        wait_until(lambda: rows(path, "current") == [(11, 22, 330)], what="the sum of both")
        other.kill()
        one.ask("refresh")
        wait_until(lambda: rows(path, "current") == [(1, 2, 30)], what="what is left")
        assert len(rows(path, "worker_share")) == 1


@pytest.mark.parametrize(("first", "second"), [(["--blur-usage", "600"], []), ([], ["--blur-usage", "60"])])
def test_who_rounds_otherwise_than_those_that_live_records_nothing_beside_them(
    tmp_path: Path, first: list[str], second: list[str]
) -> None:
    path = tmp_path / "db"
    with UsageWorker("--usage-db", str(path), *first) as worker, UsageWorker("--usage-db", str(path), *first) as other:
        worker.ask("record 1 10 happy")
        wait_until(lambda: len(numbers(path)) == 1, what="the record")
        refused = r"has ended: --usage-db .*: another relay records into it with .*--blur-usage"
        with pytest.raises(AssertionError, match=refused), UsageWorker("--usage-db", str(path), *second) as wrong:
            wrong.ask("record 1 10 happy")
        worker.ask("record 1 10 happy")
        wait_until(lambda: len(numbers(path)) == 2, what="the next one")
        assert worker.ask("close 30") == other.ask("close 30") == "0"
    with UsageWorker("--usage-db", str(path), *second) as later:  # whoever changes it, and has all of them end
        later.ask("record 1 10 happy")
        assert later.ask("close 30") == "0"
    assert len(numbers(path)) == 3


def test_nor_does_one_that_could_ask_only_later_when_those_have_gone(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with UsageWorker("--usage-db", str(path), "--blur-usage", "600") as worker, ExitStack() as stack:
        worker.ask("record 1 10 happy")
        wait_until(lambda: len(numbers(path)) == 1, what="the record")
        with holding_the_lock(path):
            exact = stack.enter_context(on(path))
            exact.ask("record 1 10 happy")
        while "another relay records into it with --blur-usage 600" not in (line := exact.read_warning()):
            assert line, "it says so"
        assert worker.ask("close 30") == "0"
        assert exact.ask("close 1") == "1", "it is lost, and not written beside the other"
    assert [started % 600 for (started,) in rows(path, "usage", "started")] == [0]
    with on(path) as later:  # it may, when it is started anew
        later.ask("record 1 10 happy")
        assert later.ask("close 30") == "0"
    assert len(numbers(path)) == 2


def test_since_reboot_goes_on_while_one_worker_of_the_service_lives(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with ExitStack() as stack:
        former = stack.enter_context(on(path))
        former.ask("record 1 5 happy")
        for count in (2, 3, 4):
            wait_until(lambda count=count: since_reboot(path) == count - 1, what="the former worker's record")  # type: ignore[misc]
            latter = stack.enter_context(on(path))
            latter.ask("record 1 5 happy")
            former.kill()  # in turn, so that there is always one, and never the first for long
            former = latter
            wait_until(lambda count=count: since_reboot(path) == count, what="both workers' records")  # type: ignore[misc]


def test_a_service_that_was_killed_begins_anew_at_its_next_start(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as worker:
        worker.ask("current 5 5 5")
        worker.ask("record 3 5 happy")
        wait_until(lambda: since_reboot(path) == 3, what="the records")
        worker.kill()
    assert rows(path, "current") == [(5, 5, 5)]  # nobody was there to say otherwise
    with on(path):
        assert since_reboot(path) == 0
        assert rows(path, "current") == [(0, 0, 0)]
        assert rows(path, "all_time", "connections") == [(3,)]


def test_a_kill_right_after_records_were_written_leaves_the_database_whole(tmp_path: Path) -> None:
    path = tmp_path / "db"
    for run in range(1, 4):
        with on(path) as worker:
            worker.ask("record 500 1 happy")
            wait_until(lambda run=run: len(numbers(path)) == 500 * run, what="the rows")  # type: ignore[misc]
            worker.ask("record 5000 1 lonely")
            worker.kill()  # while it writes, as like as not
        with closing(sqlite3.connect(path)) as other, other:
            assert other.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert_sums_agree(path)
            # As if the killed one had not begun with its last ones, to have the same numbers in each run.
            (count,) = other.execute("SELECT count(*) FROM usage WHERE result = 'lonely'").fetchone()
            other.execute("DELETE FROM usage WHERE result = 'lonely'")
            other.execute(
                "UPDATE all_time SET bytes = bytes - ?, connections = connections - ?, mood_lonely = 0", (count, count)
            )


def test_the_share_of_a_process_whose_number_another_one_has_now_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as worker:
        worker.ask("refresh")
        with closing(sqlite3.connect(path)) as other, other:
            start = process_start(os.getpid())
            assert start is not None
            boot, ticks = start.split("/")
            shares = [
                (os.getpid(), start, 100),  # this process, which lives
                (os.getppid(), f"{boot}/1", 1000),  # lives, but began at another time
                (1, f"another-boot/{ticks}", 10_000),  # before this boot
            ]
            other.executemany("INSERT INTO worker_share VALUES (?, ?, ?, 0, 0)", shares)
        worker.ask("refresh")
        wait_until(lambda: rows(path, "current") == [(100, 0, 0)], what="the share of the one that lives")


def test_a_worker_that_has_ended_but_was_not_waited_for_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as one, on(path) as other:
        other.ask("current 1 1 1")
        other.ask("refresh")
        wait_until(lambda: rows(path, "current") == [(1, 1, 1)], what="its share")
        other.process.kill()  # and nobody asks for its status: a zombie
        wait_until(lambda: process_start(other.process.pid) is None, what="its end")
        one.ask("refresh")
        wait_until(lambda: rows(path, "current") == [(0, 0, 0)], what="its share to be dropped")


def test_a_deleted_database_is_begun_anew_by_all_workers_together(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as one, on(path) as other:
        for worker in (one, other):
            worker.ask("record 100 1 happy")
        wait_until(lambda: len(numbers(path)) == 200, what="the rows")
        for name in (path, f"{path}-shm", f"{path}-wal"):
            os.unlink(name)
        for worker in (one, other):
            worker.ask("record 50 1 happy")
            assert worker.ask("close 30") == "0"
            worker.kill()
            assert "what it held (200 connections in all) is lost" in worker.warnings
    assert len(numbers(path)) == 100
    assert_sums_agree(path)
    assert rows(path, "pragma_integrity_check") == [("ok",)]


def test_a_database_deleted_again_and_again_under_load_stays_whole_and_counts_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with ExitStack() as stack:
        workers = [stack.enter_context(on(path)) for _ in range(3)]
        for _ in range(10):
            for worker in workers:
                worker.ask("record 200 1 happy")
            for name in (path, f"{path}-shm", f"{path}-wal"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
            for worker in workers:
                worker.ask("record 1 1 lonely")
        for worker in workers:
            assert worker.ask("close 30") == "0"
    assert_sums_agree(path)
    assert rows(path, "pragma_integrity_check") == [("ok",)]
    assert [number for number in numbers(path) if number != 1] == []


def test_a_trouble_of_one_worker_does_not_cost_the_others_their_wal(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as one, on(path) as other:
        one.ask("record 10 1 happy")
        wait_until(lambda: len(numbers(path)) == 10, what="the rows")
        # A schema of another kind for a moment: the worker that sees it lets go of the file and comes back to it.
        with closing(sqlite3.connect(path)) as third, third:
            third.execute("ALTER TABLE all_time RENAME TO elsewhere")
        one.ask("record 10 1 happy")
        assert one.process.stderr is not None
        assert "all_time" in one.process.stderr.readline()
        with closing(sqlite3.connect(path)) as third, third:
            third.execute("ALTER TABLE elsewhere RENAME TO all_time")
        other.ask("record 10 1 happy")
        for worker in (one, other):
            assert worker.ask("close 30") == "0"
    assert len(numbers(path)) == 30
    assert_sums_agree(path)


def test_a_stopped_worker_holds_up_no_other_and_its_records_come_later(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as one, on(path) as other:
        other.ask("current 1 0 0")
        other.ask("refresh")
        wait_until(lambda: rows(path, "current") == [(1, 0, 0)], what="its share")
        subprocess.run(["kill", "-STOP", str(other.process.pid)], check=True)
        one.ask("record 100 1 happy")
        wait_until(lambda: len(numbers(path)) == 100, what="the rows")
        assert rows(path, "current") == [(1, 0, 0)]
        subprocess.run(["kill", "-CONT", str(other.process.pid)], check=True)
        other.ask("record 100 1 happy")
        wait_until(lambda: len(numbers(path)) == 200, what="the rows of the one that went on")


def test_a_killed_worker_is_gone_as_soon_as_its_connections_end(tmp_path: Path) -> None:
    for _ in range(10):
        read_end, write_end = os.pipe()
        options = ("--usage-db", str(tmp_path / "db"))
        with UsageWorker(*options, pass_fds=(write_end,)) as worker, open(read_end, "rb") as link:
            os.close(write_end)
            worker.process.kill()
            assert link.read() == b""
            assert process_start(worker.process.pid) is None


# Which process is which


def test_a_process_is_known_by_its_number_and_its_start(tmp_path: Path) -> None:
    start = process_start(os.getpid())
    assert start is not None
    assert is_living(os.getpid(), start)
    assert not is_living(os.getpid(), start + "1")
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert start.startswith(f"{boot_id}/")


def test_the_name_of_a_command_does_not_confuse_its_start(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 ("
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([str(odd), "60"]) as process:
        try:
            wait_until(lambda: b"a) S 1" in Path(f"/proc/{process.pid}/stat").read_bytes(), what="its name")
            start = process_start(process.pid)
            assert start is not None
            ticks = int(start.split("/")[1])
            own = process_start(os.getpid())
            assert own is not None
            assert ticks >= int(own.split("/")[1])
        finally:
            process.kill()


def test_a_boot_id_that_is_hidden_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    processes._boot_id.cache_clear()
    monkeypatch.setattr("relay.usage.processes._BOOT_ID", "/proc/sys/kernel/random/hidden")
    try:
        start = process_start(os.getpid())
        assert start is not None
        assert start.startswith("unknown-boot/")
    finally:
        processes._boot_id.cache_clear()

"""Many workers start in the same instant, and what they share is not to be had for a while."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, Workers, free_port, wait_until
from tests.support.hostile import honest_transfer
from tests.support.usage_records import assert_sums_agree, recording

MANY = 16


def test_of_many_workers_that_start_while_the_database_is_locked_none_gives_up(tmp_path: Path) -> None:
    """Each waits a second for it; if each did so in its turn to join, the last would wait too long for theirs."""
    with recording(tmp_path / "usage.sqlite"):
        pass
    with ExitStack() as stack:
        locking = stack.enter_context(closing(sqlite3.connect(tmp_path / "usage.sqlite", isolation_level=None)))
        locking.execute("BEGIN EXCLUSIVE")
        workers = stack.enter_context(Workers(tmp_path, count=0))
        workers.port = free_port()
        with ThreadPoolExecutor(MANY) as starting:
            for started in [starting.submit(workers.start_one) for _ in range(MANY)]:
                started.result()
        wait_until(lambda: workers.log_text().count("joined the relay in") == MANY, 20, "all have joined")
        assert workers.log_text().count("the first worker") == 1
        honest_transfer(workers.port, 1000)
        locking.execute("ROLLBACK")
        assert workers.wait_for_rows("usage", 1)[0]["result"] == "happy"
        assert len(workers.living()) == MANY
        wait_until(lambda: len(workers.rows("worker_share")) == MANY, 20, "all have signed on")
        assert [tuple(row)[1:] for row in workers.rows("since_reboot")] == [(1, 1, 0, 0)], "as one service"
        assert "holds a lock on its folder" not in workers.log_text(), "which would be one of them"
    assert_sums_agree(tmp_path / "usage.sqlite")


def test_a_worker_that_may_not_join_has_signed_off_and_was_never_a_sibling(tmp_path: Path) -> None:
    with Workers(tmp_path, count=1) as workers:
        refused = start_elsewhere(tmp_path, "--port", str(free_port()), "--usage-db", str(workers.usage_db))
        assert refused.returncode == 2
        assert "its relay listens on" in refused.stderr
        assert len(workers.rows("worker_share")) == len(workers.rows("lifeline")) == 1
        honest_transfer(workers.port, 1000)
        assert workers.wait_for_rows("usage", 1)
        assert [row["connections"] for row in workers.rows("since_reboot")] == [1]


def test_a_worker_whose_database_cannot_be_used_was_never_a_sibling(tmp_path: Path) -> None:
    (tmp_path / "refusing").mkdir()
    (tmp_path / "refusing" / "sitecustomize.py").write_text(
        "import _sqlite3\n"
        "def refuse(*a, **k):\n"
        "    raise _sqlite3.OperationalError('disk I/O error')\n"
        "_sqlite3.connect = refuse\n"
    )
    with Workers(tmp_path, count=1) as workers:
        workers.env = {"PYTHONPATH": f"{tmp_path / 'refusing'}:{CHECKOUT}"}
        with pytest.raises(AssertionError, match=r"ended with 2: relay-gevent: error: --usage-db .* cannot be used"):
            workers.start_one()
        honest_transfer(workers.port, 1000)
        assert workers.wait_for_rows("usage", 1)
        first, refused = workers.workers
        assert refused.log_text().count("\n") == 1
        assert str(refused.pid) not in first.log_text(), "neither that it has joined nor that it has died"


def start_elsewhere(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Start another worker of the run directory, which ends by itself."""
    command = [sys.executable, "-m", "relay", "--interface", "127.0.0.1", "--run-dir", str(folder / "run"), *options]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=30, check=False)

"""Several processes at once: each result once and in order, and an end to all of them whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from relay.report import cli, scan
from relay.report.database import ReportError
from relay.report.forked import ProcessDied, apply
from relay.usage.schema import open_database
from tests.support.harness import CHECKOUT, wait_until


def square(number: int) -> int:
    """The number times itself; far from quick for some."""
    time.sleep(0.01 * (number % 3))
    return number * number


def children() -> list[int]:
    """The processes that this one has started, and not yet seen off."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.parametrize(("items", "processes"), [(7, 2), (3, 3), (100, 4), (2, 1)])
def test_each_result_comes_once_and_in_order(items: int, processes: int) -> None:
    before = children()
    assert list(apply(square, range(items), processes)) == [number * number for number in range(items)]
    assert children() == before


def test_a_result_that_is_larger_than_a_pipe_comes_whole() -> None:
    assert [len(text) for text in apply(lambda size: "x" * size, [1_000_000, 10, 2_000_000], 2)] == [
        1_000_000,
        10,
        2_000_000,
    ]


def test_what_the_function_raises_is_raised_and_nobody_is_left() -> None:
    before = children()

    def choosy(number: int) -> int:
        if number == 5:
            raise ReportError("five")
        return number

    found: list[int] = []
    with pytest.raises(ReportError, match="five"):
        found += apply(choosy, range(100), 2)
    assert children() == before


@pytest.mark.parametrize("moment", ["at once", "in the middle of a result"])
def test_a_process_that_is_killed_is_noticed(moment: str) -> None:
    before = children()

    def unlucky(number: int) -> bytes:
        if number == 3 and moment == "at once":
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(1 << 20)

    with closing(apply(unlucky, range(8), 2)) as results:
        assert len(next(results)) == 1 << 20
        if moment != "at once":
            os.kill(children()[-1], signal.SIGKILL)  # it has filled its pipe, and waits
        with pytest.raises(ProcessDied):
            list(results)
    assert children() == before


@pytest.fixture
def of_many_blocks(tmp_path: Path) -> Path:
    """A database whose rows take a while to count, where blocks are small."""
    path = tmp_path / "usage.sqlite"
    with closing(open_database(str(path))) as database:
        database.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) "
            "INSERT INTO usage SELECT 1800000000 - i, i, 0, 10, 'happy' FROM n"
        )
    return path


def test_relay_usage_tells_of_a_counting_process_that_was_killed(
    of_many_blocks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counting: Callable[..., scan.Tallies] = scan.count_block

    def killed(database: object, utc: bool, block: scan.Block) -> scan.Tallies:
        if block[0] > 1000:
            os.kill(os.getpid(), signal.SIGKILL)
        return counting(database, utc, block)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(scan, "BLOCK", 100)
    monkeypatch.setattr(scan, "count_block", killed)
    with pytest.raises(SystemExit) as ended:
        cli.main([str(of_many_blocks)])
    assert ended.value.code == 2
    assert "a process that was counting has been killed" in capsys.readouterr().err


SLOW = """
import os, sys, time
from relay.report import cli, scan
os.sched_getaffinity = lambda pid: {0, 1}
scan.BLOCK = 100
count_block = scan.count_block
def slowly(*arguments):
    time.sleep(0.05)
    return count_block(*arguments)
scan.count_block = slowly
cli.main(sys.argv[1:])
"""


def interrupted(database: Path, after: int) -> tuple[int, bytes, bytes]:
    """How relay-usage ends, and what it says, when it is told Ctrl-C once it has so many processes to count."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(database)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as program:
        started = Path(f"/proc/{program.pid}/task/{program.pid}/children")
        wait_until(lambda: len(started.read_text().split()) >= after, 20, "it counts")
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does it
        out, err = program.communicate(timeout=20)  # to the end of what the processes have open, too
        return program.returncode, out, err


@pytest.mark.parametrize("after", [1, 2])
def test_ctrl_c_ends_relay_usage_and_its_processes_without_a_word(of_many_blocks: Path, after: int) -> None:
    for _ in range(5):
        assert interrupted(of_many_blocks, after) == (130, b"", b"")

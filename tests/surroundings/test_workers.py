"""Workers that are held, started, stopped and signalled at the wrong moment.

A deleted run directory and strangers in it are in tests/workers/test_joining.py, workers that die or fall silent while
clients come in tests/workers/test_crash.py, orderly restarts in tests/workers/test_restart.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.crowd import Crowd
from tests.support.harness import CHECKOUT, Workers, free_port, new_side, new_token, stopped, wait_until
from tests.support.hostile import beside, honest_transfer
from tests.support.load import Load, in_lines

STOPPED_SECONDS = float(os.environ.get("RELAY_TESTS_STOPPED_SECONDS", "4"))


def test_while_a_worker_is_stopped_the_others_go_on_and_then_its_own_transfers_do(tmp_path: Path) -> None:
    with Workers(tmp_path, count=3) as workers, Crowd(workers.port) as crowd:
        held = [crowd.transfer(100_000, 30_000) for _ in range(30)]
        waiting = [crowd.call(new_token(), new_side()) for _ in range(20)]
        crowd.begin(held)
        crowd.run_for(1.2)
        with stopped(workers.workers[1]):
            load = Load(workers.port)
            with beside(load.run):
                crowd.run_for(STOPPED_SECONDS)
                crowd.run_until(lambda: len(load.sizes) > STOPPED_SECONDS, 20, "the others go on")
        later = [crowd.call(caller.token, new_side(), head=b"here") for caller in waiting]
        crowd.run_until(lambda: all(caller.met for caller in [*waiting, *later]), 10, "those who waited meet")
        crowd.end(held)
        for caller in [*waiting, *later]:
            caller.finish()
        crowd.run_until(lambda: all(caller.closed for caller in [*waiting, *later]), 10, "they part")
        expected = Counter([*load.sizes, *(transfer.moved for transfer in held), *[4] * 20])
        wait_until(lambda: in_lines(workers.json_lines.read_text()) == expected, 10, "each is on record once")
        wait_until(lambda: Counter(row["bytes"] for row in workers.rows("usage")) == expected, 10, "and a row")


class Started:
    """A worker that nobody waits for."""

    def __init__(self, workers: Workers, log: Path) -> None:
        command = [sys.executable, "-m", "relay", "--port", str(workers.port), "--interface", "127.0.0.1"]
        recording = ["--usage-db", str(workers.usage_db), "--grace", "2"]
        self.log = log
        with log.open("wb") as stderr, workers.json_lines.open("ab") as lines:
            self.process = subprocess.Popen(
                [*command, "--run-dir", str(workers.run_dir), *recording, "--log-fd", str(lines.fileno())],
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[lines.fileno()],
            )

    def end(self) -> int:
        """Wait for it to end by itself; AssertionError when it does not, or says what an operator should never see."""
        try:
            status = self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"it did not end: {self.log.read_text()}") from None
        said = self.log.read_text()
        if "Traceback" in said:
            # Before the relay's own first line of code has come, an interrupt is Python's business.
            assert said.splitlines()[-1] == "KeyboardInterrupt", said
            assert "import" in said, said
            return 130
        return status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_at_any_moment_of_the_start_and_of_the_stop_harms_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    rounds = int(os.environ.get("RELAY_TESTS_SIGNAL_ROUNDS", "4"))
    with Workers(tmp_path, count=1) as workers:
        load = Load(workers.port)
        with beside(load.run):
            for turn in range(rounds):
                one = Started(workers, tmp_path / f"start-{turn}.log")
                time.sleep(random.uniform(0, 0.8))
                one.process.send_signal(number)
                time.sleep(random.uniform(0, 0.2))
                load.may_be_cut = True  # a second signal ends it at once, with what it is just handing on
                with contextlib.suppress(ProcessLookupError):
                    one.process.send_signal(random.choice([number, signal.SIGTERM, signal.SIGHUP]))
                if one.process.poll() is None:
                    one.process.send_signal(signal.SIGTERM)
                assert one.end() in (0, 130, -number, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
                load.may_be_cut = False
            load.wait_for_more()
        workers.start_one()
        load = Load(workers.port)
        with beside(load.run):
            load.wait_for_more(5)
            assert workers.stop_one(0) == 0
            load.wait_for_more(5)
        wait_until(lambda: len(list(workers.run_dir.glob("worker-*"))) == 1, 5, "what dead workers left is removed")


def test_workers_started_all_at_once_and_stopped_in_any_order_are_one_relay_all_the_while(tmp_path: Path) -> None:
    workers = Workers(tmp_path, count=0)
    workers.port = free_port()
    with workers, ThreadPoolExecutor(5) as beginning:
        for _ in beginning.map(lambda _: workers.start_one(), range(4)):
            pass
        for _ in range(10):
            honest_transfer(workers.port, 10_000)
        load = Load(workers.port)
        with beside(load.run):
            # One is told to stop while two others start, and those two while it still stops.
            coming = [beginning.submit(workers.start_one) for _ in range(2)]
            assert workers.stop_one(2) == 0
            for one in coming:
                one.result()
            living = workers.living()
            random.shuffle(living)
            for worker in living[:3]:
                worker.process.send_signal(signal.SIGTERM)
            assert [worker.wait(15) for worker in living[:3]] == [0, 0, 0]
            load.wait_for_more()
        everything = Counter([*[10_006] * 10, *load.sizes])
        wait_until(lambda: in_lines(workers.json_lines.read_text()) == everything, 10, "each is on record once")


def test_a_worker_whose_siblings_all_stand_still_says_so_and_the_next_one_is_taken_in(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers:
        with stopped(*workers.workers):
            one = Started(workers, tmp_path / "one.log")
            assert one.end() == 2
        assert one.log.read_text() == (
            f"relay-gevent: error: --run-dir {workers.run_dir}: 2 of its workers do not answer; wait until they run "
            f"again, or end them (--port {workers.port}: another program listens there already; stop it or choose "
            "another port)\n"
        )
        workers.start_one()
        honest_transfer(workers.port, 10_000)

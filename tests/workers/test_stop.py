"""All workers are stopped at once: the transfers get their grace, everybody a row, and the sums go on."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path

from tests.support.crowd import Crowd
from tests.support.current import wait_for_current
from tests.support.harness import Workers, new_side, new_token, wait_until

GRACE = 6.0


def test_all_workers_stopped_at_once_give_transfers_their_grace_and_record_everybody(tmp_path: Path) -> None:
    with Workers(tmp_path, "--grace", str(GRACE), count=4) as workers, Crowd(workers.port) as crowd:
        ending = [crowd.transfer(100_000, head=b"ends in time") for _ in range(15)]
        too_long = [crowd.transfer(100_000, 100_000) for _ in range(10)]
        crowd.begin(ending + too_long)
        waiting = [crowd.call(new_token(), new_side()) for _ in range(20)]
        shaking = [crowd.call(new_token(), line=b"please relay ") for _ in range(5)]
        wait_for_current(workers, 25, 20)
        began = time.monotonic()

        def end_in_time() -> None:
            if time.monotonic() - began > GRACE / 6:
                for transfer in ending:
                    transfer.finish()

        crowd.every_tick = end_in_time
        assert crowd.run_beside(workers.stop) == 0
        assert GRACE - 0.1 < time.monotonic() - began < GRACE + 3
        crowd.run_until(lambda: all(transfer.cut for transfer in too_long), 2, "the others are cut")
        for transfer in ending:
            transfer.assert_intact()
        assert {(caller.answer, caller.ended) for caller in waiting} == {(b"", True)}
        assert {(caller.answer, caller.ended) for caller in shaking} == {(b"bad handshake\n", True)}
        assert Counter(row["result"] for row in workers.rows("usage")) == {"happy": 25, "lonely": 20, "errory": 5}
        assert len(workers.records()) == 50
        assert workers.row("current") == (0, 0, 0)
        moved = workers.row("all_time")[0]
        assert moved >= sum(transfer.moved for transfer in ending)
        assert workers.row("since_reboot") == workers.row("all_time") == (moved, 50, 25, 20, 5)
        assert [name.name for name in workers.run_dir.iterdir()] == ["lock"]

        workers.start_one()
        wait_until(lambda: workers.row("since_reboot") == (0, 0, 0, 0, 0), 2, "since_reboot begins anew")
        assert workers.row("all_time") == (moved, 50, 25, 20, 5)
        workers.start_one()
        again = crowd.transfer(head=b"twelve bytes")
        crowd.begin([again])
        crowd.end([again])
        wait_until(lambda: workers.row("since_reboot") == (12, 1, 1, 0, 0), 2, "and counts on")
        assert workers.row("all_time") == (moved + 12, 51, 26, 20, 5)


def test_workers_stopped_one_after_another_hand_on_until_the_last_one_gives_grace(tmp_path: Path) -> None:
    with Workers(tmp_path, "--grace", str(GRACE), count=3) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(100_000, 50_000) for _ in range(20)]
        crowd.begin(transfers)
        for number in (0, 1):
            crowd.run_beside(lambda number=number: workers.stop_one(number))  # type: ignore[misc]
        assert not any(transfer.cut for transfer in transfers)
        began = time.monotonic()

        def finish() -> None:
            if time.monotonic() - began > GRACE / 6:
                for transfer in transfers:
                    transfer.finish()

        crowd.every_tick = finish
        crowd.run_beside(lambda: workers.stop_one(2))
        assert time.monotonic() - began < GRACE
        for transfer in transfers:
            transfer.assert_intact()
        rows = workers.rows("usage")
        assert sorted(row["bytes"] for row in rows) == sorted(transfer.moved for transfer in transfers)


def test_a_newcomer_takes_over_what_a_lone_worker_that_stops_still_has(tmp_path: Path) -> None:
    with Workers(tmp_path, "--grace", "20", count=1) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(100_000, 50_000) for _ in range(20)]
        crowd.begin(transfers)
        leaving = workers.workers[0]
        leaving.process.send_signal(signal.SIGTERM)
        crowd.run_until(
            lambda: "stopping: 20 transfers have 20 seconds" in leaving.log_text(), 10, "it gives them grace"
        )
        began = time.monotonic()
        crowd.run_beside(workers.start_one)
        assert crowd.run_beside(leaving.wait) == 0
        assert time.monotonic() - began < 10
        crowd.end(transfers)
        rows = workers.wait_for_rows("usage", 20)
        assert Counter(row["bytes"] for row in rows) == Counter(transfer.moved for transfer in transfers)

"""`current` describes the whole relay, whoever holds what."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.crowd import Crowd
from tests.support.harness import Workers, new_side, new_token

WITHIN = 3.0
"""Seconds after any change by which `current` has to be right again: it takes one, on an idle machine."""


def test_current_is_right_for_300_pairs_and_300_who_wait_while_workers_come_and_go(tmp_path: Path) -> None:
    with Workers(tmp_path, count=4) as workers, Crowd(workers.port) as crowd:

        def assert_current(connected: int, waiting: int, moved: int) -> None:
            crowd.run_until(
                lambda: [tuple(row) for row in workers.rows("current")] == [(connected, waiting, moved)],
                WITHIN,
                f"`current` is {connected}, {waiting}, {moved}",
            )

        transfers = [crowd.transfer(head=bytes(700), answer=bytes(300)) for _ in range(300)]
        crowd.begin(transfers)
        crowd.run_until(lambda: sum(one.left.heard.size + one.right.heard.size for one in transfers) == 300_000)
        # Only now: a worker writes `current` when it has another number of pairs or of those who wait, not for bytes.
        waiting = [crowd.call(new_token(), new_side()) for _ in range(300)]
        assert_current(300, 300, 300_000)
        for change in ("start", "stop", "stop", "stop", "start", "stop", "start", "start"):
            if change == "start":
                crowd.run_beside(workers.start_one)
            else:
                number = random.choice([number for number, worker in enumerate(workers.workers) if worker.pids])
                crowd.run_beside(lambda number=number: workers.stop_one(number))  # type: ignore[misc]
            assert_current(300, 300, 300_000)
        for caller in waiting[:100]:
            caller.hang_up()
        crowd.end(transfers[:100])
        assert_current(200, 200, 200_000)
        assert len(workers.rows("worker_share")) == len(workers.living())

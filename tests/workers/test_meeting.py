"""Any two sides meet, whichever workers accepted them, and whoever comes and goes meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.crowd import Caller, Crowd, assert_each_met_its_own_partner, call_in_random_order
from tests.support.current import current, shares
from tests.support.harness import Workers, new_side, new_token, wait_until

PAIRS = 2000


@pytest.mark.alone  # who has how many depends on when each has a processor
def test_two_thousand_pairs_meet_over_four_workers_and_each_worker_has_a_share(tmp_path: Path) -> None:
    transfers = {new_token(): (new_side(), new_side()) for _ in range(PAIRS)}
    with Workers(tmp_path, count=4) as workers, Crowd(workers.port) as crowd:
        callers = call_in_random_order(crowd, transfers)
        crowd.run_until(lambda: all(caller.first_words for caller in callers), 20, "everybody has met somebody")
        wait_until(lambda: current(workers) == (PAIRS, 0), 10, f"`current` is {PAIRS} pairs")
        share = shares(workers)
        assert set(share) == set(workers.pids)
        assert min(share.values()) > PAIRS / 4 * 0.7
        assert sum(share.values()) == PAIRS
        for caller in callers:
            caller.finish()
        crowd.run_until(lambda: all(caller.closed for caller in callers), 20, "all are over")
        assert_each_met_its_own_partner(callers, transfers)
        rows = workers.wait_for_rows("usage", PAIRS)
        assert Counter((row["result"], row["bytes"]) for row in rows) == {("happy", 32): PAIRS}
        wait_until(lambda: workers.row("current") == (0, 0, 0), 10, "nobody is left")


class Comings:
    """Starts and stops workers at random, in a thread of its own, until told to `end`; at least one always runs."""

    def __init__(self, workers: Workers, most: int) -> None:
        self.workers = workers
        self.most = most
        self.changes = 0
        self.longest_stop = 0.0
        self._end = threading.Event()
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                self._change()
        except BaseException as error:
            self._failure.append(error)

    def _change(self) -> None:
        living = [number for number, worker in enumerate(self.workers.workers) if worker.pids]
        if len(living) > 1 and (len(living) >= self.most or random.random() < 0.5):
            began = time.monotonic()
            assert self.workers.stop_one(random.choice(living)) == 0
            self.longest_stop = max(self.longest_stop, time.monotonic() - began)
        else:
            self.workers.start_one()
        self.changes += 1

    def end(self) -> None:
        """Stop it; raises what went wrong in it."""
        self._end.set()
        self._thread.join()
        if self._failure:
            raise self._failure[0]


def test_two_thousand_pairs_meet_while_workers_come_and_go(tmp_path: Path) -> None:
    transfers = {new_token(): (new_side(), new_side()) for _ in range(PAIRS)}
    with Workers(tmp_path, count=3) as workers, Crowd(workers.port) as crowd:
        comings = Comings(workers, most=4)
        try:
            callers = call_in_random_order(crowd, transfers, among=lambda: crowd.run_for(0.04))
            crowd.run_until(lambda: all(caller.first_words for caller in callers), 20, "everybody has met somebody")
            crowd.run_until(lambda: comings.changes >= 4, 30, "workers have come and gone")
        finally:
            comings.end()
        for caller in callers:
            caller.finish()
        crowd.run_until(lambda: all(caller.closed for caller in callers), 20, "all are over")
        assert_each_met_its_own_partner(callers, transfers)
        assert comings.longest_stop < 5
        rows = workers.wait_for_rows("usage", PAIRS)
        assert Counter((row["result"], row["bytes"]) for row in rows) == {("happy", 32): PAIRS}
        wait_until(lambda: workers.row("current") == (0, 0, 0), 10, "nobody is left")


@pytest.mark.parametrize("churn", [False, True], ids=["steady", "workers-come-and-go"])
def test_of_several_connections_per_side_one_of_each_meets_and_the_waiting_spares_are_closed(
    tmp_path: Path, churn: bool
) -> None:
    transfers = {new_token(): (new_side(), new_side()) for _ in range(400)}
    with Workers(tmp_path, count=3) as workers, Crowd(workers.port) as crowd:
        comings = Comings(workers, most=4) if churn else None
        try:
            earlier = [(token, first) for token, (first, _) in transfers.items() for _ in range(random.randint(1, 4))]
            later = [(token, second) for token, (_, second) in transfers.items() for _ in range(random.randint(1, 3))]
            callers = []
            for sides in (earlier, later):
                random.shuffle(sides)
                for number, (token, side) in enumerate(sides):
                    callers.append(crowd.call(token, side, head=side.encode()))
                    if number % 4 == 0:
                        crowd.step()
                if sides is earlier:
                    crowd.run_until(lambda: current(workers)[1] == len(earlier), 60, "the first sides wait")
            met = {token: [c for c in callers if c.token == token] for token in transfers}
            crowd.run_until(
                lambda: all(sum(len(c.first_words) for c in those) >= 32 for those in met.values()), 20, "all have met"
            )
            spares = [c for c in callers if not c.met and c.side == transfers[c.token][0]]
            crowd.run_until(lambda: all(spare.closed for spare in spares), 10, "the spares are closed")
        finally:
            if comings is not None:
                comings.end()
        assert all(spare.answer == b"" and spare.error is None for spare in spares)
        for token, those in met.items():
            assert sorted(caller.side or "" for caller in those if caller.met) == sorted(transfers[token])
        assert_each_met_its_own_partner([caller for caller in callers if caller.met], transfers)

        def others() -> list[Caller]:
            """Who came too late to be closed with the spares, and so waits."""
            return [caller for caller in callers if not caller.met and not caller.closed]

        crowd.run_until(
            lambda: current(workers) == (len(transfers), len(others())), 10, "`current` agrees about who waits"
        )
        lonely = len(callers) - 2 * len(transfers)
        crowd.hang_up()
        rows = workers.wait_for_rows("usage", len(transfers) + lonely)
        assert Counter(row["result"] for row in rows) == {"happy": len(transfers), "lonely": lonely}

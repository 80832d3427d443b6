"""One worker dies, or stops answering, and the others go on without it."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path

from tests.support.crowd import Crowd, Transfer
from tests.support.current import current, share, wait_for_current
from tests.support.harness import Workers, new_side, new_token, stopped, wait_until


def test_the_death_of_one_worker_ends_its_own_transfers_and_nothing_else(tmp_path: Path) -> None:
    with Workers(tmp_path, count=4) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(500_000, 200_000) for _ in range(160)]
        waiting = [crowd.call(new_token(), new_side()) for _ in range(160)]
        crowd.begin(transfers)
        wait_for_current(workers, 160, 160)
        number, killed = max(enumerate(workers.workers), key=lambda one: min(share(workers, one[1])))
        pairs, waited = share(workers, killed)
        assert pairs > 0
        assert waited > 0
        workers.kill_one(number)
        crowd.run_until(lambda: current(workers) == (160 - pairs, 160 - waited), 1, "`current` is right again")
        newcomers = [crowd.transfer(head=b"at once", answer=b"yes") for _ in range(80)]
        crowd.begin(newcomers, 2)  # and not only once they do without it as without one that does not answer
        crowd.run_until(lambda: current(workers) == (240 - pairs, 160 - waited), 3, "`current` knows of the newcomers")
        crowd.run_until(lambda: len([one for one in transfers if one.cut]) == pairs, 3, "its transfers are cut")
        crowd.run_until(lambda: len([one for one in waiting if one.closed]) == waited, 3, "who waited there is told")
        workers.start_one()
        taken_in = [crowd.transfer(10_000) for _ in range(240)]
        crowd.begin(taken_in)
        wait_until(lambda: share(workers, workers.workers[4])[0] > 5, 10, "the new worker has a share")
        left = [caller for caller in waiting if not caller.closed]
        later = [Transfer(caller, crowd.call(caller.token, new_side(), head=b"here")) for caller in left]
        crowd.begin(later)
        whole = [transfer for transfer in transfers if not transfer.cut] + newcomers + taken_in + later
        crowd.end(whole)
        rows = workers.wait_for_rows("usage", len(whole))
        assert Counter(row["bytes"] for row in rows) == Counter(transfer.moved for transfer in whole)


def test_no_connection_in_the_listen_queue_is_lost_with_a_worker(tmp_path: Path) -> None:
    with Workers(tmp_path, count=4) as workers, Crowd(workers.port) as crowd:
        with stopped(*workers.workers):
            queued = [crowd.transfer(head=b"hello", answer=b"you too") for _ in range(100)]
            workers.kill_one(2)
            workers.workers[2].process.wait()
        crowd.begin(queued, 3)
        crowd.end(queued)
        assert len(workers.wait_for_rows("usage", 100)) == 100


def test_a_worker_that_falls_silent_and_wakes_again_loses_and_doubles_nobody(tmp_path: Path) -> None:
    with Workers(tmp_path, count=3) as workers, Crowd(workers.port) as crowd:
        held = [crowd.transfer(50_000, 50_000) for _ in range(30)]
        crowd.begin(held)
        asleep, awake = workers.workers[0], workers.workers[1]
        sides = [(new_token(), [new_side(), new_side()]) for _ in range(300)]
        order = [(token, side) for token, pair in sides for side in pair]
        random.shuffle(order)
        with stopped(asleep):
            began = time.monotonic()
            callers = []
            for token, side in order:
                callers.append(crowd.call(token, side, head=side.encode()))
                crowd.run_for(0.008)
            crowd.run_until(lambda: "does not answer" in awake.log_text(), 8, "its siblings notice")
            # Now they do without it: everybody who has come, and all that it had been handed, meet.
            crowd.run_until(lambda: all(caller.met for caller in callers), 5, "all meet while it sleeps")
            crowd.run_for(max(0.0, began + 5 - time.monotonic()))
        crowd.run_until(lambda: "answers again" in awake.log_text(), 10, "it is back")
        crowd.run_until(lambda: all(caller.first_words for caller in callers), 10, "all hear from their partners")
        by_token = dict(sides)
        for caller in callers:
            (partner,) = set(by_token[caller.token]) - {caller.side}
            assert caller.first_words == partner.encode()
            caller.finish()
        crowd.run_until(lambda: all(caller.closed for caller in callers), 5, "they part")
        again = [crowd.transfer(head=b"all three", answer=b"work") for _ in range(50)]
        crowd.begin(again)
        crowd.end(again + held)
        rows = workers.wait_for_rows("usage", 380)
        assert len(rows) == 380
        assert {row["result"] for row in rows} == {"happy"}
        wait_for_current(workers, 0, 0)


def test_spares_at_a_worker_that_sleeps_are_closed_when_it_wakes(tmp_path: Path) -> None:
    transfers = {new_token(): (new_side(), new_side()) for _ in range(40)}
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        callers = [crowd.call(token, one) for token, (one, _) in transfers.items()]
        crowd.run_until(lambda: current(workers) == (0, 40), 10, "all wait")
        awake, asleep = sorted(workers.workers, key=lambda worker: share(workers, worker)[1])
        assert share(workers, asleep)[1] > 0
        with stopped(asleep):
            crowd.run_until(lambda: "does not answer" in awake.log_text(), 8, "its sibling notices")
            for which in (0, 1):
                callers += [crowd.call(token, sides[which]) for token, sides in transfers.items()]
                crowd.run_for(1.5)  # the worker that sleeps may have had the turn to accept
            crowd.run_until(lambda: sum(caller.met for caller in callers) == 80, 10, "all meet while it sleeps")
        crowd.run_until(lambda: all(caller.met or caller.closed for caller in callers), 10, "the spares are closed")
        for token, sides in transfers.items():
            assert sorted(one.side or "" for one in callers if one.token == token and one.met) == sorted(sides)
        assert sum(caller.closed for caller in callers) == 40


def test_a_worker_with_a_silent_sibling_ends_in_time_and_gives_nothing_to_it(tmp_path: Path) -> None:
    with Workers(tmp_path, count=3) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(200_000, 200_000) for _ in range(40)]
        waiting = [crowd.call(new_token(), new_side()) for _ in range(40)]
        crowd.begin(transfers)
        wait_for_current(workers, 40, 40)
        with stopped(workers.workers[0]):
            began = time.monotonic()
            crowd.run_beside(lambda: workers.stop_one(1))
            assert time.monotonic() - began < 8  # it has to find out first
        later = [Transfer(caller, crowd.call(caller.token, new_side())) for caller in waiting]
        crowd.begin(later)
        crowd.end(transfers + later)
        workers.wait_for_rows("usage", 80)
        wait_for_current(workers, 0, 0)
        rows = workers.rows("usage")
        assert Counter(row["bytes"] for row in rows) == Counter(transfer.moved for transfer in transfers + later)


def test_a_worker_told_to_stop_while_all_the_others_sleep_keeps_those_who_wait_until_one_wakes(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        leaving, asleep = workers.workers
        transfers = [crowd.transfer(200_000, 200_000) for _ in range(20)]
        waiting = [crowd.call(new_token(), new_side()) for _ in range(20)]
        crowd.begin(transfers)
        with stopped(asleep):
            leaving.process.send_signal(signal.SIGTERM)
            crowd.run_until(lambda: "does not answer" in leaving.log_text(), 6, "it is taken for dead")
            crowd.run_for(0.5)
        assert crowd.run_beside(leaving.wait) == 0
        assert not [caller for caller in waiting if caller.closed]
        later = [Transfer(caller, crowd.call(caller.token, new_side())) for caller in waiting]
        crowd.begin(later)
        crowd.end(transfers + later)
        assert len(workers.wait_for_rows("usage", 40)) == 40


def test_workers_that_all_slept_at_once_do_not_take_each_other_for_dead(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        waiting = [crowd.call(new_token(), new_side()) for _ in range(20)]
        wait_for_current(workers, 0, 20)
        with stopped(*workers.workers):
            crowd.run_for(4.2)
            workers.workers[0].process.send_signal(signal.SIGTERM)
        assert crowd.run_beside(workers.workers[0].wait) == 0
        later = [Transfer(caller, crowd.call(caller.token, new_side())) for caller in waiting]
        crowd.begin(later)
        crowd.end(later)
        assert "does not answer" not in workers.log_text()

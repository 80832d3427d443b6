"""Workers accept by turns: one has the door at a time, and nobody stands before it because of that."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest

from relay.clients.door import TURN_CONNECTIONS, TURN_SECONDS
from tests.support.crowd import Caller, Crowd, Transfer
from tests.support.current import current, share, shares, wait_for_current
from tests.support.harness import (
    CHECKOUT,
    Relay,
    Workers,
    connect,
    cpu_seconds,
    met,
    new_side,
    new_token,
    read_to_end,
    stopped,
    wait_until,
)
from tests.support.kernel_view import in_listen_queue, listener_inode, watches

pytestmark = pytest.mark.long

LONGER_THAN_A_TURN = TURN_SECONDS + 0.05


def at_the_door(workers: Workers) -> list[Relay]:
    """The workers that would be woken by a new connection."""
    inode = listener_inode(workers.port)
    return [worker for worker in workers.living() if watches(worker.pid, inode)]


def knock(port: int, seconds: float = 10) -> float:
    """Connect, and be turned away for not knowing what to say; returns how long that took."""
    began = time.monotonic()
    with connect(port, timeout=seconds) as sock:
        sock.sendall(b"good morning\n")
        assert read_to_end(sock, seconds).startswith(b"bad handshake")
    return time.monotonic() - began


def who_has_the_door(workers: Workers) -> Relay:
    """Let some come one right after the other, until a single worker watches the listening socket; return that."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("takes a second processor: with one, a worker that another was quicker than never gets to see it")

    def single() -> list[Relay]:
        for _ in range(3):
            knock(workers.port)
        found = at_the_door(workers)
        return found if len(found) == 1 else []

    (worker,) = wait_until(single, what="one worker has the door")
    return worker


def fill(crowd: Crowd, workers: Workers, number: int, queued: int = 0) -> list[Caller]:
    """So many come, each with a token of its own; returns when they wait for partners, all but those in the listen
    queue."""
    before = current(workers)[1]
    callers = [crowd.call(new_token(), new_side()) for _ in range(number)]

    def all_wait() -> bool:
        return (current(workers)[1] - before, in_listen_queue(workers.port)) == (number - queued, queued)

    wait_until(all_wait, 5, f"{number} wait, {queued} of them to be accepted")
    return callers


def patient(folder: Path) -> dict[str, str]:
    """The environment for workers where who waits does not give way, after some seconds, to those in the queue."""
    first = folder / "patient"
    first.mkdir()
    (first / "sitecustomize.py").write_text(
        "from relay.transfer import eviction\neviction.IDLE_SECONDS = eviction.BRIEF_SECONDS = 3600.0\n"
    )
    return {"PYTHONPATH": f"{first}:{CHECKOUT}"}


def test_a_single_worker_is_woken_by_a_new_connection_and_that_is_another_one_each_time(tmp_path: Path) -> None:
    with Workers(tmp_path, count=4) as workers:
        wait_until(lambda: at_the_door(workers) == workers.workers, what="all are at the door: nobody can know yet")
        has_had_it = {who_has_the_door(workers).pid}
        deadline = time.monotonic() + 20
        while has_had_it != set(workers.pids):
            assert time.monotonic() < deadline, has_had_it
            time.sleep(LONGER_THAN_A_TURN)
            has_had_it.add(who_has_the_door(workers).pid)
        # When nobody comes, it stays as it is, although they look after it each second.
        has_it = at_the_door(workers)
        assert len(has_it) == 1
        time.sleep(2.2)
        assert at_the_door(workers) == has_it


@pytest.mark.parametrize("end", [Relay.kill, Relay.stop])
def test_when_the_one_that_has_the_door_ends_all_others_are_at_it_at_once(
    tmp_path: Path, end: Callable[[Relay], object]
) -> None:
    with Workers(tmp_path, count=4) as workers, Crowd(workers.port) as crowd:
        while len(workers.pids) > 1:
            end(who_has_the_door(workers))
            # Nobody has to stand before it for that.
            wait_until(lambda: at_the_door(workers) == workers.living(), 10, "all others are at the door")
            transfers = [crowd.transfer(head=b"still here", answer=b"so are we") for _ in range(20)]
            crowd.begin(transfers, 3)
            crowd.end(transfers)


def test_when_the_one_that_has_the_door_is_stopped_whoever_comes_is_served_by_the_others(tmp_path: Path) -> None:
    with Workers(tmp_path, count=4) as workers:
        has_it = who_has_the_door(workers)
        others = [worker for worker in workers.workers if worker is not has_it]
        with stopped(has_it):
            noticed = False
            while not noticed:
                noticed = all(f"worker {has_it.pid} does not answer" in worker.log_text() for worker in others)
                # Until then its turn comes again and again; from then on it is passed over.
                assert knock(workers.port) < 3
                time.sleep(LONGER_THAN_A_TURN)
            assert median(knock(workers.port) for _ in range(20)) < 0.3

        def has_it_again() -> bool:
            time.sleep(LONGER_THAN_A_TURN)
            return who_has_the_door(workers) is has_it

        wait_until(has_it_again, 20, "it has its turn again")


def test_two_that_come_while_the_one_that_has_the_door_is_stopped_meet(tmp_path: Path) -> None:
    with Workers(tmp_path, count=3) as workers, Crowd(workers.port) as crowd, stopped(who_has_the_door(workers)):
        crowd.begin([crowd.transfer(head=b"anybody here?") for _ in range(10)], 6)


def test_whoever_comes_is_served_as_long_as_any_worker_has_room(tmp_path: Path) -> None:
    with Workers(tmp_path, "--max-connections", "10", count=4) as workers, Crowd(workers.port) as crowd:
        transfers = []
        for _ in range(20):
            transfers.append(crowd.transfer(head=b"is there room?", answer=b"there is"))
            crowd.begin(transfers[-1:], 5)
        wait_for_current(workers, 20, 0)
        # A side that was handed to its partner's worker may be one too many there, and leaves a place elsewhere.
        assert all(4 <= pairs <= 5 for pairs in shares(workers).values())
        crowd.end(transfers)
        again = [crowd.transfer(head=b"and now?") for _ in range(8)]
        crowd.begin(again, 5)
        crowd.end(again)


def test_when_all_workers_are_full_the_rest_waits_in_the_listen_queue_and_keeps_nobody_busy(tmp_path: Path) -> None:
    options = ("--max-connections", "10", "--max-waiting", "10")
    with Workers(tmp_path, *options, count=4, env=patient(tmp_path)) as workers, Crowd(workers.port) as crowd:
        callers = fill(crowd, workers, 48, queued=8)
        for _ in range(2):
            before = sum(map(cpu_seconds, workers.pids))
            crowd.run_for(1.5)
            assert sum(map(cpu_seconds, workers.pids)) - before < 0.3
            assert [share(workers, worker) for worker in workers.workers] == [(0, 10)] * 4
            assert in_listen_queue(workers.port) == 8
        # Whichever worker it is that somebody leaves: the next of the queue comes in.
        for left in range(7, -1, -1):
            callers[5 * left].hang_up()
            wait_until(lambda left=left: in_listen_queue(workers.port) == left, 10, f"{left} in the queue")  # type: ignore[misc]
        wait_for_current(workers, 0, 40)
        for caller in callers[:40]:
            caller.hang_up()
        transfers = [Transfer(caller, crowd.call(caller.token, new_side())) for caller in callers[40:]]
        crowd.begin(transfers, 5)
        assert "--max-connections: let new connections wait to be accepted" in workers.log_text()


def test_those_without_room_do_not_keep_the_door_from_the_only_one_that_has_some(tmp_path: Path) -> None:
    options = ("--max-connections", "10", "--max-waiting", "10")
    with Workers(tmp_path, *options, count=3, env=patient(tmp_path)) as workers, Crowd(workers.port) as crowd:
        fill(crowd, workers, 29)
        waits = []
        for _ in range(12):
            waits.append(knock(workers.port))
            time.sleep(LONGER_THAN_A_TURN)
        assert max(waits) < 3
        assert median(waits) < 0.3, waits  # nobody has to wait until somebody looks after the door


def test_transfers_with_some_time_between_them_go_to_one_worker_after_the_other(tmp_path: Path) -> None:
    with Workers(tmp_path, count=4) as workers, Crowd(workers.port) as crowd:
        who_has_the_door(workers)
        transfers = []
        for _ in range(16):
            crowd.run_for(LONGER_THAN_A_TURN)
            transfers.append(crowd.transfer(head=b"hello"))
            crowd.begin(transfers)
        wait_until(lambda: sum(shares(workers).values()) == 16, 10, "`worker_share` knows of all")
        assert set(shares(workers)) == set(workers.pids)
        assert min(shares(workers).values()) >= 2
        crowd.end(transfers)


def test_a_trickle_goes_to_all_workers_although_there_is_never_a_rest(tmp_path: Path) -> None:
    with Workers(tmp_path, count=4) as workers, Crowd(workers.port) as crowd:
        who_has_the_door(workers)
        while not all(share(workers, worker)[1] for worker in workers.workers):
            # So a turn ends by the time, and not only by the number.
            assert len(crowd.callers) < 2 * TURN_CONNECTIONS
            crowd.call(new_token(), new_side())
            crowd.run_for(TURN_SECONDS / 10)


def test_those_who_come_one_right_after_the_other_arrive_at_the_same_worker(tmp_path: Path) -> None:
    with Workers(tmp_path, count=4) as workers, Crowd(workers.port) as crowd:
        who_has_the_door(workers)
        together = rounds = 0
        while together < 5:
            # Not each time: somebody may just look after the door, or be held up for longer than a turn. Who comes to
            # any of the four has next to no chance to see it even once.
            assert rounds < 30, f"{together} times of {rounds}"
            rounds += 1
            time.sleep(LONGER_THAN_A_TURN)
            before = [share(workers, worker)[1] for worker in workers.workers]
            fill(crowd, workers, TURN_CONNECTIONS // 4)
            after = [share(workers, worker)[1] for worker in workers.workers]
            came = [now - then for now, then in zip(after, before, strict=True)]
            assert sum(came) == TURN_CONNECTIONS // 4
            together += max(came) == TURN_CONNECTIONS // 4


@contextlib.contextmanager
def bulk(port: int, number: int) -> Iterator[threading.Event]:
    """So many transfers that have met, and that move as much as they can once the event is set."""
    with contextlib.ExitStack() as stack:
        pairs = [[stack.enter_context(side) for side in met(port)] for _ in range(number)]
        begin, end = threading.Event(), threading.Event()
        threads = [
            threading.Thread(target=work, args=(side, begin, end))
            for pair in pairs
            for work, side in zip((_pour, _drain), pair, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            yield begin
        finally:
            end.set()
            begin.set()
            for thread in threads:
                thread.join()


def _pour(sock: socket.socket, begin: threading.Event, end: threading.Event) -> None:
    begin.wait()
    noise = os.urandom(1 << 20)
    while not end.is_set():
        sock.sendall(noise)
    sock.shutdown(socket.SHUT_WR)


def _drain(sock: socket.socket, begin: threading.Event, end: threading.Event) -> None:
    begin.wait()
    scrap = bytearray(1 << 20)
    while sock.recv_into(scrap):
        pass


def test_while_one_worker_moves_much_new_transfers_go_to_the_others(tmp_path: Path) -> None:
    with Workers(tmp_path, count=4) as workers, Crowd(workers.port) as crowd:
        who_has_the_door(workers)
        time.sleep(LONGER_THAN_A_TURN)
        for _ in range(10):
            wait_until(lambda: sum(shares(workers).values()) == 0, 10, "nobody is there")
            with bulk(workers.port, 4) as begin:
                wait_until(lambda: sum(shares(workers).values()) == 4, 10, "four pairs")
                busy, pairs = max(shares(workers).items(), key=lambda share: share[1])
                if pairs < 4:
                    continue  # they came one right after the other, and still not in one turn
                begin.set()
                transfers = []
                for _ in range(80):  # for less than it takes until `balance` gives some of the four to others
                    transfers.append(crowd.transfer(head=b"quick"))
                    crowd.begin(transfers[-1:])
                    crowd.run_for(0.01)
            break
        else:
            pytest.fail("the four never came to one worker")
        wait_until(lambda: sum(shares(workers).values()) == 80, 5, "`worker_share` knows of all")
        assert shares(workers)[busy] < 80 / 4 * 0.6
        crowd.end(transfers)

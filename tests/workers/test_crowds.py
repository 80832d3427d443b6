"""While very many wait, workers come and go: only those are looked at who may have to move, a few at a time."""

from __future__ import annotations

import json
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.current import current, share
from tests.support.harness import (
    CHECKOUT,
    Relay,
    Workers,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    open_fds,
    read_exactly,
    stopped,
    wait_until,
)
from tests.support.work_counter import begin_anew, counting, work_of

WAITING = 4000

FEW = WAITING // 20
"""So many may be looked at that those who really have to move, and the test's own newcomers, are no more."""

AT_ONCE = WAITING // 10
"""For so many something may be done in one iteration of an event loop: several times as many as fit into a millisecond
or two, and less than half of those who are at one of the workers."""


@pytest.fixture(autouse=True)
def _as_many_fds_as_clients() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2 * WAITING + 1000, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """Workers that count their work, and who waits there, by token; each worker has some."""

    def __init__(self, folder: Path, workers: Workers, clients: dict[str, socket.socket]) -> None:
        self.workers = workers
        self.clients = clients
        self._folder = folder

    def begin_anew(self) -> None:
        """Let all workers count from 0."""
        for worker in self.workers.workers:
            begin_anew(self._folder, worker.pid)

    def looks(self, *workers: Relay) -> int:
        """How often the workers, or some of them, have looked for a token's home."""
        return sum(work_of(self._folder, worker.pid).looks for worker in workers or self.workers.workers)

    def most_at_once(self) -> int:
        """For how many clients, at the most, a worker did something in one iteration of its event loop."""
        return max(work_of(self._folder, worker.pid).most_at_once for worker in self.workers.workers)

    def call_for(self, token: str, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
        """Somebody comes for one of those who wait; both, who are about to meet."""
        newcomer = stack.enter_context(connect(self.workers.port))
        newcomer.sendall(handshake(token, new_side()))
        return self.clients.pop(token), newcomer

    def meet(self, stack: ExitStack, every: int) -> None:
        """Somebody comes for one of so many of those who still wait, and they meet."""
        for token in [*self.clients][::every]:
            assert [read_exactly(sock, 3) for sock in self.call_for(token, stack)] == [b"ok\n"] * 2

    def told(self) -> int:
        """How many of those who wait have been told something, or sent away."""
        poll = select.poll()
        for sock in self.clients.values():
            poll.register(sock, select.POLLIN)
        return len(poll.poll(0))

    def all_know(self, what: str, number: int) -> None:
        """Wait until `what` stands in the logs so often."""
        wait_until(lambda: self.workers.log_text().count(what) == number, what=what)


@contextmanager
def crowd(folder: Path, count: int) -> Iterator[tuple[Crowd, ExitStack]]:
    """A crowd that waits at so many workers, and what is to be closed in the end."""
    options = ("--max-connections", str(WAITING + 500), "--max-waiting", str(WAITING + 500))
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(folder, *options, count=count, env=counting(folder)))
        clients = {}
        for token in (new_token() for _ in range(WAITING)):
            clients[token] = stack.enter_context(connect(workers.port))
            clients[token].sendall(handshake(token, new_side()))
        wait_until(lambda: current(workers) == (0, WAITING), 20, "all wait")
        assert all(share(workers, worker)[1] > WAITING / count / 4 for worker in workers.workers)
        waiting = Crowd(folder, workers, clients)
        waiting.begin_anew()
        yield waiting, stack


def test_nobody_who_waits_is_looked_at_when_others_come_go_and_die(tmp_path: Path) -> None:
    with crowd(tmp_path, count=4) as (waiting, stack):
        workers = waiting.workers
        newcomer = workers.start_one()
        waiting.all_know(f"worker {newcomer.pid} has joined", 4)
        newcomer.stop()
        waiting.all_know(f"worker {newcomer.pid} has left", 4)
        killed = workers.start_one()
        waiting.all_know(f"worker {killed.pid} has joined", 4)
        killed.kill()
        waiting.all_know(f"worker {killed.pid} has died", 4)
        for _ in range(20):
            for sock in met(workers.port):
                sock.close()
        assert waiting.looks() < FEW
        assert waiting.told() == 0
        waiting.meet(stack, every=20)


def test_a_worker_that_leaves_hands_its_crowd_on_a_few_at_a_time(tmp_path: Path) -> None:
    with crowd(tmp_path, count=2) as (waiting, stack):
        leaving, stays = waiting.workers.workers
        moves = share(waiting.workers, leaving)[1]
        assert waiting.workers.stop_one(0) == 0
        wait_until(lambda: share(waiting.workers, stays)[1] == WAITING, 10, "all wait at the other")
        assert f"clients without a partner {moves}," in leaving.log_text()
        assert waiting.most_at_once() < AT_ONCE
        assert waiting.looks() < moves + FEW
        assert waiting.told() == 0
        waiting.meet(stack, every=20)


def test_a_worker_that_stood_still_looks_at_its_crowd_a_few_at_a_time(tmp_path: Path) -> None:
    with crowd(tmp_path, count=2) as (waiting, stack):
        asleep, _ = waiting.workers.workers
        with stopped(asleep):
            # Some of these meet at once. The others' partners wait at the sleeper.
            called = [waiting.call_for(token, stack) for token in [*waiting.clients][::20]]
            waiting.all_know(f"worker {asleep.pid} does not answer", 1)
        for both in called:
            assert [read_exactly(sock, 3) for sock in both] == [b"ok\n"] * 2
        waiting.all_know(f"worker {asleep.pid} answers again", 1)
        wait_until(lambda: waiting.looks(asleep) > share(waiting.workers, asleep)[1], 10, "it looks at everybody")
        assert waiting.most_at_once() < AT_ONCE
        assert waiting.told() == 0
        waiting.meet(stack, every=20)


def test_a_relay_that_stops_sends_its_crowd_away_a_few_at_a_time(tmp_path: Path) -> None:
    with crowd(tmp_path, count=1) as (waiting, stack):
        left, right = (stack.enter_context(sock) for sock in met(waiting.workers.port))
        (worker,) = waiting.workers.workers
        worker.process.send_signal(signal.SIGTERM)
        wait_until(lambda: waiting.told() == WAITING, 10, "all are sent away")
        # Those who do not end their streams themselves are listened to for two seconds more.
        wait_until(lambda: open_fds(worker.pid) < 100, 10, "only the transfer is left")
        assert waiting.most_at_once() < AT_ONCE
        left.sendall(b"still here")
        assert read_exactly(right, 10) == b"still here"


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("says_something", [False, True], ids=["leave", "speak"])
def test_a_crowd_that_leaves_or_speaks_in_one_moment_is_seen_off_a_few_at_a_time(
    tmp_path: Path, count: int, says_something: bool
) -> None:
    with crowd(tmp_path, count) as (waiting, stack):
        left, right = (stack.enter_context(sock) for sock in met(waiting.workers.port))
        waiting.begin_anew()
        with ExitStack() as all_stopped:
            for worker in waiting.workers.workers:
                all_stopped.enter_context(stopped(worker))
            for sock in waiting.clients.values():
                if says_something:
                    sock.sendall(b"anybody here?")
                else:
                    sock.close()
        left.sendall(b"still here")
        assert read_exactly(right, 10) == b"still here"
        wait_until(lambda: current(waiting.workers) == (1, 0), 20, "nobody waits any more")
        assert waiting.most_at_once() < AT_ONCE
        if says_something:
            assert {read_exactly(sock, 10) for sock in waiting.clients.values()} == {b"impatient\n"}


def test_under_a_crowd_each_worker_is_restarted_in_turn_and_nobody_is_lost() -> None:
    # The same as `make bench-crowds` does with 20 000 who wait and 6000 pairs.
    size = ("--workers", "3", "--waiting", "1500", "--pairs", "300", "--moving", "30")
    command = [sys.executable, str(CHECKOUT / "misc" / "multitudes.py"), "restarts", *size]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout)
    assert max(found["seconds until each was gone"]) < 5
    assert [found[what] for what in found if "lost" in what] == [0, 0, 0]
    assert found["ended otherwise than in good order"] == 0
    assert found["pings"] > 300

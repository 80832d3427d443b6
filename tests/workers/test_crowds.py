"""While very many wait, workers come and go: only those are looked at who may have to move, a few at a time."""

from __future__ import annotations

import resource
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.harness import Workers, connect, handshake, new_side, new_token, read_exactly, wait_until
from tests.support.hostile import met
from tests.support.work_counter import counting, work_of
from tests.workers.test_crash import current, share

WAITING = 4000

FEW = WAITING // 20
"""So many may be looked at that those who really have to move, and the test's own newcomers, are no more."""


@pytest.fixture(autouse=True)
def _as_many_fds_as_clients() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(WAITING + 1000, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """Four workers that count their work, and who waits there, by token; each worker has some."""

    def __init__(self, folder: Path, workers: Workers, clients: dict[str, socket.socket]) -> None:
        self.workers = workers
        self.clients = clients
        self._folder = folder

    def looks(self) -> int:
        """How often the workers have looked for a token's home."""
        return sum(work_of(self._folder, worker.pid).looks for worker in self.workers.workers)

    def most_at_once(self) -> int:
        """For how many clients, at the most, a worker did something in one iteration of its event loop."""
        return max(work_of(self._folder, worker.pid).most_at_once for worker in self.workers.workers)

    def meet(self, stack: ExitStack, every: int) -> None:
        """Somebody comes for one of so many of those who still wait, and they meet."""
        for token in [*self.clients][::every]:
            waiting, newcomer = self.clients.pop(token), stack.enter_context(connect(self.workers.port))
            newcomer.sendall(handshake(token, new_side()))
            assert read_exactly(waiting, 3) == read_exactly(newcomer, 3) == b"ok\n"

    def cut_off(self) -> int:
        """How many of those who wait have been told something, or sent away."""
        poll = select.poll()
        for sock in self.clients.values():
            poll.register(sock, select.POLLIN)
        return len(poll.poll(0))


@contextmanager
def crowd(folder: Path) -> Iterator[tuple[Crowd, ExitStack]]:
    """A crowd that waits, and what is to be closed in the end."""
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(folder, count=4, env=counting(folder)))
        clients = {}
        for token in (new_token() for _ in range(WAITING)):
            clients[token] = stack.enter_context(connect(workers.port))
            clients[token].sendall(handshake(token, new_side()))
        wait_until(lambda: current(workers) == (0, WAITING), 20, "all wait")
        assert all(share(workers, worker)[1] > WAITING / 16 for worker in workers.workers)
        yield Crowd(folder, workers, clients), stack


def test_nobody_who_waits_is_looked_at_when_others_come_go_and_die(tmp_path: Path) -> None:
    with crowd(tmp_path) as (waiting, stack):
        workers = waiting.workers
        before = waiting.looks()
        newcomer = workers.start_one()
        wait_until(lambda: workers.log_text().count(f"worker {newcomer.pid} has joined") == 4, what="all know of it")
        newcomer.stop()
        wait_until(lambda: workers.log_text().count(f"worker {newcomer.pid} has left") == 4, what="it has left")
        killed = workers.start_one()
        wait_until(lambda: workers.log_text().count(f"worker {killed.pid} has joined") == 4, what="all know of it")
        killed.kill()
        wait_until(lambda: workers.log_text().count(f"worker {killed.pid} has died") == 4, what="it has died")
        for _ in range(20):
            for sock in met(workers.port):
                sock.close()
        assert waiting.looks() - before < FEW
        assert waiting.cut_off() == 0
        waiting.meet(stack, every=20)

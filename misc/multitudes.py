#!/usr/bin/env python3
"""What a relay of several workers is like that holds tens of thousands of clients, and when it is restarted under them.

    misc/multitudes.py                                  # both, as docs/performance.md has them
    misc/multitudes.py standing --clients 60000 --in-pairs 0.1
    misc/multitudes.py restarts --waiting 20000 --pairs 6000 --moving 200

`standing`: of so many clients most wait, and a part is in pairs that are idle. It prints the memory for each client,
at a sixth of them and at all; how long a new pair takes to meet then, and beside nobody; and the CPU of all workers
while nobody speaks. `restarts`: each worker is restarted in turn while so many wait, and so many pairs are there, some
of which exchange a byte all the time. It prints how long each worker took to be gone, the longest times that a byte was
under way, and what was lost. Both take a minute or two, and 20 000 file descriptors for each worker (`ulimit -n`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import select
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import crowds
from crowds import AT_A_TIME, CLIENTS_PER_PROCESS, Aside

from tests.support.harness import Workers, met, pss, wait_until

MEETINGS = 300
QUIET_SECONDS = 10.0
SETTLE_SECONDS = 25.0
"""After that nothing is done any more for who came before: a pair looks once, after 20, whether all has arrived."""
PING_SECONDS = 0.1


def new_source() -> str:
    """An address of this machine of which no port is in use, as good as surely: there are 28 000 of each."""
    return f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"


def stay_in_pairs(port: int, number: int, pipe: Connection) -> None:
    """Be so many pairs that are idle; to each question answer of how many a byte does not pass each way any more."""
    crowds.all_fds()
    pairs = []
    source = new_source()
    for count in range(number):
        pairs.append(met(port, source=source))
        if count % AT_A_TIME == 0:
            time.sleep(0.008)
    while True:
        pipe.send(sum(not _passes(*pair) for pair in pairs))
        pipe.recv()


def _passes(left: socket.socket, right: socket.socket) -> bool:
    try:
        for sender, receiver in ((left, right), (right, left)):
            sender.sendall(b"b")
            if receiver.recv(2) != b"b":
                return False
    except OSError:
        return False
    return True


def keep_pinging(port: int, number: int, pipe: Connection) -> None:
    """Be so many pairs that exchange a byte each tenth of a second, not all at once; to each question answer how long
    each byte was under way since the one before, in seconds, and how many pairs are broken."""
    source = new_source()
    pairs = [met(port, source=source) for _ in range(number)]
    poll = select.poll()
    sent: dict[int, float] = {}
    due = {}
    senders = {}
    broken = 0
    for count, (left, right) in enumerate(pairs):
        left.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        right.setblocking(False)
        poll.register(right, select.POLLIN)
        senders[right.fileno()] = (left, right)
        due[right.fileno()] = time.monotonic() + PING_SECONDS * count / number
    took: list[float] = []
    pipe.send(None)
    while True:
        now = time.monotonic()
        for fd, when in due.items():
            if fd not in sent and now >= when:
                with contextlib.suppress(OSError):
                    senders[fd][0].send(b"p")
                sent[fd] = now
                due[fd] = max(now, when + PING_SECONDS)
        for fd, _ in poll.poll(1):
            try:
                heard = senders[fd][1].recv(100)
            except OSError:
                heard = b""
            if not heard:
                broken += 1
                poll.unregister(fd)
                continue
            took.append(time.monotonic() - sent.pop(fd, now))
        if pipe.poll():
            pipe.recv()
            pipe.send((took, broken + sum(now - when > 1 for when in sent.values())))
            took = []


@dataclass
class Multitude:
    """Clients of so many workers, in processes of their own."""

    workers: Workers
    stack: contextlib.ExitStack

    def add(self, *, waiting: int, pairs: int) -> list[Aside]:
        """Let so many more wait, and so many more pairs stand idle; returns their processes, once all are there."""
        added: list[Aside] = []
        for left in range(waiting, 0, -CLIENTS_PER_PROCESS):
            size = min(left, CLIENTS_PER_PROCESS)
            added.append(Aside(crowds.wait_in_a_crowd, self.workers.port, new_source(), size))
        most = CLIENTS_PER_PROCESS // 2
        added += [Aside(stay_in_pairs, self.workers.port, min(left, most)) for left in range(pairs, 0, -most)]
        for some in added:
            self.stack.callback(some.end)
        for some in added:
            some.hear()
        return added

    def memory(self) -> int:
        """Of all workers, in bytes, each page that they share counted once."""
        return sum(pss(pid) for pid in self.workers.pids)

    def cpu(self) -> float:
        """Seconds that all threads of all workers have run so far."""
        tasks = (task for pid in self.workers.pids for task in Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def meet(self) -> float:
        """The median of the seconds that new pairs take."""
        took = []
        source = new_source()
        for _ in range(MEETINGS):
            began = time.monotonic()
            pair = met(self.workers.port, source=source)
            took.append(time.monotonic() - began)
            for sock in pair:
                sock.close()
        return statistics.median(took)


@contextlib.contextmanager
def multitude(count: int) -> Iterator[Multitude]:
    """So many workers, without clients as yet."""
    crowds.all_fds()
    fds, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    options = ("--max-connections", str(int(fds * 0.875)), "--max-waiting", str(fds))
    with (
        tempfile.TemporaryDirectory() as folder,
        Workers(Path(folder), *options, count=count) as workers,
        contextlib.ExitStack() as stack,
    ):
        yield Multitude(workers, stack)


def standing(count: int, clients: int, in_pairs: float) -> dict[str, object]:
    """See above, for so many workers and clients, of which that part is in pairs."""
    with multitude(count) as here:
        alone = here.meet()
        time.sleep(1)
        empty = here.memory()
        memory = []
        there = 0
        for size in (clients // 6, clients):
            pairs = int((size - there) * in_pairs / 2)
            here.add(waiting=size - there - 2 * pairs, pairs=pairs)
            there = size
            time.sleep(2)
            memory.append((here.memory() - empty) / there)
        among_all = here.meet()
        time.sleep(SETTLE_SECONDS)
        before = here.cpu()
        time.sleep(QUIET_SECONDS)
        cpu = here.cpu() - before
    return {
        "workers, clients, part in pairs": [count, clients, in_pairs],
        "memory of a client, bytes, at a sixth and at all": [round(each) for each in memory],
        "ratio": round(memory[1] / memory[0], 2),
        "a new pair meets, median, us, beside nobody and all": [round(1e6 * each) for each in (alone, among_all)],
        "ratio of that": round(among_all / alone, 2),
        "CPU while nobody speaks, % of a core": round(100 * cpu / QUIET_SECONDS, 2),
    }


def restarts(count: int, *, waiting: int, pairs: int, moving: int) -> dict[str, object]:
    """See above, for so many workers and clients."""
    with multitude(count) as here:
        crowd = here.add(waiting=waiting, pairs=0)
        idle = here.add(waiting=0, pairs=pairs - moving)
        pings = Aside(keep_pinging, here.workers.port, moving)
        here.stack.callback(pings.end)
        pings.hear()
        wait_until(lambda: here.workers.rows("current")[0]["waiting"] == waiting, 30, "all wait")
        time.sleep(1)
        pings.ask()
        gone, failed = [], 0
        for number in range(count):
            began = time.monotonic()
            failed += here.workers.stop_one(number, 100) != 0
            gone.append(round(time.monotonic() - began, 2))
            here.workers.start_one()
            time.sleep(2)
        answer: tuple[list[float], int] = pings.ask()  # type: ignore[assignment]
        took, broken = sorted(answer[0]), answer[1]
        return {
            "workers, who wait, pairs, of which move": [count, waiting, pairs, moving],
            "seconds until each was gone": gone,
            "ended otherwise than in good order": failed,
            "pings": len(took),
            "under way, ms, p50, p99, p99.9, longest": [
                round(1000 * took[min(len(took) - 1, int(len(took) * part))], 1) for part in (0.5, 0.99, 0.999, 1)
            ],
            "pairs lost that moved": broken,
            "pairs lost that were idle": sum(int(some.ask()) for some in idle),  # type: ignore[call-overload]
            "of those who waited, lost": sum(int(some.ask()) for some in crowd),  # type: ignore[call-overload]
        }


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("standing", "restarts"))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=60_000)
    parser.add_argument("--in-pairs", type=float, default=0.1)
    parser.add_argument("--waiting", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=6_000)
    parser.add_argument("--moving", type=int, default=200)
    words = parser.parse_args()
    if words.what != "restarts":
        print(json.dumps(standing(words.workers, words.clients, words.in_pairs)), flush=True)
    if words.what != "standing":
        print(json.dumps(restarts(words.workers, waiting=words.waiting, pairs=words.pairs, moving=words.moving)))


if __name__ == "__main__":
    main()

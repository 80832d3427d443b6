#!/usr/bin/env python3
"""What everybody else notices when workers come, go, die and stand still while tens of thousands wait.

    misc/crowds.py --workers 4 --waiting 60000
    misc/crowds.py --workers 4 --waiting 60000 --nobody-else

So many clients wait for partners who never come, spread over the workers. Beside them some transfers exchange a byte
every few milliseconds, and new pairs meet. Then one more worker joins, an old one is stopped in good order, one is kept
from running for five seconds (SIGSTOP), and one is killed. For each of these it prints

- the longest pause of any transfer, less those of the worker to which it happens,
- how long the slowest new pair took to meet,
- the longest that an event loop was busy before it came round again, in CPU, which does not depend on others,
- what it cost: CPU of all workers that were there before and after, less what they need without it, for each client
  that waits.

With `--nobody-else` nobody but those who wait is there: what the workers take without it is next to nothing then, and
what it cost can be told to a fraction of a microsecond.

At the end it says whether anybody who waits was cut off but those of the killed worker. It takes about a minute, and
file descriptors: 20 000 for each worker and for each 15 000 clients (`ulimit -n`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import select
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relay.clients.door import TURN_SECONDS
from tests.support.harness import Relay, Workers, handshake, met, new_side, new_token, wait_until
from tests.support.work_counter import begin_anew, counting, work_of

CLIENTS_PER_PROCESS = 15_000
PAIRS_PER_WORKER = 6
PING_SECONDS = 0.004
MEET_SECONDS = 0.02
STOPPED_SECONDS = 5.0
AT_A_TIME = 64
"""So many clients come one after the other, and then there is a rest, as there would be."""


def wait_in_a_crowd(port: int, source: str, number: int, pipe: Connection) -> None:
    """Be so many clients; say when all have shaken hands, and to each question how many of them were cut off."""
    all_fds()
    poll = select.poll()
    socks = []
    for count in range(number):
        sock = socket.socket()
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", port))
        sock.sendall(handshake(new_token(), new_side()))
        poll.register(sock, select.POLLIN)
        socks.append(sock)
        if count % AT_A_TIME == 0:
            time.sleep(0.008)
    while True:
        pipe.send(len(poll.poll(0)))
        pipe.recv()


@dataclass
class Probe:
    """A transfer, its two ends, and the longest that a byte was under way."""

    left: socket.socket
    right: socket.socket
    sent: float = 0.0
    worst: float = 0.0
    under_way: bool = False

    @property
    def names(self) -> set[str]:
        """Of both clients, as in /proc/net/tcp."""
        return {_in_hex(*sock.getsockname()) for sock in (self.left, self.right)}


def _in_hex(host: str, port: int) -> str:
    (address,) = struct.unpack("=I", socket.inet_aton(host))
    return f"{address:08X}:{port:04X}"


def exchange_bytes(port: int, number: int, pipe: Connection) -> None:
    """Be so many transfers that exchange a byte all the time; answer each question with the longest pauses since the
    one before. First of all say what their clients are called."""
    probes = []
    for _ in range(number):
        probes.append(Probe(*met(port)))
        time.sleep(TURN_SECONDS / 4)  # or one worker would have them all
    pipe.send([probe.names for probe in probes])
    poll = select.poll()
    by_fd = {}
    for probe in probes:
        probe.left.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        probe.right.setblocking(False)
        poll.register(probe.right, select.POLLIN)
        by_fd[probe.right.fileno()] = probe
    while True:
        now = time.monotonic()
        for probe in probes:
            if not probe.under_way and now - probe.sent > PING_SECONDS:
                with contextlib.suppress(OSError):  # of a worker that was killed
                    probe.left.send(b"p")
                    probe.sent, probe.under_way = now, True
        for fd, _ in poll.poll(1):
            _hear(by_fd[fd], poll)
        if pipe.poll():
            pipe.recv()
            now = time.monotonic()
            pipe.send([max(probe.worst, now - probe.sent if probe.under_way else 0.0) for probe in probes])
            for probe in probes:
                probe.worst = 0.0


def _hear(probe: Probe, poll: select.poll) -> None:
    try:
        heard = probe.right.recv(100)
    except BlockingIOError:
        return
    except OSError:
        heard = b""
    probe.under_way = False
    probe.worst = max(probe.worst, time.monotonic() - probe.sent)
    if not heard:
        poll.unregister(probe.right)


def meet_again_and_again(port: int, pipe: Connection) -> None:
    """Meet as new pairs; answer each question with how long that took, since the one before."""
    took = []
    while True:
        began = time.monotonic()
        try:
            for sock in met(port):
                sock.close()
        except (OSError, AssertionError):
            pass  # of a worker that was killed just then: it has taken as long as it has
        took.append(time.monotonic() - began)
        if pipe.poll():
            pipe.recv()
            pipe.send(took)
            took = []
        time.sleep(MEET_SECONDS)


def all_fds() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Aside:
    """A process that works on until it is asked; ends with the block."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=work, args=(*arguments, theirs), daemon=True)
        self._process.start()

    def hear(self) -> object:
        """What it has to say."""
        if not self._pipe.poll(120):
            raise SystemExit("a process of clients does not answer")
        return self._pipe.recv()

    def ask(self) -> object:
        """What it says, asked now."""
        self._pipe.send(None)
        return self.hear()

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


@dataclass
class Event:
    """What something that happened to the workers was like for everybody else."""

    name: str
    seconds: float = 0.0
    pauses: list[float] = field(default_factory=list)
    own_pauses: list[float] = field(default_factory=list)
    longest_iteration: float = 0.0
    meetings: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def row(self, waiting: int, cpu_without: float) -> dict[str, object]:
        """The figures; `cpu_without` is what all workers take in a second when nothing happens."""
        return {
            "what": self.name,
            **self._for_others(),
            "longest iteration, ms of CPU": _ms(self.longest_iteration),
            "CPU for each who waits, us": round(1e6 * (self.cpu - self.seconds * cpu_without) / waiting, 2),
        }

    def _for_others(self) -> dict[str, object]:
        """What those noticed who do not just wait, if there are any."""
        if not self.pauses:
            return {}
        return {
            "longest pause of a transfer, ms": _ms(max(self.pauses)),
            "median of the longest of each, ms": _ms(statistics.median(self.pauses)),
            "longest at the worker itself, ms": _ms(max(self.own_pauses, default=0.0)),
            "slowest of so many new pairs, ms": [_ms(max(self.meetings)), len(self.meetings)],
        }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


class Siege:
    """Workers, their crowd and, unless there is `nobody_else`, their probes."""

    def __init__(self, workers: Workers, stack: contextlib.ExitStack, waiting: int, *, nobody_else: bool) -> None:
        self.workers = workers
        self.waiting = waiting
        self._crowd = []
        for number, left in enumerate(range(waiting, 0, -CLIENTS_PER_PROCESS)):
            arguments = (f"127.0.1.{number + 1}", min(left, CLIENTS_PER_PROCESS))
            self._crowd.append(Aside(wait_in_a_crowd, workers.port, *arguments))
            stack.callback(self._crowd[-1].end)
        for some in self._crowd:
            some.hear()
        wait_until(lambda: workers.rows("current")[0]["waiting"] == waiting, 30, "all wait")
        self._names: list[set[str]] = []
        self._bytes: Aside | None = None
        self._pairs: Aside | None = None
        if nobody_else:
            return
        self._bytes = Aside(exchange_bytes, workers.port, PAIRS_PER_WORKER * len(workers.workers))
        stack.callback(self._bytes.end)
        self._names = self._bytes.hear()  # type: ignore[assignment]
        self._pairs = Aside(meet_again_and_again, workers.port)
        stack.callback(self._pairs.end)

    def _ask_the_others(self) -> tuple[list[float], list[float]]:
        """The longest pause of each transfer, and how long new pairs took to meet, since this was last asked."""
        if self._bytes is None or self._pairs is None:
            return [], []
        return self._bytes.ask(), self._pairs.ask()  # type: ignore[return-value]

    def event(self, name: str, seconds: float, work: Callable[[], object], whose: Relay | None = None) -> Event:
        """Do `work`, which happens to the worker `whose`, and tell what the next `seconds` are like."""
        own = set() if whose is None else self._probes_of(whose)
        self._ask_the_others()
        before = self.workers.living()
        for worker in before:
            begin_anew(self.workers.folder, worker.pid)
        event = Event(name)
        began, cpu = time.monotonic(), self._cpu()
        work()
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        event.seconds = time.monotonic() - began
        event.cpu = sum(after - cpu[pid] for pid, after in self._cpu().items() if pid in cpu)
        pauses, event.meetings = self._ask_the_others()
        event.pauses = [pause for number, pause in enumerate(pauses) if number not in own]
        event.own_pauses = [pause for number, pause in enumerate(pauses) if number in own]
        # A newcomer is busy with its start at first, which is nobody's loss.
        event.longest_iteration = max(work_of(self.workers.folder, worker.pid).longest for worker in before)
        return event

    def _cpu(self) -> dict[int, float]:
        """Seconds of CPU that the event loop of each worker has taken so far, by process id."""
        return {pid: _ran(pid) for pid in self.workers.pids}

    def _probes_of(self, worker: Relay) -> set[int]:
        """Which of the transfers are at a worker."""
        inodes = {}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == _in_hex("127.0.0.1", self.workers.port):
                inodes[fields[9]] = fields[2]
        names = set()
        for link in Path(f"/proc/{worker.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                name = os.readlink(link)
                if name.startswith("socket:"):
                    names.add(inodes.get(name[8:-1]))
        return {number for number, own in enumerate(self._names) if own & names}

    def cut_off(self) -> int:
        """How many of those who wait were told something, or sent away."""
        return sum(int(some.ask()) for some in self._crowd)  # type: ignore[call-overload]

    def waiting_at(self, worker: Relay) -> int:
        """How many wait at a worker, as it has recorded."""
        (row,) = self.workers.query("SELECT waiting FROM worker_share WHERE pid = ?", worker.pid)
        return int(row["waiting"])


def _ran(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def stand_still(worker: Relay) -> None:
    """Keep a worker from running for a while."""
    worker.process.send_signal(signal.SIGSTOP)
    time.sleep(STOPPED_SECONDS)
    worker.process.send_signal(signal.SIGCONT)


def rows(siege: Siege) -> Iterator[dict[str, object]]:
    """All that happens, one row after the other."""
    workers, waiting = siege.workers, siege.waiting
    quiet = siege.event("nothing", 4, lambda: None)
    without = quiet.cpu / quiet.seconds
    yield quiet.row(waiting, without)
    yield siege.event("one joins", 4, workers.start_one).row(waiting, without)
    first = workers.workers[0]
    moving = siege.waiting_at(first)
    gone: list[float] = []

    def leave() -> None:
        began = time.monotonic()
        workers.stop_one(0, 100)
        gone.append(time.monotonic() - began)

    row = siege.event("one leaves", 8, leave, first).row(waiting, without)
    del row["CPU for each who waits, us"]  # of some it is for those who have moved
    yield {**row, "who had to move": moving, "seconds until it was gone": round(gone[0], 1)}
    second = workers.workers[1]
    stopped = siege.event("one stands still for 5 s", 9, lambda: stand_still(second), second)
    yield stopped.row(waiting, without)
    cut_off, killed = siege.cut_off(), workers.workers[2]
    lost = siege.waiting_at(killed)
    death = siege.event("one is killed", 4, lambda: workers.kill_one(2), killed)
    yield {
        **death.row(waiting, without),
        "cut off before": cut_off,
        "and with it, of as many as waited there": [siege.cut_off(), lost],
    }


def measure(count: int, waiting: int, *, nobody_else: bool = False) -> list[dict[str, object]]:
    """So many workers, and so many who wait there: print a row for each that happens, and return them."""
    fds, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    options = ("--max-connections", str(int(fds * 0.875)), "--max-waiting", str(fds))
    told = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Workers(Path(folder), *options, count=count, env=counting(Path(folder))) as workers,
        contextlib.ExitStack() as stack,
    ):
        for row in rows(Siege(workers, stack, waiting, nobody_else=nobody_else)):
            told.append(row)
            print(json.dumps(row), flush=True)
        said = workers.log_text()
        counts = {what: said.count(what) for what in ("does not answer", "answers again")}
        bounds = sorted({line.partition("] ")[2] for line in said.splitlines() if "] --" in line})
        told.append({"in the log": counts, "bounds met": bounds})
        print(json.dumps(told[-1]))
    return told


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--waiting", type=int, default=60_000)
    parser.add_argument("--nobody-else", action="store_true", help="no transfers and no new pairs: for the cost alone")
    arguments = parser.parse_args()
    measure(arguments.workers, arguments.waiting, nobody_else=arguments.nobody_else)


if __name__ == "__main__":
    main()

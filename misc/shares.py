"""What `misc/siege.py` measures of what all clients and workers share: file descriptors, places, and a sibling's room.

Each case here is a function of how many workers there are; what it returns is a row of figures.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relay.cli import RESERVED_FDS
from tests.support.command_line import powerless
from tests.support.crowd import Crowd, Transfer
from tests.support.harness import (
    Relay,
    Service,
    Workers,
    cpu_seconds,
    handshake,
    met,
    new_side,
    new_token,
    open_fds,
    read_exactly,
)
from tests.support.hostile import NOISE

FREE = ("--max-new-per-source", "1000000", "--grace", "10")
SOURCES = 20
"""Of those who fill all places: more than are needed if each takes what is its share by default."""

Row = dict[str, object]


@contextlib.contextmanager
def _relay(*options: str, workers: int, nofile: int, inside: Sequence[str] = ()) -> Iterator[Relay | Workers]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        if workers == 1:
            with Relay(Path(folder), *FREE, *options, nofile=nofile, inside=inside, recording=True) as relay:
                yield relay
        else:
            with Workers(Path(folder), *FREE, *options, nofile=nofile, inside=inside, count=workers) as several:
                yield several


def _promised(nofile: int, workers: int) -> int:
    """How many connections all workers accept by default, with that limit for each."""
    held = (nofile - RESERVED_FDS) - 2 * min(1000, (nofile - RESERVED_FDS) // 16)
    return held if workers == 1 else held // 2 * workers


# File descriptors


def descriptors(workers: int) -> Row:
    """One source has all that it may have, in transfers that stand still: how many others are let in and served?"""
    rows: Row = {}
    for user, inside in (("root", ()), ("ordinary user", powerless())):
        nofile = 1000
        most = _promised(nofile, workers)
        bound = most // 2
        options = ("--max-per-source", str(bound // workers))
        with _relay(*options, workers=workers, nofile=nofile, inside=inside) as relay, contextlib.ExitStack() as stack:
            stalled, sent = _stall(relay, bound // 2, stack)
            fds = sum(map(open_fds, relay.pids))
            served = 0
            with contextlib.suppress(OSError):
                while served < most:
                    source = f"127.2.{served // 500}.{served // 2 % 250 + 1}"
                    first, second = (_dial(relay.port, source, 2) for _ in range(2))
                    stack.enter_context(first)
                    stack.enter_context(second)
                    token = new_token()
                    for sock in (first, second):
                        sock.sendall(handshake(token, new_side()))
                    assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"
                    served += 2
            rows[user] = {
                "promised": most,
                "of the one source": stalled,
                "MB it has sent": round(sent / 1e6),
                "descriptors then, all workers": fds,
                "others let in and served": served,
            }
    return rows


def _dial(port: int, source: str, seconds: float = 10, *, narrow: bool = False) -> socket.socket:
    sock = socket.socket()
    if narrow:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.settimeout(seconds)
    sock.bind((source, 0))
    sock.connect(("127.0.0.1", port))
    return sock


def _stall(relay: Service, pairs: int, stack: contextlib.ExitStack) -> tuple[int, int]:
    """Make so many transfers of one source stand still; returns their connections and what they have sent, in bytes."""
    sides = []
    for _ in range(pairs):
        token = new_token()
        pair = [stack.enter_context(_dial(relay.port, "127.1.0.1", narrow=True)) for _ in range(2)]
        try:
            for sock in pair:
                sock.sendall(handshake(token, new_side()))
            met_each_other = all(sock.recv(3) == b"ok\n" for sock in pair)
        except OSError:
            met_each_other = False
        if met_each_other:
            sides += pair
        else:
            for sock in pair:
                sock.close()
    sent = 0
    calm_since = time.monotonic()
    for sock in sides:
        sock.setblocking(False)
    while time.monotonic() < calm_since + 0.3:
        for sock in sides:
            with contextlib.suppress(BlockingIOError):
                sent += sock.send(NOISE)
                calm_since = time.monotonic()
    return len(sides), sent


# Places


def places(workers: int) -> Row:
    """Silent pairs of a few sources fill all places: how soon are others let in, and what does it cost?"""
    nofile = 18_000 // workers
    most = _promised(nofile, workers)
    bound = most // SOURCES // workers * 3 // 2  # the workers need not have the same number of each
    with _relay("--max-per-source", str(bound), workers=workers, nofile=nofile) as relay:
        with _Echo(relay.port) as calm:
            empty = _newcomers(relay, 10)
        with contextlib.ExitStack() as stack:
            began = time.monotonic()
            _fill(relay.port, most, stack)
            filled = time.monotonic() - began
            began = time.monotonic()
            _meet(relay.port, "127.8.0.1", 60)
            first = time.monotonic() - began
            echo = stack.enter_context(_Echo(relay.port))
            full = _newcomers(relay, 10)
            return {
                "places": most,
                "seconds to fill them": round(filled, 1),
                "seconds until the first pair of newcomers met": round(first, 1),
                "newcomers meet, with places": empty,
                "newcomers meet, without": full,
                "ms of an echo beside, p99 and worst, with places": calm.figures(),
                "ms of an echo beside, p99 and worst, without": echo.figures(),
            }


def _fill(port: int, most: int, stack: contextlib.ExitStack) -> None:
    """Take so many places with pairs that say nothing."""
    unmet: list[socket.socket] = []
    for number in range(most // 2):
        token, source = new_token(), f"127.1.0.{number % SOURCES + 1}"
        for _ in range(2):
            unmet.append(stack.enter_context(_dial(port, source)))
            unmet[-1].sendall(handshake(token, new_side()))
        if len(unmet) >= 200:
            for sock in unmet:
                sock.recv(3)
            unmet.clear()


def _meet(port: int, source: str, seconds: float) -> None:
    """Two newcomers meet, and leave; raises OSError when they are not let in."""
    with _dial(port, source, seconds) as one, _dial(port, source, seconds) as other:
        token = new_token()
        for sock in (one, other):
            sock.sendall(handshake(token, new_side()))
        assert read_exactly(one, 3) == read_exactly(other, 3) == b"ok\n"


def _newcomers(relay: Service, seconds: float) -> Row:
    """Pairs of newcomers come one after the other, each from an address of its own, and stay for a while."""
    took = []
    began, used = time.monotonic(), sum(map(cpu_seconds, relay.pids))
    with contextlib.ExitStack() as stack:
        number = 0
        while time.monotonic() < began + seconds:
            source = f"127.9.{number // 250 % 250}.{number % 250 + 1}"
            at = time.perf_counter()
            pair = [stack.enter_context(_dial(relay.port, source)) for _ in range(2)]
            token = new_token()
            for sock in pair:
                sock.sendall(handshake(token, new_side()))
            for sock in pair:
                read_exactly(sock, 3)
            took.append(1000 * (time.perf_counter() - at))
            number += 1
            time.sleep(0.005)
    used = sum(map(cpu_seconds, relay.pids)) - used
    quantiles = statistics.quantiles(took, n=100)
    return {
        "pairs": len(took),
        "ms, median": round(quantiles[49], 1),
        "ms, p99": round(quantiles[98], 1),
        "CPU for a pair, us": round(1e6 * used / len(took)),
    }


class _Echo:
    """A transfer that passes a byte on every few milliseconds."""

    def __init__(self, port: int) -> None:
        self._took: list[float] = []
        self._pair = met(port)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        first, second = self._pair
        while not self._over.wait(0.005):
            began = time.perf_counter()
            first.sendall(b".")
            read_exactly(second, 1)
            self._took.append(1000 * (time.perf_counter() - began))

    def figures(self) -> list[float]:
        """How long a byte took, in milliseconds: of a hundred the slowest but one, and of all."""
        return [round(statistics.quantiles(self._took, n=100)[98], 1), round(max(self._took), 1)]

    def __enter__(self) -> _Echo:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for sock in self._pair:
            sock.close()


# A sibling's room


def room(workers: int) -> Row:
    """All workers are nearly full and everything moves: each is restarted; then one is stopped for which there is no
    room."""
    if workers == 1:
        return {"nothing": "one worker has no sibling"}
    return {"restarted at 95 %": _restarted(workers), "without room": _without_room(workers)}


def _restarted(workers: int) -> Row:
    nofile = 4000
    with _relay(*("--max-per-source", "1000000"), workers=workers, nofile=nofile) as relay, Crowd(relay.port) as crowd:
        assert isinstance(relay, Workers)
        transfers = _moving(crowd, int(0.95 * _promised(nofile, workers)) // 2)
        took = []
        for number in range(workers):
            began = time.monotonic()
            crowd.run_beside(lambda number=number: relay.stop_one(number, 30))  # type: ignore[misc]
            took.append(round(time.monotonic() - began, 2))
            crowd.run_beside(relay.start_one)
        return {
            "transfers": len(transfers),
            "cut": sum(transfer.cut for transfer in transfers),
            "seconds of each worker to leave": took,
        }


def _without_room(workers: int) -> Row:
    nofile = 1000
    most = nofile - RESERVED_FDS
    options = ("--max-connections", str(most), "--max-waiting", str(most), "--max-per-source", "1000000")
    with _relay(*options, workers=workers, nofile=nofile) as relay, Crowd(relay.port) as crowd:
        assert isinstance(relay, Workers)
        transfers = _moving(crowd, int(0.97 * most * workers) // 2)
        leaving = relay.workers[0]
        began = time.monotonic()
        leaving.process.send_signal(signal.SIGTERM)
        crowd.run_for(8)
        still_moving = _that_move(crowd, transfers)
        crowd.run_beside(lambda: leaving.wait(60))
        ended = time.monotonic() - began
        crowd.run_for(1)
        cut = sum(transfer.cut for transfer in transfers)
        crowd.hang_up()
        rows = len(relay.wait_for_rows("usage", len(transfers), 20))
        return {
            "transfers": len(transfers),
            "moving 8 s after SIGTERM": still_moving,
            "seconds until it had ended (--grace 10)": round(ended, 1),
            "cut": cut,
            "records": rows,
            "its log": [line.partition("] ")[2] for line in leaving.log_text().splitlines()[-4:]],
        }


def _moving(crowd: Crowd, count: int) -> list[Transfer]:
    transfers: list[Transfer] = []
    for begin in range(0, count, 30):
        some = [crowd.transfer(500, 500) for _ in range(min(30, count - begin))]
        crowd.begin(some, 30)
        transfers += some
    return transfers


def _that_move(crowd: Crowd, transfers: list[Transfer]) -> int:
    before = [transfer.moved for transfer in transfers]
    crowd.run_for(1)
    return sum(transfer.moved > moved for transfer, moved in zip(transfers, before, strict=True))


CASES = {"descriptors": descriptors, "places": places, "room": room}

"""What `misc/siege.py` measures of what moves, and of what stands still: time of the event loop, and pipe memory.

Each case here is a function of how many workers there are; what it returns is a row of figures. CPU is that of all
workers, by the scheduler's account. The clients are C programs, `chatter.c` here and the benchmark's `load.c`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.command_line import powerless
from tests.support.harness import Relay, Service, Workers, met, own_memory

HERE = Path(__file__).resolve().parent
NOFILE = 20_000
OPTIONS = ("--grace", "0")
CFLAGS = ("-O2", "-std=c11", "-Wall", "-Wextra", "-pthread")
GIGABYTE = 1_000_000_000
SECONDS = 3.0
"""How long each figure is measured."""

Row = dict[str, object]


class Load:
    """A relay of so many workers, and the programs that are its clients."""

    def __init__(
        self,
        workers: int,
        stack: contextlib.ExitStack,
        inside: Sequence[str] = (),
        *,
        nofile: int = NOFILE,
        sitecustomize: str = "",
    ) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        nofile = self.nofile = min(nofile, hard)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (self.folder / "sitecustomize.py").write_text(sitecustomize)
        env = {"PYTHONPATH": f"{self.folder}:{HERE.parent}"}
        most = ("--max-connections", str(nofile * 7 // 8), "--max-waiting", str(nofile * 7 // 8))
        self.relay: Service = stack.enter_context(
            Relay(self.folder, *OPTIONS, *most, nofile=nofile, inside=inside, env=env)
            if workers == 1
            else Workers(
                self.folder, *OPTIONS, *most, nofile=nofile, inside=inside, env=env, count=workers, recording=False
            )
        )
        for source in (HERE / "chatter.c", HERE / "bench" / "load.c"):
            compiler = shutil.which("cc") or shutil.which("gcc")
            if compiler is None:
                raise SystemExit("needs a C compiler: apt-get install gcc libc6-dev")
            subprocess.run([compiler, *CFLAGS, str(source), "-o", str(self.folder / source.stem)], check=True)

    def cpu(self) -> float:
        """Seconds that all workers have used so far, to the nanosecond (clock_getcpuclockid(3))."""
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self.relay.pids)

    def share_of_a_core(self, seconds: float) -> float:
        """Of the next so many seconds."""
        began, used = time.monotonic(), self.cpu()
        time.sleep(seconds)
        return (self.cpu() - used) / (time.monotonic() - began)

    def _say(self, *words: object) -> Any:  # noqa: ANN401  # JSON
        program, *arguments = map(str, words)
        done = subprocess.run([str(self.folder / program), *arguments], stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    def bulk(self, pairs: int = 4, seconds: float = SECONDS) -> tuple[float, float]:
        """So many transfers move as much as they can: MB a second in all, and seconds of CPU for a GB."""
        used = self.cpu()
        told = self._say("load", "traffic", "--port", self.relay.port, "--pairs", pairs, "--seconds", seconds)
        return told["bytes"] / told["seconds"] / 1e6, (self.cpu() - used) / told["bytes"] * GIGABYTE

    def meetings(self, seconds: float = SECONDS) -> tuple[float, float]:
        """How long new pairs, one after the other, take to meet: ms, p50 and p99."""
        told = self._say("load", "pairs", "--port", self.relay.port, "--concurrent", 1, "--seconds", seconds)["met"]
        return round(told["p50_us"] / 1000, 2), round(told["p99_us"] / 1000, 2)

    @contextlib.contextmanager
    def chatter(self, pairs: int, rate: int, size: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
        """So many pairs that have met, and that say so many messages a second of such a size."""
        words = (self.relay.port, "127.9.0.1", pairs, rate, size, seconds)
        command = [str(self.folder / "chatter"), *map(str, words)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout is not None
            if program.stdout.readline() != "ready\n":
                raise SystemExit("the chatter did not begin")
            try:
                yield program
            finally:
                program.kill()


def _told(program: subprocess.Popen[str]) -> Any:  # noqa: ANN401  # JSON
    assert program.stdout is not None
    return json.loads(program.stdout.readline())


# Time


def loop_time(workers: int) -> list[Row]:
    """Many pairs say little, and few move much: what is left for whom?"""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        load = Load(workers, stack)
        for pairs, rate, size in (
            (10, 10_000, 1),
            (3900, 10_000, 1),
            (3900, 10_000, 1000),
            (10, 20_000, 1),
            (100, 20_000, 1000),
            (1000, 20_000, 1),
            (3900, 20_000, 1),
        ):
            alone, _ = load.bulk()
            with load.chatter(pairs, rate, size, 4 * SECONDS) as chatter:
                time.sleep(0.5)
                without_bulk = load.share_of_a_core(1)
                beside, _ = load.bulk(seconds=2 * SECONDS)
                meetings = load.meetings(SECONDS / 2)
                told = _told(chatter)
            rows.append(
                {
                    "pairs": pairs,
                    "messages a second": rate,
                    "bytes each": size,
                    "MB/s of 4 bulk transfers, alone and beside": [round(alone), round(beside)],
                    "ratio": round(beside / alone, 2),
                    "CPU of the messages alone, share of a core": round(without_bulk, 2),
                    "ms to meet, p50 and p99, without bulk": meetings,
                    "ms of a round trip on one of the pairs, p50, p99 and worst": _round_trips(told),
                    "messages that had to wait": told["held_up"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        rows.append(_meetings_beside_everything(load))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _meetings_beside_everything(load: Load) -> Row:
    """New pairs beside 3900 that say little and 4 that move much."""
    with load.chatter(3900, 20_000, 1, 3 * SECONDS), contextlib.ExitStack() as stack:
        command = [str(load.folder / "load"), "traffic", "--port", str(load.relay.port), "--pairs", "4"]
        bulk = subprocess.Popen([*command, "--seconds", str(2 * SECONDS)], stdout=subprocess.PIPE)
        stack.callback(bulk.wait)
        time.sleep(0.5)
        beside = "3900 pairs with 20 000 messages a second and 4 that move much"
        return {f"ms to meet, p50 and p99, beside {beside}": load.meetings()}


def _round_trips(told: dict[str, float]) -> list[float]:
    return [round(told[name], 2) for name in ("p50_ms", "p99_ms", "max_ms")]


# Messages


def messages(workers: int) -> list[Row]:
    """What a message costs on pairs that are busy, and on those that were quiet for a second; memory of a pair."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        load = Load(workers, stack)
        idle = load.share_of_a_core(2)
        for pairs in (10, 300, 1000, 3900):
            before = sum(map(own_memory, load.relay.pids))
            rate = 3900  # so each of 3900 is quiet for a second between two
            with load.chatter(pairs, rate, 100, 2 * SECONDS + 2) as chatter:
                time.sleep(1)
                used = load.share_of_a_core(SECONDS)
                memory = sum(map(own_memory, load.relay.pids)) - before
                told = _told(chatter)
            rows.append(
                {
                    "pairs": pairs,
                    "seconds between two messages of a pair": round(pairs / rate, 2),
                    "CPU of a message, us": round(1e6 * (used - idle) / _a_second(told), 1),
                    "memory of a pair, KiB": round(memory / pairs / 1024, 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            time.sleep(1)
    return rows


def _a_second(told: dict[str, float]) -> float:
    """How many messages there were, those of round trips included."""
    return (told["messages"] + 2 * told["round_trips"]) / told["seconds"]


# Pipe memory


def pipes(workers: int) -> Row:
    """Transfers that stand still take an ordinary user's pipe memory: what does an honest one cost, and after?"""
    with contextlib.ExitStack() as stack:
        load = Load(workers, stack, powerless())
        before = _transfers(load)
        with contextlib.ExitStack() as stalled:
            sent = sum(_stall(load.relay.port, stalled) for _ in range(36))
            during = _transfers(load)
        time.sleep(1)
        after = _transfers(load)
    with contextlib.ExitStack() as stack:
        copied = _transfers(Load(workers, stack, powerless(), sitecustomize=WITHOUT_PIPES))
    figures = {"before": before, "beside 36 stalled pairs": during, "a second after": after, "by copies only": copied}
    return {
        "MB that the stalled pairs have sent": round(sent / 1e6),
        "MB/s": {name: round(rate) for name, (rate, _) in figures.items()},
        "CPU s/GB": {name: round(cpu, 3) for name, (_, cpu) in figures.items()},
        "CPU beside stalled pairs, to that of copies": round(during[1] / copied[1], 2),
        "CPU after, to before": round(after[1] / before[1], 2),
    }


WITHOUT_PIPES = """
from relay.transfer.pipes import PipePool

PipePool.borrow = lambda pool: None
"""
"""Makes a worker one that copies all."""


def _transfers(load: Load) -> tuple[float, float]:
    """Medians of five."""
    rates, costs = zip(*(load.bulk(1, 1.5) for _ in range(5)), strict=True)
    return statistics.median(rates), statistics.median(costs)


def _stall(port: int, stack: contextlib.ExitStack, most: int = 200_000, calm: float = 0.1) -> int:
    """A pair of which nobody reads, and in which both send until they have sent `most`, or nothing is taken for a
    while; returns how many bytes were taken."""
    total = 0
    for sock in met(port, stack=stack):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        sent, calm_since = 0, time.monotonic()
        while sent < most and time.monotonic() < calm_since + calm:
            with contextlib.suppress(BlockingIOError):
                sent += sock.send(bytes(16384))
                calm_since = time.monotonic()
        total += sent
    return total


# Standing still


def still(workers: int) -> list[Row]:
    """What pairs cost that stand still, and those that are idle, and those who wait."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        load = Load(workers, stack)
        nothing = load.share_of_a_core(5)
        for _ in range(2000):
            _stall(load.relay.port, stack, 1_000_000, 0.002)
        time.sleep(2)
        rows.append({"2000 stalled pairs, % of a core more than nobody": _percent(load.share_of_a_core(10) - nothing)})
        print(json.dumps(rows[-1]), flush=True)
    for how in ("ended its stream", "gone"):
        with contextlib.ExitStack() as stack:
            load = Load(workers, stack)
            nothing = load.share_of_a_core(5)
            _leave_stalled(load.relay.port, 2000, stack, gone=how == "gone")
            time.sleep(60)  # they are looked at ever more seldom
            more = load.share_of_a_core(40) - nothing
        rows.append({f"2000 stalled pairs of which one side has {how}, % of a core more than nobody": _percent(more)})
        print(json.dumps(rows[-1]), flush=True)
    with contextlib.ExitStack() as stack:
        load = Load(workers, stack, nofile=65_536)
        nothing = load.share_of_a_core(5)
        places = workers * load.nofile * 3 // 4
        pairs, waiting = min(10_000, places // 5), min(30_000, places * 3 // 5)
        fds = load.nofile * 3 // 4
        for kind, count, fds_each in (("pairs", pairs, 2), ("waiters", waiting, 1)):
            for begun in range(0, count, fds // fds_each):
                _hold(load, kind, min(fds // fds_each, count - begun), stack)
        time.sleep(2)
        more = load.share_of_a_core(10) - nothing
        rows.append({f"{pairs} idle pairs and {waiting} who wait, % of a core more than nobody": _percent(more)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _leave_stalled(port: int, count: int, stack: contextlib.ExitStack, *, gone: bool) -> None:
    """So many pairs whose receivers read nothing, though there is more than they have room for, and whose senders have
    ended their streams, or are `gone`."""
    pairs = []
    for _ in range(count):
        sender, receiver = met(port, stack=stack)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sender.sendall(bytes(40_000))
        pairs.append((sender, receiver))
    time.sleep(1)  # all of it is on its way
    for sender, _ in pairs:
        if gone:
            sender.close()
        else:
            sender.shutdown(socket.SHUT_WR)
    for _ in range(2 if gone else 0):  # the first one is answered with a reset, and the second one knows of it
        time.sleep(1)
        for _, receiver in pairs:
            with contextlib.suppress(OSError):
                receiver.send(b"?")


def _hold(load: Load, kind: str, count: int, stack: contextlib.ExitStack) -> None:
    """So many `pairs` or `waiters` come, and stay."""
    command = [str(load.folder / "load"), "hold", "--port", str(load.relay.port)]
    hold = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    stack.callback(hold.kill)
    assert hold.stdin is not None
    assert hold.stdout is not None
    print(kind, count, file=hold.stdin, flush=True)
    if not hold.stdout.readline():
        raise SystemExit(f"there is no room for {count} {kind}")


def _percent(share: float) -> float:
    return round(100 * share, 2)


CASES = {"time": loop_time, "messages": messages, "pipes": pipes, "still": still}

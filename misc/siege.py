#!/usr/bin/env python3
"""How much longer a transfer takes while somebody else besieges the relay, measured in one run.

    misc/siege.py --workers 2
    misc/siege.py --workers 2 --case places

The first is a siege by strangers; the others take what all share. `misc/moving.py` has the `time` of the event loop,
the cost of `messages`, the memory of `pipes`, and what it costs to stand `still`; `misc/shares.py` has `descriptors`,
`places`, and a sibling's `room`; `crowds` is `misc/crowds.py`, with 15 000 who wait for each worker.

Two thousand connections from one address dribble their handshake, a byte a second each, and are made again when they
are cut off; five hundred from another address send noise, as fast as it is taken, and come back at once. Meanwhile a
transfer of `--megabytes` is made from a third address, and new pairs meet. Times with and without the siege alternate,
so that what else the machine does falls on both. The besiegers run in processes of their own; on a machine with few
processors they take theirs from the relay, which is part of the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.synchronize
import os
import resource
import select
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import crowds
import moving
import shares

from tests.support.harness import Workers, handshake, met, new_side, new_token
from tests.support.hostile import NOISE, honest_transfer

SLOW = 2000
GARBAGE = 500

CASES: dict[str, Callable[[int], object]] = {
    **moving.CASES,
    **shares.CASES,
    "crowds": lambda workers: crowds.measure(workers, crowds.CLIENTS_PER_PROCESS * workers),
}


def dial(port: int, source: str) -> socket.socket:
    """Begin to connect."""
    sock = socket.socket()
    # What they have sent and nobody has taken would be in the memory of their own machines, and all that the kernel
    # gives to TCP is one pool: with the default it would be this that slows the transfer.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    sock.bind((source, 0))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect(("127.0.0.1", port))
    return sock


def dribble(port: int, on: multiprocessing.synchronize.Event) -> None:
    """Hold `SLOW` connections that say a byte a second of a handshake."""
    _all_fds()
    held: list[tuple[socket.socket, bytes]] = []
    while True:
        if not on.is_set():
            for sock, _ in held:
                sock.close()
            held = []
            on.wait()
        began = time.monotonic()
        rest: list[tuple[socket.socket, bytes]] = []
        for sock, line in held:
            try:
                sock.send(line[:1])
                ended = _has_answer(sock)
            except BlockingIOError:
                ended = False
            except OSError:
                ended = True
            if ended:
                sock.close()
            else:
                rest.append((sock, line[1:] or b""))
        while len(rest) < SLOW:
            rest.append((dial(port, "127.1.0.1"), handshake(new_token(), new_side())[:-1]))
        held = rest
        time.sleep(max(0.0, began + 1 - time.monotonic()))


def _has_answer(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True


def pour_garbage(port: int, on: multiprocessing.synchronize.Event) -> None:
    """Hold `GARBAGE` connections that send noise until they are cut off."""
    _all_fds()
    poller = select.epoll()
    held: dict[int, socket.socket] = {}
    while True:
        if not on.is_set():
            for sock in held.values():
                sock.close()
            held.clear()
            on.wait()
        while len(held) < GARBAGE:
            sock = dial(port, "127.1.0.2")
            held[sock.fileno()] = sock
            poller.register(sock.fileno(), select.EPOLLOUT)
        for fd, _ in poller.poll(0.1):
            if not _say_noise(held[fd]):
                held.pop(fd).close()


def _say_noise(sock: socket.socket) -> bool:
    """Send what fits; False when the connection is over."""
    try:
        sock.send(NOISE[: 1 << 16])
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _all_fds() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def meeting(port: int) -> float:
    """Seconds until a new pair has been told ok."""
    began = time.perf_counter()
    for sock in met(port):
        sock.close()
    return time.perf_counter() - began


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", choices=["strangers", *CASES], default="strangers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--bounds-for-loopback", action="store_true", help="count loopback addresses like all others")
    arguments = parser.parse_args()
    if arguments.case != "strangers":
        figures = CASES[arguments.case](arguments.workers)
        if isinstance(figures, dict):  # else each row was printed when it was there
            print(json.dumps(figures, indent=2))
        return
    # Spared by default, like all of this machine's own addresses; an attacker from elsewhere is not.
    options = ("--max-new-per-source", "200") if arguments.bounds_for_loopback else ()
    on = multiprocessing.Event()
    took: dict[bool, list[float]] = {False: [], True: []}
    meetings: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder, Workers(Path(folder), *options, count=arguments.workers) as workers:
        besiegers = [
            multiprocessing.Process(target=work, args=(workers.port, on), daemon=True)
            for work in (dribble, pour_garbage)
        ]
        for process in besiegers:
            process.start()
        for number in range(2 * arguments.rounds + 1):
            besieged = number % 2 == 1
            (on.set if besieged else on.clear)()
            time.sleep(3)
            for _ in range(20):
                meetings[besieged].append(meeting(workers.port))
            took[besieged].append(honest_transfer(workers.port, arguments.megabytes * 1_000_000))
        for process in besiegers:
            process.kill()
            process.join()
        records = workers.rows("all_time")[0]
        # Each beside the two around it, so that what comes and goes on the machine falls on both.
        ratios = [
            besieged / statistics.mean(took[False][number : number + 2]) for number, besieged in enumerate(took[True])
        ]
        print(
            json.dumps(
                {
                    "workers": arguments.workers,
                    "processors": os.cpu_count(),
                    "seconds without": [round(seconds, 3) for seconds in took[False]],
                    "seconds besieged": [round(seconds, 3) for seconds in took[True]],
                    "ratios": [round(ratio, 2) for ratio in ratios],
                    "median ratio": round(statistics.median(ratios), 2),
                    "ms to meet, median and worst, without": _ms(meetings[False]),
                    "ms to meet, median and worst, besieged": _ms(meetings[True]),
                    "errory on record": records["mood_errory"],
                    "bounds in the log": sorted(
                        {line.partition("] ")[2] for line in workers.log_text().splitlines() if "] --" in line}
                    ),
                },
                indent=2,
            )
        )


def _ms(seconds: list[float]) -> list[float]:
    return [round(1000 * statistics.median(seconds), 1), round(1000 * max(seconds), 1)]


if __name__ == "__main__":
    main()

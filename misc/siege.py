#!/usr/bin/env python3
"""How much longer a transfer takes while somebody else besieges the relay, measured in one run.

    misc/siege.py --workers 2
    misc/siege.py --workers 2 --case places

The first is a siege by strangers; the others take what all share. `misc/moving.py` has the `time` of the event loop,
the cost of `messages`, the memory of `pipes`, and what it costs to stand `still`; `misc/shares.py` has `descriptors`,
`places`, and a sibling's `room`; `crowds` is `misc/crowds.py`, with 15 000 who wait for each worker.

Two thousand connections from one address dribble their handshake, a byte a second each, and are made again when they
are cut off; five hundred from another address send noise, as fast as it is taken, and come back at once; two hundred
from a third ask for WebSocket, send pings, empty frames or noise, and come back at once. Meanwhile a transfer of
`--megabytes` is made over TCP, and then one from a WebSocket client to one over TCP, and new pairs meet. Times with
and without the siege alternate, so that what else the machine does falls on both. The besiegers run in processes of
their own; on a machine with few processors they take theirs from the relay, which is part of the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.synchronize
import os
import random
import resource
import select
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import crowds
import moving
import shares

from tests.support.client_frames import BINARY, CLOSE, CONT, PING, Sent
from tests.support.harness import Workers, connect, handshake, met, new_side, new_token, read_exactly
from tests.support.hostile import NOISE, honest_transfer
from tests.support.model_clients import REQUEST
from tests.support.web import web_options, web_port

SLOW = 2000
GARBAGE = 500
PESTS = 200
LONG_FRAME = b"\x82\xff" + (1 << 40).to_bytes(8, "big") + bytes(4)  # a mask that changes nothing

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
    _pour(port, "127.1.0.2", GARBAGE, [(b"", NOISE[: 1 << 16])], on)


def pester(port: int, on: multiprocessing.synchronize.Event) -> None:
    """Hold `PESTS` connections that speak WebSocket, without end: half of them wait, the others have no line yet."""
    line = Sent(BINARY, handshake(new_token(), new_side())).wire
    ways = [
        (REQUEST + line, Sent(PING, b"?").wire * 5000),
        (REQUEST + line, NOISE[: 1 << 16]),
        (REQUEST + Sent(BINARY, b"please", final=False).wire, Sent(CONT, final=False).wire * 5000),
        (REQUEST + LONG_FRAME, NOISE[: 1 << 16]),
    ]
    _pour(port, "127.1.0.3", PESTS, ways, on)


def _pour(
    port: int, source: str, most: int, ways: list[tuple[bytes, bytes]], on: multiprocessing.synchronize.Event
) -> None:
    """Hold `most` connections that say something first, and then something else until they are cut off."""
    _all_fds()
    poller = select.epoll()
    held: dict[int, tuple[socket.socket, Iterator[bytes]]] = {}
    while True:
        if not on.is_set():
            for sock, _ in held.values():
                sock.close()
            held.clear()
            on.wait()
        while len(held) < most:
            sock = dial(port, source)
            first, more = random.choice(ways)
            held[sock.fileno()] = sock, itertools.chain([first] if first else [], itertools.repeat(more))
            poller.register(sock.fileno(), select.EPOLLOUT)
        for fd, _ in poller.poll(0.1):
            sock, words = held[fd]
            if not _say(sock, next(words)):
                held.pop(fd)[0].close()


def _say(sock: socket.socket, words: bytes) -> bool:
    """Send what fits; False when the connection is over."""
    try:
        sock.send(words)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _all_fds() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def web_transfer(web: int, port: int, size: int) -> float:
    """Send `size` bytes from a WebSocket client to one over TCP, in messages of 256 KiB; return the seconds it took.

    Raises:
        AssertionError: not every byte arrived in its place.
    """
    began = time.perf_counter()
    token = new_token()
    frame = Sent(BINARY, NOISE).wire
    count = max(1, size // len(NOISE))

    def send() -> None:
        for _ in range(count):
            left.sendall(frame)
        left.sendall(Sent(CLOSE, b"\x03\xe8").wire)

    with connect(web) as left, connect(port) as right:
        left.sendall(REQUEST + Sent(BINARY, handshake(token, new_side())).wire)
        right.sendall(handshake(token, new_side()))
        assert read_exactly(right, 3) == b"ok\n"
        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(count):
            assert read_exactly(right, len(NOISE)) == NOISE
        assert right.recv(1) == b""
        sender.join()
    return time.perf_counter() - began


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
    web_took: dict[bool, list[float]] = {False: [], True: []}
    meetings: dict[bool, list[float]] = {False: [], True: []}
    options = (*options, *web_options())
    with tempfile.TemporaryDirectory() as folder, Workers(Path(folder), *options, count=arguments.workers) as workers:
        web = web_port(workers)
        besiegers = [
            multiprocessing.Process(target=work, args=(port, on), daemon=True)
            for work, port in ((dribble, workers.port), (pour_garbage, workers.port), (pester, web))
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
            web_took[besieged].append(web_transfer(web, workers.port, arguments.megabytes * 1_000_000))
        for process in besiegers:
            process.kill()
            process.join()
        records = workers.rows("all_time")[0]
        ratios, web_ratios = _ratios(took), _ratios(web_took)
        print(
            json.dumps(
                {
                    "workers": arguments.workers,
                    "processors": os.cpu_count(),
                    "seconds without": [round(seconds, 3) for seconds in took[False]],
                    "seconds besieged": [round(seconds, 3) for seconds in took[True]],
                    "ratios": [round(ratio, 2) for ratio in ratios],
                    "median ratio": round(statistics.median(ratios), 2),
                    "seconds over WebSocket without": [round(seconds, 3) for seconds in web_took[False]],
                    "seconds over WebSocket besieged": [round(seconds, 3) for seconds in web_took[True]],
                    "median ratio over WebSocket": round(statistics.median(web_ratios), 2),
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


def _ratios(took: dict[bool, list[float]]) -> list[float]:
    """Each beside the two around it, so that what comes and goes on the machine falls on both."""
    return [besieged / statistics.mean(took[False][number : number + 2]) for number, besieged in enumerate(took[True])]


def _ms(seconds: list[float]) -> list[float]:
    return [round(1000 * statistics.median(seconds), 1), round(1000 * max(seconds), 1)]


if __name__ == "__main__":
    main()

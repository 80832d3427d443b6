"""Clients that mean no good, from addresses of their own, and honest ones beside them that must not notice.

    relay = relay_factory("--max-per-source", "20")
    held = [dial(relay.port, "127.1.0.1") for _ in range(30)]
    honest_transfer(relay.port)     # from 127.0.0.1; AssertionError unless every byte arrives

All of 127.0.0.0/8 is this machine's own, so any of its addresses will do as another source. Sizes are bytes, times
seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

from tests.support.harness import connect, cpu_seconds, met, read_exactly

NOISE = random.Random(1).randbytes(1 << 18)
ATTACKER = "127.1.0.1"


def dial(port: int, source: str = ATTACKER, host: str = "127.0.0.1") -> socket.socket:
    """Connect from the address `source`; every call fails after ten seconds."""
    return connect(port, host, source=source)


def narrow(port: int, source: str = ATTACKER, host: str = "127.0.0.1") -> socket.socket:
    """A connection from that address that takes next to nothing as long as it is not read, so that what is sent to it
    soon rests in the relay."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
    sock.settimeout(15)
    sock.bind((source, 0))
    sock.connect((host, port))
    return sock


def answer(sock: socket.socket, seconds: float = 10) -> bytes:
    """Everything the relay says until it ends the connection, in whichever way."""
    sock.settimeout(seconds)
    said = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(1 << 18):
            said += chunk
    return bytes(said)


def is_open(sock: socket.socket) -> bool:
    """Whether the relay has neither said anything nor ended the connection, as far as one knows by now."""
    return not select.select([sock], [], [], 0)[0]


def honest_transfer(port: int, size: int = 300_000, source: str | None = None) -> float:
    """Send `size` bytes of noise from one side to the other, and an answer back; return the seconds it took.

    Raises:
        AssertionError: not every byte arrived in its place.
    """
    began = time.perf_counter()
    left, right = met(port, source)
    with left, right:
        said = hashlib.sha256()

        def send() -> None:
            rest = size
            while rest > 0:
                chunk = NOISE[: min(rest, len(NOISE))]
                left.sendall(chunk)
                said.update(chunk)
                rest -= len(chunk)
            left.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        heard = hashlib.sha256()
        while chunk := right.recv(1 << 18):
            heard.update(chunk)
        sender.join()
        assert heard.digest() == said.digest()
        right.sendall(b"got it")
        right.shutdown(socket.SHUT_WR)
        assert read_exactly(left, 6) == b"got it"
        assert left.recv(1) == b""
    return time.perf_counter() - began


def load_while(seconds: float, *pids: int) -> float:
    """How many processors the processes keep busy together, measured for so long."""
    before, began = sum(map(cpu_seconds, pids)), time.monotonic()
    time.sleep(seconds)
    return (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - began)


def move(sender: socket.socket, receiver: socket.socket, over: threading.Event) -> None:
    """Have a transfer never be idle, until `over`."""
    while not over.wait(0.05):
        sender.sendall(b"x" * 20_000)
        receiver.recv(1 << 16)


@contextlib.contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` on a thread until the block is left; it gets the event that says so. What it raises is raised."""
    over = threading.Event()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work(over)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)
    if raised:
        raise raised[0]

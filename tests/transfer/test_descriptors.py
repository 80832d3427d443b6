"""File descriptors: what connections were promised is theirs, however many transfers of whom stand still or move.

At the size of a relay with a limit of 1000, and with one source that takes all that it may have.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relay.cli import RESERVED_FDS
from tests.support.command_line import powerless
from tests.support.harness import (
    Relay,
    Service,
    Workers,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
    wait_until,
)
from tests.support.hostile import NOISE, dial, honest_transfer, is_open, narrow

MOST = 760
NOFILE = 400
OTHER_FDS = 240
"""What each worker may have beside connections."""

BOUND = MOST // 2
"""What one source may have, of `MOST` connections at a time in all workers together."""


@pytest.fixture(autouse=True)
def room_for_clients() -> Iterator[None]:
    """Each client takes a descriptor here, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip(f"the hard limit of file descriptors is {hard}; raise it to 2000 (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def relay_with(count: int, folder: Path, inside: Sequence[str]) -> Relay | Workers:
    """A relay of so many workers, which share `MOST` and `BOUND`."""
    bounds = {"--max-connections": MOST, "--max-per-source": BOUND, "--max-waiting": MOST}
    options = [word for name, most in bounds.items() for word in (name, str(most // count))]
    options += ["--max-new-per-source", "100000", "--grace", "0"]
    nofile = MOST // count + OTHER_FDS
    if count == 1:
        return Relay(folder, *options, interface="::", nofile=nofile, inside=inside)
    return Workers(folder, *options, interface="::", nofile=nofile, inside=inside, count=count, recording=False)


def promised(nofile: int) -> int:
    """To how many connections a worker with that limit promises a descriptor, if it is alone."""
    pipes = (nofile - RESERVED_FDS) // 16
    return nofile - RESERVED_FDS - 2 * pipes


def stall(service: Service, host: str, source: str, stack: contextlib.ExitStack, pairs: int = BOUND // 2) -> int:
    """Pairs of one source, as many as it may have, that send until nothing is taken any more, and never read. Returns
    how many connections those are."""
    sides = []
    for _ in range(pairs):
        token = new_token()
        pair = [stack.enter_context(narrow(service.port, source, host)) for _ in range(2)]
        try:
            for sock in pair:
                sock.sendall(handshake(token, new_side()))
            met = all(sock.recv(3) == b"ok\n" for sock in pair)
        except OSError:
            met = False  # one worker has as many of them as it may have, the other one has not yet
        if met:
            sides += pair
        else:
            for sock in pair:
                sock.close()
    for sock in sides:
        sock.setblocking(False)
    calm_since = time.monotonic()
    while time.monotonic() < calm_since + 0.3:
        for sock in sides:
            with contextlib.suppress(BlockingIOError):
                sock.send(NOISE)
                calm_since = time.monotonic()
    return len(sides)


@pytest.mark.parametrize(
    ("count", "host", "source", "is_root"),
    [
        (1, "127.0.0.1", "127.1.0.1", True),
        (1, "::1", "::1", False),
        (2, "::1", "::1", True),
        (2, "127.0.0.1", "127.1.0.1", False),
    ],
    ids=["one-root", "one-ipv6", "two-root-ipv6", "two"],
)
def test_stalled_pairs_of_a_source_at_its_bound_leave_all_others_their_places(
    count: int, host: str, source: str, is_root: bool, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    service = stack.enter_context(relay_with(count, tmp_path, [] if is_root else powerless()))
    taken = stall(service, host, source, stack)
    assert taken >= BOUND * 0.8
    for number in range((MOST - taken) // 2 - 4):  # two for the last transfer, and some that are just being closed
        token = new_token()
        pair = [stack.enter_context(dial(service.port, f"127.2.{number // 250}.{number % 250 + 1}")) for _ in range(2)]
        for sock in pair:
            sock.sendall(handshake(token, new_side()))
        for sock in pair:
            assert read_exactly(sock, 3) == b"ok\n"
        pair[0].sendall(b"served")
        assert read_exactly(pair[1], 6) == b"served"
    honest_transfer(service.port, 3_000_000, source="127.3.0.1")


def test_pipes_of_those_who_move_take_no_descriptor_that_a_connection_was_promised(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    relay = stack.enter_context(Relay(tmp_path, "--grace", "0", nofile=NOFILE))
    most = promised(NOFILE)
    stall(relay, "127.0.0.1", "127.0.0.1", stack, 10)
    moving = [met(relay.port) for _ in range(20)]
    may_end = threading.Event()
    with ThreadPoolExecutor(2 * len(moving)) as aside:
        for pair in moving:
            for sock in pair:
                stack.enter_context(sock)
            aside.submit(_pour, pair[0], may_end)
            aside.submit(_drain_slowly, pair[1], may_end)
        try:
            idle = [stack.enter_context(connect(relay.port)) for _ in range(most - 60 - 10)]
            wait_until(lambda: _sockets(relay.pid) >= most - 10, what="all that was promised is there")
            assert all(is_open(sock) for sock in idle)
        finally:
            may_end.set()


def _pour(sock: socket.socket, may_end: threading.Event) -> None:
    sock.settimeout(1)
    with contextlib.suppress(OSError):
        while not may_end.is_set():
            with contextlib.suppress(TimeoutError):
                sock.send(bytes(1 << 16))


def _drain_slowly(sock: socket.socket, may_end: threading.Event) -> None:
    sock.settimeout(1)
    with contextlib.suppress(OSError):
        while not may_end.is_set():
            with contextlib.suppress(TimeoutError):
                sock.recv(1 << 16)
            time.sleep(0.01)


def _sockets(pid: int) -> int:
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    return count

"""Nobody takes what is another's: descriptors, places, and a sibling's room.

Instances of one kind: something that all share was promised to some, and given to whoever came first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relay.cli import RESERVED_FDS
from tests.support.crowd import Crowd
from tests.support.harness import (
    Relay,
    Service,
    Workers,
    connect,
    fill_the_way,
    handshake,
    met,
    new_side,
    new_token,
    stopped,
    wait_until,
)
from tests.support.hostile import dial, honest_transfer, is_open

NOFILE = 400


@pytest.fixture
def start(any_relay_factory: Callable[..., Service]) -> Callable[..., Service]:
    """A relay with the options of the call and few file descriptors, as one worker and as two."""
    return lambda *options: any_relay_factory("--grace", "1", *options, nofile=NOFILE)


def stalled(stack: contextlib.ExitStack, port: int, source: str, size: int = 6_000_000) -> None:
    """A pair from `source` of which neither side reads; each sends until nothing is taken any more, or `size`."""
    for sock in met(port, source):
        fill_the_way(stack.enter_context(sock), calm=0.15, most=size)


def test_stalled_pairs_of_one_source_leave_the_others_their_descriptors(
    start: Callable[..., Service], stack: contextlib.ExitStack
) -> None:
    relay = start("--max-per-source", "60", "--max-connections", "150")
    for _ in range(25):
        stalled(stack, relay.port, "127.1.0.1")
    others = [stack.enter_context(dial(relay.port, f"127.2.0.{number}")) for number in range(1, 81)]
    tokens = [new_token() for _ in range(40)]
    for number, sock in enumerate(others):
        sock.sendall(handshake(tokens[number // 2], new_side()))
    for sock in others:
        assert sock.recv(3) == b"ok\n"
    honest_transfer(relay.port, 3_000_000, source="127.3.0.1")


def test_pipes_take_no_descriptor_that_a_connection_was_promised(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    relay = stack.enter_context(Relay(tmp_path, "--grace", "0", nofile=NOFILE))
    most = NOFILE - RESERVED_FDS - 2 * ((NOFILE - RESERVED_FDS) // 16)
    for _ in range(10):
        stalled(stack, relay.port, "127.0.0.1")
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


# Places


def test_a_relay_full_of_idle_connections_lets_newcomers_in(
    start: Callable[..., Service], stack: contextlib.ExitStack
) -> None:
    relay = start("--max-connections", "40", "--max-per-source", "40", "--max-waiting", "40")
    workers = len(relay.pids)
    honest = [stack.enter_context(sock) for sock in met(relay.port, "127.9.0.1")]  # idle too, but it has only these
    silent = []
    for number in range(15 * workers):
        source = f"127.1.0.{number % 2 + 1}"
        silent += [stack.enter_context(sock) for sock in met(relay.port, source)]
    for number in range(10 * workers):
        silent.append(stack.enter_context(dial(relay.port, f"127.1.0.{number % 2 + 1}")))
        silent[-1].sendall(handshake(new_token(), new_side()))
    newcomers = [stack.enter_context(connect(relay.port)) for _ in range(2)]
    token = new_token()
    for sock in newcomers:
        sock.settimeout(25)
        sock.sendall(handshake(token, new_side()))
    for sock in newcomers:
        assert sock.recv(3) == b"ok\n"
    honest_transfer(relay.port, source="127.9.0.2")
    honest[0].sendall(b"still here")
    assert honest[1].recv(10) == b"still here"
    gone = [sock for sock in silent if not is_open(sock)]
    assert gone
    assert len(gone) <= 40 * workers
    assert relay.wait_for_records(2), "what was ended is on record, and so is the honest transfer"


def test_who_moves_something_never_gives_way(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    relay = stack.enter_context(
        Relay(tmp_path, "--grace", "0", "--max-connections", "20", "--max-per-source", "20", recording=True)
    )
    moving = [[stack.enter_context(sock) for sock in met(relay.port, "127.1.0.1")] for _ in range(10)]
    newcomer = stack.enter_context(connect(relay.port))
    newcomer.sendall(handshake(new_token(), new_side()))
    for _ in range(18):
        for first, second in moving:
            first.sendall(b"x")
            assert second.recv(1) == b"x"
        time.sleep(0.5)
    assert relay.records() == []
    assert relay.rows("current")[0]["waiting"] == 0, "so the newcomer is still in the listen queue"
    assert "let new connections wait" in relay.log_text()


# A sibling's room


@pytest.mark.parametrize("count", [2, 3, 4])
def test_workers_that_are_nearly_full_are_restarted_one_after_another_and_nothing_is_cut(
    tmp_path: Path, count: int
) -> None:
    most = (NOFILE - RESERVED_FDS - 2 * ((NOFILE - RESERVED_FDS) // 16)) // 2
    options = ("--max-per-source", "1000", "--max-new-per-source", "5000")
    with Workers(tmp_path, *options, count=count, nofile=NOFILE) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(3_000, 3_000) for _ in range(int(0.95 * most / 2) * count)]
        for begin in range(0, len(transfers), 20):
            crowd.begin(transfers[begin : begin + 20])
        for number in range(count):
            stopped = crowd.run_beside(lambda number=number: workers.stop_one(number, 20))  # type: ignore[misc]
            assert stopped == 0
            assert "no room" not in workers.workers[number].log_text()
            crowd.run_beside(workers.start_one)
            assert not any(transfer.cut for transfer in transfers)
        crowd.end(transfers)
        for transfer in transfers:
            transfer.assert_intact()
        assert len(workers.wait_for_rows("usage", len(transfers))) == len(transfers)


def test_what_finds_no_room_is_pumped_on_for_the_grace_and_recorded_and_the_log_says_how_many(tmp_path: Path) -> None:
    most = NOFILE - RESERVED_FDS
    bounds = ("--max-connections", str(most - 20), "--max-per-source", "1000", "--max-new-per-source", "5000")
    options = (*bounds, "--grace", "3")
    with Workers(tmp_path, *options, count=2, nofile=NOFILE) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(3_000, 3_000) for _ in range((most - 40) * 2 // 2)]
        for begin in range(0, len(transfers), 20):
            crowd.begin(transfers[begin : begin + 20])
        began = time.monotonic()
        leaving = workers.workers[0]
        leaving.process.send_signal(signal.SIGTERM)
        moved = [transfer.moved for transfer in transfers]
        crowd.run_for(1.5)
        assert all(now.moved > then for now, then in zip(transfers, moved, strict=True)), "all are pumped on"
        crowd.run_beside(lambda: leaving.wait(20))
        assert time.monotonic() - began < 3 + 5
        assert "have 3 seconds to finish; the other workers have no room for them" in leaving.log_text()
        assert "transfers" in leaving.log_text()
        crowd.run_for(0.5)
        cut = [transfer for transfer in transfers if transfer.cut]
        kept = [transfer for transfer in transfers if not transfer.cut]
        assert cut
        assert kept
        crowd.end(kept)
        for transfer in kept:
            transfer.assert_intact()
        assert len(workers.wait_for_rows("usage", len(transfers))) == len(transfers)


# Who comes back


def test_of_one_side_the_connection_that_came_last_is_matched_and_not_a_dead_one(any_relay: Service) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            token, side = new_token(), new_side()
            connections = []
            for _ in range(3):  # the line of each has died without a word, and its client came back
                connections.append(stack.enter_context(connect(any_relay.port)))
                connections[-1].sendall(handshake(token, side))
                waiting = len(connections)
                wait_until(lambda: any_relay.rows("current")[0]["waiting"] == waiting, what="it waits")  # noqa: B023
            partner = stack.enter_context(connect(any_relay.port))
            partner.sendall(handshake(token, new_side()))
            assert connections[-1].recv(3) == partner.recv(3) == b"ok\n"
            assert [sock.recv(3) for sock in connections[:-1]] == [b"", b""]
            for sock in [*connections, partner]:
                sock.close()
            wait_until(lambda: any_relay.rows("current")[0]["connected"] == 0, what="it is over")


@pytest.mark.parametrize("last_words", ["it leaves", "it speaks"])
def test_who_has_left_or_spoken_on_the_way_between_workers_meets_nobody(tmp_path: Path, last_words: str) -> None:
    with Workers(tmp_path, count=2) as workers, contextlib.ExitStack() as stack:
        token = new_token()
        waiting = stack.enter_context(connect(workers.port))
        waiting.sendall(handshake(token, new_side()))
        wait_until(lambda: workers.rows("current")[0]["waiting"] == 1, what="it waits")
        newcomers = []
        with stopped(*workers.workers):  # whoever accepts it, it is handed to the other one, which may stand still
            for _ in range(12):
                sock = stack.enter_context(connect(workers.port))
                sock.sendall(handshake(token, new_side()) + (b"x" if last_words == "it speaks" else b""))
                newcomers.append(sock)
                if last_words == "it leaves":
                    sock.close()
        partner = stack.enter_context(connect(workers.port))
        partner.sendall(handshake(token, new_side()))
        assert partner.recv(3) == waiting.recv(3) == b"ok\n"

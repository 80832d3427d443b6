"""--measure-paths names what limits a transfer, over simulated paths of each kind."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, Relay, Workers, met, query, read_exactly, reset, shake_hands
from tests.support.wan import STOCK, Leg, long_paths, not_allowed, settle

LIMITS = ("sender", "receiver", "path", "relay")
missing = not_allowed()
needs_paths = pytest.mark.skipif(bool(missing), reason=missing)


def counts(folder: Path, prefix: str) -> dict[str, int]:
    """What was counted, by the rest of the name, once the relay has ended; without what is 0."""
    (row,) = query(folder / "usage.sqlite", "SELECT counters FROM service")
    counted = Counter(json.loads(row["counters"]))
    return {name.removeprefix(prefix): count for name, count in counted.items() if name.startswith(prefix) and count}


def send(sender: socket.socket, receiver: socket.socket, size: int) -> None:
    """Move so many bytes, and end the transfer."""
    thread = threading.Thread(target=lambda: sender.sendall(bytes(size)))
    thread.start()
    read_exactly(receiver, size)
    thread.join(60)
    sender.close()
    receiver.close()


@contextlib.contextmanager
def far_apart(folder: Path, sender: Leg, receiver: Leg) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two clients that have met, at the ends of such paths, and a relay that measures."""
    with long_paths(sender=sender, receiver=receiver) as net:
        for host in (net.sender, net.receiver, net.relay):
            settle(host, STOCK)
        with Relay(
            folder,
            "--measure-paths",
            "--blur-usage",
            "600",
            interface="0.0.0.0",
            inside=net.relay.inside,
            recording=True,
        ) as relay:
            one = net.connect(net.sender, relay.port, congestion_control="cubic")
            other = net.connect(net.receiver, relay.port)
            with one, other:
                shake_hands(one, other)
                yield one, other


@needs_paths
def test_a_far_sender_is_named(tmp_path: Path) -> None:
    with far_apart(tmp_path, Leg(rtt_ms=200), Leg()) as (sender, receiver):
        send(sender, receiver, 3_000_000)
    assert counts(tmp_path, "path_limit.") == {"sender": 1}
    assert counts(tmp_path, "path_rtt.") == {"0.3": 1, "0.01": 1} or counts(tmp_path, "path_rtt.").get("0.3") == 1


@needs_paths
def test_a_lossy_path_to_the_receiver_is_named(tmp_path: Path) -> None:
    with far_apart(tmp_path, Leg(), Leg(rtt_ms=40, loss=0, loss_from_relay=2)) as (sender, receiver):
        send(sender, receiver, 2_000_000)
    assert counts(tmp_path, "path_limit.") == {"path": 1}
    assert set(counts(tmp_path, "path_resent.")) <= {"0.003", "0.01", "0.03", "0.1", "inf"}


@needs_paths
def test_a_receiver_that_does_not_read_is_named(tmp_path: Path) -> None:
    with far_apart(tmp_path, Leg(), Leg()) as (sender, receiver):
        read = threading.Thread(target=lambda: read_exactly(receiver, 1_500_000))
        read.start()
        sender.setblocking(False)
        until = time.monotonic() + 4
        while time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                sender.send(bytes(65536))
            time.sleep(0.001)
        read.join(10)
        reset(receiver)
    assert counts(tmp_path, "path_limit.") == {"receiver": 1}


def test_a_rate_of_ours_is_named_and_small_transfers_are_not_measured(tmp_path: Path) -> None:
    options = ("--measure-paths", "--pair-rate", "800000")
    with Relay(tmp_path, *options, recording=True) as relay:
        send(*met(relay.port), 1_500_000)
        send(*met(relay.port), 10_000)
        relay.wait_for_rows("usage", 2)
    assert counts(tmp_path, "path_limit.") == {"relay": 1}
    assert counts(tmp_path, "path_rate.") == {"1000000": 1}
    told = subprocess.run(
        [sys.executable, "-m", "relay.report.cli", "--paths", str(relay.usage_db)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    assert "100% of 1 transfers were limited by the relay itself: raise --pair-rate or --relay-rate" in told


def test_a_rate_of_ours_is_named_also_when_another_worker_has_begun_with_the_transfer(tmp_path: Path) -> None:
    with Workers(tmp_path, "--measure-paths", "--pair-rate", "1500000", count=2) as workers:
        sender, receiver = met(workers.port)
        are_replaced = threading.Event()

        def say_much() -> None:
            while not are_replaced.is_set():
                sender.sendall(bytes(100_000))
            sender.sendall(bytes(3_000_000))
            sender.close()

        def hear_it() -> None:
            while receiver.recv(1 << 16):
                pass

        sending, reading = threading.Thread(target=say_much), threading.Thread(target=hear_it)
        sending.start()
        read_exactly(receiver, 3_600_000)
        reading.start()
        for number in range(2):
            workers.start_one()
            workers.stop_one(number)
        are_replaced.set()
        for thread in (sending, reading):
            thread.join(60)
        receiver.close()
        workers.wait_for_rows("usage", 1)
    assert counts(tmp_path, "path_limit.") == {"relay": 1}


def test_nothing_is_measured_unasked(tmp_path: Path) -> None:
    with Relay(tmp_path, recording=True) as relay:
        send(*met(relay.port), 1_500_000)
        relay.wait_for_rows("usage", 1)
    assert counts(tmp_path, "path_") == {}

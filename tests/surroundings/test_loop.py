"""The event loop is never away from its sockets for longer than 50 ms, whatever stands still around it.

Both detectors of `tests.support.watched_relay` look; the first tests here are about them, since one that finds nothing
proves nothing unless it would have found something.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import (
    CHECKOUT,
    Relay,
    Workers,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    stopped,
    wait_until,
)
from tests.support.hostile import answer, honest_transfer, is_open
from tests.support.watched_relay import all_told, standstills

WATCHED = "tests.support.watched_relay"
measures = pytest.mark.alone
"""What it waited for a processor is no fault of a loop, and is told apart; not so what the kernel did for neighbours,
with their packets for instance, in the middle of a call of its own."""

STANDING_STILL = {
    "a greenlet that sleeps": "gevent.spawn(lambda: time.sleep(1)).join()",
    "a greenlet that computes": "gevent.spawn(lambda: [time.monotonic() for _ in range(12_000_000)]).join()",
    "a callback of the loop that waits for a lock": (
        "threading.Thread(target=hold).start(); held.wait(); timer = hub.loop.timer(0.01); "
        "timer.start(lambda: fcntl.flock(open('lock', 'w'), fcntl.LOCK_EX)); gevent.sleep(0.1)"
    ),
    "a thread that keeps the interpreter": (
        "threading.Thread(target=ctypes.PyDLL(None).usleep, args=[1_000_000]).start(); gevent.sleep(0.01)"
    ),
}

MISTAKEN = """
from relay.clients.matching import Matching

dismiss = Matching.dismiss

def mistaken(matching, client):
    if client.side == b"%s":
        raise RuntimeError("made for a test")
    dismiss(matching, client)

Matching.dismiss = mistaken
"""

PROGRAM = """
import ctypes, fcntl, threading, time
from pathlib import Path
import gevent
from tests.support.watched_relay import LoopWatch

held = threading.Event()

def hold():
    with open("lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held.set()
        time.sleep(1)

hub = gevent.get_hub()
watch = LoopWatch(Path("."))
watch.start()
gevent.sleep(0.1)
{}
gevent.sleep(0.1)
"""


@pytest.mark.parametrize("how", STANDING_STILL)
def test_a_loop_that_stands_still_is_found(tmp_path: Path, how: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    program = PROGRAM.format(STANDING_STILL[how])
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=30)
    worst = max(all_told(tmp_path), key=lambda one: one.seconds)  # on a busy machine, too
    assert worst.seconds > 0.5
    if "greenlet" in how:
        assert "Greenlet" in worst.by_gevent
    if "lock" in how:
        assert "<lambda>" in worst.seen


@measures
def test_a_loop_that_only_waits_for_its_sockets_is_not(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    program = PROGRAM.format("gevent.sleep(0.5)")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=30)
    assert standstills(tmp_path) == []


@measures
def test_honest_and_hostile_clients_restarts_and_kills_never_make_it_stand_still(tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "misc" / "soak.py"), "--short", "--minutes", "0.15"]
    command += ["--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("standstills-*"))) >= 4  # of that many workers somebody looked at


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Workers]:
    """Two workers, of which the first is looked at."""
    with Workers(tmp_path, count=1, program=WATCHED, env={"WATCH_FOLDER": str(tmp_path)}) as workers:
        workers.program = "relay"
        workers.start_one()
        yield workers


@measures
def test_nothing_that_stands_still_around_it_makes_it_stand_still(watched: Workers, tmp_path: Path) -> None:
    first, second = watched.workers
    lock = sqlite3.connect(watched.usage_db)
    lock.execute("BEGIN IMMEDIATE")
    with contextlib.closing(lock), stopped(second):
        before = time.monotonic()
        while time.monotonic() < before + 3:
            honest_transfer(watched.port, 1_000_000)
            for path in watched.run_dir.glob("worker-*"):
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
                    link.setblocking(False)
                    link.connect(str(path))
                    link.send(b"nonsense")
    assert first.pids
    wait_until(lambda: len(watched.rows("usage")) == len(watched.records()), what="all is recorded")
    assert standstills(tmp_path) == []


@measures
def test_a_stop_with_many_connections_is_no_standstill(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    options = ("--max-per-source", "2000", "--max-new-per-source", "2000", "--grace", "0.5")
    with Relay(tmp_path, *options, recording=True, program=WATCHED, env={"WATCH_FOLDER": str(tmp_path)}) as relay:
        for _ in range(200):
            met(relay.port, stack=stack)
        assert relay.stop() == 0
        assert len(relay.records()) == 200
    assert standstills(tmp_path) == []


def test_a_mistake_with_one_whose_time_has_come_keeps_it_from_nobody_else(tmp_path: Path) -> None:
    mistaken, side = tmp_path / "mistaken", new_side()
    mistaken.mkdir()
    (mistaken / "sitecustomize.py").write_text(MISTAKEN % side)
    environment = {"PYTHONPATH": f"{mistaken}:{CHECKOUT}"}
    patience = ("--wait-timeout", "1", "--handshake-timeout", "1")
    with Relay(tmp_path, *patience, env=environment) as relay, contextlib.ExitStack() as stack:
        relay.tracebacks_expected = True
        sides = [side] * 15 + [new_side() for _ in range(20)]
        waiting = []
        for its_side in sides:  # each says at once what it wants: a second passes soon on a busy machine
            waiting.append(stack.enter_context(connect(relay.port)))
            waiting[-1].sendall(handshake(new_token(), its_side))
        silent = stack.enter_context(connect(relay.port))
        assert [answer(sock) for sock in waiting[15:]] == [b""] * 20
        assert answer(silent) == b"bad handshake\n"
        assert all(is_open(sock) for sock in waiting[:15])
        told = "RuntimeError: made for a test"
        wait_until(lambda: relay.log_text().count(told) >= 15, what="the log is written")
        assert relay.log_text().count(told) == 15

"""Tests that run side by side: who is alone has no neighbours, nobody waits for ever, and no two are given one port.

In processes of their own, and with a folder for temporary files of their own: these turns are not those of this run.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, wait_until

TAKES_A_TURN = """
import sys
from tests.support.neighbours import turn

with turn(alone=sys.argv[1] == "alone"):
    print("has it", flush=True)
    sys.stdin.readline()
"""

TAKES_PORTS = """
import sys
from tests.support.harness import free_port
from tests.support.neighbours import own_user

print(own_user(), *(free_port() for _ in range(100)), flush=True)
sys.stdin.readline()
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, stack: contextlib.ExitStack) -> Start:
    """Start a process of tests; it goes on until a line comes, or the test ends."""

    def begin(program: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), "TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        return process

    return begin


def has_its_turn(process: subprocess.Popen[str]) -> bool:
    """Wait until it has."""
    assert process.stdout is not None
    return process.stdout.readline() == "has it\n"


def wait_until_it_waits(process: subprocess.Popen[str]) -> None:
    """The kernel has it in the queue for a lock: see proc_locks(5)."""
    waiting = re.compile(rf"-> POSIX +ADVISORY +\S+ +{process.pid} ")
    wait_until(lambda: waiting.search(Path("/proc/locks").read_text()), what="it waits for its turn")


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=10)


def test_who_is_alone_waits_until_nobody_has_a_turn_and_meanwhile_nobody_gets_one(start: Start) -> None:
    ordinary = [start(TAKES_A_TURN, "ordinary") for _ in range(3)]
    assert all(map(has_its_turn, ordinary))
    alone = start(TAKES_A_TURN, "alone")
    wait_until_it_waits(alone)
    late = start(TAKES_A_TURN, "ordinary")
    wait_until_it_waits(late)
    for process in ordinary:
        wait_until_it_waits(alone)
        end(process)
    assert has_its_turn(alone)
    wait_until_it_waits(late)
    end(alone)
    assert has_its_turn(late)


@pytest.mark.parametrize("kind", ["alone", "ordinary"])
def test_one_that_was_killed_leaves_its_turn_to_the_next(start: Start, kind: str) -> None:
    killed = start(TAKES_A_TURN, kind)
    assert has_its_turn(killed)
    waits = start(TAKES_A_TURN, "alone")
    wait_until_it_waits(waits)
    killed.kill()
    assert has_its_turn(waits)


def test_no_two_processes_are_given_one_port_nor_one_user_and_none_a_port_twice(start: Start) -> None:
    given = []
    for process in [start(TAKES_PORTS) for _ in range(3)]:
        assert process.stdout is not None
        given.append(process.stdout.readline().split())
    users = [user for user, *_ in given]
    ports = [port for _, *ports in given for port in ports]
    assert len(ports) == 300
    assert len({*users}) == 3
    assert len({*ports}) == len(ports)

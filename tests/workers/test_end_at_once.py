"""A worker ends at once while it hands on, or is handed something: whoever is under way then is served by one of the
two, or cut and on record, once."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.current import wait_for_current
from tests.support.harness import (
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

TRANSFERS = 160
WAITING = 20
LITTLE_ROOM = 300
"""File descriptors of a worker that has places for a few dozen of these transfers."""
SCM_FDS = re.compile(r"^scm_fds:\s*(\d+)$", re.MULTILINE)


class Served:
    """A relay of two workers, the first of which has everybody: transfers, and some who wait."""

    def __init__(
        self, folder: Path, stack: contextlib.ExitStack, *options: str, nofile_of_second: int | None = None
    ) -> None:
        self.workers = stack.enter_context(Workers(folder, *options, count=1))
        self.transfers = [met(self.workers.port, stack=stack) for _ in range(TRANSFERS)]
        self.waiting = [stack.enter_context(connect(self.workers.port)) for _ in range(WAITING)]
        for client in self.waiting:
            client.sendall(handshake(new_token(), new_side()))
        wait_for_current(self.workers, TRANSFERS, WAITING)
        self.first = self.workers.workers[0]
        self.workers.nofile = nofile_of_second
        self.second = self.workers.start_one()
        wait_until(lambda: "has joined" in self.first.log_text(), what="they know of each other")

    def whole_transfers(self) -> int:
        """How many transfers go on."""
        return sum(_goes_on(first, second) for first, second in self.transfers)

    def assert_the_first_has_cut_everybody(self) -> None:
        """Wait for its end."""
        assert self.first.wait() == 0
        assert f"cutting off {TRANSFERS} transfers" in self.first.log_text()

    def assert_nobody_is_served(self) -> None:
        """The second one, which ends now, has let go of everybody who was under way to it."""
        assert self.whole_transfers() == 0
        for client in self.waiting:
            assert client.recv(1) == b""
        self.assert_everybody_is_on_record_once()
        assert self.workers.stop() == 0
        self.assert_everybody_is_on_record_once()

    def assert_everybody_is_on_record_once(self) -> None:
        """To be called when all workers have ended."""
        everybody = {"happy": TRANSFERS, "lonely": WAITING}
        assert Counter(row["result"] for row in self.workers.rows("usage")) == everybody
        assert Counter(record["mood"] for record in self.workers.records()) == everybody


def _goes_on(first: socket.socket, second: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):  # but it is told at once
        first.sendall(b"on")
        return second.recv(2) == b"on"
    return False


def sockets_under_way_to(worker: Relay) -> int:
    """How many sockets others have sent to this worker that it has not received."""
    told = []
    for entry in list(Path(f"/proc/{worker.pid}/fdinfo").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            told += SCM_FDS.findall(entry.read_text())
    if not told:
        pytest.skip("this kernel does not tell what is under way between processes (scm_fds in /proc/PID/fdinfo)")
    return sum(int(count) for count in told)


@pytest.mark.parametrize("milliseconds", [2, 5, 10, 20])
def test_a_second_signal_while_everybody_is_handed_on_costs_nobody_the_record(
    tmp_path: Path, milliseconds: int
) -> None:
    with contextlib.ExitStack() as stack:
        relay = Served(tmp_path, stack, "--grace", "0.2")
        os.kill(relay.first.pid, signal.SIGTERM)
        time.sleep(milliseconds / 1000)  # any moment will do
        os.kill(relay.first.pid, signal.SIGTERM)
        assert relay.first.wait() == 0
        cut = re.search(r"cutting off (\d+) transfers", relay.first.log_text())
        assert relay.whole_transfers() == TRANSFERS - (int(cut[1]) if cut else 0)
        assert relay.workers.stop() == 0
        relay.assert_everybody_is_on_record_once()


def end_by_second_signal(worker: Relay) -> None:
    """Somebody is in a hurry."""
    os.kill(worker.pid, signal.SIGTERM)


def end_without_run_dir(worker: Relay) -> None:
    """And somebody has removed the folder in which workers meet."""
    shutil.rmtree(worker.folder / "run")
    os.kill(worker.pid, signal.SIGTERM)


@pytest.mark.parametrize("end", [end_by_second_signal, end_without_run_dir])
def test_what_is_under_way_to_a_sibling_that_stands_still_is_cut_and_on_record_once(
    tmp_path: Path, end: Callable[[Relay], None]
) -> None:
    with contextlib.ExitStack() as stack:
        relay = Served(tmp_path, stack, "--grace", "30")
        with stopped(relay.second):
            os.kill(relay.first.pid, signal.SIGTERM)
            wait_until(lambda: sockets_under_way_to(relay.second) >= 100, what="they are under way")
            end(relay.first)
            relay.assert_the_first_has_cut_everybody()
        relay.assert_nobody_is_served()


def test_the_same_when_a_sibling_with_little_room_stands_still_and_the_grace_is_over(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        relay = Served(tmp_path, stack, "--grace", "0", nofile_of_second=LITTLE_ROOM)
        with stopped(relay.second):
            os.kill(relay.first.pid, signal.SIGTERM)
            wait_until(lambda: sockets_under_way_to(relay.second) >= 20, what="they are under way")
            relay.assert_the_first_has_cut_everybody()
            assert "the other workers have no room for them" in relay.first.log_text()
        relay.assert_nobody_is_served()


@pytest.mark.parametrize("milliseconds", [2, 5, 10, 20])
def test_who_is_handed_to_a_worker_that_ends_at_once_is_on_record_once(tmp_path: Path, milliseconds: int) -> None:
    with contextlib.ExitStack() as stack:
        relay = Served(tmp_path, stack, "--grace", "0.2")
        os.kill(relay.first.pid, signal.SIGTERM)
        time.sleep(milliseconds / 1000)
        for _ in range(2):
            os.kill(relay.second.pid, signal.SIGTERM)
            time.sleep(milliseconds / 1000)
        assert relay.second.wait() == relay.first.wait() == 0
        assert relay.whole_transfers() == 0
        relay.assert_everybody_is_on_record_once()

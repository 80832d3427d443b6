"""Workers are restarted one after another under load, and no client notices."""

from __future__ import annotations

import itertools
import random
import re
import select
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.crowd import Crowd, Transfer
from tests.support.current import wait_for_current
from tests.support.harness import CHECKOUT, Workers, handshake, met, new_side, new_token, wait_until
from tests.support.web import web_options, web_port

GONE_WITHIN = 5.0
"""Seconds from its signal to the end of a worker that has siblings."""

MB = 1_000_000


def start(crowd: Crowd, left: float = 0, right: float = 0, web: str = "") -> Transfer:
    """Start a transfer with so many bytes a second in each direction, after a few that tell it from the others."""
    return crowd.transfer(left, right, head=bytes(random.randrange(200, 5000)), web=web)


def fifty_transfers(crowd: Crowd, webs: Iterator[str]) -> list[Transfer]:
    """Some fast, some stalled on a receiver that does not read, some idle, some with bytes in both directions. `webs`
    says of each which side comes over WebSocket."""
    fast = [start(crowd, 6 * MB, web=next(webs)) for _ in range(8)]
    both = [start(crowd, 2 * MB, 3 * MB, web=next(webs)) for _ in range(12)]
    slow = [start(crowd, 30_000, 0, web=next(webs)) for _ in range(10)]
    idle = [start(crowd, web=next(webs)) for _ in range(10)]
    stalled = [start(crowd, 50 * MB, 10_000, web=next(webs)) for _ in range(10)]
    transfers = fast + both + slow + idle + stalled
    crowd.begin(transfers)
    for transfer in stalled:
        transfer.right.stop_reading()
    crowd.run_for(0.5)
    return transfers


class Newcomers:
    """Starts a short transfer every few milliseconds; it counts who was refused."""

    def __init__(self, crowd: Crowd, every: float, webs: Iterator[str]) -> None:
        self.transfers: list[Transfer] = []
        self._crowd = crowd
        self._every = every
        self._webs = webs
        self._next = time.monotonic()
        crowd.every_tick = self._come

    def _come(self) -> None:
        if time.monotonic() >= self._next:
            self._next += self._every
            self.transfers.append(start(self._crowd, 100_000, web=next(self._webs)))
        for transfer in self.transfers[-50:]:
            if transfer.left.heard.size or transfer.right.heard.size:
                transfer.finish()

    def end(self) -> None:
        """No more of them; let the last ones finish."""
        self._crowd.every_tick = None
        for transfer in self.transfers:
            transfer.finish()


def assert_one_row_each(workers: Workers, transfers: list[Transfer]) -> None:
    """Each transfer has one row, with its bytes, and with times that began with its first side."""
    rows = workers.wait_for_rows("usage", len(transfers))
    assert [row["result"] for row in rows] == ["happy"] * len(transfers)
    assert sorted(row["bytes"] for row in rows) == sorted(transfer.moved for transfer in transfers)
    by_start = sorted(rows, key=lambda row: row["started"])
    for transfer in sorted(transfers, key=lambda transfer: transfer.left.called_at):
        # Several may have begun within the time that it takes to accept one.
        near = [row for row in by_start[:100] if row["bytes"] == transfer.moved]
        assert near, f"no row of {transfer.moved} bytes that began about {transfer.left.called_at}"
        row = near[0]
        by_start.remove(row)
        lasted = max(transfer.left.closed_at, transfer.right.closed_at) - transfer.left.called
        assert -0.05 <= row["started"] - transfer.left.called_at <= 3
        assert row["waiting_time"] == pytest.approx(transfer.right.called - transfer.left.called, abs=3)
        # On a busy machine this crowd may be seconds late in noticing that a transfer is over.
        assert lasted * 0.7 - 3 <= row["total_time"] <= lasted + 3
    assert len(workers.wait_for_records(len(transfers))) == len(transfers)


def transfers_handed_on(workers: Workers) -> int:
    """How many transfers have changed house so far, as the workers say in their logs when they end."""
    return sum(int(count) for count in re.findall(r"handed to worker \d+: .*transfers (\d+)", workers.log_text()))


def restart_each(workers: Workers, rounds: int, pause: Callable[[], object] = lambda: None) -> list[float]:
    """Restart every worker in turn, as supervisorctl does; return how long each took to end."""
    ended_after = []
    for _ in range(rounds):
        for number in [number for number, worker in enumerate(workers.workers) if worker.pids]:
            began = time.monotonic()
            assert workers.stop_one(number) == 0
            ended_after.append(time.monotonic() - began)
            workers.start_one()
            pause()
    return ended_after


# Of three transfers two have a side that speaks WebSocket, so of all clients a third does.
WEBS = {"TCP": ("",), "a third on WebSocket": ("left", "right", "")}


@pytest.mark.parametrize("webs", WEBS.values(), ids=WEBS)
def test_three_rounds_of_restarts_harm_no_transfer_and_no_client_that_waits(
    tmp_path: Path, webs: tuple[str, ...]
) -> None:
    each = itertools.cycle(webs)
    with (
        Workers(tmp_path, *(web_options() if len(webs) > 1 else ()), count=3) as workers,
        Crowd(workers.port, web_port(workers) if len(webs) > 1 else None) as crowd,
    ):
        transfers = fifty_transfers(crowd, each)
        waiting = [
            crowd.call(new_token(), new_side() if number % 3 else None, web=len(webs) > 1 and number % 3 == 1)
            for number in range(200)
        ]
        newcomers = Newcomers(crowd, 0.04, each)
        ended_after = crowd.run_beside(lambda: restart_each(workers, rounds=3, pause=lambda: time.sleep(0.2)))
        newcomers.end()
        assert len(ended_after) == 9
        assert max(ended_after) < GONE_WITHIN
        assert transfers_handed_on(workers) >= 3 * len(transfers)
        assert not [caller for caller in waiting if caller.answer or caller.closed]
        later = [Transfer(caller, crowd.call(caller.token, new_side(), head=b"here")) for caller in waiting]
        crowd.begin(later)
        everybody = transfers + newcomers.transfers + later
        crowd.end(everybody)
        assert_one_row_each(workers, everybody)
        wait_until(lambda: workers.row("current") == (0, 0, 0), 10, "nobody is left")
        # The service has not stopped once: what it counts since its start goes on through all restarts.
        (since,) = workers.rows("since_reboot")
        assert tuple(since) == (sum(transfer.moved for transfer in everybody), len(everybody), len(everybody), 0, 0)


def test_a_transfer_that_is_idle_is_ended_however_often_workers_are_restarted(tmp_path: Path) -> None:
    with Workers(tmp_path, "--idle-timeout", "3", count=2) as workers:
        left, right = met(workers.port)
        with left, right:
            for _ in range(10):
                restart_each(workers, rounds=1, pause=lambda: time.sleep(1.0))  # in which it looks who is idle
                if any(select.select([left, right], [], [], 0)):
                    break
            else:
                pytest.fail("it is still there")
            assert left.recv(1) == right.recv(1) == b""


COPYING = "import os; del os.splice  # as where the kernel refuses to splice\n"


@pytest.mark.parametrize("copies", [False, True], ids=["spliced", "copied"])
def test_bytes_at_rest_in_the_relay_move_house_with_their_transfer(tmp_path: Path, copies: bool) -> None:
    if copies:
        (tmp_path / "sitecustomize.py").write_text(COPYING)
    with (
        Workers(tmp_path, count=2, env={"PYTHONPATH": f"{tmp_path}:{CHECKOUT}"}) as workers,
        Crowd(workers.port) as crowd,
    ):
        stalled = [start(crowd, 200 * MB, 200 * MB if number % 2 else 0) for number in range(6)]
        crowd.begin(stalled)
        for transfer in stalled:
            transfer.left.stop_reading()
            transfer.right.stop_reading()
        wait_until_nothing_moves(crowd, stalled)
        for _ in range(2):
            crowd.run_beside(lambda: restart_each(workers, rounds=1))
        assert transfers_handed_on(workers) >= 2 * len(stalled)
        # One goes on in the direction that was full, and is stopped again; the others end.
        stalled[0].right.read_again()
        before = stalled[0].right.heard.size
        crowd.run_until(lambda: stalled[0].right.heard.size > before + 20 * MB, 10, "it goes on")
        crowd.run_beside(lambda: restart_each(workers, rounds=1))
        crowd.end(stalled)
        assert_one_row_each(workers, stalled)


def wait_until_nothing_moves(crowd: Crowd, transfers: list[Transfer]) -> None:
    """Wait until all that can rest on the way is full."""
    deadline = time.monotonic() + 15
    moved = -1
    while moved != (moved := sum(transfer.moved for transfer in transfers)):
        assert time.monotonic() < deadline
        crowd.run_for(0.4)


def test_transfers_of_which_one_side_has_ended_its_stream_move_house(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        halves = [start(crowd, 0, 20_000) for _ in range(10)]
        crowd.begin(halves)
        for transfer in halves:
            transfer.left.finish()
        crowd.run_until(lambda: all(transfer.right.ended for transfer in halves), 5, "the first streams end")
        crowd.run_beside(lambda: restart_each(workers, rounds=2))
        heard = [transfer.left.heard.size for transfer in halves]
        crowd.run_until(
            lambda: all(transfer.left.heard.size > before for transfer, before in zip(halves, heard, strict=True)),
            what="the other streams go on",
        )
        crowd.end(halves)
        assert_one_row_each(workers, halves)


def test_clients_in_the_middle_of_their_handshake_move_house(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        lines = [(token := new_token(), handshake(token, new_side())) for _ in range(60)]
        halves = [crowd.call(token, line=line[: 2 * number]) for number, (token, line) in enumerate(lines)]
        crowd.run_beside(lambda: restart_each(workers, rounds=2))
        assert not [caller for caller in halves if caller.answer or caller.closed]
        for number, (caller, (_, line)) in enumerate(zip(halves, lines, strict=True)):
            caller.sock.send(line[2 * number :])
        transfers = [Transfer(caller, crowd.call(caller.token, new_side(), head=b"here")) for caller in halves]
        crowd.begin(transfers)
        crowd.end(transfers)
        assert len(workers.wait_for_rows("usage", 60)) == 60


def test_a_worker_says_who_came_and_went_and_what_it_handed_to_whom(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        first, second = workers.workers
        transfers = [start(crowd) for _ in range(40)]
        crowd.begin(transfers)
        for _ in range(80):  # more than one worker accepts in its turn
            crowd.call(new_token(), new_side())
        wait_for_current(workers, 40, 80)
        (share,) = workers.query("SELECT connected, waiting FROM worker_share WHERE pid = ?", first.pid)
        crowd.run_beside(lambda: workers.stop_one(0))
        crowd.end(transfers)
        wait_until(lambda: f"worker {first.pid} has left" in second.log_text(), 10, "the second one says so")
    assert f"joined the relay in {workers.run_dir}: the first worker" in first.log_text()
    assert f"worker {second.pid} has joined" in first.log_text()
    assert f"joined the relay in {workers.run_dir}: siblings {first.pid}" in second.log_text()
    assert (
        f"handed to worker {second.pid}: clients without a partner {share['waiting']}, transfers {share['connected']}"
        in first.log_text()
    )


def test_a_worker_told_to_stop_while_its_only_sibling_is_still_starting_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    # Whoever opens the database late joins late: its siblings know of it, but it is not ready.
    (tmp_path / "slow" / "sitecustomize.py").write_text(
        "import os, _sqlite3, time\nconnect, began = _sqlite3.connect, time.monotonic()\n"
        "def slowly(*a, **k):\n"
        "    open('it opens the database', 'w').close()\n"
        "    while not os.path.exists('it may') and time.monotonic() < began + 4:\n        time.sleep(0.01)\n"
        "    return connect(*a, **k)\n"
        "_sqlite3.connect = slowly\n"
    )
    with Workers(tmp_path, count=1) as workers, Crowd(workers.port) as crowd:
        transfers = [start(crowd, 100_000) for _ in range(5)]
        crowd.begin(transfers)
        waiting = crowd.call(new_token(), new_side())
        workers.env = {"PYTHONPATH": f"{tmp_path / 'slow'}:{CHECKOUT}"}
        with ThreadPoolExecutor(2) as aside:
            starting = aside.submit(workers.start_one)
            crowd.run_until((tmp_path / "it opens the database").exists, 10, "the second one joins")
            stopping = aside.submit(workers.stop_one, 0)
            crowd.run_for(0.5)
            assert not starting.done()
            assert not stopping.done()
            (tmp_path / "it may").touch()
            crowd.run_until(starting.done, 10, "the second one is there")
            crowd.run_until(stopping.done, 10, "the first one ends")
            assert stopping.result() == 0
        assert not waiting.closed
        transfers.append(Transfer(waiting, crowd.call(waiting.token, new_side())))
        crowd.begin(transfers)
        crowd.end(transfers)

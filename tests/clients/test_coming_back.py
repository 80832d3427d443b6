"""Who comes back on another connection, or leaves on its way between workers: nobody is matched with a dead line.

A line that dies without a word looks like one that waits. So of one side the connection that came last is matched; and
whoever was under way between workers is looked at before it meets somebody.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pytest

from tests.support.harness import (
    Service,
    Workers,
    connect,
    handshake,
    new_side,
    new_token,
    read_exactly,
    stopped,
    wait_until,
)
from tests.support.hostile import answer, is_open
from tests.support.kernel_view import holder, wait_until_read


def waits(service: Service, line: bytes, stack: contextlib.ExitStack) -> socket.socket:
    """A client that says `line` and waits, as the relay knows by now."""
    before = service.rows("current")[0]["waiting"]
    sock = stack.enter_context(connect(service.port))
    sock.sendall(line)
    wait_until(lambda: service.rows("current")[0]["waiting"] == before + 1, what="it waits")
    return sock


@pytest.mark.parametrize("partners_side", [new_side(), None], ids=["a-side", "no-side"])
def test_of_one_side_the_connection_that_came_last_is_matched(
    any_relay: Service, partners_side: str | None, stack: contextlib.ExitStack
) -> None:
    token, side = new_token(), new_side()
    connections = [waits(any_relay, handshake(token, side), stack) for _ in range(3)]
    partner = stack.enter_context(connect(any_relay.port))
    partner.sendall(handshake(token, partners_side))
    assert read_exactly(connections[-1], 3) == read_exactly(partner, 3) == b"ok\n"
    assert [answer(sock) for sock in connections[:-1]] == [b"", b""]
    connections[-1].sendall(b"it is me")
    assert read_exactly(partner, 8) == b"it is me"
    assert [record["mood"] for record in any_relay.wait_for_records(2)] == ["lonely", "lonely"]


def test_who_came_last_is_known_though_its_predecessors_were_handed_on_since(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    with Workers(tmp_path, count=3) as workers:
        token, side = new_token(), new_side()
        connections = [waits(workers, handshake(token, side), stack) for _ in range(3)]
        for _ in range(2):
            pid = holder(workers.pids, connections[0])
            number = next(number for number, worker in enumerate(workers.workers) if worker.pids == [pid])
            assert workers.stop_one(number) == 0
        partner = stack.enter_context(connect(workers.port))
        partner.sendall(handshake(token, new_side()))
        assert read_exactly(connections[-1], 3) == read_exactly(partner, 3) == b"ok\n"
        assert [answer(sock) for sock in connections[:-1]] == [b"", b""]


def test_of_too_many_of_one_side_the_one_that_came_last_stays_and_is_matched(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    with Workers(tmp_path, "--max-waiting-per-token", "2", count=2) as workers:
        token, side = new_token(), new_side()
        connections = [waits(workers, handshake(token, side), stack) for _ in range(2)]
        connections.append(stack.enter_context(connect(workers.port)))
        connections[-1].sendall(handshake(token, side))
        assert answer(connections[0]) == b""
        partner = stack.enter_context(connect(workers.port))
        partner.sendall(handshake(token))
        assert read_exactly(connections[-1], 3) == read_exactly(partner, 3) == b"ok\n"


@pytest.mark.parametrize(
    ("last_words", "seconds", "side"),  # a parcel is good for a second; then it goes back to who has sent it
    [(b"", 0, new_side()), (b"too early", 0, None), (b"", 1.5, None), (b"too early", 1.5, new_side())],
    ids=["it-leaves", "it-speaks", "it-leaves-and-comes-back", "it-speaks-and-comes-back"],
)
def test_who_leaves_or_speaks_on_the_way_to_a_worker_that_stands_still_meets_nobody(
    tmp_path: Path, last_words: bytes, seconds: float, side: str | None, stack: contextlib.ExitStack
) -> None:
    with Workers(tmp_path, count=2) as workers:
        token = new_token()
        waiting = waits(workers, handshake(token, new_side()), stack)
        home = next(worker for worker in workers.workers if worker.pid == holder(workers.pids, waiting))
        (other,) = [worker for worker in workers.workers if worker is not home]
        with stopped(home):
            newcomer = stack.enter_context(connect(workers.port))
            newcomer.sendall(handshake(token, side))
            wait_until_read(other, newcomer)
            if last_words:
                newcomer.sendall(last_words)
            else:
                newcomer.close()
            time.sleep(seconds)
        if last_words:
            assert answer(newcomer) == b"impatient\n"
        mood = "errory" if last_words else "lonely"
        assert [record["mood"] for record in workers.wait_for_records(1)] == [mood]
        assert is_open(waiting)
        partner = stack.enter_context(connect(workers.port))
        partner.sendall(handshake(token, new_side()))
        assert read_exactly(waiting, 3) == read_exactly(partner, 3) == b"ok\n"

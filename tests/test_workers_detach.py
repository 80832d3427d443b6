"""A pair lets go of its sockets before it is handed on, whatever it is about to do at that moment."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import gevent
import pytest

from relay import pair as pair_module
from relay.pair import Pair
from relay.pipes import PipePool
from relay.turns import Turns
from tests.harness import wait_until


def connection(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A client, and the relay's end of its connection."""
    client = socket.create_connection(listener.getsockname(), timeout=5)
    end, _ = listener.accept()
    end.setblocking(False)
    return client, end


@pytest.fixture
def clients_and_pair() -> Iterator[tuple[socket.socket, socket.socket, Pair]]:
    """Two clients, and the pair that the relay has made of them, in this process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (left, first), (right, second) = connection(listener), connection(listener)
    pair = Pair(
        first,
        second,
        started=0.0,
        arrived=0.0,
        waiting_time=0.0,
        pipes=PipePool(),
        turns=Turns(),
        on_over=lambda pair: None,
    )
    yield left, right, pair
    pair.detach()
    pair.close()
    left.close()
    right.close()


def assert_has_let_go(left: socket.socket, pair: Pair) -> None:
    """What `left` says stays in the kernel, for whoever takes the pair over."""
    assert not pair.started_pumping
    left.send(b"for the next one")
    for _ in range(5):
        gevent.sleep(0.01)
    assert not pair.started_pumping
    assert wait_until(lambda: pair.first.recv(100), what="it is still there") == b"for the next one"


def test_a_pair_is_detached_while_it_pumps_and_while_it_is_quiet(
    clients_and_pair: tuple[socket.socket, socket.socket, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right, pair = clients_and_pair
    monkeypatch.setattr(pair_module, "QUIET_SECONDS", 0.02)
    pair.start()
    left.send(b"hello")
    gevent.sleep(0.01)
    assert right.recv(100) == b"hello"
    pair.detach()
    assert_has_let_go(left, pair)
    pair.start()
    gevent.sleep(0.1)
    assert pair.greenlet is None  # it is quiet, and does without
    pair.detach()
    assert_has_let_go(left, pair)


def test_a_pair_that_has_not_begun_to_pump_yet_is_detached(
    clients_and_pair: tuple[socket.socket, socket.socket, Pair],
) -> None:
    left, _, pair = clients_and_pair
    pair.start()
    pair.detach()
    assert_has_let_go(left, pair)


def test_a_pair_that_falls_quiet_in_the_moment_in_which_it_is_detached_lets_go(
    clients_and_pair: tuple[socket.socket, socket.socket, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, _, pair = clients_and_pair
    monkeypatch.setattr(pair_module, "QUIET_SECONDS", 0.05)
    pair.start()
    gevent.sleep(0.01)

    def hold_up_the_loop() -> None:
        """So that this test's timer and the pair's are due in one iteration, this test's first."""
        time.sleep(0.2)

    gevent.spawn(hold_up_the_loop)
    gevent.sleep(0.02)
    pair.detach()
    assert_has_let_go(left, pair)

"""A pair lets go of its sockets before it is handed on, whatever it is about to do at that moment."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator

import gevent
import pytest

from relay.clients.door import open_port
from relay.options import Options
from relay.server import Ports, Relay
from relay.transfer import pair as pair_module
from relay.transfer.pair import Detached, Pair
from relay.transfer.rest import Rest
from relay.transfer.turns import TURN, HeldBack, NoMemory, Turns
from tests.support.bare_pair import new_pair
from tests.support.harness import connect, handshake, new_side, new_token, wait_until
from tests.support.kept_records import Records


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
    turns = Turns()
    pair = new_pair(first, second, turns, Rest(turns))
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
    for _ in range(500):
        gevent.sleep(0.01)
        if select.select([right], [], [], 0)[0]:
            break
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


def test_a_pump_whose_turn_has_just_come_can_still_be_made_to_let_go() -> None:
    turns = Turns()
    ended: list[BaseException] = []

    def pump() -> None:
        try:
            turns.wait()
        except BaseException as error:
            ended.append(error)

    greenlet = gevent.spawn(pump)
    gevent.sleep(0)
    assert turns.busy()
    greenlet.kill(Detached, block=False)  # it will be thrown in when the loop comes to it
    turns._next()  # and before that its turn comes
    gevent.sleep(0.01)
    assert [type(error) for error in ended] == [Detached]
    assert not turns.busy()


class Short:
    """A pump whose turn comes to nothing, as it says with `error`."""

    waits = TURN
    is_dear = False

    def __init__(self, error: type[Exception]) -> None:
        self._error = error

    def turn(self, most: int) -> None:
        """As `Pump.turn`."""
        raise self._error


@pytest.mark.parametrize("error", [NoMemory, HeldBack])
def test_a_pump_that_has_to_wait_in_the_moment_in_which_it_is_to_let_go_does_so(error: type[Exception]) -> None:
    turns = Turns()
    ended: list[BaseException] = []

    def pump() -> None:
        try:
            turns.wait(Short(error))
        except BaseException as exception:
            ended.append(exception)

    greenlet = gevent.spawn(pump)
    gevent.sleep(0)
    assert turns.busy()
    greenlet.kill(Detached, block=False)  # it will be thrown in when the loop comes to it
    turns._next()  # and before that its pump has its turn
    gevent.sleep(0.01)
    assert [type(it) for it in ended] == [Detached], "or it would go on, and who waits for it would wait for ever"
    assert not turns.busy()


def test_a_transfer_that_ends_while_another_one_is_cut_off_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    relay, records = Relay(Options()), Records()
    listener = open_port("127.0.0.1", 0)
    ports = Ports(listener)
    relay.start(ports, records)  # type: ignore[arg-type]  # it need not write anything
    clients = []
    for _ in range(3):
        token = new_token()
        for _ in range(2):
            client = connect(listener.getsockname()[1])
            client.sendall(handshake(token, new_side()))
            clients.append(client)
    for _ in range(100):
        gevent.sleep(0.01)
        if len(relay.pairs) == 3:
            break
    assert len(relay.pairs) == 3

    detach = Pair.detach

    def detach_while_the_others_end(pair: Pair) -> None:
        monkeypatch.undo()
        for other in set(relay.pairs) - {pair}:
            other._end()
        detach(pair)

    monkeypatch.setattr(Pair, "detach", detach_while_the_others_end)
    relay.close()
    assert [record.mood for record in records.recorded] == ["happy"] * 3
    for client in clients:
        client.close()
    listener.close()


def test_many_pairs_that_move_let_go_in_one_iteration_of_the_event_loop() -> None:
    turns = Turns()
    rest = Rest(turns)
    loop = gevent.get_hub().loop
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(20):
            (left, first), (right, second) = connection(listener), connection(listener)
            for client in (left, right):
                stack.enter_context(client)
            left.setblocking(False)
            left.send(bytes(1 << 20))
            pairs.append(new_pair(first, second, turns, rest))
        for pair in pairs:
            pair.start()
        wait_until(lambda: gevent.sleep(0) or all(pair.greenlet for pair in pairs), what="all move something")
        began = loop.iteration
        for pair in pairs:
            pair.detach_soon()
        gevent.sleep(0)
        assert not any(pair.started_pumping for pair in pairs)
        for pair in pairs:
            pair.detach()
            pair.close()
        assert loop.iteration - began <= 2
    rest.close()

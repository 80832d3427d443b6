"""Pipes are lent only as far as there are descriptors for them, also those that come from a sibling."""

from __future__ import annotations

import fcntl
import os
import random
import socket

from relay.transfer.pipes import PIPE_BYTES, PipePool
from relay.transfer.pump import Pump
from relay.transfer.state import PumpState
from relay.transfer.turns import LARGEST_TURN, Turns


def test_no_more_pipes_are_lent_than_there_should_be_and_one_that_comes_back_is_lent_again() -> None:
    pool = PipePool(most=2)
    first, second = pool.borrow(), pool.borrow()
    assert first is not None
    assert second is not None
    assert pool.borrow() is None
    pool.give_back(first)
    assert pool.borrow() is first
    pool.give_back(first)
    pool.throw_away(second)
    pool.close()


def test_where_all_descriptors_are_promised_to_connections_no_pipe_is_lent() -> None:
    assert PipePool(most=0).borrow() is None


def test_pipes_that_siblings_hand_on_count_and_are_closed_when_they_are_too_many() -> None:
    pool = PipePool(most=1)
    own = pool.borrow()
    assert own is not None
    outlet, inlet = os.pipe()
    handed_on = pool.adopt(inlet, outlet)
    overdrawn = [pool.is_overdrawn]
    pool.give_back(handed_on)
    overdrawn.append(pool.is_overdrawn)
    assert overdrawn == [True, False]
    assert _is_closed(inlet)
    assert _is_closed(outlet)
    pool.give_back(own)
    assert pool.borrow() is own
    pool.throw_away(own)


def test_what_comes_in_a_pipe_that_is_one_too_many_rests_in_memory_and_is_delivered() -> None:
    said = random.Random(1).randbytes(100_000)
    outlet, inlet = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    assert os.write(inlet, said) == len(said)
    pool = PipePool(most=0)
    source, sink, partner = socket.socketpair(), *socket.socketpair()
    with source[0], source[1], sink, partner:
        for sock in (*source, sink):
            sock.setblocking(False)
        pump = Pump(source[0], sink, pool, Turns())
        state = PumpState(0, len(said), over=False, splices=True, rest=b"", fds=2)
        pump.unpack(state, [inlet, outlet])
        assert _is_closed(inlet)
        assert pump.held == len(said)
        received = bytearray()
        while len(received) < len(said):
            pump.turn(LARGEST_TURN)
            received += partner.recv(1 << 20)
        assert received == said
        pump.abandon()


def _is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False

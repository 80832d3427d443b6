"""A pair of which one side has gone ends before long, whatever the other says or does not take; but not before it has
what it takes."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.transfer import ending
from relay.transfer.pipes import PipePool
from relay.transfer.pump import INPUT, OVER, Pump
from relay.transfer.turns import Turns
from tests.support.client_frames import BINARY, CLOSE, Sent
from tests.support.harness import (
    Relay,
    connect,
    handshake,
    new_side,
    new_token,
    read_exactly,
    reset,
    shake_hands,
    shortened,
    wait_until,
)
from tests.support.hostile import narrow
from tests.support.kernel_view import relays_end, unacknowledged, wait_until_read
from tests.support.web import dial_raw, web_options, web_port

SOON = 15.0  # seconds, on a busy machine, for what takes one or two
UNREAD_BYTES = 40_000  # more than a receiver with the smallest of buffers takes


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    """One that waits for seconds where it otherwise waits for minutes."""
    inside = shortened(transfer__ending__HALF_CLOSED_SECONDS=1, transfer__ending__DEAD_SECONDS=2)
    with Relay(tmp_path, *web_options(), recording=True, inside=inside) as relay:
        yield relay


def left_alone(relay: Relay, how: str, stack: contextlib.ExitStack) -> socket.socket:
    """A client that is owed `UNREAD_BYTES`, and whose partner has gone: over TCP, with a reset behind the end of its
    stream, or over WebSocket with a Close."""
    receiver = stack.enter_context(narrow(relay.port))
    if how == "tcp":
        sender = stack.enter_context(connect(relay.port))
        shake_hands(sender, receiver)
        sender.sendall(bytes(UNREAD_BYTES))
        sender.shutdown(socket.SHUT_WR)
        wait_until(lambda: unacknowledged(sender) == 0, what="all of it is the relay's")
        with relays_end(relay.pids, receiver) as end:
            wait_until(lambda: unacknowledged(end) > 0, what="some of it is on its way")
        reset(sender)
    else:
        token = new_token()
        sender = stack.enter_context(dial_raw(web_port(relay)))
        sender.sendall(Sent(BINARY, handshake(token, new_side())).wire)
        receiver.sendall(handshake(token, new_side()))
        assert read_exactly(receiver, 3) == b"ok\n"
        sender.sendall(Sent(BINARY, bytes(UNREAD_BYTES)).wire + Sent(CLOSE).wire)
        wait_until_read(relay, sender)  # until then, what the receiver says goes to it, and counts
    return receiver


KINDS = pytest.mark.parametrize("how", ["tcp", "web"])


def say_until_the_end(sock: socket.socket, words: bytes) -> None:
    """Send `words` again and again until the connection is over."""
    sock.settimeout(0.1)
    until = time.monotonic() + SOON
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                sock.send(words)
        raise AssertionError(f"not over within {SOON} s")


@KINDS
@pytest.mark.parametrize("words", [b"", bytes(100_000)], ids=["silent", "much"])
def test_who_takes_nothing_is_not_waited_for_when_its_partner_has_gone(relay: Relay, how: str, words: bytes) -> None:
    with contextlib.ExitStack() as stack:
        receiver = left_alone(relay, how, stack)
        if words:
            say_until_the_end(receiver, words)
        (record,) = relay.wait_for_records(1, seconds=SOON)
        assert record["total_bytes"] == UNREAD_BYTES


def test_who_has_gone_is_known_by_the_kernel_though_nothing_is_sent_to_it() -> None:
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def connected() -> tuple[socket.socket, socket.socket]:
            ends = stack.enter_context(socket.create_connection(door.getsockname())), door.accept()[0]
            return ends[0], stack.enter_context(ends[1])

        (left, first), (right, second) = connected(), connected()
        for sock in (first, second):
            sock.setblocking(False)
        turns = Turns()
        there, back = Pump(first, second, PipePool(), turns), Pump(second, first, PipePool(), turns)
        stack.callback(there.abandon)
        right.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        left.sendall(bytes(1_000_000))
        left.shutdown(socket.SHUT_WR)

        def is_over() -> bool:
            there.turn(1 << 20)
            return there.waits == OVER

        wait_until(is_over, what="all of it is on its way to the right")


        def may_stand() -> float:
            standing = ending.standing((there, back))
            assert standing is not None
            moved, on_its_way, seconds = standing
            assert moved == 1_000_000
            assert on_its_way > 0
            return seconds

        assert may_stand() == math.inf, "the left is there, and may wait for an answer"
        reset(left)
        wait_until(lambda: may_stand() == ending.DEAD_SECONDS, what="the left has gone")


def test_who_takes_nothing_is_looked_at_ever_more_seldom() -> None:
    class Stalled:
        """A pump whose sink has taken all and acknowledged nothing, or whose peer has gone."""

        reader, frames_out, untaken, moved = None, False, 0, 1

        def __init__(self, sink: socket.socket, waits: int, *, discards: bool) -> None:
            self.source, self.sink, self.waits, self.discards = sink, sink, waits, discards

    left, right = socket.socketpair()
    with left, right:
        left.send(b"not read")
        for discards in (False, True):  # who ended its stream is there, or has gone
            pumps: Any = Stalled(left, OVER, discards=False), Stalled(right, INPUT, discards=discards)
            looks, stood = 0, 0.0
            while stood < ending.DEAD_SECONDS:
                looks += 1
                patience = ending.patience(pumps, stood)
                assert patience is not None
                assert patience <= 2 * ending.until_dead_check()
                stood += patience
            assert looks < 20, "and not once a second"
            assert (ending.patience(pumps, 0) or 0) < 3, "whoever takes it is found to have it soon"


@KINDS
def test_who_takes_it_slowly_gets_all_of_it_however_long_that_takes(relay: Relay, how: str) -> None:
    with contextlib.ExitStack() as stack:
        receiver = left_alone(relay, how, stack)
        received = 0
        for _ in range(4):  # twice as long as it might stand still
            time.sleep(1)
            received += len(receiver.recv(2000))
            receiver.send(b"more, please")
        with contextlib.suppress(ConnectionResetError):
            while chunk := receiver.recv(4096):
                received += len(chunk)
        assert received == UNREAD_BYTES


@pytest.mark.parametrize("size", [1, 60_000])
def test_who_was_told_a_close_cannot_keep_the_pair_by_talking(relay: Relay, size: int) -> None:
    token = new_token()
    with dial_raw(web_port(relay)) as sender, dial_raw(web_port(relay)) as receiver:
        for client in (sender, receiver):
            client.sendall(Sent(BINARY, handshake(token, new_side())).wire)
        for client in (sender, receiver):
            assert read_exactly(client, 5) == b"\x82\x03ok\n"
        sender.sendall(Sent(BINARY, b"x").wire + Sent(CLOSE).wire)
        assert read_exactly(receiver, 7) == b"\x82\x01x\x88\x02\x03\xe8"
        say_until_the_end(receiver, Sent(BINARY, bytes(size)).wire)
        (record,) = relay.wait_for_records(1)
        assert record["total_bytes"] == 1

"""The pump with frames at one of its ends, by itself."""

from __future__ import annotations

import contextlib
import socket
import tracemalloc
from collections.abc import Iterator

import pytest

from relay.clients.frames import FrameReader
from relay.transfer.framed import MOST_FRAMES, FramedPump
from relay.transfer.pipes import PipePool
from relay.transfer.pump import INPUT, OVER, ROOM, TURN, Pump
from relay.transfer.turns import LARGEST_TURN, Turns
from tests.support.client_frames import BINARY, CLOSE, TEXT, Sent


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, ...]]:
    """A client, the relay's end of that, the relay's end of its partner, and that."""
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(2)]
        all_four = tuple(stack.enter_context(end) for pair in pairs for end in pair)
        for end in all_four:
            end.setblocking(False)
        yield all_four


@pytest.mark.parametrize("last", [Sent(CLOSE, b"\x03\xe8"), Sent(TEXT, b"text")])
@pytest.mark.parametrize("frames_out", [False, True])
def test_the_end_that_comes_with_more_than_there_is_room_for_comes_behind_it(
    sockets: tuple[socket.socket, ...], last: Sent, frames_out: bool
) -> None:
    client, source, sink, partner = sockets
    there = FramedPump(source, sink, turns := Turns(), FrameReader(), frames_out=frames_out)
    there.other = FramedPump(sink, source, turns, FrameReader() if frames_out else None, frames_out=True)
    there.other.other = there
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += sink.send(bytes(4096))
    client.send(Sent(BINARY, b"last words").wire + last.wire)
    there.turn(LARGEST_TURN)
    assert there.waits == ROOM
    while filled:
        filled -= len(partner.recv(filled))
    there.turn(LARGEST_TURN)
    assert there.waits == OVER
    if frames_out:
        assert partner.recv(100) == b"\x82\x0alast words\x88\x02\x03\xe8"
    else:
        assert partner.recv(100) == b"last words"
        assert partner.recv(100) == b""


@pytest.mark.parametrize(("size", "is_dear"), [(0, True), (100, True), (300, False)])
def test_many_short_frames_are_dear_as_long_as_there_are_more_of_them(
    sockets: tuple[socket.socket, ...], size: int, is_dear: bool
) -> None:
    client, source, sink, _ = sockets
    there = FramedPump(source, sink, turns := Turns(), FrameReader(), frames_out=False)
    there.other = FramedPump(sink, source, turns, None, frames_out=True)
    wire = Sent(BINARY, bytes(size)).wire
    assert client.send(wire * 100) == 100 * len(wire)
    there.turn(LARGEST_TURN)
    assert (there.waits, there.is_dear) == (INPUT, False)
    assert client.send(wire * (MOST_FRAMES + 10)) == len(wire) * (MOST_FRAMES + 10)
    there.turn(LARGEST_TURN)
    assert (there.waits, there.is_dear) == (TURN, is_dear)
    there.turn(LARGEST_TURN)
    assert (there.waits, there.is_dear) == (INPUT, False)


KIB = 1 << 10
MIB = 1 << 20


def stalled(stack: contextlib.ExitStack, turns: Turns, kind: str) -> tuple[Pump | FramedPump, socket.socket]:
    """A pump in which much rests, since its receiver has stopped to read, and the receiver's end."""
    ends = [stack.enter_context(end) for _ in range(2) for end in socket.socketpair()]
    for end in ends:
        end.setblocking(False)
    client, source, sink, partner = ends
    pump: Pump | FramedPump
    if kind == "pipe":
        pump = Pump(source, sink, PipePool(spare=0), turns)
    else:
        pump = FramedPump(source, sink, turns, FrameReader(), frames_out=kind == "frames both ways")
        pump.other = FramedPump(sink, source, turns, None, frames_out=True)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)  # or as much as this user may
    if kind == "tiny frames":
        said = Sent(BINARY, b"x").wire * (140 * KIB)
    else:
        said = bytes(MIB) if kind == "pipe" else Sent(BINARY, bytes(MIB)).wire
    with contextlib.suppress(BlockingIOError):
        for begin in range(0, len(said), 16 * KIB):
            client.send(said[begin : begin + 16 * KIB])
    with contextlib.suppress(BlockingIOError):
        while kind == "tiny frames":  # there is no room from the first byte on
            sink.send(bytes(4096))
    pump.turn(LARGEST_TURN)
    pump.put_away()
    return pump, partner


@pytest.mark.parametrize("kind", ["pipe", "frames in", "frames both ways", "tiny frames"])
def test_what_rests_is_told_in_full_and_keeps_no_more_memory_than_twice_that(kind: str) -> None:
    turns = Turns()
    with contextlib.ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        pumps = [stalled(stack, turns, kind) for _ in range(12)]
        assert turns.held > 12 * 100 * KIB
        for _ in range(5000):  # each takes nearly all, and then stops again
            for pump, partner in pumps:
                if pump.held > 20 * KIB:
                    with contextlib.suppress(BlockingIOError):
                        partner.recv(8 * KIB)
                    pump.turn(KIB)
            held = sum(pump.held for pump, _ in pumps)
            assert held <= turns.held <= 2 * held
            assert tracemalloc.get_traced_memory()[0] < 2 * held + MIB // 2
            if held <= 12 * 20 * KIB:
                break
        else:
            raise AssertionError(f"{held} bytes rest")
        for pump, _ in pumps:
            pump.abandon()
        assert turns.held == 0

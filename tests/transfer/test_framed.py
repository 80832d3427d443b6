"""The pump with frames at one of its ends, by itself."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from relay.clients.frames import FrameReader
from relay.transfer.framed import FramedPump
from relay.transfer.pump import OVER, ROOM
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

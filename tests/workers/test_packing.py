"""What a transfer takes along when it moves house, and what of that stays open where it was."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import pytest

from relay.clients.frames import FrameReader
from relay.transfer.pair import Pair, Readers
from relay.transfer.pipes import PipePool
from relay.transfer.pump import COPY_BYTES
from relay.transfer.rest import Rest
from relay.transfer.turns import Turns
from relay.workers.language import LARGEST_PACKET, Envelope
from relay.workers.link import Link, Parcel


class Owner:
    """Of a link; it notes what comes back."""

    def __init__(self) -> None:
        self.back: list[Parcel] = []

    def envelope(self) -> Envelope:
        """For the next parcel."""
        return Envelope(1, time.monotonic())

    def heard(self, link: Link, packet: bytes, fds: list[int]) -> None:
        """Nothing is said."""

    def came_back(self, parcel: Parcel) -> None:
        """It could not be sent now."""
        self.back.append(parcel)

    def is_unfit(self, link: Link, parcel: Parcel, error: Exception) -> None:
        """It can never be sent."""
        self.back.append(parcel)

    def lost(self, link: Link) -> None:
        """The other end is closed."""


@pytest.fixture
def link_and_sibling() -> Iterator[tuple[Link, socket.socket]]:
    """A link, and the socket at its other end."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(Owner(), here, 1, opened_by_sibling=False)
    with there:
        yield link, there
        link.close()


@pytest.fixture(params=["spliced", "framed"])
def stalled(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A pair that pumps nothing just now, in which more rests than a packet carries."""
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(end) for end in socket.socketpair())
        turns = Turns()
        rest = Rest(turns)
        readers: Readers = (None, FrameReader()) if request.param == "framed" else (None, None)
        pair = Pair(
            first,
            second,
            started=0.0,
            arrived=time.monotonic(),
            waiting_time=0.0,
            pipes=PipePool(),
            turns=turns,
            rest=rest,
            on_over=lambda pair: None,
            readers=readers,
        )
        pair.pumps[0]._keep(memoryview(bytes(3 * COPY_BYTES)))
        yield pair
        pair.close()
        rest.close()


def open_files() -> int:
    """How many file descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def test_what_was_opened_for_a_parcel_is_closed_once_it_is_sent(
    stalled: Pair, link_and_sibling: tuple[Link, socket.socket]
) -> None:
    link, sibling = link_and_sibling
    before = open_files()
    link.hand_pair(stalled)
    assert open_files() == before
    _, fds, _, _ = socket.recv_fds(sibling, LARGEST_PACKET, 10)
    assert len(fds) == 3, "two sides, and what rests in between"
    assert os.fstat(fds[2]).st_size > COPY_BYTES
    for fd in fds:
        os.close(fd)


def test_the_same_when_it_cannot_be_sent_now_nor_ever(
    stalled: Pair, link_and_sibling: tuple[Link, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    link, sibling = link_and_sibling
    before = open_files()
    filler = bytes(1000)
    with contextlib.suppress(BlockingIOError):
        while True:
            link._sock.send(filler)
    link.hand_pair(stalled)
    for _ in range(3):
        link.send_again()
    assert link.stuck
    assert open_files() == before
    sibling.close()
    link.send_again()
    assert open_files() == before - 1, "that was the sibling's end"

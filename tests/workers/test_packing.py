"""What goes over a link: what a transfer takes along when it moves house, what of that stays open where it was, and
what becomes of the others when something goes wrong."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import gevent
import pytest

from relay.clients.client import Client
from relay.clients.frames import FrameReader
from relay.clients.speech import Plain
from relay.transfer.limits import Limits
from relay.transfer.pair import Pair, Readers
from relay.transfer.pump import COPY_BYTES
from relay.transfer.rest import Rest
from relay.transfer.turns import Turns
from relay.workers.estate import Estate
from relay.workers.language import (
    CONFIRMED,
    LARGEST_PACKET,
    READY,
    Envelope,
    decode_clients,
    decode_envelope,
    encode_answer,
)
from relay.workers.link import CLIENTS_AT_A_TIME, Link, Parcel
from relay.workers.parcels import Parcels
from tests.support.bare_pair import new_pair
from tests.support.kernel_view import refuse_to_watch


class Owner:
    """Of a link; it notes what comes back."""

    def __init__(self) -> None:
        self.back: list[Parcel] = []
        self.said: list[bytes] = []

    def envelope(self) -> Envelope:
        """For the next parcel."""
        return Envelope(1, time.monotonic())

    def heard(self, link: Link, packet: bytes, fds: list[int]) -> None:
        """Something is said."""
        self.said.append(packet)

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
        pair = new_pair(first, second, turns, rest, readers)
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


def test_a_sibling_is_heard_again_when_the_kernel_has_refused_to_watch_for_it(
    link_and_sibling: tuple[Link, socket.socket],
) -> None:
    link, sibling = link_and_sibling
    gevent.sleep(0.01)
    refuse_to_watch(link._sock.fileno(), link._reads)
    link.keep_reading()
    sibling.send(b"there")
    gevent.sleep(0.01)
    owner = link._owner
    assert isinstance(owner, Owner)
    assert owner.said == [b"there"]


class Unable:
    """A worker that has room for all, and makes a mistake with what comes."""

    def has_room(self, connections: int) -> bool:
        """There is."""
        return True

    def take_in_pair(self, *arguments: object) -> None:
        """Nothing comes of it."""
        raise MemoryError


def test_what_came_with_a_transfer_that_cannot_be_taken_in_is_closed(
    stalled: Pair, link_and_sibling: tuple[Link, socket.socket]
) -> None:
    link, sibling = link_and_sibling
    before = open_files()
    link.hand_pair(stalled)
    packet, fds, _, _ = socket.recv_fds(sibling, LARGEST_PACKET, 10)
    assert open_files() == before + 3
    parcels = Parcels(Unable(), Estate())  # type: ignore[arg-type]  # nothing else is asked of it
    with pytest.raises(MemoryError):
        parcels.take_pair(link, packet, fds)
    assert open_files() == before


class Unpackable(Plain):
    """How a client speaks with whom something is wrong."""

    def pack(self) -> bytes:
        """It raises what nobody expects."""
        raise LookupError


@pytest.fixture
def clients() -> Iterator[list[Client]]:
    """One more than a packet carries, and there is something wrong with the fourth."""
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(CLIENTS_AT_A_TIME + 1):
            here, there = socket.socketpair()
            stack.enter_context(here)
            stack.enter_context(there)
            clients.append(Client(here))
            clients[-1].token = b"%064x" % number
        clients[3].speech = Unpackable()
        yield clients


def test_a_client_that_cannot_be_packed_and_a_lack_of_memory_cost_no_other_its_way(
    clients: list[Client], link_and_sibling: tuple[Link, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    link, sibling = link_and_sibling
    for client in clients:
        link.hand_client(client)
    with monkeypatch.context() as patch:
        patch.setattr("relay.workers.link.encode_clients", no_memory)
        link._send_clients()
    link.send_again()
    owner = link._owner
    assert isinstance(owner, Owner)
    assert [parcel.clients for parcel in owner.back] == [clients[:-1]], "each of these is to be sent alone"
    packet, fds, _, _ = socket.recv_fds(sibling, LARGEST_PACKET, 100)
    for fd in fds:
        os.close(fd)
    assert [handed.token for handed in decode_clients(packet)] == [clients[-1].token]
    assert link.under_way == 1


def no_memory(*arguments: object) -> bytes:
    """There is none."""
    raise MemoryError


class Home:
    """A worker that notes who is taken over by somebody else, and who comes back."""

    def __init__(self) -> None:
        self.gone: list[Client] = []
        self.back: list[Client] = []

    def handed_on(self, client: Client) -> None:
        """A sibling has it."""
        self.gone.append(client)

    def take_back(self, client: Client) -> None:
        """It is ours again."""
        self.back.append(client)


def test_a_link_that_is_ended_gives_back_all_that_was_not_confirmed_and_nothing_can_be_any_more(
    clients: list[Client], link_and_sibling: tuple[Link, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    link, sibling = link_and_sibling
    home = Home()
    parcels = Parcels(home, Estate())  # type: ignore[arg-type]  # nothing else is asked of it
    monkeypatch.setattr(link._owner, "envelope", parcels.envelope)
    unsent, taken, unread = clients[:3]
    for client in (taken, unread):
        link.hand_alone(client)
    link.hand_client(unsent)
    packet, fds, _, _ = socket.recv_fds(sibling, LARGEST_PACKET, 10)
    for fd in fds:
        os.close(fd)
    sibling.send(encode_answer(CONFIRMED, decode_envelope(packet).serial))
    before = open_files()
    socket.send_fds(sibling, [READY], [sibling.fileno()])  # what else it says, be it with sockets, is of no account

    parcels.end(link)
    assert home.gone == [taken], "confirmed, and not read until now"
    parcels.close()
    assert home.back == [unsent, unread]
    assert link.under_way == 0
    assert open_files() == before
    with pytest.raises(BrokenPipeError):
        sibling.send(encode_answer(CONFIRMED, 2))


def test_what_a_worker_has_confirmed_before_it_ended_is_read_though_something_lay_unread_there(
    link_and_sibling: tuple[Link, socket.socket],
) -> None:
    link, sibling = link_and_sibling
    assert link.confirm(1)
    sibling.send(READY)
    Parcels(Home(), Estate()).end(link)  # type: ignore[arg-type]  # as above
    link.close()
    assert sibling.recv(LARGEST_PACKET) == encode_answer(CONFIRMED, 1), "and not ECONNRESET"


@pytest.mark.parametrize("limits", [None, Limits(pair_bytes=1000)], ids=["no limits", "limits"])
def test_what_counts_for_a_transfer_s_bounds_moves_house_with_it(limits: Limits | None) -> None:
    with contextlib.ExitStack() as stack:
        turns = Turns()
        sides = [[stack.enter_context(end) for end in socket.socketpair()] for _ in range(2)]
        here, there = (new_pair(first, second, turns, Rest(turns), limits=limits) for first, second in sides)
        long_ago = time.monotonic() - 1000.0
        here.idle_for(long_ago)
        if here._allowance is not None:
            here._allowance.wasted, here._allowance.framing = 300, 400
        state, _ = here.pack(stack)
        there.unpack(state, [])
        assert there.idle_for(long_ago + 1000.0) == pytest.approx(1000.0)
        if there._allowance is not None:
            assert (there._allowance.wasted, there._allowance.framing) == (300, 400)

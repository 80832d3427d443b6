"""A pair, once both have read `ok`: how bytes and ends of streams go across, and how it ends.

Against one worker and against two that are one relay, except where a constant of the relay is shortened for the test.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import namespaces
from tests.support.harness import (
    SHAPES,
    Relay,
    Service,
    fill_the_way,
    handshake,
    met,
    new_token,
    own_memory,
    read_exactly,
    read_to_end,
    relay_of,
    reset,
    shake_hands,
    shortened,
    wait_until,
)
from tests.support.kernel_view import bytes_in_pipes, largest_pipe, relays_end, unacknowledged, unread
from tests.support.ledger import Ended, Ledger

MIB = 1 << 20
PATTERN = random.Random(1).randbytes(8 * MIB)


@pytest.fixture(scope="module", params=SHAPES)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One recording relay of each shape for the whole module."""
    with relay_of(request.param, tmp_path_factory.mktemp("pair")) as relay:
        yield relay


@pytest.fixture
def ledger(service: Service) -> Ledger:
    """What is recorded from here on."""
    return Ledger(service)


Clients = tuple[socket.socket, socket.socket]
Meet = Callable[[], Clients]


@pytest.fixture
def meet(service: Service) -> Iterator[Meet]:
    """Make pairs at the relay; their clients are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda: met(service.port, stack=stack)


def read_slowly(client: socket.socket, seconds: float = 20) -> int:
    """Read to the end of the stream with pauses; return how many bytes came."""
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        chunk = client.recv(MIB)
        if not chunk:
            return count
        count += len(chunk)
        time.sleep(0.01)
    raise AssertionError(f"no end of stream within {seconds} s, after {count} bytes")


def ends_soon(client: socket.socket, seconds: float = 5) -> None:
    """The client's stream is over within `seconds`, in good order or with a reset, whatever is still in it."""
    with contextlib.suppress(ConnectionResetError):
        read_to_end(client, seconds)


@pytest.fixture(params=["first", "second"])
def turned(request: pytest.FixtureRequest) -> Callable[[Clients], Clients]:
    """Whatever holds for one side holds for the other."""
    return (lambda pair: pair) if request.param == "first" else (lambda pair: (pair[1], pair[0]))


Turned = Callable[[Clients], Clients]


def test_an_ended_stream_leaves_the_other_direction_open(ledger: Ledger, meet: Meet, turned: Turned) -> None:
    ending, going_on = turned(meet())
    ending.sendall(b"that was all")
    ending.shutdown(socket.SHUT_WR)
    assert read_to_end(going_on) == b"that was all"
    for start in range(0, len(PATTERN), MIB):
        going_on.sendall(PATTERN[start : start + MIB])
        assert read_exactly(ending, MIB) == PATTERN[start : start + MIB]
    going_on.shutdown(socket.SHUT_WR)
    assert read_to_end(ending) == b""
    ledger.expect(Ended("happy", len(PATTERN) + 12))


def test_an_end_of_stream_waits_for_the_bytes_before_it(ledger: Ledger, meet: Meet, turned: Turned) -> None:
    sender, receiver = turned(meet())
    with ThreadPoolExecutor(1) as aside:
        sent = aside.submit(send_and_close, sender, PATTERN)
        received = bytearray()
        while chunk := receiver.recv(300_000):
            received += chunk
            time.sleep(0.002)
        sent.result()
    assert received == PATTERN
    receiver.close()
    ledger.expect(Ended("happy", len(PATTERN)))


def send_and_close(sender: socket.socket, what: bytes) -> None:
    """Send everything, then close in good order."""
    sender.sendall(what)
    sender.close()


def test_a_reset_ends_the_other_side_at_once(ledger: Ledger, meet: Meet, turned: Turned) -> None:
    resetting, other = turned(meet())
    other.sendall(b"hello")
    assert read_exactly(resetting, 5) == b"hello"
    began = time.monotonic()
    reset(resetting)
    ends_soon(other)
    assert time.monotonic() - began < 2
    ledger.expect(Ended("happy", 5))


def test_a_sender_that_is_reset_ends_a_receiver_that_does_not_read(ledger: Ledger, meet: Meet, turned: Turned) -> None:
    sender, receiver = turned(meet())
    fill_the_way(sender)
    began = time.monotonic()
    reset(sender)
    ledger.wait_for_one_more()
    assert time.monotonic() - began < 5
    ends_soon(receiver)


def test_a_receiver_that_is_reset_before_it_read_ends_its_sender(ledger: Ledger, meet: Meet, turned: Turned) -> None:
    sender, receiver = turned(meet())
    fill_the_way(sender)
    began = time.monotonic()
    reset(receiver)
    ends_soon(sender)
    assert time.monotonic() - began < 5
    ledger.wait_for_one_more()


def test_a_reset_ends_a_pair_that_is_stalled_in_both_directions(ledger: Ledger, meet: Meet, turned: Turned) -> None:
    resetting, other = turned(meet())
    with ThreadPoolExecutor(2) as aside:
        list(aside.map(fill_the_way, (resetting, other)))
    began = time.monotonic()
    reset(resetting)
    ends_soon(other)
    assert time.monotonic() - began < 5
    ledger.wait_for_one_more()


def test_a_reset_behind_an_ended_direction_ends_a_stalled_one(ledger: Ledger, meet: Meet, turned: Turned) -> None:
    sender, receiver = turned(meet())
    receiver.shutdown(socket.SHUT_WR)
    assert read_to_end(sender) == b""
    fill_the_way(sender)
    began = time.monotonic()
    reset(sender)
    ledger.wait_for_one_more()
    assert time.monotonic() - began < 5
    ends_soon(receiver)


def test_both_streams_ended_the_pair_is_over_at_once(ledger: Ledger, meet: Meet) -> None:
    first, second = meet()
    first.sendall(b"one")
    second.sendall(b"two")
    first.shutdown(socket.SHUT_WR)
    second.shutdown(socket.SHUT_WR)
    assert read_to_end(first) == b"two"
    assert read_to_end(second) == b"one"
    ledger.expect(Ended("happy", 6))
    assert ledger.service.records()[-1]["total_time"] < 5


def close_with_everything_on_its_way(service: Service, sender: socket.socket, receiver: socket.socket) -> int:
    """Fill the way to `receiver`, which does not read, and close `sender` in good order as soon as the relay's kernel
    has all it sent and its end of stream; return how many bytes are on their way."""
    sent = fill_the_way(sender)
    while more := fill_the_way(sender):  # the relay had only been kept from running for a moment
        sent += more
    received = 0
    sender.shutdown(socket.SHUT_WR)
    with relays_end(service.pids, sender) as end:
        while (left := unacknowledged(sender)) > 0:
            received += len(receiver.recv(64 << 10))
            # What the relay's kernel had no room for, the sender's sends again, which takes it a while: nearly all that
            # was sent must not be read meanwhile.
            patience = time.monotonic() + (0.001 if sent - received > 4 * MIB else 0.5)
            while unacknowledged(sender) == left and time.monotonic() < patience:
                time.sleep(0.001)
        # TCP_INFO begins with the state; 8 is CLOSE_WAIT: the end of the stream has come.
        wait_until(lambda: end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 8, what="end of stream")
    sender.close()
    return sent - received


def test_what_came_before_an_orderly_close_arrives_although_the_receiver_talks_on(
    ledger: Ledger, meet: Meet, turned: Turned
) -> None:
    sender, receiver = turned(meet())
    on_its_way = close_with_everything_on_its_way(ledger.service, sender, receiver)
    assert on_its_way > MIB, "the test needs more than rests in the sockets' smallest buffers"
    # The sender's host answers these with a reset: it has nobody any more who would read them.
    for _ in range(5):
        receiver.sendall(b"are you still there?")
        time.sleep(0.05)
    assert read_slowly(receiver) == on_its_way
    receiver.close()
    ledger.wait_for_one_more()


# What takes long otherwise: relays with shortened constants.


def test_when_one_stream_is_over_and_the_other_silent_the_pair_ends_before_long(tmp_path: Path) -> None:
    with (
        Relay(tmp_path, recording=True, inside=shortened(transfer__ending__HALF_CLOSED_SECONDS=2)) as relay,
        contextlib.ExitStack() as stack,
    ):
        first, second = met(relay.port, stack=stack)
        first.shutdown(socket.SHUT_WR)
        assert read_to_end(second) == b""
        for _ in range(4):  # as long as it says something, it goes on
            time.sleep(0.6)
            second.sendall(b"more")
            assert read_exactly(first, 4) == b"more"
        assert read_to_end(first) == b""
        (record,) = relay.wait_for_records(1)
        assert record["total_bytes"] == 16


def test_a_slow_receiver_may_answer_after_the_senders_stream_is_over(tmp_path: Path) -> None:
    with (
        Relay(tmp_path, recording=True, inside=shortened(transfer__ending__HALF_CLOSED_SECONDS=0.5)) as relay,
        contextlib.ExitStack() as stack,
    ):
        sender, receiver = met(relay.port, stack=stack)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        sender.sendall(PATTERN[:MIB])
        sender.shutdown(socket.SHUT_WR)
        with relays_end(relay.pids, receiver) as end:
            wait_until(lambda: unread(receiver) and unacknowledged(end), what="bytes rest on their way to the receiver")
            time.sleep(2)  # longer than a silent receiver would be given, with all that was sent at hand
        assert read_to_end(receiver) == PATTERN[:MIB]
        receiver.sendall(b"got it")
        receiver.close()
        assert read_to_end(sender) == b"got it"
        (record,) = relay.wait_for_records(1)
        assert record["total_bytes"] == MIB + 6


# A host that vanishes: no end of stream and no reset, just silence.


class Hosts:
    """The relay's host and two clients' hosts, each in a network namespace of its own."""

    def __init__(self, network: namespaces.Network, port: int) -> None:
        self.network = network
        self.port = port

    def dial(self, number: int) -> socket.socket:
        """Connect to the relay from host `number`."""
        client = self.network.clients[number].make_there(socket.socket)
        client.settimeout(10)
        client.connect((self.network.relay_address, self.port))
        return client

    def met(self, stack: contextlib.ExitStack) -> Clients:
        """Two that were told ok, one on each host; `stack` closes them."""
        clients = stack.enter_context(self.dial(0)), stack.enter_context(self.dial(1))
        shake_hands(*clients)
        return clients

    def vanish(self, number: int) -> None:
        """Cut the cable of host `number`."""
        namespaces.run_ip("-n", self.network.clients[number].name, "link", "set", "eth0", "down")


@contextlib.contextmanager
def hosts(folder: Path, **constants: float) -> Iterator[tuple[Hosts, Relay]]:
    """Three hosts and a relay on the first, which takes seconds where it otherwise takes minutes."""
    if reason := namespaces.not_allowed():
        pytest.skip(reason)
    with namespaces.three_hosts("relay.test") as network:
        inside = [*network.relay.inside, *shortened(**constants)]
        with Relay(folder, interface="0.0.0.0", recording=True, inside=inside) as relay:
            yield Hosts(network, relay.port), relay


KEEPALIVE = {
    "clients__listening__KEEPALIVE_IDLE_SECONDS": 1,
    "clients__listening__KEEPALIVE_PROBES": 2,
    "clients__listening__KEEPALIVE_PROBE_SECONDS": 1,
}
DEAD = {"transfer__ending__DEAD_SECONDS": 3}


def test_a_dead_peer_of_a_silent_pair_is_noticed(tmp_path: Path) -> None:
    with hosts(tmp_path, **KEEPALIVE) as (places, relay), contextlib.ExitStack() as stack:
        first, _ = places.met(stack)
        places.vanish(1)
        ends_soon(first, 10)
        assert relay.wait_for_records(1)[0]["mood"] == "happy"


def test_a_dead_peer_that_waits_is_noticed(tmp_path: Path) -> None:
    with hosts(tmp_path, **KEEPALIVE) as (places, relay), places.dial(0) as waiting:
        waiting.sendall(handshake(new_token()))
        wait_until(lambda: relay.rows("current")[0]["waiting"] == 1, what="it waits")
        places.vanish(0)
        assert relay.wait_for_records(1)[0]["mood"] == "lonely"


@pytest.mark.parametrize("owed", ["little", "much"])
def test_a_dead_peer_that_is_owed_bytes_is_noticed(tmp_path: Path, owed: str) -> None:
    # Keepalive is silent while something is unacknowledged, and TCP itself tries for a quarter of an hour.
    with hosts(tmp_path, **KEEPALIVE, **DEAD) as (places, relay), contextlib.ExitStack() as stack:
        first, _ = places.met(stack)
        places.vanish(1)
        if owed == "little":
            first.sendall(b"are you there?")
        else:
            fill_the_way(first)
        ends_soon(first, 10)
        assert relay.wait_for_records(1)[0]["mood"] == "happy"


def test_a_living_receiver_that_does_not_read_is_not_taken_for_dead(tmp_path: Path) -> None:
    with (
        hosts(tmp_path, **KEEPALIVE, transfer__ending__DEAD_SECONDS=4) as (places, relay),
        contextlib.ExitStack() as stack,
    ):
        first, second = places.met(stack)
        sent = fill_the_way(first)
        # The kernel's probes of a closed window come ever less often, up to every two minutes.
        with pytest.raises(AssertionError, match="not within"):
            relay.wait_for_records(1, seconds=6)
        first.shutdown(socket.SHUT_WR)
        assert read_slowly(second) == sent


# The bound on what rests in the relay: one gigabyte each way, and a receiver that stalls.

STREAM_BYTES = 1 << 30
SEGMENT_BYTES = 64 * MIB
STALL_AT = 256 * MIB


class Stream:
    """One direction of a large transfer: made by the kernel from a file in memory, compared byte by byte on arrival.

    Segment by segment the same file, each time from a little further on, so that no two segments are alike: a piece
    that is lost, doubled or out of order is found.
    """

    def __init__(self, source: bytes, file: int, sender: socket.socket, receiver: socket.socket) -> None:
        self.source = source
        self.file = file
        self.sender = sender
        self.receiver = receiver
        self.sent = 0
        self.received = 0
        self.may_go_on = threading.Event()
        self.stall_at: float = math.inf

    @staticmethod
    def place(position: int) -> tuple[int, int]:
        """Where in the file the byte at `position` of the stream is, and how many follow it there."""
        segment, inside = divmod(position, SEGMENT_BYTES)
        return segment * MIB // 2 + inside, SEGMENT_BYTES - inside

    def send(self) -> None:
        """Send it all, then the end of the stream."""
        while self.sent < STREAM_BYTES:
            offset, left = self.place(self.sent)
            self.sent += os.sendfile(self.sender.fileno(), self.file, offset, min(left, 4 * MIB))
        self.sender.shutdown(socket.SHUT_WR)

    def receive(self) -> None:
        """Read and compare it all up to its end, standing still for as long as the test wants at `stall_at`."""
        while chunk := self.receiver.recv(min(MIB, self.place(self.received)[1])):
            assert self.source.startswith(chunk, self.place(self.received)[0]), f"wrong bytes at {self.received}"
            self.received += len(chunk)
            if self.received >= self.stall_at:
                self.may_go_on.wait(60)
                self.stall_at = math.inf


def test_a_gigabyte_each_way_arrives_whole_though_a_receiver_stalls(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    source = os.urandom(SEGMENT_BYTES + STREAM_BYTES // SEGMENT_BYTES * MIB // 2)
    with contextlib.ExitStack() as stack:
        file = os.memfd_create("stream")
        stack.callback(os.close, file)
        assert os.pwrite(file, source, 0) == len(source)
        relay = stack.enter_context(Relay(tmp_path, recording=True))
        first, second = met(relay.port, stack=stack)
        for client in (first, second):
            client.setblocking(True)
        there, back = Stream(source, file, first, second), Stream(source, file, second, first)
        there.stall_at = STALL_AT
        before = own_memory(relay.pid)
        began = time.monotonic()
        aside = stack.enter_context(ThreadPoolExecutor(4))
        stack.callback(there.may_go_on.set)
        ends = [aside.submit(work) for work in (there.receive, back.receive, there.send, back.send)]
        wait_until(lambda: back.received == STREAM_BYTES, 60, "the other direction goes on to its end")
        stands = wait_until(lambda: stands_still(there), 20, "the sender stands still")
        resting, grown = bytes_in_pipes(relay.pid), own_memory(relay.pid) - before
        assert there.received == pytest.approx(STALL_AT, abs=MIB)
        assert resting == 0, "who stalls gives its pipe up"
        assert largest_pipe(relay.pid) <= MIB
        assert resting + grown <= 2 * MIB, "1 MiB in each direction, what the relay keeps in Python included"
        assert there.sent == stands
        there.may_go_on.set()
        for end in ends:
            end.result(60)
        assert there.received == back.received == STREAM_BYTES
        seconds = time.monotonic() - began
        (record,) = relay.wait_for_records(1)
        assert record["total_bytes"] == 2 * STREAM_BYTES
        for name, figure in {"bytes in pipes": resting, "memory grown": grown, "seconds for 2 GiB": seconds}.items():
            record_property(name, figure)
            print(f"{name}: {figure}")


def stands_still(stream: Stream) -> int:
    """How much was sent, if that does not change within a second, else 0."""
    sent = stream.sent
    time.sleep(1)
    return sent if stream.sent == sent else 0

"""One direction of bytes, by itself: a `Pump` between real sockets, spliced and copied.

Invariants, held against arbitrary orders of writing, reading and turns:

- what comes out is what went in, in order, and after it the end of the stream;
- at most 1 MiB rests in a pump, and nothing is read from the source while anything rests;
- a pump that is not in the middle of something holds no pipe.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import resource
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.transfer.pipes import FDS_LEFT_FREE, PIPE_BYTES, SPARE_PIPES, Pipe, PipePool
from relay.transfer.pump import COPY_BYTES, INPUT, OVER, ROOM, TURN, Pump
from relay.transfer.turns import LARGEST_TURN, Turns
from tests.support.harness import (
    Relay,
    met,
    open_fds,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.kernel_view import bytes_in_pipes, unread

MIB = 1 << 20


class NoPipes(PipePool):
    """As if there were no file descriptor left."""

    def borrow(self) -> None:
        return None


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """A client's socket and the relay's end of it, neither of which waits."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        end, _ = listener.accept()
    for sock in (client, end):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, end


class Line:
    """A pump between two clients: what `sender` writes comes out at `receiver`."""

    def __init__(self, splices: bool, pipes: PipePool | None = None, turns: Turns | None = None) -> None:
        self.sender, source = tcp_pair()
        self.receiver, sink = tcp_pair()
        self.pipes = PipePool() if pipes is None else pipes
        self.pump = Pump(source, sink, self.pipes, Turns() if turns is None else turns)
        self.pump.splices = splices

    def close(self) -> None:
        """Close everything."""
        self.pump.abandon()
        self.pipes.close()
        for sock in (self.sender, self.pump.source, self.pump.sink, self.receiver):
            sock.close()

    def send(self, pattern: bytes) -> int:
        """Write as much as the kernel takes."""
        try:
            return self.sender.send(pattern)
        except BlockingIOError:
            return 0

    def receive(self, most: int) -> bytes | None:
        """Read what has come; None when nothing has."""
        try:
            return self.receiver.recv(most)
        except BlockingIOError:
            return None

    def carry(self, pattern: bytes) -> bytes:
        """Send all of `pattern` and the end of the stream, and return what came out up to its end."""
        sent, received, ended = 0, bytearray(), False
        while True:
            if sent < len(pattern):
                sent += self.send(pattern[sent : sent + MIB])
            elif not ended:
                self.sender.shutdown(socket.SHUT_WR)
                ended = True
            if self.pump.waits != OVER:
                self.pump.turn(LARGEST_TURN)
                assert self.pump.held <= PIPE_BYTES
            chunk = self.receive(MIB)
            if chunk == b"":
                return bytes(received)
            received += chunk or b""


@pytest.fixture(params=[True, False], ids=["spliced", "copied"])
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    """A pump of each kind."""
    with contextlib.closing(Line(splices=request.param)) as made:
        yield made


def fill(line: Line) -> None:
    """Send to a receiver that does not read, until nothing moves any more."""
    calm = 0
    while calm < 3:
        sent = line.send(bytes(MIB))
        moved = line.pump.moved
        line.pump.turn(LARGEST_TURN)
        calm = calm + 1 if sent == 0 and moved == line.pump.moved else 0


def test_everything_arrives_and_then_the_end_of_the_stream(line: Line) -> None:
    pattern = random.Random(5).randbytes(5 * MIB + 12_345)
    assert hashlib.sha256(line.carry(pattern)).digest() == hashlib.sha256(pattern).digest()
    assert line.pump.moved == len(pattern)
    assert line.pump.waits == OVER
    assert line.pump.held == 0


def test_a_stream_without_a_byte_ends(line: Line) -> None:
    assert line.carry(b"") == b""
    assert line.pump.waits == OVER


def test_a_receiver_that_does_not_read_stops_the_sender(line: Line) -> None:
    fill(line)
    assert line.pump.waits == ROOM
    assert 0 < line.pump.held <= (PIPE_BYTES if line.pump.splices else COPY_BYTES)
    waiting = unread(line.pump.source)
    assert waiting > 0
    line.pump.turn(LARGEST_TURN)
    assert unread(line.pump.source) == waiting, "nothing is read while anything rests in the pump"
    assert line.send(b"more") == 0


def test_a_receiver_that_reads_on_gets_everything(line: Line) -> None:
    fill(line)
    expected = line.pump.moved + line.pump.held + unread(line.pump.source)
    line.sender.shutdown(socket.SHUT_WR)
    received = 0
    while (chunk := line.receive(MIB)) != b"":
        received += len(chunk or b"")
        if line.pump.waits != OVER:
            line.pump.turn(LARGEST_TURN)
    assert received >= expected
    assert received == line.pump.moved


@pytest.mark.parametrize("splices", [True, False], ids=["spliced", "copied"])
def test_a_turn_moves_no_more_than_its_share(splices: bool) -> None:
    with contextlib.closing(Line(splices)) as line:
        line.receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        sent = 0
        while sent < 250_000:
            sent += line.send(bytes(250_000 - sent))
        steps = []
        while line.pump.moved < sent:
            before = line.pump.moved
            line.pump.turn(100_000)
            steps.append(line.pump.moved - before)
        assert max(steps) <= 100_000
        assert line.pump.waits == INPUT or line.pump.waits == TURN


def test_a_pipe_is_borrowed_only_while_bytes_are_in_it() -> None:
    before = open_fds(os.getpid())
    with contextlib.closing(Line(splices=True, pipes=PipePool(spare=0))) as line:
        sockets_only = open_fds(os.getpid())
        assert line.send(b"hello") == 5
        line.pump.turn(LARGEST_TURN)
        assert open_fds(os.getpid()) == sockets_only
        fill(line)
        assert open_fds(os.getpid()) == sockets_only + 2
        line.pump.abandon()
        assert open_fds(os.getpid()) == sockets_only
    assert open_fds(os.getpid()) == before


def test_a_source_that_is_reset_is_an_error(line: Line) -> None:
    line.sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.sender.close()
    with pytest.raises(ConnectionResetError):
        line.pump.turn(LARGEST_TURN)


def test_where_the_kernel_cannot_splice_it_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object, **__: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    pattern = random.Random(6).randbytes(MIB)
    with contextlib.closing(Line(splices=True)) as line:
        monkeypatch.setattr(os, "splice", cannot)
        assert line.carry(pattern) == pattern
        assert not line.pump.splices


def test_where_no_pipe_can_be_had_it_copies_until_there_is_one() -> None:
    pattern = random.Random(7).randbytes(MIB)
    with contextlib.closing(Line(splices=True, pipes=NoPipes())) as line:
        assert line.carry(pattern) == pattern
        assert line.pump.splices


def test_a_pipe_that_may_not_be_enlarged_works_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "fcntl", refused)  # the user's pipe memory is used up
    pattern = random.Random(8).randbytes(MIB)
    with contextlib.closing(Line(splices=True)) as line:
        assert line.carry(pattern) == pattern
        assert line.pump.splices


def test_a_pool_keeps_a_bounded_number_of_pipes() -> None:
    before = open_fds(os.getpid())
    pool = PipePool()
    pipes = [pipe for pipe in (pool.borrow() for _ in range(SPARE_PIPES + 10)) if pipe is not None]
    for pipe in pipes:
        pool.give_back(pipe)
    assert open_fds(os.getpid()) == before + 2 * SPARE_PIPES
    pool.close()
    assert open_fds(os.getpid()) == before


def test_pipes_leave_the_last_file_descriptors_to_others() -> None:
    pool = PipePool()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + FDS_LEFT_FREE + 20, hard))
        pipes: list[Pipe] = []
        while (pipe := pool.borrow()) is not None:
            pipes.append(pipe)
        assert len(pipes) >= 9
        others = [os.dup(0) for _ in range(FDS_LEFT_FREE)]
        assert pool.borrow() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for pipe in pipes:
        pipe.close()
    for fd in others:
        os.close(fd)


class Flow(RuleBasedStateMachine):
    """One pump, and everybody around it in any order: the sender, the receiver, the turns."""

    line: Line

    @initialize(splices=st.booleans(), seed=st.integers(0, 2**32))
    def begins(self, splices: bool, seed: int) -> None:
        """A pump of either kind; the seed says what is sent."""
        self.line = Line(splices)
        # A narrow way out, so that a receiver that does not read is soon felt.
        self.line.pump.sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self.line.receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.bytes_of = random.Random(seed)
        self.sent = bytearray()
        self.received = bytearray()
        self.ended = False

    def teardown(self) -> None:
        """Whatever happened: let it flow, and all of it must come out."""
        if not hasattr(self, "line"):
            return
        try:
            self.line.sender.shutdown(socket.SHUT_WR)
            while (chunk := self.line.receive(MIB)) != b"":
                self.received += chunk or b""
                if self.line.pump.waits != OVER:
                    self.line.pump.turn(LARGEST_TURN)
            assert self.received == self.sent
            assert self.line.pump.moved == len(self.sent)
        finally:
            self.line.close()

    @precondition(lambda self: not self.ended)
    @rule(count=st.integers(1, 3 * MIB))
    def the_sender_writes(self, count: int) -> None:
        """As much of it as the kernel takes."""
        pattern = self.bytes_of.randbytes(count)
        self.sent += pattern[: self.line.send(pattern)]

    @rule()
    def the_sender_ends(self) -> None:
        """It half-closes; again is nothing new."""
        self.line.sender.shutdown(socket.SHUT_WR)
        self.ended = True

    @rule(most=st.integers(1, 3 * MIB))
    def the_receiver_reads(self, most: int) -> None:
        """What has come, in order."""
        self.received += self.line.receive(most) or b""
        assert self.received == self.sent[: len(self.received)]

    @precondition(lambda self: self.line.pump.waits != OVER)
    @rule(turns=st.integers(1, 8))
    def the_pump_has_turns(self, turns: int) -> None:
        """One after another, whether there is something to do or not."""
        for _ in range(turns):
            if self.line.pump.waits != OVER:
                self.line.pump.turn(LARGEST_TURN)

    @invariant()
    def little_rests_in_it(self) -> None:
        """The bound, and the meaning of `waits`."""
        if not hasattr(self, "line"):
            return
        pump = self.line.pump
        assert 0 <= pump.held <= PIPE_BYTES
        assert (pump.waits == ROOM) == (pump.held > 0)
        assert len(self.received) <= pump.moved <= len(self.sent) - pump.held
        if pump.waits == OVER:
            assert self.ended
            assert pump.moved == len(self.sent)


TestFlow = Flow.TestCase
TestFlow.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# A whole relay that cannot splice.


def pass_both_ways(relay: Relay, size: int) -> None:
    """One transfer with `size` bytes in each direction, compared at both ends."""
    pattern = random.Random(9).randbytes(size)
    first, second = met(relay.port)
    with first, second:
        for sender, receiver in ((first, second), (second, first)):
            for start in range(0, size, MIB // 2):
                part = pattern[start : start + MIB // 2]
                sender.sendall(part)
                assert read_exactly(receiver, len(part)) == part
        first.shutdown(socket.SHUT_WR)
        assert read_to_end(second) == b""
        second.close()
        assert read_to_end(first) == b""


def test_a_relay_without_file_descriptors_for_pipes_copies(tmp_path: Path) -> None:
    with Relay(tmp_path, recording=True) as relay:
        first, second = met(relay.port)
        with first, second:
            # Every number below the highest in use counts, so that not one more can be had.
            numbers = sorted(int(entry.name) for entry in Path(f"/proc/{relay.pid}/fd").iterdir())
            limits = resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)
            lowest_free = next(number for number in range(len(numbers) + 1) if number not in numbers)
            resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
            pattern = random.Random(10).randbytes(4 * MIB)
            first.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while sent < len(pattern):  # nobody reads yet, so bytes have to rest in the relay
                    sent += first.send(pattern[sent:])
            wait_until(lambda: bytes_in_pipes(relay.pid) == 0, what="no byte rests in a pipe")
            assert read_exactly(second, sent) == pattern[:sent]
            resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, limits)
            first.close()
            assert read_to_end(second) == b""
            second.close()
        (record,) = relay.wait_for_records(1)
        assert record["total_bytes"] == sent
        pass_both_ways(relay, 2 * MIB)


def test_a_platform_without_splice_is_served_by_copying(tmp_path: Path) -> None:
    imports = "import sys, relay.cli; from relay.transfer import pump"
    unspliced = f"{imports}; pump._SPLICE = None; relay.cli.main(sys.argv[4:])"
    with Relay(tmp_path, inside=[sys.executable, "-c", unspliced]) as relay:
        pass_both_ways(relay, 4 * MIB)

"""A fault with one transfer, of ours or the kernel's, is nobody else's: the others go on, and it is over and on record.

A callback of the event loop that an exception leaves in the middle must not leave what it keeps standing still.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import re
import resource
import select
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
from websockets.sync.client import ClientConnection

from relay.clients import frames
from relay.clients.bounds import Bound
from relay.clients.client import Client, EventLoop
from relay.clients.door import open_port
from relay.clients.frames import FrameReader
from relay.clients.sites import Sites
from relay.clients.waiting_room import WaitingRoom
from relay.options import Options
from relay.server import Ports
from relay.server import Relay as Server
from relay.transfer import pump as pump_module
from relay.transfer.framed import FramedPump
from relay.transfer.pair import Pair
from relay.transfer.pipes import PipePool
from relay.transfer.pump import ROOM, TURN, Pump, reserve
from relay.transfer.rest import Rest
from relay.transfer.state import PairState, PumpState
from relay.transfer.turns import NoMemory, Turns
from tests.support.client_frames import BINARY, Sent
from tests.support.harness import Relay, connect, handshake, new_side, new_token, read_exactly, wait_until
from tests.support.kept_records import Records
from tests.support.kernel_view import refuse_to_watch
from tests.support.web import dial_web, read_bytes, web_options, web_port

MIB = 1 << 20


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What gevent is told of, and would print."""
    told: list[BaseException] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda context, kind, error, trace: told.append(error))
    return told


# The queue of those that move much


class Hauler:
    """A pump that always has more, until it fails."""

    is_dear = False

    def __init__(self, fault: BaseException | None = None) -> None:
        self.waits = TURN
        self.turns = 0
        self._fault = fault

    def turn(self, most: int) -> None:
        """As `Pump.turn`."""
        self.turns += 1
        if self._fault is not None:
            raise self._fault


def keep_moving(turns: Turns, hauler: Hauler) -> None:
    """As a pair's greenlet does."""
    while True:
        turns.wait(hauler)


def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until that is so."""
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        gevent.sleep(0.005)


@pytest.mark.parametrize("fault", [MemoryError(), LookupError(), OSError(errno.ENOMEM, "")])
def test_a_pump_that_fails_in_its_turn_is_told_so_and_the_others_go_on(
    faults: list[BaseException], fault: Exception
) -> None:
    turns = Turns()
    good = Hauler()
    moving = gevent.spawn(keep_moving, turns, good)
    fails = gevent.spawn(keep_moving, turns, Hauler(fault))
    until(lambda: fails.dead)
    assert fails.exception is fault
    then = good.turns
    until(lambda: good.turns > then + 10)
    late = Hauler()
    comes_later = gevent.spawn(keep_moving, turns, late)
    until(lambda: late.turns > 10)
    gevent.killall([moving, comes_later])
    assert not turns.busy()


def test_what_fails_between_two_turns_does_not_stop_the_queue(faults: list[BaseException]) -> None:
    turns = Turns()
    good = Hauler()
    fault = MemoryError()

    def fail_once() -> bool:
        turns.look_at_others = lambda: False
        raise fault

    moving = gevent.spawn(keep_moving, turns, good)
    until(lambda: good.turns > 0)
    turns.look_at_others = fail_once
    until(lambda: fault in faults)
    then = good.turns
    until(lambda: good.turns > then)
    gevent.kill(moving)


# Those at rest


class Speaker:
    """Somebody at rest, with whom something goes wrong as soon as it says something, or when it is looked at."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.due = 0
        self.watched: tuple[int, int] | None = None
        self.events = 1, 1
        self.first, self.second = socket.socketpair()
        self.heard = 0
        self.looked = 0
        self.rest: Rest | None = None
        self._fault = fault

    @property
    def fds(self) -> tuple[int, int]:
        """Of its sides."""
        return self.first.fileno(), self.second.fileno()

    def _act(self) -> None:
        if self._fault is not None:
            raise self._fault

    def attend(self, fd: int, events: int) -> None:
        """Reads what there is."""
        self._act()
        self.heard += len((self.first if fd == self.first.fileno() else self.second).recv(100))

    def settle(self) -> None:
        """There is nothing to settle."""
        self._act()

    def look_around(self, now: float) -> None:
        """Nothing to see."""
        self.due = 0
        self.looked += 1
        self._act()

    def give_up(self) -> None:
        """It is over."""
        assert self.rest is not None
        self.rest.forget(self)
        self.first.close()
        self.second.close()


@pytest.fixture
def rest() -> Iterator[Rest]:
    """Nobody rests yet."""
    rest = Rest(Turns())
    yield rest
    rest.close()


@pytest.fixture
def speakers(rest: Rest) -> Iterator[list[Speaker]]:
    """Twenty who rest, and something is wrong with every fifth."""
    speakers = [Speaker(LookupError() if number % 5 == 2 else None) for number in range(20)]
    for speaker in speakers:
        speaker.rest = rest
        rest.watch(speaker)
    yield speakers
    for speaker in speakers:
        speaker.give_up() if speaker.first.fileno() >= 0 else None


def test_a_fault_of_one_that_is_heard_ends_that_one_and_the_others_are_heard_for_ever(
    speakers: list[Speaker], rest: Rest, faults: list[BaseException]
) -> None:
    for said in range(1, 4):
        for speaker in speakers:
            if speaker.second.fileno() >= 0:
                speaker.second.send(b"x")
        until(lambda said=said: sum(speaker.heard for speaker in speakers) == 16 * said)  # type: ignore[misc]
    assert len(faults) == 4, "each fault once"
    assert len(rest) == 2 * 16


def test_a_fault_of_one_whose_deadline_has_come_ends_that_one_and_the_others_are_looked_at_for_ever(
    speakers: list[Speaker], rest: Rest, faults: list[BaseException]
) -> None:
    for looked in range(1, 4):
        now = time.monotonic()
        for speaker in speakers:
            if speaker.watched is not None:
                rest.look_at(speaker, now)
        rest.every_second(now + 2)
        until(lambda looked=looked: [speaker.looked for speaker in speakers].count(looked) >= 16)  # type: ignore[misc]
    assert len(faults) == 4
    assert len(rest) == 2 * 16


def test_a_fault_of_one_that_settles_is_nobody_else_s(
    speakers: list[Speaker], rest: Rest, faults: list[BaseException]
) -> None:
    good, bad = speakers[1:3]
    rest.settle_soon(bad)
    good.second.send(b"x")
    until(lambda: good.heard == 1)
    assert len(faults) == 1
    good.second.send(b"x")
    until(lambda: good.heard == 2)


# The kernel refuses to watch


class Epoll:
    """The kernel's, which refuses to watch anybody anew, or for something else, while `refuses`."""

    def __init__(self, epoll: select.epoll) -> None:
        self.refuses = False
        self._epoll = epoll
        self.unregister = epoll.unregister
        self.close = epoll.close

    def register(self, fd: int, events: int) -> None:
        """As epoll_ctl(2)."""
        self._refuse()
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """As epoll_ctl(2)."""
        self._refuse()
        self._epoll.modify(fd, events)

    def _refuse(self) -> None:
        if self.refuses:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Worker:
    """A relay in this process, its clients, and what is on record."""

    def __init__(self, relay: Server, listener: socket.socket, stack: contextlib.ExitStack) -> None:
        self.relay = relay
        self.records = Records()
        self.rest = relay.pairs._rest
        self.epoll = Epoll(self.rest._epoll)
        self.rest._epoll = self.epoll  # type: ignore[assignment]
        self._listener = listener
        self._stack = stack
        ports = Ports(listener)
        relay.start(ports, self.records)  # type: ignore[arg-type]  # it need not write anything

    @property
    def moods(self) -> list[str]:
        """Of all that is on record."""
        return [record.mood for record in self.records.recorded]

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return self.relay._places.taken

    def client(self, token: str, side: str | None = None) -> socket.socket:
        """One that has said what it wants."""
        client = self._stack.enter_context(connect(self._listener.getsockname()[1]))
        client.sendall(handshake(token, side or new_side()))
        client.setblocking(False)
        return client

    def met(self) -> tuple[socket.socket, socket.socket]:
        """Two that have met."""
        token = new_token()
        both = self.client(token), self.client(token)
        for client in both:
            assert heard(client, 3) == b"ok\n"
        return both


def heard(client: socket.socket, size: int) -> bytes:
    """What a client reads, so many bytes or up to the end of the stream."""
    got = b""
    ends = time.monotonic() + 10
    while len(got) < size and time.monotonic() < ends:
        try:
            chunk = client.recv(size - len(got))
        except BlockingIOError:
            gevent.sleep(0.005)
            continue
        except ConnectionResetError:
            break
        if not chunk:
            break
        got += chunk
    return got


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A relay in this process, where nobody is yet."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_port("127.0.0.1", 0))
        relay = Server(Options())
        stack.callback(relay.close)
        yield Worker(relay, listener, stack)


def test_a_transfer_that_the_kernel_refuses_to_watch_moves_and_ends_all_the_same(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.epoll.refuses = True
    (first, second), others = worker.met(), worker.met()
    for size in (5, 2 * MIB):
        gevent.spawn(send_all, first, bytes(size))
        assert heard(second, size) == bytes(size)
    assert worker.rest._refused
    for client in others:
        client.close()
    until(lambda: worker.moods == ["happy"])
    worker.epoll.refuses = False
    until(lambda: not worker.rest._refused)
    second.send(b"back")
    assert heard(first, 4) == b"back"
    for client in (first, second):
        client.close()
    until(lambda: worker.moods == ["happy"] * 2)
    assert worker.taken == 0
    assert len(worker.rest) == 0
    assert capsys.readouterr().err.count("refuses to watch") == 1


def send_all(client: socket.socket, content: bytes) -> None:
    """Send it as the relay takes it."""
    view = memoryview(content)
    while view:
        with contextlib.suppress(BlockingIOError):
            view = view[client.send(view) :]
        gevent.sleep(0.001)


def test_what_is_changed_of_one_that_is_refused_is_watched_once_it_can_be(rest: Rest) -> None:
    speaker = Speaker()
    speaker.rest = rest
    epoll = Epoll(rest._epoll)
    rest._epoll = epoll  # type: ignore[assignment]
    rest.watch(speaker)
    epoll.refuses = True
    speaker.events = select.EPOLLET, 1
    rest.watch(speaker)
    speaker.second.send(b"x")
    epoll.refuses = False
    rest.every_second(time.monotonic())
    gevent.sleep(0.05)
    speaker.events = 1, 1
    rest.watch(speaker)
    until(lambda: speaker.heard > 0)
    speaker.give_up()
    assert len(rest) == 0


def test_those_at_rest_are_heard_again_when_the_kernel_has_refused_to_watch_for_them(rest: Rest) -> None:
    speaker = Speaker()
    speaker.rest = rest
    rest.watch(speaker)
    gevent.sleep(0.01)
    refuse_to_watch(rest._epoll.fileno(), rest._watcher)
    rest.every_second(time.monotonic())
    speaker.second.send(b"x")
    until(lambda: speaker.heard > 0)
    speaker.give_up()


# How a pair begins, and is cut


def test_a_pair_that_neither_rests_nor_moves_can_be_cut(worker: Worker) -> None:
    worker.relay.pairs.moves_on = lambda: True  # so it waits for another worker to take it
    both = worker.met()
    (pair,) = worker.relay.pairs
    assert not pair.started_pumping
    pair.cut(Bound.IDLE)
    assert [heard(client, 1) for client in both] == [b"", b""]
    assert worker.moods == ["happy"]
    assert worker.taken == 0
    pair.cut(Bound.IDLE)
    assert worker.moods == ["happy"]


@pytest.mark.parametrize("name", ["start", "be_pinged", "_go_to_rest"])
def test_a_pair_that_cannot_begin_is_over_and_on_record(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Pair, "speaks_websocket", name == "be_pinged")
        patch.setattr(Pair, name, fail)
        both = worker.met()
        assert [heard(client, 1) for client in both] == [b"", b""]
        assert worker.moods == ["happy"]
        assert worker.taken == 0
        assert len(worker.relay._matching) == 0
    first, second = worker.met()
    first.send(b"and the next one moves")
    assert heard(second, 22) == b"and the next one moves"
    told = capsys.readouterr().err
    assert "a mistake with one transfer" in told
    assert "127.0.0.1" not in told


def fail(*arguments: object, **named: object) -> None:
    """There is no memory."""
    raise MemoryError


def test_a_fault_in_the_end_of_a_pair_leaves_it_over_and_on_record(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, faults: list[BaseException]
) -> None:
    first, second = worker.met()
    (pair,) = worker.relay.pairs
    until(lambda: pair.watched is not None)
    monkeypatch.setattr(Pump, "abandon", fail)
    pair.on_ending = fail
    first.close()
    second.close()
    until(lambda: bool(worker.moods))
    assert worker.moods == ["happy"]
    assert worker.taken == 0
    assert len(worker.rest) == 0
    monkeypatch.undo()


def test_two_that_cannot_become_a_pair_are_sent_away_and_their_spares_with_them(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token, side = new_token(), new_side()
    waiting = [worker.client(token, side) for _ in range(2)]
    until(lambda: len(worker.relay._matching) == 2)
    with monkeypatch.context() as patch:
        patch.setattr(worker.relay.pairs, "_new_pair", fail)
        everybody = [*waiting, worker.client(token)]
        assert [heard(client, 1) for client in everybody] == [b""] * 3
    for client in everybody:
        client.close()
    until(lambda: worker.taken == 0)
    assert worker.moods == ["lonely"] * 3
    assert len(worker.relay._matching) == 0
    told = capsys.readouterr().err
    assert "a mistake with two that have met" in told
    assert token not in told
    assert "127.0.0.1" not in told
    worker.met()


def test_a_pair_of_another_worker_that_cannot_be_made_here_takes_no_place(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = PumpState(0, 0, False, True, b"")
    source = b"\xc0\x00\x02\x01"
    state = PairState(0.0, 0.0, 0.0, nothing, nothing, b"", b"", source, None)
    sides = socket.socketpair()
    monkeypatch.setattr(worker.relay.pairs, "_new_pair", fail)
    with sides[0], sides[1], pytest.raises(MemoryError):
        worker.relay.pairs.take_in(state, sides, [])
    assert worker.taken == worker.relay._places.count_of(source) == 0


def test_who_is_sent_away_is_nobody_s_no_longer_whatever_goes_wrong(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, side = new_token(), new_side()
    waiting = [worker.client(token, side) for _ in range(3)]
    until(lambda: len(worker.relay._matching) == 3)
    monkeypatch.setattr(worker.relay._farewell, "turn_away", fail)
    monkeypatch.setattr(worker.relay._matching.elsewhere, "matched", fail)
    partner = worker.client(token)
    assert heard(partner, 3) == b"ok\n"
    assert sorted(heard(client, 3) for client in waiting) == [b"", b"", b"ok\n"]
    assert worker.taken == 2
    monkeypatch.undo()


def refuse_at_once(client: Client, loop: EventLoop, on_readable: Callable[[Client], None]) -> None:
    """As `Client.listen` when there is no memory for a watcher."""
    client.stop_listening()


def refuse_later(
    client: Client, loop: EventLoop, on_readable: Callable[[Client], None], listen: Callable[..., None] = Client.listen
) -> None:
    """As `Client.listen` when the kernel refuses to watch: libev stops the watcher, and calls back that once."""
    listen(client, loop, on_readable)
    watcher = client.watcher

    def give_up() -> None:
        if watcher is not None and watcher is client.watcher:
            watcher.stop()
            on_readable(client)

    gevent.get_hub().loop.run_callback(give_up)


@pytest.mark.parametrize("refuse", [refuse_at_once, refuse_later])
def test_who_cannot_be_listened_to_waits_and_is_listened_to_as_soon_as_that_can_be(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., None]
) -> None:
    token = new_token()
    with monkeypatch.context() as patch:
        patch.setattr(Client, "listen", refuse)
        waits, leaves = worker.client(token), worker.client(new_token())
        until(lambda: len(worker.relay._matching) == 2)
        gevent.sleep(0)  # for who is refused later
    leaves.close()
    until(lambda: worker.moods == ["lonely"])
    partner = worker.client(token)
    assert [heard(client, 3) for client in (waits, partner)] == [b"ok\n"] * 2


def test_who_cannot_be_seen_home_is_sent_away(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = new_token()
    with monkeypatch.context() as patch:
        patch.setattr(worker.relay._matching.elsewhere, "sees_home", fail)
        client = worker.client(token)
        assert heard(client, 1) == b""
    client.close()
    until(lambda: worker.taken == 0)
    assert worker.moods == ["lonely"]
    told = capsys.readouterr().err
    assert "a mistake with one whose handshake is whole" in told
    assert token not in told
    assert "127.0.0.1" not in told
    worker.met()


def test_one_that_comes_back_from_another_worker_is_nobody_s_no_longer_whatever_goes_wrong(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    client = Client(ours)
    client.token = new_token().encode()
    worker.relay._places.take(client.source)
    with monkeypatch.context() as patch:
        patch.setattr(worker.relay._matching, "_judge", fail)
        worker.relay._matching.readmit(client)
    assert worker.moods == ["lonely"]
    theirs.close()
    until(lambda: worker.taken == 0)


def test_a_token_that_is_asked_for_in_vain_is_in_no_message() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = Client(ours)
        client.token = b"0123456789abcdef"
        with pytest.raises(ValueError) as fault:  # noqa: PT011  # it is about the message
            WaitingRoom[Client](Sites(lambda _: 0)).leave(client)
        assert "0123456789abcdef" not in str(fault.value)


@pytest.mark.parametrize("others_move", [True, False])
def test_a_pair_whose_greenlet_could_not_begin_goes_on(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, faults: list[BaseException], *, others_move: bool
) -> None:
    first, second = worker.met()
    (pair,) = worker.relay.pairs
    until(lambda: pair.watched is not None)
    worker.rest.forget(pair)
    pair.greenlet = gevent.spawn(fail)
    until(lambda: pair.is_stranded)
    first.send(b"still here")
    pairs = worker.relay.pairs
    counting = pairs.count()
    if not others_move:  # then nobody counts
        monkeypatch.setattr(pairs, "count", lambda: iter(()))
    for _ in counting if others_move else pairs.cut_idle(time.monotonic() + 60):
        pass
    assert heard(second, 10) == b"still here"
    assert not worker.moods


# There is no memory


class Way:
    """A pump between two connections, whose outer ends are `source` and `sink`."""

    def __init__(self, make: Callable[[socket.socket, socket.socket], Pump | FramedPump]) -> None:
        self.source, inner = socket.socketpair()
        outer, self.sink = socket.socketpair()
        self._all = (self.source, inner, outer, self.sink)
        for end in self._all:
            end.setblocking(False)
        self.pump = make(inner, outer)

    def turn(self) -> None:
        """One, with as much as there may be."""
        self.pump.turn(MIB)

    def fill(self) -> int:
        """Let the sink take nothing more; returns how many bytes have to be read before it does."""
        filled = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += self.pump.sink.send(bytes(4096))
        return filled

    def close(self) -> None:
        """All ends, and the pump."""
        self.pump.abandon()
        for end in self._all:
            end.close()


class NoPipes(PipePool):
    """As if there were no file descriptor left."""

    def borrow(self) -> None:
        return None


def copying(source: socket.socket, sink: socket.socket) -> Pump:
    """Without pipes."""
    return Pump(source, sink, NoPipes(), Turns())


def framed(source: socket.socket, sink: socket.socket) -> FramedPump:
    """From one that speaks WebSocket to one that does not."""
    return FramedPump(source, sink, Turns(), FrameReader(), frames_out=False)


def to_frames(source: socket.socket, sink: socket.socket) -> FramedPump:
    """From one that speaks plainly to one that speaks WebSocket."""
    return FramedPump(source, sink, Turns(), None, frames_out=True)


CONTENT = bytes(range(256)) * 200
AS_FRAME = Sent(BINARY, CONTENT).wire
AS_MESSAGES = b"".join(bytes(piece) for piece in frames.messages([CONTENT]))
WAYS: dict[str, tuple[Callable[[socket.socket, socket.socket], Pump | FramedPump], bytes, bytes]]
WAYS = {"copying": (copying, CONTENT, CONTENT), "framed": (framed, AS_FRAME, CONTENT)}
WAYS["to_frames"] = (to_frames, CONTENT, AS_MESSAGES)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[tuple[Way, bytes, bytes]]:
    """A pump, what comes in, and what that is on the other side."""
    make, comes, goes = WAYS[request.param]
    way = Way(make)
    yield way, comes, goes
    way.close()


def test_without_a_reserve_nothing_is_read_and_so_nothing_is_lost(
    way: tuple[Way, bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, comes, goes = way
    with monkeypatch.context() as patch:
        patch.setattr(reserve, "kept", None)
        patch.setattr("relay.transfer.pump.mmap.mmap", fail)
        there.source.send(comes)
        for _ in range(2):
            with pytest.raises(NoMemory):
                there.turn()
            assert there.pump.waits == TURN
    there.turn()
    assert heard(there.sink, len(goes)) == goes


def test_what_the_sink_does_not_take_is_kept_in_the_reserve_when_there_is_no_other_memory(
    way: tuple[Way, bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, comes, goes = way
    there.source.send(comes)
    filled = there.fill()
    if reserve.kept is None:
        reserve.renew()

    def short(chunk: memoryview) -> bytes:
        """There are none as long as the reserve is kept."""
        if reserve.kept is not None:
            raise MemoryError
        return bytes(chunk)

    monkeypatch.setattr(pump_module, "bytes", short, raising=False)
    there.turn()
    assert there.pump.waits == ROOM
    assert (reserve.kept is None) == isinstance(there.pump, Pump), "who joins pieces is not kept from it here"
    monkeypatch.undo()
    assert heard(there.sink, filled) == bytes(filled)
    there.turn()
    assert heard(there.sink, len(goes)) == goes


def test_frames_that_cannot_be_unmasked_for_want_of_memory_are_kept_until_they_can() -> None:
    there = Way(framed)
    assert there.pump.reader is not None
    mask = there.pump.reader._apply_mask
    there.pump.reader._apply_mask = fail  # type: ignore[assignment]
    for sent in (AS_FRAME[:20_000], AS_FRAME[20_000:] + Sent(BINARY, b"and more").wire):
        there.source.send(sent)
        for _ in range(2):
            with pytest.raises(NoMemory):
                there.turn()
    assert there.pump.held == 20_000, "what was not looked at yet, and nothing more is read"
    there.pump.reader._apply_mask = mask
    for _ in range(3):
        there.turn()
    assert heard(there.sink, len(CONTENT) + 8) == CONTENT + b"and more"
    assert there.pump.held == 0
    there.close()


def test_what_rests_in_a_pipe_stays_there_while_there_is_no_memory_to_put_it_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = Way(lambda source, sink: Pump(source, sink, PipePool(), Turns()))
    there.source.send(CONTENT)
    filled = there.fill()
    there.turn()
    assert isinstance(there.pump, Pump)
    with monkeypatch.context() as patch:
        patch.setattr(pump_module, "bytearray", fail, raising=False)
        there.pump.put_away()
        pipe = there.pump._pipe
        assert pipe is not None
        assert bytes_waiting_in(pipe.outlet) == len(CONTENT)
    heard(there.sink, filled)
    assert not there.pump.sip()
    assert there.pump._pipe is None, "somebody else may have it"
    assert heard(there.sink, len(CONTENT)) == CONTENT
    there.close()


def bytes_waiting_in(pipe: int) -> int:
    """How many; see ioctl_pipe(2), FIONREAD."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_no_transfer_ends_or_loses_a_byte_while_a_worker_gets_no_memory(tmp_path: Path) -> None:
    block = random.Random(1).randbytes(256 << 10)
    twice, sent = block + block, Sent(BINARY, block).wire
    with Relay(tmp_path, *web_options(), recording=True) as relay, contextlib.ExitStack() as stack:
        (pid,) = relay.pids
        received, ends = [0] * 4, threading.Event()
        for number in range(len(received)):
            sender = stack.enter_context(dial_web(web_port(relay)))
            receiver = stack.enter_context(connect(relay.port))
            token = new_token()
            sender.send(handshake(token, new_side()))
            receiver.sendall(handshake(token, new_side()))
            assert read_exactly(receiver, 3) == b"ok\n"
            assert read_bytes(sender, 3) == b"ok\n"

            def send(sender: ClientConnection = sender) -> None:
                while not ends.is_set():
                    sender.socket.sendall(sent)
                sender.close()

            def receive(receiver: socket.socket = receiver, number: int = number) -> None:
                while got := receiver.recv(len(block)):
                    at = received[number] % len(block)
                    received[number] += len(got) if got == twice[at : at + len(got)] else -sys.maxsize

            for work in (send, receive):
                thread = threading.Thread(target=work)
                thread.start()
                stack.callback(thread.join)
        stack.callback(ends.set)
        wait_until(lambda: min(received) > 20 * MIB, what="all move")
        size = int(re.findall(r"VmSize:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) << 10
        resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        ends.wait(1.5)
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        then = min(received) + 50 * MIB
        wait_until(lambda: min(received) > then, what="all move again")
        ends.set()
        records = relay.wait_for_records(len(received))
        assert sorted(record["total_bytes"] for record in records) == sorted(received)
        relay.tracebacks_expected = True  # what else a worker does once a second has no memory either

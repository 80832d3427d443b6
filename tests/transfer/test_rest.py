"""Pairs at rest: who has little to move costs little, who stands still costs nothing, and time is shared.

Nothing here measures speed: clocks are the test's own, and what is counted is calls, descriptors and wake-ups.
`misc/siege.py` has the figures.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import gevent
import pytest

from relay.transfer import rest as rest_module
from relay.transfer import turns as turns_module
from relay.transfer.pump import TURN
from relay.transfer.rest import A_FEW, BATCH, SLICE_SECONDS, Rest
from relay.transfer.turns import (
    BURST_SECONDS,
    CONSIDERATE_TURN,
    HELD_BYTES,
    LEAST_SECONDS,
    SHARE,
    WARY_TURN,
    Turns,
)
from tests.support.crowd import Crowd
from tests.support.harness import Relay, Service, Workers, fill_the_way, met, read_exactly, reset, wait_until
from tests.support.kernel_view import bytes_in_pipes

MIB = 1 << 20


class Clock:
    """Time that passes only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.away = 0.0
        """Seconds for which another program has had the processor."""

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now

    def thread_time(self) -> float:
        """As `time.thread_time`."""
        return self.now - self.away


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of `rest` and `turns`."""
    clock = Clock()
    monkeypatch.setattr(rest_module, "time", clock)
    monkeypatch.setattr(turns_module, "time", clock)
    return clock


class Speaker:
    """Somebody at rest whose two sides are the ends of one connection; each attention takes it some time."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.due = 0
        self.watched: tuple[int, int] | None = None
        self.first, self.second = socket.socketpair()
        self.attended = 0
        self.looked = 0
        self.settled = 0
        self.is_broken = False
        self._clock = clock
        self._seconds = seconds

    @property
    def fds(self) -> tuple[int, int]:
        """Of its sides."""
        return self.first.fileno(), self.second.fileno()

    @property
    def events(self) -> tuple[int, int]:
        """Both wait for input."""
        return 1, 1

    def attend(self, fd: int, events: int) -> None:
        """Takes its time and reads."""
        self.attended += 1
        self._clock.now += self._seconds
        if self.is_broken:
            raise LookupError
        (self.first if fd == self.first.fileno() else self.second).recv(100)

    def settle(self) -> None:
        """Takes no time."""
        self.settled += 1

    def look_around(self, now: float) -> None:
        """Takes its time."""
        self.looked += 1
        self._clock.now += self._seconds

    def give_up(self) -> None:
        """Goes on all the same, and into the same fault again."""

    def close(self) -> None:
        """Both sides."""
        self.first.close()
        self.second.close()


@pytest.fixture
def speakers(clock: Clock) -> Iterator[Callable[[int, float], list[Speaker]]]:
    """Make speakers that are at rest in `Rest`, which is the attribute of the first."""
    made: list[Speaker] = []

    def make(count: int, seconds: float) -> list[Speaker]:
        made.extend(Speaker(clock, seconds) for _ in range(count))
        return made[-count:]

    yield make
    for speaker in made:
        speaker.close()


Speakers = Callable[[int, float], list[Speaker]]


def test_a_call_serves_for_a_moment_and_everybody_in_their_turn(clock: Clock, speakers: Speakers) -> None:
    rest = Rest(Turns())
    crowd = speakers(200, SLICE_SECONDS / 40)
    for speaker in crowd:
        rest.watch(speaker)
        speaker.second.send(b"x")
    calls = 0
    while any(not speaker.attended for speaker in crowd):
        before = clock.now
        rest.serve()
        calls += 1
        assert clock.now - before <= SLICE_SECONDS + BATCH * SLICE_SECONDS / 40, "it stops after its slice"
        assert calls <= 10, "who is left comes first the next time"
    assert calls > 1
    assert [speaker.attended for speaker in crowd] == [1] * 200, "nobody is served twice before another one is"
    for speaker in crowd:
        rest.forget(speaker)
    assert len(rest) == 0
    rest.close()


def test_who_keeps_talking_does_not_keep_others_from_their_turn(clock: Clock, speakers: Speakers) -> None:
    rest = Rest(Turns())
    crowd = speakers(100, SLICE_SECONDS / 20)
    for speaker in crowd:
        rest.watch(speaker)
        speaker.second.send(bytes(100_000))
    for _ in range(60):
        rest.serve()
    counts = [speaker.attended for speaker in crowd]
    assert min(counts) > 0
    assert max(counts) <= min(counts) + 2, "a round robin"
    for speaker in crowd:
        rest.forget(speaker)
    rest.close()


def test_deadlines_that_come_together_are_met_in_slices(clock: Clock, speakers: Speakers) -> None:
    rest = Rest(Turns())
    crowd = speakers(300, SLICE_SECONDS / 30)
    for speaker in crowd:
        rest.watch(speaker)
        rest.look_at(speaker, clock.now + 5)
    rest.every_second(clock.now + 4)
    gevent.sleep(0)
    assert not any(speaker.looked for speaker in crowd)
    rest.every_second(clock.now + 6)
    slices = 0
    while not all(speaker.looked for speaker in crowd):
        before = sum(speaker.looked for speaker in crowd)
        rest._look_around()  # as the loop calls it in one iteration
        slices += 1
        assert 0 < sum(speaker.looked for speaker in crowd) - before <= 40
    assert slices > 5
    assert [speaker.looked for speaker in crowd] == [1] * 300
    for speaker in crowd:
        rest.forget(speaker)
    rest.close()


class Hauler:
    """A pump that always has more; each turn takes so many seconds."""

    def __init__(self, clock: Clock, seconds: float, *, is_dear: bool = False) -> None:
        self.waits = TURN
        self.is_dear = is_dear
        self.sizes: list[int] = []
        self.busy = 0.0
        self._clock = clock
        self._seconds = seconds

    def turn(self, most: int) -> None:
        """As `Pump.turn`."""
        self.sizes.append(most)
        self.busy += self._seconds
        self._clock.now += self._seconds


def test_those_that_move_much_have_their_share_of_the_time_however_many_speak(clock: Clock) -> None:
    turns = Turns()
    haulers = [Hauler(clock, 0.0002) for _ in range(4)]
    queued = [gevent.spawn(_keep_moving, turns, hauler) for hauler in haulers]
    gevent.sleep(0)
    others = 0.0
    began = clock.now
    for _ in range(100):
        clock.now += 0.005  # what an iteration of the loop takes for thousands who have a little to say
        others += 0.005
        turns._next()
        gevent.sleep(0)
    busy = sum(hauler.busy for hauler in haulers)
    assert 0.5 * SHARE * others < busy < 1.1 * SHARE * others
    assert clock.now - began == pytest.approx(busy + others, rel=0.01)
    assert max(hauler.busy for hauler in haulers) < 1.2 * min(hauler.busy for hauler in haulers)
    gevent.killall(queued)


def _keep_moving(turns: Turns, hauler: Hauler) -> None:
    while True:
        turns.wait(hauler)


def test_those_whose_turns_are_dear_share_what_they_have_among_them_and_leave_the_others_theirs(clock: Clock) -> None:
    turns = Turns()
    haulers = [Hauler(clock, 0.0002) for _ in range(4)]
    crowd = [Hauler(clock, 0.0006, is_dear=True) for _ in range(100)]
    queued = [gevent.spawn(_keep_moving, turns, hauler) for hauler in [*crowd, *haulers]]
    gevent.sleep(0)
    began = clock.now
    for _ in range(400):
        clock.now += 0.0005
        before = clock.now
        turns._next()
        assert clock.now - before < 0.01, "and the loop comes round"
        gevent.sleep(0)
    busy = sum(hauler.busy for hauler in haulers)
    others = clock.now - began - busy
    assert 0.7 * SHARE * others < busy < 1.1 * SHARE * others
    shares = [hauler.busy for hauler in crowd]
    assert 0 < max(shares) < 2 * min(shares)
    gevent.killall(queued)


def test_beside_nobody_else_those_whose_turns_are_dear_have_all_the_time(clock: Clock) -> None:
    turns = Turns()
    crowd = [Hauler(clock, 0.0006, is_dear=True) for _ in range(3)]
    queued = [gevent.spawn(_keep_moving, turns, hauler) for hauler in crowd]
    gevent.sleep(0)
    began = clock.now
    for _ in range(30):
        turns._next()
        gevent.sleep(0)
    assert sum(hauler.busy for hauler in crowd) == pytest.approx(clock.now - began)
    assert min(hauler.busy for hauler in crowd) > 0
    gevent.killall(queued)


def test_alone_a_turn_follows_another_and_the_sockets_are_looked_at_in_between(clock: Clock) -> None:
    turns = Turns()
    hauler = Hauler(clock, 0.0002)
    queued = gevent.spawn(_keep_moving, turns, hauler)
    gevent.sleep(0)
    for _ in range(10):
        before = clock.now
        turns._next()
        gevent.sleep(0)
        assert 0 < clock.now - before < LEAST_SECONDS + 0.0002
    gevent.kill(queued)


def test_between_two_turns_those_who_have_a_little_to_say_are_served(clock: Clock, speakers: Speakers) -> None:
    turns = Turns()
    rest = Rest(turns)
    (speaker,) = speakers(1, 0.00001)
    rest.watch(speaker)
    hauler = Hauler(clock, 0.0001)
    queued = gevent.spawn(_keep_moving, turns, hauler)
    gevent.sleep(0)
    attended_before_a_turn: list[int] = []
    turn = hauler.turn

    def note_and_turn(most: int) -> None:
        attended_before_a_turn.append(speaker.attended)
        turn(most)
        speaker.second.send(b"x")  # while the others move

    hauler.turn = note_and_turn  # type: ignore[method-assign]
    turns._next()
    assert attended_before_a_turn == list(range(len(attended_before_a_turn)))
    assert len(attended_before_a_turn) > 3, "all that within one iteration of the loop"
    assert set(hauler.sizes[1:]) == {CONSIDERATE_TURN}
    gevent.kill(queued)
    rest.forget(speaker)
    rest.close()


def test_however_many_speak_between_two_turns_those_that_move_much_have_their_share(
    clock: Clock, speakers: Speakers
) -> None:
    turns = Turns()
    rest = Rest(turns)
    crowd = speakers(100, 0.0001)
    for speaker in crowd:
        rest.watch(speaker)
        speaker.second.send(bytes(100_000))
    haulers = [Hauler(clock, 0.0001) for _ in range(8)]
    queued = [gevent.spawn(_keep_moving, turns, hauler) for hauler in haulers]
    gevent.sleep(0)
    began = clock.now
    for _ in range(100):
        clock.now += 0.002
        before = clock.now
        turns._next()
        assert clock.now - before < 0.02, "and the loop comes round"
        gevent.sleep(0)
    busy = sum(hauler.busy for hauler in haulers)
    others = clock.now - began - busy
    assert others > 0.25, "they were served in between, too"
    assert 0.7 * SHARE * others < busy < 1.1 * SHARE * others
    gevent.killall(queued)
    for speaker in crowd:
        rest.forget(speaker)
    rest.close()


def test_a_few_messages_that_come_at_once_are_passed_before_the_next_turn_and_no_more_than_that(
    clock: Clock, speakers: Speakers
) -> None:
    turns = Turns()
    rest = Rest(turns)
    crowd = speakers(10, BURST_SECONDS / 20)
    heard_before_a_turn: list[int] = []

    class Attentive(Hauler):
        def turn(self, most: int) -> None:
            heard_before_a_turn.append(sum(speaker.attended for speaker in crowd))
            super().turn(most)

    queued = [gevent.spawn(_keep_moving, turns, Attentive(clock, 0.0001)) for _ in range(40)]
    gevent.sleep(0)
    for _ in range(10):  # nobody says anything for a while
        turns._next()
        gevent.sleep(0)
    for speaker in crowd:
        rest.watch(speaker)
        speaker.second.send(b"x")
    before = len(heard_before_a_turn)
    turns._next()
    assert heard_before_a_turn[before] == len(crowd), "half of what they may"
    for speaker in crowd:
        speaker.second.send(bytes(100_000))
    clock.now += 0.02  # so there are turns enough in this iteration
    before = len(heard_before_a_turn)
    turns._next()
    heard = [then - before for before, then in pairwise(heard_before_a_turn[before:])]
    assert len(heard) > 50
    assert max(heard) == A_FEW, "they have had theirs: by turns now"
    gevent.killall(queued)
    for speaker in crowd:
        rest.forget(speaker)
    rest.close()


def test_time_in_which_another_program_has_the_processor_is_nobody_s(clock: Clock, speakers: Speakers) -> None:
    turns = Turns()
    rest = Rest(turns)
    (speaker,) = speakers(1, 0.00001)
    rest.watch(speaker)
    haulers = [Hauler(clock, 0.0001) for _ in range(40)]
    queued = [gevent.spawn(_keep_moving, turns, hauler) for hauler in haulers]
    gevent.sleep(0)
    attend = speaker.attend

    def lose_the_processor() -> None:
        clock.now += 0.05
        clock.away += 0.05

    def attend_and_lose_it(fd: int, events: int) -> None:
        attend(fd, events)
        lose_the_processor()

    speaker.attend = attend_and_lose_it  # type: ignore[method-assign]
    speaker.second.send(b"x")
    lose_the_processor()
    before = sum(len(hauler.sizes) for hauler in haulers)
    turns._next()
    assert speaker.attended == 1
    had = sum(len(hauler.sizes) for hauler in haulers) - before
    assert 0 < had < 2 * LEAST_SECONDS / 0.0001, "the queue is not owed that"
    gevent.killall(queued)
    rest.forget(speaker)
    rest.close()


def test_a_fault_of_one_that_is_served_between_turns_is_nobody_else_s(
    clock: Clock, speakers: Speakers, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[type[BaseException]] = []
    hub = gevent.get_hub()
    monkeypatch.setattr(hub, "handle_error", lambda context, kind, value, trace: faults.append(kind))
    turns = Turns()
    rest = Rest(turns)
    (speaker,) = speakers(1, 0.00001)
    speaker.is_broken = True
    rest.watch(speaker)
    hauler = Hauler(clock, 0.0002)
    queued = gevent.spawn(_keep_moving, turns, hauler)
    gevent.sleep(0)
    speaker.second.send(b"x")
    turns._next()
    assert len(hauler.sizes) > 1
    assert faults
    assert set(faults) == {LookupError}
    gevent.kill(queued)
    rest.forget(speaker)
    rest.close()


def test_who_is_to_settle_does_so_once_what_came_together_is_served_unless_it_has_left(
    clock: Clock, speakers: Speakers
) -> None:
    rest = Rest(Turns())
    stays, leaves = speakers(2, 0.00001)

    def attend(fd: int, events: int) -> None:
        Speaker.attend(leaves, fd, events)
        rest.settle_soon(leaves)
        if leaves.attended == 2:
            assert not leaves.settled
            rest.forget(leaves)

    def attend_and_stay(fd: int, events: int) -> None:
        Speaker.attend(stays, fd, events)
        rest.settle_soon(stays)

    leaves.attend = attend  # type: ignore[method-assign]
    stays.attend = attend_and_stay  # type: ignore[method-assign]
    for speaker in (leaves, stays):
        rest.watch(speaker)
    leaves.second.send(b"x")
    leaves.first.send(b"x")
    stays.second.send(b"x")
    rest.serve()
    assert (leaves.attended, leaves.settled) == (2, 0)
    assert (stays.attended, stays.settled) == (1, 1)
    rest.forget(stays)
    rest.close()


def test_a_pump_whose_turn_goes_wrong_tells_who_waits_for_it_even_when_that_is_being_ended(clock: Clock) -> None:
    turns = Turns()

    class Broken(Hauler):
        def turn(self, most: int) -> None:
            raise ConnectionResetError

    ended: list[BaseException] = []

    def wait() -> None:
        try:
            turns.wait(Broken(clock, 0))
        except BaseException as error:
            ended.append(error)

    for is_killed in (False, True):
        greenlet = gevent.spawn(wait)
        gevent.sleep(0)
        if is_killed:
            greenlet.kill(block=False)
        turns._next()
        gevent.sleep(0.01)
        assert [type(error) for error in ended] == [ConnectionResetError]
        ended.clear()


def test_when_much_rests_for_those_who_do_not_read_a_turn_takes_little() -> None:
    turns = Turns()
    turns.moved_little()
    assert turns.size() == CONSIDERATE_TURN
    turns.held = HELD_BYTES + 1
    assert turns.size() == WARY_TURN


# The same seen from outside


def switches(pids: list[int]) -> int:
    """How often these processes have woken up to do something, so far."""
    statuses = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return sum(
        int(line.split()[1]) for text in statuses for line in text.splitlines() if line.startswith("voluntary_ctxt")
    )


def switches_a_second(pids: list[int]) -> float:
    """The same for each second, of three."""
    began, before = time.monotonic(), switches(pids)
    time.sleep(3)
    return (switches(pids) - before) / (time.monotonic() - began)


def test_pairs_that_stand_still_have_no_pipe_and_wake_nobody(any_relay: Service) -> None:
    before = switches_a_second(any_relay.pids)  # the ticks of every worker
    with contextlib.ExitStack() as stack:
        pairs = [met(any_relay.port, stack=stack) for _ in range(30)]
        for number, (first, second) in enumerate(pairs):
            if number % 3 == 2:
                second.shutdown(socket.SHUT_WR)  # half-closed, and stalled in the other direction
            first.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            fill_the_way(first)
        wait_until(lambda: not any(bytes_in_pipes(pid) for pid in any_relay.pids), what="who stalls gives its pipe up")
        time.sleep(1.5)  # the records of a second ago, and whatever else was under way
        assert switches_a_second(any_relay.pids) < before + 10, "a pair that stands still adds nothing"


def test_what_rests_for_those_who_do_not_read_moves_house_whole(tmp_path: Path) -> None:
    with Workers(tmp_path, count=1) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(1e9) for _ in range(12)]
        crowd.begin(transfers)
        for transfer in transfers:
            transfer.right.stop_reading()
        crowd.run_for(1.5)  # all stand still, with up to a megabyte each in the relay
        for number in range(3):
            crowd.run_beside(workers.start_one)
            crowd.run_beside(partial(workers.stop_one, number))
        assert "transfers 12" in workers.workers[0].log_text()
        for transfer in transfers:
            transfer.left.rate = 0
            transfer.right.read_again()
        crowd.run_for(0.5)
        crowd.end(transfers)
        for transfer in transfers:
            transfer.assert_intact()
        assert len(workers.wait_for_rows("usage", 12)) == 12


@pytest.mark.parametrize("size", [1, 1000, 40_000])
def test_pairs_that_trickle_arrive_whole_and_hold_nothing(any_relay: Service, size: int) -> None:
    with contextlib.ExitStack() as stack:
        pairs = [met(any_relay.port, stack=stack) for _ in range(40)]
        for round_number in range(5):
            message = bytes([round_number]) * size
            for first, second in pairs:
                first.sendall(message)
                second.sendall(message[: size // 2])
            for first, second in pairs:
                assert read_exactly(second, size) == message
                assert read_exactly(first, size // 2) == message[: size // 2]
        assert not any(bytes_in_pipes(pid) for pid in any_relay.pids)
        for first, second in pairs:
            first.close()
            assert second.recv(10) == b""
    records = any_relay.wait_for_records(40)
    assert {record["total_bytes"] for record in records} == {5 * (size + size // 2)}


def test_a_worker_has_no_more_descriptors_than_connections_while_its_pairs_stand_still(relay: Relay) -> None:
    with contextlib.ExitStack() as stack:
        before = len(os.listdir(f"/proc/{relay.pid}/fd"))
        for _ in range(20):
            first, _ = met(relay.port, stack=stack)
            fill_the_way(first)
        wait_until(lambda: not bytes_in_pipes(relay.pid), what="who stalls gives its pipe up")
        spare_pipes = 2 * 16
        assert len(os.listdir(f"/proc/{relay.pid}/fd")) <= before + 40 + spare_pipes


@pytest.mark.parametrize("limit", ["--pair-rate", "--relay-rate", "--max-pair-bytes"])
def test_a_reset_is_noticed_while_its_partner_does_not_read_with_limits_too(tmp_path: Path, limit: str) -> None:
    with Relay(tmp_path, limit, "100000000000", recording=True) as relay, contextlib.ExitStack() as stack:
        for _ in range(5):
            first, _ = met(relay.port, stack=stack)
            fill_the_way(first)
            time.sleep(0.3)  # so that it rests
            reset(first)
        assert len(relay.wait_for_records(5, 15)) == 5

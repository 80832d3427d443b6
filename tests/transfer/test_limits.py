"""Where the operator has set limits, a pair that none holds back is as any other, and what it moves is charged exactly.

--pair-rate, --relay-rate and --max-pair-bytes from outside are in `tests.hostile.test_bounds`, the arithmetic of a pace
in `test_pace`.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest

from relay.clients.bounds import Bound
from relay.clients.frames import FrameReader
from relay.transfer import limits as limits_module
from relay.transfer.limits import Allowance, Limits, SharedPace
from relay.transfer.pace import LITTLE_BYTES, PARTS, ROUND, SLACK
from relay.transfer.pump import COPY_BYTES
from relay.transfer.rest import Rest
from relay.transfer.turns import LARGEST_TURN, Moving, Turns
from tests.support.bare_pair import new_pair
from tests.support.client_frames import BINARY, CLOSE, PING, PONG, Sent
from tests.support.harness import Relay, met, reset

LARGE = 10**12


class Queue(Turns):
    """Short turns, which remember who has queued."""

    def __init__(self) -> None:
        super().__init__()
        self.queued: list[Moving | None] = []

    def size(self) -> int:
        """As `Turns.size`."""
        return 16 << 10

    def wait(self, pump: Moving | None = None) -> None:
        """As `Turns.wait`."""
        self.queued.append(pump)
        super().wait(pump)


class Transfer:
    """Two clients and their pair, whose first side may speak WebSocket."""

    def __init__(self, limits: Limits, *, framed: bool, stack: contextlib.ExitStack) -> None:
        self.turns = Queue()
        rest = Rest(self.turns)
        self.framed = framed
        self.left, first = socket.socketpair()
        self.right, second = socket.socketpair()
        for sock in (self.left, self.right, first, second):
            stack.enter_context(sock)
            sock.setblocking(False)
        self.pair = new_pair(
            first, second, self.turns, rest, readers=(FrameReader() if framed else None, None), limits=limits
        )
        stack.callback(rest.close)
        stack.callback(self.pair.close)
        stack.callback(self.pair.detach)
        self.pair.start()

    def say(self, size: int) -> None:
        """So many bytes from the left, in one piece."""
        self.left.send(Sent(BINARY, bytes(size)).wire if self.framed else bytes(size))

    def heard(self, size: float, patience: float = 10.0) -> int:
        """How many bytes come to the right: so many, or all until the end, or the patience is over."""
        got = 0
        until = time.monotonic() + patience
        while got < size and time.monotonic() < until:
            gevent.sleep(0.001)
            with contextlib.suppress(BlockingIOError):
                chunk = self.right.recv(1 << 20)
                got += len(chunk)
                if not chunk:
                    break
        return got


@pytest.fixture(params=[False, True], ids=["plain", "framed"])
def transfer(request: pytest.FixtureRequest) -> Iterator[Callable[[Limits], Transfer]]:
    """Makes one, with each kind of pump."""
    with contextlib.ExitStack() as stack:
        yield lambda limits: Transfer(limits, framed=request.param, stack=stack)


def limits_of(kind: str) -> Limits:
    """A limit of that kind that holds nobody back."""
    if kind == "relay":
        return Limits(relay_pace=SharedPace(LARGE))
    return Limits(pair_bytes=LARGE) if kind == "bytes" else Limits(pair_rate=LARGE)


KINDS = pytest.mark.parametrize("kind", ["bytes", "pair", "relay"])


@KINDS
def test_a_pair_that_is_not_held_back_passes_small_messages_at_rest(
    transfer: Callable[[Limits], Transfer], kind: str
) -> None:
    talk = transfer(limits_of(kind))
    for _ in range(20):
        talk.say(100)
        assert talk.heard(100) == 100
        assert talk.pair.greenlet is None
        talk.right.send(b"answer")
        wait_for_answer(talk)
        assert talk.pair.greenlet is None
    assert not talk.turns.queued


def wait_for_answer(talk: Transfer) -> None:
    """Of `Transfer.right`, at the left."""
    until = time.monotonic() + 10
    while not select.select([talk.left], [], [], 0)[0]:
        assert time.monotonic() < until
        gevent.sleep(0.001)
    assert talk.left.recv(100).endswith(b"answer")


@KINDS
def test_who_has_much_queues_with_its_pump(transfer: Callable[[Limits], Transfer], kind: str) -> None:
    bulk = transfer(limits_of(kind))
    for _ in range(20):
        with contextlib.suppress(BlockingIOError):
            while True:
                bulk.say(COPY_BYTES)
        gevent.sleep(0)
        bulk.heard(1)
        if bulk.turns.queued:
            break
    assert bulk.turns.queued
    assert None not in bulk.turns.queued


def test_a_sip_never_takes_more_than_is_left_of_what_a_pair_may_move(transfer: Callable[[Limits], Transfer]) -> None:
    talk = transfer(Limits(pair_bytes=1000))
    for _ in range(9):
        talk.say(100)
        assert talk.heard(100) == 100
    assert talk.pair.greenlet is None
    talk.say(101)
    assert talk.heard(math.inf) == 100
    assert talk.pair.is_closed
    assert talk.pair.cut_by is Bound.PAIR_BYTES
    assert talk.pair.moved == 1000


def test_neither_does_what_is_let_through_after_a_reset(transfer: Callable[[Limits], Transfer]) -> None:
    talk = transfer(Limits(pair_bytes=1000))
    talk.say(1100)
    talk.pair._deliver_what_fits()
    assert talk.pair.moved <= 1000


def test_who_is_reset_goes_before_nobody_who_waits_for_a_rate(transfer: Callable[[Limits], Transfer]) -> None:
    """What forty pairs had in the relay's buffers went before all others, once, and these stood still meanwhile."""
    shared = SharedPace(100_000)
    shared.pace.reserve(1_000_000, time.monotonic())
    reset = [transfer(Limits(relay_pace=shared)) for _ in range(40)]
    for bulk in reset:
        bulk.say(60_000)
    until = time.monotonic() + 10
    while len(shared.line) < len(reset) and time.monotonic() < until:
        gevent.sleep(0.001)
    assert len(shared.line) == len(reset)
    moved, free_at = sum(bulk.pair.moved for bulk in reset), time.monotonic() + shared.pace.free_in(time.monotonic())
    for bulk in reset:
        bulk.pair.detach()
        bulk.pair._deliver_what_fits()
    took = time.monotonic() + shared.pace.free_in(time.monotonic()) - free_at
    assert sum(bulk.pair.moved for bulk in reset) - moved <= 40 * LITTLE_BYTES
    assert took < 1, "they have taken more seconds of the rate than anybody may"
    shared.close()


def test_what_is_let_through_after_a_reset_keeps_to_the_rate_of_the_pair(
    transfer: Callable[[Limits], Transfer],
) -> None:
    talk = transfer(Limits(pair_rate=10_000))
    talk.say(60_000)
    assert talk.heard(1) > 0
    gevent.sleep(0)
    before = talk.pair.moved
    talk.pair._deliver_what_fits()
    assert talk.pair.moved - before <= 10_000 * ROUND


def test_the_last_word_before_a_reset_arrives_though_others_wait_for_the_rate(
    transfer: Callable[[Limits], Transfer],
) -> None:
    shared = SharedPace(100_000)
    shared.pace.reserve(1_000_000, time.monotonic())
    talk = transfer(Limits(relay_pace=shared))
    talk.say(100)
    talk.pair._deliver_what_fits()
    assert talk.heard(100) == 100
    shared.close()


@pytest.mark.parametrize("pace", ["own", "shared"])
def test_what_is_sipped_is_charged_and_nothing_else(
    transfer: Callable[[Limits], Transfer], pace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Still:
        """A clock that stands."""

        monotonic = staticmethod(lambda: 1000.0)

    monkeypatch.setattr(limits_module, "time", Still)
    shared = SharedPace(1e6)
    talk = transfer(Limits(relay_pace=shared) if pace == "shared" else Limits(pair_rate=1_000_000))
    charged = shared.pace
    if pace == "own":
        assert talk.pair._allowance is not None
        own = talk.pair._allowance._own
        assert own is not None
        charged = own
    for _ in range(3):
        talk.say(500)
        assert talk.heard(500) == 500
    talk.say(20_000)
    assert talk.heard(20_000) == 20_000
    headers = 4 * 8 if talk.framed else 0
    assert charged.free_in(1000.0) == pytest.approx((21_500 + headers) / 1e6 - SLACK)
    assert talk.pair.greenlet is None
    shared.close()


def speak_to_nobody(talk: Transfer) -> None:
    """The left says something, ends its stream and goes; what the right says, which reads nothing, is for nobody."""
    talk.say(1000)
    if talk.framed:
        talk.left.send(Sent(CLOSE).wire)
    talk.left.close()
    talk.right.send(b"and you?")
    until = time.monotonic() + 10
    while not any(pump.discards for pump in talk.pair.pumps):
        assert time.monotonic() < until
        gevent.sleep(0.001)
    assert not talk.pair.is_closed


def send_on(sock: socket.socket, words: bytes, enough: Callable[[], bool]) -> None:
    """Send `words` again and again, whenever there is room, until that is enough."""
    until = time.monotonic() + 10
    while not enough():
        assert time.monotonic() < until
        with contextlib.suppress(OSError):
            sock.send(words)
        gevent.sleep(0)


def test_what_is_thrown_away_is_of_what_a_pair_may_move(transfer: Callable[[Limits], Transfer]) -> None:
    talk = transfer(Limits(pair_bytes=500_000))
    speak_to_nobody(talk)
    send_on(talk.right, bytes(10_000), lambda: talk.pair.is_closed)
    assert talk.pair.cut_by is Bound.PAIR_BYTES
    assert talk.pair.moved == 1000


@pytest.mark.parametrize("pace", ["own", "shared"])
def test_what_is_thrown_away_is_charged(transfer: Callable[[Limits], Transfer], pace: str) -> None:
    shared = SharedPace(5000)
    talk = transfer(Limits(relay_pace=shared) if pace == "shared" else Limits(pair_rate=5000))
    speak_to_nobody(talk)
    allowance = talk.pair._allowance
    assert allowance is not None
    began, before = time.monotonic(), allowance.wasted
    send_on(talk.right, bytes(10_000), lambda: allowance.wasted - before >= 5000)
    assert allowance.wasted - before <= 5000 * (time.monotonic() - began + 1)
    assert talk.pair.moved == 1000
    shared.close()


def test_what_was_read_when_its_receiver_had_just_gone_is_charged(transfer: Callable[[Limits], Transfer]) -> None:
    talk = transfer(Limits(pair_bytes=LARGE))
    allowance = talk.pair._allowance
    assert allowance is not None
    talk.pair.second.shutdown(socket.SHUT_WR)  # so writing to it is refused as it is then
    talk.say(1000)
    until = time.monotonic() + 10
    while not talk.pair.pumps[0].discards:
        assert time.monotonic() < until
        gevent.sleep(0.001)
    assert (allowance.wasted, talk.pair.moved) == (1000, 0)


@pytest.mark.parametrize("nothing", [Sent(PING).wire, Sent(PONG, b"x" * 125).wire, Sent(BINARY).wire])
def test_frames_without_payload_are_charged_as_well(nothing: bytes) -> None:
    with contextlib.ExitStack() as stack:
        talk = Transfer(Limits(pair_bytes=10_000, pair_rate=LARGE), framed=True, stack=stack)
        talk.say(100)
        assert talk.heard(100) == 100
        send_on(talk.left, nothing * 10, lambda: talk.pair.is_closed)
        assert talk.pair.cut_by is Bound.PAIR_BYTES
        assert talk.pair._allowance is not None
        assert talk.pair._allowance.framing >= 10_000


@pytest.mark.parametrize(("frame", "payload"), [(Sent(PING).wire, 0), (Sent(BINARY, b"x").wire, 1)])
def test_who_sends_tiny_frames_stands_in_the_line_once_for_what_it_may_read_then(frame: bytes, payload: int) -> None:
    """And not for every few frames that a turn is for: hundreds that did so left nothing of the rate to others."""
    with contextlib.ExitStack() as stack:
        shared = SharedPace(2_000_000)
        stack.callback(shared.close)
        talk = Transfer(Limits(relay_pace=shared), framed=True, stack=stack)
        shared.pace.reserve(200_000, time.monotonic())
        times = 0

        stand_in_line = shared.wait

        def wait(allowance: Allowance, has: Callable[[], int]) -> int:
            nonlocal times
            times += 1
            return stand_in_line(allowance, has)

        shared.wait = wait  # type: ignore[method-assign]
        talk.left.send(frame * 4000)  # which is less than a portion
        talk.left.shutdown(socket.SHUT_WR)
        assert talk.heard(math.inf) == payload * 4000
        assert len(talk.turns.queued) > times
        assert times <= 3


@pytest.mark.parametrize("size", [20, 200])
def test_who_sends_small_frames_has_as_much_of_the_rate_as_others(size: int) -> None:
    with contextlib.ExitStack() as stack:
        shared = SharedPace(400_000)
        stack.callback(shared.close)
        plain, framed = (Transfer(Limits(relay_pace=shared), framed=each, stack=stack) for each in (False, True))
        frame = Sent(BINARY, bytes(size)).wire
        said = bytearray(frame * 1000)

        def both_moved(_: int) -> bool:
            with contextlib.suppress(BlockingIOError):
                sent = framed.left.send(said)
                said.extend(said[:sent])
                del said[:sent]
            framed.heard(math.inf, 0.001)
            return plain.pair.moved + framed.pair.moved > 400_000

        flow(plain.left, plain.right, both_moved)
        assert framed.pair.moved * len(frame) / size > 0.6 * plain.pair.moved


def test_what_carries_payload_takes_nothing_from_it() -> None:
    with contextlib.ExitStack() as stack:
        talk = Transfer(Limits(pair_bytes=10_000), framed=True, stack=stack)
        for _ in range(100):
            talk.say(100)
            talk.left.send(Sent(PONG).wire)
            assert talk.heard(100) == 100
        talk.left.send(Sent(PING).wire)
        assert talk.heard(1, patience=0.2) == 0
        assert not talk.pair.is_closed
        assert talk.pair.moved == 10_000


def test_a_little_goes_before_those_who_stand_in_the_line_and_is_charged(
    transfer: Callable[[Limits], Transfer], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Still:
        """A clock that stands."""

        monotonic = staticmethod(lambda: 1000.0)

    monkeypatch.setattr(limits_module, "time", Still)
    shared = SharedPace(1e6)
    talk = transfer(Limits(relay_pace=shared))
    shared.pace.reserve(20_000, 1000.0)
    size = 492 if talk.framed else 500  # with a header, if it has one
    for _ in range(2):
        talk.say(size)
        assert talk.heard(size) == size
    assert talk.pair.greenlet is None
    assert shared.pace.free_in(1000.0) == pytest.approx(0.021 - SLACK)
    talk.say(size)
    assert talk.heard(size) == size
    assert talk.pair.greenlet is None
    talk.say(size)  # half of the rate is what those may have together who go first
    assert talk.heard(size, patience=0.2) == 0
    assert len(shared.line) == 1
    shared.close()


def test_who_is_held_back_lets_go_at_once_and_leaves_no_place_in_the_line(
    transfer: Callable[[Limits], Transfer],
) -> None:
    shared = SharedPace(10_000)
    bulk = transfer(Limits(relay_pace=shared))
    bulk.say(60_000)
    until = time.monotonic() + 10
    while not len(shared.line) and time.monotonic() < until:
        gevent.sleep(0.001)
    assert len(shared.line) == 1
    bulk.pair.detach()
    assert bulk.pair.greenlet is None
    assert not len(shared.line)
    bulk.pair.start()
    shared.set_rate(1e9)
    assert bulk.heard(60_000) == 60_000
    shared.close()


@pytest.mark.parametrize("limit", ["--pair-rate", "--relay-rate"])
def test_a_reset_is_noticed_though_a_rate_holds_back_what_came_before_it(tmp_path: Path, limit: str) -> None:
    with Relay(tmp_path, limit, "10000", recording=True) as relay:
        sender, receiver = met(relay.port)
        with receiver:
            sender.sendall(bytes(100_000))  # for ten seconds
            time.sleep(0.5)
            reset(sender)
            (record,) = relay.wait_for_records(1, 8)
            assert record["total_bytes"] < 80_000


def test_who_takes_all_that_a_small_portion_allows_is_not_taken_for_one_that_has_no_more(
    transfer: Callable[[Limits], Transfer],
) -> None:
    """It rested after each, and its bytes went before the line, as if they were a few that somebody waits for."""
    shared = SharedPace(100_000)
    bulk = transfer(Limits(relay_pace=shared))
    bulk.say(60_000)
    assert bulk.heard(30_000) >= 30_000
    before = len(bulk.turns.queued)
    assert bulk.heard(20_000) >= 20_000
    assert len(bulk.turns.queued) > before
    assert bulk.pair.greenlet is not None
    assert shared.little.free_in(time.monotonic()) == 0
    shared.close()


def test_a_slow_rate_of_a_pair_costs_it_few_turns(transfer: Callable[[Limits], Transfer]) -> None:
    """Turns of a twentieth of a second each, once, and so twenty a second, for five thousand bytes each."""
    rate = 100_000
    slow = transfer(Limits(pair_rate=rate))
    slow.turns.size = lambda: LARGEST_TURN  # type: ignore[method-assign]
    slow.say(150_000)
    assert slow.heard(150_000, patience=20) == 150_000
    assert len(slow.turns.queued) <= 150_000 / (rate * ROUND) + 4


@pytest.mark.parametrize("size", [5, 300_000], ids=["a-word", "much"])
@pytest.mark.parametrize("pace", ["own", "shared"])
def test_what_comes_back_passes_though_the_way_there_takes_all_that_a_rate_allows(
    transfer: Callable[[Limits], Transfer], pace: str, size: int
) -> None:
    """One direction always has more to move than it may; once, the other one moved nothing until that was over."""
    shared = SharedPace(1_000_000)
    talk = transfer(Limits(relay_pace=shared) if pace == "shared" else Limits(pair_rate=1_000_000))
    there = b""
    moved = 0

    def pour() -> None:
        nonlocal there, moved
        there = there or (Sent(BINARY, bytes(1 << 16)).wire if talk.framed else bytes(1 << 16))
        with contextlib.suppress(BlockingIOError):
            there = there[talk.left.send(there) :]
        with contextlib.suppress(BlockingIOError):
            moved += len(talk.right.recv(1 << 20))
        gevent.sleep(0.001)

    to_say, got, until = bytes(size), 0, time.monotonic() + 15
    while moved < 100_000 and time.monotonic() < until:
        pour()
    while got < size and time.monotonic() < until:
        with contextlib.suppress(BlockingIOError):
            to_say = to_say[talk.right.send(to_say) if to_say else 0 :]
        pour()
        with contextlib.suppress(BlockingIOError):
            got += len(talk.left.recv(1 << 20))
    assert got >= size
    before = moved
    while moved < before + 100_000 and time.monotonic() < until:
        pour()
    assert moved >= before + 100_000
    shared.close()


def flow(sender: socket.socket, receiver: socket.socket, until: Callable[[int], bool]) -> int:
    """Pour, and read, until that is so of the bytes that have come, or 15 seconds are over; returns how many have."""
    got = 0
    end = time.monotonic() + 15
    while not until(got) and time.monotonic() < end:
        _, writable, _ = select.select([], [sender], [], 0)
        with contextlib.suppress(BlockingIOError):
            if writable:
                sender.send(bytes(1 << 16))
        if select.select([receiver], [], [], 0.001)[0]:
            got += len(receiver.recv(1 << 20))
    return got


class Workers:
    """So many shared paces that are told each second what the others want, as workers tell each other."""

    def __init__(self, number: int, rate: float) -> None:
        self.rate = rate
        self.paces = [SharedPace(rate) for _ in range(number)]
        self.wanted = [0] * number

    def second(self, *wanted: dict[Allowance, float], waited: float = 0.0) -> list[float]:
        """In this one each of these wants to move so many bytes, at each worker, and has equally many at the most; who
        has them all has stood in the line for `waited` seconds, who has not, all the time. Returns the rate that each
        worker may move in the next."""
        for pace, by_whom in zip(self.paces, wanted, strict=True):
            left = pace.pace.rate
            for number, (allowance, wants) in enumerate(sorted(by_whom.items(), key=lambda item: item[1])):
                moves = min(wants, left / (len(by_whom) - number))
                left -= moves
                pace.note(allowance, moves)
                pace.note_wait(allowance, waited if moves == wants else 1.0)
        before = sum(self.wanted)
        news = []
        for pace, own_before in zip(self.paces, self.wanted, strict=True):
            others = before - own_before

            def share(parts: int, others: int = others) -> float:
                own = max(parts, PARTS)
                return own / (own + others)

            news.append(pace.every_second(self.rate, share))
        self.wanted = news
        return [pace.pace.rate for pace in self.paces]

    def close(self) -> None:
        """Let go of them."""
        for pace in self.paces:
            pace.close()


def of(shared: SharedPace, number: int) -> list[Allowance]:
    """The allowances of so many pairs."""
    return [Allowance(Limits(relay_pace=shared)) for _ in range(number)]


def test_who_says_a_byte_takes_a_byte_of_a_rate_that_workers_share() -> None:
    workers = Workers(3, 1e6)
    (much,) = of(workers.paces[0], 1)
    talkers = [dict.fromkeys(of(pace, 200), 1.0) for pace in workers.paces]
    for _ in range(5):
        rates = workers.second({much: math.inf, **talkers[0]}, talkers[1], talkers[2])
    assert rates[0] > 0.95e6
    workers.close()


def test_what_some_do_not_use_of_a_rate_that_workers_share_is_shared_by_who_wants_more() -> None:
    workers = Workers(2, 1e6)
    greedy = dict.fromkeys(of(workers.paces[0], 3), math.inf)
    content = dict.fromkeys(of(workers.paces[1], 10), 1e4)
    for _ in range(10):
        rates = workers.second(greedy, content)
    assert 0.8e6 < rates[0] < 0.95e6, "a hundred thousand are moved over there"
    workers.close()


def test_all_who_want_more_have_equal_parts_wherever_they_are() -> None:
    workers = Workers(2, 1e6)
    for _ in range(5):
        rates = workers.second(
            dict.fromkeys(of(workers.paces[0], 3), math.inf), dict.fromkeys(of(workers.paces[1], 1), math.inf)
        )
    assert rates == pytest.approx([0.75e6, 0.25e6])
    workers.close()


def test_many_who_begin_at_a_worker_that_had_little_of_the_rate_have_equal_parts_in_a_few_seconds() -> None:
    workers = Workers(2, 1e9)
    old, new = (dict.fromkeys(of(pace, 100), math.inf) for pace in workers.paces)
    for _ in range(5):
        workers.second(old, {})
    for _ in range(5):
        rates = workers.second(old, new)
    assert rates == pytest.approx([0.5e9, 0.5e9], rel=0.05)
    workers.close()


@pytest.mark.parametrize("waited", [0.05, 0.45, 0.9])
@pytest.mark.parametrize(("talkers", "size"), [(100, 5000), (300, 1050), (100, 50_000)])
def test_who_waits_behind_a_bulk_transfer_and_has_all_it_wants_takes_no_more_than_that_of_a_rate_that_workers_share(
    talkers: int, size: float, waited: float
) -> None:
    """Once, each that had waited for the last few of its bytes took a whole part from the other worker's transfers."""
    workers = Workers(2, 1e7)
    first = {of(workers.paces[0], 1)[0]: math.inf, **dict.fromkeys(of(workers.paces[0], talkers), size)}
    second = dict.fromkeys(of(workers.paces[1], 1), math.inf)
    for number in range(20):
        rates = workers.second(first, second, waited=waited)
        if number > 10:
            assert rates[1] == pytest.approx((1e7 - talkers * size) / 2, rel=0.1)
    workers.close()


def test_many_who_need_half_of_a_rate_that_workers_share_leave_the_other_half_most_of_the_time() -> None:
    """There nobody moves more than they; whenever the half is a little short, they are held back."""
    workers = Workers(2, 1e7)
    talkers = dict.fromkeys(of(workers.paces[0], 100), 5e4)
    bulk = dict.fromkeys(of(workers.paces[1], 1), math.inf)
    rates = [workers.second(talkers, bulk, waited=0.1)[1] for _ in range(50)][10:]
    assert min(rates) > 1.5e6
    assert sum(rates) / len(rates) > 3.5e6
    workers.close()


def test_who_stands_in_the_line_wants_what_it_has_though_nothing_of_it_has_moved_yet() -> None:
    shared = SharedPace(1000.0)
    shared.pace.reserve(10_000, time.monotonic())
    waiting = [gevent.spawn(shared.wait, allowance, lambda: 3000) for allowance in of(shared, 5)]
    waiting += [gevent.spawn(shared.wait, allowance, lambda: 100) for allowance in of(shared, 20)]
    gevent.sleep(0)
    assert shared.every_second(1000.0, lambda parts: 1.0) == (5 + 20 / 10) * PARTS
    gevent.killall(waiting)
    assert shared.every_second(1000.0, lambda parts: 1.0) == 0
    shared.close()


def test_of_a_wait_over_the_end_of_a_second_the_next_one_has_what_was_in_it() -> None:
    shared = SharedPace(1000.0)
    shared.pace.reserve(10_000, time.monotonic())
    (allowance,) = of(shared, 1)
    waiting = gevent.spawn(shared.wait, allowance, lambda: 100)
    gevent.sleep(0.05)
    before = time.monotonic()
    shared.every_second(1000.0, lambda parts: 1.0)
    after = time.monotonic()
    gevent.sleep(0.01)
    left = time.monotonic()
    waiting.kill()
    assert left - after <= shared._waited[allowance] <= time.monotonic() - before
    shared.close()


@pytest.mark.parametrize("framed", [False, True], ids=["plain", "framed"])
def test_to_have_waited_behind_a_bulk_transfer_for_a_few_bytes_is_no_want_of_more(framed: bool) -> None:
    with contextlib.ExitStack() as stack:
        shared = SharedPace(2_000_000)
        stack.callback(shared.close)
        bulk, *few = (Transfer(Limits(relay_pace=shared), framed=framed and n > 0, stack=stack) for n in range(21))
        to_wait = list(few)

        def all_have_waited(_: int) -> bool:
            if to_wait and len(shared.line):
                to_wait[-1].say(6000)
            gevent.sleep(0.001)
            if to_wait and to_wait[-1].pair.held_back > 0:
                to_wait.pop()
            return not to_wait

        flow(bulk.left, bulk.right, all_have_waited)
        assert not to_wait
        assert shared.every_second(2e6, lambda parts: 1.0) < 2 * PARTS


def test_a_byte_of_each_of_many_stops_nobody(tmp_path: Path) -> None:
    """They all say it in the same moment, and all that takes less than the bulk transfer may move in 5 seconds; once,
    each took a twentieth of a second from all."""
    with Relay(tmp_path, "--relay-rate", "4000000") as relay, contextlib.ExitStack() as stack:
        few = [met(relay.port, stack=stack) for _ in range(200)]
        sender, receiver = met(relay.port, stack=stack)
        for sock in (sender, receiver):
            sock.setblocking(False)
        flow(sender, receiver, lambda got: got > 8_000_000)
        for left, _ in few:
            left.send(b"x")
        silent = {right for _, right in few}
        poller = select.poll()
        by_fd = {right.fileno(): right for right in silent}
        for fd in by_fd:
            poller.register(fd, select.POLLIN)

        def all_have_heard(_: int) -> bool:
            for fd, _events in poller.poll(0):
                assert by_fd[fd].recv(10) == b"x"
                silent.discard(by_fd[fd])
            return not silent

        began = time.monotonic()
        moved = flow(sender, receiver, all_have_heard)
        assert not silent
        assert time.monotonic() - began < 5
        assert moved < 20_000_000
        assert flow(sender, receiver, lambda got: got > 2_000_000) > 2_000_000

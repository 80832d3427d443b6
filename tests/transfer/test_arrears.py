"""What a transfer that is over still owes counts for its source, and goes on arriving; but nobody keeps it for good."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.transfer import arrears as arrears_module
from relay.transfer.arrears import Arrears
from relay.transfer.lumps import IDLE_SECONDS, LITTLE_BYTES, MOST_SECONDS, paid_until
from relay.transfer.rest import Rest
from relay.transfer.turns import Turns
from tests.support.bare_pair import new_pair
from tests.support.client_frames import BINARY, CLOSE, Sent
from tests.support.harness import (
    Relay,
    connect,
    fill_the_way,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
    reset,
    shake_hands,
    shortened,
    wait_until,
)
from tests.support.hostile import ATTACKER, answer, beside, dial, narrow
from tests.support.kernel_view import relays_end, unacknowledged, unread
from tests.support.web import dial_raw, web_options, web_port

OWED_BYTES = 200_000
MOST = 4


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Closes the clients."""
    with contextlib.ExitStack() as stack:
        yield stack


def ended(
    port: int,
    stack: contextlib.ExitStack,
    how: str = "both",
    source: str = ATTACKER,
    before: Callable[[socket.socket], None] = lambda receiver: None,
) -> socket.socket:
    """A receiver that has read nothing of a transfer that is over: since both sides have ended their streams, or since
    its partner was reset, which has read nothing either of what that has said `before`."""
    receiver = stack.enter_context(narrow(port, source))
    with connect(port) as sender:
        shake_hands(sender, receiver)
        sender.sendall(bytes(OWED_BYTES))
        wait_until(lambda: unacknowledged(sender) == 0, what="all of it is the relay's")
        before(receiver)
        time.sleep(0.2)  # and on its way
        if how == "both":
            sender.shutdown(socket.SHUT_WR)
            receiver.shutdown(socket.SHUT_WR)
            assert sender.recv(1) == b""
        else:
            reset(sender)
    return receiver


@pytest.mark.parametrize("how", ["both", "reset"])
def test_it_is_on_record_at_once_and_counts_for_its_source_until_it_has_arrived(
    tmp_path: Path, stack: contextlib.ExitStack, how: str
) -> None:
    with Relay(tmp_path, "--max-per-source", str(MOST), recording=True) as relay:
        receivers = [ended(relay.port, stack, how) for _ in range(MOST)]
        assert len(relay.wait_for_records(MOST)) == MOST
        with narrow(relay.port) as refused:
            assert not refused.recv(1), "it has all that its source may have"
        taken = [len(all_of(receiver)) for receiver in receivers]
        assert all(size >= OWED_BYTES for size in taken) if how == "both" else all(taken)
        wait_until(lambda: is_let_in(relay.port), 15, "its places are free again")


def all_of(sock: socket.socket) -> bytes:
    """What comes until the end of the stream."""
    chunks = []
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(1 << 16):
            chunks.append(chunk)
    return b"".join(chunks)


def is_let_in(port: int) -> bool:
    """Whether a newcomer of that source is, and may wait."""
    with contextlib.ExitStack() as stack:
        newcomer = stack.enter_context(narrow(port))
        newcomer.sendall(handshake(new_token(), new_side()))
        newcomer.settimeout(0.3)
        try:
            return bool(newcomer.recv(1))
        except TimeoutError:
            return True
        except ConnectionError:
            return False


@pytest.mark.parametrize("web", [False, True], ids=["tcp", "websocket"])
def test_who_makes_one_transfer_after_the_other_has_a_place_for_each(tmp_path: Path, web: bool) -> None:
    with Relay(tmp_path, "--max-per-source", str(MOST), *web_options(), recording=True) as relay:
        for _ in range(30):
            token = new_token()
            with narrow(relay.port) as receiver:
                receiver.sendall(handshake(token, new_side()))
                if web:
                    sender = dial_raw(web_port(relay))
                    sender.sendall(Sent(BINARY, handshake(token, new_side())).wire)
                else:
                    sender = narrow(relay.port)
                    sender.sendall(handshake(token, new_side()))
                with sender:
                    assert read_exactly(receiver, 3) == b"ok\n"
                    sender.sendall(Sent(BINARY, b"x" * 20).wire + Sent(CLOSE).wire if web else b"x" * 20)
                    assert read_exactly(receiver, 20) == b"x" * 20
        assert len(relay.wait_for_records(30)) == 30


def test_who_takes_nothing_of_it_for_long_is_reset(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    inside = shortened(transfer__arrears__ARREARS_SECONDS=2)
    with Relay(tmp_path, recording=True, inside=inside) as relay:
        receiver = ended(relay.port, stack)
        with relays_end(relay.pids, receiver) as end:
            assert unacknowledged(end) > 0
        wait_until(lambda: receiver.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0, 15, "it is reset")


def test_when_all_places_are_taken_it_gives_way(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    options = ("--max-connections", "8", "--max-per-source", "8")
    with Relay(tmp_path, *options, recording=True) as relay:
        receivers = [ended(relay.port, stack) for _ in range(8)]
        newcomers = [stack.enter_context(narrow(relay.port, "127.2.0.1")) for _ in range(2)]
        shake_hands(*newcomers)
        errors = [receiver.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for receiver in receivers]
        assert 0 < sum(map(bool, errors)) <= 4
        assert relay.stop() == 0
        assert "reset who took nothing of what was left of a transfer" in relay.log_text()


def test_who_takes_a_few_bytes_of_it_now_and_then_gives_way_too(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """As a transfer does: four sources with a quarter of all places each once kept everybody out like that."""
    with Relay(tmp_path, "--max-connections", "12", "--max-per-source", "4", recording=True) as relay:
        receivers: list[socket.socket] = []
        moving = [met(relay.port, "127.3.0.1", stack=stack)]
        with beside(lambda over: take_a_few(receivers, over)), beside(lambda over: move_on(moving, over)):
            sources = [f"127.1.0.{number % 4 + 1}" for number in range(8)]
            receivers.extend(ended(relay.port, stack, source=source) for source in sources)  # one after the other
            moving.append(met(relay.port, "127.3.0.1", stack=stack))
            newcomer = stack.enter_context(dial(relay.port, "127.2.0.1"))
            newcomer.sendall(b"who is there?\n")
            assert answer(newcomer, 30) == b"bad handshake\n"


def take_a_few(receivers: list[socket.socket], over: threading.Event) -> None:
    """Have these read before they might be idle, but less than a transfer has to move to keep its places."""
    while not over.wait(4.0):
        for receiver in [*receivers]:
            receiver.setblocking(False)
            with contextlib.suppress(OSError):  # it has given way
                receiver.recv(4000)


def move_on(pairs: list[tuple[socket.socket, socket.socket]], over: threading.Event) -> None:
    """Have these transfers move enough to keep their places."""
    while not over.wait(0.5):
        for first, second in [*pairs]:
            first.sendall(bytes(2000))
            read_exactly(second, 2000)


@pytest.mark.parametrize("says", [1, 20_000_000], ids=["a byte", "much"])
def test_who_goes_on_talking_gets_it_all_the_same(tmp_path: Path, stack: contextlib.ExitStack, says: int) -> None:
    """The kernel answers what comes to a stream that was shut down with a reset, and forgets what was under way."""
    with Relay(tmp_path, recording=True) as relay:
        receiver = ended(relay.port, stack, "reset")
        relay.wait_for_records(1)
        fill_the_way(receiver, most=says)
        receiver.settimeout(15)
        time.sleep(0.5)
        assert len(all_of(receiver)) == OWED_BYTES


def test_when_the_relay_ends_who_has_said_what_nobody_read_gets_it_too(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """The kernel answers what is unread when it is closed with a reset, too."""
    with Relay(tmp_path, "--grace", "0", recording=True) as relay:

        def say_what_rests(receiver: socket.socket) -> None:
            with relays_end(relay.pids, receiver) as end:
                while not unread(end):
                    receiver.sendall(bytes(16_384))
                    wait_until(lambda: unacknowledged(receiver) == 0, what="it is the relay's")
                    time.sleep(0.005)

        receiver = ended(relay.port, stack, "reset", before=say_what_rests)
        relay.wait_for_records(1)
        assert relay.stop() == 0
        assert len(all_of(receiver)) == OWED_BYTES


def test_who_ends_its_stream_and_reads_later_gets_all_though_its_partner_falls_silent(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    inside = shortened(transfer__ending__HALF_CLOSED_SECONDS=1)
    with Relay(tmp_path, recording=True, inside=inside) as relay:
        receiver = stack.enter_context(narrow(relay.port))
        sender = stack.enter_context(connect(relay.port))
        shake_hands(sender, receiver)
        sender.sendall(bytes(OWED_BYTES))
        receiver.shutdown(socket.SHUT_WR)
        relay.wait_for_records(1)
        assert len(all_of(receiver)) == OWED_BYTES


def test_a_client_that_has_all_and_meets_a_bound_hears_so_without_a_reset(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    with Relay(tmp_path, "--idle-timeout", "1", *web_options(), recording=True) as relay:
        token = new_token()
        page = stack.enter_context(dial_raw(web_port(relay)))
        partner = stack.enter_context(connect(relay.port))
        page.sendall(Sent(BINARY, handshake(token, new_side())).wire)
        partner.sendall(handshake(token, new_side()))
        assert read_exactly(page, 5) == b"\x82\x03ok\n"
        assert read_exactly(partner, 3) == b"ok\n"
        for _ in range(20):  # so that its kernel waits for its answer before it acknowledges anything
            partner.sendall(b"?")
            assert read_exactly(page, 3) == b"\x82\x01?"
            page.sendall(Sent(BINARY, b"!").wire)
            assert read_exactly(partner, 1) == b"!"
        relay.wait_for_records(1)
        time.sleep(0.2)  # a reset would be here by then
        assert page.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert page.recv(10) == b"\x88\x02\x03\xe8"


def test_at_a_gateway_what_is_owed_upstream_counts_for_the_client_whose_it_was(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    with Relay(tmp_path, recording=True) as relay:
        (tmp_path / "gateway").mkdir()
        options = ("--upstream", f"127.0.0.1:{relay.port}", "--max-per-source", str(MOST), *web_options())
        gateway = stack.enter_context(Relay(tmp_path / "gateway", *options))
        frame = Sent(BINARY, bytes(1 << 16)).wire
        for _ in range(MOST):
            token = new_token()
            receiver = stack.enter_context(narrow(relay.port))
            receiver.sendall(handshake(token, new_side()))
            with dial_raw(web_port(gateway), source=ATTACKER) as page:
                page.sendall(Sent(BINARY, handshake(token, new_side())).wire)
                assert read_exactly(page, 5) == b"\x82\x03ok\n"
                page.settimeout(0.3)
                with contextlib.suppress(TimeoutError):
                    while True:
                        page.sendall(frame)
                reset(page)
        with pytest.raises((ConnectionError, AssertionError)):
            dial_raw(web_port(gateway), source=ATTACKER)
        dial_raw(web_port(gateway), source="127.2.0.1").close()


def test_a_relay_that_is_stopped_does_not_wait_for_it_and_still_delivers_it(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    with Relay(tmp_path, "--grace", "60", recording=True) as relay:
        receiver = ended(relay.port, stack)
        began = time.monotonic()
        assert relay.stop() == 0
        assert time.monotonic() - began < 30
        assert len(all_of(receiver)) >= OWED_BYTES


def test_what_a_websocket_client_has_said_before_its_close_arrives_though_it_is_reset_then(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    with Relay(tmp_path, *web_options(), recording=True) as relay:
        token = new_token()
        receiver = stack.enter_context(narrow(relay.port))
        sender = stack.enter_context(dial_raw(web_port(relay)))
        sender.sendall(Sent(BINARY, handshake(token, new_side())).wire)
        receiver.sendall(handshake(token, new_side()))
        assert read_exactly(receiver, 3) == b"ok\n"
        said = bytes(90_000)
        sender.sendall(Sent(BINARY, said).wire + Sent(CLOSE).wire)
        wait_until(lambda: unacknowledged(sender) == 0, what="all of it is the relay's")
        time.sleep(0.5)  # and read as far as it goes
        reset(sender)
        time.sleep(1)
        assert all_of(receiver) == said


def owing(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """The relay's end of a connection, with `OWED_BYTES` on their way, as far as there is room, and the receiver that
    has read none of them."""
    door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    receiver = stack.enter_context(narrow(door.getsockname()[1]))
    end = stack.enter_context(door.accept()[0])
    end.setblocking(False)
    end.send(bytes(OWED_BYTES))
    wait_until(lambda: unread(receiver), what="it has all that it has room for")
    return end, receiver


@pytest.fixture
def debtor(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """One such connection."""
    return owing(stack)


class NoPlaces:
    """Where nobody looks for one."""

    def take(self, *sources: bytes | None) -> None:
        """A connection is here."""

    give_back = take

    def look_again(self) -> None:
        """Somebody would give way."""


class Clock:
    """Stands in for `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        """What it shows."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """That of `arrears`."""
    clock = Clock()
    monkeypatch.setattr(arrears_module, "time", clock)
    return clock


def still_after(arrears: Arrears, clock: Clock, seconds: float) -> int:
    """How many would give way then."""
    clock.now += seconds
    for _ in arrears.collect(clock.now):
        pass
    return arrears.still()


def test_what_a_transfer_has_taken_is_asked_while_its_sockets_are_there(
    debtor: tuple[socket.socket, socket.socket], stack: contextlib.ExitStack, clock: Clock
) -> None:
    """Of either side: when the first one was taken over, what it was owed once counted as having arrived."""
    end, _ = debtor
    other_end, _ = owing(stack)
    arrears = Arrears(NoPlaces())  # type: ignore[arg-type]  # nothing else is asked of it

    def paid_by(now: float) -> float:
        assert unacknowledged(end) > 0
        assert unacknowledged(other_end) > 0
        return now + 20

    arrears.take_over([(end, None), (other_end, None)], paid_by)
    assert len(arrears) == 2
    assert [still_after(arrears, clock, seconds) for seconds in (15, 9, 6)] == [0, 0, 2]
    arrears.close()


def test_who_would_give_way_is_looked_at_again_before_it_does(
    debtor: tuple[socket.socket, socket.socket], clock: Clock
) -> None:
    end, receiver = debtor
    arrears = Arrears(NoPlaces())  # type: ignore[arg-type]  # as above
    arrears.take_over([(end, None)], lambda now: now - 100)
    assert still_after(arrears, clock, IDLE_SECONDS + 1) == 1
    read_exactly(receiver, 4 * LITTLE_BYTES)
    time.sleep(0.2)
    assert not arrears.cut_short(), "it takes something again"
    assert len(arrears) == 1
    assert still_after(arrears, clock, 50.0) == 1
    assert arrears.cut_short()
    assert len(arrears) == 0


def test_what_comes_in_lumps_pays_for_the_time_in_between() -> None:
    assert paid_until(0.0, LITTLE_BYTES, 1000.0) == 0.0, "a little pays for nothing"
    least_rate = LITTLE_BYTES / IDLE_SECONDS
    for lump in (5_000, 20_000, 40_000):
        paid = paid_until(0.0, lump, 1000.0)
        assert paid + IDLE_SECONDS == pytest.approx(1000.0 + lump / least_rate)
        assert paid_until(paid, lump, 1000.0) > paid
    assert paid_until(0.0, 10**9, 1000.0) == 1000.0 + MOST_SECONDS


def test_a_receiver_that_takes_lumps_is_idle_when_these_have_paid_for_no_more(stack: contextlib.ExitStack) -> None:
    turns = Turns()
    rest = Rest(turns)
    ends = [socket.socketpair() for _ in range(2)]
    (sender, first), (receiver, second) = [[stack.enter_context(end) for end in pair] for pair in ends]
    pair = new_pair(first, second, turns, rest)
    pair.pumps[0]._keep(memoryview(bytes(300_000)))
    assert pair.idle_for(1000.0) == 0
    assert pair.paid_until == 0, "it may have gone into a buffer that nobody reads"
    for now in (1060.0, 1120.0):
        pair.pumps[0].moved += 100_000
        pair.idle_for(now)
        assert pair.paid_until == now + MOST_SECONDS
    assert pair.idle_for(1130.0) == 10
    assert pair.paid_by(1130.0) == 1120.0 + MOST_SECONDS
    assert pair.owed == 300_000
    sender.close()
    receiver.close()
    pair.close()
    rest.close()


def test_a_slow_receiver_is_not_idle_though_all_was_written_to_it_long_ago(stack: contextlib.ExitStack) -> None:
    turns = Turns()
    rest = Rest(turns)
    door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def connected() -> tuple[socket.socket, socket.socket]:
        outer = stack.enter_context(narrow(door.getsockname()[1]))
        inner = stack.enter_context(door.accept()[0])
        inner.setblocking(False)
        return outer, inner

    (sender, first), (receiver, second) = connected(), connected()
    pair = new_pair(first, second, turns, rest)
    sender.sendall(bytes(100_000))
    there, _ = pair.pumps

    def is_moved() -> bool:
        there.turn(1 << 20)
        return pair.moved >= 100_000

    wait_until(is_moved, what="all of it is on its way")
    assert pair.idle_for(1000.0) == 0
    assert pair.idle_for(1010.0) == 10
    for seconds in range(3):
        before = pair.owed
        read_exactly(receiver, 20_000)
        until = time.monotonic() + 15
        while pair.owed == before and time.monotonic() < until:
            time.sleep(0.01)
        assert pair.idle_for(1020.0 + seconds) == 0
    assert pair.moved == 100_000
    pair.close()
    rest.close()

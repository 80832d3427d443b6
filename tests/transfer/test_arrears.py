"""What a transfer that is over still owes counts for its source, and goes on arriving; but nobody keeps it for good."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.transfer.rest import Rest
from relay.transfer.turns import Turns
from tests.support.bare_pair import new_pair
from tests.support.client_frames import BINARY, CLOSE, Sent
from tests.support.harness import (
    Relay,
    connect,
    handshake,
    new_side,
    new_token,
    read_exactly,
    reset,
    shake_hands,
    shortened,
    wait_until,
)
from tests.support.hostile import narrow
from tests.support.kernel_view import relays_end, unacknowledged
from tests.support.web import dial_raw, web_options, web_port

OWED_BYTES = 200_000
MOST = 4


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Closes the clients."""
    with contextlib.ExitStack() as stack:
        yield stack


def ended(port: int, stack: contextlib.ExitStack, how: str = "both") -> socket.socket:
    """A receiver that has read nothing of a transfer that is over: since both sides have ended their streams, or since
    its partner was reset."""
    receiver = stack.enter_context(narrow(port))
    with connect(port) as sender:
        shake_hands(sender, receiver)
        sender.sendall(bytes(OWED_BYTES))
        wait_until(lambda: unacknowledged(sender) == 0, what="all of it is the relay's")
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
        before = pair.acknowledged
        read_exactly(receiver, 20_000)
        until = time.monotonic() + 15
        while pair.acknowledged == before and time.monotonic() < until:
            time.sleep(0.01)
        assert pair.idle_for(1020.0 + seconds) == 0
    assert pair.moved == 100_000
    pair.close()
    rest.close()

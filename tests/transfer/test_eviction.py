"""When all places are taken: who is let in, who gives way, who does not, and what is on record then.

The relays here have few places, so that a test can take them all. Sources are addresses of 127.0.0.0/8, which count
since `--max-per-source` is given.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from relay.transfer.lumps import IDLE_SECONDS
from tests.support.harness import (
    SHAPES,
    Relay,
    Service,
    Workers,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
    shortened,
    wait_until,
)
from tests.support.hostile import answer, beside, dial, honest_transfer, is_open
from tests.support.kernel_view import wait_until_read

MOST = 40
FREE = ("--grace", "0", "--max-new-per-source", "100000")
BOUNDS = (*FREE, "--max-connections", str(MOST), "--max-waiting", str(MOST), "--max-per-source", str(MOST))
ENDED = "ended what had been idle longest"
TURNED_AWAY = "turned away new connections from addresses that had more"


@pytest.fixture
def relay(relay_factory: Callable[..., Relay]) -> Relay:
    """One worker with few places, which a single source may take."""
    return relay_factory(*BOUNDS, recording=True)


def wait_alone(port: int, source: str, stack: contextlib.ExitStack) -> socket.socket:
    """A client from `source` that waits for a partner who never comes."""
    sock = stack.enter_context(dial(port, source))
    sock.sendall(handshake(new_token(), new_side()))
    return sock


def let_in(port: int, *sources: str, seconds: float = 25) -> None:
    """From each of `sources` two sides come, at the same time, and must meet; AssertionError if they do not."""
    with contextlib.ExitStack() as stack:
        pairs = [[stack.enter_context(dial(port, source)) for _ in range(2)] for source in sources]
        for pair in pairs:
            token = new_token()
            for sock in pair:
                sock.settimeout(seconds)
                sock.sendall(handshake(token, new_side()))
        for pair in pairs:
            for sock in pair:
                assert read_exactly(sock, 3) == b"ok\n"


SOME = b"." * 1024
"""What a transfer passes on several times a second that moves something, if only a little."""


@contextlib.contextmanager
def trickling(
    pairs: Sequence[Sequence[socket.socket]], seconds: float, said: bytes = b".", *, both_ways: bool = False
) -> Iterator[None]:
    """All of `pairs` pass a byte, or what else is `said`, on every so many seconds, as long as they live; or in
    `both_ways` in the same moment."""

    def work(over: threading.Event) -> None:
        living = [*pairs]
        while not over.wait(seconds):
            living[:] = [pair for pair in living if _passes_on(pair, said, both_ways)]

    with beside(work):
        yield


def _passes_on(pair: Sequence[socket.socket], said: bytes, both_ways: bool) -> bool:
    ways = [(0, 1), (1, 0)] if both_ways else [(0, 1)]
    try:
        for speaker, _ in ways:
            pair[speaker].sendall(said)
        return all(read_exactly(pair[listener], len(said)) == said for _, listener in ways)
    except (OSError, AssertionError):
        return False


# Who is let in


def test_a_relay_full_of_idle_connections_lets_newcomers_in(
    any_relay_factory: Callable[..., Service], stack: contextlib.ExitStack
) -> None:
    relay = any_relay_factory(*BOUNDS)
    workers = len(relay.pids)
    honest = [stack.enter_context(sock) for sock in met(relay.port, "127.9.0.1")]  # idle too, but it has only these
    silent = []
    for number in range(15 * workers):
        source = f"127.1.0.{number % 2 + 1}"
        silent += [stack.enter_context(sock) for sock in met(relay.port, source)]
    for number in range(10 * workers):
        silent.append(stack.enter_context(dial(relay.port, f"127.1.0.{number % 2 + 1}")))
        silent[-1].sendall(handshake(new_token(), new_side()))
    newcomers = [stack.enter_context(dial(relay.port, "127.9.0.3")) for _ in range(2)]
    token = new_token()
    for sock in newcomers:
        sock.settimeout(25)
        sock.sendall(handshake(token, new_side()))
    for sock in newcomers:
        assert sock.recv(3) == b"ok\n"
    honest_transfer(relay.port, source="127.9.0.2")
    honest[0].sendall(b"still here")
    assert honest[1].recv(10) == b"still here"
    gone = [sock for sock in silent if not is_open(sock)]
    assert gone
    assert len(gone) <= MOST * workers
    assert relay.wait_for_records(2), "what was ended is on record, and so is the honest transfer"


@pytest.mark.parametrize("shape", SHAPES)
def test_one_machine_with_an_address_of_each_family_keeps_nobody_out(
    shape: str, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    service: Service = (
        Relay(tmp_path, *BOUNDS, interface="::", recording=True)
        if shape == "one-worker"
        else Workers(tmp_path, *BOUNDS, interface="::", count=2)
    )
    with service:  # type: ignore[attr-defined]
        workers = len(service.pids)
        silent = []
        for number in range(MOST // 2 * workers):
            host, source = ("127.0.0.1", "127.1.0.1") if number % 2 else ("::1", "::1")
            token = new_token()
            for _ in range(2):
                silent.append(stack.enter_context(dial(service.port, source, host)))
                silent[-1].sendall(handshake(token, new_side()))
        for sock in silent:
            assert read_exactly(sock, 3) == b"ok\n"
        for number in range(10):
            let_in(service.port, *(f"127.9.{number}.{each}" for each in range(1, 4)))
        honest_transfer(service.port, source="127.9.99.1")
        gone = sum(not is_open(sock) for sock in silent)
        assert gone <= 2 * 31, "no more than was needed"
        records = service.wait_for_records(gone // 2 + 31)
        assert {record["mood"] for record in records} == {"happy"}


def test_newcomers_are_let_in_past_those_who_come_back_as_soon_as_they_are_ended(
    relay_factory: Callable[..., Relay],
) -> None:
    most = "120"
    bounds = ("--max-connections", most, "--max-waiting", most, "--max-per-source", "30")
    relay = relay_factory(*bounds, "--grace", "0", recording=True)

    def flood(source: str) -> Callable[[threading.Event], None]:
        """Have as many that wait as are let in, and others that knock."""

        def work(over: threading.Event) -> None:
            held: list[socket.socket] = []
            with contextlib.ExitStack() as mine:
                while not over.wait(0.01):
                    for sock in [sock for sock in held if not is_open(sock)]:
                        held.remove(sock)
                        sock.close()
                    for _ in range(50 - len(held)):
                        held.append(mine.enter_context(dial(relay.port, source)))
                        with contextlib.suppress(OSError):
                            held[-1].sendall(handshake(new_token(), new_side()))

        return work

    with contextlib.ExitStack() as flooding:
        for number in range(1, 5):
            flooding.enter_context(beside(flood(f"127.1.0.{number}")))
        wait_until(lambda: relay.rows("current")[0]["waiting"] >= 119, what="all places are taken")
        for number in range(4):
            let_in(relay.port, f"127.9.0.{number + 1}")
    assert ENDED in _log_at_the_end(relay)


def test_a_handshake_that_never_comes_keeps_no_place(relay: Relay, stack: contextlib.ExitStack) -> None:
    silent = [stack.enter_context(dial(relay.port)) for _ in range(MOST)]
    for sock in silent:
        sock.sendall(b"please relay ")
    let_in(relay.port, "127.9.0.1")
    gone = [sock for sock in silent if not is_open(sock)]
    assert len(gone) == 2
    assert [answer(sock) for sock in gone] == [b"bad handshake\n"] * 2
    assert [record["mood"] for record in relay.wait_for_records(3)].count("errory") == 2


def test_a_byte_now_and_then_keeps_no_place_for_a_source_that_has_many(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(*FREE, "--max-connections", "200", "--max-per-source", "64")
    many = [met(relay.port, "127.1.0.1", stack=stack) for _ in range(32)]
    small = [met(relay.port, f"127.9.0.{number + 1}", stack=stack) for number in range(68)]
    with trickling(many, 0.5), trickling(small, 0.5):
        let_in(relay.port, *(f"127.9.1.{number + 1}" for number in range(4)))
        time.sleep(1)
    assert sum(not is_open(first) for first, _ in many) in (4, 5)
    for first, second in small:
        first.sendall(b"still here")
        assert read_exactly(second, 10) == b"still here"


# Who gives way, and who does not


def test_who_moves_something_never_gives_way(relay_factory: Callable[..., Relay], stack: contextlib.ExitStack) -> None:
    relay = relay_factory(*FREE, "--max-connections", "20", "--max-per-source", "20", recording=True)
    moving = [[stack.enter_context(sock) for sock in met(relay.port, "127.1.0.1")] for _ in range(10)]
    newcomer = stack.enter_context(dial(relay.port, "127.9.0.1"))
    newcomer.sendall(handshake(new_token(), new_side()))
    for _ in range(18):
        for first, second in moving:
            first.sendall(SOME)
            assert read_exactly(second, len(SOME)) == SOME
        time.sleep(0.5)
    assert relay.records() == []
    assert relay.rows("current")[0]["waiting"] == 0, "so the newcomer is still in the listen queue"
    assert "let new connections wait" in relay.log_text()


def test_transfers_that_end_while_all_are_looked_through_do_no_harm(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    inside = shortened(transfer__slices__SLICE_SECONDS=0, transfer__slices__REST_SECONDS=0.05)
    relay = relay_factory(*FREE, "--max-connections", "40", "--max-per-source", "40", recording=True, inside=inside)
    pairs = [met(relay.port, f"127.1.0.{number + 1}", stack=stack) for number in range(20)]
    waiting = [stack.enter_context(dial(relay.port, "127.9.0.1")) for _ in range(40)]
    for first, second in pairs[::2]:  # each look takes a second
        time.sleep(0.4)
        first.close()
        second.close()
    for sock in waiting[:2]:
        sock.close()
    assert relay.stop() == 0
    assert "Traceback" not in relay.log_text()


def test_who_waits_for_a_rate_of_the_operators_never_gives_way(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(*FREE, "--max-connections", "8", "--max-per-source", "4", "--pair-rate", "300")
    slow = [met(relay.port, f"127.1.0.{number + 1}", stack=stack) for number in range(4)]
    for first, _ in slow:
        first.sendall(bytes(30_000))
    newcomer = stack.enter_context(dial(relay.port, "127.9.0.1"))
    newcomer.sendall(handshake(new_token(), new_side()))
    with contextlib.suppress(TimeoutError):
        newcomer.settimeout(2 * IDLE_SECONDS + 3)
        newcomer.recv(1)
    assert ENDED not in _log_at_the_end(relay)


def test_who_waits_for_one_for_a_moment_now_and_then_does(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    """For the second of two words the rate has each wait for a hundredth of a second, which once kept a place."""
    relay = relay_factory(*FREE, "--max-connections", "16", "--max-per-source", "4", "--pair-rate", "10000")
    pairs = [met(relay.port, f"127.1.0.{number + 1}", stack=stack) for number in range(8)]
    with trickling(pairs, 1.0, said=bytes(100), both_ways=True):
        let_in(relay.port, "127.9.0.1", seconds=20)


def test_the_idle_of_whoever_has_most_give_way_before_those_of_others_that_are_more_idle(
    relay: Relay, stack: contextlib.ExitStack
) -> None:
    honest = [wait_alone(relay.port, f"127.9.0.{number + 1}", stack) for number in range(8)]
    honest_pairs = [met(relay.port, f"127.9.1.{number + 1}", stack=stack) for number in range(4)]
    greedy = [wait_alone(relay.port, "127.1.0.1", stack) for _ in range(MOST - 16)]
    time.sleep(IDLE_SECONDS + 1)  # until all have been idle for long enough
    for number in range(4):
        let_in(relay.port, f"127.9.2.{number + 1}")
    assert any(not is_open(sock) for sock in greedy)
    assert all(is_open(sock) for sock in honest)
    for first, second in honest_pairs:
        first.sendall(b"still here")
        assert read_exactly(second, 10) == b"still here"


def test_of_small_sources_the_most_idle_gives_way(relay: Relay, stack: contextlib.ExitStack) -> None:
    waiting = []
    for number in range(MOST):
        waiting.append(wait_alone(relay.port, f"127.9.0.{number + 1}", stack))
        wait_until_read(relay, waiting[-1])
    let_in(relay.port, "127.9.1.1")
    assert [is_open(sock) for sock in waiting] == [False] * 2 + [True] * (MOST - 2)
    assert [record["mood"] for record in relay.wait_for_records(3)].count("lonely") == 2


def test_who_fills_the_relay_with_what_moves_cannot_drive_out_those_who_wait(
    relay: Relay, stack: contextlib.ExitStack
) -> None:
    waiting = [wait_alone(relay.port, f"127.9.0.{number + 1}", stack) for number in range(MOST - 30)]
    with trickling([met(relay.port, "127.1.0.1", stack=stack) for _ in range(15)], 0.3, SOME):
        more = [stack.enter_context(dial(relay.port, "127.1.0.1")) for _ in range(3)]
        assert [answer(sock, 25) for sock in more] == [b""] * 3
        assert all(is_open(sock) for sock in waiting)
        let_in(relay.port, "127.9.1.1")
        assert sum(not is_open(sock) for sock in waiting) == 2
    assert TURNED_AWAY in _log_at_the_end(relay)


def test_behind_a_proxy_all_of_whose_connections_are_one_source_newcomers_are_let_in(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(*FREE, "--max-connections", str(MOST), "--max-per-source", "1000000")
    silent = [met(relay.port, "127.1.0.1", stack=stack) for _ in range(MOST // 2)]
    let_in(relay.port, *["127.1.0.1"] * (MOST // 2))
    assert not any(is_open(first) for first, _ in silent)


def test_connections_of_this_machine_which_nobody_counts_give_way_last(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--max-connections", "20", "--grace", "0")
    silent = [met(relay.port, stack=stack) for _ in range(10)]
    let_in(relay.port, "127.0.0.1")
    assert [is_open(first) for first, _ in silent].count(False) == 1


def test_what_was_ended_is_on_record_as_what_it_was(relay: Relay, stack: contextlib.ExitStack) -> None:
    for _ in range(3):
        first, second = met(relay.port, stack=stack)
        first.sendall(b"0123456789")
        assert read_exactly(second, 10) == b"0123456789"
    for _ in range(MOST - 6):
        wait_alone(relay.port, "127.1.0.1", stack)
    ended = MOST
    let_in(relay.port, *(f"127.9.0.{number + 1}" for number in range(ended // 2)))
    records = relay.wait_for_records(ended - 3 + ended // 2)  # a transfer has two places; and the newcomers
    assert {record["mood"] for record in records} == {"happy", "lonely"}
    assert sorted(record["total_bytes"] for record in records)[-4:] == [0, 10, 10, 10]
    assert ENDED in _log_at_the_end(relay)


# Several workers


def test_while_another_worker_has_places_nobody_gives_way(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    with Workers(tmp_path, *BOUNDS, count=1) as workers:
        idle = [met(workers.port, "127.1.0.1", stack=stack) for _ in range(MOST // 2)]
        workers.start_one()
        until = time.monotonic() + 8
        while time.monotonic() < until:  # more at a time than are accepted in one turn
            let_in(workers.port, *["127.9.0.1"] * 10)
            time.sleep(0.1)  # each connection keeps a port of this machine for a minute
        for first, second in idle:
            first.sendall(b"still here")
            assert read_exactly(second, 10) == b"still here"
        assert ENDED not in workers.log_text()


def _log_at_the_end(relay: Relay) -> str:
    relay.stop()
    return relay.log_text()

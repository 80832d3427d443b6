"""Slow and strange clients: nobody else notices, and each is on record once.

Hosts that vanish in the middle of a transfer or while they wait are in tests/transfer/test_pair.py; spares of one token
in tests/hostile/test_bounds.py.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import namespaces
from tests.support.harness import (
    Relay,
    Service,
    Workers,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    open_fds,
    own_memory,
    read_exactly,
    read_to_end,
    reset,
    wait_until,
)
from tests.support.hostile import NOISE, answer, beside, dial, honest_transfer, is_open, load_while

GIB = 1 << 30


def moods(service: Service, count: int) -> Counter[str]:
    """The moods on record, once there are so many; there must not be more."""
    records = service.wait_for_records(count)
    assert len(records) == count
    assert len(service.wait_for_rows("usage", count)) == count
    return Counter(record["mood"] for record in records)


def test_a_line_that_comes_byte_by_byte_has_no_more_time_than_another(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--handshake-timeout", "1", recording=True)
    began = time.monotonic()
    slow = [stack.enter_context(dial(relay.port)) for _ in range(50)]
    line = handshake(new_token(), new_side())
    honest = 0
    for number in range(len(line)):
        if not all(is_open(sock) for sock in slow):
            break
        for sock in slow:
            sock.sendall(line[number : number + 1])
        honest_transfer(relay.port, 1000)
        honest += 1
        time.sleep(0.1)
    assert 1 <= time.monotonic() - began < 8
    assert {answer(sock) for sock in slow} == {b"bad handshake\n"}
    assert moods(relay, honest + 50) == {"errory": 50, "happy": honest}


def test_a_transfer_of_a_byte_now_and_then_goes_on(any_relay: Service, stack: contextlib.ExitStack) -> None:
    pairs = [[stack.enter_context(sock) for sock in met(any_relay.port)] for _ in range(10)]
    for number in range(3):
        time.sleep(1.3)  # longer than the relay takes to see that nothing goes on
        for left, right in pairs:
            left.sendall(bytes([number]))
            assert read_exactly(right, 1) == bytes([number])
    for left, right in pairs:
        left.close()
        assert read_to_end(right) == b""
        right.close()
    assert Counter(record["total_bytes"] for record in any_relay.wait_for_records(10)) == {3: 10}


def test_who_never_reads_holds_up_its_partner_and_nobody_else(relay: Relay, stack: contextlib.ExitStack) -> None:
    honest_transfer(relay.port)
    fds, memory = open_fds(relay.pid), own_memory(relay.pid)
    pairs = []
    for _ in range(12):
        left, right = (stack.enter_context(sock) for sock in met(relay.port, "127.1.0.1"))
        left.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                left.sendall(NOISE)
        pairs.append((left, right))
    honest_transfer(relay.port, 5_000_000)
    assert load_while(1, relay.pid) < 0.25
    assert own_memory(relay.pid) < memory + (4 << 20), "what rests in the relay rests in kernel pipes"
    for left, right in pairs:
        reset(right)
        left.close()
    assert moods(relay, 14) == {"happy": 14}
    wait_until(lambda: open_fds(relay.pid) <= fds + 2 * 32, what="its file descriptors are free but for spare pipes")


def line_of(token: str) -> bytes:
    """A line with a side of its own."""
    return handshake(token, new_side())


STAGES = ["connected", "in the middle of the line", "waiting", "met", "moving"]


@pytest.mark.parametrize("way", ["half-close", "reset", "close with something unread"])
def test_leaving_at_any_stage_harms_nobody_else(any_relay: Service, stack: contextlib.ExitStack, way: str) -> None:
    witness = [stack.enter_context(sock) for sock in met(any_relay.port)]
    expected: Counter[str] = Counter()
    for stage in STAGES:
        for _ in range(4):
            mood = leave_at(any_relay.port, stage, way, stack)
            if stage != "connected":  # else it was a health check, and is on no record
                expected[mood] += 1
        witness[0].sendall(stage.encode())
        assert read_exactly(witness[1], len(stage)) == stage.encode()
    honest_transfer(any_relay.port)
    assert moods(any_relay, 17) == expected + Counter(happy=1)


def leave_at(port: int, stage: str, way: str, stack: contextlib.ExitStack) -> str:
    """Leave; what the relay says to it then. Returns the mood that this must be on record with."""
    line = line_of(new_token())
    if stage in ("met", "moving"):
        client, partner = (stack.enter_context(sock) for sock in met(port))
        if stage == "moving":
            client.sendall(NOISE)
        if way == "close with something unread":
            partner.sendall(NOISE[:1000])
            time.sleep(0.05)
    else:
        client = stack.enter_context(dial(port))
        client.sendall({"connected": b"", "in the middle of the line": line[:40], "waiting": line}[stage])
        time.sleep(0.02)
    if way == "half-close":
        client.shutdown(socket.SHUT_WR)
    elif way == "reset":
        reset(client)
    else:
        client.close()
    if stage in ("met", "moving"):
        heard = answer(partner)
        assert heard == (NOISE if stage == "moving" else b"") or (way != "half-close" and NOISE.startswith(heard))
        partner.close()
        return "happy"
    if way == "half-close":
        assert answer(client) == (b"" if stage == "waiting" else b"bad handshake\n")
    return "lonely" if stage == "waiting" else "errory"


# Urgent data: TCP sets one byte apart from the stream. A relay that splices gets stuck at it.


def test_urgent_data_costs_a_stream_nothing_but_itself(any_relay: Service, stack: contextlib.ExitStack) -> None:
    for _ in range(20):
        left, right = (stack.enter_context(sock) for sock in met(any_relay.port))
        left.sendall(b"before")
        left.send(b"!", socket.MSG_OOB)
        left.sendall(b"after")
        assert read_exactly(right, 11).replace(b"!", b"") == b"beforeafter"
        right.sendall(b"heard")
        assert read_exactly(left, 5) == b"heard"
        left.send(b"!", socket.MSG_OOB)
        left.sendall(NOISE)
        left.shutdown(socket.SHUT_WR)
        assert answer(right) == NOISE
        right.close()
    assert moods(any_relay, 20) == {"happy": 20}


def test_urgent_data_does_not_keep_the_relay_busy(relay: Relay, stack: contextlib.ExitStack) -> None:
    for _ in range(20):
        left, _ = (stack.enter_context(sock) for sock in met(relay.port))
        left.send(b"!", socket.MSG_OOB)
        left.sendall(b"more")
        left.send(b"!", socket.MSG_OOB)
    assert load_while(1, relay.pid) < 0.2
    honest_transfer(relay.port)


def test_urgent_data_before_the_partner_has_come_is_passed_over(relay: Relay, stack: contextlib.ExitStack) -> None:
    token = new_token()
    waits, comes = (stack.enter_context(connect(relay.port)) for _ in range(2))
    waits.send(b"!", socket.MSG_OOB)
    waits.sendall(line_of(token))
    wait_until(lambda: relay.rows("current")[0]["waiting"] == 1, what="its line is read")
    waits.send(b"!", socket.MSG_OOB)
    time.sleep(0.1)
    assert is_open(waits)
    comes.sendall(line_of(token))
    assert read_exactly(waits, 3) == read_exactly(comes, 3) == b"ok\n"
    waits.sendall(NOISE)
    waits.shutdown(socket.SHUT_WR)
    assert answer(comes) == NOISE


def test_urgent_data_at_rest_moves_house(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    with Workers(tmp_path, count=2) as workers:
        pairs = []
        for _ in range(5):
            left, right = (stack.enter_context(sock) for sock in met(workers.port))
            left.settimeout(0.3)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while True:  # until all that can rest on the way is full of it
                    left.send(b"!", socket.MSG_OOB)
                    sent += left.send(NOISE[:60_000])
            pairs.append((left, right, sent))
        workers.start_one()
        for number in (0, 1):
            assert workers.stop_one(number) == 0
        for left, right, sent in pairs:
            left.shutdown(socket.SHUT_WR)
            received = len(answer(right))
            # Of several urgent bytes under way at once only the last is set apart; the others are in the stream.
            assert sent <= received <= sent + sent // 50_000 + 2
            right.close()
        assert moods(workers, 5) == {"happy": 5}


# Much of it


class GarbageSenders:
    """A hundred who send noise as fast as it is taken, and come back when they are cut off, up to a gigabyte in all."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.poured = 0
        self.connections = 0

    def run(self, over: threading.Event) -> None:
        """Until it is a gigabyte, or `over`."""
        with selectors.DefaultSelector() as waiting:
            while self.poured < GIB and not over.is_set():
                while len(waiting.get_map()) < 100:
                    sock = dial(self.port)
                    sock.setblocking(False)
                    self.connections += 1
                    waiting.register(sock, selectors.EVENT_WRITE)
                for key, _ in waiting.select(0.1):
                    sender = key.fileobj
                    assert isinstance(sender, socket.socket)
                    try:
                        self.poured += sender.send(NOISE)
                    except ConnectionError:
                        waiting.unregister(sender)
                        sender.close()
            for key in list(waiting.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()


def test_a_gigabyte_of_garbage_costs_nobody_anything(relay: Relay) -> None:
    honest_transfer(relay.port)
    memory = own_memory(relay.pid)
    garbage = GarbageSenders(relay.port)
    honest = 1
    with beside(garbage.run):
        while garbage.poured < GIB:
            assert honest_transfer(relay.port) < 5
            honest += 1
    assert moods(relay, honest + garbage.connections) == {"happy": honest, "errory": garbage.connections}
    assert own_memory(relay.pid) < memory + (4 << 20)


def test_who_sends_on_after_a_refusal_is_not_served_faster_for_it(relay: Relay, stack: contextlib.ExitStack) -> None:
    # It would be back at once: five hundred that did so took half of two processors from everybody else.
    with dial(relay.port) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        began = time.monotonic()
        sock.sendall(NOISE[:1000])
        assert read_exactly(sock, 14) == b"bad handshake\n"
        with contextlib.suppress(ConnectionError):
            while True:
                sock.sendall(NOISE)
        assert time.monotonic() - began > 0.9
    honest_transfer(relay.port)
    assert moods(relay, 2) == {"errory": 1, "happy": 1}


def test_of_all_who_share_a_token_each_has_one_partner_or_is_sent_away(
    any_relay: Service, stack: contextlib.ExitStack
) -> None:
    # As if the clients of two relays had all been given the same token; each has a side of its own.
    token, count = new_token(), 200
    lines = [line_of(token) for _ in range(count)]
    clients = [stack.enter_context(connect(any_relay.port)) for _ in range(count)]
    for client, line in zip(clients, lines, strict=True):
        client.sendall(line)
    wait_until(lambda: sum(map(is_open, clients)) <= 1, what="all know where they are, but for an odd one")
    time.sleep(0.2)
    met_with = {}
    for client, line in zip(clients, lines, strict=True):
        if not is_open(client) and client.recv(3):
            client.sendall(line)
            met_with[line] = client
    heard = {line: read_exactly(client, len(line)) for line, client in met_with.items()}
    assert heard, "they meet in twos, but for those who had asked before others met: with a slow relay, most of them"
    assert all(heard[heard[line]] == line != heard[line] for line in heard), "each hears from the one that hears it"
    for client in clients:
        client.close()
    assert moods(any_relay, count - len(heard) // 2) == Counter(happy=len(heard) // 2, lonely=count - len(heard))


# Hosts that are gone from one moment to the next


def test_a_host_that_vanishes_during_its_handshakes_is_forgotten_in_time(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    if reason := namespaces.not_allowed():
        pytest.skip(reason)
    network = stack.enter_context(namespaces.three_hosts("relay.test"))
    options = ("--handshake-timeout", "4")  # in which all 40 have come
    relay = stack.enter_context(
        Relay(tmp_path, *options, interface="0.0.0.0", recording=True, inside=network.relay.inside)
    )

    def dialled() -> socket.socket:
        return stack.enter_context(socket.create_connection((network.relay_address, relay.port), timeout=10))

    before = open_fds(relay.pid)
    for number in range(40):
        sock = network.clients[0].make_there(dialled)
        sock.sendall(line_of(new_token())[: number * 2])
    fds = wait_until(lambda: found if (found := open_fds(relay.pid)) >= before + 40 else 0, what="all 40 are accepted")
    namespaces.run_ip("-n", network.relay.name, "link", "delete", "client0")
    left, right = network.clients[1].make_there(dialled), network.clients[1].make_there(dialled)
    token = new_token()
    for sock in (left, right):
        sock.sendall(line_of(token))
    assert read_exactly(left, 3) == read_exactly(right, 3) == b"ok\n"
    left.sendall(b"still here")
    assert read_exactly(right, 10) == b"still here"
    assert moods(relay, 40) == {"errory": 40}
    wait_until(lambda: open_fds(relay.pid) <= fds - 30, 10, "their connections are closed, though nobody answers")


def test_one_that_asks_after_others_have_met_is_no_spare_of_theirs(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    # It had connected before; with several workers it came to the token's home as a spare does that was under way.
    with Workers(tmp_path, count=3) as workers:
        for _ in range(12):
            token = new_token()
            line = line_of(token)
            slow = [stack.enter_context(connect(workers.port)) for _ in range(2)]
            for sock in slow:
                sock.sendall(line[:50])
            for sock in (quick := [stack.enter_context(connect(workers.port)) for _ in range(2)]):
                sock.sendall(line_of(token))
            for sock in quick:
                assert read_exactly(sock, 3) == b"ok\n"
            slow[0].sendall(line[50:])
            time.sleep(0.05)
            assert is_open(slow[0])
            partner = stack.enter_context(connect(workers.port))
            partner.sendall(line_of(token))
            assert read_exactly(partner, 3) == read_exactly(slow[0], 3) == b"ok\n"

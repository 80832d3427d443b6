"""Each bound, met at a real relay: what the client gets, that others do not notice, that it recovers, what is logged.

The times that bounds set are in tests/clients/test_protocol.py (test_whoever_takes_too_long_is_sent_away) too.
"""

from __future__ import annotations

import contextlib
import re
import resource
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.cli import RESERVED_FDS, read_options
from tests.support import namespaces
from tests.support.harness import (
    CHECKOUT,
    Relay,
    Service,
    Workers,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
    reset,
    shake_hands,
    stopped,
    wait_until,
)
from tests.support.hostile import ATTACKER, NOISE, answer, dial, honest_transfer, is_open
from tests.support.kernel_view import relays_end, unread, wait_until_read

RelayFactory = Callable[..., Relay]


def times_said(relay: Relay, option: str) -> int:
    """Stop the relay; return how often it says the bound was met, and make sure that it was said once while it ran."""

    def said() -> list[int]:
        found = re.findall(rf"\] {option}: .* \((\d+) since this was last said\)$", relay.log_text(), re.MULTILINE)
        return [int(count) for count in found]

    wait_until(said, 10, f"{option} in the log")
    time.sleep(1.1)  # in which it would be said again
    assert len(said()) == 1, relay.log_text()
    assert relay.stop() == 0
    assert len(said()) <= 2, relay.log_text()
    return sum(said())


def test_of_too_many_pending_handshakes_the_oldest_give_way(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-handshakes", "20", recording=True)
    token = new_token()
    line = handshake(token, new_side())
    slow = []
    for _ in range(60):
        slow.append(stack.enter_context(dial(relay.port)))
        slow[-1].sendall(line[:1])  # without a byte it would be a health check, and on no record
        time.sleep(0.005)
    for sock in slow[:40]:
        assert answer(sock) == b"bad handshake\n"
    assert all(is_open(sock) for sock in slow[40:])
    honest_transfer(relay.port)
    # One of those that were left may still say what it wants.
    slow[-1].sendall(line[1:])
    partner = stack.enter_context(connect(relay.port))
    partner.sendall(handshake(token, new_side()))
    assert read_exactly(slow[-1], 3) == read_exactly(partner, 3) == b"ok\n"
    for sock in slow[40:-1]:
        sock.close()
    assert [record["mood"] for record in relay.wait_for_records(60)].count("errory") == 59
    again = [stack.enter_context(dial(relay.port)) for _ in range(18)]
    honest_transfer(relay.port)
    assert all(is_open(sock) for sock in again)
    # An honest client may be pending for a moment, too, and take the place of one of the slow ones.
    assert 40 <= times_said(relay, "--max-handshakes") <= 44


def test_whoever_has_said_all_does_not_give_way_though_nobody_has_looked_yet(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--max-handshakes", "5")
    token = new_token()
    line = handshake(token, new_side())
    client = stack.enter_context(connect(relay.port))
    client.sendall(line[:1])
    wait_until_read(relay, client)
    with stopped(relay):  # libev looks first at what has come last: at the door
        client.sendall(line[1:])
        silent = [stack.enter_context(dial(relay.port)) for _ in range(5)]
    assert all(is_open(sock) for sock in silent)
    partner = stack.enter_context(connect(relay.port))
    partner.sendall(handshake(token, new_side()))
    assert read_exactly(client, 3) == read_exactly(partner, 3) == b"ok\n"


def test_connections_above_the_most_wait_in_the_listen_queue(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-connections", "6", "--max-waiting", "6", recording=True)
    pair = [stack.enter_context(sock) for sock in met(relay.port)]
    waiting = [stack.enter_context(dial(relay.port)) for _ in range(4)]
    for sock in waiting:
        sock.sendall(handshake(new_token(), new_side()))
    wait_until(lambda: relay.rows("current")[0]["waiting"] == 4, what="four wait")
    token = new_token()
    queued = [stack.enter_context(connect(relay.port)) for _ in range(2)]
    for sock in queued:
        sock.sendall(handshake(token, new_side()))
    wait_until(lambda: "--max-connections" in relay.log_text(), 5, "the bound in the log")
    assert all(is_open(sock) for sock in queued + waiting)
    pair[0].sendall(b"are we disturbed?")
    assert read_exactly(pair[1], 17) == b"are we disturbed?"
    waiting[0].close()
    reset(waiting[1])
    for sock in queued:
        assert read_exactly(sock, 3) == b"ok\n"
    for sock in [*pair, *queued, *waiting[2:]]:
        sock.close()
    wait_until(lambda: relay.rows("current")[0]["waiting"] == 0, what="nobody waits")
    honest_transfer(relay.port)
    assert times_said(relay, "--max-connections") >= 1


def test_a_source_has_at_most_its_share_of_connections(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-per-source", "5", recording=True)
    held = [stack.enter_context(dial(relay.port)) for _ in range(5)]
    token = new_token()
    lines = [handshake(token, new_side()) for _ in held]
    for sock, line in zip(held, lines, strict=True):
        sock.sendall(line[:1])  # without a byte it would be a health check, and on no record
    for _ in range(3):
        assert answer(stack.enter_context(dial(relay.port))) == b""
    assert all(is_open(sock) for sock in held)
    honest_transfer(relay.port)  # from another address
    honest_transfer(relay.port, source="127.1.0.2")
    held[0].close()
    relay.wait_for_records(3)
    held[1].sendall(lines[1][1:])
    newcomer = stack.enter_context(dial(relay.port))
    newcomer.sendall(handshake(token, new_side()))
    assert read_exactly(newcomer, 3) == read_exactly(held[1], 3) == b"ok\n"
    assert answer(stack.enter_context(dial(relay.port))) == b"", "those of a pair count, too"
    for sock in [*held[1:], newcomer]:
        sock.close()
    relay.wait_for_records(7)
    honest_transfer(relay.port, source=ATTACKER)
    assert len(relay.wait_for_records(8)) == 8, "whoever was turned away at the door is not on record"
    assert times_said(relay, "--max-per-source") == 4


def test_who_comes_again_before_anybody_has_seen_it_leave_is_let_in(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-per-source", "4", recording=True)
    earlier = [met(relay.port) for _ in range(2)]
    wait_until(lambda: relay.rows("current")[0]["connected"] == 2, what="both rest")
    with stopped(relay):
        for pair in earlier:
            for sock in pair:
                sock.close()
        one, other = (stack.enter_context(connect(relay.port)) for _ in range(2))
    shake_hands(one, other)
    assert relay.stop() == 0
    assert "--max-per-source" not in relay.log_text()


def test_a_source_that_comes_with_one_token_has_no_more_with_its_home(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    # Each worker would let in twenty, and hand them on to the one where the first of them waits.
    with Workers(tmp_path, "--max-per-source", "20", "--max-waiting-per-token", "200", count=2) as workers:
        crowd = []
        token, side = new_token(), new_side()
        for _ in range(120):
            sock = stack.enter_context(dial(workers.port))
            with contextlib.suppress(ConnectionError):
                sock.sendall(handshake(token, side))
            crowd.append(sock)
            time.sleep(0.002)
        wait_until(lambda: len([sock for sock in crowd if is_open(sock)]) <= 20, 5, "the rest was turned away")
        assert len([sock for sock in crowd if is_open(sock)]) == 20
        for _ in range(5):
            honest_transfer(workers.port)
        for sock in crowd:
            sock.close()
        workers.wait_for_records(20 + 5)
        wait_until(lambda: "--max-per-source" in workers.log_text(), 10, "the bound in the log")


def test_new_connections_of_a_source_in_a_second_are_bounded(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-new-per-source", "10")
    burst = [stack.enter_context(dial(relay.port)) for _ in range(60)]
    honest_transfer(relay.port)
    time.sleep(0.3)
    turned_away = len([sock for sock in burst if not is_open(sock)])
    assert turned_away >= 60 - 10 * 3, "the burst may have gone on into a third second"
    assert {answer(sock) for sock in burst if not is_open(sock)} == {b""}
    time.sleep(1.1)
    assert all(is_open(stack.enter_context(dial(relay.port))) for _ in range(5))
    honest_transfer(relay.port, source=ATTACKER)
    assert times_said(relay, "--max-new-per-source") == turned_away


def test_an_ipv6_network_of_64_bits_is_one_source_and_other_machines_need_no_option(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    if reason := namespaces.not_allowed():
        pytest.skip(reason)
    host = namespaces.Host(f"rg{new_side()[:8]}-v6")
    stack.callback(host.remove)
    host.create()
    addresses = [f"2001:db8:0:{net}::{number}" for net in (1, 2) for number in range(1, 9)]
    for address in addresses:
        namespaces.run_ip("-n", host.name, "address", "add", f"{address}/128", "dev", "lo", "nodad")
    namespaces.run_ip("-n", host.name, "address", "add", "192.0.2.1/32", "dev", "lo")
    # Of 192 connections a source may have a quarter when nothing is said, and these are not this machine's own.
    relay = stack.enter_context(
        Relay(tmp_path, "--max-connections", "192", "--max-new-per-source", "1000", interface="::", inside=host.inside)
    )

    def from_address(source: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET6)
        stack.callback(sock.close)
        sock.settimeout(10)
        sock.bind((source, 0))
        sock.connect((addresses[0], relay.port))
        return sock

    held = [host.make_there(lambda n=n: from_address(addresses[n % 8])) for n in range(50)]  # type: ignore[misc]
    wait_until(lambda: len([sock for sock in held if not is_open(sock)]) == 2, 10, "two were turned away")
    assert all(is_open(host.make_there(lambda n=n: from_address(addresses[8 + n]))) for n in range(8))  # type: ignore[misc]
    as_ipv4 = host.make_there(lambda: socket.create_connection(("192.0.2.1", relay.port), 10, ("192.0.2.1", 0)))
    stack.callback(as_ipv4.close)
    as_ipv4.sendall(b"?")
    assert answer(as_ipv4) == b"bad handshake\n"


def test_of_too_many_who_wait_the_one_that_has_waited_longest_gives_way(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-waiting", "5", recording=True)
    pair = [stack.enter_context(sock) for sock in met(relay.port)]
    tokens = [new_token() for _ in range(8)]
    waiting = []
    for number, token in enumerate(tokens):
        sock = stack.enter_context(dial(relay.port))
        sock.sendall(handshake(token, new_side()))
        waiting.append(sock)
        if number < 5:  # so that they come in this order
            with relays_end([relay.pid], sock) as end:
                wait_until(lambda end=end: unread(end) == 0, what="its line is read")  # type: ignore[misc]
        if number == 4:
            wait_until(lambda: relay.rows("current")[0]["waiting"] == 5, what="five wait")
        if number >= 5:
            assert answer(waiting[number - 5]) == b""
    assert all(is_open(sock) for sock in waiting[3:])
    pair[0].sendall(b"undisturbed")
    assert read_exactly(pair[1], 11) == b"undisturbed"
    for token, sock in zip(tokens[3:], waiting[3:], strict=True):
        partner = stack.enter_context(connect(relay.port))
        partner.sendall(handshake(token, new_side()))
        assert read_exactly(partner, 3) == read_exactly(sock, 3) == b"ok\n"
    honest_transfer(relay.port)
    assert [record["mood"] for record in relay.wait_for_records(4)].count("lonely") == 3
    assert times_said(relay, "--max-waiting") == 3


TRUSTING = ("--trusted-proxies", "127.0.0.0/8", "--proxy-protocol", "--max-new-per-source", "10000")


def called(relay: Relay, host: str, said: bytes) -> socket.socket:
    """A client at `host`, whom a proxy on this machine names, and who says this."""
    sock = connect(relay.port)
    family, here = ("TCP6", "::1") if ":" in host else ("TCP4", "127.0.0.1")
    sock.sendall(f"PROXY {family} {host} {here} 51234 4001\r\n".encode() + said)
    return sock


def honest_and_greedy(
    relay: Relay, stack: contextlib.ExitStack, words: Callable[[], bytes]
) -> tuple[list[socket.socket], list[socket.socket]]:
    """Ten of different addresses, and then 150 of ten networks of one IPv6 site and 150 of another machine, each of
    whom says what `words` gives."""
    ten = [stack.enter_context(called(relay, f"203.0.113.{number}", words())) for number in range(10)]
    hosts = [host for n in range(150) for host in (f"2001:db8:0:{n % 10:x}::{n:x}", "198.51.100.66")]
    return ten, [stack.enter_context(called(relay, host, words())) for host in hosts]


def test_of_too_many_who_wait_whoever_has_most_gives_way(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-waiting", "60", *TRUSTING)
    honest, greedy = honest_and_greedy(relay, stack, lambda: handshake(new_token(), new_side()))
    wait_until(lambda: sum(map(is_open, greedy)) == 50, 10, "so many gave way")
    assert all(is_open(sock) for sock in honest)
    of_a_site, of_a_machine = (sum(is_open(sock) for sock in greedy[which::2]) for which in (0, 1))
    assert of_a_machine <= 2 * of_a_site + 16, "the two have about the same"
    assert of_a_site <= 2 * of_a_machine + 16
    assert times_said(relay, "--max-waiting") == 250


def test_of_too_many_pending_handshakes_those_of_whoever_has_most_give_way(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-handshakes", "60", *TRUSTING)
    honest, greedy = honest_and_greedy(relay, stack, lambda: b"please re")
    wait_until(lambda: sum(map(is_open, greedy)) == 50, 10, "so many gave way")
    assert all(is_open(sock) for sock in honest)
    token = new_token()
    for sock in honest[:2]:
        sock.sendall(handshake(token, new_side()).removeprefix(b"please re"))
    assert [read_exactly(sock, 3) for sock in honest[:2]] == [b"ok\n"] * 2
    assert times_said(relay, "--max-handshakes") == 250


@pytest.mark.parametrize(("bound", "words"), [("--max-waiting", b""), ("--max-handshakes", b"please re")])
def test_of_too_many_of_a_site_none_of_who_has_one_there_gives_way_to_who_has_a_few_in_each_of_many_networks(
    bound: str, words: bytes, relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", bound, "60", *TRUSTING)
    token, host = new_token(), "2001:db8:0:ffff::1"
    for _ in range(4):  # it has transfers as well, and so no fewer connections at the relay than the others
        pair = [called(relay, host, line) for line in (handshake(token, new_side()), handshake(token, new_side()))]
        assert [read_exactly(stack.enter_context(sock), 3) for sock in pair] == [b"ok\n"] * 2
    line = handshake(token, new_side())
    honest = stack.enter_context(called(relay, host, words or line))
    greedy = []
    for number in range(20 * 7):
        said = words or handshake(new_token(), new_side())
        greedy.append(stack.enter_context(called(relay, f"2001:db8:0:{number // 7:x}::1", said)))
    wait_until(lambda: sum(map(is_open, greedy)) == 59, 10, "so many gave way")
    assert is_open(honest)
    if words:
        honest.sendall(line.removeprefix(words))
    partner = stack.enter_context(called(relay, host, handshake(token, new_side())))
    assert read_exactly(honest, 3) == read_exactly(partner, 3) == b"ok\n"
    assert times_said(relay, bound) == 81


def test_connections_that_nobody_counts_give_way_by_age_where_no_source_has_many(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-waiting", "20", *TRUSTING[:2], recording=True)
    first = [stack.enter_context(called(relay, "203.0.113.1", handshake(new_token(), new_side()))) for _ in range(7)]
    wait_until(lambda: relay.rows("current")[0]["waiting"] == 7, what="they wait")
    own = [stack.enter_context(called(relay, "127.0.0.1", handshake(new_token(), new_side()))) for _ in range(20)]
    wait_until(lambda: not any(map(is_open, first)), what="those who came first give way")
    assert all(is_open(sock) for sock in own)


def test_a_token_flooded_with_spares_keeps_a_few_and_still_meets_its_partner(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-waiting-per-token", "3", recording=True)
    token, side, other = new_token(), new_side(), stack.enter_context(connect(relay.port))
    other.sendall(handshake(new_token(), new_side()))
    flood = [stack.enter_context(dial(relay.port)) for _ in range(3)]
    for sock in flood:
        sock.sendall(handshake(token, side))
    wait_until(lambda: relay.rows("current")[0]["waiting"] == 4, what="four wait")
    for _ in range(20):
        flood.append(stack.enter_context(dial(relay.port)))
        flood[-1].sendall(handshake(token, side))
        assert answer(flood.pop(0)) == b""
    assert is_open(other)
    assert all(is_open(sock) for sock in flood)
    partner = stack.enter_context(connect(relay.port))
    partner.sendall(handshake(token, new_side()))
    assert read_exactly(partner, 3) == read_exactly(flood[-1], 3) == b"ok\n"
    assert [answer(sock) for sock in flood[:-1]] == [b"", b""]
    again = stack.enter_context(dial(relay.port))
    again.sendall(handshake(token, side))
    honest_transfer(relay.port)
    assert is_open(again), "the token has room again"
    assert [record["mood"] for record in relay.wait_for_records(23)].count("lonely") == 22
    assert times_said(relay, "--max-waiting-per-token") == 20


def test_transfers_in_which_nothing_moves_are_ended(relay_factory: RelayFactory, stack: contextlib.ExitStack) -> None:
    relay = relay_factory("--grace", "0", "--idle-timeout", "2", recording=True)
    idle = [[stack.enter_context(sock) for sock in met(relay.port)] for _ in range(20)]
    left, right = met(relay.port)
    stack.enter_context(left)
    stack.enter_context(right)
    left.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            left.send(NOISE)  # until its partner, who does not read, has made everything stand still
    left.setblocking(True)
    busy = [stack.enter_context(sock) for sock in met(relay.port)]
    began = time.monotonic()
    while len(relay.records()) < 21:
        assert time.monotonic() - began < 15, relay.log_text()
        busy[0].sendall(b".")
        assert read_exactly(busy[1], 1) == b"."
        time.sleep(0.1)
    assert all(answer(sock) == b"" for pair in idle for sock in pair)
    assert {record["mood"] for record in relay.records()} == {"happy"}
    assert min(record["total_time"] for record in relay.records()) >= 2
    busy[0].sendall(b"still here")
    assert read_exactly(busy[1], 10) == b"still here"
    honest_transfer(relay.port)
    for sock in busy:
        sock.close()
    assert times_said(relay, "--idle-timeout") == 21


def pour(sock: socket.socket, size: int) -> int:
    """Send `size` bytes, as far as that goes; return how many went."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < size:
            sent += sock.send(NOISE[: size - sent])
        sock.shutdown(socket.SHUT_WR)
    return sent


def test_a_transfer_larger_than_allowed_is_ended_and_one_of_exactly_that_size_is_not(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", "--max-pair-bytes", "1000000", recording=True)
    beside = [stack.enter_context(sock) for sock in met(relay.port)]
    honest_transfer(relay.port, 1_000_000 - 6)  # and six bytes back
    assert relay.wait_for_records(1)[0]["total_bytes"] == 1_000_000
    left, right = (stack.enter_context(sock) for sock in met(relay.port))
    right.sendall(NOISE[:100])
    assert read_exactly(left, 100) == NOISE[:100]
    sender = threading.Thread(target=pour, args=(left, 50_000_000))
    sender.start()
    assert len(answer(right)) == 1_000_000 - 100
    sender.join(10)
    assert not sender.is_alive()
    assert [record["total_bytes"] for record in relay.wait_for_records(2)] == [1_000_000, 1_000_000]
    beside[0].sendall(b"undisturbed")
    assert read_exactly(beside[1], 11) == b"undisturbed"
    honest_transfer(relay.port)
    assert times_said(relay, "--max-pair-bytes") == 1


class Sink:
    """Transfers that are poured into as fast as may be, and how many bytes came out of each."""

    def __init__(self, port: int, transfers: int, stack: contextlib.ExitStack) -> None:
        self.pairs = [[stack.enter_context(sock) for sock in met(port)] for _ in range(transfers)]
        for pair in self.pairs:
            for sock in pair:
                sock.setblocking(False)
        self._ended = time.monotonic()

    def run(self, seconds: float, rate: float = 1) -> list[float]:
        """Pour for so long; what each receiver has got meanwhile, by what `rate` (bytes a second) would have made.

        What was held up may come at once: the time since the end of the run before counts.
        """
        got = {right: 0 for _, right in self.pairs}
        until = time.monotonic() + seconds
        poller = select.epoll()
        by_fd = {}
        for left, right in self.pairs:
            poller.register(left.fileno(), select.EPOLLOUT)
            poller.register(right.fileno(), select.EPOLLIN)
            by_fd.update({left.fileno(): left, right.fileno(): right})
        with poller:
            while (now := time.monotonic()) < until:
                for fd, _ in poller.poll(until - now):
                    sock = by_fd[fd]
                    with contextlib.suppress(BlockingIOError):
                        if sock in got:
                            got[sock] += len(sock.recv(1 << 18))
                        else:
                            sock.send(NOISE)
        since, self._ended = self._ended, time.monotonic()
        return [size / rate / (self._ended - since) for size in got.values()]


def test_no_transfer_is_faster_than_the_rate_of_a_pair(
    relay_factory: RelayFactory, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--pair-rate", "400000", recording=True)
    sink = Sink(relay.port, 4, stack)
    sink.run(0.5)
    runs = []
    for _ in range(3):
        runs.append(sink.run(2.5, rate=400_000))
        assert max(runs[-1]) < 1.15
        if min(runs[-1]) > 0.7:  # unless the machine did something else meanwhile
            break
    assert min(runs[-1]) > 0.7, runs
    assert 1.2 < honest_transfer(relay.port, 600_000) < 8


def test_the_rate_of_the_relay_is_shared_by_the_transfers_that_have_something_to_move(
    any_relay_factory: Callable[..., Service], stack: contextlib.ExitStack
) -> None:
    service = any_relay_factory("--grace", "0", "--relay-rate", "1500000")
    for _ in range(12):
        for sock in met(service.port):
            stack.enter_context(sock)  # idle: these need nothing
    sink = Sink(service.port, 10, stack)
    sink.run(2)  # in which the workers hear of each other's transfers
    runs = []
    for _ in range(3):
        runs.append(sink.run(3, rate=1_500_000))
        assert sum(runs[-1]) < 1.2
        if sum(runs[-1]) > 0.7 and min(runs[-1]) > 0.5 * max(runs[-1]):
            break
    assert sum(runs[-1]) > 0.7, runs
    assert min(runs[-1]) > 0.5 * max(runs[-1]), runs
    honest_transfer(service.port, 30_000)


def test_the_page_about_security_names_tests_that_exist_and_defaults_that_are_so() -> None:
    page = (CHECKOUT / "docs" / "security.md").read_text()
    file = ""
    assert "hostile/test_bounds.py" in page
    for test_file, test in re.findall(r"`(\w+/test_\w+\.py)?(?:::(test_\w+))?`", page):
        file = test_file or file
        assert (CHECKOUT / "tests" / file).exists(), file
        if test:
            assert f"def {test}(" in (CHECKOUT / "tests" / file).read_text(), f"{file}::{test}"
    options = read_options([])
    for option, default in re.findall(r"^\| `--([a-z-]+)` \| (\d+)", page, re.MULTILINE):
        kept = getattr(options, option.replace("-", "_"))
        assert kept in (int(default), int(default) * 3600), option
    fds, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert options.max_connections + 2 * options.most_pipes == fds - RESERVED_FDS
    assert options.max_waiting == options.max_connections * 3 // 4
    assert options.max_per_source == options.max_connections // 16
    assert read_options(["--run-dir", "run"]).max_connections == options.max_connections // 2
    assert options.max_new_per_source == 200

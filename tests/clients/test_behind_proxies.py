"""A relay behind proxies that it trusts counts whom they name, and nobody else's word is worth anything.

The proxy is on this machine, and the clients that it names are elsewhere, so that they count.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import namespaces
from tests.support.client_frames import BINARY, Sent
from tests.support.harness import (
    Relay,
    Service,
    Workers,
    accepts,
    connect,
    free_port,
    handshake,
    new_side,
    new_token,
    read_exactly,
    read_to_end,
    relay_of,
    reset,
    shake_hands,
    wait_until,
)
from tests.support.hostile import answer, honest_transfer, is_open
from tests.support.proxies import haproxy, needs_haproxy, needs_nginx, nginx
from tests.support.web import web_options, web_port

ATTACKER, HONEST = "198.51.100.66", "203.0.113.7"
BOUND = 3


def trusting(bound: int = BOUND) -> tuple[str, ...]:
    """Options of a relay that trusts all proxies on this machine, and lets so many connections of each source in."""
    return ("--trusted-proxies", "127.0.0.0/8", "--max-new-per-source", "100000", "--max-per-source", str(bound))


TRUSTING = trusting()
HEADERS_ONLY = (*TRUSTING, "--proxy-protocol")
_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def line(host: str) -> bytes:
    """A header of version 1."""
    family = "TCP6" if ":" in host else "TCP4"
    here = "::1" if ":" in host else "127.0.0.1"
    return f"PROXY {family} {host} {here} 51234 4001\r\n".encode()


def binary(host: str, more: bytes = b"") -> bytes:
    """A header of version 2."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    here = "::1" if ":" in host else "127.0.0.1"
    addresses = socket.inet_pton(family, host) + socket.inet_pton(family, here) + struct.pack("!HH", 51234, 4001)
    kind = 0x21 if ":" in host else 0x11
    return _SIGNATURE + struct.pack("!BBH", 0x21, kind, len(addresses) + len(more)) + addresses + more


LOCAL = _SIGNATURE + b"\x20\x00\x00\x00"
HEADERS = {"version 1": line, "version 2": binary}


def called(port: int, *said: bytes) -> socket.socket:
    """A connection of the proxy, which says this in so many packets."""
    sock = connect(port)
    for part in said:
        sock.sendall(part)
        if len(said) > 1:
            time.sleep(0.01)
    return sock


def waiting(port: int, host: str, token: str | None = None, header: Callable[[str], bytes] = line) -> socket.socket:
    """The connection of a client at `host`, who waits for its partner, or has been turned away by now."""
    return called(port, header(host) + handshake(token or new_token(), new_side()))


def meets(port: int, host: str, header: Callable[[str], bytes] = line) -> bool:
    """Whether two clients at `host` are let in, and meet."""
    token = new_token()
    with waiting(port, host, token, header) as left, waiting(port, host, token, header) as right:
        # Of two workers, one may have a place for one of them.
        (first, *_), _, _ = select.select([left, right], [], [], 10)
        if answer_or_ok(first) == b"":
            return False
        assert answer_or_ok(right if first is left else left) == b"ok\n"
        return True


def answer_or_ok(sock: socket.socket) -> bytes:
    """What a client reads first, if anything before the end."""
    try:
        return sock.recv(3)
    except ConnectionError:
        return b""


def wait_for_waiting(service: Service, count: int) -> None:
    wait_until(lambda: service.row("current")[1] == count, what=f"{count} wait")


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_bounds_are_for_whom_the_proxy_names(
    any_relay_factory: Callable[..., Service], header: Callable[[str], bytes], stack: contextlib.ExitStack
) -> None:
    relay = any_relay_factory(*trusting(8), "--proxy-protocol")
    held = [stack.enter_context(waiting(relay.port, ATTACKER, header=header)) for _ in range(30)]
    turned_away = wait_until(lambda: [sock for sock in held if not is_open(sock)], what="somebody is turned away")
    wait_until(lambda: 14 <= len([sock for sock in held if not is_open(sock)]) <= 22, what="most are")
    assert all(answer(sock) == b"" for sock in turned_away)
    assert meets(relay.port, HONEST, header)
    assert meets(relay.port, "2001:db8::7", header)
    for sock in held:
        sock.close()
    wait_until(lambda: meets(relay.port, ATTACKER, header), what="places are given back")
    assert {record["mood"] for record in relay.records()} <= {"happy", "lonely"}


def test_ipv6_clients_count_by_their_network_and_mapped_ones_as_ipv4(tmp_path: Path) -> None:
    with Relay(tmp_path, *HEADERS_ONLY, recording=True) as relay, contextlib.ExitStack() as stack:
        for last in range(BOUND):
            stack.enter_context(waiting(relay.port, f"2001:db8:1:2::{last + 1}"))
            stack.enter_context(waiting(relay.port, f"::ffff:{ATTACKER}"))
        wait_for_waiting(relay, 2 * BOUND)
        assert not meets(relay.port, "2001:db8:1:2:ffff::1")
        assert not meets(relay.port, ATTACKER)
        assert meets(relay.port, "2001:db8:1:3::1")


def test_a_header_may_come_in_any_pieces(relay_factory: Callable[..., Relay]) -> None:
    relay = relay_factory(*trusting(1000), "--proxy-protocol")
    token, side = new_token(), new_side()
    for header in (line(HONEST), binary(HONEST, b"\x04\x00\x03abc"), binary("2001:db8::1")):
        partner = called(relay.port, header + handshake(token, new_side()))
        said = header + handshake(token, side)
        with partner, called(relay.port, *(said[at : at + 1] for at in range(len(said)))) as sock:
            assert read_exactly(sock, 3) == read_exactly(partner, 3) == b"ok\n"
            sock.sendall(b"hello")
            assert read_exactly(partner, 5) == b"hello"
    said = line(HONEST) + handshake(new_token())
    for at in range(len(said)):
        with called(relay.port, said[:at], said[at:]) as sock:
            assert is_open(sock)


FLAWED = {
    "none": (handshake("0" * 64),),
    "garbage": (b"\x00\x01\x02",),
    "wrong in version 1": (b"PROXY TCP4 1.2.3.4 1.2.3.4.5 1 2\r\n",),
    "wrong in version 2": (_SIGNATURE + b"\x21\x11\x00\x01",),
    "too long in version 1": (b"PROXY UNKNOWN " + b"x" * 200,),
    "too long in version 2": (_SIGNATURE + b"\x21\x11\xff\xff",),
    "left in the middle": (line(HONEST)[:20], b""),
    "too late": (line(HONEST)[:-1],),
    "missing and too late": (),
}


@pytest.mark.parametrize("said", FLAWED.values(), ids=FLAWED)
def test_a_header_that_is_none_closes_the_connection_without_a_word_and_without_a_record(
    any_relay_factory: Callable[..., Service], said: tuple[bytes, ...]
) -> None:
    relay = any_relay_factory(*TRUSTING, "--proxy-protocol", "--handshake-timeout", "0.5")
    for _ in range(3):
        with called(relay.port, *said) as sock:
            if said[-1:] == (b"",):
                sock.shutdown(socket.SHUT_WR)
            assert answer(sock) == b""
    assert meets(relay.port, HONEST)
    assert [record["mood"] for record in relay.wait_for_records(1)] == ["happy"]
    assert len(relay.wait_for_rows("usage", 1)) == 1
    relay.stop()
    told = [int(count) for count in re.findall(r"PROXY header was .*\((\d+) since", relay.log_text())]
    assert sum(told) == 3
    assert len(told) <= 4, "a line a minute for each worker, and one at the end"


def test_who_is_not_trusted_is_turned_away_with_a_header_and_counts_for_itself(
    any_relay_factory: Callable[..., Service],
) -> None:
    relay = any_relay_factory("--trusted-proxies", "192.0.2.1,::5", "--proxy-protocol")
    for header in (line(HONEST), binary(HONEST)):
        with called(relay.port, header + handshake(new_token())) as sock:
            assert answer(sock) == b"bad handshake\n"
    assert [record["mood"] for record in relay.wait_for_records(2)] == ["errory"] * 2
    honest_transfer(relay.port)


def test_without_proxy_protocol_a_header_may_be_missing(any_relay_factory: Callable[..., Service]) -> None:
    relay = any_relay_factory(*TRUSTING)
    honest_transfer(relay.port)
    assert meets(relay.port, HONEST)
    with called(relay.port, b"P", b"R", b"please") as sock:
        assert answer(sock) == b"bad handshake\n"
    assert sorted(record["mood"] for record in relay.wait_for_records(3)) == ["errory", "happy", "happy"]


# WebSocket


def upgrade(*fields: str) -> bytes:
    """The head of a request for WebSocket."""
    rest = "".join(f"{field}\r\n" for field in fields)
    return (
        "GET / HTTP/1.1\r\nHost: relay.example.org\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{rest}\r\n"
    ).encode()


def waiting_on_web(port: int, *fields: str, header: bytes = b"", token: str | None = None) -> socket.socket:
    """A WebSocket client behind the proxy, which waits, or was turned away."""
    said = Sent(BINARY, handshake(token or new_token(), new_side())).wire
    return called(port, header + upgrade(*fields) + said)


def is_let_in(sock: socket.socket) -> bool:
    """Whether it was not turned away before it was upgraded."""
    return answer_or_ok(sock) == b"HTT"


FORWARDED = {
    "by nginx": f"X-Forwarded-For: {ATTACKER}",
    "with a lie before it": f"X-Forwarded-For: {HONEST}, {ATTACKER}",
    "with another trusted proxy behind it": f"X-Forwarded-For: {ATTACKER}, 127.0.0.9",
    "with a port": f"X-Forwarded-For: {ATTACKER}:4711",
}


@pytest.mark.parametrize("shape", ["one-worker", "two-workers"])
@pytest.mark.parametrize("field", FORWARDED.values(), ids=FORWARDED)
def test_on_websocket_bounds_are_for_the_last_address_that_no_proxy_has(
    tmp_path: Path, stack: contextlib.ExitStack, shape: str, field: str
) -> None:
    relay = stack.enter_context(relay_of(shape, tmp_path, *HEADERS_ONLY, *web_options()))
    workers = len(relay.pids)
    port = web_port(relay)
    held = [stack.enter_context(waiting_on_web(port, field)) for _ in range(12)]
    let_in = [is_let_in(sock) for sock in held].count(True)
    assert BOUND <= let_in <= BOUND * workers
    assert is_let_in(stack.enter_context(waiting_on_web(port, f"X-Forwarded-For: {HONEST}")))


def test_on_websocket_a_header_may_be_there_or_not(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    relay = stack.enter_context(Relay(tmp_path, *HEADERS_ONLY, *web_options(), recording=True))
    port = web_port(relay)
    named = [stack.enter_context(waiting_on_web(port, header=line(ATTACKER))) for _ in range(BOUND + 1)]
    assert [is_let_in(sock) for sock in named] == [True] * BOUND + [False]
    # The proxy that named it is not trusted by another, whose field it may have invented.
    lie = waiting_on_web(port, f"X-Forwarded-For: {HONEST}", header=line(ATTACKER))
    assert not is_let_in(stack.enter_context(lie))
    # One that is trusted has been called by somebody else.
    behind = waiting_on_web(port, f"X-Forwarded-For: {HONEST}", header=line("127.0.0.9"))
    assert is_let_in(stack.enter_context(behind))
    # Before the request nobody knows who it is, but for what a header has said.
    silent = [stack.enter_context(called(port, line(HONEST))) for _ in range(BOUND)]
    wait_until(lambda: not is_open(silent[-1]), what="the last one has no place")
    assert answer(silent[-1]) == b""
    assert all(map(is_open, silent[:-1]))


@pytest.mark.parametrize("begins", ["P", "PR"])
def test_what_only_looked_like_a_header_is_http(tmp_path: Path, begins: str) -> None:
    with Relay(tmp_path, *HEADERS_ONLY, *web_options(), recording=True) as relay:
        with called(web_port(relay), begins.encode(), b"OST / HTTP/1.1\r\n\r\n") as sock:
            said = answer(sock)
        assert said.startswith((b"HTTP/1.1 405 ", b"HTTP/1.1 400 "))


@pytest.mark.parametrize("options", [HEADERS_ONLY, TRUSTING], ids=["headers required", "headers optional"])
def test_one_port_takes_all(tmp_path: Path, stack: contextlib.ExitStack, options: tuple[str, ...]) -> None:
    port = free_port()
    endpoint = f"tcp:{port}:interface=127.0.0.1"
    relay = stack.enter_context(Relay(tmp_path, *options, "--websocket", endpoint, port=port, recording=True))
    plain = options is TRUSTING
    with called(port, handshake(new_token())) as sock:
        time.sleep(0.1)
        assert is_open(sock) is plain
    assert meets(port, HONEST)
    held = [stack.enter_context(waiting(port, ATTACKER)) for _ in range(BOUND)]
    wait_until(lambda: relay.row("current")[1] == BOUND, what="they wait")
    assert all(map(is_open, held))
    for sock in (
        waiting_on_web(port, f"X-Forwarded-For: {ATTACKER}"),
        waiting_on_web(port, header=binary(ATTACKER)),
    ):
        assert not is_let_in(stack.enter_context(sock))
    assert is_let_in(stack.enter_context(waiting_on_web(port, f"X-Forwarded-For: {HONEST}")))


def test_who_is_not_trusted_forwards_for_nobody(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    bounds = ("--trusted-proxies", "192.0.2.1", "--max-per-source", str(BOUND))
    relay = stack.enter_context(Relay(tmp_path, *bounds, *web_options(), recording=True))
    port = web_port(relay)
    held = [stack.enter_context(waiting_on_web(port, f"X-Forwarded-For: 192.0.2.{n}")) for n in range(BOUND + 1)]
    assert [is_let_in(sock) for sock in held].count(True) == BOUND


# Moving house


def test_whom_a_client_counts_for_moves_house_with_it(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    relay = stack.enter_context(Workers(tmp_path, *HEADERS_ONLY, *web_options(), count=1))
    tokens = [new_token() for _ in range(BOUND - 1)]
    held = [stack.enter_context(waiting(relay.port, ATTACKER, token)) for token in tokens]
    one = stack.enter_context(waiting(relay.port, HONEST, tokens[0]))
    assert read_exactly(held[0], 3) == read_exactly(one, 3) == b"ok\n"
    other = stack.enter_context(waiting(relay.port, HONEST, tokens[0]))  # or it might be the one that is met
    on_web = stack.enter_context(waiting_on_web(web_port(relay), f"X-Forwarded-For: {ATTACKER}"))
    assert is_let_in(on_web)
    relay.start_one()
    assert relay.stop_one(0) == 0
    assert is_open(other)
    relay.start_one()  # and what has come from the one that has left counts again
    assert relay.stop_one(2) == 0
    with waiting(relay.port, ATTACKER) as sock:
        assert answer(sock) == b"", "it has its share still: one in a transfer, one that waits, one on WebSocket"
    held[0].sendall(b"still here")
    assert read_exactly(one, 10) == b"still here"
    held[0].close()
    one.close()
    wait_until(lambda: meets_or_waits(relay.port), what="its place is given back")


def meets_or_waits(port: int) -> bool:
    with waiting(port, ATTACKER) as sock:
        time.sleep(0.1)
        return is_open(sock)


@pytest.mark.parametrize("cut", [1, 5, 20, 30, len(line(HONEST)) - 1, len(line(HONEST))])
def test_a_header_that_has_come_in_part_moves_house(tmp_path: Path, stack: contextlib.ExitStack, cut: int) -> None:
    relay = stack.enter_context(Workers(tmp_path, *HEADERS_ONLY, *web_options(), count=1))
    token = new_token()
    said = line(HONEST) + handshake(token, new_side())
    on_web = line(HONEST) + upgrade() + Sent(BINARY, handshake(token, new_side())).wire
    plain = stack.enter_context(called(relay.port, said[:cut]))
    web = stack.enter_context(called(web_port(relay), on_web[:cut]))
    time.sleep(0.2)
    relay.start_one()
    assert relay.stop_one(0) == 0
    plain.sendall(said[cut:])
    web.sendall(on_web[cut:])
    assert read_exactly(plain, 3) == b"ok\n"
    assert is_let_in(web)


# Health checks


CHECKS: dict[str, Callable[[int], None]] = {
    "connect and close": lambda port: connect(port).close(),
    "connect and reset": lambda port: reset(connect(port)),
    "half-close": lambda port: half_close(port),
    "LOCAL": lambda port: called(port, LOCAL).close(),
    "LOCAL and reset": lambda port: reset(called(port, LOCAL)),
    "LOCAL and a question": lambda port: called(port, LOCAL + b"please?\n").close(),
    "the proxy's own address": lambda port: called(port, line("127.0.0.1")).close(),
    "another proxy's address": lambda port: called(port, binary("127.0.0.9")).close(),
    "UNKNOWN": lambda port: called(port, b"PROXY UNKNOWN\r\n").close(),
}


def half_close(port: int) -> None:
    with connect(port) as sock:
        sock.shutdown(socket.SHUT_WR)
        read_to_end(sock)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_two_hundred_health_checks_of_a_trusted_proxy_leave_no_row_and_no_line(
    any_relay_factory: Callable[..., Service], check: Callable[[int], None]
) -> None:
    relay = any_relay_factory("--trusted-proxies", "127.0.0.1", "--proxy-protocol")
    for _ in range(200):
        check(relay.port)
    assert meets(relay.port, HONEST)
    assert [record["mood"] for record in relay.wait_for_records(1)] == ["happy"]
    assert len(relay.wait_for_rows("usage", 1)) == 1
    relay.stop()
    assert "PROXY header" not in relay.log_text()


def test_who_the_proxy_names_and_says_nothing_is_on_record(any_relay_factory: Callable[..., Service]) -> None:
    relay = any_relay_factory("--trusted-proxies", "127.0.0.1", "--proxy-protocol")
    for header in (line(HONEST), binary(HONEST)):
        called(relay.port, header).close()
    assert [record["mood"] for record in relay.wait_for_records(2)] == ["errory"] * 2


def test_a_transfer_of_the_proxy_s_own_is_on_record(any_relay_factory: Callable[..., Service]) -> None:
    relay = any_relay_factory("--trusted-proxies", "127.0.0.1", "--proxy-protocol")
    token = new_token()
    with called(relay.port, LOCAL + handshake(token)) as left, called(relay.port, LOCAL + handshake(token)) as right:
        assert read_exactly(left, 3) == read_exactly(right, 3) == b"ok\n"
    assert [record["mood"] for record in relay.wait_for_records(1)] == ["happy"]


def get(port: int) -> None:
    with called(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
        assert answer(sock).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("trusted", ["127.0.0.1", "192.0.2.1"], ids=["trusted", "not trusted"])
def test_two_hundred_gets_on_websocket_leave_no_row_and_no_line(tmp_path: Path, trusted: str) -> None:
    with Relay(tmp_path, "--trusted-proxies", trusted, *web_options(), recording=True) as relay:
        port = web_port(relay)
        for _ in range(200):
            get(port)
        honest_transfer(relay.port)
        assert [record["mood"] for record in relay.wait_for_records(1)] == ["happy"]
        assert len(relay.wait_for_rows("usage", 1)) == 1


STRANGER = "198.51.100.9"


@pytest.mark.parametrize("check", ["connect and close", "connect and reset", "LOCAL", "UNKNOWN"])
def test_two_hundred_checks_of_a_stranger_are_on_record_as_before(tmp_path: Path, check: str) -> None:
    if reason := namespaces.not_allowed():
        pytest.skip(reason)
    with namespaces.three_hosts("relay.test") as network:
        options = ("--trusted-proxies", STRANGER, "--proxy-protocol", "--max-new-per-source", "100000")
        with Relay(tmp_path, *options, interface="0.0.0.0", inside=network.relay.inside, recording=True) as relay:
            address = (network.relay_address, relay.port)
            for _ in range(200):
                sock = network.clients[0].make_there(lambda: socket.create_connection(address, 10))
                if check in ("LOCAL", "UNKNOWN"):
                    sock.sendall(LOCAL if check == "LOCAL" else b"PROXY UNKNOWN\r\n")
                    assert answer(sock) == b"bad handshake\n"
                if check == "connect and reset":
                    reset(sock)
                else:
                    sock.close()
            assert [record["mood"] for record in relay.wait_for_records(200)] == ["errory"] * 200


# The real ones


def connections_made() -> int:
    """How many TCP connections have come, to anybody, as /proc/net/snmp counts them. HAProxy's `check` resets before
    it has sent the last packet of the handshake (AttemptFails), unless it has something to say (PassiveOpens)."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")]
    counts = dict(zip(*lines, strict=True))
    return int(counts["PassiveOpens"]) + int(counts["AttemptFails"])


@needs_haproxy
@pytest.mark.alone  # it counts all connections of the machine
@pytest.mark.parametrize("way", ["check", "send-proxy check check-send-proxy", "send-proxy-v2 check check-send-proxy"])
def test_two_hundred_real_checks_of_haproxy_leave_no_row_and_no_line(tmp_path: Path, way: str) -> None:
    options = ("--trusted-proxies", "127.0.0.1")
    with Relay(tmp_path, *options, recording=True) as relay:
        with haproxy(tmp_path, free_port(), f"127.0.0.1:{relay.port} {way} inter 10"):
            before = connections_made()
            wait_until(lambda: connections_made() >= before + 200, 60, "two hundred checks")
        assert meets(relay.port, HONEST)
        assert [record["mood"] for record in relay.wait_for_records(1)] == ["happy"]
        assert len(relay.wait_for_rows("usage", 1)) == 1
        relay.stop()
        assert "PROXY header" not in relay.log_text()


@contextlib.contextmanager
def behind_haproxy(relay: Service, folder: Path, port: int, way: str) -> Iterator[None]:
    with haproxy(folder, port, f"127.0.0.1:{relay.port} {way} check check-send-proxy inter 50"):
        wait_until(lambda: accepts(port), 20, "HAProxy listens")
        yield


@needs_haproxy
@pytest.mark.parametrize("way", ["send-proxy", "send-proxy-v2 proxy-v2-options crc32c,unique-id"])
def test_behind_haproxy_each_client_has_its_share_and_checks_leave_nothing(
    tmp_path: Path, stack: contextlib.ExitStack, way: str
) -> None:
    # The proxy is trusted, the clients' addresses are not, though they are of this machine.
    options = ("--trusted-proxies", "127.0.0.1", "--proxy-protocol", "--max-per-source", str(BOUND))
    relay = stack.enter_context(Relay(tmp_path, *options, recording=True))
    port = free_port()
    stack.enter_context(behind_haproxy(relay, tmp_path, port, way))
    held = [stack.enter_context(connect(port, source="127.0.0.66")) for _ in range(BOUND + 2)]
    for sock in held:
        sock.sendall(handshake(new_token(), new_side()))
    wait_until(lambda: [is_open(sock) for sock in held].count(False) == 2, what="two have no place")
    with connect(port, source="127.0.0.7") as left, connect(port, source="127.0.0.7") as right:
        shake_hands(left, right)
    with connect(port, source="127.0.0.7") as sock:
        sock.sendall(b"garbage")
        assert read_to_end(sock) == b"bad handshake\n"
    moods = sorted(record["mood"] for record in relay.wait_for_records(2))
    assert moods == ["errory", "happy"]


@needs_nginx
def test_behind_nginx_each_client_has_its_share(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    options = ("--trusted-proxies", "127.0.0.1", "--proxy-protocol", "--max-per-source", str(BOUND))
    relay = stack.enter_context(Relay(tmp_path, *options, recording=True))
    port = free_port()
    stack.enter_context(nginx(tmp_path, port, f"127.0.0.1:{relay.port}"))
    wait_until(lambda: accepts(port), 20, "nginx listens")
    held = [stack.enter_context(connect(port, source="127.0.0.66")) for _ in range(BOUND + 2)]
    for sock in held:
        sock.sendall(handshake(new_token(), new_side()))
    wait_until(lambda: [is_open(sock) for sock in held].count(False) == 2, what="two have no place")
    with connect(port, source="127.0.0.7") as left, connect(port, source="127.0.0.7") as right:
        shake_hands(left, right)


@needs_haproxy
@pytest.mark.parametrize("way", ["send-proxy", "send-proxy-v2 proxy-v2-options crc32c,unique-id"])
def test_behind_haproxy_each_websocket_client_has_its_share(
    tmp_path: Path, stack: contextlib.ExitStack, way: str
) -> None:
    options = ("--trusted-proxies", "127.0.0.1", "--max-per-source", str(BOUND))
    relay = stack.enter_context(Relay(tmp_path, *options, *web_options(), recording=True))
    port = free_port()
    stack.enter_context(haproxy(tmp_path, port, f"127.0.0.1:{web_port(relay)} {way}"))
    wait_until(lambda: accepts(port), 20, "HAProxy listens")
    said = upgrade() + Sent(BINARY, handshake(new_token(), new_side())).wire
    let_in = []
    for _ in range(BOUND + 2):
        sock = stack.enter_context(connect(port, source="127.0.0.66"))
        sock.sendall(said)
        let_in.append(is_let_in(sock))
    assert let_in.count(True) == BOUND
    sock = stack.enter_context(connect(port, source="127.0.0.7"))
    sock.sendall(said)
    assert is_let_in(sock)

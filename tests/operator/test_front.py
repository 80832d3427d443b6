"""etc/haproxy/relay-gevent.cfg as it is shipped, before relays and a gateway on one other host: who may have what of
the front, and what it thinks of a relay that is full, and of one that is gone.

    front   192.0.2.1, and all addresses of clients ---- machines   192.0.2.11 and .12
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.support.harness import (
    CHECKOUT,
    Relay,
    handshake,
    new_side,
    new_token,
    read_exactly,
    read_to_end,
    running,
    wait_until,
)
from tests.support.hostile import beside
from tests.support.machines import HEALTH_PORT, TCP_PORT, TLS_PORT, WEB_HEALTH_PORT, WEB_PORT
from tests.support.namespaces import Host, not_allowed, run_ip
from tests.support.page import Page
from tests.support.proxies import HAPROXY, make_certificate, needs_haproxy, needs_openssl, state_of

pytestmark = [
    needs_haproxy,
    needs_openssl,
    pytest.mark.skipif(bool(not_allowed()), reason=not_allowed()),
]

FRONT, RELAYS = "192.0.2.1", ("192.0.2.11", "192.0.2.12")
FLOOD, HONEST = "198.51.100.9", "203.0.113.1"
IPV6 = ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "2002:c633:6409::1", "2002:c633:6409:1::1")
SHARE = 6
"""What a source may have where a test does not have so many connections as the file allows."""


@dataclass
class Front:
    """A front that runs, its host, that of the machines behind it, and where its files are."""

    host: Host
    machines: Host
    folder: Path

    @property
    def control(self) -> Path:
        """Its stats socket."""
        return self.folder / "front.sock"

    def dial(self, source: str = HONEST, port: int = TCP_PORT, to: str = FRONT, seconds: float = 15) -> socket.socket:
        """A connection from an address; every call on it fails after so many seconds."""
        there = ("::1" if ":" in source else to, port)
        return self.host.make_there(lambda: socket.create_connection(there, seconds, (source, 0)))

    def try_to_dial(self, stack: contextlib.ExitStack, source: str, port: int = TCP_PORT) -> socket.socket | None:
        """The same; None if it is refused at once."""
        try:
            return stack.enter_context(self.dial(source, port))
        except ConnectionError:
            return None

    def meet(self, stack: contextlib.ExitStack, source: str = HONEST) -> tuple[socket.socket, socket.socket]:
        """Two sides who were told ok."""
        first, second = (stack.enter_context(self.dial(source)) for _ in range(2))
        token = new_token()
        for side in (first, second):
            side.sendall(handshake(token, new_side()))
        assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"
        return first, second


@pytest.fixture
def front_factory(tmp_path: Path, stack: contextlib.ExitStack) -> Callable[..., Front]:
    """Start a front, as shipped but for what is given as changes; it waits for nobody."""
    make_certificate(tmp_path)
    prefix = f"rg{secrets.token_hex(4)}"
    host, machines = Host(f"{prefix}-front"), Host(f"{prefix}-machines")
    for one in (host, machines):
        stack.callback(one.remove)
        one.create()
    run_ip("-n", host.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", machines.name)
    for one, addresses in ((host, [FRONT]), (machines, RELAYS[::-1])):
        for address in addresses:
            run_ip("-n", one.name, "address", "add", f"{address}/24", "dev", "eth0")
        run_ip("-n", one.name, "link", "set", "eth0", "up")
    for address in (FLOOD, HONEST):
        run_ip("-n", host.name, "address", "add", f"{address}/32", "dev", "lo")
    for address in IPV6:
        run_ip("-n", host.name, "address", "add", f"{address}/128", "dev", "lo", "nodad")

    def start(*changes: tuple[str, str]) -> Front:
        text = (CHECKOUT / "etc" / "haproxy" / "relay-gevent.cfg").read_text()
        front = Front(host, machines, tmp_path)
        for old, new in (
            ("/run/haproxy/relay-gevent.sock", str(front.control)),
            ("/etc/haproxy/relay.example.org.pem", str(tmp_path / "both.pem")),
            *changes,
        ):
            assert old in text, old
            text = text.replace(old, new)
        configuration = tmp_path / "front.cfg"
        configuration.write_text(text)
        command = [*host.inside, HAPROXY, "-db", "-L", "front1", "-f", str(configuration)]
        stack.enter_context(running(command, tmp_path / "front.log"))
        wait_until(front.control.exists, 20, "the front runs")
        return front

    return start


def small(maxconn: int, share: int = 1000, rate: int = 500) -> list[tuple[str, str]]:
    """What to change for a front that has room for fewer."""
    return [
        ("maxconn 20000", f"maxconn {maxconn}"),
        ("sc0_conn_cur gt 1000", f"sc0_conn_cur gt {share}"),
        ("sc0_conn_rate gt 500", f"sc0_conn_rate gt {rate}"),
    ]


@contextlib.contextmanager
def relay_at(front: Front, number: int, *options: str) -> Iterator[Relay]:
    """A relay behind the front, as docs/machines.md has it, once the front has found it."""
    folder = front.folder / f"relay{number}"
    folder.mkdir()
    options = ("--trusted-proxies", FRONT, "--proxy-protocol", "--health", str(HEALTH_PORT), "--grace", "0", *options)
    with Relay(folder, *options, port=TCP_PORT, interface=RELAYS[number - 1], inside=front.machines.inside) as relay:
        wait_until(lambda: state_of(front.control, f"relay{number}") == "UP", 20, "the front has found it")
        yield relay


@contextlib.contextmanager
def gateway_at(front: Front) -> Iterator[None]:
    """A gateway behind the front, found by it."""
    folder = front.folder / "gateway"
    folder.mkdir()
    options = ["--websocket", str(WEB_PORT), "--upstream", f"{FRONT}:{TCP_PORT}", "--send-proxy", "--grace", "0"]
    options += ["--trusted-proxies", FRONT, "--health", str(WEB_HEALTH_PORT)]
    with Relay(folder, *options, port=TCP_PORT, interface=RELAYS[0], inside=front.machines.inside):
        wait_until(lambda: state_of(front.control, "gateway1") == "UP", 20, "the front has found it")
        yield


def kept(socks: Sequence[socket.socket | None]) -> int:
    """How many of these connections, on which nobody speaks, have not been ended by now."""
    ended = select.poll()
    living = [sock for sock in socks if sock is not None]
    for sock in living:
        ended.register(sock, select.POLLIN)
    return len(living) - len(ended.poll(0))


def wait_until_kept(socks: Sequence[socket.socket | None], wanted: int) -> None:
    """Return once so many are left, and it stays at that for a moment."""
    wait_until(lambda: kept(socks) <= wanted, 5, f"no more than {wanted} of {len(socks)} are left")
    time.sleep(0.3)
    assert kept(socks) == wanted


def test_one_source_with_silent_connections_keeps_nobody_out(
    front_factory: Callable[..., Front], stack: contextlib.ExitStack
) -> None:
    front = front_factory(*small(1200))
    with relay_at(front, 1), gateway_at(front):
        for port in (TCP_PORT, TLS_PORT):
            for _ in range(700):
                front.try_to_dial(stack, FLOOD, port)
        began = time.monotonic()
        front.meet(stack)
        stack.enter_context(Page.over_tls(front.dial(HONEST, TLS_PORT), front.folder / "cert.pem"))
        assert time.monotonic() - began < 9, "before the front has ended the silent ones"
        wait_until_kept([front.try_to_dial(stack, FLOOD)], 0)  # it has had its share


def test_who_is_silent_or_does_not_finish_is_sent_away_by_the_front(front_factory: Callable[..., Front]) -> None:
    front = front_factory(
        *small(100), ("inspect-delay 10s", "inspect-delay 1s"), ("timeout http-request 10s", "timeout http-request 1s"),
        ("timeout client 10s", "timeout client 1s"),
    )  # fmt: skip
    with relay_at(front, 1) as relay:
        for port, said in (
            (TCP_PORT, b""),
            (TCP_PORT, b"please relay 0123"),
            (TLS_PORT, b""),
            (TLS_PORT, b"\x16\x03\x01"),
        ):
            with front.dial(port=port, seconds=5) as sock:
                sock.sendall(said)
                assert read_to_end(sock) == b""
        with front.dial() as sock:
            sock.sendall(b"please relax")
            assert read_exactly(sock, 14) == b"bad handshake\n"
        assert relay.process.poll() is None


@pytest.mark.parametrize("port", [TCP_PORT, TLS_PORT])
@pytest.mark.parametrize(
    ("sources", "shares"),
    [
        pytest.param((FLOOD, HONEST), 2, id="two IPv4 addresses"),
        pytest.param((IPV6[0], IPV6[1]), 1, id="two addresses of one IPv6 network"),
        pytest.param((IPV6[0], IPV6[2]), 2, id="two IPv6 networks"),
        pytest.param((IPV6[3], IPV6[4]), 1, id="two networks of one IPv4 address in 6to4"),
    ],
)
def test_a_source_is_an_ipv4_address_or_an_ipv6_network(
    front_factory: Callable[..., Front], stack: contextlib.ExitStack, port: int, sources: tuple[str, ...], shares: int
) -> None:
    front = front_factory(*small(100, SHARE))
    socks = [front.try_to_dial(stack, sources[number % 2], port) for number in range(4 * SHARE)]
    wait_until_kept(socks, shares * SHARE)


@pytest.mark.parametrize("port", [TCP_PORT, TLS_PORT])
def test_the_networks_of_one_ipv6_site_are_bounded_together_too(
    front_factory: Callable[..., Front], stack: contextlib.ExitStack, port: int
) -> None:
    front = front_factory(*small(100, SHARE), ("sc1_conn_cur gt 4000", f"sc1_conn_cur gt {SHARE + 2}"))
    socks = [front.try_to_dial(stack, (IPV6[0], IPV6[2])[number % 2], port) for number in range(4 * SHARE)]
    wait_until_kept(socks, SHARE + 2)
    wait_until_kept([front.try_to_dial(stack, IPV6[3], port)], 1)


def test_a_source_may_come_so_often_and_no_more(
    front_factory: Callable[..., Front], stack: contextlib.ExitStack
) -> None:
    front = front_factory(*small(100, rate=SHARE))
    for _ in range(SHARE):
        front.dial(FLOOD).close()
    # One of its threads may take the next one before another has counted all of these.
    more = [front.try_to_dial(stack, FLOOD) for _ in range(SHARE)]
    wait_until(lambda: kept(more) < SHARE, 5, "one that is too many is ended")
    wait_until_kept([front.try_to_dial(stack, FLOOD)], 0)
    wait_until_kept([front.try_to_dial(stack, HONEST)], 1)


def test_who_comes_through_a_gateway_counts_as_whom_it_names(
    front_factory: Callable[..., Front], stack: contextlib.ExitStack
) -> None:
    front = front_factory(*small(100, SHARE))

    def call(named: str) -> socket.socket:
        there = (FRONT, TCP_PORT)
        sock = front.machines.make_there(lambda: socket.create_connection(there, 10, (RELAYS[0], 0)))
        stack.enter_context(sock)
        words = f"TCP6 {named} ::1" if ":" in named else f"TCP4 {named} {FRONT}"
        sock.sendall(f"PROXY {words} 1 2\r\n".encode())
        return sock

    wait_until_kept([call(f"10.0.0.{number}") for number in range(3 * SHARE)], 3 * SHARE)
    wait_until_kept([call("10.1.1.1") for _ in range(2 * SHARE)], SHARE)
    wait_until_kept([call(f"2001:db8:5:6::{number}") for number in range(2 * SHARE)], SHARE)


def test_a_client_of_the_gateways_own_machine_is_served(
    front_factory: Callable[..., Front], stack: contextlib.ExitStack
) -> None:
    front = front_factory(*small(100))
    with relay_at(front, 1), gateway_at(front):
        address = (RELAYS[0], WEB_PORT)
        sides = []
        token = new_token()
        for _ in range(2):
            sock = front.machines.make_there(lambda: socket.create_connection(address, 10, (RELAYS[0], 0)))
            sides.append(stack.enter_context(Page(sock)))
            sides[-1].send(handshake(token, new_side()))
        assert [side.recv() for side in sides] == [b"ok\n"] * 2


def test_who_waits_gets_keepalives_from_the_front(
    front_factory: Callable[..., Front], stack: contextlib.ExitStack
) -> None:
    front = front_factory(*small(100))
    with relay_at(front, 1):
        stack.enter_context(front.dial()).sendall(handshake(new_token(), new_side()))
        command = [*front.host.inside, "ss", "-Htno", "state", "established", "sport", "=", f":{TCP_PORT}"]

        def kept_alive() -> list[str]:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            return [line for line in said.splitlines() if HONEST in line and "timer:(keepalive,5" in line]

        wait_until(kept_alive, what="the front will ask within a minute")


def go_on(front: Front, stack: contextlib.ExitStack) -> Callable[[], bool]:
    """Two transfers that move something all the time; returns what tells whether both have, in the last second."""
    moved: dict[socket.socket, float] = {}

    def send(sender: socket.socket, over: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.05):
                sender.sendall(b"x" * 20_000)

    def receive(receiver: socket.socket, over: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while not over.is_set() and receiver.recv(1 << 16):
                moved[receiver] = time.monotonic()

    for _ in range(2):
        sender, receiver = front.meet(stack)
        stack.enter_context(beside(partial(send, sender)))
        stack.enter_context(beside(partial(receive, receiver)))
    return lambda: len(moved) == 2 and min(moved.values()) > time.monotonic() - 1


def test_a_relay_that_is_full_is_not_taken_for_dead_and_its_transfers_go_on(
    front_factory: Callable[..., Front], stack: contextlib.ExitStack
) -> None:
    front = front_factory(*small(1000))
    # Its listen queue is to be full, too: of 4096 connections, or as many as the machine allows.
    allowed = ["sh", "-c", "echo 16 >/proc/sys/net/core/somaxconn"]
    subprocess.run([*front.machines.inside, *allowed], timeout=20, check=True)
    with relay_at(front, 1, "--max-connections", "4", "--max-per-source", "4"), contextlib.ExitStack() as there:
        both_go_on = go_on(front, there)
        for _ in range(60):
            newcomer = there.enter_context(front.dial())
            newcomer.sendall(handshake(new_token(), new_side()))

        def is_full() -> bool:
            try:
                front.dial(FRONT, to=RELAYS[0], seconds=0.5).close()
            except TimeoutError:
                return True
            return False

        wait_until(is_full, 10, "nobody gets through to the relay's port")
        began = time.monotonic()
        while time.monotonic() - began < 6:  # it was taken for dead within 4
            assert both_go_on()
            assert state_of(front.control, "relay1") == "UP"
            time.sleep(0.2)
        assert is_full()


def test_transfers_of_a_machine_that_has_vanished_end_and_newcomers_are_served_by_another(
    front_factory: Callable[..., Front], stack: contextlib.ExitStack
) -> None:
    front = front_factory(*small(1000))
    with relay_at(front, 1), contextlib.ExitStack() as there:
        sides = front.meet(there)
        with relay_at(front, 2):
            # Nobody answers there any more, not even to say that nobody listens.
            run_ip("-n", front.machines.name, "address", "delete", f"{RELAYS[0]}/24", "dev", "eth0")
            wait_until(lambda: state_of(front.control, "relay1") == "DOWN", 10, "the front has noticed")
            assert [read_to_end(side) for side in sides] == [b"", b""]
            for _ in range(8):  # wherever their tokens would lead
                front.meet(there)

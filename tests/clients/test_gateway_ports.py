"""A gateway (`--upstream`) on a machine with few ports: what a client that leaves costs, and what is said when none is
left."""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.clients.upstream import Address, lacks_port
from tests.clients.test_gateway import UPGRADE, UPGRADED
from tests.support.client_frames import BINARY, CLOSE, Sent
from tests.support.harness import Relay, connect, handshake, new_side, new_token, read_exactly, read_to_end, wait_until
from tests.support.namespaces import Host, not_allowed

PORTS = 10
RELAY, WEB = 4101, 4102
OWN = itertools.count(20_000)  # ports of the clients' own, so that they take none of the gateway's
IN_TIME_WAIT = "06"  # TCP_TIME_WAIT in /proc/net/tcp, see proc_net_tcp(5)
RESET = struct.pack("ii", 1, 0)

pytestmark = pytest.mark.skipif(bool(not_allowed()), reason=not_allowed())


@pytest.fixture
def host() -> Iterator[Host]:
    """A host with so many ports, each of which is used again after a minute, also towards itself."""
    host = Host(f"rg{new_side()}")
    settings = f"echo 40000 {40_000 + PORTS - 1} >ip_local_port_range; echo 0 >tcp_tw_reuse"
    try:
        host.create()
        command = [*host.inside, "sh", "-c", f"cd /proc/sys/net/ipv4; {settings}"]
        subprocess.run(command, timeout=20, check=True)
        yield host
    finally:
        host.remove()


@pytest.fixture
def relay(host: Host, tmp_path: Path) -> Iterator[Relay]:
    """A relay there."""
    with Relay(tmp_path, port=RELAY, interface="0.0.0.0", inside=host.inside, recording=True) as relay:
        yield relay


@contextlib.contextmanager
def gateway_to(host: Host, folder: Path, *addresses: str) -> Iterator[Relay]:
    """A gateway there that leads to the relay, by these addresses of it."""
    upstream = ",".join(f"{address}:{RELAY}" for address in addresses)
    options = ("--websocket", f"tcp:{WEB}:interface=127.0.0.1", "--upstream", upstream)
    with Relay(folder, *options, port=WEB, inside=host.inside, name="gateway") as gateway:
        yield gateway


def come(host: Host, line: bytes) -> socket.socket:
    """A client of the gateway that has said this."""

    def dial() -> socket.socket:
        return socket.create_connection(("127.0.0.1", WEB), 10, ("127.0.0.2", next(OWN)))

    sock = host.make_there(dial)
    sock.sendall(UPGRADE)
    assert read_exactly(sock, len(UPGRADED)) == UPGRADED
    sock.sendall(Sent(BINARY, line).wire)
    return sock


def waiting(relay: Relay) -> int:
    return int(relay.row("current")[1])


def close_of(sock: socket.socket) -> int:
    """The code of the Close that is all the client is told."""
    frame = read_to_end(sock, 10)
    assert frame[:1] == b"\x88"
    return int.from_bytes(frame[2:4], "big")


def in_time_wait(host: Host) -> int:
    """How many connections to the relay are kept by whoever ended them."""
    command = [*host.inside, "cat", "/proc/net/tcp"]
    table = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    lines = [line.split() for line in table.splitlines()[1:]]
    return sum(remote.endswith(f":{RELAY:04X}") and state == IN_TIME_WAIT for _, _, remote, state, *_ in lines)


@pytest.mark.parametrize("how", ["ends its stream", "says Close", "resets"])
def test_who_leaves_before_its_partner_came_keeps_no_port_of_the_gateway(
    host: Host, relay: Relay, tmp_path: Path, how: str
) -> None:
    with gateway_to(host, tmp_path, "127.0.0.1"):
        for number in range(1, PORTS + 3):
            with come(host, handshake(new_token(), new_side())) as client:
                wait_until(lambda: waiting(relay) == 1, what="it waits upstream")
                if how == "says Close":
                    client.sendall(Sent(CLOSE, b"\x03\xe8").wire)
                    assert close_of(client) == 1000
                if how == "resets":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            relay.wait_for_records(number)
            wait_until(lambda: waiting(relay) == 0, what="the next one is not taken for this one")
        assert in_time_wait(host) == 0
    assert {record["mood"] for record in relay.records()} == {"lonely"}


def test_what_a_client_has_sent_before_it_leaves_arrives(host: Host, relay: Relay, tmp_path: Path) -> None:
    token = new_token()
    with gateway_to(host, tmp_path, "127.0.0.1"), host.make_there(lambda: connect(RELAY)) as other:
        other.sendall(handshake(token, new_side()))
        wait_until(lambda: waiting(relay) == 1, what="it waits")
        with come(host, handshake(token, new_side())) as client:
            assert read_exactly(other, 3) == b"ok\n"
            assert read_exactly(client, 5) == b"\x82\x03ok\n"  # unread, it would make a reset of the end of its stream
            client.sendall(Sent(BINARY, bytes(100_000)).wire)
        assert read_to_end(other, 10) == bytes(100_000)
    assert [record["mood"] for record in relay.wait_for_records(1)] == ["happy"]


def test_who_speaks_too_early_and_leaves_is_known_for_it(host: Host, relay: Relay, tmp_path: Path) -> None:
    with gateway_to(host, tmp_path, "127.0.0.1"):
        with come(host, handshake(new_token(), new_side())) as client:
            wait_until(lambda: waiting(relay) == 1, what="it waits upstream")
            client.sendall(Sent(BINARY, b"too early").wire)
        (record,) = relay.wait_for_records(1)
        assert record["mood"] == "errory"


def test_without_a_port_clients_are_told_to_try_again_the_log_says_why_and_the_upstream_is_not_to_blame(
    host: Host, relay: Relay, tmp_path: Path
) -> None:
    with gateway_to(host, tmp_path, "127.0.0.1") as gateway, contextlib.ExitStack() as stack:

        def one_more() -> socket.socket:
            return stack.enter_context(come(host, handshake(new_token(), new_side())))

        carried = [one_more() for _ in range(PORTS)]
        wait_until(lambda: waiting(relay) == PORTS, what="as many wait upstream as there are ports")
        for _ in range(2):
            assert close_of(one_more()) == 1013
        carried[0].close()
        wait_until(lambda: waiting(relay) == PORTS - 1, what="one has left")
        one_more()
        wait_until(lambda: waiting(relay) == PORTS, 3, "its port is used at once, and the upstream is not avoided")
    counted = [line for line in gateway.log_text().splitlines() if "no port left for a connection" in line]
    assert sum(int(line.rpartition("(")[2].split()[0]) for line in counted) == 2
    assert "no address of it could be reached" not in gateway.log_text()


def test_each_further_address_of_the_upstream_is_as_many_ports_more(host: Host, relay: Relay, tmp_path: Path) -> None:
    with gateway_to(host, tmp_path, "127.0.0.1", "127.0.0.3"), contextlib.ExitStack() as stack:
        for _ in range(2 * PORTS):
            stack.enter_context(come(host, handshake(new_token(), new_side())))
        wait_until(lambda: waiting(relay) == 2 * PORTS, what="twice as many wait upstream")
        assert close_of(stack.enter_context(come(host, handshake(new_token(), new_side())))) == 1013


def test_an_address_that_there_is_no_way_to_lacks_no_port() -> None:
    refused = OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
    assert lacks_port(refused, Address(socket.AF_INET, ("127.0.0.1", 9)))
    assert not lacks_port(OSError(errno.ECONNREFUSED, "Connection refused"), Address(socket.AF_INET, ("127.0.0.1", 9)))
    assert not lacks_port(refused, Address(socket.AF_INET, ("255.255.255.255", 9)))

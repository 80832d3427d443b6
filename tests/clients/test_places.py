"""Whose a connection is, by the socket that it has."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import psutil
import pytest

from relay.clients.door import open_port
from relay.clients.places import is_own
from tests.support.harness import connect

OWN = sorted(
    address.address
    for addresses in psutil.net_if_addrs().values()
    for address in addresses
    if address.family in (socket.AF_INET, socket.AF_INET6) and not address.address.startswith("fe80:")
)


@pytest.fixture(params=["::", "0.0.0.0"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """The relay's port, for both families and for IPv4."""
    with open_port(request.param, 0) as listener:
        listener.setblocking(True)
        listener.settimeout(5)
        yield listener


def test_whoever_calls_an_address_of_this_machine_from_this_machine_is_its_own(listener: socket.socket) -> None:
    hosts = [host for host in OWN if listener.family == socket.AF_INET6 or ":" not in host]
    assert "127.0.0.1" in hosts
    for host in hosts:
        with connect(listener.getsockname()[1], host):
            sock, address = listener.accept()
            with sock:
                assert is_own(address[0], sock)
                assert is_own(host, sock)  # as a proxy may name it, who knows nothing of mapped addresses
                for other in ("192.0.2.7", "::ffff:192.0.2.7", "2001:db8::7", "64:ff9b::127.0.0.1", "2002:7f00:1::"):
                    assert not is_own(other, sock)


def test_a_connection_that_has_gone_is_nobodys(listener: socket.socket) -> None:
    sock = socket.socket()
    sock.close()
    assert not is_own("192.0.2.7", sock)
    assert is_own("::ffff:127.0.0.1", sock)

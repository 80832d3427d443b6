"""A connection of this machine's own that never says a byte is a health check: nobody's mood, and on no record."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import namespaces
from tests.support.harness import Relay, Service, connect, read_to_end, reset
from tests.support.hostile import honest_transfer


def closes(sock: socket.socket) -> None:
    """As HAProxy's `check` does, or a load balancer's."""
    sock.close()


def half_closes(sock: socket.socket) -> None:
    """And reads what is said then."""
    sock.shutdown(socket.SHUT_WR)
    assert read_to_end(sock) in (b"", b"bad handshake\n")
    sock.close()


WAYS = {"closes": closes, "resets": reset, "half-closes": half_closes}


@pytest.mark.parametrize("way", WAYS)
def test_a_check_from_this_machine_leaves_no_record(any_relay: Service, way: str) -> None:
    for _ in range(20):
        WAYS[way](connect(any_relay.port))
    honest_transfer(any_relay.port)
    assert [record["mood"] for record in any_relay.wait_for_records(1)] == ["happy"]
    assert len(any_relay.wait_for_rows("usage", 1)) == 1


def test_a_check_that_holds_on_until_it_is_turned_away_leaves_no_record(tmp_path: Path) -> None:
    with Relay(tmp_path, "--handshake-timeout", "0.5", recording=True) as relay, connect(relay.port) as sock:
        assert read_to_end(sock) == b"bad handshake\n"
        honest_transfer(relay.port)
        assert [record["mood"] for record in relay.wait_for_records(1)] == ["happy"]


def test_one_that_has_said_a_byte_is_on_record(relay: Relay) -> None:
    sock = connect(relay.port)
    sock.sendall(b"p")
    time.sleep(0.1)
    sock.close()
    assert [record["mood"] for record in relay.wait_for_records(1)] == ["errory"]


@pytest.mark.parametrize("way", WAYS)
def test_every_address_of_this_machine_is_its_own_and_no_other_is(tmp_path: Path, way: str) -> None:
    if reason := namespaces.not_allowed():
        pytest.skip(reason)
    with namespaces.three_hosts("relay.test") as network, contextlib.ExitStack() as stack:
        relay = stack.enter_context(Relay(tmp_path, interface="0.0.0.0", recording=True, inside=network.relay.inside))

        def dial(host: namespaces.Host, address: str) -> Callable[[], socket.socket]:
            return lambda: host.make_there(lambda: connect(relay.port, address))

        own = [network.relay_address, network.client_addresses[0].rsplit(".", 1)[0] + ".1"]
        for address in own:
            WAYS[way](dial(network.relay, address)())
        for client in network.clients:
            WAYS[way](dial(client, network.relay_address)())
        assert [record["mood"] for record in relay.wait_for_records(2)] == ["errory"] * 2
        time.sleep(0.3)
        assert len(relay.records()) == 2

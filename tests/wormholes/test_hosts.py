"""Real clients on hosts of their own, where only the relay can bring their bytes across."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.harness import Relay, wait_until
from tests.support.namespaces import Network, not_allowed, three_hosts
from tests.support.wormholes import (
    PUBLIC_RELAY,
    PUBLIC_RELAY_PORT,
    RECEIVERS,
    SENDERS,
    Surroundings,
    happy_ones,
    mailbox_server,
    skip_unless_installed,
    transfer,
)

MAILBOX_PORT = 4000
FILE_BYTES = int(os.environ.get("RELAY_TESTS_FILE_MB", "100")) * 1_000_000


@dataclass(frozen=True)
class Place:
    """The network with its relay and its mailbox server running."""

    network: Network
    relay: Relay

    def client(self, number: int) -> Surroundings:
        """Return what client `number` has to be told."""
        address = self.network.relay_address
        inside = self.network.clients[number].inside
        return Surroundings(mailbox=(address, MAILBOX_PORT), relay=(address, PUBLIC_RELAY_PORT), inside=inside)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Three hosts; on the middle one the relay, on all addresses as by default, and a mailbox server."""
    reason = not_allowed()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    with three_hosts(PUBLIC_RELAY) as network:
        inside = network.relay.inside
        with (
            mailbox_server(folder, MAILBOX_PORT, "0.0.0.0", inside),
            Relay(folder, port=PUBLIC_RELAY_PORT, interface="::", inside=inside, recording=True) as relay,
        ):
            yield Place(network, relay)


def test_the_two_clients_cannot_reach_each_other(place: Place) -> None:
    connecting = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    for here, there in ((0, 1), (1, 0)):
        for address, port, reachable in (
            (place.network.relay_address, MAILBOX_PORT, True),
            (place.network.client_addresses[there], PUBLIC_RELAY_PORT, False),
        ):
            command = [*place.network.clients[here].inside, sys.executable, "-c", connecting, address, str(port)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            assert (done.returncode == 0) is reachable, done.stderr
            assert reachable or "Network is unreachable" in done.stderr


@pytest.mark.parametrize("receiver", list(RECEIVERS))
@pytest.mark.parametrize("sender", list(SENDERS))
def test_a_file_crosses_only_through_the_relay(place: Place, tmp_path: Path, sender: str, receiver: str) -> None:
    skip_unless_installed(sender, receiver)
    before = len(place.relay.records())
    transfer(tmp_path, sender, receiver, sending=place.client(0), receiving=place.client(1), size=FILE_BYTES)
    (happy,) = wait_until(lambda: happy_ones(place.relay, before), what="the record of the transfer")
    assert happy["total_bytes"] >= FILE_BYTES
    assert happy["waiting_time"] is not None
    sql = "SELECT bytes FROM usage WHERE result = 'happy' AND bytes = ?"
    wait_until(lambda: place.relay.query(sql, happy["total_bytes"]), what="its row")

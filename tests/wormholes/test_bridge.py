"""Real clients, one of which reaches the relay only over WebSocket, through a bridge on its own host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, Relay, running, wait_until
from tests.support.namespaces import NETNS_FILES, not_allowed, run_ip, three_hosts
from tests.support.wormholes import (
    PUBLIC_RELAY,
    PUBLIC_RELAY_PORT,
    Surroundings,
    happy_ones,
    mailbox_server,
    skip_unless_installed,
    transfer,
)
from tests.wormholes.test_hosts import FILE_BYTES, MAILBOX_PORT

WEB_PORT = 4002
WEB_ADDRESS = "192.0.2.2"
"""The relay's host has this address, too: for WebSocket, and for the mailbox server."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Relay, Surroundings, Surroundings]]:
    """The relay; a client that has no way to its TCP port, but a bridge; and one that knows only that."""
    if reason := not_allowed():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("bridge")
    with three_hosts(PUBLIC_RELAY) as network:
        inside = network.relay.inside
        run_ip("-n", network.relay.name, "address", "add", f"{WEB_ADDRESS}/32", "dev", "lo")
        for client, gateway in zip(network.clients, ("198.51.100.1", "203.0.113.1"), strict=True):
            run_ip("-n", client.name, "route", "add", f"{WEB_ADDRESS}/32", "via", gateway)
        bridged, plain = network.clients
        run_ip("-n", bridged.name, "route", "delete", f"{network.relay_address}/32")
        # One name for both, which each tells the other: here it is the bridge, and there the relay itself.
        hosts = NETNS_FILES / bridged.name / "hosts"
        hosts.write_text(hosts.read_text().replace(network.relay_address, "127.0.0.1"))
        web = ["--websocket", f"tcp:{WEB_PORT}:interface={WEB_ADDRESS}"]
        bridge = [
            sys.executable,
            "-m",
            "tests.support.bridge",
            str(PUBLIC_RELAY_PORT),
            f"ws://{WEB_ADDRESS}:{WEB_PORT}/",
        ]
        log = folder / "bridge.log"
        mailbox, named = (WEB_ADDRESS, MAILBOX_PORT), (PUBLIC_RELAY, PUBLIC_RELAY_PORT)
        address, port = network.relay_address, PUBLIC_RELAY_PORT
        with (
            mailbox_server(folder, MAILBOX_PORT, "0.0.0.0", inside),
            Relay(folder, *web, port=port, interface=address, inside=inside, recording=True) as relay,
            running([*bridged.inside, *bridge], log, cwd=CHECKOUT),
        ):
            wait_until(lambda: "ready" in log.read_text(), 20, f"the bridge is ready, see {log}")
            yield (
                relay,
                Surroundings(mailbox, relay=named, inside=bridged.inside),
                Surroundings(mailbox, relay=named, inside=plain.inside),
            )


@pytest.mark.parametrize(("sender", "receiver"), [(0, 1), (1, 0)], ids=["from the bridge", "to the bridge"])
@pytest.mark.parametrize("other", ["wormhole-william", "magic-wormhole"])
def test_a_file_crosses_between_websocket_and_tcp(
    place: tuple[Relay, Surroundings, Surroundings], tmp_path: Path, sender: int, receiver: int, other: str
) -> None:
    skip_unless_installed(other)
    relay, *around = place
    clients = ("magic-wormhole", other)
    before = len(relay.records())
    sending, receiving = around[sender], around[receiver]
    transfer(tmp_path, clients[sender], clients[receiver], sending=sending, receiving=receiving, size=FILE_BYTES)
    (happy,) = wait_until(lambda: happy_ones(relay, before), what="the record of the transfer")
    assert happy["total_bytes"] >= FILE_BYTES

"""Real clients on loopback. With no direct connection offered, magic-wormhole's own run everywhere; wormhole-william,
which always offers one, runs on a machine that has no address besides loopback, made with unshare(1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import Relay, Service, free_port, wait_until
from tests.support.namespaces import NotAllowed, machine_without_network
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

FILE_BYTES = 3_000_000
RACING = ("wormhole-william", "magic-wormhole")


def assert_one_happy_transfer(relay: Service, size: int) -> None:
    (happy,) = wait_until(lambda: happy_ones(relay), what="the record of the transfer")
    assert happy["total_bytes"] >= size
    sql = "SELECT bytes FROM usage WHERE result = 'happy'"
    assert [row["bytes"] for row in wait_until(lambda: relay.query(sql), what="its row")] == [happy["total_bytes"]]


def test_a_file_goes_through_the_relay_when_nobody_listens(any_relay: Service, tmp_path: Path) -> None:
    with mailbox_server(tmp_path, free_port(), "127.0.0.1") as mailbox:
        around = Surroundings(mailbox=mailbox, relay=("127.0.0.1", any_relay.port), listen=False)
        client = "magic-wormhole"
        transfer(tmp_path, client, client, sending=around, receiving=around, size=FILE_BYTES)
    assert_one_happy_transfer(any_relay, FILE_BYTES)


def test_a_file_of_one_byte_goes_through_the_relay_when_nobody_listens(relay: Relay, tmp_path: Path) -> None:
    with mailbox_server(tmp_path, free_port(), "127.0.0.1") as mailbox:
        around = Surroundings(mailbox=mailbox, relay=("127.0.0.1", relay.port), listen=False)
        transfer(tmp_path, "magic-wormhole", "magic-wormhole", sending=around, receiving=around, size=1)
    assert_one_happy_transfer(relay, 1)


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[list[str]]:
    """What to put before a command so that it runs on a machine without a network."""
    try:
        with machine_without_network(tmp_path, {PUBLIC_RELAY: "127.0.0.1"}) as inside:
            yield inside
    except NotAllowed as refused:
        pytest.skip(str(refused))


# wormhole-william 1.0.6 as the sender closes its own connection in one transfer of five, with the Twisted relay too,
# when magic-wormhole meets it at the relay at once, as it does here; with addresses to try first it comes later, so
# tests/wormholes/test_hosts.py has that pair.
@pytest.mark.parametrize(
    ("sender", "receiver"),
    [(sender, receiver) for sender in SENDERS for receiver in RECEIVERS if (sender, receiver) != RACING],
)
def test_a_file_goes_through_the_relay_on_a_machine_without_network(
    inside: list[str], tmp_path: Path, sender: str, receiver: str
) -> None:
    skip_unless_installed(sender, receiver)
    address = ("127.0.0.1", PUBLIC_RELAY_PORT)
    with (
        Relay(tmp_path, port=PUBLIC_RELAY_PORT, inside=inside, recording=True) as relay,
        mailbox_server(tmp_path, 4000, "127.0.0.1", inside) as mailbox,
    ):
        around = Surroundings(mailbox=mailbox, relay=address, inside=inside, listen=False)
        transfer(tmp_path, sender, receiver, sending=around, receiving=around, size=FILE_BYTES)
        assert_one_happy_transfer(relay, FILE_BYTES)

"""A relay on two machines behind two HAProxies, as shipped: everybody meets, whatever is drained, upgraded or dies."""

from __future__ import annotations

import csv
import io
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from websockets.exceptions import InvalidState

from tests.support.harness import handshake, new_side, new_token, read_exactly, wait_until
from tests.support.machines import CLIENTS, FRONTS, RELAYS, Machines, address_of, machines
from tests.support.namespaces import not_allowed
from tests.support.page import Page
from tests.support.proxies import needs_haproxy, needs_openssl
from tests.support.wormholes import (
    PUBLIC_RELAY,
    PUBLIC_RELAY_PORT,
    RECEIVERS,
    SENDERS,
    Surroundings,
    mailbox_server,
    skip_unless_installed,
    transfer,
)
from tests.wormholes.test_hosts import FILE_BYTES, MAILBOX_PORT

pytestmark = [needs_haproxy, needs_openssl]

_NOISE = random.Random(1).randbytes(1 << 20)


class Side:
    """One client, over TCP or over WebSocket and TLS."""

    def __init__(self, whole: Machines, client: str, front: str, *, web: bool) -> None:
        self.front = front
        self.web = web
        self._heard = b""
        self._line: Page | socket.socket = whole.dial_web(client, front) if web else whole.dial(client, front)

    def say(self, words: bytes) -> None:
        """Send."""
        if isinstance(self._line, Page):
            self._line.send(words)
        else:
            self._line.sendall(words)

    def hear(self, count: int) -> bytes:
        """Exactly so many bytes; AssertionError or OSError when there are not."""
        if not isinstance(self._line, Page):
            return read_exactly(self._line, count)
        while len(self._heard) < count:
            self._heard += self._line.recv()
        heard, self._heard = self._heard[:count], self._heard[count:]
        return heard

    def close(self) -> None:
        """Hang up."""
        self._line.close()


class Transfer:
    """Two sides, from any hosts, through any fronts, the first of them over the gateway if `web`."""

    def __init__(self, whole: Machines, number: int, fronts: tuple[str, ...] = FRONTS) -> None:
        self._whole = whole
        self._fronts = fronts
        self._token = new_token()
        self.sides: list[Side] = []
        self.web = number % 3 == 0

    def call(self) -> None:
        """One more side comes."""
        web = self.web and not self.sides
        side = Side(self._whole, random.choice(CLIENTS), random.choice(self._fronts), web=web)
        self.sides.append(side)
        side.say(handshake(self._token, new_side()))

    def meet(self) -> Transfer:
        """Both come, if they have not yet, and are told ok."""
        while len(self.sides) < 2:
            self.call()
        assert [side.hear(3) for side in self.sides] == [b"ok\n"] * 2
        return self

    def exchange(self, size: int = 50_000) -> Transfer:
        """Something goes there, and back."""
        first, second = self.sides
        for one, other in ((first, second), (second, first)):
            at = random.randrange(len(_NOISE) - size)
            one.say(_NOISE[at : at + size])
            assert other.hear(size) == _NOISE[at : at + size]
        return self

    def lives(self) -> bool:
        """Whether something still gets through; it is over otherwise."""
        try:
            self.exchange(100)
        except (OSError, AssertionError, InvalidState):
            self.close()
            return False
        return True

    @property
    def fronts(self) -> set[str]:
        """Through which it goes for sure; the gateway chooses for itself."""
        return {side.front for side in self.sides}

    def close(self) -> None:
        """Both hang up."""
        for side in self.sides:
            side.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Everything; the last test breaks some of it."""
    if reason := not_allowed():
        pytest.skip(reason)
    with machines(tmp_path_factory.mktemp("machines")) as whole:
        yield whole


def short(whole: Machines, count: int, fronts: tuple[str, ...] = FRONTS) -> int:
    """So many transfers from beginning to end, several at a time; returns how many there were."""

    def one(number: int) -> None:
        transfer = Transfer(whole, number, fronts)
        try:
            transfer.meet().exchange()
        finally:
            transfer.close()

    with ThreadPoolExecutor(12) as pool:
        return len(list(pool.map(one, range(count))))


def long(whole: Machines, count: int, fronts: tuple[str, ...] = FRONTS) -> list[Transfer]:
    """So many transfers that go on."""
    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(lambda number: Transfer(whole, number, fronts).meet().exchange(), range(count)))


def living(transfers: list[Transfer]) -> list[Transfer]:
    """Those that still go on."""
    with ThreadPoolExecutor(12) as pool:
        lives = list(pool.map(Transfer.lives, transfers))
    return [transfer for transfer, lived in zip(transfers, lives, strict=True) if lived]


def test_garbage_is_refused_at_once_and_a_handshake_may_come_in_pieces(whole: Machines) -> None:
    for said in (b"x", b"please relax", b"please relay xyz\n", b"\x00\xff", b"please relay " + b"a" * 63 + b"g"):
        with whole.dial("client1", "front1") as sock:
            sock.sendall(said)
            assert read_exactly(sock, 14) == b"bad handshake\n"  # within its ten seconds, of the front's thirty
    token = new_token()
    line = handshake(token, new_side())
    with whole.dial("client1", "front1") as one, whole.dial("client2", "front2") as other:
        for at in range(len(line)):
            one.sendall(line[at : at + 1])
            time.sleep(0.001)
        other.sendall(handshake(token, new_side()))
        assert read_exactly(one, 3) == read_exactly(other, 3) == b"ok\n"
    assert "relays" in whole.tell("front1", "show stat")


def test_both_sides_at_the_same_instant_through_different_fronts_meet(whole: Machines) -> None:
    def one(number: int) -> None:
        token = new_token()
        start = threading.Barrier(2)

        def side(client: str, front: str) -> bytes:
            with whole.dial(client, front) as sock:
                start.wait(10)
                sock.sendall(handshake(token, new_side()))
                return read_exactly(sock, 3)

        with ThreadPoolExecutor(2) as pair:
            assert list(pair.map(side, CLIENTS, FRONTS)) == [b"ok\n"] * 2

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(60)))


@pytest.mark.parametrize("receiver", RECEIVERS)
@pytest.mark.parametrize("sender", SENDERS)
def test_files_of_real_clients_cross_from_one_front_to_the_other(
    whole: Machines, tmp_path: Path, sender: str, receiver: str
) -> None:
    skip_unless_installed(sender, receiver)
    front = whole.hosts["front1"]
    with mailbox_server(tmp_path, MAILBOX_PORT, "0.0.0.0", front.inside):
        mailbox, relay = (address_of("front1"), MAILBOX_PORT), (PUBLIC_RELAY, PUBLIC_RELAY_PORT)
        sending, receiving = (Surroundings(mailbox, relay, whole.hosts[client].inside) for client in CLIENTS)
        transfer(tmp_path, sender, receiver, sending=sending, receiving=receiving, size=FILE_BYTES)
    wait_until(lambda: whole.bytes_recorded() >= FILE_BYTES, what="its row")


def test_all_meet_while_machines_and_fronts_are_drained_upgraded_and_die(whole: Machines) -> None:
    before = whole.moods()
    met = short(whole, 90)

    # A machine is drained: what is there goes on, who waits there is found, and nobody new comes.
    held = long(whole, 30)
    met += len(held)
    waiting = [Transfer(whole, number) for number in range(30)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(Transfer.call, waiting))
    sums = [relay.query("SELECT connected + waiting FROM current")[0][0] for relay in whole.relays.values()]
    wait_until(lambda: sum(map(whole.connected, RELAYS)) == len(held), what=f"all are on record: {sums}")
    whole.tell_all("set server relays/relay1 state drain")
    there_before = whole.connected("relay1")
    newcomers = long(whole, 30)
    met += len(newcomers)
    time.sleep(1.2)
    assert whole.connected("relay1") == there_before, "newcomers go to the other machine"
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(Transfer.meet, waiting))
    met += len(waiting)
    # Its workers are renewed under what is still there, and it comes back.
    for number in range(2):
        whole.relays["relay1"].start_one()
        assert whole.relays["relay1"].stop_one(number) == 0
        whole.gateways["relay1"].start_one()
        assert whole.gateways["relay1"].stop_one(number) == 0
    everybody = held + newcomers + waiting
    assert living(everybody) == everybody
    whole.tell_all("set server relays/relay1 state ready")
    met += short(whole, 60)

    # A front dies: only what went through it ends, and gateways use the other one.
    whole.fronts["front2"].send_signal(signal.SIGKILL)
    whole.fronts["front2"].wait(10)
    rest = living(everybody)
    unharmed = [one for one in everybody if one.fronts == {"front1"} and not one.web]
    assert unharmed
    assert set(unharmed) <= set(rest)
    assert not [one for one in rest if "front2" in one.fronts]
    met += short(whole, 30, ("front1",))
    rest += (more := long(whole, 30, ("front1",)))
    met += len(more)

    # A machine dies: only its own transfers end, and newcomers are served by the other one.
    wait_until(lambda: sum(map(whole.connected, RELAYS)) == len(rest), 20, "what has ended is on record")
    lost, there = whole.connected("relay1"), whole.connected("relay2")
    assert lost
    assert there
    for workers in (whole.relays["relay1"], whole.gateways["relay1"]):
        for worker in workers.living():
            worker.kill()
    for server in ("relay1", "gateway1"):
        wait_until(lambda server=server: whole.state("front1", server) == "DOWN", 20, "the front has noticed")  # type: ignore[misc]
    # Who came through the gateway of that machine is cut, too, wherever the transfer was.
    survivors = living(rest)
    assert len([one for one in rest if not one.web]) - lost <= len(survivors) <= there
    met += short(whole, 30, ("front1",))
    for survivor in survivors:
        survivor.close()

    # Each has one row, but for those that the machine took with it; and relay-usage adds up both.
    happy = before.get("happy", 0) + met - lost
    wait_until(lambda: whole.moods().get("happy", 0) >= happy, 20, f"{happy} rows: {whole.moods()}")
    assert whole.moods() == {**before, "happy": happy}
    rows = list(csv.DictReader(io.StringIO(whole.relay_usage())))
    assert [row["happy"] for row in rows if row["span"] == "all_time"] == [str(happy)]

"""When all places are taken, behind proxies: nobody gives way before it is known to whom, nor to one who may not stay.

Beside that, who gives way is as in `test_eviction`. The proxy is on this machine; clients are whom it names.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.clients.origins import MOST_UNNAMED
from tests.support.client_frames import BINARY, Sent
from tests.support.harness import CHECKOUT, Relay, connect, handshake, new_side, new_token, read_exactly, wait_until
from tests.support.hostile import answer, dial, is_open
from tests.support.web import web_options, web_port
from tests.transfer.test_eviction import BOUNDS, ENDED, FREE, MOST, SOME, let_in, trickling

ATTACKER, HONEST = "198.51.100.66", "203.0.113.{}"
TRUSTING = ("--trusted-proxies", "127.0.0.0/8", "--proxy-protocol")


def called(relay: Relay, host: str, said: bytes) -> socket.socket:
    """A client at `host`, whom the proxy names in a header, and who says this."""
    sock = connect(relay.port)
    family, here = ("TCP6", "::1") if ":" in host else ("TCP4", "127.0.0.1")
    sock.sendall(f"PROXY {family} {host} {here} 51234 4001\r\n".encode() + said)
    return sock


def called_on_web(relay: Relay, host: str, said: bytes) -> socket.socket:
    """The same over WebSocket, where the proxy names the client in X-Forwarded-For."""
    sock = connect(web_port(relay))
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    asked = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
    sock.sendall(f"GET / HTTP/1.1\r\n{asked}X-Forwarded-For: {host}\r\n\r\n".encode())
    sock.sendall(Sent(BINARY, said).wire)
    return sock


WAYS = {"in a header": called, "in X-Forwarded-For": called_on_web}


def waits(relay: Relay, host: str) -> socket.socket:
    """A client at `host` who waits for a partner that never comes."""
    return called(relay, host, handshake(new_token(), new_side()))


def meet(relay: Relay, host: str) -> tuple[socket.socket, socket.socket]:
    """Two sides at `host`, who have met; AssertionError if they do not."""
    token = new_token()
    first, second = (called(relay, host, handshake(token, new_side())) for _ in range(2))
    for sock in (first, second):
        sock.settimeout(25)
        assert read_exactly(sock, 3) == b"ok\n"
    return first, second


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [MOST, 30], ids=["as it has more than others", "as it has its share"])
def test_who_is_turned_away_drives_out_nobody(
    way: str, share: int, relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    bounds = (*FREE, "--max-connections", str(MOST), "--max-waiting", str(MOST), "--max-per-source", str(share))
    relay = relay_factory(*bounds, *TRUSTING, *web_options())
    waiting = [stack.enter_context(waits(relay, HONEST.format(number))) for number in range(MOST - 30)]
    moving = [meet(relay, ATTACKER) for _ in range(15)]
    for pair in moving:
        for sock in pair:
            stack.enter_context(sock)
    with trickling(moving, 0.3, SOME):
        more = [stack.enter_context(WAYS[way](relay, ATTACKER, handshake(new_token()))) for _ in range(3)]
        assert [answer(sock, 25) for sock in more] == [b""] * 3
        assert all(is_open(sock) for sock in waiting)
        for sock in meet(relay, HONEST.format(99)):
            stack.enter_context(sock)
        assert sum(not is_open(sock) for sock in waiting) == 2
    relay.stop()
    assert f"{ENDED}, of whoever had most, for new connections (2 since" in relay.log_text()


def test_of_a_site_the_network_that_has_most_gives_way_and_not_its_neighbours(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(*BOUNDS, *TRUSTING)
    neighbours = [stack.enter_context(waits(relay, f"2001:db8:0:{number + 1:x}::1")) for number in range(7)]
    others = [stack.enter_context(waits(relay, HONEST.format(number))) for number in range(21)]
    greedy = [stack.enter_context(waits(relay, f"2001:db8:0:ffff::{number + 1:x}")) for number in range(MOST - 28)]
    for sock in (*meet(relay, HONEST.format(99)), *meet(relay, "2001:db8:0:fff::1")):
        stack.enter_context(sock)
    assert all(is_open(sock) for sock in (*neighbours, *others))
    assert sum(not is_open(sock) for sock in greedy) == 4


def test_many_small_networks_of_a_site_give_way_before_a_neighbour_who_has_less_than_they_have_together(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(*FREE, *TRUSTING, *(f"--max-{what}=200" for what in ("connections", "waiting", "per-source")))
    neighbour = [stack.enter_context(waits(relay, "2001:db8:0:ffff::1")) for _ in range(18)]
    one = stack.enter_context(waits(relay, "2001:db8:0:fffe::1"))
    hosts = [f"2001:db8:0:{number // 7:x}::1" for number in range(181)]
    greedy = [stack.enter_context(waits(relay, host)) for host in hosts]
    for number in range(20):
        for sock in meet(relay, HONEST.format(number)):
            stack.enter_context(sock)
    assert all(is_open(sock) for sock in (one, *neighbour))
    assert sum(not is_open(sock) for sock in greedy) == 40


def test_whoever_has_most_gives_way_also_when_it_has_become_much_less(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(*FREE, *TRUSTING, *(f"--max-{what}=100" for what in ("connections", "waiting", "per-source")))
    others = [stack.enter_context(waits(relay, HONEST.format(number))) for number in range(36)]
    greedy = [stack.enter_context(waits(relay, f"198.51.100.{number % 2}")) for number in range(64)]
    for number in range(16):
        for sock in meet(relay, HONEST.format(100 + number)):
            stack.enter_context(sock)
    assert all(is_open(sock) for sock in others)
    assert sum(not is_open(sock) for sock in greedy) == 32


def test_nobody_gives_way_before_it_is_known_to_whom(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(*BOUNDS, *TRUSTING)
    waiting = [stack.enter_context(waits(relay, HONEST.format(number))) for number in range(MOST)]
    unnamed = [stack.enter_context(connect(relay.port)) for _ in range(MOST)]
    wait_until(
        lambda: sum(not is_open(sock) for sock in unnamed) == MOST - MOST_UNNAMED,
        what="too many say nothing",
        seconds=25,
    )
    assert [is_open(sock) for sock in unnamed] == [False] * (MOST - MOST_UNNAMED) + [True] * MOST_UNNAMED
    assert all(is_open(sock) for sock in waiting)
    for sock in meet(relay, HONEST.format(99)):
        stack.enter_context(sock)
    assert sum(not is_open(sock) for sock in waiting) == 2
    named = unnamed[-1]  # it has waited for as long as it liked, and comes in all the same
    named.sendall(f"PROXY TCP4 {HONEST.format(98)} 127.0.0.1 51234 4001\r\n".encode() + b"please relay")
    wait_until(lambda: sum(not is_open(sock) for sock in waiting) == 3, what="somebody gives way to it")
    assert is_open(named)


def test_those_who_were_sent_away_give_way_first_and_at_once(
    relay_factory: Callable[..., Relay], tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    patient = tmp_path / "patient"
    patient.mkdir()
    (patient / "sitecustomize.py").write_text("import relay.clients.farewell as it\nit.LINGER_SECONDS = 3600.0\n")
    relay = relay_factory(*BOUNDS, env={"PYTHONPATH": f"{patient}:{CHECKOUT}"})
    waiting = [stack.enter_context(dial(relay.port, f"127.9.0.{number + 1}")) for number in range(8)]
    for sock in waiting:
        sock.sendall(handshake(new_token(), new_side()))
    sent_away = [stack.enter_context(dial(relay.port)) for _ in range(2 * MOST)]  # the second half of them at once, too
    for sock in sent_away:
        sock.sendall(b"garbage")
    assert [answer(sock) for sock in sent_away] == [b"bad handshake\n"] * len(sent_away)
    let_in(relay.port, *(f"127.9.1.{number + 1}" for number in range(5)))
    assert all(is_open(sock) for sock in waiting)
    relay.stop()
    assert ENDED not in relay.log_text()
    assert f"left no time to read why to those who were sent away, for new connections ({MOST + 8 + 10} since" in (
        relay.log_text()
    )

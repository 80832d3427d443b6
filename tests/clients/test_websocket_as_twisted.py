"""What WebSocket clients may rely on with either relay: the same tests against this one, with one worker and two, and
against the Twisted relay. What only this relay does is in test_websocket_clients.py."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_web
from websockets.typing import Origin, Subprotocol

from tests.support.harness import (
    Relay,
    Workers,
    accepts,
    connect,
    free_port,
    handshake,
    new_side,
    new_token,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.twisted import transit_relay
from tests.support.web import dial_web, read_to_close, web_options, web_port

NOISE = random.Random(14).randbytes(300_017)


@dataclass(frozen=True)
class Ports:
    """Where a relay takes clients."""

    tcp: int
    web: int


@pytest.fixture(scope="module", params=["one-worker", "two-workers", "twisted"])
def ports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    """One relay of each kind for all tests here."""
    folder = tmp_path_factory.mktemp("relay")
    with contextlib.ExitStack() as stack:
        if request.param == "twisted":
            web = free_port()
            tcp = stack.enter_context(transit_relay(folder, "--websocket", f"tcp:{web}:interface=127.0.0.1"))
            wait_until(lambda: accepts(web), what="it takes WebSocket clients")
            yield Ports(tcp, web)
        else:
            service: Relay | Workers
            if request.param == "one-worker":
                service = stack.enter_context(Relay(folder, *web_options()))
            else:
                service = stack.enter_context(Workers(folder, *web_options(), count=2))
            yield Ports(service.port, web_port(service))


def lines() -> tuple[bytes, bytes]:
    """The handshakes of two that match."""
    token = new_token()
    return handshake(token, new_side()), handshake(token, new_side())


def wait(client: ClientConnection, line: bytes) -> None:
    """Say the line; returns when the relay has read it."""
    client.send(line)
    assert client.ping().wait(10), "a ping behind the line is answered"


@contextlib.contextmanager
def pair(ports: Ports) -> Iterator[tuple[ClientConnection, socket.socket]]:
    """A WebSocket client and one over TCP that have met."""
    one, other = lines()
    with dial_web(ports.web) as web, connect(ports.tcp) as tcp:
        wait(web, one)
        tcp.sendall(other)
        assert web.recv(10) == b"ok\n"
        assert read_exactly(tcp, 3) == b"ok\n"
        yield web, tcp


def read_content(web: ClientConnection, count: int) -> bytes:
    """So many bytes of payload; the Twisted relay's messages may be of any length."""
    received = b""
    while len(received) < count:
        message = web.recv(10)
        assert isinstance(message, bytes), "a text message"
        received += message
    return received


def close_code(client: ClientConnection) -> tuple[list[str | bytes], int | None]:
    """Every message up to the Close, and its code."""
    messages, close = read_to_close(client)
    return messages, None if close is None else close.code


@pytest.mark.parametrize("first_comes", ["web", "tcp"])
def test_a_websocket_client_and_one_over_tcp_are_glued(ports: Ports, first_comes: str) -> None:
    one, other = lines()
    with dial_web(ports.web) as web, connect(ports.tcp) as tcp:
        if first_comes == "web":
            wait(web, one)
            tcp.sendall(other)
        else:
            tcp.sendall(other)
            web.send(one)
        assert web.recv(10) == b"ok\n"
        assert read_exactly(tcp, 3) == b"ok\n"
        web.send(NOISE)
        assert read_exactly(tcp, len(NOISE)) == NOISE
        for at in range(0, len(NOISE), 30_000):  # of the Twisted relay's messages each is one read, of up to 64 KiB
            part = NOISE[at : at + 30_000]
            tcp.sendall(part)
            assert read_content(web, len(part)) == part


def test_two_websocket_clients_are_glued_and_fragments_are_bytes_like_others(ports: Ports) -> None:
    one, other = lines()
    with dial_web(ports.web) as left, dial_web(ports.web) as right:
        wait(left, one)
        right.send(other)
        assert left.recv(10) == right.recv(10) == b"ok\n"
        left.send([b"in ", b"three ", b"fragments"])
        assert read_content(right, 18) == b"in three fragments"
        right.send(NOISE[:30_000])
        assert read_content(left, 30_000) == NOISE[:30_000]


@pytest.mark.parametrize("sided", [True, False])
@pytest.mark.parametrize("newline", [True, False])
def test_the_line_may_lack_its_newline_and_a_side(ports: Ports, newline: bool, sided: bool) -> None:
    token = new_token()
    line = handshake(token, new_side() if sided else None)
    with dial_web(ports.web) as web, connect(ports.tcp) as tcp:
        wait(web, line if newline else line[:-1])
        tcp.sendall(handshake(token, new_side()))
        assert web.recv(10) == b"ok\n"


@pytest.mark.parametrize("line", [b"please relay nonsense\n", b"\0", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_handshake_is_refused_in_a_message_and_with_close_1000(ports: Ports, line: bytes) -> None:
    with dial_web(ports.web) as web:
        web.send(line)
        assert close_code(web) == ([b"bad handshake\n"], 1000)


def test_who_speaks_while_it_waits_is_impatient(ports: Ports) -> None:
    with dial_web(ports.web) as web:
        wait(web, lines()[0])
        web.send(b"too early")
        assert close_code(web) == ([b"impatient\n"], 1000)


def test_any_path_and_origin_is_accepted_and_nothing_that_is_offered_is_chosen(ports: Ports) -> None:
    url = f"ws://127.0.0.1:{ports.web}/under/a/path?and=more"
    origin, offered = Origin("https://elsewhere.example"), [Subprotocol("a"), Subprotocol("b")]
    with connect_web(url, origin=origin, subprotocols=offered, compression="deflate") as web:
        assert web.subprotocol is None
        assert web.protocol.extensions == []
        web.send(b"nonsense")
        assert web.recv(10) == b"bad handshake\n"


def test_pings_are_answered_in_a_pair(ports: Ports) -> None:
    with pair(ports) as (web, tcp):
        pong = web.ping(b"are you there?")
        tcp.sendall(b"hello")
        assert read_content(web, 5) == b"hello"
        assert pong.wait(10)


def test_the_end_of_a_partner_over_tcp_is_a_close_behind_its_last_words(ports: Ports) -> None:
    with pair(ports) as (web, tcp):
        tcp.sendall(NOISE[:30_000])
        tcp.shutdown(socket.SHUT_WR)
        messages, code = close_code(web)
        assert b"".join(map(bytes, messages)) == NOISE[:30_000]  # type: ignore[arg-type]
        assert code == 1000


def test_a_close_is_the_end_of_the_stream_behind_what_was_under_way(ports: Ports) -> None:
    one, other = lines()
    with dial_web(ports.web) as left, dial_web(ports.web) as right:
        wait(left, one)
        right.send(other)
        assert left.recv(10) == right.recv(10) == b"ok\n"
        left.send(b"last words")
        left.close()
        assert close_code(right) == ([b"last words"], 1000)


def test_a_spare_of_the_matched_side_is_told_goodbye(ports: Ports) -> None:
    token, side = new_token(), new_side()
    with dial_web(ports.web) as first, dial_web(ports.web) as last, connect(ports.tcp) as tcp:
        wait(first, handshake(token, side))
        wait(last, handshake(token, side))
        tcp.sendall(handshake(token, new_side()))
        assert read_exactly(tcp, 3) == b"ok\n"
        tcp.shutdown(socket.SHUT_WR)
        # Which of the two is the spare is the relay's choice.
        answers = sorted((close_code(client) for client in (first, last)), key=repr)
        assert answers == [([], 1000), ([b"ok\n"], 1000)]


def test_a_browsers_plain_request_is_answered(ports: Ports) -> None:
    with connect(ports.web) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: relay.example.org\r\n\r\n")
        assert read_to_end(sock).startswith(b"HTTP/1.1 200 ")

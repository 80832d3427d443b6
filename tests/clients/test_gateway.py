"""A gateway (`--upstream`): WebSocket clients become TCP clients of another relay."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from relay.clients.proxy_header import HeaderReader, ProxyHeader, write_proxy_header
from relay.clients.upstream import split_targets
from relay.mistakes import Mistake
from tests.support.client_frames import BINARY, Sent
from tests.support.command_line import run
from tests.support.harness import (
    Relay,
    Service,
    Workers,
    connect,
    free_port,
    handshake,
    new_side,
    new_token,
    read_exactly,
    read_to_end,
    relay_of,
    stopped,
    wait_until,
)
from tests.support.hostile import is_open
from tests.support.kernel_view import without_descriptors
from tests.support.web import dial_web, read_bytes, read_to_close, web_port

SHAPES = ["one-worker", "two-workers"]


class Gateways(Workers):
    """Workers of a gateway, which record nothing."""

    def __enter__(self) -> Gateways:
        super().__enter__()
        return self

    def __init__(self, folder: Path, *options: str, count: int = 2) -> None:
        folder.mkdir(exist_ok=True)
        port = free_port()
        endpoint = f"tcp:{port}:interface=127.0.0.1"
        super().__init__(folder, "--websocket", endpoint, *options, count=count, recording=False)


@dataclass
class Place:
    """A relay, and a gateway that leads to it."""

    relay: Service
    gateway: Gateways

    @property
    def port(self) -> int:
        """Where WebSocket clients come."""
        return web_port(self.gateway)


@pytest.fixture(params=SHAPES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """One of one worker that leads to one of one worker, and the same with two."""
    count = 1 + SHAPES.index(request.param)
    with (
        relay_of(request.param, tmp_path) as relay,
        Gateways(tmp_path / "gateway", "--upstream", f"127.0.0.1:{relay.port}", count=count) as gateway,
    ):
        yield Place(relay, gateway)


def lines() -> tuple[bytes, bytes]:
    token = new_token()
    return handshake(token, new_side()), handshake(token, new_side())


def test_a_page_and_a_tcp_client_meet_and_ok_is_a_message_of_its_own(place: Place) -> None:
    content = random.Random(3).randbytes(3_000_000)
    one, other = lines()
    with dial_web(place.port) as page, connect(place.relay.port) as client:
        page.send(one)
        wait_until(lambda: place.relay.row("current")[1] == 1, what="it waits upstream")
        client.sendall(other)
        assert read_exactly(client, 3) == b"ok\n"
        client.sendall(b"at once")
        assert page.recv(10) == b"ok\n"
        assert read_bytes(page, 7) == b"at once"
        there = threading.Thread(target=page.send, args=(content,))
        there.start()
        assert read_exactly(client, len(content)) == content
        there.join(20)
        client.sendall(content)
        assert read_bytes(page, len(content)) == content
        client.shutdown(socket.SHUT_WR)
        messages, told = read_to_close(page)
        assert (messages, told and told.code) == ([], 1000)
    (record,) = place.relay.wait_for_records(1)
    assert (record["mood"], record["total_bytes"]) == ("happy", 7 + 2 * len(content))


def test_two_pages_meet(place: Place) -> None:
    one, other = lines()
    with dial_web(place.port) as left, dial_web(place.port) as right:
        left.send(one)
        right.send(other.rstrip(b"\n"))  # the end of a message ends the line
        assert left.recv(10) == right.recv(10) == b"ok\n"
        left.send(b"hello")
        assert read_bytes(right, 5) == b"hello"
        left.close()
        assert read_to_close(right)[0] == []
    (record,) = place.relay.wait_for_records(1)
    assert (record["mood"], record["total_bytes"]) == ("happy", 5)


REFUSALS = {
    "bad handshake": ([b"please tell me\n"], b"bad handshake\n", None),
    "impatient": ([handshake("ab" * 32), b"too early"], b"impatient\n", "errory"),
}


@pytest.mark.parametrize("said", REFUSALS)
def test_refusals_arrive(place: Place, said: str) -> None:
    words, answer, mood = REFUSALS[said]
    with dial_web(place.port) as page:
        for word in words:
            page.send(word)
            time.sleep(0.2)
        messages, told = read_to_close(page)
        assert (b"".join(messages), told and told.code) == (answer, 1000)  # type: ignore[arg-type]
    if mood is None:
        assert place.relay.records() == []  # it never came so far
    else:
        assert [record["mood"] for record in place.relay.wait_for_records(1)] == [mood]


def test_who_leaves_while_it_waits_is_gone_upstream(place: Place) -> None:
    with dial_web(place.port) as page:
        page.send(lines()[0])
        wait_until(lambda: place.relay.row("current")[1] == 1, what="it waits upstream")
    assert [record["mood"] for record in place.relay.wait_for_records(1)] == ["lonely"]


def test_every_gateway_worker_is_restarted_and_nobody_notices(tmp_path: Path) -> None:
    size = 8_000_000
    content = random.Random(5).randbytes(size)
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(Workers(tmp_path, count=2))
        gateway = stack.enter_context(Gateways(tmp_path / "gateway", "--upstream", f"127.0.0.1:{relay.port}"))
        port = web_port(gateway)
        waiting_line, late_line = lines()
        waiting = stack.enter_context(dial_web(port))
        waiting.send(waiting_line)
        half_line, other_half = lines()
        half = stack.enter_context(dial_web(port))
        half.send(half_line[:40])
        one, other = lines()
        page, client = stack.enter_context(dial_web(port)), stack.enter_context(connect(relay.port, timeout=60))
        page.send(one)
        client.sendall(other)
        assert page.recv(10) == read_exactly(client, 3) == b"ok\n"

        def pour() -> None:
            for at in range(0, size, 100_000):
                page.send(content[at : at + 100_000])
                time.sleep(0.03)

        pouring = threading.Thread(target=pour)
        pouring.start()
        for number in range(2):
            gateway.start_one()
            assert gateway.stop_one(number) == 0
        assert read_exactly(client, size) == content
        pouring.join(30)
        half.send(half_line[40:])
        for line, came in ((late_line, waiting), (other_half, half)):
            late = stack.enter_context(connect(relay.port))
            late.sendall(line)
            assert read_exactly(late, 3) == came.recv(10) == b"ok\n"
        page.close()
        client.close()
        wait_until(lambda: [one for one in relay.records() if one["total_bytes"] == size], what="the record")
        handed = [line for line in gateway.log_text().splitlines() if "handed to worker" in line]
        assert handed


def test_a_client_that_is_being_connected_moves_house(tmp_path: Path) -> None:
    """The first upstream takes no connection, since its listen queue is full: whoever comes there waits."""
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(Relay(tmp_path, recording=True))
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        stuck = [stack.enter_context(socket.socket()) for _ in range(4)]
        for sock in stuck:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        upstream = f"127.0.0.1:{full.getsockname()[1]},127.0.0.1:{relay.port}"
        gateway = stack.enter_context(Gateways(tmp_path / "gateway", "--upstream", upstream, count=1))
        pages = [stack.enter_context(dial_web(web_port(gateway))) for _ in range(4)]
        pairs = [lines() for _ in range(4)]
        for page, (line, _) in zip(pages, pairs, strict=True):
            page.send(line)
        wait_until(lambda: relay.row("current")[1] >= 1, what="those whose turn it is wait")
        gateway.start_one()
        assert gateway.stop_one(0) == 0
        wait_until(lambda: relay.row("current")[1] == 4, 20, "everybody has found the one that answers")
        for page, (_, other) in zip(pages, pairs, strict=True):
            client = stack.enter_context(connect(relay.port))
            client.sendall(other)
            assert read_exactly(client, 3) == page.recv(10) == b"ok\n"


def test_an_upstream_that_refuses_late_is_passed_over_once(tmp_path: Path) -> None:
    """It takes no connection, as above, and is gone when it is asked again, a second later; so the time that was for it
    ends while the client is elsewhere."""
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(Relay(tmp_path, recording=True))
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        stuck = [stack.enter_context(socket.socket()) for _ in range(4)]
        for sock in stuck:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        upstream = f"127.0.0.1:{full.getsockname()[1]},127.0.0.1:{relay.port}"
        options = ("--upstream", upstream, "--handshake-timeout", "5")
        gateway = stack.enter_context(Gateways(tmp_path / "gateway", *options, count=1))
        pages = [stack.enter_context(dial_web(web_port(gateway))) for _ in range(6)]
        for page in pages:
            page.send(lines()[0])
        wait_until(lambda: relay.row("current")[1] == 3, what="those whose turn it is wait")
        full.close()
        wait_until(lambda: relay.row("current")[1] == 6, what="the others have been refused, and wait, too")
        silent = stack.enter_context(connect(web_port(gateway)))
        silent.sendall(b"GET")
        assert b" 408 " in read_to_end(silent)


def test_an_upstream_that_cannot_be_reached_is_passed_over(tmp_path: Path) -> None:
    with Relay(tmp_path, recording=True) as relay:
        upstream = f"127.0.0.1:{free_port()},127.0.0.1:{relay.port},[::1]:{free_port()}"
        with Gateways(tmp_path / "gateway", "--upstream", upstream, count=1) as gateway:
            for _ in range(6):
                one, other = lines()
                with dial_web(web_port(gateway)) as page, connect(relay.port) as client:
                    page.send(one)
                    client.sendall(other)
                    assert page.recv(10) == read_exactly(client, 3) == b"ok\n"


def test_when_none_can_be_reached_clients_are_told_to_try_again_and_the_log_says_so(tmp_path: Path) -> None:
    with Gateways(tmp_path / "gateway", "--upstream", f"127.0.0.1:{free_port()}", count=1) as gateway:
        for _ in range(3):
            with dial_web(web_port(gateway)) as page:
                page.send(lines()[0])
                messages, told = read_to_close(page)
                assert (messages, told and told.code) == ([], 1013)
        gateway.stop()
        counted = [line for line in gateway.log_text().splitlines() if "--upstream: turned away" in line]
        assert sum(int(line.rpartition("(")[2].split()[0]) for line in counted) == 3


def test_a_client_has_a_place_for_its_connection_upstream_when_it_is_let_in(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    most = 40
    with Relay(tmp_path, recording=True) as relay:
        options = ("--upstream", f"127.0.0.1:{relay.port}", "--max-connections", str(most))
        gateway = stack.enter_context(Gateways(tmp_path / "gateway", *options, count=1))
        coming = [stack.enter_context(connect(web_port(gateway))) for _ in range(most)]
        for sock in coming:
            sock.sendall(UPGRADE)
        let_in = wait_until(lambda: _spoken_to(coming, most // 2), what="half as many are let in")
        for sock in let_in:
            read_exactly(sock, len(UPGRADED))
            sock.sendall(Sent(BINARY, lines()[0]).wire)
        wait_until(lambda: relay.row("current")[1] == most // 2, what="all of them are carried")
        assert len(sockets_of(gateway.pids[0])) <= most + OWN_SOCKETS
        assert _spoken_to(coming, 0) == [], "nobody else was let in meanwhile, nor anybody sent away"
        for sock in let_in:
            sock.close()
        coming = [sock for sock in coming if sock not in let_in]
        wait_until(lambda: _spoken_to(coming, most // 2), what="the others are, when these have gone")


UPGRADE = (
    b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
UPGRADED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
OWN_SOCKETS = 10
"""What a worker has beside those of clients: where it listens, and its own log's and event loop's."""


def sockets_of(pid: int) -> list[str]:
    """The sockets that a process has."""
    names = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return [name for name in names if name.startswith("socket:")]


def _spoken_to(socks: list[socket.socket], least: int) -> list[socket.socket]:
    """Those to whom the gateway has said something, or whom it has ended; none before they are so many."""
    spoken_to = [sock for sock in socks if not is_open(sock)]
    return spoken_to if len(spoken_to) >= least else []


def test_clients_for_whom_no_descriptor_is_left_are_told_to_try_again_and_the_log_says_why(
    place: Place, stack: contextlib.ExitStack
) -> None:
    pages = [stack.enter_context(dial_web(place.port)) for _ in range(2)]
    for worker in place.gateway.living():
        stack.enter_context(without_descriptors(worker))
    for page in pages:
        page.send(lines()[0])
        _, told = read_to_close(page)
        assert told
        assert told.code == 1013
    place.gateway.stop()
    counted = [line for line in place.gateway.log_text().splitlines() if "no file descriptor was left for a" in line]
    assert sum(int(line.rpartition("(")[2].split()[0]) for line in counted) == 2
    assert "no address of it could be reached" not in place.gateway.log_text()


def test_a_relay_that_stands_still_holds_up_only_its_own(place: Place) -> None:
    with stopped(*place.relay.living()), dial_web(place.port) as page:
        page.send(lines()[0])
        # The kernel has taken the connection. Other clients of the gateway are served meanwhile.
        with dial_web(place.port) as other:
            other.send(b"garbage")
            assert read_to_close(other)[0] == [b"bad handshake\n"]
        with pytest.raises(TimeoutError):
            page.recv(0.3)


def test_with_send_proxy_the_bounds_are_for_the_pages_clients(tmp_path: Path) -> None:
    trusting = ("--trusted-proxies", "127.0.0.1", "--proxy-protocol", "--max-per-source", "2")
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(Relay(tmp_path, *trusting, recording=True))
        options = ("--upstream", f"127.0.0.1:{relay.port}", "--send-proxy", "--max-per-source", "1000")
        gateway = stack.enter_context(Gateways(tmp_path / "gateway", *options, count=1))
        port = web_port(gateway)
        held = []
        for _ in range(2):
            page = stack.enter_context(dial_web(port))
            page.send(lines()[0])
            held.append(page)
        wait_until(lambda: relay.row("current")[1] == 2, what="two wait")
        with dial_web(port) as third:
            third.send(lines()[0])
            with pytest.raises(ConnectionClosed):
                third.recv(10)
        assert relay.row("current")[1] == 2


@pytest.mark.parametrize(
    ("source", "host"),
    [
        (bytes((192, 0, 2, 7)), "192.0.2.7"),
        (bytes.fromhex("20010db800010002"), "2001:db8:1:2::"),
        (bytes.fromhex("0064ff9b0001") + bytes(9) + b"\x07", "64:ff9b:1::7"),
        (None, None),
    ],
)
def test_a_header_that_is_written_is_read(source: bytes | None, host: str | None) -> None:
    written = write_proxy_header(source)
    assert HeaderReader().hear(written) == ProxyHeader(len(written), host, is_local=source is None)


def test_where_a_gateway_leads() -> None:
    assert split_targets("relay.example.org:4001, 192.0.2.1:1,[2001:db8::1]:65535") == [
        ("relay.example.org", 4001),
        ("192.0.2.1", 1),
        ("2001:db8::1", 65535),
    ]
    for wrong in ("", "4001", "host", "host:", ":4001", "host:0", "host:65536", "::1:4001", "a:1,,b:2", "a b:1"):
        with pytest.raises(Mistake, match="--upstream "):
            split_targets(wrong)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--upstream", "127.0.0.1:4001"),
        ("--upstream", "nowhere", "--websocket", "4002"),
        ("--upstream", "no.such.host.invalid:1", "--websocket", "0"),
        ("--send-proxy",),
        ("--upstream", "127.0.0.1:1", "--websocket", "4002", "--usage-db", "x.sqlite"),
        ("--upstream", "127.0.0.1:1", "--websocket", "4002", "--measure-paths"),
        ("--upstream", "127.0.0.1:1", "--websocket", "4002", "--log-stdout"),
    ],
    ids=" ".join,
)
def test_what_does_not_go_together_is_a_mistake(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("relay-gevent: error: --")
    assert done.stderr.count("\n") == 1
    assert "give --usage-db" not in done.stderr, "which does not go with a gateway either"

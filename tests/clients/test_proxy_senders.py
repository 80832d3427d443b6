"""The PROXY header as real proxies send it: HAProxy in each of its ways, with and without a client, and nginx."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.clients.proxy_header import LONGEST, Flaw, HeaderReader, ProxyHeader
from tests.support.harness import connect, free_port, handshake, new_token, read_exactly, wait_until
from tests.support.proxies import haproxy, needs_haproxy, needs_nginx, nginx

WAYS = {
    "version 1": "send-proxy",
    "version 2": "send-proxy-v2",
    "version 2, checksum": "send-proxy-v2 proxy-v2-options crc32c",
    "version 2, identifier": "send-proxy-v2 proxy-v2-options unique-id",
    "version 2, everything": "send-proxy-v2-ssl-cn proxy-v2-options "
    "ssl,cert-cn,ssl-cipher,cert-sig,cert-key,authority,crc32c,unique-id",
}


@pytest.fixture
def target() -> Iterator[socket.socket]:
    """Where the relay would listen."""
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(20)
        yield target


def read_header(sock: socket.socket) -> ProxyHeader:
    """Read a header byte by byte, as nobody sends it."""
    sock.settimeout(10)
    received = b""
    while (verdict := HeaderReader().hear(received)) is None:
        received += read_exactly(sock, 1)
    assert not isinstance(verdict, Flaw), received
    assert verdict.size == len(received) <= LONGEST
    return verdict


def wait_for_proxy(port: int, target: socket.socket) -> None:
    """Return once the proxy at `port` takes connections, with none under way to `target`."""

    def answers() -> bool:
        with contextlib.suppress(OSError), connect(port, "::1"):
            return True
        return False

    wait_until(answers, 20, "the proxy listens")
    target.accept()[0].close()


def assert_each_client_is_named(port: int, target: socket.socket) -> None:
    """What arrives at `target` of clients of both families begins with a header that names them."""
    wait_for_proxy(port, target)
    line = handshake(new_token())
    for host in ("127.0.0.1", "127.0.0.5", "::1"):
        with connect(port, "::1" if ":" in host else "127.0.0.1", source=host) as client:
            client.sendall(line)
            sock, _ = target.accept()
            with sock:
                header = read_header(sock)
                assert (header.host, header.is_local) == (host, False)
                assert read_exactly(sock, len(line)) == line


@needs_haproxy
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_haproxy_names_its_clients(tmp_path: Path, target: socket.socket, way: str) -> None:
    port = free_port()
    with haproxy(tmp_path, port, f"127.0.0.1:{target.getsockname()[1]} {way}"):
        assert_each_client_is_named(port, target)


@needs_nginx
def test_nginx_names_its_clients(tmp_path: Path, target: socket.socket) -> None:
    port = free_port()
    with nginx(tmp_path, port, f"127.0.0.1:{target.getsockname()[1]}"):
        assert_each_client_is_named(port, target)


@needs_haproxy
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_haproxy_names_itself_or_nobody_when_it_looks_whether_the_relay_is_well(
    tmp_path: Path, target: socket.socket, way: str
) -> None:
    server = f"127.0.0.1:{target.getsockname()[1]} {way} check check-send-proxy inter 200"
    with haproxy(tmp_path, free_port(), server):
        for _ in range(3):
            sock, _ = target.accept()
            with sock:
                header = read_header(sock)
                # The specification wants a line of version 1 to be filled with the two ends of the connection.
                expected = ("127.0.0.1", False) if way == "send-proxy" else (None, True)
                assert (header.host, header.is_local) == expected

"""WebSocket clients for the tests: `websockets`' own, blocking.

with dial_web(service.web_port) as client:
    client.send(handshake(token, new_side()))
    assert client.recv() == b"ok\\n"
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator

from websockets.exceptions import ConnectionClosed
from websockets.frames import Close
from websockets.sync.client import ClientConnection, connect

from tests.support.harness import Service, free_port, wait_until
from tests.support.harness import connect as dial

LARGEST_MESSAGE = 32768
"""Some clients' libraries end the connection at a larger one."""


def web_options() -> list[str]:
    """The options with which a relay takes WebSocket clients, on a port of its own."""
    return ["--websocket", f"tcp:{free_port()}:interface=127.0.0.1"]


def web_port(service: Service) -> int:
    """The port on which a relay takes WebSocket clients, as its log says."""
    said = re.compile(r"WebSocket on \S+ port (\d+)")
    found = wait_until(lambda: said.search(service.log_text()), what="it says where")
    assert found is not None
    return int(found[1])


@contextlib.contextmanager
def dial_web(port: int, path: str = "/") -> Iterator[ClientConnection]:
    """Connect; whatever has become of the connection, it is closed at the end."""
    url = f"ws://127.0.0.1:{port}{path}"
    one = connect(url, max_size=LARGEST_MESSAGE, compression=None, open_timeout=20)
    with contextlib.suppress(ConnectionClosed), one:
        yield one


def dial_raw(port: int, source: str | None = None) -> socket.socket:
    """A WebSocket client whose frames the test makes itself; `source` is its own address.

    Raises:
        AssertionError: it was turned away; or ConnectionError.
    """
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(dial(port, source=source))
        raw.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = raw.recv(1)
            assert byte, "turned away"
            head += byte
        stack.pop_all()
    return raw


def read_to_close(client: ClientConnection, seconds: float = 15) -> tuple[list[str | bytes], Close | None]:
    """Every message up to the relay's Close, and that."""
    messages: list[str | bytes] = []
    try:
        while True:
            messages.append(client.recv(seconds))
    except ConnectionClosed as closed:
        return messages, closed.rcvd


def read_bytes(client: ClientConnection, count: int, seconds: float = 30) -> bytes:
    """The next `count` bytes, however many messages these are, which must all be binary."""
    received = bytearray()
    while len(received) < count:
        message = client.recv(seconds)
        assert isinstance(message, bytes)
        assert len(message) <= LARGEST_MESSAGE
        received += message
    return bytes(received)

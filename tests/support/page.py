"""A WebSocket client over TLS, of one thread: that of `websockets` has two, which TLS in Python does not bear.

page = Page.over_tls(connect(port), certificate)
page.send(handshake(token, new_side()))
assert page.recv() == b"ok\\n"
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from pathlib import Path
from types import TracebackType

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.protocol import Event
from websockets.uri import parse_uri

from tests.support.proxies import HOST


class Page:
    """One client, connected and upgraded; closed at the end of a `with`.

    Raises:
        ConnectionError: the upgrade is refused, or the connection has ended.
        TimeoutError: nothing has come for as long as the socket waits.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._protocol = ClientProtocol(parse_uri(f"wss://{HOST}/"), max_size=None)
        self._protocol.send_request(self._protocol.connect())
        self._flush()
        (response,) = self._events()
        if self._protocol.handshake_exc is not None:
            raise ConnectionError(f"{response}: {self._protocol.handshake_exc}")

    @classmethod
    def over_tls(cls, sock: socket.socket, certificate: Path) -> Page:
        """With `HOST` at the other end of `sock`, who must have that certificate."""
        context = ssl.create_default_context(cafile=str(certificate))
        secured = context.wrap_socket(sock, server_hostname=HOST)
        try:
            return cls(secured)
        except BaseException:
            secured.close()
            raise

    def _flush(self) -> None:
        self._sock.sendall(b"".join(self._protocol.data_to_send()))

    def _events(self) -> list[Event]:
        while not (events := self._protocol.events_received()):
            chunk = self._sock.recv(1 << 16)
            if not chunk:
                raise ConnectionError("the connection has ended")
            self._protocol.receive_data(chunk)
            self._flush()  # the answer to a ping, or to a Close
        return events

    def send(self, payload: bytes) -> None:
        """Send one message."""
        self._protocol.send_binary(payload)
        self._flush()

    def recv(self) -> bytes:
        """The next payload, of one message or of several."""
        heard = b""
        while not heard:
            for frame in self._events():
                assert isinstance(frame, Frame)
                assert frame.opcode in (Opcode.BINARY, Opcode.PING, Opcode.CLOSE), frame
                if frame.opcode is Opcode.CLOSE and not heard:
                    raise ConnectionError("a Close")
                if frame.opcode is Opcode.BINARY:
                    heard += frame.data
        return heard

    def rest(self, seconds: float) -> None:
        """Say nothing for so long, but for the answers to pings."""
        ends, patience = time.monotonic() + seconds, self._sock.gettimeout()
        while (left := ends - time.monotonic()) > 0:
            self._sock.settimeout(left)
            with contextlib.suppress(TimeoutError):
                for frame in self._events():
                    assert isinstance(frame, Frame)
                    assert frame.opcode is Opcode.PING, frame
        self._sock.settimeout(patience)

    def close(self) -> None:
        """Say goodbye, and hang up."""
        with contextlib.suppress(OSError, InvalidState):
            self._protocol.send_close(1000)
            self._flush()
        self._sock.close()

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

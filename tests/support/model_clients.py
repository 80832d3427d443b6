"""The clients of the model: they send what fits without waiting, and read what is said to be there. One speaks plainly,
one speaks WebSocket, and makes its frames itself, of any size and fragmentation.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import time
from collections.abc import Iterator

from tests.support.client_frames import BINARY, CLOSE, CONT, PING, TEXT, Sent
from tests.support.harness import Patience, connect, handshake, read_exactly, reset
from tests.support.web import LARGEST_MESSAGE

SETTLED_SECONDS = 20.0
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
WITHOUT_SIDE = len("please relay ") + 64
"""Bytes after which a line may be over, where the end of a message ends it too."""


class Client:
    """One connection: `said` bytes of its line are sent; `owed` is what its partner has sent and it has not read."""

    is_web = False

    def __init__(self, port: int, token: str, side: str | None) -> None:
        self.sock = connect(port)
        self.sock.settimeout(SETTLED_SECONDS)
        self.line = handshake(token, side)
        self.token = token
        self.side = side
        self.said = 0
        self.owed = bytearray()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.said} of {len(self.line)} said, is owed {len(self.owed)})"

    def say(self, words: bytes) -> None:
        """Say all of these words."""
        self.sock.sendall(words)

    def say_more(self, count: int) -> None:
        """Go on with the line."""
        words = self.line[self.said : self.said + count]
        self.said += len(words)
        self.say(words)

    def send(self, content: bytes) -> bytes:
        """Send what fits on the way now; returns what has gone."""
        sent = 0
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sent < len(content):
                sent += self.sock.send(content[sent:])
        self.sock.settimeout(SETTLED_SECONDS)
        return content[:sent]

    @property
    def is_between_frames(self) -> bool:
        """Whether it may say something else, or end its stream."""
        return True

    def finish(self) -> None:
        """End its stream."""
        self.sock.shutdown(socket.SHUT_WR)

    def cut_off(self) -> None:
        """End the connection's stream without a word."""
        self.sock.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        """Be gone, in order."""
        self.sock.close()

    def reset(self) -> None:
        """Be gone, at once."""
        reset(self.sock)

    def reads(self, expected: bytes) -> None:
        """The next that comes is this."""
        found = read_exactly(self.sock, len(expected))
        assert found == expected, f"{len(expected)} bytes, and others than were sent"

    def reads_end_of_stream(self) -> None:
        """The next that comes is the end of what it is told; it may go on talking."""
        assert self.sock.recv(1) == b""

    def reads_end(self, code: int | None = 1000) -> None:
        """Nothing more comes, and the connection ends; with a Close of this code where there is one (None: perhaps)."""
        with contextlib.suppress(ConnectionResetError):
            rest = self.sock.recv(1000)
            assert rest == b"", rest
        self.sock.close()

    def can_read(self, seconds: float = 0) -> bool:
        """Whether anything has come, or comes within so long."""
        return bool(select.select([self.sock], [], [], seconds)[0])

    def is_at_its_end(self) -> bool:
        """Of one that can read: whether it is the end."""
        return self.sock.recv(1, socket.MSG_PEEK) == b""


class WebClient(Client):
    """One that speaks WebSocket. The relay's pings are nothing to it."""

    is_web = True

    def __init__(self, port: int, token: str, side: str | None, *, newline: bool) -> None:
        super().__init__(port, token, side)
        self._newline = newline
        if not newline:
            self.line = self.line[:-1]
        self._out = b""  # of a frame, what has not gone
        self._content = b""  # its payload, as far as it has not gone
        self._in_message = False
        self._wire = bytearray()
        self._heard = bytearray()
        self._pongs: list[bytes] = []
        self._code: int | None = None  # of the Close that came
        self._over = False  # the connection has ended
        self._finished = False
        self.sock.sendall(REQUEST)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            chunk = self.sock.recv(1)
            assert chunk, f"no answer to a request: {head!r}"
            head += chunk
        assert head.startswith(b"HTTP/1.1 101 "), head

    # Saying

    def _frame(self, payload: bytes, *, final: bool) -> bytes:
        opcode = CONT if self._in_message else BINARY
        self._in_message = not final
        return Sent(opcode, payload, final, mask=random.randbytes(4)).wire

    def say(self, words: bytes) -> None:
        """In one frame. A line without a newline is one message, whose end is its own; another may be several."""
        whole = self.said == len(self.line)
        harmless = whole or self.said not in (WITHOUT_SIDE, len(self.line) - 1)
        final = (harmless and random.random() < 0.5) if self._newline else whole
        self.sock.sendall(self._frame(words, final=final))

    def send(self, content: bytes) -> bytes:
        """See `Client`; what did not go of a frame goes before all else."""
        went = self.flush()
        least = len(content) // 50 + 1
        while content and not self._out:
            size = max(least, random.choice([1, 125, 126, 4096, 16_424, 65_535, 65_536, len(content)]))
            self._content, content = content[:size], content[size:]
            self._out = self._frame(self._content, final=random.random() < 0.5)
            went += self.flush()
        return went

    def flush(self) -> bytes:
        """Send what fits of a frame that was begun; returns what has gone of its payload."""
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self._out:
                self._out = self._out[self.sock.send(self._out) :]
        self.sock.settimeout(SETTLED_SECONDS)
        gone = len(self._content) - min(len(self._out), len(self._content))
        went, self._content = self._content[:gone], self._content[gone:]
        return went

    @property
    def is_between_frames(self) -> bool:
        return not self._out

    def finish(self) -> None:
        """With a Close."""
        assert self.is_between_frames
        self._finished = True
        self.sock.sendall(Sent(CLOSE, b"\x03\xe8").wire)

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.finish()
        self.sock.close()

    def break_the_protocol(self) -> int:
        """Send what no client may; returns the code of the Close that comes of it."""
        frame, code = random.choice(
            [
                (Sent(TEXT, b"hello"), 1003 if not self._in_message else 1002),
                (Sent(BINARY, b"hello", mask=None), 1002),
                (Sent(BINARY, b"hello", reserved=4), 1002),
                (Sent(PING, bytes(126)), 1002),
            ]
        )
        self.sock.sendall(frame.wire + random.randbytes(1000))
        return code

    def ping(self) -> None:
        """Ping the relay, which answers, behind whatever it has to say."""
        word = random.randbytes(8)
        self.sock.sendall(Sent(PING, word).wire)
        patience = Patience(SETTLED_SECONDS)
        while word not in self._pongs:
            assert not patience.is_over(), f"no pong for {self}"
            assert not self._over, f"the end, and no pong for {self}"
            self._listen(0.1)
        self._pongs.clear()

    # Reading

    def _listen(self, seconds: float) -> None:
        """Take what has come, or comes within so long, apart into frames."""
        if not select.select([self.sock], [], [], seconds)[0]:
            return
        try:
            chunk = self.sock.recv(1 << 20)
        except ConnectionResetError:
            chunk = b""
        self._over |= not chunk
        self._wire += chunk
        for opcode, payload in self._frames():
            assert self._code is None, "something behind a Close"
            if opcode == 0x82:
                assert payload, "an empty message"
                self._heard += payload
            elif opcode == 0x88:
                self._code = int.from_bytes(payload[:2], "big")
            elif opcode == 0x8A:
                self._pongs.append(payload)
            else:
                assert (opcode, payload) == (0x89, b""), "neither a message nor a ping"

    def _frames(self) -> Iterator[tuple[int, bytes]]:
        while len(self._wire) >= 2:
            opcode, length = self._wire[:2]
            begins = 2
            if length == 126:
                if len(self._wire) < 4:
                    return
                length, begins = int.from_bytes(self._wire[2:4], "big"), 4
            assert length <= LARGEST_MESSAGE, "a message that some clients do not take"
            if len(self._wire) < begins + length:
                return
            payload = bytes(self._wire[begins : begins + length])
            del self._wire[: begins + length]
            yield opcode, payload

    def _listen_until(self, count: int) -> None:
        """Until so much payload, or the end, is there."""
        deadline = time.monotonic() + SETTLED_SECONDS
        while len(self._heard) < count and self._code is None and not self._over and time.monotonic() < deadline:
            self._listen(0.1)

    def reads(self, expected: bytes) -> None:
        self._listen_until(len(expected))
        found = bytes(self._heard[: len(expected)])
        del self._heard[: len(expected)]
        assert found == expected, f"{len(found)} of {len(expected)} bytes, or others than were sent: {found[:80]!r}"

    def reads_end_of_stream(self) -> None:
        self._listen_until(1)
        assert (bytes(self._heard[:80]), self._code) == (b"", 1000)

    def reads_end(self, code: int | None = 1000) -> None:
        self._listen_until(1)
        assert not self._heard, bytes(self._heard[:80])
        assert self._code == code or (code is None and self._code in (None, 1000)), self._code
        if self._code is not None and not self._finished:
            with contextlib.suppress(OSError):
                self.finish()
        patience = Patience(SETTLED_SECONDS)
        while not self._over:
            assert not patience.is_over(), "the connection does not end"
            self._listen(0.1)
        self.sock.close()

    def can_read(self, seconds: float = 0) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            self._listen(max(0.0, min(0.1, deadline - time.monotonic())))
            if self._heard or self._code is not None or self._over:
                return True
            if time.monotonic() >= deadline:
                return False

    def is_at_its_end(self) -> bool:
        return not self._heard

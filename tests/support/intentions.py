"""Clients that mean no good, each with one intention, stepped by whoever made them; misc/soak.py lets loose hundreds.

one = new_hostile(port, web_port)
while not one.over:
    one.step()
"""

from __future__ import annotations

import random
import socket
import struct
import time

from tests.support.client_frames import BINARY, CLOSE, CONT, PING, TEXT, Sent
from tests.support.harness import handshake, new_side, new_token
from tests.support.model_clients import REQUEST

GARBAGE = random.Random(6).randbytes(1 << 16)
READ_WITHIN = 3.0
"""Seconds in which what somebody says is read, on a busy machine."""

TINY_FRAMES = 500
"""So many frames of one byte are said at a time."""


class Hostile:
    """One or several connections of one intention; `step` is called often, until `over`.

    `records` are how many connections it has made that have to be on record, `pairs` how many of its transfers. Who
    ends without a byte is on none: it comes from an address of this machine, as health checks do. And `is_sure` is
    False of one that has reset its connections so soon that a busy relay may not have read a byte of them.
    """

    def __init__(self, port: int, source: str) -> None:
        self.port = port
        self.source = source
        self.began = time.monotonic()
        self.over = False
        self.is_sure = True
        self.records = 0
        self.pairs = 0
        self.socks: list[socket.socket] = []

    def dial(self) -> socket.socket:
        """Connect from this client's address."""
        sock = socket.socket()
        sock.bind((self.source, 0))
        sock.settimeout(5)
        sock.connect(("127.0.0.1", self.port))
        sock.setblocking(False)
        self.socks.append(sock)
        self.records += 1
        return sock

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def step(self) -> None:
        """Do what is to be done now."""
        raise NotImplementedError

    def hang_up(self, *, reset: bool = False) -> None:
        """Close everything."""
        self.is_sure = not reset or self.age > READ_WITHIN
        for sock in self.socks:
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        self.socks = []
        self.over = True


def heard(sock: socket.socket) -> bytes | None:
    """What has come: None for nothing, empty for an end of any kind."""
    try:
        return sock.recv(1 << 16)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def say(sock: socket.socket, words: bytes) -> bool:
    """Send what fits; False when the connection is over."""
    try:
        sock.send(words)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


class Dribbler(Hostile):
    """Says a good handshake, too slowly; or nothing at all."""

    def __init__(self, port: int, source: str, *, silent: bool) -> None:
        super().__init__(port, source)
        self.sock = self.dial()
        self.line = b"" if silent else handshake(new_token(), new_side())
        self.said = 0
        self.records = 0 if silent else 1

    def step(self) -> None:
        if heard(self.sock) == b"":
            self.hang_up()
        elif self.age > 0.3 * self.said and self.said < len(self.line):
            say(self.sock, self.line[self.said : self.said + 1])
            self.said += 1


class GarbageSender(Hostile):
    """Sends noise as fast as it is taken, until it is cut off."""

    def __init__(self, port: int, source: str) -> None:
        super().__init__(port, source)
        self.sock = self.dial()

    def step(self) -> None:
        if not say(self.sock, GARBAGE) or self.age > 10:
            self.hang_up()


class Impatient(Hostile):
    """Speaks before it was told ok."""

    def __init__(self, port: int, source: str) -> None:
        super().__init__(port, source)
        self.sock = self.dial()
        say(self.sock, handshake(new_token(), new_side()) + b"hello?")

    def step(self) -> None:
        if heard(self.sock) == b"":
            self.hang_up()


class Quitter(Hostile):
    """Leaves, at any stage before it has met anybody, with an end of stream, a half-closed stream or a reset."""

    def __init__(self, port: int, source: str) -> None:
        super().__init__(port, source)
        self.sock = self.dial()
        line = handshake(new_token(), new_side())
        said = line[: random.randint(0, len(line))]
        self.records = 1 if said else 0
        say(self.sock, said)
        self.leaves_at = random.uniform(0, 1)
        self.way = random.choice(["close", "reset", "half"])
        self.half = False

    def step(self) -> None:
        if self.half:
            if heard(self.sock) == b"":
                self.hang_up()
        elif self.age > self.leaves_at:
            if self.way == "half":
                self.half = True
                try:
                    self.sock.shutdown(socket.SHUT_WR)
                except OSError:
                    self.hang_up()
            else:
                self.hang_up(reset=self.way == "reset")


class TokenFlood(Hostile):
    """More connections with one token and one side than may wait."""

    def __init__(self, port: int, source: str) -> None:
        super().__init__(port, source)
        line = handshake(new_token(), new_side())
        for _ in range(12):
            say(self.dial(), line)

    def step(self) -> None:
        if self.age > 2:
            self.hang_up(reset=random.random() < 0.5)


class Burst(Hostile):
    """More new connections at once than one address may make, all silent."""

    def __init__(self, port: int, source: str) -> None:
        super().__init__(port, source)
        self.left = [self.dial() for _ in range(150)]
        self.records = 0

    def step(self) -> None:
        for sock in list(self.left):
            if heard(sock) is not None:
                self.left.remove(sock)
        if not self.left or self.age > 15:
            self.hang_up()


class BadPartner(Hostile):
    """Two that meet, and of whom one never reads, or sends urgent data; and then both are gone."""

    def __init__(self, port: int, source: str) -> None:
        super().__init__(port, source)
        token = new_token()
        self.left, self.right = self.dial(), self.dial()
        for sock in (self.left, self.right):
            say(sock, handshake(token, new_side()))
        self.answers = {self.left: b"", self.right: b""}
        self.met = False
        self.urgent = random.random() < 0.3

    def step(self) -> None:
        if not self.met:
            for sock, answer in self.answers.items():
                if len(answer) < 3:
                    self.answers[sock] += heard(sock) or b""
            self.met = all(answer == b"ok\n" for answer in self.answers.values())
            if self.met:
                self.records, self.pairs = 0, 1
        elif self.urgent:
            try:
                self.left.send(b"!", socket.MSG_OOB)
            except OSError:
                self.hang_up()
        else:
            say(self.left, GARBAGE)
        if not self.over and self.age > 4:
            self.hang_up(reset=random.random() < 0.7)


class WebHostile(Hostile):
    """Says at once, over WebSocket, what no browser would, and goes on with `more` until it is cut off."""

    def __init__(self, port: int, source: str) -> None:
        super().__init__(port, source)
        self.sock = self.dial()
        line = Sent(BINARY, handshake(new_token(), new_side())).wire
        frame = b"\x82\xff" + struct.pack("!Q", random.choice([1 << 16, 1 << 40, (1 << 63) - 1, 1 << 63])) + bytes(4)
        ways = {
            "half a request": (REQUEST[: random.randint(1, len(REQUEST) - 1)], b""),
            "a head without end": (REQUEST[:-2] + b"X: ", b"x" * 1000),
            "no request": (GARBAGE[: random.randint(1, 5000)], GARBAGE),
            "half a line": (REQUEST + line[: random.randint(0, len(line) - 1)], b""),
            "text": (REQUEST + Sent(TEXT, b"please relay").wire, b""),
            "a frame that breaks the protocol": (REQUEST + line + random.choice(WRONG).wire, b""),
            "noise for frames": (REQUEST + line, GARBAGE),
            "pings without end": (REQUEST + line, Sent(PING).wire * 1000),
            "empty frames without end": (REQUEST + line[:50], Sent(CONT, final=False).wire * 1000),
            "a frame without end": (REQUEST + frame, GARBAGE),
            "a Close, and more": (REQUEST + line + Sent(CLOSE, b"\x03\xe8").wire, line),
            "a Close at once": (REQUEST + Sent(CLOSE).wire, b""),
        }
        words, self.more = random.choice(list(ways.values()))
        say(self.sock, words)
        self.leaves_at = random.choice([0.1, 6])

    def step(self) -> None:
        if heard(self.sock) == b"" or (self.more and not say(self.sock, self.more)) or self.age > self.leaves_at:
            self.hang_up(reset=random.random() < 0.5)


WRONG = (
    Sent(BINARY, b"x", mask=None),
    Sent(BINARY, b"x", reserved=4),
    Sent(11, b"x"),
    Sent(PING, bytes(126)),
    Sent(PING, b"x", final=False),
    Sent(CLOSE, b"x"),
    Sent(CLOSE, b"\x03\xed"),
    Sent(CONT, b"x"),
    Sent(BINARY, b"x", form=64),
)


class WebBadPartner(Hostile):
    """One over WebSocket meets one over TCP that never reads, and sends tiny frames, or pings, or a frame without end.
    Then both are gone."""

    def __init__(self, port: int, source: str, web: int) -> None:
        super().__init__(port, source)
        token = new_token()
        self.right = self.dial()
        self.port = web
        self.left = self.dial()
        say(self.left, REQUEST + Sent(BINARY, handshake(token, new_side())).wire)
        say(self.right, handshake(token, new_side()))
        self.answers = {self.left: b"", self.right: b""}
        self.met = False
        endless = b"\x82\xff" + struct.pack("!Q", 1 << 40) + bytes(4)
        self.more = random.choice([Sent(BINARY, b"x").wire * TINY_FRAMES, Sent(PING, b"x").wire * 500, GARBAGE])
        self.first = endless if self.more is GARBAGE else b""

    def step(self) -> None:
        if not self.met:
            for sock, answer in self.answers.items():
                self.answers[sock] = answer + (heard(sock) or b"")
            self.met = b"\x82\x03ok\n" in self.answers[self.left] and self.answers[self.right] == b"ok\n"
            if self.met:
                self.records, self.pairs = 0, 1
                say(self.left, self.first)
        else:
            say(self.left, self.more)
        if self.age > 4:
            self.hang_up(reset=random.random() < 0.7)


def new_hostile(port: int, web: int) -> Hostile:
    """One of the above, from an address that is not that of the honest ones; a third of them speak WebSocket."""
    source = f"127.1.0.{random.randint(1, 4)}"
    kind = random.random()
    if random.random() < 1 / 3:
        return WebHostile(web, source) if kind < 0.85 else WebBadPartner(port, source, web)
    if kind < 0.35:
        return Dribbler(port, source, silent=kind < 0.1)
    if kind < 0.5:
        return GarbageSender(port, source)
    if kind < 0.65:
        return Impatient(port, source)
    if kind < 0.85:
        return Quitter(port, source)
    if kind < 0.92:
        return BadPartner(port, source)
    if kind < 0.99:
        return TokenFlood(port, source)
    return Burst(port, source)

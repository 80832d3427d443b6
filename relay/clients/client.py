"""One connection that is not in a pair, and what it is doing."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Protocol

from relay.clients.speech import PLAIN, Speech


class Watcher(Protocol):
    """What is needed of an event loop's watcher."""

    def start(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call back from now on."""

    def stop(self) -> None:
        """Call back no more."""

    def close(self) -> None:
        """Let go of what is watched."""


class EventLoop(Protocol):
    """What is needed of an event loop."""

    def io(self, fd: int, events: int) -> Watcher:
        """A watcher of `fd`: 1 is readable, 2 is writable."""


class Client:
    """A connection and what has to be known of it. There are thousands of these: no dict, nothing that is not needed.

    `started` is when it was accepted, in seconds since the epoch, for the record; `arrived` is the same moment on the
    monotonic clock, for every duration; `asked` is when its handshake was whole. CLOCK_MONOTONIC is one clock for all
    processes of a machine, so all stay true when the client is handed to another worker. `is_own` is whether it comes
    from this machine, as health checks do; `speech` is how it speaks.
    """

    __slots__ = (
        "arrived",
        "asked",
        "discarded",
        "due",
        "hops",
        "is_own",
        "received",
        "side",
        "sock",
        "source",
        "speech",
        "started",
        "token",
        "watcher",
    )

    def __init__(self, sock: socket.socket, started: float | None = None, arrived: float | None = None) -> None:
        self.sock = sock
        self.source: bytes | None = None
        self.is_own = False
        self.speech: Speech = PLAIN
        self.started = time.time() if started is None else started
        self.arrived = time.monotonic() if arrived is None else arrived
        self.asked = 0.0
        self.token = b""
        self.side: bytes | None = None
        self.received = b""
        self.discarded = 0
        self.hops = 0
        self.due = 0
        self.watcher: Watcher | None = None

    @property
    def packed_speech(self) -> bytes:
        """How it speaks, as it travels to another worker."""
        return self.speech.pack()

    def listen(self, loop: EventLoop, on_readable: Callable[[Client], None]) -> None:
        """Have the event loop call `on_readable`, and nothing else, with this client when its socket is readable."""
        if self.watcher is None:
            self.watcher = loop.io(self.sock.fileno(), 1)
        else:
            self.watcher.stop()
        self.watcher.start(on_readable, self)

    def stop_listening(self) -> None:
        """Let the event loop forget this client."""
        if self.watcher is not None:
            self.watcher.stop()
            self.watcher.close()
            self.watcher = None

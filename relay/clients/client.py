"""One connection that is not in a pair, and what it is doing."""

from __future__ import annotations

import enum
import socket
import time
from collections.abc import Callable
from typing import Protocol

from relay.clients.claim import Claim
from relay.clients.speech import PLAIN, Speech


class Recorded(enum.IntEnum):
    """Whether a connection leaves a record: one that is made to see whether the relay is there is nobody's mood."""

    ALWAYS = 0
    WITH_A_BYTE = 1
    """If it has said a byte: it comes from this machine, or from a trusted proxy for itself."""
    WITH_A_PARTNER = 2
    """If it becomes a transfer: the proxy says that it calls for itself."""


class Watcher(Protocol):
    """What is needed of an event loop's watcher."""

    def start(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call back from now on."""

    def stop(self) -> None:
        """Call back no more."""

    def close(self) -> None:
        """Let go of what is watched."""

    @property
    def active(self) -> bool:
        """Whether it is to call back. Where the kernel refuses to watch the descriptor, libev stops it, and calls back
        once, as if something had come. Started again, it may never call: libev does not ask the kernel a second time
        for what it takes to be watched already. It does for a new watcher."""


class EventLoop(Protocol):
    """What is needed of an event loop."""

    def io(self, fd: int, events: int) -> Watcher:
        """A watcher of `fd`: 1 is readable, 2 is writable."""

    def prepare(self) -> Watcher:
        """A watcher of the moment in each iteration before it is asked what there is to do."""

    def now(self) -> float:
        """When its present iteration began; its callbacks all read the same."""


class Client:
    """A connection and what has to be known of it. There are thousands of these: no dict, nothing that is not needed.

    `started` is when it was accepted, in seconds since the epoch, for the record; `arrived` is the same moment on the
    monotonic clock, for every duration; `asked` is when its handshake was whole. CLOCK_MONOTONIC is one clock for all
    processes of a machine, so all stay true when the client is handed to another worker. What `hops` and `is_given` say
    of that is in `relay.workers.language`. `recorded` is whether it leaves a record; `speech` is how it speaks; `claim`
    is what a trusted proxy says of it, until it is settled which `source` that is.
    """

    __slots__ = (
        "arrived",
        "asked",
        "claim",
        "discarded",
        "due",
        "hops",
        "is_given",
        "received",
        "recorded",
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
        self.recorded = Recorded.ALWAYS
        self.speech: Speech = PLAIN
        self.claim: Claim | None = None
        self.started = time.time() if started is None else started
        self.arrived = time.monotonic() if arrived is None else arrived
        self.asked = 0.0
        self.token = b""
        self.side: bytes | None = None
        self.received = b""
        self.discarded = 0
        self.hops = 0
        self.is_given = False
        self.due = 0
        self.watcher: Watcher | None = None

    @property
    def packed_speech(self) -> bytes:
        """How it speaks, as it travels to another worker."""
        return self.speech.pack()

    def listen(self, loop: EventLoop, on_readable: Callable[[Client], None]) -> None:
        """Have the event loop call `on_readable`, and nothing else, with this client when its socket is readable.

        That may be refused, at once or when the event loop comes to it; then `is_heard` is False from there on, and it
        is the caller's to try again.
        """
        try:
            if self.watcher is not None and not self.watcher.active:
                self.stop_listening()
            if self.watcher is None:
                self.watcher = loop.io(self.sock.fileno(), 1)
            else:
                self.watcher.stop()
            self.watcher.start(on_readable, self)
        except (OSError, MemoryError):
            pass

    @property
    def is_heard(self) -> bool:
        """Whether the event loop is to call when something comes; False when it was refused."""
        return self.watcher is not None and self.watcher.active

    def stop_listening(self) -> None:
        """Let the event loop forget this client."""
        if self.watcher is not None:
            self.watcher.stop()
            self.watcher.close()
            self.watcher = None

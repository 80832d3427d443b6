"""One connection that is not in a pair, and what it is doing."""

from __future__ import annotations

import enum
import socket
import time
from typing import Any


class Stage(enum.Enum):
    """What a connection is doing before it is paired, or after it was turned away."""

    SHAKING = "its handshake is not whole yet"
    WAITING = "it waits for its partner"
    LEAVING = "it has been sent away, and what it still says is thrown away"


class Client:
    """A connection and what has to be known of it. There are thousands of these: no dict, nothing that is not needed.

    `started` is when it was accepted, in seconds since the epoch, for the record; `arrived` is the same moment on the
    monotonic clock, for every duration; `asked` is when its handshake was whole. CLOCK_MONOTONIC is one clock for all
    processes of a machine, so all stay true when the client is handed to another worker.
    """

    __slots__ = (
        "arrived",
        "asked",
        "discarded",
        "due",
        "hops",
        "received",
        "side",
        "sock",
        "source",
        "stage",
        "started",
        "token",
        "watcher",
    )

    def __init__(self, sock: socket.socket, started: float | None = None, arrived: float | None = None) -> None:
        self.sock = sock
        self.source: bytes | None = None
        self.started = time.time() if started is None else started
        self.arrived = time.monotonic() if arrived is None else arrived
        self.asked = 0.0
        self.stage = Stage.SHAKING
        self.token = b""
        self.side: bytes | None = None
        self.received = b""
        self.discarded = 0
        self.hops = 0
        self.due = 0
        self.watcher: Any = None

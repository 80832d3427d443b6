"""Pings for WebSocket clients to which nothing was said for a while: proxies in between cut what is silent for long.

RFC 6455, 5.5.2. No pong is needed: whether somebody is dead is found out otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from relay.clients.deadlines import Deadlines


class Pinged(Protocol):
    """One side of a connection that speaks WebSocket; `due` belongs to `Pings`."""

    due: int

    def ping(self) -> bool:
        """Say a ping, unless something else was said since this was last asked. False when there is nobody any more."""


class Pings:
    """Who is pinged, and when.

    Args:
        interval: somebody who was told nothing for so many seconds is pinged, if `ping` is called every second. That
            may come a second late, or two where it is no whole number. 0 is never.
    """

    def __init__(self, interval: float) -> None:
        self._step = interval / 2
        self._deadlines: Deadlines[Pinged] = Deadlines()

    def add(self, somebody: Pinged, now: float) -> None:
        """Ping `somebody` from now on, until that finds nobody; `now` in monotonic seconds."""
        self._deadlines.clear(somebody)
        if self._step:
            # Twice in an interval, and never too late by what whole seconds take: but after `now`, whose turn it was.
            self._deadlines.set(somebody, max(now + self._step - 1, math.floor(now) + 1))

    def remove(self, somebody: Pinged) -> None:
        """Ping `somebody` no more."""
        self._deadlines.clear(somebody)

    def ping(self, now: float) -> Iterator[None]:
        """Ping those whose time has come, one with each step; `now` in monotonic seconds."""
        for somebody in self._deadlines.take_due(now):
            if somebody.ping():
                self.add(somebody, now)
            yield

"""A port of its own for health checks: it answers however full the relay is.

At the door of a relay that is full newcomers wait in the listen queue, and so would a check; and when that queue is
full as well, a relay that works looks like a machine that is dead. Whoever checks here learns that a worker lives, and
takes no place, neither a client's nor one in that queue. All workers of a relay accept from one socket, so that one
that stands still leaves its checks to the others.

A worker opens a socket for itself beside those of others (SO_REUSEPORT, socket(7)) where these give it none: one of an
earlier version, which each had their own, or one that was told to answer elsewhere.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import gevent
from gevent.pool import Pool
from gevent.server import StreamServer

from relay.process import log

MOST_CHECKS = 16
"""Checks that are answered at a time; further ones wait."""

CHECK_SECONDS = 5.0
"""How long a check may take to ask, and to leave."""

REST_SECONDS = 1.0
"""How long accepting rests when the system has no descriptor or memory for another connection."""

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class HealthPort(StreamServer):  # type: ignore[misc]  # gevent has no types
    """Accepts from `listener`, from `start()` on."""

    _timer: Any

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener, handle=_answer, spawn=Pool(MOST_CHECKS))

    def do_handle(self, *connection: Any) -> None:  # noqa: ANN401  # gevent has no types
        """Answer it. Where no greenlet is to be had for that gevent would print the address."""
        try:
            super().do_handle(*connection)
        except Exception:  # whatever it is, the next check wants an answer
            log.tell_mistake("a health check could not be answered")

    def keep_open(self) -> None:
        """Accept again where the port is not watched although it should be (see `Door.keep_open`); to be called once a
        second."""
        if self._watcher is not None and not self._watcher.active:
            self.stop_accepting()
        rests = self._timer is not None and self._timer.active
        if self._watcher is None and self.started and not rests and not self.full():
            self.start_accepting()

    def do_read(self) -> tuple[socket.socket, object] | None:
        """Accept one; where the system lets nobody in, rest for a while. The relay's own door says so in the log."""
        try:
            accepted: tuple[socket.socket, object] | None = super().do_read()
        except OSError:
            self.stop_accepting()
            self._timer = self.loop.timer(REST_SECONDS)
            self._timer.start(self._start_accepting_if_started)
            return None
        return accepted


def _answer(sock: socket.socket, address: object) -> None:
    """Whatever is asked gets the answer to a GET; who only connects, and leaves, has its answer already."""
    try:
        with gevent.Timeout(CHECK_SECONDS, False), contextlib.suppress(OSError):
            if sock.recv(4096):
                sock.sendall(ANSWER)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
    except Exception:  # of a greenlet that ends with one gevent would print the address
        log.tell_mistake("a health check could not be answered")

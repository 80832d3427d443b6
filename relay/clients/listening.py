"""What all connections have in common. It is set on the listening socket, whose connections inherit it, and on those
that a gateway makes itself (tcp(7), socket(7))."""

from __future__ import annotations

import socket

from relay.clients.congestion import pace
from relay.process import log

KEEPALIVE_IDLE_SECONDS = 60
KEEPALIVE_PROBES = 6
KEEPALIVE_PROBE_SECONDS = 20
"""A peer that is silent for so long, and then for so many probes so far apart, is dead: three minutes in all."""


def prepare(sock: socket.socket) -> None:
    """Set it on a socket that neither listens nor is connected yet."""
    sock.setblocking(False)
    set_option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    set_option(sock, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
    set_option(sock, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_PROBE_SECONDS)
    set_option(sock, socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    pace(sock)


def set_option(sock: socket.socket, level: int, option: int, value: int) -> None:
    """Set what a relay can do without, where it is refused: the kernel's default holds then."""
    try:
        sock.setsockopt(level, option, value)
    except OSError as error:
        log.tell("the kernel refuses a socket option (%s); the relay goes on with its default", error.strerror)

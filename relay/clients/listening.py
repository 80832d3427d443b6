"""What all connections have in common. It is set on the listening socket, whose connections inherit it, and on those
that a gateway makes itself (tcp(7), socket(7))."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from relay.clients.congestion import pace
from relay.mistakes import Mistake
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


def resolve(interface: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """The address of `interface` and `port` as the kernel takes it; raises Mistake when it is none."""
    try:
        numeric = socket.AI_PASSIVE | socket.AI_NUMERICHOST
        # Of bytes Python wants no tables for names in other scripts, which take a megabyte.
        found = socket.getaddrinfo(interface.encode("ascii"), port, type=socket.SOCK_STREAM, flags=numeric)
    except (socket.gaierror, UnicodeError):
        raise Mistake(f"--interface {interface}: not an IPv4 or IPv6 address of this machine") from None
    family, _, _, _, address = found[0]
    host = str(address[0])  # in one spelling, whichever was given
    if host == "::" and not socket.has_dualstack_ipv6():
        return socket.AF_INET, ("0.0.0.0", port)  # a machine without IPv6
    if host.startswith("::ffff:"):
        return socket.AF_INET, (host.removeprefix("::ffff:"), port)  # an IPv6 socket for IPv6 alone cannot have that
    return family, address


def check_interface(interface: str) -> None:
    """Raise Mistake unless this machine has such an address; no port of it is needed, and nobody is listened to."""
    family, address = resolve(interface, 0)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind(address)
    except OSError as error:
        mistake = wrong_interface(error, interface)
        if mistake is not None:
            raise mistake from None


def wrong_interface(error: OSError, interface: str) -> Mistake | None:
    """What an error of bind(2) says of the address; None for one that is about something else."""
    if error.errno == errno.EADDRNOTAVAIL:
        return Mistake(f"--interface {interface}: not an address of this machine")
    if error.errno in (errno.EINVAL, errno.ENODEV):
        return Mistake(f"--interface {interface}: {os.strerror(error.errno)}; name its link, too, as in fe80::1%eth0")
    return None

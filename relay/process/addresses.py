"""Addresses of this machine to listen on: in one spelling, whichever the operator has chosen; bound; and in words what
the system has against them. All programs that listen say the same of the same mistake."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from relay.mistakes import Mistake

_DISCARD = 9
"""A port of UDP, to which nothing is sent."""


def resolve(interface: str, port: int, named_by: str = "--interface") -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """The address of `interface` and `port` as the kernel takes it.

    Raises Mistake when it is none; `named_by` is the option that has named the interface.
    """
    try:
        numeric = socket.AI_PASSIVE | socket.AI_NUMERICHOST
        # Of bytes Python wants no tables for names in other scripts, which take a megabyte.
        found = socket.getaddrinfo(interface.encode("ascii"), port, type=socket.SOCK_STREAM, flags=numeric)
    except (socket.gaierror, UnicodeError):
        raise Mistake(f"{named_by} {interface}: not an IPv4 or IPv6 address of this machine") from None
    family, _, _, _, address = found[0]
    host = str(address[0])
    if host == "::" and not socket.has_dualstack_ipv6():
        return socket.AF_INET, ("0.0.0.0", port)  # a machine without IPv6
    if host.startswith("::ffff:"):
        return socket.AF_INET, (host.removeprefix("::ffff:"), port)  # an IPv6 socket for IPv6 alone cannot have that
    return family, address


def bind(sock: socket.socket, address: tuple[Any, ...]) -> None:
    """Bind a socket to an address that `resolve` has returned; raises OSError.

    Also of one that belongs to many machines (multicast, broadcast): the kernel lets a TCP socket listen there, and
    nobody can ever connect to it.
    """
    host = str(address[0])
    is_multicast = host.startswith("ff") if ":" in host else host.partition(".")[0] in map(str, range(224, 240))
    if not is_multicast:
        sock.bind(address)
    if is_multicast or _is_broadcast(sock.family, host):
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))


def _is_broadcast(family: int, host: str) -> bool:
    """Whether the kernel takes it for a broadcast address, to which a socket may not send unasked: ip(7), EACCES.

    What refuses it in the same words, as SELinux may, refuses it also to who asks.
    """
    if family != socket.AF_INET:
        return False
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, _DISCARD))
            except PermissionError:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                probe.connect((host, _DISCARD))
                return True
    except OSError:
        pass  # nothing is known
    return False


def check_interface(interface: str, named_by: str = "--interface") -> None:
    """Raise Mistake unless this machine has such an address; no port of it is needed, and nobody is listened to."""
    family, address = resolve(interface, 0, named_by)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            bind(sock, address)
    except OSError as error:
        mistake = _wrong_interface(error, interface, named_by)
        if mistake is not None:
            raise mistake from None


def why_not(
    error: OSError, interface: str, port: int, option: str = "--port", named_by: str = "--interface"
) -> Mistake:
    """What an error of bind(2) or listen(2) says of the port that `option` has named, or of its interface."""
    if error.errno == errno.EADDRINUSE:
        return Mistake(f"{option} {port}: another program listens there already; stop it or choose another port")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Mistake(f"{option} {port}: this user may not listen there; ports below 1024 are for root")
    where = f"--interface {interface}" if named_by == "--interface" else f"on {interface}"
    return _wrong_interface(error, interface, named_by) or Mistake(
        f"{option} {port} {where}: {os.strerror(error.errno or 0)}"
    )


def _wrong_interface(error: OSError, interface: str, named_by: str) -> Mistake | None:
    """What the error says of the address; None for one that is about something else."""
    if error.errno == errno.EADDRNOTAVAIL:
        return Mistake(f"{named_by} {interface}: not an address of this machine")
    if error.errno in (errno.EINVAL, errno.ENODEV):
        return Mistake(f"{named_by} {interface}: {os.strerror(error.errno)}; name its link, too, as in fe80::1%eth0")
    return None

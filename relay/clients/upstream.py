"""Where a gateway carries its clients: the addresses of ``--upstream``, which to try first, and a connection there."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import struct
import time
from typing import Any

from relay.clients.listening import prepare
from relay.mistakes import Mistake
from relay.process.dataclass import dataclass

AVOIDED_SECONDS = 5.0
"""How long an address that could not be reached is tried last."""

_ABORT = struct.pack("ii", 1, 0)
"""struct linger: on, for no time; then close(2) resets (socket(7), SO_LINGER)."""

_TCP_INFO = struct.Struct("=128xQ8xI52xQQ")
"""tcpi_bytes_received, tcpi_notsent_bytes, tcpi_bytes_sent, tcpi_bytes_retrans in struct tcp_info of linux/tcp.h."""

_TARGET = re.compile(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^\s:,\[\]]+)):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Address:
    """One way to the upstream, as `socket` takes it."""

    family: socket.AddressFamily
    address: tuple[Any, ...]


def split_targets(text: str) -> list[tuple[str, int]]:
    """The hosts and ports in ``HOST:PORT,HOST:PORT``; raises Mistake for anything else."""
    targets = []
    for entry in text.split(","):
        match = _TARGET.fullmatch(entry.strip())
        if match is None or not 0 < int(match[3]) < 65536:
            raise Mistake(f"--upstream {entry}: give HOST:PORT, and several separated by commas; IPv6 as in [::1]:4001")
        targets.append((match[1] or match[2], int(match[3])))
    return targets


class Upstream:
    """The addresses, which take turns.

    Args:
        text: HOST:PORT, or several, separated by commas. Names are looked up now; one may have several addresses.

    Raises:
        Mistake: one of them is not that, or a name is not known.
    """

    def __init__(self, text: str) -> None:
        self._addresses = [address for host, port in split_targets(text) for address in _look_up(host, port)]
        self._next = 0
        self._failed_at: dict[Address, float] = {}

    def in_turn(self) -> list[Address]:
        """All addresses, in the order in which the next client is to try them."""
        self._next = (self._next + 1) % len(self._addresses)
        order = self._addresses[self._next :] + self._addresses[: self._next]
        since = time.monotonic() - AVOIDED_SECONDS
        return sorted(order, key=lambda address: self._failed_at.get(address, since) > since)

    def failed(self, address: Address) -> None:
        """`address` could not be reached just now."""
        self._failed_at[address] = time.monotonic()


class Connection(socket.socket):
    """A connection upstream.

    Whoever ends its stream first keeps the port for a minute (TIME-WAIT; TCP_TIMEWAIT_LEN of include/net/tcp.h), and of
    ports to one address there are 28 232 by default. So when a client leaves before anybody has answered, as everybody
    does who waits in vain, its stream is not ended: it is reset when it is closed, and nobody loses anything by that.

    `said` is how many bytes were written to it before it became a client's.
    """

    __slots__ = ("said",)

    said: int

    def shutdown(self, how: int) -> None:
        """End the stream, or see to it that it is reset when it is closed. To be called only when its client is gone,
        and hears nothing any more."""
        if self._is_unused():
            self._linger_no_time()
        else:
            super().shutdown(how)

    def abort(self) -> None:
        """Close it at once, by a reset if it has come to be a connection."""
        self._linger_no_time()
        self.close()

    def _linger_no_time(self) -> None:
        with contextlib.suppress(OSError):
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)

    def _is_unused(self) -> bool:
        """Whether nothing has come from upstream, and nothing of the client's has gone there; as far as the kernel
        tells (Linux 4.19)."""
        try:
            info = self.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:
            return False
        if len(info) < _TCP_INFO.size:
            return False
        received, not_sent, sent, sent_again = _TCP_INFO.unpack(info)
        return bool(received == 0 and sent - sent_again + not_sent == self.said)


def dial(address: Address) -> Connection:
    """A connection that is being made; raises OSError."""
    sock = Connection(address.family, socket.SOCK_STREAM)
    try:
        prepare(sock)
        with contextlib.suppress(BlockingIOError):
            sock.connect(address.address)
    except BaseException:
        sock.close()
        raise
    return sock


def lacks_port(error: OSError, address: Address) -> bool:
    """Whether `error`, for which there is no connection to `address`, means that all ports are taken that this machine
    could have to it (ip(7), ip_local_port_range). The kernel says the same where it has no address to come from."""
    if error.errno != errno.EADDRNOTAVAIL:
        return False
    try:
        with socket.socket(address.family, socket.SOCK_DGRAM) as sock:  # which has ports of its own; nothing is sent
            sock.connect(address.address)
    except OSError as no_way:
        return no_way.errno in (errno.EMFILE, errno.ENFILE)
    return True


def _look_up(host: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a name"
        raise Mistake(f"--upstream {host}:{port}: {reason}; give an address, or a name that is known here") from None
    return [Address(family, address) for family, _, _, _, address in found]

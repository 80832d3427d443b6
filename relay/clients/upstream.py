"""Where a gateway carries its clients: the addresses of ``--upstream``, and which to try first."""

from __future__ import annotations

import re
import socket
import time
from typing import Any

from relay.dataclass import dataclass
from relay.mistakes import Mistake

AVOIDED_SECONDS = 5.0
"""How long an address that could not be reached is tried last."""

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


def _look_up(host: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a name"
        raise Mistake(f"--upstream {host}:{port}: {reason}; give an address, or a name that is known here") from None
    return [Address(family, address) for family, _, _, _, address in found]

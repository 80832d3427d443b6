"""Whose word is taken for where a client comes from: the proxies of ``--trusted-proxies``. Pure.

A proxy says it in a PROXY header (`proxy_header`) or in X-Forwarded-For (`forwarded_for`).
"""

from __future__ import annotations

import re
from socket import AF_INET, AF_INET6, inet_ntop

from relay.clients.sources import packed
from relay.mistakes import Mistake

_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}")


class TrustedProxies:
    """A set of addresses.

    Args:
        text: addresses and networks in CIDR notation, IPv4 or IPv6, separated by commas. Spaces around one do not
            count, nor bits behind a prefix: 10.1.2.3/8 is 10.0.0.0/8, as it is for HAProxy and nginx. None: nobody.

    Raises:
        Mistake: naming what is wrong in `text`.
    """

    __slots__ = ("_networks", "_prefixes")

    def __init__(self, text: str | None = None) -> None:
        entries = () if text is None else text.split(",")
        self._networks = sorted({_read_network(entry.strip()) for entry in entries})
        # By the size of an address in bytes: how many bits are behind the prefixes, and the prefixes. A few lengths,
        # each with any number of networks, cost a few look-ups.
        self._prefixes: dict[int, dict[int, set[int]]] = {4: {}, 16: {}}
        for size, length, prefix in self._networks:
            self._prefixes[size].setdefault(8 * size - length, set()).add(prefix)

    def __bool__(self) -> bool:
        """Whether anybody is trusted."""
        return bool(self._networks)

    def __str__(self) -> str:
        """The same set in the one spelling that each has: what two workers can compare."""
        return ",".join(_write_network(*network) for network in self._networks)

    def trusts(self, host: str) -> bool:
        """Whether the numeric address `host` is one of these; an IPv4-mapped one counts as the IPv4 address."""
        if not self._networks:
            return False
        address = packed(host)
        number = int.from_bytes(address, "big")
        return any(number >> bits in prefixes for bits, prefixes in self._prefixes[len(address)].items())


def _read_network(entry: str) -> tuple[int, int, int]:
    """How many bytes an address of this network has, how many bits its prefix, and the prefix."""
    host, slash, digits = entry.partition("/")
    try:
        address = packed(host)
    except (OSError, ValueError):
        raise _mistake(entry, "not an address or a network") from None
    if "%" in host:
        raise _mistake(entry, "a network has no zone")
    most = 128 if ":" in host else 32
    if slash and not (_LENGTH.fullmatch(digits) and int(digits) <= most):
        raise _mistake(entry, f"the length of its prefix is not a number from 0 to {most}")
    size = len(address)
    length = (int(digits) if slash else most) - (most - 8 * size)
    if length < 0:  # somebody who writes ::ffff:10.0.0.0/8 does not mean ::/8
        raise _mistake(entry, "the prefix of an IPv4-mapped network has 96 bits or more; better give the IPv4 network")
    return size, length, int.from_bytes(address, "big") >> (8 * size - length)


def _write_network(size: int, length: int, prefix: int) -> str:
    address = (prefix << (8 * size - length)).to_bytes(size, "big")
    host = inet_ntop(AF_INET if size == 4 else AF_INET6, address)
    return host if length == 8 * size else f"{host}/{length}"


def _mistake(entry: str, what: str) -> Mistake:
    return Mistake(
        f"--trusted-proxies {entry}: {what}; give addresses and networks, separated by commas, "
        "such as 192.0.2.7,10.0.0.0/8,2001:db8::/32"
    )

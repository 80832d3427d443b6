"""Whom a connection counts for, by the numeric address that it comes from. Pure.

Bounds are for owners of addresses. With IPv6 a household or a server gets 64 bits of addresses at least (RFC 6177), and
may use all of them, so there the first 64 bits name the owner. But some IPv6 addresses are an IPv4 host's:

====================  ======================  ==========================================================================
addresses             what counts             why
====================  ======================  ==========================================================================
``::ffff:0:0/96``     the last 32 bits        IPv4-mapped (RFC 4291, 2.5.5.2): how a socket of both families names an
                                              IPv4 host
``64:ff9b::/96``      the last 32 bits        what translators make of an IPv4 host (RFC 6052, 2.1)
``::ffff:0:0:0/96``   the last 32 bits        IPv4-translated (RFC 2765, 2.1): a host to which a translator lends the
                                              IPv4 address
``::/96``             the last 32 bits        IPv4-compatible (RFC 4291, 2.5.5.1): the way back is a tunnel to the IPv4
                                              address. Not what would be in 0.0.0.0/8, such as ``::1``: no host is there
``2002::/16``         bits 16 to 47           6to4 (RFC 3056, 2): an IPv4 address has 65 536 networks; the way back to
                                              all of them is a tunnel to it
``2001::/32``         the last 32 bits, each  Teredo (RFC 4380, 4): the address of the client's NAT; the first 64 bits
                      inverted                are those of a server, which thousands share
``64:ff9b:1::/48``    the whole address       for a site's own translators (RFC 8215). Where they put the IPv4 address,
                                              nobody may assume (section 5), but each host has one address there
everything else       the first 64 bits       also with ISATAP (RFC 5214), 6rd (RFC 5969), and translators that use a
                                              site's own network (RFC 6052, 2.2). Nothing shows that it is one of these,
                                              and if it counted, whoever owns a network could be four thousand million
====================  ======================  ==========================================================================

A sender cannot claim the IPv4 address of somebody else like this: what is sent back does not come to it, and so the TCP
handshake does not end.

Who owns a network of 64 bits may own its neighbours, too: a household has 56 bits as a rule, and 48 are to be had for
nothing (RFC 6177, tunnel brokers). So when it is about who has the most, or who comes too fast, the networks of one
`site` are one.
"""

from __future__ import annotations

# Not for a socket, but to read addresses: the module ipaddress takes ten times as long, and may take 0.4 MB.
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

_MAPPED = bytes(10) + b"\xff\xff"
_COMPATIBLE = bytes(12)
_ENDS_IN_IPV4 = frozenset({_MAPPED, _COMPATIBLE, bytes.fromhex("0064ff9b") + bytes(8), bytes(8) + b"\xff\xff\x00\x00"})
_6TO4 = b"\x20\x02"
_TEREDO = bytes.fromhex("20010000")
_OF_A_SITES_TRANSLATORS = bytes.fromhex("0064ff9b0001")


def source_of(host: str) -> bytes:
    """Whom a connection from the numeric address `host` counts for.

    That is an IPv4 address (4 bytes), a network of 64 bits (8 bytes), or an IPv6 address (16 bytes).
    """
    address = packed(host)
    if len(address) == 4:
        return address
    if address[:12] in _ENDS_IN_IPV4 and (address[12] or address[:12] != _COMPATIBLE):
        return address[12:]
    if address.startswith(_6TO4):
        return address[2:6]
    if address.startswith(_TEREDO):
        return bytes(byte ^ 0xFF for byte in address[12:])
    return address if address.startswith(_OF_A_SITES_TRANSLATORS) else address[:8]


def site_of(source: bytes) -> bytes:
    """Whose a source may be together with others: the first 48 bits of a network of 64 bits; any other is by itself."""
    return source[:6] if len(source) == 8 else source


def packed(host: str) -> bytes:
    """A numeric address as 4 or 16 bytes; an IPv4-mapped one is the IPv4 address, and the zone does not count.

    Raises OSError or ValueError for anything else.
    """
    if ":" not in host:
        return inet_pton(AF_INET, host)
    address = inet_pton(AF_INET6, host.partition("%")[0] if "%" in host else host)
    return address[12:] if address.startswith(_MAPPED) else address


def canonical(text: str) -> str | None:
    """`text` as the kernel would write that address for a socket of its family; None if it is no numeric address.

    What is told apart here as text has to go through this first.
    """
    try:
        address = packed(text)
    except (OSError, ValueError):
        return None
    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


def is_loopback(host: str) -> bool:
    """Whether a canonical address is of this machine's loopback."""
    return host.startswith(("127.", "::ffff:127.")) or host == "::1"


def is_same(host: str, other: str) -> bool:
    """Whether two canonical addresses are one; a connection between an address and itself does not leave the machine,
    and the kernel sends whatever goes to an address of its own from that same address."""
    return host.removeprefix("::ffff:") == other.removeprefix("::ffff:")

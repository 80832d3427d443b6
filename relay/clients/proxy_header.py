"""The PROXY header, out of the bytes that have come so far; pure.

A proxy sends it before anything else, to say who has called it. Version 1 is a line of text, version 2 is binary::

    PROXY TCP4 192.0.2.7 198.51.100.1 51234 4001\\r\\n
    \\r\\n\\r\\n\\0\\r\\nQUIT\\n  command  family  length  addresses and ports  further fields

(Source: “The PROXY protocol, versions 1 and 2”, ``doc/proxy-protocol.txt`` of HAProxy.) Whom to believe it, and what
becomes of a connection without a good one, is not for here.

What the specification leaves to the receiver is decided like this:

- A header may come in any number of pieces, and what cannot become one is told at the first byte that makes it so.
- In version 1, an IPv6 address may end in an IPv4 address: so HAProxy names IPv4 clients of a port for both families.
- UNKNOWN, and in version 2 every family and protocol that is not TCP, leave the connection what it is: the proxy's.
- Of the further fields only the checksum is of use. It is verified; and bytes that are no fields at all make the header
  wrong, as they do for HAProxy.
"""

from __future__ import annotations

import enum
import functools
from array import array
from collections.abc import Callable, Sequence
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from relay.clients.sources import canonical
from relay.process.dataclass import dataclass

LONGEST_LINE = 107
"""Bytes in the longest header of version 1, its end of line included (section 2.1)."""

LONGEST = 4096
"""Bytes in the longest header that is taken. Its length could say 65 551, but a header is meant to fit into one segment
of 536 bytes; a few that tell much about TLS do not. What is more than a page of memory is a mistake, or malice."""

_SIGNATURES = (b"PROXY", b"\r\n\r\n\x00\r\nQUIT\n")


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """A whole, well-formed header.

    Attributes:
        size: how many bytes it takes; what follows is the client's.
        host: the canonical address of the client. None where the header names none that is of use here: then the
            connection counts as what it is, the proxy's.
        is_local: whether the proxy says that it has called for itself, as for a health check.
    """

    size: int
    host: str | None = None
    is_local: bool = False


class Flaw(enum.Enum):
    """Why some bytes cannot become a header any more."""

    MISSING = "is missing"
    WRONG = "is wrong"
    TOO_LONG = "is too long"


class HeaderReader:
    """Reads what comes first of a proxy, in however many pieces: of a header of version 2 each field is looked at when
    it comes, and not again.

    Args:
        received: what had come when somebody else read it.

    Attributes:
        received: everything that the proxy has sent since it connected.
    """

    __slots__ = ("_checksum_at", "_field_at", "received")

    def __init__(self, received: bytes = b"") -> None:
        self.received = bytearray(received)
        self._field_at = 0
        """Where the first further field begins that is not known to be one; 0 before any is known."""
        self._checksum_at = 0

    def hear(self, chunk: bytes) -> ProxyHeader | Flaw | None:
        """Judge everything that has come, of which `chunk` is the latest.

        Returns the `ProxyHeader` when it is whole, whatever follows it; a `Flaw` when the bytes can no longer become
        one, at the first byte that makes it so (a wrong checksum: at the last byte of the header); and None while more
        bytes are needed. What has a flaw keeps it, whatever follows.
        """
        self.received += chunk
        begun = bytes(self.received[:LONGEST_LINE])
        if begun.startswith(_SIGNATURES[1]):
            return self._read_binary()
        if begun.startswith(_SIGNATURES[0]):
            return _read_line(begun)
        return None if any(signature.startswith(begun) for signature in _SIGNATURES) else Flaw.MISSING

    def _read_binary(self) -> ProxyHeader | Flaw | None:
        begun = bytes(self.received[:_ADDRESSES_AT])
        command = begun[_COMMAND_AT:_FAMILY_AT]
        if command not in (b"", _LOCAL, _PROXY):
            return Flaw.WRONG
        is_local = command == _LOCAL
        # LOCAL discards the family and whatever follows, which then is as if nothing had been specified.
        family = 0 if is_local else int.from_bytes(begun[_FAMILY_AT:_LENGTH_AT], "big")
        if family >> 4 > 3 or family & 15 > 2:
            return Flaw.WRONG
        # As long as there is only one byte of the length, this is the least that it can become.
        end = _ADDRESSES_AT + int.from_bytes(begun[_LENGTH_AT:].ljust(2, b"\0"), "big")
        if end > LONGEST:
            return Flaw.TOO_LONG
        if len(begun) < _ADDRESSES_AT:
            return None
        addresses = _SIZE_OF_ADDRESSES.get(family)
        if addresses is not None:
            self._field_at = self._field_at or _ADDRESSES_AT + addresses
            if not self._may_be_fields(end):
                return Flaw.WRONG
        return ProxyHeader(end, _client(self.received, family), is_local) if len(self.received) >= end else None

    def _may_be_fields(self, end: int) -> bool:
        """Whether what has come of a header that ends at `end` can have further fields, each a byte of type, two of
        length and its value, and at most one of them a checksum, which is right."""
        while self._field_at < end:
            value_at = self._field_at + 3
            field = bytes(self.received[self._field_at : min(value_at, end)])
            kind, length = field[:1], field[1:]
            after = value_at + int.from_bytes(length.ljust(2, b"\0"), "big")
            if after > end or (kind == _CHECKSUM and not self._may_be_checksum(length, value_at, end)):
                return False
            if len(length) < 2:
                return True  # that is all that is known yet
            if kind == _CHECKSUM:
                self._checksum_at = value_at
            self._field_at = after
        if self._field_at > end:
            return False  # there is no room for the addresses
        whole = len(self.received) >= end
        return not whole or not self._checksum_at or _is_right(bytes(self.received[:end]), self._checksum_at)

    def _may_be_checksum(self, length: bytes, value_at: int, end: int) -> bool:
        return not self._checksum_at and value_at + 4 <= end and _LENGTH_OF_CHECKSUM.startswith(length)


def write_proxy_header(source: bytes | None) -> bytes:
    """A header of version 2 for a client that counts for `source` (see `sources.source_of`); of a network, its first
    address. The client of nobody in particular is the sender's own: LOCAL, since HAProxy (2.6) resets PROXY without
    addresses."""
    if source is None:
        return _SIGNATURES[1] + _LOCAL + bytes(3)
    family, size = (_TCP4, 4) if len(source) == 4 else (_TCP6, 16)
    addresses = source.ljust(size, b"\0") + bytes(size + 2 * 2)
    return _SIGNATURES[1] + _PROXY + bytes((family,)) + len(addresses).to_bytes(2, "big") + addresses


# Version 1


def _is_address(family: int, text: bytes) -> bool:
    try:
        inet_pton(family, text.decode("ascii"))
    except (OSError, ValueError):
        return False
    return True


def _is_port(text: bytes) -> bool:
    return text == b"0" or (text.isdigit() and len(text) <= 5 and not text.startswith(b"0") and int(text) <= 65535)


@dataclass(frozen=True, slots=True)
class _Field:
    """A kind of field. What has come of one can still become it exactly when one of `rests` behind it makes it one."""

    is_one: Callable[[bytes], bool]
    rests: tuple[bytes, ...]

    def may_begin_with(self, text: bytes) -> bool:
        return any(self.is_one(text + rest) for rest in self.rests)


_PORT = _Field(_is_port, (b"", b"0"))
_IPV4 = _Field(
    functools.partial(_is_address, AF_INET), (b"", b"0", b".0", b"0.0", b".0.0", b"0.0.0", b".0.0.0", b"0.0.0.0")
)
_IPV6 = _Field(functools.partial(_is_address, AF_INET6), (*_IPV4.rests, b":", b"::", b":0"))

_FIELDS = {b"TCP4": (_IPV4, _IPV4, _PORT, _PORT), b"TCP6": (_IPV6, _IPV6, _PORT, _PORT)}
_BEGINNINGS = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN\r")


def _read_line(received: bytes) -> ProxyHeader | Flaw | None:
    """`received` is what there is of the first `LONGEST_LINE` bytes."""
    line, end, _ = received.partition(b"\r\n")
    if end:
        return _understand_line(line)
    if not _may_become_line(line[: LONGEST_LINE - 1]):
        return Flaw.WRONG
    # The end of the line takes the last two bytes that there is room for, if not earlier ones.
    return None if line[LONGEST_LINE - 2 :] in (b"", b"\r") else Flaw.TOO_LONG


def _understand_line(line: bytes) -> ProxyHeader | Flaw:
    size = len(line) + len(b"\r\n")
    match line.split(b" "):
        case [b"PROXY", b"UNKNOWN", *_]:
            return ProxyHeader(size)
        case [b"PROXY", (b"TCP4" | b"TCP6") as protocol, *fields] if len(fields) == 4 and _are_good(protocol, fields):
            return ProxyHeader(size, canonical(fields[0].decode()))
    return Flaw.WRONG


def _may_become_line(line: bytes) -> bool:
    """Whether `line`, which has not ended yet, can become a header, its length aside."""
    match line.split(b" "):
        case [b"PROXY", b"UNKNOWN", *_]:
            return True
        case [b"PROXY", (b"TCP4" | b"TCP6") as protocol, *whole, last] if len(whole) < 4:
            if len(whole) == 3 and last.endswith(b"\r"):
                return _are_good(protocol, [*whole, last[:-1]])
            return _are_good(protocol, whole) and _FIELDS[protocol][len(whole)].may_begin_with(last)
    return any(beginning.startswith(line) for beginning in _BEGINNINGS)


def _are_good(protocol: bytes, fields: Sequence[bytes]) -> bool:
    """Whether `fields`, which need not be all, are what has to follow `protocol`."""
    return all(kind.is_one(field) for kind, field in zip(_FIELDS[protocol], fields, strict=False))


# Version 2

_COMMAND_AT, _FAMILY_AT, _LENGTH_AT, _ADDRESSES_AT = 12, 13, 14, 16

_LOCAL, _PROXY = b"\x20", b"\x21"
_TCP4, _TCP6 = 0x11, 0x21
_SIZE_OF_ADDRESSES = {_TCP4: 2 * 4 + 2 * 2, _TCP6: 2 * 16 + 2 * 2}

_CHECKSUM = b"\x03"
_LENGTH_OF_CHECKSUM = b"\x00\x04"


def _client(received: bytearray, family: int) -> str | None:
    if family == _TCP4:
        return inet_ntop(AF_INET, received[_ADDRESSES_AT : _ADDRESSES_AT + 4])
    if family == _TCP6:
        return canonical(inet_ntop(AF_INET6, received[_ADDRESSES_AT : _ADDRESSES_AT + 16]))
    return None


def _is_right(header: bytes, checksum_at: int) -> bool:
    after = checksum_at + 4
    without = header[:checksum_at] + bytes(4) + header[after:]
    return crc32c(without) == int.from_bytes(header[checksum_at:after], "big")


def crc32c(octets: bytes) -> int:
    """The checksum of RFC 4960, appendix B: a CRC of 32 bits with Castagnoli's polynomial."""
    table = _crc32c_table()
    crc = 0xFFFFFFFF
    for octet in octets:
        crc = table[(crc ^ octet) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@functools.cache
def _crc32c_table() -> array[int]:
    """The checksum's part for each value of a byte: 1 kB, made when a checksum comes, since most proxies send none."""
    table = array("I")
    for octet in range(256):
        for _ in range(8):
            octet = octet >> 1 ^ (0x82F63B78 if octet & 1 else 0)
        table.append(octet)
    return table

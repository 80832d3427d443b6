"""The PROXY header: what is one, what can still become one, and what never will, to the byte.

Held against the specification's own examples (sections 2.1 and 2.2), against another implementation (proxy-protocol),
and against itself. Invariants of `HeaderReader`, in whatever pieces it comes:

- every proper prefix of a good header needs more, and the header itself is one, whatever follows;
- of what needs more, some byte can be next that is not wrong, and so on until the header is whole;
- what has a flaw keeps it, whatever follows.
"""

from __future__ import annotations

import random
import socket
import string
import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol import ProxyProtocolChecksumError
from proxyprotocol.result import (
    ProxyResult,
    ProxyResultIPv4,
    ProxyResultIPv6,
    ProxyResultLocal,
    ProxyResultUnix,
    ProxyResultUnknown,
)
from proxyprotocol.tlv import ProxyProtocolTLV
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from relay.clients.proxy_header import LONGEST, LONGEST_LINE, Flaw, HeaderReader, ProxyHeader, crc32c
from relay.clients.sources import canonical

SIGNATURE = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a"
LOCAL, PROXY = 0x20, 0x21
UNSPEC, TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DATAGRAM = 0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32
IPV4_ADDRESSES = struct.pack("!4s4sHH", bytes([192, 168, 0, 1]), bytes([192, 168, 0, 11]), 56324, 443)
IPV6_ADDRESSES = struct.pack("!16s16sHH", IPv6Address("2001:db8::7").packed, IPv6Address("::1").packed, 56324, 443)
CHECKSUM, NOOP = 0x03, 0x04


def read_proxy_header(received: bytes) -> ProxyHeader | Flaw | None:
    """The verdict on this, which comes in one piece."""
    return HeaderReader().hear(received)


def binary(command: int, family: int, block: bytes = b"", length: int | None = None) -> bytes:
    """A header of version 2, as section 2.2 describes it."""
    return SIGNATURE + struct.pack("!BBH", command, family, len(block) if length is None else length) + block


def field(kind: int, value: bytes) -> bytes:
    """A type-length-value field."""
    return struct.pack("!BH", kind, len(value)) + value


def with_checksum(header: bytes, at: int) -> bytes:
    """`header` with the right checksum in the four bytes from `at`."""
    return header[:at] + crc32c(header[:at] + bytes(4) + header[at + 4 :]).to_bytes(4, "big") + header[at + 4 :]


GOOD = {
    # Section 2.1: the example, and the longest of each kind, which have so many bytes as it says there.
    "example": (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", "192.168.0.1"),
    "longest TCP4": (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255"),
    "longest TCP6": (
        b"PROXY TCP6 " + b" ".join([b":".join([b"ffff"] * 8)] * 2) + b" 65535 65535\r\n",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    ),
    "UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "longest UNKNOWN": (b"PROXY UNKNOWN " + b" ".join([b":".join([b"ffff"] * 8)] * 2) + b" 65535 65535\r\n", None),
    "UNKNOWN and anything": (b"PROXY UNKNOWN \0\xff\r \n PROXY TCP4 1.2.3.4\r\r\n", None),
    "shortest TCP4": (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", "0.0.0.0"),
    "shortest TCP6": (b"PROXY TCP6 :: :: 0 0\r\n", "::"),
    "capitals": (b"PROXY TCP6 2001:DB8::A::".replace(b"A::", b"A") + b" ::1 1 2\r\n", "2001:db8::a"),
    "mapped": (b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:192.0.2.1 51234 4001\r\n", "192.0.2.7"),  # as HAProxy writes it
    # Section 2.2.
    "TCP over IPv4": (binary(PROXY, TCP4, IPV4_ADDRESSES), "192.168.0.1"),
    "TCP over IPv6": (binary(PROXY, TCP6, IPV6_ADDRESSES), "2001:db8::7"),
    "mapped, binary": (binary(PROXY, TCP6, IPv6Address("::ffff:192.0.2.7").packed * 2 + bytes(4)), "192.0.2.7"),
    "UDP over IPv4": (binary(PROXY, UDP4, IPV4_ADDRESSES), None),
    "UDP over IPv6": (binary(PROXY, UDP6, IPV6_ADDRESSES), None),
    "UNIX stream": (binary(PROXY, UNIX_STREAM, b"/run/a".ljust(108, b"\0") + b"/run/b".ljust(108, b"\0")), None),
    "UNIX datagram": (binary(PROXY, UNIX_DATAGRAM, bytes(216)), None),
    "UNSPEC": (binary(PROXY, UNSPEC), None),
    "UNSPEC and anything": (binary(PROXY, UNSPEC, bytes(range(50))), None),
    "IPv4, no protocol": (binary(PROXY, 0x10, IPV4_ADDRESSES), None),
    "no family, stream": (binary(PROXY, 0x01, b"what"), None),
    "fields": (
        binary(PROXY, TCP4, IPV4_ADDRESSES + field(1, b"h2") + field(NOOP, b"") + field(0x05, bytes(128))),
        "192.168.0.1",
    ),
    "checksum": (with_checksum(binary(PROXY, TCP4, IPV4_ADDRESSES + field(CHECKSUM, bytes(4))), 31), "192.168.0.1"),
    "checksum and more": (
        with_checksum(
            binary(PROXY, TCP6, IPV6_ADDRESSES + field(1, b"h2") + field(CHECKSUM, bytes(4)) + field(2, b"a.example")),
            60,
        ),
        "2001:db8::7",
    ),
    "longest": (
        binary(PROXY, TCP4, IPV4_ADDRESSES + field(NOOP, bytes(LONGEST - 16 - 12 - 3))),
        "192.168.0.1",
    ),
}
GOOD_LOCAL = {
    "LOCAL": binary(LOCAL, UNSPEC),
    "LOCAL with addresses": binary(LOCAL, TCP4, IPV4_ADDRESSES),
    "LOCAL with fields": binary(LOCAL, UNSPEC, field(CHECKSUM, b"some")),
    "LOCAL, and what nobody may look at": binary(LOCAL, 0xFF, b"\xff" * 100),
    "LOCAL, cut addresses": binary(LOCAL, TCP6, b"1"),
}
EXPECTED = {name: (header, ProxyHeader(len(header), host)) for name, (header, host) in GOOD.items()} | {
    name: (header, ProxyHeader(len(header), None, is_local=True)) for name, header in GOOD_LOCAL.items()
}
HEADERS = pytest.mark.parametrize(("header", "expected"), EXPECTED.values(), ids=EXPECTED)


def test_the_examples_have_the_lengths_that_the_specification_gives() -> None:
    lengths = {"longest TCP4": 56, "longest TCP6": 104, "UNKNOWN": 15, "longest UNKNOWN": 107}
    lengths |= {"TCP over IPv4": 16 + 12, "TCP over IPv6": 16 + 36, "UNIX stream": 16 + 216}
    assert {name: len(GOOD[name][0]) for name in lengths} == lengths
    assert max(lengths.values()) <= LONGEST
    assert LONGEST_LINE == 107
    assert len(GOOD["longest"][0]) == LONGEST


@HEADERS
def test_a_good_header_names_the_client(header: bytes, expected: ProxyHeader) -> None:
    assert read_proxy_header(header) == expected


@HEADERS
def test_every_beginning_of_a_good_header_needs_more(header: bytes, expected: ProxyHeader) -> None:
    for count in range(len(header)):
        assert read_proxy_header(header[:count]) is None, count


@HEADERS
@pytest.mark.parametrize("following", [b"p", b"please relay ", b"\r\n", b"\0" * 5000, b"PROXY UNKNOWN\r\n"])
def test_what_follows_a_header_is_the_clients(header: bytes, expected: ProxyHeader, following: bytes) -> None:
    verdict = read_proxy_header(header + following)
    assert verdict == expected
    assert (header + following)[verdict.size :] == following


# What is wrong, at the byte at which it is.

WRONG_LINES = [
    # The last byte of each is the first that is wrong.
    (b"PROXYX", Flaw.WRONG),
    (b"PROXY\r", Flaw.WRONG),
    (b"PROXY  ", Flaw.WRONG),
    (b"PROXY tcp4"[:7], Flaw.WRONG),
    (b"PROXY TCP5", Flaw.WRONG),
    (b"PROXY TCP\n"[:10], Flaw.WRONG),
    (b"PROXY TCP4\r", Flaw.WRONG),
    (b"PROXY TCP46", Flaw.WRONG),
    (b"PROXY UDP4"[:8], Flaw.WRONG),
    (b"PROXY UNKNOWNS", Flaw.WRONG),
    (b"PROXY UNKNOWN\n", Flaw.WRONG),
    (b"PROXY UNKNOWN\r\r", Flaw.WRONG),
    (b"PROXY TCP4  ", Flaw.WRONG),
    (b"PROXY TCP4 256", Flaw.WRONG),
    (b"PROXY TCP4 00", Flaw.WRONG),
    (b"PROXY TCP4 192.168.01", Flaw.WRONG),
    (b"PROXY TCP4 192..", Flaw.WRONG),
    (b"PROXY TCP4 192.168 ", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1.", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1\r", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1:", Flaw.WRONG),
    (b"PROXY TCP4 :", Flaw.WRONG),
    (b"PROXY TCP4 a", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443 ", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\n", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\r", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324\r", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 056"[:38], Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 65536", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 563240", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 -", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 +", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 1_", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 \r", Flaw.WRONG),
    (b"PROXY TCP4 192.168.0.1 2001", Flaw.WRONG),
    (b"PROXY TCP6 1.", Flaw.WRONG),
    (b"PROXY TCP6 g", Flaw.WRONG),
    (b"PROXY TCP6 :1", Flaw.WRONG),
    (b"PROXY TCP6 :::", Flaw.WRONG),
    (b"PROXY TCP6 1::2::", Flaw.WRONG),
    (b"PROXY TCP6 12345", Flaw.WRONG),
    (b"PROXY TCP6 1:2:3:4:5:6:7:8:", Flaw.WRONG),
    (b"PROXY TCP6 1:2:3:4:5:6:7 ", Flaw.WRONG),
    (b"PROXY TCP6 1:2:3:4:5:6:7:1.", Flaw.WRONG),
    (b"PROXY TCP6 ::1.2.3.4:", Flaw.WRONG),
    (b"PROXY TCP6 ::1.2 ", Flaw.WRONG),
    (b"PROXY TCP6 fe80::1%", Flaw.WRONG),
    (b"PROXY TCP6 [", Flaw.WRONG),
    (b"PROXY TCP6 \xff", Flaw.WRONG),
    (b"PROXY TCP6 ::\0", Flaw.WRONG),
    (b"PROXY UNKNOWN " + b"x" * 92, Flaw.TOO_LONG),  # no room for the end of the line
    (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\r", Flaw.TOO_LONG),
    (b"PROXY UNKNOWN " + b"x" * 91 + b"\rx", Flaw.TOO_LONG),
    (b"PROXY TCP6 " + b" ".join([b"1111:" * 6 + b"111.111.111.111"] * 2) + b" 655", Flaw.TOO_LONG),
    (b"p", Flaw.MISSING),
    (b"please relay ", Flaw.MISSING),
    (b"PROXy", Flaw.MISSING),
    (b"PRI * HTTP/2.0"[:3], Flaw.MISSING),
    (b"GET / HTTP/1.1\r\n", Flaw.MISSING),
    (b"POST"[:2], Flaw.MISSING),
    (b"\n", Flaw.MISSING),
    (b"\r\r", Flaw.MISSING),
    (b"\r\n\r\nGET", Flaw.MISSING),
    (b"\0", Flaw.MISSING),
    (b"\x16\x03\x01", Flaw.MISSING),  # TLS
]

WRONG_BINARY = [
    (SIGNATURE[:11] + b"\r", Flaw.MISSING),
    (SIGNATURE + b"\x01", Flaw.WRONG),  # version 0
    (SIGNATURE + b"\x11", Flaw.WRONG),
    (SIGNATURE + b"\x31", Flaw.WRONG),
    (SIGNATURE + b"\x22", Flaw.WRONG),  # neither LOCAL nor PROXY
    (SIGNATURE + b"\x2f", Flaw.WRONG),
    (SIGNATURE + b"\x21\x41", Flaw.WRONG),  # no family
    (SIGNATURE + b"\x21\x13", Flaw.WRONG),  # no protocol
    (SIGNATURE + b"\x21\xff", Flaw.WRONG),
    (SIGNATURE + b"\x21\x11\x00\x0b", Flaw.WRONG),  # too short for its addresses
    (SIGNATURE + b"\x21\x11\x00\x00", Flaw.WRONG),
    (SIGNATURE + b"\x21\x21\x00\x23", Flaw.WRONG),
    (SIGNATURE + b"\x21\x21\x00\x0c", Flaw.WRONG),
    (SIGNATURE + b"\x21\x11\x00\x0d", Flaw.WRONG),  # one byte behind the addresses is no field
    (SIGNATURE + b"\x21\x11\x00\x0e", Flaw.WRONG),
    (SIGNATURE + b"\x21\x11\x10", Flaw.TOO_LONG),
    (SIGNATURE + b"\x21\x11\xff", Flaw.TOO_LONG),
    (SIGNATURE + b"\x21\x11\x0f\xf1", Flaw.TOO_LONG),
    (SIGNATURE + b"\x20\x00\x0f\xf1", Flaw.TOO_LONG),
    (SIGNATURE + b"\x21\x00\x10", Flaw.TOO_LONG),
    # Fields: of 12 bytes of addresses and 10 of fields.
    (binary(PROXY, TCP4, IPV4_ADDRESSES + b"\x01\x00\x08", 22), Flaw.WRONG),  # longer than there is room
    (binary(PROXY, TCP4, IPV4_ADDRESSES + b"\x01\x01", 22), Flaw.WRONG),
    (binary(PROXY, TCP4, IPV4_ADDRESSES + b"\x01\x00\x06", 22), Flaw.WRONG),  # leaves one byte, or two
    (binary(PROXY, TCP4, IPV4_ADDRESSES + b"\x01\x00\x05", 22), Flaw.WRONG),
    (binary(PROXY, TCP4, IPV4_ADDRESSES + b"\x01\x00\x04abcd\x01\x00\x01", 22), Flaw.WRONG),
    (binary(PROXY, TCP4, IPV4_ADDRESSES + b"\x03\x01", 22), Flaw.WRONG),  # a checksum of another length
    (binary(PROXY, TCP4, IPV4_ADDRESSES + b"\x03\x00\x03", 22), Flaw.WRONG),
    (binary(PROXY, TCP4, IPV4_ADDRESSES + b"\x03\x00\x07", 22), Flaw.WRONG),
    (binary(PROXY, TCP4, IPV4_ADDRESSES + b"\x01\x00\x01a\x03", 22), Flaw.WRONG),  # no room for one
    (binary(PROXY, TCP4, IPV4_ADDRESSES + field(CHECKSUM, bytes(4)) + b"\x03", 26), Flaw.WRONG),  # a second one
]


@pytest.mark.parametrize(("begun", "flaw"), WRONG_LINES + WRONG_BINARY)
def test_a_flaw_is_told_at_the_byte_that_makes_it(begun: bytes, flaw: Flaw) -> None:
    if flaw is not Flaw.MISSING:
        assert read_proxy_header(begun[:-1]) is None
    assert read_proxy_header(begun) is flaw


@pytest.mark.parametrize(("begun", "flaw"), WRONG_LINES + WRONG_BINARY)
@pytest.mark.parametrize("following", [b"\n", b"\r\n", b"0", b" ", b" \r\n", b"\0" * 200, b"x" * 5000])
def test_nothing_that_follows_mends_a_flaw(begun: bytes, flaw: Flaw, following: bytes) -> None:
    assert read_proxy_header(begun + following) is flaw


@pytest.mark.parametrize("name", ["checksum", "checksum and more"])
def test_a_bit_that_has_changed_on_the_way_breaks_the_checksum(name: str) -> None:
    header, _ = GOOD[name]
    for place in range(16, len(header)):
        for bit in range(8):
            changed = bytearray(header)
            changed[place] ^= 1 << bit
            verdict = read_proxy_header(bytes(changed))
            if header[place] == CHECKSUM and header[place - 1] != 0:
                continue  # the type of the field itself, which is then no checksum
            assert verdict is Flaw.WRONG or (verdict is None and changed[14:16] != header[14:16]), (place, bit)


def test_the_checksum_is_that_of_the_rfcs() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0


# Any header.

PORTS = st.integers(0, 65535)
IPV4 = st.ip_addresses(v=4)
IPV6 = st.ip_addresses(v=6) | st.ip_addresses(network="::ffff:0:0/96")
TLVS = st.dictionaries(st.integers(0, 255).filter(lambda kind: kind != CHECKSUM), st.binary(max_size=40), max_size=4)


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """An IPv6 address, in one of the ways in which it can be written."""
    address = IPv6Address(draw(IPV6))
    text = draw(st.sampled_from([str(address), address.exploded, str(address).upper()]))
    if draw(st.booleans()):
        groups = address.exploded.split(":")[:6]
        text = ":".join([*groups, str(IPv4Address(address.packed[12:]))])
    return text


@st.composite
def lines(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """A header of version 1, and whom it names."""
    ports = f"{draw(PORTS)} {draw(PORTS)}"
    kind = draw(st.sampled_from(["TCP4", "TCP6", "UNKNOWN"]))
    if kind == "TCP4":
        source = str(draw(IPV4))
        return f"PROXY TCP4 {source} {draw(IPV4)} {ports}\r\n".encode(), source
    if kind == "TCP6":
        source = draw(spellings())
        line = f"PROXY TCP6 {source} {draw(IPV6)} {ports}\r\n".encode()
        return (line, canonical(source)) if len(line) <= LONGEST_LINE else (b"PROXY UNKNOWN\r\n", None)
    ignored = draw(st.binary(max_size=LONGEST_LINE - 16)).replace(b"\r\n", b"").removesuffix(b"\r")
    return b"PROXY UNKNOWN " + ignored + b"\r\n", None


@st.composite
def binaries(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """A header of version 2, and whom it names; its fields in the order of their types, since the other implementation
    computes the checksum as if they were."""
    source, destination, family = draw(st.tuples(IPV4, IPV4, st.just(TCP4)) | st.tuples(IPV6, IPV6, st.just(TCP6)))
    block = source.packed + destination.packed + struct.pack("!HH", draw(PORTS), draw(PORTS))
    values = draw(TLVS)
    if not draw(st.booleans()):
        header = binary(PROXY, family, block + b"".join(field(kind, values[kind]) for kind in sorted(values)))
        return header, canonical(str(source))
    before = b"".join(field(kind, values[kind]) for kind in sorted(values) if kind < CHECKSUM)
    after = b"".join(field(kind, values[kind]) for kind in sorted(values) if kind > CHECKSUM)
    header = binary(PROXY, family, block + before + field(CHECKSUM, bytes(4)) + after)
    return with_checksum(header, 16 + len(block + before) + 3), canonical(str(source))


ANY = lines() | binaries()


@given(ANY, st.binary(max_size=200))
def test_every_header_names_its_client_and_ends_where_it_ends(made: tuple[bytes, str | None], following: bytes) -> None:
    header, host = made
    assert read_proxy_header(header + following) == ProxyHeader(len(header), host)
    for count in range(len(header)):
        assert read_proxy_header(header[:count]) is None, header[:count]


@given(ANY, st.data())
def test_a_header_comes_in_any_pieces(made: tuple[bytes, str | None], data: st.DataObject) -> None:
    header, host = made
    received = b""
    left = header
    while read_proxy_header(received) is None:
        count = data.draw(st.integers(1, len(left)))
        received, left = received + left[:count], left[count:]
    assert received == header
    assert read_proxy_header(received) == ProxyHeader(len(header), host)


BEGINNINGS = st.sampled_from(
    [
        *(b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN"),
        *(b"PROXY TCP4 1.2.3.4 5.6.7.8 1", b"PROXY TCP6 1::2 ::1.2.3.4 1 2"),
        *(SIGNATURE, SIGNATURE + b"\x21", SIGNATURE + b"\x21\x11\x00", SIGNATURE + b"\x20\x00\x00"),
        *(binary(PROXY, TCP4, IPV4_ADDRESSES, 40), binary(PROXY, TCP6, IPV6_ADDRESSES, 60)),
    ]
)
TEXT = st.text(string.hexdigits + ":. \r\n").map(str.encode)


@given(BEGINNINGS, st.binary() | TEXT, st.binary() | TEXT)
def test_no_bytes_make_it_raise_and_a_verdict_stands(begun: bytes, more: bytes, following: bytes) -> None:
    received = begun + more
    verdict = read_proxy_header(received)
    if verdict is not None:
        assert read_proxy_header(received + following) == verdict
    if isinstance(verdict, ProxyHeader):
        assert verdict.size <= min(len(received), LONGEST)
        assert read_proxy_header(received[: verdict.size]) == verdict
        assert verdict.host is None or canonical(verdict.host) == verdict.host
    first = next((count for count in range(len(received)) if read_proxy_header(received[:count]) is not None), None)
    if first is not None:  # the verdict does not depend on how much has come at once
        assert read_proxy_header(received[:first]) == verdict


@given(BEGINNINGS | st.sampled_from([header for header, _ in GOOD.values()]), st.binary() | TEXT)
def test_what_comes_byte_by_byte_gets_the_verdict_of_what_comes_at_once(begun: bytes, more: bytes) -> None:
    received = begun + more
    in_pieces = HeaderReader()
    for end in range(1, len(received) + 1):
        verdict = in_pieces.hear(received[end - 1 : end])
        assert verdict == read_proxy_header(received[:end])
        if verdict is not None:
            break


@given(BEGINNINGS, TEXT, st.integers(0, 2**32))
def test_what_needs_more_can_become_a_header(begun: bytes, more: bytes, seed: int) -> None:
    chance = random.Random(seed)
    received = begun + more
    for count in range(len(received) + 1):  # as much of it as is not wrong
        if read_proxy_header(received[:count]) is not None:
            received = received[: max(count - 1, 0)]
            break
    verdict = read_proxy_header(received)
    while verdict is None:
        # Any byte that is not wrong, and if there is one, one that soon leads to the end.
        candidates = [*b"\0\r\n 0:.TCP", *chance.sample(range(256), 256)]
        byte = next(byte for byte in candidates if not isinstance(read_proxy_header(received + bytes([byte])), Flaw))
        received += bytes([byte])
        verdict = read_proxy_header(received)
    assert isinstance(verdict, ProxyHeader)


# Another implementation.


@st.composite
def results(draw: st.DrawFn) -> ProxyResult:
    """What proxy-protocol can write, in both versions."""
    tlv = ProxyProtocolTLV(init=draw(TLVS))
    ports = draw(PORTS), draw(PORTS)
    if draw(st.booleans()):
        four = IPv4Address(draw(IPV4)), IPv4Address(draw(IPV4))
        return ProxyResultIPv4((four[0], ports[0]), (four[1], ports[1]), protocol=socket.SOCK_STREAM, tlv=tlv)
    six = IPv6Address(draw(IPV6)), IPv6Address(draw(IPV6))
    return ProxyResultIPv6((six[0], ports[0]), (six[1], ports[1]), protocol=socket.SOCK_STREAM, tlv=tlv)


def named_by(result: ProxyResult) -> str | None:
    """Whom the other implementation understands a header to name."""
    assert isinstance(result, ProxyResultIPv4 | ProxyResultIPv6)
    return canonical(str(result.source[0]))


@given(results())
def test_what_another_implementation_writes_is_read(result: ProxyResult) -> None:
    for written in (ProxyProtocolV1().pack(result), ProxyProtocolV2().pack(result)):
        assert read_proxy_header(written) == ProxyHeader(len(written), named_by(result))


def test_what_another_implementation_writes_of_no_tcp_is_read() -> None:
    unix = ProxyProtocolV2().pack(ProxyResultUnix("/run/a", "/run/b"))
    assert read_proxy_header(unix) == ProxyHeader(len(unix))
    unknown = ProxyProtocolV1().pack(ProxyResultUnknown())
    assert read_proxy_header(unknown) == ProxyHeader(len(unknown))
    local = ProxyProtocolV2().pack(ProxyResultLocal())
    assert read_proxy_header(local) == ProxyHeader(len(local), is_local=True)


@given(ANY)
def test_what_is_good_here_is_the_same_to_another_implementation(made: tuple[bytes, str | None]) -> None:
    header, host = made
    other = (ProxyProtocolV1() if header.startswith(b"PROXY") else ProxyProtocolV2()).unpack(header)
    if host is not None:
        assert named_by(other) == host


@given(binaries(), st.data())
def test_a_wrong_checksum_is_wrong_to_another_implementation_too(
    made: tuple[bytes, str | None], data: st.DataObject
) -> None:
    header, _ = made
    at = 16 + (12 if header[13] == TCP4 else 36)
    if header[at : at + 1] != bytes([CHECKSUM]):
        return
    place = data.draw(st.integers(16, at - 1))
    changed = header[:place] + bytes([header[place] ^ data.draw(st.integers(1, 255))]) + header[place + 1 :]
    assert read_proxy_header(changed) is Flaw.WRONG
    with pytest.raises(ProxyProtocolChecksumError):
        ProxyProtocolV2().unpack(changed)

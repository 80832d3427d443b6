"""Whom a connection counts for, and which addresses are one: without a socket, held against the module ipaddress."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from socket import AF_INET, AF_INET6, inet_ntop

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.clients.sources import canonical, is_loopback, is_same, source_of

ADDRESSES = st.ip_addresses()
LOCAL_TRANSLATORS = IPv6Network("64:ff9b:1::/48")
SPECIAL = st.sampled_from(
    (
        "::/96",
        "::/104",
        "::ffff:0:0/96",
        "::ffff:0:0:0/96",
        "64:ff9b::/96",
        "64:ff9b::/64",
        "64:ff9b:1::/48",
        "2001::/16",
        "2001::/32",
        "2002::/16",
    )
).flatmap(lambda network: st.ip_addresses(v=6, network=network))


@pytest.mark.parametrize(
    ("host", "ipv4"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::ffff:c000:207", "192.0.2.7"),
        ("64:ff9b::192.0.2.33", "192.0.2.33"),  # RFC 6052, 2.4
        ("64:ff9b::1", "0.0.0.1"),
        ("::ffff:0:192.0.2.7", "192.0.2.7"),
        ("::192.0.2.7", "192.0.2.7"),
        ("2002:c000:207::1", "192.0.2.7"),
        ("2002:c000:207:ffff:1:2:3:4", "192.0.2.7"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "192.0.2.45"),  # RFC 4380's layout: port 40000, inverted as well
        ("2001::ffff:ffff", "0.0.0.0"),
    ],
)
def test_an_address_that_stands_for_an_ipv4_host_counts_as_that(host: str, ipv4: str) -> None:
    assert source_of(host) == IPv4Address(ipv4).packed


@pytest.mark.parametrize(
    "host",
    [
        "2001:db8:1:2:3:4:5:6",
        "2001:1::7",  # beside Teredo
        "64:ff9b::1:192.0.2.7",  # beside the 96 bits
        "64:ff9b:0:1::192.0.2.7",
        "64:ff9b:2::192.0.2.7",  # beside those of RFC 8215
        "::fffe:192.0.2.7",  # beside the mapped ones
        "::ffff:1:192.0.2.7",  # beside the translated ones
        "::1:0:192.0.2.7",
        "::",
        "::1",
        "::0.255.255.255",
        "2001:db8::5efe:192.0.2.7",  # ISATAP
        "2001:db8::200:5efe:192.0.2.7",
        "2001:db8:122:344::192.0.2.33",  # RFC 6052, 2.4: translators with a network of the site's own
        "2001:db8:1c0:2:21::",
        "fe80::1",
    ],
)
def test_any_other_address_counts_as_its_first_64_bits(host: str) -> None:
    assert source_of(host) == IPv6Address(host).packed[:8]


@pytest.mark.parametrize("host", ["64:ff9b:1::192.0.2.7", "64:ff9b:1:c000:0:207::", "64:ff9b:1:fffe::c000:207"])
def test_nobody_guesses_where_a_sites_own_translators_put_the_ipv4_address(host: str) -> None:
    assert source_of(host) == IPv6Address(host).packed


def expected_source(address: IPv4Address | IPv6Address) -> bytes:
    """The table once more, with what the standard library knows of it."""
    if isinstance(address, IPv4Address):
        return address.packed
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped.packed
    if address.sixtofour is not None:
        return address.sixtofour.packed
    if address.teredo is not None:
        return address.teredo[1].packed
    if address in LOCAL_TRANSLATORS:
        return address.packed
    if 1 << 24 <= int(address) < 1 << 32 or int(address) >> 32 in (0xFFFF0000, 0x64FF9B << 64):
        return address.packed[12:]
    return address.packed[:8]


@given(ADDRESSES | SPECIAL)
def test_every_address_counts_for_somebody(address: IPv4Address | IPv6Address) -> None:
    for spelling in (str(address), address.exploded, str(address).upper()):
        assert source_of(spelling) == expected_source(address)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff"),
        ("fe80::1%eth0", "fe80::2%lo"),
        ("2002:c000:207:1::1", "2002:c000:207:2::1"),  # two networks of one 6to4 site
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:0:5ef5:79fb:0:f000:3fff:fdd2"),  # two ports, two servers
    ],
)
def test_addresses_of_one_source(one: str, other: str) -> None:
    assert source_of(one) == source_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("192.0.2.7", "192.0.2.8"),
        ("2001:db8:1:2::1", "2001:db8:1:3::1"),
        ("192.0.2.7", "c000:207::"),
        ("::1", "0.0.0.1"),
        ("64:ff9b::192.0.2.7", "64:ff9b::192.0.2.8"),
        ("64:ff9b:1::192.0.2.7", "64:ff9b:1::192.0.2.8"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:0:4136:e378:8000:63bf:3fff:fdd3"),  # one server
    ],
)
def test_addresses_of_two_sources(one: str, other: str) -> None:
    assert source_of(one) != source_of(other)


# Canonical addresses.


@given(ADDRESSES | SPECIAL)
def test_an_address_has_one_canonical_spelling(address: IPv4Address | IPv6Address) -> None:
    spellings = {str(address), address.exploded, str(address).upper()}
    if isinstance(address, IPv4Address):
        spellings |= {f"::ffff:{address}", f"::FFFF:{int(address) >> 16:x}:{int(address) & 0xFFFF:x}"}
    (one,) = {canonical(spelling) for spelling in spellings}
    assert one is not None
    plain = getattr(address, "ipv4_mapped", None) or address
    assert ip_address(one) == plain


@pytest.mark.parametrize(
    "text",
    ["", " ", "unknown", "127.1", "0x7f.0.0.1", "1.2.3", "1.2.3.4.5", "1.2.3.256", "01.2.3.4", "1.2.3.4 ", " 1.2.3.4",
     ":", ":::", "::g", "1::2::3", "1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "[::1]", "::1/128", "1.2.3.4/32", "::1.2.3",
     "1.2.3.4\0", "::1\0", "::1\n", "١.2.3.4", "::\ud800", "1.2.3.4%lo"],
)  # fmt: skip
def test_what_is_no_address_has_none(text: str) -> None:
    assert canonical(text) is None


@given(st.text() | st.text("0123456789abcdef:.%[]/ "))
def test_any_text_is_an_address_or_none(text: str) -> None:
    one = canonical(text)
    if one is not None:
        assert canonical(one) == one
        assert source_of(text) == source_of(one)


# This machine's own.


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_this_machines_loopback(host: str) -> None:
    assert is_loopback(host)


def as_the_kernel_writes(address: IPv4Address | IPv6Address) -> str:
    """An address as a socket of its family has it: of a mapped one, the end in the manner of IPv4."""
    return inet_ntop(AF_INET if address.version == 4 else AF_INET6, address.packed)


@example(IPv6Address("::ffff:127.0.0.0"))
@given(ADDRESSES | SPECIAL)
def test_nobody_elses_address_is_this_machines_loopback(address: IPv4Address | IPv6Address) -> None:
    plain = getattr(address, "ipv4_mapped", None) or address
    for host in (as_the_kernel_writes(address), canonical(str(address)) or ""):
        assert is_loopback(host) == (plain == IPv6Address("::1") or str(plain).startswith("127."))


@given(ADDRESSES | SPECIAL, ADDRESSES | SPECIAL)
def test_two_ends_are_the_same_however_the_socket_names_them(
    one: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address
) -> None:
    hosts = {canonical(str(one)) or "": one, canonical(str(other)) or "": other}
    hosts |= {f"::ffff:{host}": address for host, address in hosts.items() if ":" not in host}
    for host, address in hosts.items():
        for there, address_there in hosts.items():
            same = (getattr(address, "ipv4_mapped", None) or address) == (
                getattr(address_there, "ipv4_mapped", None) or address_there
            )
            assert is_same(host, there) == same

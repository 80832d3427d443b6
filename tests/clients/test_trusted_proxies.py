"""``--trusted-proxies``: who is in it, held against the module ipaddress, and what is told of a wrong one."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.clients.trusted_proxies import TrustedProxies
from relay.mistakes import Mistake

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def plain(address: Address) -> Address:
    """An IPv4-mapped address is the IPv4 address."""
    return getattr(address, "ipv4_mapped", None) or address


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, Network]:
    """A network, as somebody writes it (with or without bits behind the prefix) and as it is."""
    address = plain(draw(st.ip_addresses()))
    most = address.max_prefixlen
    length = draw(st.integers(0, most))
    network = ip_network(f"{address}/{length}", strict=False)
    if isinstance(address, IPv4Address) and draw(st.booleans()):
        return f"::ffff:{address}/{length + 96}", network
    text = draw(st.sampled_from([f"{address}", f"{address.exploded}", f"{network.network_address}"]))
    if length == most and draw(st.booleans()):
        return str(address), network
    return f"{text}/{length}", network


@st.composite
def sets(draw: st.DrawFn) -> tuple[str, list[Network]]:
    """What somebody gives, and what is in it."""
    given = draw(st.lists(networks(), min_size=1, max_size=8))
    spaces = st.sampled_from(["", "", " "])
    text = ",".join(f"{draw(spaces)}{text}{draw(spaces)}" for text, _ in given)
    return text, [network for _, network in given]


@given(sets(), st.lists(st.ip_addresses(), max_size=5), st.data())
def test_it_trusts_whoever_is_in_one_of_its_networks_and_nobody_else(
    given: tuple[str, list[Network]], addresses: list[Address], data: st.DataObject
) -> None:
    text, inside = given
    trusted = TrustedProxies(text)
    assert trusted
    for network in inside:  # those at its edges, beside it, and somewhere in it
        first, last = int(network.network_address), int(network.broadcast_address)
        numbers = {first, last, max(first - 1, 0), min(last + 1, (1 << network.max_prefixlen) - 1)}
        numbers.add(data.draw(st.integers(first, last)))
        addresses += [type(network.network_address)(number) for number in numbers]
    for address in addresses:
        expected = any(plain(address).version == network.version and plain(address) in network for network in inside)
        hosts = [str(address), address.exploded]
        if isinstance(address, IPv4Address):
            hosts.append(f"::ffff:{address}")
        for host in hosts:
            assert trusted.trusts(host) == expected, (host, text)


@given(sets())
def test_its_text_is_the_same_set_in_one_spelling(given: tuple[str, list[Network]]) -> None:
    text, inside = given
    written = str(TrustedProxies(text))
    assert {ip_network(entry) for entry in written.split(",")} == set(inside)
    assert len(written.split(",")) == len(set(inside))
    again = ",".join(f" {entry}" for entry in reversed(text.split(",")))
    assert str(TrustedProxies(again)) == str(TrustedProxies(written)) == written


def test_without_any_it_trusts_nobody() -> None:
    trusted = TrustedProxies()
    assert not trusted
    assert str(trusted) == ""
    for host in ("127.0.0.1", "::1", "::", "0.0.0.0", "::ffff:10.0.0.1"):
        assert not trusted.trusts(host)


def test_every_ipv4_address_and_every_ipv6_address_are_two_networks() -> None:
    assert TrustedProxies("0.0.0.0/0").trusts("::ffff:192.0.2.7")
    assert not TrustedProxies("0.0.0.0/0").trusts("2001:db8::7")
    assert TrustedProxies("::/0").trusts("2001:db8::7")
    assert not TrustedProxies("::/0").trusts("::ffff:192.0.2.7")


def test_an_address_on_one_link_is_trusted_on_every_link() -> None:
    trusted = TrustedProxies("fe80::/10")
    assert trusted.trusts("fe80::1%eth0")
    assert trusted.trusts("fe80::1")


@pytest.mark.parametrize(
    "entry",
    ["", "x", "localhost", "proxy.example.org", "unix:", "*", "10", "10/8", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1",
     "10.0.0.0/08", "10.0.0.0/+8", "10.0.0.0/8/8", "10.0.0.0/255.0.0.0", "10.0.0.0 /8", "10.0.0.0/ 8", "10.0.0.256",
     "010.0.0.1", "10.0.0.1-10.0.0.9", "10.0.0.1 10.0.0.2", "10.0.0.1;10.0.0.2", "2001:db8::/129", "2001:db8::g",
     "[2001:db8::1]", "2001:db8", "/8", "::ffff:10.0.0.0/8", "::ffff:10.0.0.0/95", "fe80::1%eth0", "10.0.0.0/٨"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["{}", "192.0.2.7,{}", "{},2001:db8::/32"])
def test_a_wrong_entry_is_a_mistake_that_names_it_and_says_what_to_give(entry: str, place: str) -> None:
    with pytest.raises(Mistake) as mistake:
        TrustedProxies(place.format(entry))
    line = str(mistake.value)
    assert line.startswith(f"--trusted-proxies {entry}: ")
    assert "; give addresses and networks, separated by commas, such as " in line
    assert "\n" not in line


def test_what_a_mistake_advises_can_be_given() -> None:
    with pytest.raises(Mistake) as mistake:
        TrustedProxies("nonsense")
    trusted = TrustedProxies(str(mistake.value).rpartition("such as ")[2])
    assert trusted.trusts("10.1.2.3")


@given(st.text() | st.text("0123456789abcdef:./, %"))
def test_any_text_is_a_set_or_a_mistake(text: str) -> None:
    try:
        trusted = TrustedProxies(text)
    except Mistake:
        return
    assert trusted.trusts(str(ip_address(str(trusted).partition(",")[0].partition("/")[0])))

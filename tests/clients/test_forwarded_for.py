"""X-Forwarded-For: whom it names, whoever has written what in front of that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.clients.forwarded_for import named_client
from relay.clients.sources import canonical
from relay.clients.trusted_proxies import TrustedProxies

TRUSTED = TrustedProxies("10.0.0.0/8,2001:db8::/32")

PROXIES = st.ip_addresses(network="10.0.0.0/8") | st.ip_addresses(network="2001:db8::/32")
CLIENTS = st.ip_addresses().filter(lambda address: not TRUSTED.trusts(str(address)))
ANYTHING = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"))
GARBAGE = (
    ANYTHING.map(lambda text: text.replace(",", "")).filter(lambda text: text.strip(" \t")).map(lambda text: text + "?")
)


@pytest.mark.parametrize(
    ("fields", "client"),
    [
        (["192.0.2.7"], "192.0.2.7"),
        (["2a00::7"], "2a00::7"),
        (["2A00:0::0007"], "2a00::7"),
        (["::ffff:192.0.2.7"], "192.0.2.7"),
        (["198.51.100.1, 192.0.2.7"], "192.0.2.7"),  # nobody knows who wrote the first
        (["192.0.2.7, 10.0.0.2"], "192.0.2.7"),
        (["192.0.2.7, 10.0.0.2, 2001:db8::2"], "192.0.2.7"),
        (["127.0.0.1, 192.0.2.7, 10.0.0.2"], "192.0.2.7"),
        (["192.0.2.7", "10.0.0.2"], "192.0.2.7"),  # two fields are one list
        (["198.51.100.1, 192.0.2.7", "10.0.0.3,10.0.0.2"], "192.0.2.7"),
        (["198.51.100.1", "192.0.2.7"], "192.0.2.7"),
        (["192.0.2.7,10.0.0.2"], "192.0.2.7"),
        (["\t192.0.2.7 ,\t 10.0.0.2 "], "192.0.2.7"),
        ([",, 192.0.2.7 , ,", "", " , "], "192.0.2.7"),
        # With a port, in brackets, with a zone.
        (["192.0.2.7:51234"], "192.0.2.7"),
        (["[2a00::7]:51234"], "2a00::7"),
        (["[2a00::7]"], "2a00::7"),
        (["fe80::7%eth0"], "fe80::7"),
        (["[fe80::7%25eth0]:80, 10.0.0.2:443"], "fe80::7"),
        # All are trusted: the first.
        (["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        (["10.0.0.2"], "10.0.0.2"),
        # Nobody is named.
        ([], None),
        ([""], None),
        ([" , ,", "\t"], None),
        # What is no address ends it.
        (["unknown"], None),
        (["192.0.2.7, unknown"], None),
        (["192.0.2.7, unknown, 10.0.0.2"], "10.0.0.2"),
        (["unknown, 192.0.2.7, 10.0.0.2"], "192.0.2.7"),
        (["192.0.2.7, _hidden, 10.0.0.3", "10.0.0.2"], "10.0.0.3"),
        (['192.0.2.7, "10.0.0.2"'], None),
        (["for=192.0.2.7"], None),  # RFC 7239 has a field of its own
        (["192.0.2.7 10.0.0.2"], None),
        (["192.0.2.7;10.0.0.2"], None),
    ],
)
def test_the_last_address_that_is_not_a_trusted_proxy_is_the_client(fields: list[str], client: str | None) -> None:
    assert named_client(fields, TRUSTED) == client


@pytest.mark.parametrize(
    "member",
    ["192.0.2", "192.0.2.256", "192.0.2.07", "192.0.2.7:", "192.0.2.7:http", "192.0.2.7:123456", "192.0.2.7:-1",
     ":80", "[]", "[]:80", "[2a00::7", "2a00::7]", "[2a00::7]80", "[2a00::7]:", "[[2a00::7]]", "2a00::7::", "2a00::g",
     "192.0.2.7/32", "example.org", "localhost", "unknown:80", "-", "%", "%eth0", "192.0.2.7%eth0", "\xff", "1" * 5000],
)  # fmt: skip
def test_what_is_no_address_leaves_the_proxy_that_wrote_it(member: str) -> None:
    assert named_client([f"192.0.2.8, {member}"], TRUSTED) is None
    assert named_client([f"192.0.2.8, {member}, 10.0.0.2"], TRUSTED) == "10.0.0.2"
    assert named_client([f"{member}, 192.0.2.8"], TRUSTED) == "192.0.2.8"


def split(members: list[str], cuts: list[bool]) -> list[str]:
    """`members` as one list, spread over several fields."""
    fields = [""]
    for member, cut in zip(members, cuts, strict=False):
        if cut:
            fields.append("")
        fields[-1] += f"{member} , "
    return fields


@given(
    invention=st.lists(ANYTHING, max_size=3),
    client=CLIENTS,
    proxies=st.lists(PROXIES, max_size=4),
    cuts=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_nothing_that_a_client_invents_makes_it_another(
    invention: list[str], client: object, proxies: list[object], cuts: list[bool]
) -> None:
    fields = split([*invention, str(client), *map(str, proxies)], cuts)
    assert named_client(fields, TRUSTED) == canonical(str(client))


@given(invention=st.lists(ANYTHING, max_size=3), garbage=GARBAGE, proxies=st.lists(PROXIES, max_size=4))
def test_behind_garbage_the_last_proxy_that_can_be_relied_on_counts(
    invention: list[str], garbage: str, proxies: list[object]
) -> None:
    fields = [", ".join([*invention, garbage, *map(str, proxies)])]
    assert named_client(fields, TRUSTED) == (canonical(str(proxies[0])) if proxies else None)


@given(st.lists(st.text() | st.text("0123456789abcdef:.,[]% \t")))
def test_any_fields_name_a_canonical_address_or_nobody(fields: list[str]) -> None:
    client = named_client(fields, TRUSTED)
    assert client is None or canonical(client) == client


def test_where_nobody_is_trusted_the_last_address_counts() -> None:
    assert named_client(["192.0.2.7, 10.0.0.2"], TrustedProxies()) == "10.0.0.2"

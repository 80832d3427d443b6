"""X-Forwarded-For: where a client says that it comes from, as far as proxies that are trusted vouch for it. Pure.

Each proxy adds at the end the address that it was called from, and passes on what was there before. So the list is read
from its end, and the first address found there that is not a trusted proxy's is the client's; what stands before it is
the client's own invention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from relay.clients.sources import canonical
from relay.clients.trusted_proxies import TrustedProxies

_WITH_PORT = re.compile(r"\[([^][]*)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")
"""Not of the convention, which is bare addresses, but some proxies write these: Azure's add the port."""


def named_client(forwarded_for: Sequence[str], trusted: TrustedProxies) -> str | None:
    """The canonical address of the client, as a proxy that is trusted tells it; None for the proxy itself.

    Where all addresses are trusted, it is the first of them: a client on a trusted network. A member that is no
    address (“unknown”, a name, garbage) ends the reading: whoever put it there does not say who called, so the last
    that can be relied on is whoever put it there, which is the address after it, or the proxy itself.

    Args:
        forwarded_for: the values of the fields of that name, in their order; each may be a list.
        trusted: whose word is taken.
    """
    nearest = None
    for value in reversed(forwarded_for):
        for member in (each.strip(" \t") for each in reversed(value.split(","))):
            if not member:
                continue  # does not count (RFC 9110, 5.6.1.2)
            host = _address_of(member)
            if host is None:
                return nearest
            nearest = host
            if not trusted.trusts(host):
                return host
    return nearest


def _address_of(member: str) -> str | None:
    match = _WITH_PORT.fullmatch(member)
    return canonical(member if match is None else match[1] or match[2] or "")

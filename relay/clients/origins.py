"""Whom a connection counts for, where proxies that are trusted may say it; and whether it may be a health check.

A connection from anybody else counts for the address that it comes from, at once. One from a trusted proxy counts for
nobody until the proxy has said who has called it, in a PROXY header (`proxied`), or, over WebSocket, in
X-Forwarded-For, once that may have come.

When all places are taken, whether anybody gives way to a newcomer, and who, depends on whose it is. So nobody does for
one of a proxy's before that is said; until then it is `unnamed`, and one more than there are places. Few can be that,
and not for long.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

from relay.clients.bounds import Bound
from relay.clients.claim import Claim
from relay.clients.client import Client, Recorded
from relay.clients.forwarded_for import named_client
from relay.clients.places import Places, in_user_namespace, is_own
from relay.clients.sources import is_loopback, is_same
from relay.clients.speech import Speech
from relay.clients.trusted_proxies import TrustedProxies
from relay.options import Options

MOST_UNNAMED = 16
"""So many may be here beyond all places. An honest proxy has said at once who has called it; and they take descriptors
from those that are not for clients (`relay.cli.RESERVED_FDS`)."""


class Origins:
    """Lets newcomers in as whoever they are.

    Args:
        options: whom to trust, and whether such a one has to send a header.
        places: where a newcomer's place comes from.
    """

    def __init__(self, options: Options, places: Places) -> None:
        self._trusted = TrustedProxies(options.trusted_proxies)
        self._proxied: Callable[[str, Speech], Speech] = lambda host, speech: speech
        if self._trusted:
            from relay.clients.proxied import Proxied  # not before: few relays stand behind proxies

            self._proxied = partial(Proxied, required=options.proxy_protocol)
        self._places = places
        self._looks_for_own = in_user_namespace()
        self._unnamed: dict[Client, None] = {}  # in the order in which they came

    def let_in(self, sock: socket.socket, host: str, speech: Speech) -> Client | None:
        """The client that has connected from `host` and speaks like this; None when it may not come in.

        Its place is taken then.
        """
        trusted = bool(self._trusted) and self._trusted.trusts(host)
        own = not trusted and is_own(host, sock)
        if own and self._looks_for_own and not is_loopback(host):
            self._looks_for_own = False  # once is enough: such a one may be a health check, which nothing tells of
            self._places.bounds_met.note(Bound.OWN_ADDRESS)
        source = None if trusted else self._places.source_of(host, own=own)
        is_surplus = trusted and self._places.is_full()
        if not is_surplus and not self._places.admits(source):
            return None
        client = Client(sock)
        client.source = source
        client.speech = self._proxied(host, speech) if trusted else speech
        if own or trusted:
            client.recorded = Recorded.WITH_A_BYTE
        if is_surplus:
            self._unnamed[client] = None
        self._places.take(source)  # at last: nothing can go wrong any more
        return client

    def came_within(self, seconds: float, now: float) -> int:
        """Of those who are unnamed, how many have been so for no longer than that; `now` in monotonic seconds."""
        return sum(now - client.arrived <= seconds for client in self._unnamed)

    def is_unnamed(self, client: Client) -> bool:
        """Whether `client` is here beyond all places, and nobody has said whose it is."""
        return client in self._unnamed

    def oldest_too_many(self) -> Client | None:
        """Who has been unnamed longest, if there are more of them than may be."""
        return next(iter(self._unnamed)) if len(self._unnamed) > MOST_UNNAMED else None

    def forget(self, client: Client) -> None:
        """`client` is here no longer, or is one of those who have places."""
        if client in self._unnamed:
            del self._unnamed[client]
            self._places.look_again()

    def settle(self, client: Client) -> bool:
        """Count `client` for whom a proxy says that it is, if all has been said; False when that one has its share."""
        claim, client.claim = client.claim, None
        assert claim is not None
        host = claim.host or claim.proxy
        if self._trusted.trusts(host):
            if client.speech.keeps(claim):
                return True  # there may be more to come
            host = named_client(claim.forwarded_for or (), self._trusted) or host
        sock = client.sock
        own = is_own(claim.proxy, sock) and is_own(host, sock)
        client.recorded = self._recorded(claim, host, own=own)
        source = self._places.source_of(host, own=own)
        if not self._places.admits_here(source, is_surplus=self.is_unnamed(client)):
            return False
        client.source = source
        self.forget(client)
        return True

    def _recorded(self, claim: Claim, host: str, *, own: bool) -> Recorded:
        if claim.is_local:
            return Recorded.WITH_A_PARTNER
        if own or is_same(host, claim.proxy) or self._trusted.trusts(host):
            return Recorded.WITH_A_BYTE
        return Recorded.ALWAYS

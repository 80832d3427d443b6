"""Who waits for which token: pure bookkeeping, no sockets and no clock.

Invariants, which the tests hold:

- two clients match when their tokens are equal and their sides differ; a client with no side matches any;
- so everybody who waits for one token is of one side, and a client with no side waits alone;
- a newcomer gets the one that came last: an earlier one may be dead without anybody knowing yet, its client having
  come back on another connection;
- nobody is in the room twice, and nobody stays in it after `leave` or `take_all`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from relay.clients.sites import Sites


class Waiting(Protocol):
    """What the room has to know of a client."""

    @property
    def token(self) -> bytes:
        """The token of its handshake."""

    @property
    def side(self) -> bytes | None:
        """The side of its handshake, None if it gave none."""

    @property
    def arrived(self) -> float:
        """When it connected, in seconds of a clock that all workers share."""

    @property
    def source(self) -> bytes | None:
        """Whose it is; None for one that nobody counts."""


W = TypeVar("W", bound=Waiting)


class WaitingRoom(Generic[W]):
    """Clients with a good handshake and no partner yet, by token, the longest waiting first.

    Args:
        sites: tells who gives way, and is told of everybody who waits.
    """

    def __init__(self, sites: Sites[W]) -> None:
        self._sites = sites
        self._by_token: dict[bytes, list[W]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[W]:
        """Everybody who waits; the room may change while the caller goes through them."""
        return iter([client for clients in self._by_token.values() for client in clients])

    def partner_for(self, newcomer: W) -> W | None:
        """The client that came last of those who match `newcomer`; it stays in the room."""
        for client in reversed(self._by_token.get(newcomer.token, ())):
            if client.side is None or newcomer.side is None or client.side != newcomer.side:
                return client
        return None

    def enter(self, client: W) -> None:
        """Let `client` wait; the caller has found no partner for it."""
        clients = self._by_token.setdefault(client.token, [])
        clients.append(client)
        self._count += 1
        self._sites.enter(client)
        if len(clients) > 1 and clients[-2].arrived > client.arrived:
            clients.sort(key=lambda waiting: waiting.arrived)  # another worker has handed it on, and that took a while

    def leave(self, client: W) -> None:
        """Forget `client`, which is in the room.

        Raises ValueError when it is not: the message of a KeyError would be the token.
        """
        clients = self._by_token.get(client.token, [])
        clients.remove(client)
        if not clients:
            del self._by_token[client.token]
        self._count -= 1
        self._sites.leave(client)

    def take_all(self, token: bytes) -> list[W]:
        """Empty the room of everybody who waits for `token`, and return them: the spares, once one is matched."""
        clients = self._by_token.pop(token, [])
        self._count -= len(clients)
        for client in clients:
            self._sites.leave(client)
        return clients

    def all_for(self, token: bytes) -> list[W]:
        """Everybody who waits for `token`; they stay in the room, which may change meanwhile."""
        return [*self._by_token.get(token, ())]

    def oldest_for(self, token: bytes) -> W:
        """The one who has waited longest for `token`; somebody does."""
        return self._by_token[token][0]

    def tokens(self) -> list[bytes]:
        """All tokens that somebody waits for; the room may change meanwhile."""
        return [*self._by_token]

    def first_to_go(self) -> W:
        """Who gives way when too many wait: the one who has waited longest, of the site that has the most. Where all
        have few, it is of all those the one who waits for the token that somebody has waited for longest. The room is
        not empty."""
        return self._sites.first_to_go() or next(iter(self._by_token.values()))[0]

    def waiting_for(self, token: bytes) -> int:
        """How many clients wait for `token`."""
        return len(self._by_token.get(token, ()))

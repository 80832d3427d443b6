"""A client behind a trusted proxy, until the proxy's header has come: then it speaks as clients at its port do.

The header is looked at before it is taken, so that what follows it stays in the socket for whoever reads that.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from relay.clients.bounds import Bound
from relay.clients.claim import Claim
from relay.clients.handshake import Handshake, Refusal
from relay.clients.proxy_header import LONGEST, Flaw, HeaderReader, ProxyHeader
from relay.clients.speech import PLAIN, Ending, Speaker, Speech

if TYPE_CHECKING:
    from relay.clients.pings import Pings

_GONE = Ending(None, gone=True)
_FLAWED = Ending(None, gone=True, bound=Bound.PROXY_HEADER)

KIND = b"X"
"""What one that travels begins with."""

_PACKED = struct.Struct("!?BH")  # whether the header is required, lengths of the proxy's address and of what has come


class Proxied:
    """How a connection from a trusted proxy begins.

    Args:
        proxy: the canonical address of the proxy.
        then: how the client speaks after the header.
        required: whether there has to be a header, but before HTTP: there X-Forwarded-For can stand for it.
        head: what has come of it.
    """

    __slots__ = ("_head", "_proxy", "_required", "_then")

    reader = None

    def __init__(self, proxy: str, then: Speech, *, required: bool, head: bytes = b"") -> None:
        self._proxy = proxy
        self._then = then
        self._required = required
        self._head = HeaderReader(head)

    def hear(self, client: Speaker) -> Handshake | Ending | None:
        """See `Speech`. When all is said, the claim is with `client`, who has another speech then."""
        sock = client.sock
        before = len(self._head.received)
        try:
            chunk = sock.recv(LONGEST + 1 - before, socket.MSG_PEEK)
        except BlockingIOError:
            raise
        except OSError:
            chunk = b""
        if not chunk:
            return _FLAWED if before else _GONE
        header = self._head.hear(chunk)
        if header is None:
            sock.recv(len(chunk))
            return None
        if isinstance(header, ProxyHeader):
            sock.recv(header.size - before)
            client.claim = Claim(self._proxy, header.host, header.is_local)
        elif header is Flaw.MISSING and self._may_do_without():
            client.received = bytes(self._head.received[:before])
            client.claim = Claim(self._proxy)
        else:
            return _FLAWED
        client.speech = self._then
        return None

    def _may_do_without(self) -> bool:
        return not self._required or (self._then is not PLAIN and self._head.received[:1].isupper())

    def keeps(self, claim: Claim) -> bool:
        """See `Speech`; nothing has been said yet."""
        return False

    def interruption(self, client: Speaker) -> Ending | None:
        """See `Speech`."""
        return PLAIN.interruption(client)

    def refusal(self, refusal: Refusal) -> Ending:
        """See `Speech`: the proxy would not understand."""
        return _FLAWED if self._required or self._head.received else _GONE

    def lonely(self) -> Ending:
        """See `Speech`."""
        return _GONE

    def ok(self) -> bytes:
        """See `Speech`; nobody who speaks like this is matched."""
        return PLAIN.ok()

    def be_pinged(self, pings: Pings, sock: socket.socket) -> None:
        """See `Speech`."""

    def be_silent(self) -> None:
        """See `Speech`."""

    def pack(self) -> bytes:
        """See `Speech`."""
        proxy = self._proxy.encode()
        head = bytes(self._head.received)
        return KIND + _PACKED.pack(self._required, len(proxy), len(head)) + proxy + head + self._then.pack()


def unpack(packed: bytes) -> Speech:
    """The speech of a client that another worker has handed on; raises ValueError when it is none."""
    if not packed:
        return PLAIN
    if not packed.startswith(KIND):
        from relay.clients import web  # not before: most relays have no WebSocket

        return web.unpack(packed)
    try:
        required, proxy, head = _PACKED.unpack_from(packed, 1)
    except struct.error as error:
        raise ValueError(str(error)) from error
    proxy_at = 1 + _PACKED.size
    head_at = proxy_at + proxy
    end = head_at + head
    if end > len(packed) or packed[end : end + 1] == KIND:
        raise ValueError("a header that is cut short")
    return Proxied(packed[proxy_at:head_at].decode(), unpack(packed[end:]), required=required, head=packed[head_at:end])

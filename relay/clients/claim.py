"""What a trusted proxy has said about a client, until it is settled whom that counts for. Pure."""

from __future__ import annotations

import struct

from relay.process.dataclass import dataclass

_LAYOUT = struct.Struct("!?BB")  # whether it is local, lengths of the two addresses


@dataclass(frozen=True, slots=True)
class Claim:
    """What the `proxy` says, which has the canonical address of that name.

    Attributes:
        proxy: the canonical address that the connection comes from.
        host: the canonical address of the client, if the proxy has named one in a PROXY header.
        is_local: whether the proxy says there that it calls for itself.
        forwarded_for: the values of X-Forwarded-For; None while nobody knows whether that comes, too.
    """

    proxy: str
    host: str | None = None
    is_local: bool = False
    forwarded_for: tuple[str, ...] | None = None


def pack_claim(claim: Claim | None) -> bytes:
    """A claim as it travels to another worker, before X-Forwarded-For is known; there need not be one."""
    if claim is None:
        return _LAYOUT.pack(False, 0, 0)
    proxy, host = claim.proxy.encode(), (claim.host or "").encode()
    return _LAYOUT.pack(claim.is_local, len(proxy), len(host)) + proxy + host


def split_claim(packed: bytes) -> tuple[Claim | None, bytes]:
    """What `pack_claim` has made, and what follows it; raises ValueError when it is not that."""
    try:
        is_local, proxy, host = _LAYOUT.unpack_from(packed)
    except struct.error as error:
        raise ValueError(str(error)) from error
    host_at = _LAYOUT.size + proxy
    end = host_at + host
    if end > len(packed):
        raise ValueError("a claim that is cut short")
    if not proxy:
        return None, packed[end:]
    return Claim(packed[_LAYOUT.size : host_at].decode(), packed[host_at:end].decode() or None, is_local), packed[end:]

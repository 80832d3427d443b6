"""Which worker a token lives with: rendezvous hashing, pure.

Every worker gives every token a score, and the worker that scores highest is its home. Workers that know of the same
siblings agree without talking, and when one comes or goes only those tokens move that it wins or loses.
(Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol, TypeVar

_MASK = (1 << 64) - 1


class Housed(Protocol):
    """A worker, as far as its tokens are concerned."""

    @property
    def seed(self) -> int:
        """64 bits that this worker alone has; see `seed_of`."""


H = TypeVar("H", bound=Housed)


def seed_of(name: str) -> int:
    """The seed of the worker called `name`: any 64 bits will do, if everybody derives the same."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def home_of(token: bytes, workers: Iterable[H]) -> H:
    """The worker of `workers`, which are not none, that is home to `token` (64 hexadecimal digits)."""
    key = int(token[:16], 16)
    return max(workers, key=lambda worker: _score(key ^ worker.seed))


def _score(bits: int) -> int:
    """Mix 64 bits well: the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)

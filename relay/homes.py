"""Which worker a token lives with: rendezvous hashing, pure.

Tokens fall into `SLOTS` slots by their first digits, which are as random as the rest. Every worker gives every slot a
score, and the one that scores highest is home to its tokens. Workers that know of the same siblings agree without
talking, and when one comes or goes only those slots move that it wins or loses.
(Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

SLOTS = 1 << 10

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


def slot_of(token: bytes) -> int:
    """The slot of `token`, which begins with at least three hexadecimal digits."""
    return int(token[:3], 16) >> 2


def homes_among(workers: Sequence[H]) -> list[H]:
    """For each slot, the worker of `workers`, which are not none, that is home to it."""
    return [max(workers, key=lambda worker: _score(slot, worker.seed)) for slot in range(SLOTS)]


def _score(slot: int, seed: int) -> int:
    """Mix slot and seed well: the finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    bits = ((slot + 1) * 0x9E3779B97F4A7C15 ^ seed) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)

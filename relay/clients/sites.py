"""Who of many gives way when there are too many of them: whoever has been here longest, of the site that has the most.

Where the one that has been here longest gave way, whosever it is, one machine that comes again and again would drive
everybody out: all of its own are younger. So as in `eviction` sites are told apart by how many times `FEW` they have
here, to a factor of two, and those that have the same give way by turns.

Within the one that has the most (see `sources.site_of`) a machine may have a few in each of thousands of networks,
beside a neighbour who has one network. So those networks that have the same number here are a crowd, which weighs as
much as they have together. The heaviest gives way, of two that weigh the same the one whose networks have more each;
and its networks by turns. So nobody gives way while all others of its site have more than it has, nor while some that
have the same number have more together. Who has networks of all numbers leaves a neighbour the square root of what it
has itself.

Only those are known here who came when their site had more than a few connections, of all kinds and at the whole relay:
honest clients hardly ever, and they take no memory and next to no time. So the first few of a site never count, and
where no other has many nobody is named: then the caller has one give way by age. Whom nobody counts, as this machine's
own, is never known here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

from relay.clients.bounds import FEW, rank_of
from relay.clients.sources import site_of

OUTDATED = 4
"""How many times as much as is needed may be kept of what the crowds of a site weighed before."""


class Owned(Protocol):
    """Whoever may give way."""

    @property
    def source(self) -> bytes | None:
        """Whose it is; None for one that nobody counts."""


T = TypeVar("T", bound=Owned)


class Sites(Generic[T]):
    """Those whose site has many connections, by source in the order in which they came.

    Each of the methods takes the same time however many are here, but for a logarithm.

    Args:
        count_at_site: how many connections the relay has from the whole site of a source.
    """

    def __init__(self, count_at_site: Callable[[bytes | None], int]) -> None:
        self._count_at_site = count_at_site
        self._members: dict[bytes, dict[T, None]] = {}
        self._sizes: dict[bytes, int] = {}  # of sites
        self._sites = _Ranks()
        self._networks: dict[bytes, _Networks] = {}  # by site, where it has several

    def enter(self, who: T) -> None:
        """`who` is here from now on, and among those that are counted."""
        source = who.source
        if source is None or self._count_at_site(source) < FEW:
            return
        members = self._members.get(source)
        if members is None:
            members = self._members[source] = {}
        members[who] = None
        self._resize(source, len(members) - 1, len(members))

    def leave(self, who: T) -> None:
        """`who` is here no longer; nothing happens when it is not known."""
        source = who.source
        if source is None:
            return
        members = self._members.get(source)
        if members is None or who not in members:
            return
        del members[who]
        if not members:
            del self._members[source]
        self._resize(source, len(members) + 1, len(members))

    def _resize(self, source: bytes, before: int, now: int) -> None:
        site = site_of(source)
        size = self._sizes.get(site, 0) + now - before
        self._sites.set(site, size)
        if size:
            self._sizes[site] = size
        else:
            del self._sizes[site]
        if site == source:
            return
        networks = self._networks.get(site)
        if networks is None:
            networks = self._networks[site] = _Networks()
        networks.resize(source, before, now)
        if not size:
            del self._networks[site]

    def first_to_go(self) -> T | None:
        """Who is to give way; None when all sites have few."""
        if not self._sites.highest:
            return None
        whose = self._sites.next_of_highest()
        networks = self._networks.get(whose)
        if networks is not None:
            whose = networks.next_of_heaviest()
        return next(iter(self._members[whose]))


class _Ranks:
    """Sites by rank; those of one rank take turns."""

    __slots__ = ("_by_rank", "_rank_of")

    def __init__(self) -> None:
        self._rank_of: dict[bytes, int] = {}
        self._by_rank: dict[int, OrderedDict[bytes, None]] = {}

    def __len__(self) -> int:
        return len(self._rank_of)

    @property
    def highest(self) -> int:
        """The highest rank that somebody has; 0 where nobody is."""
        return max(self._by_rank, default=0)

    def set(self, whose: bytes, size: int) -> None:
        """Here are so many of `whose`; with 0, it is forgotten."""
        before = self._rank_of.get(whose)
        rank = rank_of(size) if size else None
        if rank == before:
            return
        if before is not None:
            del self._rank_of[whose], self._by_rank[before][whose]
            if not self._by_rank[before]:
                del self._by_rank[before]
        if rank is not None:
            self._rank_of[whose] = rank
            self._by_rank.setdefault(rank, OrderedDict())[whose] = None

    def next_of_highest(self) -> bytes:
        """Whose turn it is of those that have the highest rank; there is one."""
        highest = self._by_rank[self.highest]
        whose = next(iter(highest))
        highest.move_to_end(whose)
        return whose


class _Networks:
    """The networks of one site, by how many each has: those that have the same are a crowd, and take turns."""

    __slots__ = ("_crowds", "_weights")

    def __init__(self) -> None:
        self._crowds: dict[int, OrderedDict[bytes, None]] = {}
        self._weights: list[tuple[int, int]] = []
        """A heap of how many each crowd has together and each network of it, both negative; and what was so earlier."""

    def resize(self, network: bytes, before: int, now: int) -> None:
        """`network` has `now` so many, and had so many `before`; either may be 0."""
        if before:
            del self._crowds[before][network]
            self._weigh(before)
        if now:
            self._crowds.setdefault(now, OrderedDict())[network] = None
            self._weigh(now)
        if len(self._weights) > OUTDATED * (len(self._crowds) + FEW):
            self._weights = [(-count * len(crowd), -count) for count, crowd in self._crowds.items()]
            heapify(self._weights)

    def _weigh(self, count: int) -> None:
        crowd = self._crowds[count]
        if crowd:
            heappush(self._weights, (-count * len(crowd), -count))
        else:
            del self._crowds[count]

    def next_of_heaviest(self) -> bytes:
        """Whose turn it is of the crowd that has the most together; there is one."""
        while True:
            weight, count = self._weights[0]
            crowd = self._crowds.get(-count)
            if crowd and weight == count * len(crowd):
                break
            heappop(self._weights)
        network = next(iter(crowd))
        crowd.move_to_end(network)
        return network

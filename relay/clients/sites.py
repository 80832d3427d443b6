"""Who of many gives way when there are too many of them: whoever has been here longest, of the site that has the most.

Where the one that has been here longest gave way, whosever it is, one machine that comes again and again would drive
everybody out: all of its own are younger. So as in `eviction` sites are told apart by how many times `FEW` they have
here, to a factor of two; within the one that has the most (see `sources.site_of`), so are its networks. Those that have
the same give way by turns.

Only those are known here who came when their site had more than a few connections, of all kinds and at the whole relay:
honest clients hardly ever, and they take no memory and next to no time. So the first few of a site never count, and
where no other has many nobody is named: then the caller has one give way by age. Whom nobody counts, as this machine's
own, is never known here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from relay.clients.bounds import FEW, rank_of
from relay.clients.sources import site_of


class Owned(Protocol):
    """Whoever may give way."""

    @property
    def source(self) -> bytes | None:
        """Whose it is; None for one that nobody counts."""


T = TypeVar("T", bound=Owned)


class Sites(Generic[T]):
    """Those whose site has many connections, in the order in which they came: by source where that has many
    itself, otherwise by site.

    Args:
        count_of: how many connections the relay has from a source.
        count_at_site: the same of its whole site.
    """

    def __init__(self, count_of: Callable[[bytes | None], int], count_at_site: Callable[[bytes | None], int]) -> None:
        self._count_of = count_of
        self._count_at_site = count_at_site
        self._members: dict[bytes, dict[T, None]] = {}
        self._sizes: dict[bytes, int] = {}  # of sites
        self._sites = _Ranks()
        self._networks: dict[bytes, _Ranks] = {}  # by site

    def enter(self, who: T) -> None:
        """`who` is here from now on, and among those that are counted."""
        source = who.source
        if source is None or self._count_at_site(source) < FEW:
            return
        site = site_of(source)
        whose = source if self._count_of(source) >= FEW else site
        members = self._members.get(whose)
        if members is None:
            members = self._members[whose] = {}
        members[who] = None
        self._resize(site, 1)
        if site != source:
            networks = self._networks.get(site)
            if networks is None:
                networks = self._networks[site] = _Ranks()
            networks.set(whose, len(members) if whose != site else 1)

    def leave(self, who: T) -> None:
        """`who` is here no longer; nothing happens when it is not known."""
        source = who.source
        if source is None or not self._members:
            return
        site = site_of(source)
        for whose in (source, site):  # it has come to have many since, or has no longer
            if who in self._members.get(whose, ()):
                self._take_out(who, whose, site)
                return

    def _take_out(self, who: T, whose: bytes, site: bytes) -> None:
        members = self._members[whose]
        del members[who]
        if not members:
            del self._members[whose]
        self._resize(site, -1)
        networks = self._networks.get(site)
        if networks is not None:
            networks.set(whose, len(members) if whose != site else min(len(members), 1))
            if not networks:
                del self._networks[site]

    def _resize(self, site: bytes, by: int) -> None:
        size = self._sizes.get(site, 0) + by
        self._sites.set(site, size)
        if size:
            self._sizes[site] = size
        else:
            del self._sizes[site]

    def first_to_go(self) -> T | None:
        """Who is to give way; None when all sites have few."""
        if not self._sites.highest:
            return None
        whose = self._sites.next_of_highest()
        if whose in self._networks:
            whose = self._networks[whose].next_of_highest()
        return next(iter(self._members[whose]))


class _Ranks:
    """Sites, or the networks of one, by rank; those of one rank take turns."""

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

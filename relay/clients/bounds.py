"""What nobody may have more of than is fair: pure bookkeeping, no sockets, the clock is the caller's.

A relay is open to everybody. Each bound here is far beyond what an honest client needs, and keeps one that is not from
taking what the others need. Source addresses are known only as long as something is connected from there, or for
the second in which it came, and only here.
"""

from __future__ import annotations

import enum
from collections import Counter

LOG_SECONDS = 60.0
"""At most so often does the log say that bounds were met."""

FEW = 8
"""Below so many connections, all sources are alike: two sides and their spares may come from one household."""

NEW_OF_SITE = 4
"""How many times as many newcomers as one source the networks of one site may have together."""


def rank_of(count: int) -> int:
    """The rank of whoever has so many: 0 for a few, and higher each time that there are twice as many."""
    return (count // FEW).bit_length()


class Bound(enum.Enum):
    """A bound; the value is what the log says was done, and to how many."""

    HANDSHAKES = "--max-handshakes: turned away the client that had been silent longest, of whoever had most"
    PER_SOURCE = "--max-per-source: turned away new connections from an address that had its share"
    NEW_PER_SOURCE = (
        "--max-new-per-source: turned away new connections from an address that made too many, or from an IPv6 site "
        "whose networks did together"
    )
    WAITING = "--max-waiting: turned away the client that had waited longest, of whoever had most"
    PER_TOKEN = "--max-waiting-per-token: turned away the client that had waited longest with the same token"
    IDLE = "--idle-timeout: ended transfers in which nothing moved"
    PAIR_BYTES = "--max-pair-bytes: ended transfers that were too large"
    CONNECTIONS = "--max-connections: let new connections wait to be accepted"
    PLACES = "--max-connections: ended what had been idle longest, of whoever had most, for new connections"
    PROXY_HEADER = "--trusted-proxies: closed connections of a proxy whose PROXY header was missing, wrong or too late"
    NO_WAY_UPSTREAM = "--upstream: turned away clients, since no file descriptor was left for a connection there"
    NO_PORT_UPSTREAM = (
        "--upstream: turned away clients, since this machine had no port left for a connection there; "
        "widen net.ipv4.ip_local_port_range, or give several addresses"
    )
    UNNAMED = (
        "--trusted-proxies: with all places taken, closed connections of which a proxy had not said whose they are"
    )
    UPSTREAM = "--upstream: turned away clients, since no address of it could be reached"
    LINGERING = "--max-connections: left no time to read why to those who were sent away, for new connections"
    ARREARS = "--max-connections: reset who took nothing of what was left of a transfer, for new connections"
    CROWDED = "--max-connections: turned away new connections from addresses that had more than the others"
    OWN_ADDRESS = (
        "--max-per-source: took a client that came from this container's own address; where all do, as through "
        "rootless Podman's port handler, none has a share (docs/containers.md)"
    )
    EXHAUSTED = "no file descriptor or memory was left: let new connections wait to be accepted"


class Sources:
    """How many connections there are from each source and site, and how many came from there in this second."""

    def __init__(self, most: int, most_new: int) -> None:
        self._most = most
        self._most_new = most_new
        self._here: dict[bytes, int] = {}  # only those that are here; no Counter, which is slow with what is new
        self._guests: dict[bytes, int] = {}  # of these, how many do not count as to how many there may be
        self._crowded: set[bytes] = set()  # who has more than may be
        self._sites: dict[bytes, int] = {}  # of networks of 64 bits, by what `site_of` has for them
        self._new: Counter[bytes] = Counter()
        self._new_at_site: Counter[bytes] = Counter()  # of networks of 64 bits, as far as none had too many

    def __len__(self) -> int:
        """How many sources are known at the moment."""
        return len(self._here.keys() | self._new.keys())

    def refuses(self, source: bytes) -> Bound | None:
        """The bound that keeps another connection from `source` out, None when it may come in."""
        self._new[source] += 1
        if self._new[source] > self._most_new:
            return Bound.NEW_PER_SOURCE
        if len(source) == 8:
            # Without those that were too many of one network: it alone keeps none of its neighbours out.
            site = source[:6]
            self._new_at_site[site] += 1
            if self._new_at_site[site] > self._most_new * NEW_OF_SITE:
                return Bound.NEW_PER_SOURCE
        if self.has_its_share(source):
            return Bound.PER_SOURCE
        return None

    def add(self, source: bytes) -> None:
        """Another connection from `source` is here."""
        self._here[source] = here = self._here.get(source, 0) + 1
        if here > self._most:
            self._crowded.add(source)
        if len(source) == 8:
            site = source[:6]
            self._sites[site] = self._sites.get(site, 0) + 1

    def add_guest(self, source: bytes) -> None:
        """Of the connections from `source` one more, that is here already, does not count as to how many there may be:
        it came from a worker that leaves. It is taken to be the last one that goes."""
        self._guests[source] = self._guests.get(source, 0) + 1

    def settle_guests(self) -> list[bytes]:
        """From now on all connections count, but for those of sources that have more than they may then: returns
        these, and those that had more anyway."""
        self._guests = {source: self._guests[source] for source in self._crowded if source in self._guests}
        return [*self._crowded]

    def is_crowded(self, source: bytes) -> bool:
        """Whether more connections from `source` are here than may be, guests and all."""
        return source in self._crowded

    def forget_guests(self, source: bytes) -> None:
        """From now on all connections from `source` count."""
        self._guests.pop(source, None)

    def forget_all_guests(self) -> None:
        """From now on all connections count."""
        self._guests.clear()

    def has_its_share(self, source: bytes) -> bool:
        """Whether as many connections from `source` are here as may be."""
        return self._counting(source) >= self._most

    def has_too_many(self, source: bytes) -> bool:
        """Whether more connections from `source` are here than may be; siblings may have handed them on."""
        return self._counting(source) > self._most

    def _counting(self, source: bytes) -> int:
        return self._here.get(source, 0) - self._guests.get(source, 0)

    def count(self, source: bytes | None) -> int:
        """How many connections from `source` are here; 0 for one that nobody counts."""
        return 0 if source is None else self._here.get(source, 0)

    def counts(self) -> list[tuple[bytes, int]]:
        """The sources that connections are here from, and how many."""
        return [*self._here.items()]

    def count_at_site(self, source: bytes | None) -> int:
        """How many connections from the site of `source` are here (see `site_of`); 0 for one that nobody counts."""
        if source is None:
            return 0
        return self._sites.get(source[:6], 0) if len(source) == 8 else self._here.get(source, 0)

    def remove(self, source: bytes) -> None:
        """A connection from `source` is here no longer."""
        _take_one(self._here, source)
        here = self._here.get(source, 0)
        if here == self._most:
            self._crowded.discard(source)
        if self._guests.get(source, 0) > here:
            _take_one(self._guests, source)
        if len(source) == 8:
            _take_one(self._sites, source[:6])

    def next_second(self) -> None:
        """Forget who has come; to be called every second."""
        self._new.clear()
        self._new_at_site.clear()


def _take_one(counts: dict[bytes, int], whose: bytes) -> None:
    left = counts.get(whose, 0) - 1
    if left > 0:
        counts[whose] = left
    else:
        counts.pop(whose, None)


class BoundsMet:
    """Which bounds were met, and how often, for a log that must not be flooded.

    Where times are blurred, a line that came when a bound was met would tell the time of what was met. Then lines come
    at moments that are fixed from the beginning, and tell of all since the last one.

    Args:
        blur_seconds: as `--blur-usage` has it; lines come so far apart, or `LOG_SECONDS` where that is longer. Without
            it, the first line comes at once.
        now: the beginning, in seconds of the clock that `lines` is asked by.
    """

    def __init__(self, blur_seconds: int | None = None, now: float = 0.0) -> None:
        self._counts: Counter[Bound] = Counter()
        self.ever: Counter[Bound] = Counter()
        """How often each was met since the beginning."""
        self._fixed = blur_seconds is not None
        self._seconds = max(LOG_SECONDS, blur_seconds or 0.0)
        self._next_log = now + self._seconds if self._fixed else now

    def note(self, bound: Bound, times: int = 1) -> None:
        """`bound` was met."""
        self._counts[bound] += times
        self.ever[bound] += times

    def lines(self, now: float) -> list[str]:
        """What is to be logged at `now` (monotonic seconds): a line a bound, and nothing for a minute after."""
        if now < self._next_log or not (self._counts or self._fixed):
            return []
        self._next_log = now + self._seconds
        lines = [f"{bound.value} ({count} since this was last said)" for bound, count in self._counts.items()]
        self._counts.clear()
        return lines

"""What nobody may have more of than is fair: pure bookkeeping, no sockets, the clock is the caller's.

A relay is open to everybody. Each bound here is far beyond what an honest client needs, and keeps one that is not from
taking what the others need. Source addresses are known only as long as something is connected from there, or for
the second in which it came, and only here.
"""

from __future__ import annotations

import enum
from collections import Counter

# Not for a socket, but to read addresses: the module ipaddress takes 0.4 MB, and ten times as long.
from socket import AF_INET, AF_INET6, inet_pton

LOG_SECONDS = 60.0
"""At most so often does the log say that bounds were met."""

_IPV4_MAPPED = bytes(10) + b"\xff\xff"
"""The beginning of an IPv6 address that holds an IPv4 address (RFC 4291, 2.5.5.2)."""


class Bound(enum.Enum):
    """A bound; the value is what the log says was done, and to how many."""

    HANDSHAKES = "--max-handshakes: turned away the client that had been silent longest"
    PER_SOURCE = "--max-per-source: turned away new connections from an address that had its share"
    NEW_PER_SOURCE = "--max-new-per-source: turned away new connections from an address that made too many"
    WAITING = "--max-waiting: turned away the client that had waited longest"
    PER_TOKEN = "--max-waiting-per-token: turned away the client that had waited longest with the same token"
    IDLE = "--idle-timeout: ended transfers in which nothing moved"
    PAIR_BYTES = "--max-pair-bytes: ended transfers that were too large"
    CONNECTIONS = "--max-connections: let new connections wait to be accepted"
    PLACES = "--max-connections: ended what had been idle longest, of whoever had most, for new connections"
    EXHAUSTED = "no file descriptor or memory was left: let new connections wait to be accepted"


def source_of(host: str) -> bytes:
    """Where a connection comes from, as far as bounds are concerned, by its peer's numeric address.

    That is an IPv4 address, also when it comes mapped into IPv6, or the first 64 bits of an IPv6 address: a
    household or a server gets at least that many (RFC 6177), and may use all of them.
    """
    numeric = host.partition("%")[0]
    if ":" not in numeric:
        return inet_pton(AF_INET, numeric)
    address = inet_pton(AF_INET6, numeric)
    return address[12:] if address.startswith(_IPV4_MAPPED) else address[:8]


def is_loopback(host: str) -> bool:
    """Whether a numeric address is of this machine's loopback."""
    return host.startswith(("127.", "::ffff:127.")) or host == "::1"


class Sources:
    """How many connections there are from each source, and how many came from it in this second."""

    def __init__(self, most: int, most_new: int) -> None:
        self._most = most
        self._most_new = most_new
        self._here: Counter[bytes] = Counter()  # only those that are here
        self._new: Counter[bytes] = Counter()

    def __len__(self) -> int:
        """How many sources are known at the moment."""
        return len(self._here.keys() | self._new.keys())

    def refuses(self, source: bytes) -> Bound | None:
        """The bound that keeps another connection from `source` out, None when it may come in."""
        self._new[source] += 1
        if self._new[source] > self._most_new:
            return Bound.NEW_PER_SOURCE
        if self._here[source] >= self._most:
            return Bound.PER_SOURCE
        return None

    def add(self, source: bytes) -> None:
        """Another connection from `source` is here."""
        self._here[source] += 1

    def has_too_many(self, source: bytes) -> bool:
        """Whether more connections from `source` are here than may be; siblings may have handed them on."""
        return self._here[source] > self._most

    def count(self, source: bytes | None) -> int:
        """How many connections from `source` are here; 0 for one that nobody counts."""
        return 0 if source is None else self._here[source]

    def remove(self, source: bytes) -> None:
        """A connection from `source` is here no longer."""
        self._here[source] -= 1
        if self._here[source] <= 0:
            del self._here[source]

    def next_second(self) -> None:
        """Forget who has come; to be called every second."""
        self._new.clear()


class BoundsMet:
    """Which bounds were met, and how often, for a log that must not be flooded."""

    def __init__(self) -> None:
        self._counts: Counter[Bound] = Counter()
        self._next_log = 0.0

    def note(self, bound: Bound, times: int = 1) -> None:
        """`bound` was met."""
        self._counts[bound] += times

    def lines(self, now: float) -> list[str]:
        """What is to be logged at `now` (monotonic seconds): a line a bound, and nothing for a minute after."""
        if not self._counts or now < self._next_log:
            return []
        self._next_log = now + LOG_SECONDS
        lines = [f"{bound.value} ({count} since this was last said)" for bound, count in self._counts.items()]
        self._counts.clear()
        return lines

"""How good the paths of a transfer were, and what limited it: for `--measure-paths`, at the end of a large one.

The kernel knows (TCP_INFO, struct tcp_info in include/uapi/linux/tcp.h): of the side that received, how long there was
something to send to it, how long its window was what kept that back, and what had to be sent again; of both, the round
trip. What is kept are counts in coarse buckets, over all transfers, and no value of a single one.

================  ==========================================================================================
limit             found when, of the time that both sides were there
================  ==========================================================================================
``relay``         bytes waited for a rate of the operator's, or the worker wants all of a processor; as far as the
                  worker knows with which it ends, and in the time that it was there
``sender``        for less than half of it there was anything to send on: it came no faster
``receiver``      for more than half of the rest its window was shut: it took no more
``path``          neither: what was sent had to wait for the network
================  ==========================================================================================

A sender is ``path`` as well where much of what it sent came out of order, as it does when something was lost before.
"""

from __future__ import annotations

import socket
import struct
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

from relay.process.dataclass import dataclass

LEAST_BYTES: Final = 1_000_000
"""A smaller transfer is over before its paths show what they are."""

RTTS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
RESENT: Final = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)
RATES: Final = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000)
"""Where round trips (seconds), shares of bytes sent again, and rates (bytes a second) are divided."""

Limit = Literal["sender", "receiver", "path", "relay"]
LIMITS: Final[tuple[Limit, ...]] = ("sender", "receiver", "path", "relay")

HALF: Final = 0.5
FULL_LOAD: Final = 0.9
MANY_OUT_OF_ORDER: Final = 0.01

_INFO_BYTES: Final = 232
_RTT: Final = struct.Struct("=I")
_MIN_RTT_AT, _DATA_SEGS_IN_AT, _OUT_OF_ORDER_AT = 148, 152, 224
_LIMITED: Final = struct.Struct("=QQ")
_BUSY_AT: Final = 168
_SENT: Final = struct.Struct("=QQ")
_SENT_AT: Final = 200
_UNKNOWN: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Side:
    """What the kernel says of one connection: seconds, and shares from 0 to 1. `rtt` is None where none is known."""

    rtt: float | None
    busy: float
    window_shut: float
    resent: float
    out_of_order: float


def look_at(sock: socket.socket) -> Side | None:
    """Ask about a connection; None where the kernel does not say that much."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:
        return None
    if len(info) < _SENT_AT + _SENT.size:  # before Linux 4.19
        return None
    (rtt,) = _RTT.unpack_from(info, _MIN_RTT_AT)
    busy, window_shut = _LIMITED.unpack_from(info, _BUSY_AT)
    sent, resent = _SENT.unpack_from(info, _SENT_AT)
    segments = out_of_order = 0
    if len(info) >= _OUT_OF_ORDER_AT + _RTT.size:
        (segments,) = _RTT.unpack_from(info, _DATA_SEGS_IN_AT)
        (out_of_order,) = _RTT.unpack_from(info, _OUT_OF_ORDER_AT)
    return Side(
        rtt=None if rtt in (0, _UNKNOWN) else rtt / 1e6,
        busy=busy / 1e6,
        window_shut=window_shut / 1e6,
        resent=resent / max(sent, 1),
        out_of_order=out_of_order / max(segments, 1),
    )


def limit_of(sender: Side, receiver: Side, *, seconds: float, held_back: float, load: float) -> Limit:
    """What limited a transfer that took so long; for `held_back` of its time, from 0 to 1, bytes waited for a rate of
    ours."""
    if held_back > HALF or load > FULL_LOAD:
        return "relay"
    if receiver.busy < HALF * seconds:
        return "path" if sender.out_of_order > MANY_OUT_OF_ORDER else "sender"
    return "receiver" if receiver.window_shut > HALF * receiver.busy else "path"


class PathCounts:
    """Counts of all transfers that were measured."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        for name, bounds in (("path_rtt", RTTS), ("path_resent", RESENT), ("path_rate", RATES)):
            self._counts.update({f"{name}.{bound}": 0 for bound in (*bounds, "inf")})
        self._counts.update({f"path_limit.{limit}": 0 for limit in LIMITS})

    def note(self, sender: Side, receiver: Side, *, size: int, seconds: float, held_back: float, load: float) -> None:
        """Count a transfer of so many bytes; see `limit_of`."""
        for side in (sender, receiver):
            if side.rtt is not None:
                self._count("path_rtt", RTTS, side.rtt)
        self._count("path_resent", RESENT, receiver.resent)
        self._count("path_rate", RATES, size / max(seconds, 1e-3))
        limit = limit_of(sender, receiver, seconds=seconds, held_back=held_back, load=load)
        self._counts[f"path_limit.{limit}"] += 1

    def _count(self, name: str, bounds: Sequence[float], value: float) -> None:
        index = bisect_left(bounds, value)
        self._counts[f"{name}.{bounds[index] if index < len(bounds) else 'inf'}"] += 1

    def counters(self) -> dict[str, int]:
        """The counts, by name."""
        return dict(self._counts)

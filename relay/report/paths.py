"""What the counts of --measure-paths say, in words: how good the paths are, what limits transfers, what to do. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from relay.report.counters import Numbers, below, by_bound
from relay.report.units import duration, size

NOT_MEASURED = (
    "Nothing was measured yet. Paths are measured by a relay that is started with --measure-paths, at the end of each "
    "transfer of 1 MB or more."
)

ADVICE = {
    "sender": "by the sender: for most of the time there was nothing to send on. No setting of the relay changes that; "
    "where round trips are long, a relay nearer to those who send would.",
    "receiver": "by the receiver, which took no more. Nothing at the relay changes that.",
    "path": "by the path: bytes waited for the network. docs/tuning.md says what helps: --congestion-control bbr where "
    "packets are lost, larger socket buffers where round trips are long; and a relay nearer to its users.",
    "relay": "by the relay itself: raise --pair-rate or --relay-rate if they are set, else give it more workers or a "
    "larger machine.",
}


@dataclass(frozen=True, slots=True)
class Bucket:
    """So many had at most that."""

    bound: str
    count: float


@dataclass(frozen=True, slots=True)
class Paths:
    """Of all transfers that were measured: what limited how many, and three quantities by bucket."""

    transfers: float
    limits: dict[str, float]
    rtt: tuple[Bucket, ...]
    resent: tuple[Bucket, ...]
    rate: tuple[Bucket, ...]

    @property
    def advice(self) -> str:
        """A sentence that says what to do."""
        if not self.transfers:
            return NOT_MEASURED
        limit, count = max(self.limits.items(), key=lambda item: item[1])
        return f"{count / self.transfers:.0%} of {self.transfers:.0f} transfers were limited {ADVICE[limit]}"


def paths_of(counters: Numbers) -> Paths | None:
    """What they say; None where no worker measures paths."""
    limits = {name: count for name, count in below(counters, "path_limit").items() if name in ADVICE}
    if not limits:
        return None
    return Paths(
        sum(limits.values()),
        limits,
        _buckets(counters, "path_rtt", duration),
        _buckets(counters, "path_resent", lambda share: f"{100 * share:g} %"),
        _buckets(counters, "path_rate", lambda rate: f"{size(rate)}/s"),
    )


def _buckets(counters: Numbers, name: str, says: Callable[[float], str]) -> tuple[Bucket, ...]:
    last = ""
    buckets = []
    for value, bound, count in by_bound(counters, name):
        label = f"more than {last}" if bound == "inf" else says(value)
        buckets.append(Bucket(label, count))
        last = says(value) if bound != "inf" else last
    return tuple(buckets)


def as_text(paths: Paths | None) -> str:
    """Return it for a terminal; ends with a newline."""
    if paths is None or not paths.transfers:
        return f"{NOT_MEASURED}\n"
    lines = [f"Paths of {paths.transfers:.0f} transfers of 1 MB or more, since the service began", "", "limited by"]
    lines += [f"  {name:<18} {count:8.0f}" for name, count in paths.limits.items()]
    for title, buckets in (
        ("round trip of each side, at most", paths.rtt),
        ("sent again, at most", paths.resent),
        ("rate, at most", paths.rate),
    ):
        lines += ["", title, *(f"  {bucket.bound:<18} {bucket.count:8.0f}" for bucket in buckets)]
    return "\n".join([*lines, "", paths.advice]) + "\n"

"""The rows of the benchmark: what is measured, for whom, how, and what has to come of it.

A *group* is measured as a whole: in each round, each of its *cases* is measured for each peer in turn, and the order
of the peers is turned around from one round to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from clients import Load, check_content, seconds_to_first_pair
from figures import Figure, Goal
from peers import CLoops, Peer, PeerError, Server, started

GIB = 1 << 30
KIB = 1 << 10
MB = 10**6

# The peers' names in tables.
RELAY, BEFORE, TWISTED, HAPROXY, C_LOOP, DIRECT = "relay", "before", "Twisted", "HAProxy", "C loop", "direct"
TWISTED_DB, TWISTED_DB_JSON = "Twisted, db", "Twisted, db+JSON"

Values = dict[str, float]


@dataclass(frozen=True, slots=True)
class Scale:
    """How long and how large everything is; `--quick` has a smaller one."""

    bulk_seconds: float = 1.0
    ping_seconds: float = 1.5
    pairs_seconds: float = 2.0
    meetings: int = 400
    waiting: tuple[int, int] = (1000, 10_000)
    idle_pairs: int = 2000
    content_bytes: int = 32 << 20

    def within(self, fd_limit: int) -> Scale:
        """The same, with no more clients than this limit of open files lets one process have."""
        most = fd_limit - 1000
        return Scale(
            self.bulk_seconds,
            self.ping_seconds,
            self.pairs_seconds,
            self.meetings,
            (min(self.waiting[0], most // 10), min(self.waiting[1], most)),
            min(self.idle_pairs, most // 8),  # the C loop keeps two pipes for each pair: with its sockets, 6 files
            self.content_bytes,
        )


QUICK = Scale(
    bulk_seconds=0.3,
    ping_seconds=0.4,
    pairs_seconds=0.4,
    meetings=100,
    waiting=(100, 1000),
    idle_pairs=100,
    content_bytes=1 << 20,
)


@dataclass(slots=True)
class Bench:
    """What a measurement needs: the load program, the C loops, a place for files, and the sizes."""

    load: Load
    c_loops: CLoops
    folder: Path
    scale: Scale
    relay_cpus: str | None = None
    _starts: int = 0

    def start(self, peer: Peer, *, wait: bool = True) -> AbstractContextManager[Server]:
        self._starts += 1
        folder = self.folder / f"{self._starts}"
        return started(peer, folder, self.c_loops, cpus=self.relay_cpus, wait=wait)


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement, which may give several figures. `fresh`: it starts the peer itself."""

    name: str
    figures: tuple[Figure, ...]
    measure: Callable[[Bench, Server], Values] | None = None
    measure_fresh: Callable[[Bench, Peer], Values] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    cases: tuple[Case, ...]
    peers: tuple[Peer, ...]
    once: bool = False  # a check, not a measurement


# ---- bulk ----


def _bulk_figures(pairs: int) -> tuple[Figure, ...]:
    word = "1 pair" if pairs == 1 else f"{pairs} pairs"
    cost: tuple[Goal, ...] = ()
    speed: tuple[Goal, ...] = ()
    if pairs == 1:
        cost = (Goal("at most", 1.15, C_LOOP), Goal("at most", 0.8, HAPROXY), Goal("at most", 0.3, TWISTED))
        speed = (Goal("at least", 0.95, C_LOOP), Goal("at least", 2, TWISTED))
    elif pairs == 8:
        cost = (Goal("at most", 1.35, C_LOOP), Goal("at most", 0.9, HAPROXY), Goal("at most", 0.4, TWISTED))
        speed = (Goal("at least", 0.95, C_LOOP), Goal("at least", 2, TWISTED))
    elif pairs == 64:
        cost = (Goal("at most", 1.2, C_LOOP),)
    elif pairs == 256:
        cost = (Goal("at most", 1.15, C_LOOP), Goal("at most", 1.5, against_figure="cpu-1"))
    return (
        Figure(f"cpu-{pairs}", f"CPU of the relay, {word}", "s/GiB", 3, cost),
        Figure(f"rate-{pairs}", f"throughput, {word}", "MB/s", 0, speed),
    )


def _measure_bulk(pairs: int) -> Callable[[Bench, Server], Values]:
    def measure(bench: Bench, server: Server) -> Values:
        result = bench.load.traffic(server, pairs=pairs, seconds=bench.scale.bulk_seconds)
        values = {f"rate-{pairs}": result.count / result.seconds / MB}
        if server.processes:
            values[f"cpu-{pairs}"] = result.relay_cpu / result.count * GIB
        return values

    return measure


def _bulk_case(pairs: int) -> Case:
    return Case(f"bulk-{pairs}", _bulk_figures(pairs), _measure_bulk(pairs))


# ---- latency ----


def _latency_figures(pairs: int) -> tuple[Figure, ...]:
    beside = "nobody" if pairs == 0 else "1 bulk pair" if pairs == 1 else f"{pairs} bulk pairs"
    half = (Goal("at most", 0.5, TWISTED),) if pairs == 8 else ()
    median: tuple[Goal, ...] = ()
    longest: tuple[Goal, ...] = (Goal("at most", 0.8 if pairs == 0 else 1.0, TWISTED),)
    if pairs >= 8:
        median = (Goal("at most", 4, C_LOOP), *half)
        longest = (Goal("at most", 1.5, C_LOOP), *half)
    return (
        Figure(f"p50-{pairs}", f"round trip beside {beside}, p50", "µs", 0, median),
        Figure(f"p99-{pairs}", f"round trip beside {beside}, p99", "µs", 0, longest),
    )


def _measure_latency(pairs: int) -> Callable[[Bench, Server], Values]:
    def measure(bench: Bench, server: Server) -> Values:
        result = bench.load.traffic(server, pairs=pairs, seconds=bench.scale.ping_seconds, ping=True)
        if result.latency is None or result.latency.count == 0:
            raise PeerError(f"{server.peer.name}: no ping came back in {bench.scale.ping_seconds} s")
        return {f"p50-{pairs}": result.latency.p50, f"p99-{pairs}": result.latency.p99}

    return measure


def _latency_case(pairs: int) -> Case:
    return Case(f"latency-{pairs}", _latency_figures(pairs), _measure_latency(pairs))


# ---- pairs a second ----

AT_A_TIME = 16
"""Pairs that are there at any moment, unless a case says otherwise."""


def _measure_pairs(name: str, concurrent: int) -> Callable[[Bench, Server], Values]:
    """Pairs a second count until the last of them is on disk, where the peer records them at all."""

    def measure(bench: Bench, server: Server) -> Values:
        recorded, cpu = server.recorded(), server.cpu()
        result = bench.load.pairs(server, seconds=bench.scale.pairs_seconds, concurrent=concurrent)
        seconds = result.seconds
        if recorded is not None:
            seconds += server.wait_for_records(recorded + result.count)
        server.settle()
        return {
            f"{name}-rate": result.count / seconds,
            f"{name}-cpu": (server.cpu() - cpu) / result.count * 1e6,
        }

    return measure


def _pairs_case(
    name: str,
    what: str,
    rate: tuple[Goal, ...] = (),
    cpu: tuple[Goal, ...] = (),
    of: str = RELAY,
    concurrent: int = AT_A_TIME,
) -> Case:
    figures = (
        Figure(f"{name}-rate", f"pairs, {what}", "1/s", 0, rate, of),
        Figure(f"{name}-cpu", f"CPU of the relay for a pair, {what}", "µs", 0, cpu, of),
    )
    return Case(name, figures, _measure_pairs(name, concurrent))


# ---- clients that stay ----


def _measure_waiting(bench: Bench, peer: Peer) -> Values:
    """One relay gets more and more waiting clients; other pairs meet before, between and after."""
    some, many = bench.scale.waiting
    with bench.start(peer) as server:
        bench.load.pairs(server, count=50, concurrent=1)  # whatever is only loaded or allocated once
        values = {"meet-0": _meeting_time(bench, server)}
        server.settle()
        before = server.pss()
        with bench.load.crowd(server) as crowd:
            crowd.add_waiters(some)
            values["meet-some"] = _meeting_time(bench, server)
            crowd.add_waiters(many - some)
            server.settle()
            values["waiter-memory"] = (server.pss() - before) / many / KIB
            values["meet-many"] = _meeting_time(bench, server)
            crowd.verify(20)
    return values


def _meeting_time(bench: Bench, server: Server) -> float:
    server.settle()
    latency = bench.load.pairs(server, count=bench.scale.meetings, concurrent=1).latency
    assert latency is not None
    return latency.p50


def _measure_idle_pairs(bench: Bench, peer: Peer) -> Values:
    count = bench.scale.idle_pairs
    with bench.start(peer) as server:
        bench.load.pairs(server, count=50, concurrent=1)
        server.settle()
        before = server.pss()
        with bench.load.crowd(server) as crowd:
            crowd.add_pairs(count)
            server.settle()
            values = {"pair-memory": (server.pss() - before) / count / KIB}
            crowd.verify(20)
    return values


def _measure_start(bench: Bench, peer: Peer) -> Values:
    begun = time.monotonic()
    with bench.start(peer, wait=False) as server:
        values = {"start": seconds_to_first_pair(server, begun)}
    with bench.start(peer) as server:
        server.settle()
        values["memory"] = server.pss() / MB
        values["memory-rss"] = server.rss() / MB
    return values


# ---- content ----


def _measure_content(bench: Bench, server: Server) -> Values:
    check_content(server, bench.scale.content_bytes)
    return {"content": 1.0}


# ---- all of them ----


def groups(checkouts: list[Path], scale: Scale) -> tuple[Group, ...]:
    """Every row. The last checkout is the relay that the goals are about; one before it is measured beside it."""
    relays = [Peer(RELAY, "relay", checkouts[-1])]
    if len(checkouts) > 1:
        relays.insert(0, Peer(BEFORE, "relay", checkouts[0]))
    recording = tuple(Peer(p.name, "relay", p.checkout, usage_db=True, json_lines=True) for p in relays)
    twisted = Peer(TWISTED, "twisted")
    c_loop, haproxy, direct = Peer(C_LOOP, "c"), Peer(HAPROXY, "haproxy"), Peer(DIRECT, "direct")
    pumps = (direct, c_loop, haproxy, *relays, twisted)
    pairing = (c_loop, *relays, twisted)
    recorders = (
        *recording,
        Peer(TWISTED_DB, "twisted", usage_db=True),
        Peer(TWISTED_DB_JSON, "twisted", usage_db=True, json_lines=True),
    )
    workers = tuple(_of_workers(p, count) for p in relays for count in (1, 2, 4))
    return (
        Group("content", (_content_case(),), pumps, once=True),
        Group(
            "start", (_start_case(),), (c_loop, *recording, Peer(TWISTED, "twisted", usage_db=True, json_lines=True))
        ),
        Group("bulk", tuple(_bulk_case(pairs) for pairs in (1, 8, 64, 256)), pumps),
        Group("latency", tuple(_latency_case(pairs) for pairs in (0, 1, 8, 64, 256)), pumps),
        Group("pairs", (_plain_pairs_case(),), pairing),
        Group("recorded", (_recorded_pairs_case(),), recorders),
        Group("waiting", (_waiting_case(scale),), pairing),
        Group("idle", (_idle_case(),), pairing),
        Group("workers", tuple(_workers_case(concurrent) for concurrent in (1, 4, AT_A_TIME, 64)), workers),
    )


def _of_workers(peer: Peer, count: int) -> Peer:
    name = f"{peer.name}, {count} worker" + ("s" if count > 1 else "")
    return Peer(name, "relay", peer.checkout, workers=count)


def _workers_case(concurrent: int) -> Case:
    one, four = (_of_workers(Peer(RELAY, "relay"), count).name for count in (1, 4))
    return _pairs_case(
        f"workers-{concurrent}",
        f"{concurrent} at a time",
        cpu=(Goal("at most", 1.4, one),),
        of=four,
        concurrent=concurrent,
    )


def _content_case() -> Case:
    figure = Figure("content", "content arrives as it was sent (1: yes)", "", 0, (Goal("at least", 1),))
    return Case("content", (figure,), _measure_content)


def _start_case() -> Case:
    return Case(
        "start",
        (
            Figure("start", "start to the first accepted pair", "s", 3, (Goal("at most", 0.3),)),
            Figure("memory", "memory before the first client, PSS", "MB", 1, (Goal("at most", 16),)),
            Figure("memory-rss", "memory before the first client, RSS", "MB", 1),
        ),
        measure_fresh=_measure_start,
    )


def _plain_pairs_case() -> Case:
    rate, cpu = Goal("at least", 1.6, TWISTED), Goal("at most", 1.6, C_LOOP)
    return _pairs_case("pairs", "without recording", rate=(rate,), cpu=(cpu,))


def _recorded_pairs_case() -> Case:
    return _pairs_case(
        "recorded",
        "with database and JSON lines",
        rate=(Goal("at least", 4, TWISTED_DB),),
        cpu=(Goal("at most", 0.35, TWISTED_DB), Goal("at most", 1.15, against_figure="pairs-cpu")),
    )


def _waiting_case(scale: Scale) -> Case:
    some, many = scale.waiting
    flat = (Goal("at most", 1.5, against_figure="meet-0"),)
    return Case(
        "waiting",
        (
            Figure("waiter-memory", "memory of a waiting client, PSS", "KiB", 2, (Goal("at most", 1.2),)),
            Figure("meet-0", "pairing, nobody waiting, p50", "µs", 0),
            Figure("meet-some", f"pairing, {some} waiting, p50", "µs", 0),
            Figure("meet-many", f"pairing, {many} waiting, p50", "µs", 0, flat),
        ),
        measure_fresh=_measure_waiting,
    )


def _idle_case() -> Case:
    return Case(
        "idle",
        (Figure("pair-memory", "memory of an idle pair, PSS", "KiB", 2, (Goal("at most", 1.5),)),),
        measure_fresh=_measure_idle_pairs,
    )

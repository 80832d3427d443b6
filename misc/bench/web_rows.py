"""The rows of the benchmark for clients that speak WebSocket, beside the Twisted relay and a loop in C that takes masks
off and puts headers between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clients import Sides
from figures import Figure, Goal
from peers import Peer, PeerError, Server
from rows import BEFORE, C_LOOP, GIB, KIB, MB, RELAY, TWISTED, Bench, Case, Group, Values

MIXED = (4, 16424)
"""Bytes in the messages of the Rust client in a browser: it sends the length of a record by itself."""

FROM_WEB = Sides(web_sender=True)
TO_WEB = Sides(web_receiver=True)
BOTH = Sides(web_sender=True, web_receiver=True)
BOTH_MIXED = Sides(web_sender=True, web_receiver=True, messages=MIXED)

EACH_KIND = 8
"""Pairs that speak WebSocket, and as many that do not, beside each other."""


@dataclass(frozen=True, slots=True)
class Way:
    """A direction: who speaks what, and how much it may cost of what the Twisted relay and C need for it."""

    name: str
    title: str
    sides: Sides
    of_twisted: float
    of_c: float | None = None


WAYS = (
    Way("64k", "WebSocket to TCP, messages of 64 KiB", FROM_WEB, 0.28, 1.5),
    Way("mixed", "WebSocket to TCP, messages of 4 and 16424 bytes", Sides(web_sender=True, messages=MIXED), 0.12, 1.6),
    Way("to-web", "TCP to WebSocket", TO_WEB, 0.30, 1.5),
    Way("web-web", "WebSocket to WebSocket, messages of 4 and 16424 bytes", BOTH_MIXED, 0.12),
)


def web_groups(checkouts: list[Path]) -> tuple[Group, ...]:
    """Every row; see `rows.groups`."""
    relays = [Peer(RELAY, "relay", checkouts[-1], web=True)]
    if len(checkouts) > 1:
        relays.insert(0, Peer(BEFORE, "relay", checkouts[0], web=True))
    peers = (Peer(C_LOOP, "c", web=True), *relays, Peer(TWISTED, "twisted", web=True))
    return (
        Group("web-bulk", tuple(map(_bulk_case, WAYS)), peers),
        Group(
            "web-pairs",
            (
                _pairs_case("web-tcp", "WebSocket and TCP", FROM_WEB, 0.40),
                _pairs_case("web-both", "WebSocket both", BOTH, 0.25),
            ),
            peers,
        ),
        Group("web-stay", (_waiting_case(), _idle_case()), peers),
        Group("web-beside", (_beside_case(),), (peers[0], *relays)),
    )


def _bulk_case(way: Way) -> Case:
    goals = [Goal("at most", way.of_twisted, TWISTED)]
    if way.of_c is not None:
        goals.append(Goal("at most", way.of_c, C_LOOP))
    cpu, rate = f"web-cpu-{way.name}", f"web-rate-{way.name}"

    def measure(bench: Bench, server: Server) -> Values:
        result = bench.load.traffic(server, pairs=1, seconds=bench.scale.bulk_seconds, sides=way.sides)
        return {cpu: result.relay_cpu / result.count * GIB, rate: result.count / result.seconds / MB}

    figures = (
        Figure(cpu, f"CPU of the relay, {way.title}", "s/GiB", 3, tuple(goals)),
        Figure(rate, f"throughput, {way.title}", "MB/s", 0),
    )
    return Case(f"web-{way.name}", figures, measure)


def _pairs_case(name: str, what: str, sides: Sides, of_twisted: float) -> Case:
    def measure(bench: Bench, server: Server) -> Values:
        cpu = server.cpu()
        result = bench.load.pairs(server, seconds=bench.scale.pairs_seconds, sides=sides)
        server.settle()
        return {
            f"{name}-rate": result.count / result.seconds,
            f"{name}-cpu": (server.cpu() - cpu) / result.count * 1e6,
        }

    figures = (
        Figure(f"{name}-rate", f"short pairs, {what}", "1/s", 0),
        Figure(
            f"{name}-cpu",
            f"CPU of the relay for a short pair, {what}",
            "µs",
            0,
            (Goal("at most", of_twisted, TWISTED),),
        ),
    )
    return Case(name, figures, measure)


def _stay_case(name: str, title: str, most: float, add: Callable[[Bench, Server], tuple[float, int]]) -> Case:
    """What a client, or a pair, that does nothing takes: `add` says by how many bytes, for how many, it has grown."""

    def measure(bench: Bench, peer: Peer) -> Values:
        with bench.start(peer) as server:
            bench.load.pairs(server, count=50, concurrent=1, sides=FROM_WEB)  # whatever is only loaded once
            grown, count = add(bench, server)
            return {name: grown / count / KIB}

    return Case(name, (Figure(name, title, "KiB", 2, (Goal("at most", most),)),), measure_fresh=measure)


def _waiting_case() -> Case:
    def add(bench: Bench, server: Server) -> tuple[float, int]:
        count = min(bench.scale.idle_pairs, bench.scale.waiting[1])
        server.settle()
        before = server.pss()
        with bench.load.crowd(server, FROM_WEB) as crowd:
            crowd.add_waiters(count)
            server.settle()
            grown = server.pss() - before
            crowd.verify(20)
        return grown, count

    return _stay_case("web-waiter", "memory of a client that waits over WebSocket, PSS", 2.5, add)


def _idle_case() -> Case:
    def add(bench: Bench, server: Server) -> tuple[float, int]:
        server.settle()
        before = server.pss()
        with bench.load.crowd(server, FROM_WEB) as crowd:
            crowd.add_pairs(bench.scale.idle_pairs)
            server.settle()
            grown = server.pss() - before
            crowd.verify(20)
        return grown, bench.scale.idle_pairs

    return _stay_case("web-idle", "memory of an idle pair of WebSocket and TCP, PSS", 3.6, add)


def _beside_case() -> Case:
    """WebSocket pairs beside plain ones, and as many plain ones beside those, with a ping in both.

    One process cannot tell for whom it worked. So what the WebSocket pairs' bytes cost when they are alone is taken off
    what both kinds cost together; the rest is what the plain ones cost.
    """
    limit = 1.3
    cost, ping, plain_cost, plain_ping = "web-beside-cpu", "web-beside-p99", "web-none-cpu", "web-none-p99"

    def measure(bench: Bench, server: Server) -> Values:
        seconds, load = bench.scale.ping_seconds, bench.load
        plain = load.traffic(server, pairs=2 * EACH_KIND, seconds=seconds, ping=True)
        web = load.traffic(server, pairs=EACH_KIND, seconds=seconds, ping=True, sides=FROM_WEB)
        both = load.traffic(server, pairs=EACH_KIND, seconds=seconds, ping=True, sides=FROM_WEB, beside=EACH_KIND)
        if plain.latency is None or both.latency is None:
            raise PeerError(f"{server.peer.name}: no ping came back in {seconds} s")
        return {
            cost: (both.relay_cpu - web.relay_cpu / web.count * both.count) / both.beside * GIB,
            ping: both.latency.p99,
            plain_cost: plain.relay_cpu / plain.count * GIB,
            plain_ping: plain.latency.p99,
        }

    half, whole = f"{EACH_KIND} TCP pairs beside {EACH_KIND} WebSocket pairs", f"{2 * EACH_KIND} TCP pairs"
    figures = (
        Figure(plain_cost, f"CPU of the relay, {whole}", "s/GiB", 3),
        Figure(cost, f"the part of {half}", "s/GiB", 3, (Goal("at most", limit, against_figure=plain_cost),)),
        Figure(plain_ping, f"round trip beside {whole}, p99", "µs", 0),
        Figure(ping, f"round trip beside {half}, p99", "µs", 0, (Goal("at most", limit, against_figure=plain_ping),)),
    )
    return Case("web-beside", figures, measure)

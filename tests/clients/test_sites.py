"""Who of many gives way, without a socket, beside a plain list of everybody who is there.

Invariants:

- whoever gives way is of a site of the highest rank, of one of those networks of it that have the same number, and with
  this number the most together, and is the one of its network that came first;
- nobody is named as long as all sites have few, and nobody who has left;
- of a site whose connections are all here, all but the first few count.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.clients.bounds import FEW, Sources, rank_of
from relay.clients.sites import Sites
from relay.clients.sources import site_of, source_of

HOSTS = ["192.0.2.1", "192.0.2.2", "2001:db8:1::1", "2001:db8:1:1::1", "2001:db8:1:2::1", "2001:db8:2::1"]


@dataclass(frozen=True, eq=False)
class Someone:
    """Somebody who may give way."""

    source: bytes | None


class Crowds(RuleBasedStateMachine):
    """Those who are there beside a list of them, the longest there first."""

    def __init__(self) -> None:
        super().__init__()
        self.sources = Sources(1000, 1000)
        self.sites: Sites[Someone] = Sites(self.sources.count_at_site)
        self.known: list[Someone] = []
        self.here: list[Someone] = []

    @rule(host=st.sampled_from([*HOSTS, None]), number=st.integers(1, 3 * FEW))
    def some_come(self, host: str | None, number: int) -> None:
        """From one address, or so that nobody counts them."""
        for _ in range(number):
            somebody = Someone(None if host is None else source_of(host))
            self.here.append(somebody)
            if somebody.source is not None:
                self.sources.add(somebody.source)
                if self.sources.count_at_site(somebody.source) >= FEW:
                    self.known.append(somebody)
            self.sites.enter(somebody)

    @precondition(lambda self: self.here)
    @rule(choice=st.randoms(use_true_random=False), number=st.integers(1, 3 * FEW))
    def some_leave(self, choice: object, number: int) -> None:
        """Whoever they are."""
        for _ in range(min(number, len(self.here))):
            self._leaves(choice.choice(self.here))  # type: ignore[attr-defined]

    def _leaves(self, somebody: Someone) -> None:
        self.sites.leave(somebody)
        self.here.remove(somebody)
        self.known = [other for other in self.known if other is not somebody]
        if somebody.source is not None:
            self.sources.remove(somebody.source)
        self.sites.leave(somebody)  # is known no longer, and that is no fault

    @precondition(lambda self: self.known)
    @rule()
    def one_gives_way(self) -> None:
        """As it does when there are too many."""
        somebody = self.sites.first_to_go()
        if somebody is not None:
            self._leaves(somebody)

    @invariant()
    def whoever_has_most_gives_way(self) -> None:
        """See the head of this file."""
        of_networks = Counter(somebody.source for somebody in self.known if somebody.source is not None)
        of_sites: Counter[bytes] = Counter()
        for network, count in of_networks.items():
            of_sites[site_of(network)] += count
        highest = rank_of(max(of_sites.values(), default=0))
        first = self.sites.first_to_go()
        assert (first is None) == (highest == 0)
        if first is None:
            return
        assert first.source is not None
        site = site_of(first.source)
        assert rank_of(of_sites[site]) == highest
        assert first is next(somebody for somebody in self.known if somebody.source == first.source)
        counts = [count for network, count in of_networks.items() if site_of(network) == site]
        own = of_networks[first.source]
        assert (own * counts.count(own), own) == max((count * counts.count(count), count) for count in counts)


TestCrowds = Crowds.TestCase
TestCrowds.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def come(sites: Sites[Someone], sources: Sources, host: str, number: int) -> list[Someone]:
    """Let so many come from there."""
    crowd = [Someone(source_of(host)) for _ in range(number)]
    for somebody in crowd:
        sources.add(source_of(host))
        sites.enter(somebody)
    return crowd


def test_those_who_have_the_same_give_way_by_turns() -> None:
    sources = Sources(1000, 1000)
    sites: Sites[Someone] = Sites(sources.count_at_site)
    crowds = [come(sites, sources, f"192.0.2.{number}", 60) for number in range(3)]
    come(sites, sources, "192.0.2.9", 10)
    went = []
    for _ in range(12):
        somebody = sites.first_to_go()
        assert somebody is not None
        sites.leave(somebody)
        went.append(next(number for number, crowd in enumerate(crowds) if somebody in crowd))
    assert Counter(went) == {0: 4, 1: 4, 2: 4}


def test_nothing_is_kept_of_whoever_has_few() -> None:
    sources = Sources(1000, 1000)
    sites: Sites[Someone] = Sites(sources.count_at_site)
    for number in range(200):
        for host in (f"192.0.2.{number}", f"2001:db8:{number:x}::1"):
            come(sites, sources, host, FEW - 1)
    assert not any(len(kept) for kept in vars(sites).values() if not callable(kept))
    for somebody in come(sites, sources, "2001:db8:1::1", 100):
        sites.leave(somebody)
    assert not any(len(kept) for kept in vars(sites).values() if not callable(kept))


@given(
    honest=st.integers(1, 20),
    crowds=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 16)), min_size=1, max_size=3),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_a_network_keeps_what_it_has_beside_a_crowd_of_its_site(
    honest: int, crowds: list[tuple[int, int]], shuffle: random.Random
) -> None:
    """It has `honest` connections there, beside `crowds`: how many each of so many networks has."""
    number = itertools.count(1)
    networks = [f"2001:db8:0:{next(number):x}::1"] * honest
    for each, of_networks in crowds:
        for _ in range(of_networks):
            networks += [f"2001:db8:0:{next(number):x}::1"] * each
    shuffle.shuffle(networks)
    sources = Sources(1 << 20, 1 << 20)
    for _ in range(FEW):
        sources.add(source_of("2001:db8:0:ffff::1"))  # they have a transfer or two, so that all count who come
    sites: Sites[Someone] = Sites(sources.count_at_site)
    for host in networks:
        come(sites, sources, host, 1)
    here = Counter(map(source_of, networks))
    while (somebody := sites.first_to_go()) is not None:
        assert somebody.source is not None
        own = here[somebody.source]
        others = [count for source, count in here.items() if source != somebody.source]
        assert not others or min(others) <= own, "all others have more"
        with_the_same = others.count(own) + 1
        for each in set(others):
            assert each * others.count(each) <= own * with_the_same, "a crowd has more together"
        sites.leave(somebody)
        here[somebody.source] -= 1
        here += Counter()  # without those who have none


def test_a_network_that_has_little_stays_while_the_others_of_its_site_come_back_again_and_again() -> None:
    for honest, each in itertools.product((1, 2, 7, 8, 12), (1, 2, 6, 7, 8, 15)):
        if honest == each:
            continue  # they are all alike
        sources = Sources(1000, 1000)
        sites: Sites[Someone] = Sites(sources.count_at_site)
        own = come(sites, sources, "2001:db8:0:ffff::1", FEW + honest)  # those that are here first do not count
        for somebody in own[:FEW]:
            sites.leave(somebody)
        for number in range(100):
            come(sites, sources, f"2001:db8:0:{number:x}::1", each)
        for _ in range(300):
            first = sites.first_to_go()
            assert first is not None
            assert first not in own, (honest, each)
            sites.leave(first)
            sites.enter(Someone(first.source))


def test_what_choosing_takes_does_not_grow_with_how_many_there_are() -> None:
    """What it keeps of numbers that are no more."""
    kept = []
    for many in (100, 3000):
        sources = Sources(1 << 20, 1 << 20)
        sites: Sites[Someone] = Sites(sources.count_at_site)
        for number in range(many):
            come(sites, sources, f"2001:db8:0:{number % (many // 2):x}::1", 1)
            for somebody in come(sites, sources, f"2001:db8:0:{number % 7:x}::1", 1):
                sites.leave(somebody)
        (networks,) = sites._networks.values()
        kept.append(len(networks._weights))
    assert max(kept) <= 4 * (4 + FEW), kept

"""Who of many gives way, without a socket, beside a plain list of everybody who is there.

Invariants:

- whoever gives way is of a site of the highest rank, of a network of the highest rank within it, and the one of these
  that came first;
- nobody is named as long as all sites have few, and nobody who has left;
- of a site whose connections are all here, all but the first few count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
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
        self.sites: Sites[Someone] = Sites(self.sources.count, self.sources.count_at_site)
        self.known: list[tuple[Someone, bytes]] = []
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
                    has_many = self.sources.count(somebody.source) >= FEW
                    self.known.append((somebody, somebody.source if has_many else site_of(somebody.source)))
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
        self.known = [(other, whose) for other, whose in self.known if other is not somebody]
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
        of_sites = Counter(site_of(somebody.source) for somebody, _ in self.known if somebody.source is not None)
        of_groups = Counter(whose for _, whose in self.known)
        highest = rank_of(max(of_sites.values(), default=0))
        first = self.sites.first_to_go()
        assert (first is None) == (highest == 0)
        if first is None:
            return
        assert first.source is not None
        site = site_of(first.source)
        assert rank_of(of_sites[site]) == highest
        (whose,) = (group for somebody, group in self.known if somebody is first)
        assert first is next(somebody for somebody, group in self.known if group == whose)
        at_site = {group for somebody, group in self.known if somebody.source and site_of(somebody.source) == site}

        def rank(group: bytes) -> int:
            return 0 if group == site and len(site) == 6 else rank_of(of_groups[group])

        assert rank(whose) == max(map(rank, at_site))


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
    sites: Sites[Someone] = Sites(sources.count, sources.count_at_site)
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
    sites: Sites[Someone] = Sites(sources.count, sources.count_at_site)
    for number in range(200):
        for host in (f"192.0.2.{number}", f"2001:db8:{number:x}::1"):
            come(sites, sources, host, FEW - 1)
    assert not any(len(kept) for kept in vars(sites).values() if not callable(kept))
    for somebody in come(sites, sources, "2001:db8:1::1", 100):
        sites.leave(somebody)
    assert not any(len(kept) for kept in vars(sites).values() if not callable(kept))

"""How long somebody to whom nothing is said is left without a ping.

A worker asks every second, at any fraction of one, so an interval is kept to a second, or two where it is no whole
number. In each there are two questions, and whoever was told something since the first is pinged at the second.
"""

from __future__ import annotations

import itertools
import math

from hypothesis import example, given
from hypothesis import strategies as st

from relay.clients.pings import Pings

phases = st.floats(0.01, 0.99)


class Somebody:
    """Pinged unless something was said to it since it was last asked for."""

    def __init__(self) -> None:
        self.due = 0
        self.told = False
        self.pinged: list[float] = []
        self.now = 0.0

    def ping(self) -> bool:
        if not self.told:
            self.pinged.append(self.now)
        self.told = False
        return True


@given(interval=st.floats(0.01, 60), phase=phases, added=st.floats(0, 1))
@example(interval=0.5, phase=0.9, added=0.89)
def test_nobody_is_silent_for_longer_than_its_interval_rounded_up_to_an_even_number_of_seconds(
    interval: float, phase: float, added: float
) -> None:
    pings, somebody = Pings(interval), Somebody()
    words = [100 + added]
    pings.add(somebody, words[0])
    bound = 2 * math.ceil(interval / 2)
    for second in range(101, 101 + 4 * bound):
        somebody.now = second + phase
        list(pings.ping(somebody.now))
        if second == 101 + bound:  # just after a question, say
            somebody.told = True
            words.append(somebody.now)
    words = sorted(words + somebody.pinged)
    assert max(later - earlier for earlier, later in itertools.pairwise(words)) <= bound + 1e-6
    assert len(somebody.pinged) <= 4 * bound / max(1, interval / 2 - 1) + 1, "and not asked all the time"


def test_nobody_is_pinged_with_an_interval_of_zero_or_once_removed() -> None:
    never, removed = Somebody(), Somebody()
    Pings(0).add(never, 1.0)
    pings = Pings(2)
    pings.add(removed, 1.0)
    pings.remove(removed)
    list(pings.ping(100.0))
    assert not removed.pinged
    assert never.due == 0

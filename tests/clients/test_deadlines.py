"""Deadlines in any order, compared with a plain dictionary.

Invariants:

- nobody is taken before its deadline, and nobody is left a second after it;
- whoever is taken, or whose deadline was cleared, has none any more, and is taken no second time;
- who is taken comes in the order of deadlines, to the second.
"""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from relay.clients.deadlines import Deadlines

moments = st.floats(0, 20, allow_nan=False) | st.integers(0, 20).map(float)


class Somebody:
    """A client, as far as deadlines care."""

    def __init__(self) -> None:
        self.due = 0


class Clock(RuleBasedStateMachine):
    """Deadlines beside a dictionary of who is due when; time goes in any steps forward."""

    people = Bundle("people")

    def __init__(self) -> None:
        super().__init__()
        self.deadlines: Deadlines[Somebody] = Deadlines()
        self.due: dict[Somebody, float] = {}
        self.now = 0.0

    @rule(target=people, after=moments)
    def somebody_comes(self, after: float) -> Somebody:
        """A new one gets its first deadline."""
        somebody = Somebody()
        self._set(somebody, after)
        return somebody

    @rule(somebody=people, after=moments)
    def somebody_gets_another_deadline(self, somebody: Somebody, after: float) -> None:
        """As when an upstream has refused before its time was over, and the next one is tried."""
        self._set(somebody, after)

    def _set(self, somebody: Somebody, after: float) -> None:
        self.deadlines.set(somebody, self.now + after)
        self.due[somebody] = self.now + after

    @rule(somebody=people)
    def somebody_is_done(self, somebody: Somebody) -> None:
        """Clearing works whether there is a deadline or not, as often as one likes."""
        self.deadlines.clear(somebody)
        self.due.pop(somebody, None)

    @rule(step=moments)
    def time_passes(self, step: float) -> None:
        """Whoever is due is taken, once, in order."""
        self.now += step
        taken = list(self.deadlines.take_due(self.now))
        assert len(set(taken)) == len(taken)
        seconds = [math.ceil(self.due[somebody]) for somebody in taken]
        assert seconds == sorted(seconds)
        for somebody in taken:
            assert self.due.pop(somebody) <= self.now
        assert all(when > self.now - 1 for when in self.due.values())
        assert list(self.deadlines.take_due(self.now)) == []

    @invariant()
    def whoever_has_a_deadline_is_there_once(self) -> None:
        """Going through all deadlines meets everybody who has one, and nobody else."""
        everybody = list(self.deadlines)
        assert len(everybody) == len(self.due)
        assert set(everybody) == set(self.due)


TestClock = Clock.TestCase
TestClock.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_deadlines_may_change_while_one_goes_through_them() -> None:
    deadlines: Deadlines[Somebody] = Deadlines()
    people = [Somebody() for _ in range(5)]
    for number, somebody in enumerate(people):
        deadlines.set(somebody, number / 2)
    for somebody in deadlines:
        deadlines.set(somebody, 100)
    assert set(deadlines) == set(people)
    assert list(deadlines.take_due(99)) == []
    assert set(deadlines.take_due(100)) == set(people)

"""The waiting room, fed with arbitrary orders of arrivals and departures and compared with an obvious model.

Invariants:

- a newcomer's partner is the one of those with its token and another side (or either without one) that came last, and
  there is one exactly when somebody such waits;
- whoever waits for one token is of one side, and one without a side waits alone;
- nobody is in the room twice; nobody is left in it after `leave` or `take_all`; its length is how many are in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.clients.sites import Sites
from relay.clients.waiting_room import WaitingRoom

TOKENS = [b"a" * 64, b"A" * 64, b"b" * 64]
SIDES = [None, b"1" * 16, b"2" * 16, b"3" * 16]


@dataclass(frozen=True, eq=False)
class Someone:
    """A client, as far as the room cares."""

    token: bytes
    side: bytes | None
    arrived: float
    source: bytes | None = None

    def matches(self, other: Someone) -> bool:
        """The rule of the protocol."""
        if self.token != other.token:
            return False
        return self.side is None or other.side is None or self.side != other.side


def _none(source: bytes | None) -> int:
    return 0


class Arrivals(RuleBasedStateMachine):
    """The room beside a plain list of everybody who waits, the longest waiting first."""

    def __init__(self) -> None:
        super().__init__()
        self.room: WaitingRoom[Someone] = WaitingRoom(Sites(_none))
        self.waiting: list[Someone] = []

    @rule(token=st.sampled_from(TOKENS), side=st.sampled_from(SIDES), arrived=st.integers(0, 9).map(float))
    def somebody_arrives(self, token: bytes, side: bytes | None, arrived: float) -> None:
        """A client shakes hands: it meets its partner and the spares go, or it waits. When it connected is another
        matter: a client may have been handed on by another worker."""
        newcomer = Someone(token, side, arrived)
        partner = self.room.partner_for(newcomer)
        assert partner is next((one for one in reversed(self.waiting) if one.matches(newcomer)), None)
        if partner is None:
            self.room.enter(newcomer)
            self.waiting.append(newcomer)
            self.waiting.sort(key=lambda somebody: somebody.arrived)
            return
        assert partner in list(self.room), "looking for a partner must not take it out of the room"
        self.room.leave(partner)
        self.waiting.remove(partner)
        spares = self.room.take_all(token)
        assert spares == [somebody for somebody in self.waiting if somebody.token == token]
        assert all(spare.side == partner.side for spare in spares)
        self.waiting = [somebody for somebody in self.waiting if somebody.token != token]

    @precondition(lambda self: self.waiting)
    @rule(choice=st.randoms(use_true_random=False))
    def somebody_leaves(self, choice: object) -> None:
        """One who waits hangs up, whoever it is."""
        leaving = choice.choice(self.waiting)  # type: ignore[attr-defined]
        self.room.leave(leaving)
        self.waiting.remove(leaving)
        with pytest.raises((KeyError, ValueError)):
            self.room.leave(leaving)

    @rule(token=st.sampled_from(TOKENS))
    def a_token_is_given_up(self, token: bytes) -> None:
        """Everybody who waits for one token is taken out, as when it moves to another worker."""
        assert self.room.take_all(token) == [somebody for somebody in self.waiting if somebody.token == token]
        self.waiting = [somebody for somebody in self.waiting if somebody.token != token]

    @invariant()
    def the_room_holds_those_who_wait_and_nobody_twice(self) -> None:
        """Its contents, its length and its counts are the model's."""
        inside = list(self.room)
        assert len(inside) == len(self.room) == len(self.waiting)
        assert set(inside) == set(self.waiting)
        for token in TOKENS:
            of_token = [somebody for somebody in self.waiting if somebody.token == token]
            assert [somebody for somebody in inside if somebody.token == token] == of_token
            assert self.room.waiting_for(token) == len(of_token)
            assert self.room.all_for(token) == of_token

    @invariant()
    def those_who_wait_for_one_token_are_of_one_side(self) -> None:
        """Otherwise two of them would have matched; and one without a side matches anybody."""
        for token in TOKENS:
            sides = [somebody.side for somebody in self.room if somebody.token == token]
            assert len(set(sides)) <= 1
            assert None not in sides or len(sides) == 1


TestArrivals = Arrivals.TestCase
TestArrivals.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_room_may_change_while_one_goes_through_it() -> None:
    room: WaitingRoom[Someone] = WaitingRoom(Sites(_none))
    for token in TOKENS:
        room.enter(Someone(token, SIDES[1], 0.0))
    for somebody in room:
        room.leave(somebody)
    assert len(room) == 0

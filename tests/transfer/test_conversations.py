"""While two sides answer each other, those who move much have the smallest turns: they are what an answer waits for."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import gevent
import pytest

from relay.transfer.rest import Rest
from relay.transfer.turns import CONSIDERATE_FOR, CONSIDERATE_TURN, LARGEST_TURN, PROMPT_FOR, PROMPT_TURN, Turns
from tests.support.bare_pair import new_pair


class Talk:
    """Two clients whose pair is at rest, beside whatever else has its `turns`."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.turns = Turns()
        rest = Rest(self.turns)
        self.left, first = socket.socketpair()
        self.right, second = socket.socketpair()
        for sock in (self.left, self.right, first, second):
            stack.enter_context(sock)
            sock.setblocking(False)
        pair = new_pair(first, second, self.turns, rest)
        stack.callback(rest.close)
        stack.callback(pair.close)
        stack.callback(pair.detach)
        pair.start()

    def say(self, speaker: socket.socket, hearer: socket.socket) -> None:
        """One byte, through the pair."""
        speaker.send(b"x")
        for _ in range(500):
            gevent.sleep(0.01)
            with contextlib.suppress(BlockingIOError):
                assert hearer.recv(10) == b"x"
                return
        pytest.fail("it never came")

    def sizes(self, count: int) -> list[int]:
        """Of the next so many turns of somebody who moves much."""
        return [self.turns.size() for _ in range(count)]


@pytest.fixture
def talk() -> Iterator[Talk]:
    """One of them."""
    with contextlib.ExitStack() as stack:
        yield Talk(stack)


def test_an_answer_makes_the_next_turns_small(talk: Talk) -> None:
    talk.say(talk.left, talk.right)
    assert talk.sizes(1) == [CONSIDERATE_TURN], "nobody has answered yet"
    talk.say(talk.right, talk.left)
    assert talk.sizes(PROMPT_FOR + 1) == [PROMPT_TURN] * PROMPT_FOR + [CONSIDERATE_TURN]


def test_as_long_as_they_go_on_the_turns_stay_small(talk: Talk) -> None:
    talk.say(talk.left, talk.right)
    for _ in range(5):
        talk.say(talk.right, talk.left)
        assert set(talk.sizes(3)) == {PROMPT_TURN}
        talk.say(talk.left, talk.right)
        assert set(talk.sizes(3)) == {PROMPT_TURN}


def test_who_is_told_much_and_answers_nothing_does_not_converse(talk: Talk) -> None:
    for _ in range(5):
        talk.say(talk.left, talk.right)
        assert set(talk.sizes(3)) == {CONSIDERATE_TURN}


def test_an_answer_after_many_turns_is_none_that_somebody_waited_for(talk: Talk) -> None:
    talk.say(talk.left, talk.right)
    assert set(talk.sizes(CONSIDERATE_FOR + 1)) == {CONSIDERATE_TURN, LARGEST_TURN}
    talk.say(talk.right, talk.left)
    assert talk.sizes(1) == [CONSIDERATE_TURN]

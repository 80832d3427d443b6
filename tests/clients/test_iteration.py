"""Nobody waits for others to end talking: an iteration of the event loop serves some, and the next one who is left."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

import gevent
import pytest

from relay.clients.bounds import BoundsMet
from relay.clients.client import Client
from relay.clients.farewell import Farewell
from relay.clients.iteration import SLICE_SECONDS
from relay.clients.matching import Matching
from relay.clients.pings import Pings
from relay.clients.places import Places
from relay.clients.reception import Reception
from relay.clients.speech import PLAIN, Ending, Plain, Speech
from relay.options import Options
from tests.support.harness import new_token
from tests.support.kept_records import Records


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What gevent is told of, and would print."""
    told: list[BaseException] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda context, kind, error, trace: told.append(error))
    return told


class Talkative(Plain):
    """Somebody who always has something to say that takes a whole slice, and says nothing with it; or who has said so
    while it waits."""

    def __init__(self) -> None:
        self.heard = 0

    def hear(self, client: object) -> None:
        """See `Speech`."""
        self._take_a_slice()

    def interruption(self, client: object) -> Ending | None:
        """See `Speech`."""
        self._take_a_slice()
        return None

    def _take_a_slice(self) -> None:
        self.heard += 1
        until = time.monotonic() + SLICE_SECONDS
        while time.monotonic() < until:
            pass


class Clients:
    """Reception, matching and farewell of a worker without a port."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.records = Records()
        options = Options()
        loop = gevent.get_hub().loop
        self.places = Places(options, BoundsMet(), lambda: None)
        self.farewell = Farewell(loop, self.places, self.records.record)
        self.matching = Matching(loop, options, self.places, self.farewell, Pings(0), lambda first, second: None)
        self.reception = Reception(loop, options, self.places, self.farewell, self.matching.admit)
        for end in (self.farewell.close_all, self.matching.cut_off, self.reception.cut_off):
            stack.callback(end)  # so that the event loop forgets them
        self._stack = stack

    def come(self, speech: Speech) -> socket.socket:
        """Let somebody connect; return its end."""
        ours, theirs = self._connection()
        self.reception.accepted(ours, ("127.0.0.1", 1), speech)
        return theirs

    def wait(self, speech: Speech) -> socket.socket:
        """Let somebody wait for its partner; return its end."""
        ours, theirs = self._connection()
        client = Client(ours)
        client.token, client.speech = new_token().encode(), speech
        self.places.take(None)
        self.matching.admit(client)
        return theirs

    def _connection(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._stack.enter_context(theirs)
        return ours, theirs


@pytest.fixture
def clients(stack: contextlib.ExitStack) -> Clients:
    """Nobody yet."""
    return Clients(stack)


def iterate(times: int) -> None:
    """Let the event loop go round."""
    for _ in range(times):
        gevent.sleep(1e-6)  # with 0 it would not ask the kernel each time


WAYS: dict[str, Callable[[Clients, Speech], socket.socket]] = {
    "before its handshake": Clients.come,
    "while it waits": Clients.wait,
}


@pytest.mark.parametrize("way", WAYS)
def test_who_says_something_once_is_heard_beside_others_who_talk_all_the_time(way: str, clients: Clients) -> None:
    enter = WAYS[way]
    quiet = enter(clients, PLAIN)
    talkative = [Talkative() for _ in range(10)]
    ends = [enter(clients, speech) for speech in talkative]
    iterate(3)
    for sock in (quiet, *ends):  # the kernel reports them in this order, and libev calls for the last of them first
        sock.sendall(b"garbage\n")
    iterate(10 * len(talkative))
    assert [record.mood for record in clients.records.recorded] == ["errory"]
    assert min(speech.heard for speech in talkative) > 5, "and each of the others has its turns"


@pytest.mark.parametrize("way", WAYS)
def test_who_goes_before_its_turn_is_heard_no_more(way: str, clients: Clients, faults: list[BaseException]) -> None:
    enter = WAYS[way]
    quiet = enter(clients, PLAIN)
    ends = [enter(clients, Talkative()) for _ in range(10)]
    iterate(3)
    for sock in (quiet, *ends):
        sock.sendall(b"garbage\n")
    iterate(2)
    assert not clients.records.recorded, "it has to be late by then"
    (clients.reception if enter is Clients.come else clients.matching).cut_off()
    iterate(20)
    assert clients.places.taken == 0
    assert not faults

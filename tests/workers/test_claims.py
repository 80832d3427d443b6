"""Whose a parcel is, wherever a worker stands still or dies while it is under way: never two workers'."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.clients.client import Client
from relay.workers import claim
from relay.workers.estate import Estate
from relay.workers.language import (
    CONFIRMED,
    LARGEST_PACKET,
    Envelope,
    Standing,
    decode_envelope,
    decode_still_here,
    encode_answer,
    encode_still_here,
)
from relay.workers.link import Link, Parcel
from relay.workers.parcels import Parcels
from tests.support.current import wait_for_current
from tests.support.harness import Relay, Workers, connect, handshake, met, new_side, new_token, open_fds, wait_until

STOPS_ONCE = """
import os, signal, sys
import relay.cli
from relay.workers import claim, link

do = {what}

def stop_first(*arguments):
    global do
    {what}, done = do, do
    os.kill(os.getpid(), signal.SIGSTOP)
    return done(*arguments)

{what} = stop_first
relay.cli.main(sys.argv[4:])
"""
"""A worker that stands still once, in the microseconds before it does that."""


@pytest.mark.parametrize("what", ["claim.make", "link.Link.confirm"])
@pytest.mark.parametrize("kind", ["transfer", "waiting"])
def test_what_is_taken_back_from_a_sibling_that_stands_still_is_never_that_one_s_too(
    tmp_path: Path, what: str, kind: str
) -> None:
    with Workers(tmp_path, "--grace", "30", count=1) as workers, contextlib.ExitStack() as stack:
        if kind == "transfer":
            left, right = met(workers.port, stack=stack)
        else:
            token = new_token()
            left = stack.enter_context(connect(workers.port))
            left.sendall(handshake(token, new_side()))
        wait_for_current(workers, int(kind == "transfer"), int(kind == "waiting"))
        (first,) = workers.workers
        workers.inside = [sys.executable, "-c", STOPS_ONCE.format(what=what)]
        second = workers.start_one()
        wait_until(lambda: "has joined" in first.log_text(), what="they know of each other")
        time.sleep(0.5)
        os.kill(first.pid, signal.SIGTERM)
        wait_until(lambda: is_stopped(second), what="it stands still")
        wait_until(lambda: "does not answer" in first.log_text(), what="it is passed over")
        time.sleep(1)
        os.kill(second.pid, signal.SIGCONT)
        assert first.wait(20) == 0
        if kind == "waiting":
            right = stack.enter_context(connect(workers.port))
            right.sendall(handshake(token, new_side()))
            assert (left.recv(3), right.recv(3)) == (b"ok\n", b"ok\n")
        for sender, receiver in ((left, right), (right, left)):
            sender.sendall(b"on")
            assert receiver.recv(2) == b"on"
        wait_for_current(workers, 1, 0)
        left.close()
        right.close()
        assert workers.stop() == 0
        assert Counter(row["result"] for row in workers.rows("usage")) == {"happy": 1}


def is_stopped(worker: Relay) -> bool:
    """Whether it stands still."""
    return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_only_one_has_it() -> None:
    mine = claim.offer()
    theirs = os.dup(mine)
    before = open_fds(os.getpid())
    assert claim.make(theirs)
    assert not claim.make(mine)
    assert not claim.make(theirs)
    assert open_fds(os.getpid()) == before
    os.close(mine)
    os.close(theirs)


class Owner:
    """Of a link, and of what goes over it; it notes what becomes of that."""

    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.is_lost = False
        self.gone: list[Client] = []
        self.back: list[Client] = []
        self._serial = 0

    def envelope(self) -> Envelope:
        """For the next parcel."""
        self._serial += 1
        return Envelope(self._serial, time.monotonic())

    def heard(self, link: Link, packet: bytes, fds: list[int]) -> None:
        """Something is said."""
        self.said.append(packet)

    def came_back(self, parcel: Parcel) -> None:
        """It could not be sent now."""

    def is_unfit(self, link: Link, parcel: Parcel, error: Exception) -> None:
        """It can never be sent."""

    def lost(self, link: Link) -> None:
        """The other end is closed."""
        self.is_lost = True

    def handed_on(self, client: Client) -> None:
        """A sibling has it."""
        self.gone.append(client)

    def take_back(self, client: Client) -> None:
        """It is ours again."""
        self.back.append(client)


@pytest.fixture
def owner() -> Owner:
    """Of the link."""
    return Owner()


@pytest.fixture
def link_and_sibling(owner: Owner) -> Iterator[tuple[Link, socket.socket]]:
    """A link to a worker that makes claims, and the socket at its other end."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(owner, here, 1, opened_by_sibling=False)
    link.makes_claims = True
    with there:
        yield link, there
        link.close()


@pytest.fixture
def clients() -> Iterator[list[Client]]:
    """Three of them."""
    with contextlib.ExitStack() as stack:
        yield [Client(stack.enter_context(socket.socket()), 0.0, 0.0) for _ in range(3)]


def take(sibling: socket.socket, *, claims: bool) -> Envelope:
    """As a sibling takes a parcel, be it that it stands still before it says so, or before it makes the claim."""
    packet, fds, _, _ = socket.recv_fds(sibling, LARGEST_PACKET, 10)
    envelope = decode_envelope(packet)
    assert envelope.offers_claim
    if claims:
        assert claim.make(fds[-1])
    for fd in fds:
        os.close(fd)
    return envelope


def test_what_a_sibling_has_claimed_is_not_taken_back_whatever_it_has_said(
    clients: list[Client], owner: Owner, link_and_sibling: tuple[Link, socket.socket]
) -> None:
    link, sibling = link_and_sibling
    parcels = Parcels(owner, Estate())  # type: ignore[arg-type]  # nothing else is asked of it
    before = open_fds(os.getpid())
    for client in clients:
        link.hand_alone(client)
    confirmed, _ = take(sibling, claims=True), take(sibling, claims=True)
    unclaimed = take(sibling, claims=False)
    parcels.confirmed(link, confirmed.serial)
    assert owner.gone == clients[:1]
    parcels.take_back(link)
    assert owner.gone == clients[:2]
    parcels.confirmed(link, unclaimed.serial)  # nobody can, but if one does
    parcels.close()
    assert owner.back == clients[2:]
    assert owner.gone == clients[:2]
    assert (link.under_way, open_fds(os.getpid())) == (0, before)


def test_a_claim_is_closed_when_its_parcel_is_refused_or_never_leaves(
    clients: list[Client], owner: Owner, link_and_sibling: tuple[Link, socket.socket]
) -> None:
    link, sibling = link_and_sibling
    parcels = Parcels(owner, Estate())  # type: ignore[arg-type]  # as above
    before = open_fds(os.getpid())
    link.hand_alone(clients[0])
    parcels.refused(link, take(sibling, claims=False).serial)
    assert open_fds(os.getpid()) == before
    with contextlib.suppress(BlockingIOError):
        while True:
            link._sock.send(bytes(1000))
    link.hand_alone(clients[1])
    assert link.stuck
    parcels.take_back(link)
    parcels.close()
    assert owner.back == clients[:2]
    assert open_fds(os.getpid()) == before


def test_without_a_descriptor_for_a_claim_a_parcel_goes_without(
    clients: list[Client], link_and_sibling: tuple[Link, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise OSError

    monkeypatch.setattr(claim, "offer", refuse)
    link, sibling = link_and_sibling
    link.hand_alone(clients[0])
    packet, fds, _, _ = socket.recv_fds(sibling, LARGEST_PACKET, 10)
    for fd in fds:
        os.close(fd)
    assert len(fds) == 1
    assert not decode_envelope(packet).offers_claim


def test_workers_of_before_are_sent_none() -> None:
    said = encode_still_here(Standing(16, 0.5, 10, 20))
    assert decode_still_here(said).makes_claims
    before = decode_still_here(said[:-1])
    assert before.reads_past
    assert not before.makes_claims


def test_what_a_worker_has_confirmed_is_heard_though_it_died_with_something_unread(
    owner: Owner, link_and_sibling: tuple[Link, socket.socket]
) -> None:
    link, sibling = link_and_sibling
    said = [encode_answer(CONFIRMED, serial) for serial in range(3)]
    for words in said:
        sibling.send(words)
    link.say(b"nobody reads this")
    sibling.close()
    while link.read():
        pass
    assert owner.said == said
    assert owner.is_lost


def test_it_is_heard_also_by_who_ends_the_link(link_and_sibling: tuple[Link, socket.socket]) -> None:
    link, sibling = link_and_sibling
    said = encode_answer(CONFIRMED, 1)
    sibling.send(said)
    link.say(b"nobody reads this")
    sibling.close()
    assert link.hear_out() == [said]

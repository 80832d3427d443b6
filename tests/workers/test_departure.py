"""A worker that leaves or ends: a mistake with one client costs no other its partner, and nobody the record."""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path

import pytest

from relay.transfer.pace import PARTS
from relay.workers.language import LEAVING, READY, Greeting, Standing, encode_still_here
from relay.workers.link import Link
from relay.workers.run_dir import RunDir
from relay.workers.siblings import Siblings
from tests.support.current import wait_for_current
from tests.support.harness import (
    Relay,
    Workers,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
    wait_until,
)
from tests.support.mistaken_relay import mistakes

MISTAKEN = "tests.support.mistaken_relay"
HANDING_ON = (
    "relay.workers.handing_on:HandingOn._hand_on_pair",
    "relay.workers.handing_on:HandingOn.uproot",
    "relay.clients.speech:Plain.pack",
)
ENDING = (
    "relay.clients.matching:Matching.dismiss",
    "relay.clients.matching:Matching.evict",
    "relay.transfer.pair:Pair.detach",
    "relay.transfer.pump:Pump.abandon",
    "relay.server:Relay._close_door",
)


class AtHome:
    """Of a worker's siblings; nobody is there."""

    def siblings_changed(self) -> None:
        """Somebody has come or gone."""

    def sibling_gone(self) -> None:
        """A link has ended, or its sibling has said farewell."""

    def sibling_is_well(self, *, is_new: bool) -> None:
        """It has said how it is."""

    def standing(self) -> Standing:
        """How this worker is."""
        return Standing(parts=0, load=0.0, room=10, places=10)


def test_one_that_leaves_has_its_part_of_a_rate_as_long_as_it_moves_something(tmp_path: Path) -> None:
    siblings = Siblings(RunDir(str(tmp_path / "run")), dict, AtHome())  # type: ignore[arg-type]
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(siblings, here, 1, opened_by_sibling=True)
    siblings.links.add(link)
    link.greeting = Greeting("worker-1-1", 1, "1.0.0")
    try:
        for packet in (READY, encode_still_here(Standing(parts=3 * PARTS, load=1.0, room=0, places=0)), LEAVING):
            siblings.heard(link, packet, [])
            if packet != READY:
                assert siblings.share(PARTS) == 1 / 4
        assert siblings.alone, "nothing is handed to it"
        siblings.lost(link)
        assert siblings.share(PARTS) == 1
    finally:
        siblings.close()
        there.close()


def test_a_mistake_in_handing_one_on_leaves_all_transfers_and_all_who_wait_to_the_sibling(tmp_path: Path) -> None:
    with Workers(tmp_path, "--grace", "3", count=1, env=mistakes(*HANDING_ON), program=MISTAKEN) as workers:
        with contextlib.ExitStack() as stack:
            transfers = [met(workers.port, stack=stack) for _ in range(5)]
            tokens = [new_token() for _ in range(3)]
            waiting = [stack.enter_context(connect(workers.port)) for _ in tokens]
            for client, token in zip(waiting, tokens, strict=True):
                client.sendall(handshake(token, new_side()))
            wait_for_current(workers, 5, 3)
            workers.workers[0].tracebacks_expected = True
            workers.program, workers.env = "relay", None
            workers.start_one()
            assert workers.stop_one(0) == 0
            for first, second in transfers:
                first.sendall(b"still here")
                assert read_exactly(second, 10) == b"still here"
            for client, token in zip(waiting, tokens, strict=True):
                partner = stack.enter_context(connect(workers.port))
                partner.sendall(handshake(token, new_side()))
                assert read_exactly(client, 3) == read_exactly(partner, 3) == b"ok\n"
        assert [record["mood"] for record in workers.wait_for_records(8)] == ["happy"] * 8


def test_a_transfer_that_cannot_be_handed_on_goes_on_and_is_tried_again_only_now_and_then(tmp_path: Path) -> None:
    never = mistakes("relay.workers.handing_on:HandingOn._give", calls=1_000_000)
    with (
        Workers(tmp_path, "--grace", "3", count=1, env=never, program=MISTAKEN) as workers,
        contextlib.ExitStack() as stack,
    ):
        first, second = met(workers.port, stack=stack)
        leaving = workers.workers[0]
        leaving.tracebacks_expected = True
        workers.program, workers.env = "relay", None
        workers.start_one()
        leaving.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "a mistake in handing on a transfer" in leaving.log_text(), what="it was tried")
        first.sendall(b"still here")
        assert read_exactly(second, 10) == b"still here"
        assert leaving.wait() == 0
        assert [record["mood"] for record in workers.wait_for_records(1)] == ["happy"]
        assert leaving.log_text().count("Traceback") < 10, "once a second"


@pytest.mark.parametrize("calls", [1, 2])
def test_a_mistake_in_ending_one_costs_nobody_the_record(tmp_path: Path, calls: int) -> None:
    wrong = mistakes(*ENDING, calls=calls)
    options = ("--grace", "0.3")
    with (
        Relay(tmp_path, *options, env=wrong, recording=True, program=MISTAKEN) as relay,
        contextlib.ExitStack() as stack,
    ):
        relay.tracebacks_expected = True
        for _ in range(5):
            met(relay.port, stack=stack)
        for _ in range(3):
            stack.enter_context(connect(relay.port)).sendall(handshake(new_token(), new_side()))
        wait_for_current(relay, 5, 3)
        relay.process.send_signal(signal.SIGTERM)
        assert relay.wait() == 0
        moods = [record["mood"] for record in relay.wait_for_records(8)]
        assert sorted(moods) == ["happy"] * 5 + ["lonely"] * 3
        assert "Traceback" in relay.log_text()

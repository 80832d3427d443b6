"""What a worker has too much of goes to siblings that have places for it, so that the next one can leave as well.

However they came by it: from a worker that left, or with partners of those who wait.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from relay.cli import RESERVED_FDS
from tests.support.command_line import powerless
from tests.support.crowd import Crowd, Transfer
from tests.support.current import current, share, shares, wait_for_current
from tests.support.harness import Workers, connect, handshake, met, new_side, new_token, shortened, stopped, wait_until
from tests.support.hostile import dial, is_open
from tests.support.kernel_view import holder

pytestmark = pytest.mark.long

NOFILE = 400
MOST = (NOFILE - RESERVED_FDS) * 7 // 8 // 2
"""What a worker with so many descriptors has by default of connections."""
MANY_NEW = ("--max-per-source", "1000", "--max-new-per-source", "5000")


def wait_at(port: int, tokens: Sequence[str], stack: contextlib.ExitStack, source: str = "") -> list[socket.socket]:
    """So many who wait."""
    waiting = []
    for token in tokens:
        waiting.append(stack.enter_context(dial(port, source) if source else connect(port)))
        waiting[-1].sendall(handshake(token, new_side()))
    return waiting


def wait_within_bounds(
    port: int, number: int, stack: contextlib.ExitStack, source: str
) -> list[tuple[str, socket.socket]]:
    """So many from one source that wait, at the workers where it may have so many; whose turn it is at the door is not
    ours to say. Returns their tokens and connections."""
    came: list[tuple[str, socket.socket]] = []
    for _ in range(20):
        came = [(token, sock) for token, sock in came if is_open(sock)]
        if len(came) == number:
            break
        for _ in range(number - len(came)):
            token = new_token()
            with contextlib.suppress(ConnectionError):
                came += [(token, sock) for sock in wait_at(port, [token], stack, source)]
        time.sleep(0.3)  # another worker's turn has come then
    return came


def fill_up(port: int, stack: contextlib.ExitStack, *, silently: bool) -> int:
    """Come in until nobody is let in any more, alone and without a word or as a transfer; returns how many did."""
    came = 0
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        for number in range(4 * MOST):
            sock = stack.enter_context(dial(port, f"127.3.{number // 50}.1"))
            sock.settimeout(2)
            if silently:
                sock.sendall(b"please ")
                came += 1
            else:
                partner = stack.enter_context(dial(port, f"127.3.{number // 50}.2"))
                partner.settimeout(2)
                token = new_token()
                for each in (sock, partner):
                    each.sendall(handshake(token, new_side()))
                for each in (sock, partner):
                    assert each.recv(3) == b"ok\n"
                came += 2
    return came


def moving(crowd: Crowd, number: int) -> list[Transfer]:
    """So many transfers that move."""
    transfers = [crowd.transfer(3_000, 3_000) for _ in range(number)]
    for begin in range(0, len(transfers), 20):
        crowd.begin(transfers[begin : begin + 20])
    return transfers


@pytest.mark.parametrize(("count", "silently", "is_root"), [(2, True, True), (2, False, False), (3, True, False)])
def test_when_newcomers_have_come_between_two_restarts_the_second_cuts_nothing_either(
    tmp_path: Path, count: int, silently: bool, is_root: bool, stack: contextlib.ExitStack
) -> None:
    inside = [] if is_root else powerless()
    workers = stack.enter_context(Workers(tmp_path, *MANY_NEW, count=count, nofile=NOFILE, inside=inside))
    crowd = stack.enter_context(Crowd(workers.port))
    transfers = moving(crowd, int(0.9 * MOST / 2) * count)
    for number in range(count):
        assert crowd.run_beside(lambda number=number: workers.stop_one(number, 20)) == 0  # type: ignore[misc]
        crowd.run_beside(workers.start_one)
        crowd.run_beside(lambda: fill_up(workers.port, stack, silently=silently))
        assert not any(transfer.cut for transfer in transfers), f"after the restart of worker {number}"
    crowd.end(transfers)
    assert "the other workers have no room" not in workers.log_text()


@pytest.mark.parametrize("restarted", [0, 1])
def test_a_worker_whose_clients_partners_have_all_come_elsewhere_leaves_its_sibling_room(
    tmp_path: Path, restarted: int, stack: contextlib.ExitStack
) -> None:
    workers = stack.enter_context(Workers(tmp_path, *MANY_NEW, count=1, nofile=NOFILE))
    crowd = stack.enter_context(Crowd(workers.port))
    tokens = [new_token() for _ in range(MOST * 3 // 4)]
    waiting = [crowd.call(token, new_side(), rate=3_000) for token in tokens]
    wait_for_current(workers, 0, len(tokens))
    crowd.run_beside(workers.start_one)
    partners = [crowd.call(token, new_side(), rate=3_000) for token in tokens]
    transfers = [Transfer(*sides) for sides in zip(waiting, partners, strict=True)]
    crowd.begin(transfers)
    crowd.run_beside(lambda: fill_up(workers.port, stack, silently=False))
    crowd.run_until(lambda: max(shares(workers).values()) <= MOST // 2 + 1, 10, "none has more than it may")
    assert crowd.run_beside(lambda: workers.stop_one(restarted)) == 0
    crowd.end(transfers)
    assert "the other workers have no room" not in workers.log_text()


def test_a_successor_takes_those_who_are_too_many_to_wait_and_as_many_as_before_may_wait(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    workers = stack.enter_context(Workers(tmp_path, *MANY_NEW, "--max-waiting", "40", count=2, nofile=NOFILE))
    tokens = [new_token() for _ in range(60)]
    waiting = wait_at(workers.port, tokens, stack)
    wait_for_current(workers, 0, 60)
    assert workers.stop_one(0) == 0
    successor = workers.start_one()
    wait_until(lambda: share(workers, successor)[1] >= 20, what="it has those who were too many")
    more = [new_token() for _ in range(16)]
    waiting += wait_at(workers.port, more, stack)
    wait_for_current(workers, 0, 76)
    for token, sock in zip(tokens + more, waiting, strict=True):
        with connect(workers.port) as partner, sock:
            partner.sendall(handshake(token, new_side()))
            assert sock.recv(3) == partner.recv(3) == b"ok\n"
    assert "--max-waiting:" not in workers.log_text()


@pytest.mark.parametrize("count", [2, 3])
def test_a_successor_gets_an_equal_part_however_unequal_the_others_were(
    tmp_path: Path, count: int, stack: contextlib.ExitStack
) -> None:
    bounds = ("--max-waiting", str(MOST), *MANY_NEW)
    workers = stack.enter_context(Workers(tmp_path, *bounds, count=1, nofile=NOFILE))
    wait_at(workers.port, [new_token() for _ in range(MOST - 4)], stack)
    wait_for_current(workers, 0, MOST - 4)
    for _ in range(count - 1):
        workers.start_one()
    whole = int(0.8 * MOST * count)
    wait_at(workers.port, [new_token() for _ in range(whole - (MOST - 4))], stack)
    wait_for_current(workers, 0, whole)
    assert workers.stop_one(0) == 0
    workers.start_one()
    part = whole // count
    wait_until(
        lambda: all(0.8 * part <= share(workers, worker)[1] <= 1.2 * part for worker in workers.living()),
        what="all have about as many",
    )


def test_who_leaves_knows_whom_the_others_have_just_let_in(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    workers = stack.enter_context(Workers(tmp_path, "--max-waiting", str(MOST), *MANY_NEW, count=1, nofile=NOFILE))
    wait_at(workers.port, [new_token() for _ in range(MOST - 10)], stack)
    wait_for_current(workers, 0, MOST - 10)
    for _ in range(2):
        workers.start_one()
    newcomers = wait_at(workers.port, [new_token() for _ in range(MOST // 2)], stack)
    holder(workers.pids, newcomers[-1])  # once that is let in, all are
    assert workers.stop_one(0) == 0
    whole = MOST - 10 + MOST // 2
    wait_for_current(workers, 0, whole)
    parts = sorted(share(workers, worker)[1] for worker in workers.living())
    assert 0.9 * parts[1] <= parts[0], f"of {whole} the others have {parts}"


def test_who_comes_to_where_too_many_wait_waits_where_fewer_do(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    workers = stack.enter_context(Workers(tmp_path, "--max-waiting", "20", count=1, nofile=NOFILE))
    tokens = [new_token() for _ in range(20)]
    waiting = wait_at(workers.port, tokens, stack)
    wait_for_current(workers, 0, 20)
    second = workers.start_one()
    more = [new_token() for _ in range(18)]
    waiting += wait_at(workers.port, more, stack)
    wait_until(lambda: share(workers, second)[1] == 18, what="they wait where there is space")
    for token, sock in zip(tokens + more, waiting, strict=True):
        with connect(workers.port) as partner, sock:
            partner.sendall(handshake(token, new_side()))
            assert sock.recv(3) == partner.recv(3) == b"ok\n"
    assert "--max-waiting:" not in workers.log_text()


def test_a_source_has_no_more_than_its_share_by_coming_to_where_too_many_wait(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    bounds = ("--max-waiting", "20", "--max-per-source", "4", "--max-new-per-source", "5000")
    workers = stack.enter_context(Workers(tmp_path, *bounds, count=1, nofile=NOFILE))
    for number in range(20):
        wait_at(workers.port, [new_token()], stack, f"127.3.{number}.1")
    wait_for_current(workers, 0, 20)
    workers.start_one()
    came = []
    for _ in range(40):
        with contextlib.suppress(ConnectionError):
            came += wait_at(workers.port, [new_token()], stack, "127.4.0.1")
        time.sleep(0.01)
    wait_until(lambda: sum(map(is_open, came)) <= 2 * 4, what="it has its share at each, and no more")
    assert any(map(is_open, came))


def test_where_there_are_descriptors_all_who_waited_at_a_worker_that_leaves_still_wait(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    bounds = ("--max-connections", str(MOST * 2), "--max-waiting", "40")
    workers = stack.enter_context(Workers(tmp_path, *MANY_NEW, *bounds, count=2, nofile=NOFILE))
    waiting = wait_at(workers.port, [new_token() for _ in range(80)], stack)
    wait_for_current(workers, 0, 80)
    assert workers.stop_one(0) == 0
    time.sleep(1.5)  # what is to be seen is that nothing happens
    assert current(workers) == (0, 80)
    for sock in waiting:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            assert sock.recv(1), "sent away"


@pytest.mark.parametrize("is_replaced", [True, False])
def test_the_partners_of_a_source_that_has_more_than_its_share_since_a_worker_has_left_meet_those_who_wait(
    tmp_path: Path, is_replaced: bool, stack: contextlib.ExitStack
) -> None:
    bounds = ("--max-per-source", "60", "--max-new-per-source", "5000")
    workers = stack.enter_context(Workers(tmp_path, *bounds, count=2, nofile=NOFILE))
    waiting = wait_within_bounds(workers.port, 80, stack, "127.3.0.1")
    wait_for_current(workers, 0, 80)
    refused = workers.log_text().count("--max-per-source:")
    assert workers.stop_one(0) == 0
    if is_replaced:
        successor = workers.start_one()
        wait_until(lambda: share(workers, successor)[1] >= 20, what="it has some of them")
    for token, sock in waiting:
        with dial(workers.port, "127.3.0.1") as partner, sock:
            partner.sendall(handshake(token, new_side()))
            assert sock.recv(3) == partner.recv(3) == b"ok\n"
    assert workers.log_text().count("--max-per-source:") == refused


def test_a_successor_sends_nobody_away_whose_source_has_its_share_at_each_worker(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    places = ("--max-connections", "100", "--max-waiting", "100")
    bounds = (*places, "--max-per-source", "30", "--max-new-per-source", "5000")
    workers = stack.enter_context(Workers(tmp_path, *bounds, count=1, nofile=NOFILE))
    waiting = wait_at(workers.port, [new_token() for _ in range(30)], stack, "127.3.0.1")
    for number in range(50):
        waiting += wait_at(workers.port, [new_token()], stack, f"127.4.{number}.1")
    wait_for_current(workers, 0, 80)
    workers.start_one()
    waiting += [sock for _, sock in wait_within_bounds(workers.port, 30, stack, "127.3.0.1")]
    wait_for_current(workers, 0, 110)
    assert workers.stop_one(0) == 0
    successor = workers.start_one()
    wait_until(lambda: share(workers, successor)[1] >= 50, what="it has its part")
    wait_for_current(workers, 0, 110)
    assert all(map(is_open, waiting))


def press(workers: Workers, kind: str, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Come in from one source, alone and without a word, or as both sides of a transfer, or one side, the others of one
    other source or of many, until it is let in no more; returns its connections that are."""
    came: list[socket.socket] = []
    refused = 0
    while refused < 25 and len(came) < 200:
        socks = [stack.enter_context(dial(workers.port, "127.3.0.1"))]
        if kind != "silent":
            partners = {"whole": "127.3.0.1", "two": "127.4.0.1", "half": f"127.4.{len(came)}.1"}
            socks.append(stack.enter_context(dial(workers.port, partners[kind])))
        token = new_token()
        try:
            for sock in socks:
                sock.settimeout(1)
                sock.sendall(b"please " if kind == "silent" else handshake(token, new_side()))
            for sock in socks if kind != "silent" else ():
                assert sock.recv(3) == b"ok\n"
        except (OSError, AssertionError):
            refused += 1
            for sock in socks:
                sock.close()
            time.sleep(0.02)
            continue
        came += socks if kind == "whole" else socks[:1]
        if kind == "silent":
            time.sleep(0.02)
            refused += not is_open(socks[0])
    return came


def _spread(workers: Workers) -> int:
    """How many more descriptors one of two workers has than the other."""
    counts = [len(os.listdir(f"/proc/{worker.pid}/fd")) for worker in workers.living()]
    return max(counts) - min(counts)


@pytest.mark.parametrize(("kind", "seconds"), [("silent", 0.0), ("half", 0.0), ("two", 0.0), ("whole", 2.5)])
def test_a_source_has_no_more_than_its_share_by_coming_while_workers_are_restarted(
    tmp_path: Path, kind: str, seconds: float, stack: contextlib.ExitStack
) -> None:
    bounds = ("--max-connections", "150", "--max-per-source", "20", "--max-new-per-source", "5000")
    inside = shortened(clients__places__GUESTS_SECONDS=1)
    workers = stack.enter_context(Workers(tmp_path, *bounds, count=2, inside=inside))
    came = press(workers, kind, stack)
    for number in range(3):
        assert workers.stop_one(number) == 0
        time.sleep(seconds)  # with this, those who have come from there are guests no longer
        workers.start_one()
        wait_until(lambda: _spread(workers) <= 12, what="the successor has been given its part")
        came += press(workers, kind, stack)
    assert 30 <= sum(map(is_open, came)) <= 50


def test_who_is_given_away_before_it_has_said_what_it_wants_has_no_more_than_its_share_where_that_is(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    bounds = ("--max-connections", "150", "--max-per-source", "20", "--max-new-per-source", "5000")
    workers = stack.enter_context(Workers(tmp_path, *bounds, count=1))
    tokens = [new_token() for _ in range(20)]
    for number, token in enumerate(tokens):
        wait_at(workers.port, [token], stack, f"127.4.{number}.1")
    wait_for_current(workers, 0, len(tokens))
    workers.start_one()
    silent = press(workers, "silent", stack)
    assert workers.stop_one(1) == 0
    successor = workers.start_one()
    wait_until(lambda: _spread(workers) <= len(tokens) + 4, what="the successor has been given its part")
    there = [sock for sock in silent if is_open(sock) and holder(workers.pids, sock) == successor.pid]
    assert len(there) >= 15
    for sock, token in zip(there, tokens, strict=False):
        sock.sendall(handshake(token, new_side())[len(b"please ") :])
    answers = [sock.recv(3) for sock in there]
    assert answers.count(b"ok\n") <= 2, "its share is taken at the home of these tokens"


def test_a_successor_that_hangs_while_it_is_given_something_keeps_nobody_out_and_gets_the_rest_when_it_wakes(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    places = ("--max-connections", "140", "--max-waiting", "140")
    bounds = (*places, "--max-per-source", "30", "--max-new-per-source", "5000")
    slowly = shortened(
        workers__link__MOST_UNDER_WAY=8, transfer__slices__SLICE_SECONDS=0, transfer__slices__REST_SECONDS=0.05
    )
    workers = stack.enter_context(Workers(tmp_path, *bounds, count=2, inside=slowly))
    waiting = [sock for _, sock in wait_within_bounds(workers.port, 60, stack, "127.3.0.1")]
    wait_for_current(workers, 0, 60)
    assert workers.stop_one(0, 30) == 0
    successor = workers.start_one()
    wait_until(lambda: share(workers, successor)[1] >= 1, what="it is given some")
    with stopped(successor):
        for number in range(40):
            met(workers.port, f"127.4.{number}.1", stack=stack)
            time.sleep(0.1)
    assert all(map(is_open, waiting))
    assert "--max-connections: ended" not in workers.log_text()
    wait_until(lambda: share(workers, successor)[1] >= 20, 20, "it has the rest")
    assert all(map(is_open, waiting))


def test_a_transfer_does_not_go_for_its_load_to_where_there_are_no_places(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    workers = stack.enter_context(Workers(tmp_path, *MANY_NEW, "--max-connections", "6", count=1, nofile=NOFILE))
    pairs = [met(workers.port, stack=stack) for _ in range(3)]
    first = workers.workers[0].pid
    assert {holder(workers.pids, sock) for pair in pairs for sock in pair} == {first}
    second = workers.start_one()
    pairs += [met(workers.port, stack=stack) for _ in range(3)]
    assert {holder(workers.pids, sock) for pair in pairs[3:] for sock in pair} == {second.pid}
    payload = b"x" * 65536
    for sender, receiver in pairs[:3]:
        sender.setblocking(False)
        receiver.setblocking(False)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        for sender, receiver in pairs[:3]:
            with contextlib.suppress(BlockingIOError):
                sender.send(payload)
            with contextlib.suppress(BlockingIOError):
                receiver.recv(1 << 20)
    assert {holder(workers.pids, sock) for pair in pairs[:3] for sock in pair} == {first}

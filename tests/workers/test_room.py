"""A worker's room is asked before it is used: what happens to those for whom a sibling has none.

A sibling can lack places, of which it tells the others, or file descriptors for what comes with a client, which shows
only when that comes.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import time
from pathlib import Path

import pytest

from relay.cli import RESERVED_FDS
from tests.support.command_line import powerless
from tests.support.crowd import Crowd
from tests.support.current import share
from tests.support.harness import (
    CHECKOUT,
    Workers,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    wait_until,
)
from tests.support.hostile import answer, dial
from tests.support.kernel_view import holder, without_descriptors

pytestmark = pytest.mark.long

NOFILE = 200
MOST = NOFILE - RESERVED_FDS
GRACE = 2
LONGEST = GRACE + 5
LARGER_NOFILE = 400
FULL = ("--max-connections", str(MOST), "--max-waiting", str(MOST))
"""Each worker accepts as many as it has descriptors for, so that none has room for what another one holds."""


def test_a_client_whose_partners_worker_has_no_descriptor_meets_it_where_there_are_some(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    workers = stack.enter_context(Workers(tmp_path, "--grace", "0", count=2))
    token = new_token()
    waiting = stack.enter_context(connect(workers.port))
    waiting.sendall(handshake(token, new_side()))
    wait_until(lambda: workers.rows("current")[0]["waiting"] == 1, what="it waits")
    home = holder(workers.pids, waiting)
    with without_descriptors(next(worker for worker in workers.workers if worker.pid == home)):
        partner = stack.enter_context(connect(workers.port))
        partner.sendall(handshake(token, new_side()))
        assert waiting.recv(3) == partner.recv(3) == b"ok\n"


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_partners_of_those_who_wait_at_a_full_worker_meet_them_at_the_one_that_has_room(
    tmp_path: Path, stack: contextlib.ExitStack, share: float
) -> None:
    workers = stack.enter_context(Workers(tmp_path, *FULL, count=1, nofile=NOFILE))
    tokens = [new_token() for _ in range(int(MOST * share))]
    waiting = [stack.enter_context(connect(workers.port)) for _ in tokens]
    for sock, token in zip(waiting, tokens, strict=True):
        sock.sendall(handshake(token, new_side()))
    wait_until(lambda: workers.rows("current")[0]["waiting"] == len(tokens), what="all wait")
    workers.start_one()
    for begin in range(0, 30, 10):
        partners = [stack.enter_context(connect(workers.port)) for _ in range(10)]
        for sock, token in zip(partners, tokens[begin:], strict=False):
            sock.sendall(handshake(token, new_side()))
        for sock in (*partners, *waiting[begin : begin + 10]):
            assert sock.recv(3) == b"ok\n"
    wait_until(lambda: workers.rows("current")[0]["waiting"] == len(tokens) - 30, what="the others still wait")


def test_when_all_who_may_wait_came_from_a_worker_that_left_their_partners_meet_them_at_its_successor(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    most = (LARGER_NOFILE - RESERVED_FDS) * 7 // 8 // 2  # the default for a relay of which one worker may leave
    workers = stack.enter_context(Workers(tmp_path, "--max-waiting", "1000", count=2, nofile=LARGER_NOFILE))
    tokens = [new_token() for _ in range(2 * most - 44)]  # with 40 partners all places are taken but for a few
    waiting = {token: stack.enter_context(connect(workers.port)) for token in tokens}
    for token, sock in waiting.items():
        sock.sendall(handshake(token, new_side()))
    wait_until(lambda: workers.rows("current")[0]["waiting"] == len(tokens), what="all wait")
    leaving = workers.workers[0]
    leaving.process.send_signal(signal.SIGTERM)
    assert leaving.wait(20) == 0
    workers.start_one()
    for begin in range(0, 40, 10):
        partners = [stack.enter_context(connect(workers.port)) for _ in range(10)]
        for sock, token in zip(partners, tokens[begin:], strict=False):
            sock.sendall(handshake(token, new_side()))
        for sock, token in zip(partners, tokens[begin:], strict=False):
            assert waiting[token].recv(3) == sock.recv(3) == b"ok\n"


def test_a_worker_whose_sibling_refuses_everything_ends_in_time_and_serves_until_then(tmp_path: Path) -> None:
    with Workers(tmp_path, "--grace", str(GRACE), count=2) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(20_000, 20_000) for _ in range(70)]  # more than one worker accepts in its turn
        crowd.begin(transfers)
        leaving, staying = workers.workers
        with without_descriptors(staying):
            began = time.monotonic()
            leaving.process.send_signal(signal.SIGTERM)
            for _ in range(3):  # each stands still for as long as a parcel to a sibling and back takes, and no longer
                moved = [transfer.moved for transfer in transfers]
                crowd.run_for(0.5)
                assert all(now.moved > then for now, then in zip(transfers, moved, strict=True))
            assert crowd.run_beside(lambda: leaving.wait(20)) == 0
            assert time.monotonic() - began < LONGEST
        crowd.run_for(0.5)
        kept = [transfer for transfer in transfers if not transfer.cut]
        assert len(kept) < len(transfers), "both had some"
        assert f"cutting off {len(transfers) - len(kept)} transfers" in leaving.log_text()
        crowd.end(kept)
        for transfer in kept:
            transfer.assert_intact()
        assert len(workers.wait_for_rows("usage", len(transfers))) == len(transfers)


def test_those_without_a_partner_who_find_no_room_wait_for_the_grace_and_are_sent_away_in_order(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    workers = stack.enter_context(Workers(tmp_path, *FULL, "--grace", str(GRACE), count=2, nofile=NOFILE))
    pairs = [met(workers.port, stack=stack) for _ in range(MOST // 4)]
    waiting = [stack.enter_context(connect(workers.port)) for _ in range(2 * MOST - 2 * len(pairs) - 6)]
    for sock in waiting:
        sock.sendall(handshake(new_token(), new_side()))
    wait_until(lambda: workers.rows("current")[0]["waiting"] == len(waiting), what="all wait")
    leaving = workers.workers[0]
    began = time.monotonic()
    leaving.process.send_signal(signal.SIGTERM)
    assert leaving.wait(20) == 0
    assert GRACE <= time.monotonic() - began < LONGEST
    records = workers.wait_for_records(MOST // 2)
    still_waiting = workers.rows("current")[0]["waiting"]
    sent_away = [sock for sock in waiting if _is_over(sock)]
    assert len(sent_away) == len(waiting) - still_waiting
    assert [answer(sock) for sock in sent_away] == [b""] * len(sent_away)
    moods = [record["mood"] for record in records]
    assert moods.count("lonely") == len(sent_away)
    cut = [pair for pair in pairs if _is_over(pair[0])]
    assert moods.count("happy") == len(cut)
    assert "the other workers have no room for them" in leaving.log_text()
    first, second = next(pair for pair in pairs if pair not in cut)
    first.sendall(b"still here")
    assert second.recv(10) == b"still here"


MARK = 4321
UNFIT = "f" * 16
UNPACKABLE = f"""
from relay.workers import link

def refusing(encode, is_unfit):
    def encode_or_refuse(envelope, what, **how):
        if is_unfit(what):
            raise OSError({errno.EMSGSIZE}, "Message too long")
        return encode(envelope, what, **how)
    return encode_or_refuse

link.encode_pair = refusing(link.encode_pair, lambda pair: pair.there.moved + pair.back.moved == {MARK})
link.encode_clients = refusing(
    link.encode_clients, lambda clients: any(client.side == b"{UNFIT}" for client in clients)
)
"""
"""Makes a worker one that cannot hand on transfers which have moved so much, nor clients of that side."""


def test_who_cannot_be_handed_on_is_served_where_it_is_and_holds_up_nobody(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    (tmp_path / "unfit").mkdir()
    (tmp_path / "unfit" / "sitecustomize.py").write_text(UNPACKABLE)
    workers = stack.enter_context(
        Workers(tmp_path, "--grace", str(GRACE), count=1, env={"PYTHONPATH": f"{tmp_path / 'unfit'}:{CHECKOUT}"})
    )
    pairs = [met(workers.port, stack=stack) for _ in range(30)]
    pairs[3][0].sendall(bytes(MARK))
    received = 0
    while received < MARK:
        received += len(pairs[3][1].recv(MARK))
    waiting = {number: (new_token(), stack.enter_context(connect(workers.port))) for number in range(30)}
    for number, (token, sock) in waiting.items():
        sock.sendall(handshake(token, UNFIT if number == 7 else "1" * 16))
    wait_until(lambda: workers.rows("current")[0]["waiting"] == len(waiting), what="all wait")
    workers.start_one()
    leaving = workers.workers[0]
    began = time.monotonic()
    leaving.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "somebody cannot be handed on" in leaving.log_text(), what="one transfer has stayed")
    _, unfit = waiting.pop(7)
    assert answer(unfit) == b"", "nobody could have come to it"
    for token, sock in waiting.values():
        partner = stack.enter_context(connect(workers.port))
        partner.sendall(handshake(token, "2" * 16))
        assert sock.recv(3) == partner.recv(3) == b"ok\n"
    assert leaving.wait(20) == 0
    assert GRACE <= time.monotonic() - began < LONGEST
    assert [number for number, pair in enumerate(pairs) if _is_over(pair[1])] == [3]
    assert leaving.log_text().count("somebody cannot be handed on") == 1
    assert "cutting off 1 transfers" in leaving.log_text()
    moods = [record["mood"] for record in workers.wait_for_records(2)]
    assert sorted(moods) == ["happy", "lonely"]


def _is_over(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    finally:
        sock.settimeout(10)
    return True


def test_a_restarted_worker_has_places_again_and_nobody_gives_way_for_want_of_them(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    workers = stack.enter_context(Workers(tmp_path, count=2, nofile=NOFILE))
    idle = [met(workers.port, stack=stack) for _ in range(24)]
    assert workers.stop_one(0) == 0
    workers.start_one()
    until = time.monotonic() + 8  # all have been idle for long enough, and the one that took them in has no place left
    while time.monotonic() < until:
        with contextlib.ExitStack() as opened:
            for _ in range(5):
                met(workers.port, stack=opened)
        time.sleep(0.05)  # each connection keeps a port of this machine for a minute, and there are neighbours
    for first, second in idle:
        first.sendall(b"still here")
        assert second.recv(10) == b"still here"
    assert "ended what had been idle longest" not in workers.log_text()


@pytest.mark.parametrize("count", [2, 3])
def test_those_who_wait_at_full_workers_still_do_when_one_leaves_and_newcomers_are_served_meanwhile(
    tmp_path: Path, count: int, stack: contextlib.ExitStack
) -> None:
    most = (LARGER_NOFILE - RESERVED_FDS) * 7 // 8 // 2
    bounds = ("--max-connections", "--max-waiting", "--max-per-source")
    options = [word for bound in bounds for word in (bound, str(most))]
    workers = stack.enter_context(
        Workers(tmp_path, *options, "--max-new-per-source", "1000000", count=count, nofile=LARGER_NOFILE)
    )
    waiting = [stack.enter_context(dial(workers.port, "127.1.0.1")) for _ in range((most - 24) * count)]
    tokens = [new_token() for _ in waiting]
    for token, sock in zip(tokens, waiting, strict=True):
        sock.sendall(handshake(token, "1" * 16))
    wait_until(lambda: workers.rows("current")[0]["waiting"] == len(waiting), what="all wait")
    fullest = max(range(count), key=lambda number: share(workers, workers.workers[number])[1])
    assert workers.stop_one(fullest) == 0
    until = time.monotonic() + 7  # longer than it takes until they are idle, and others would get their places
    while time.monotonic() < until:
        for sock in met(workers.port):
            sock.close()
        time.sleep(0.01)  # as above
    assert not any(_is_over(sock) for sock in waiting)
    started = workers.start_one()
    others = [worker for worker in workers.living() if worker is not started]
    wait_until(lambda: all(f"{started.pid} has joined" in worker.log_text() for worker in others), what="all know it")
    time.sleep(0.5)  # and what room it has
    assert workers.stop_one((fullest + 1) % count) == 0
    for token, sock in zip(tokens, waiting, strict=True):
        with dial(workers.port, "127.2.0.1") as partner, sock:
            partner.sendall(handshake(token, "2" * 16))
            assert sock.recv(3) == partner.recv(3) == b"ok\n"
    for bound in ("--max-waiting:", "--max-per-source:", "ended what had been idle longest"):
        assert bound not in workers.log_text()


@pytest.mark.parametrize(("count", "is_root"), [(2, True), (2, False), (3, False), (4, True)])
def test_workers_that_are_nearly_full_are_restarted_one_after_another_and_nothing_is_cut(
    tmp_path: Path, count: int, is_root: bool
) -> None:
    most = (LARGER_NOFILE - RESERVED_FDS) * 7 // 8 // 2
    options = ("--max-per-source", "1000", "--max-new-per-source", "5000")
    inside = [] if is_root else powerless()
    with (
        Workers(tmp_path, *options, count=count, nofile=LARGER_NOFILE, inside=inside) as workers,
        Crowd(workers.port) as crowd,
    ):
        transfers = [crowd.transfer(3_000, 3_000) for _ in range(int(0.95 * most / 2) * count)]
        for begin in range(0, len(transfers), 20):
            crowd.begin(transfers[begin : begin + 20])
        for number in range(count):
            stopped = crowd.run_beside(lambda number=number: workers.stop_one(number, 20))  # type: ignore[misc]
            assert stopped == 0
            crowd.run_beside(workers.start_one)
            assert not any(transfer.cut for transfer in transfers)
        crowd.end(transfers)
        for transfer in transfers:
            transfer.assert_intact()
        assert len(workers.wait_for_rows("usage", len(transfers))) == len(transfers)


def test_what_finds_no_room_is_pumped_on_for_the_grace_and_recorded_and_the_log_says_how_many(tmp_path: Path) -> None:
    most = LARGER_NOFILE - RESERVED_FDS
    bounds = ("--max-connections", str(most - 20), "--max-per-source", "1000", "--max-new-per-source", "5000")
    options = (*bounds, "--grace", "3")
    with Workers(tmp_path, *options, count=2, nofile=LARGER_NOFILE) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(3_000, 3_000) for _ in range((most - 40) * 2 // 2)]
        for begin in range(0, len(transfers), 20):
            crowd.begin(transfers[begin : begin + 20])
        began = time.monotonic()
        leaving = workers.workers[0]
        leaving.process.send_signal(signal.SIGTERM)
        moved = [transfer.moved for transfer in transfers]
        crowd.run_for(1.5)
        assert all(now.moved > then for now, then in zip(transfers, moved, strict=True)), "all are pumped on"
        crowd.run_beside(lambda: leaving.wait(20))
        assert time.monotonic() - began < 3 + 5
        assert "have 3 seconds to finish; the other workers have no room for them" in leaving.log_text()
        crowd.run_for(0.5)
        cut = [transfer for transfer in transfers if transfer.cut]
        assert f"cutting off {len(cut)} transfers that have not finished" in leaving.log_text()
        kept = [transfer for transfer in transfers if not transfer.cut]
        assert cut
        assert kept
        crowd.end(kept)
        for transfer in kept:
            transfer.assert_intact()
        assert len(workers.wait_for_rows("usage", len(transfers))) == len(transfers)

"""Whatever else happens in the run directory: strangers, a deletion, another relay, a worker of another language."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.clients.door import TURN_SECONDS
from relay.workers.buckets import root_of
from relay.workers.homes import FILES, Homes
from relay.workers.language import LANGUAGE, Greeting
from tests.support.crowd import Caller, Crowd, Transfer, assert_each_met_its_own_partner, call_in_random_order
from tests.support.current import current, share
from tests.support.harness import CHECKOUT, Relay, Workers, free_port, new_side, new_token, stopped, wait_until
from tests.support.home_table import tokens_of

FOREIGN = Greeting("worker-1-0badcafe", 1, "9.9.9", language=LANGUAGE + 1)


def sockets(run_dir: Path) -> list[Path]:
    """The workers' sockets in a run directory."""
    return sorted(path for path in run_dir.glob("worker-*") if path.is_socket())


def visit(path: Path) -> socket.socket:
    """Connect to a worker as a sibling does."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.settimeout(6)
    link.connect(str(path))
    return link


def assert_the_relay_works(crowd: Crowd, number: int = 30) -> None:
    """So many transfers meet, and end well."""
    transfers = [crowd.transfer(head=b"there", answer=b"and back") for _ in range(number)]
    crowd.begin(transfers)
    crowd.end(transfers)


def test_strangers_in_the_run_directory_do_no_harm(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd, contextlib.ExitStack() as strangers:
        (workers.run_dir / "worker-1-00000000").write_text("no socket at all")
        (workers.run_dir / "notes.txt").write_text("somebody keeps these here")
        mute = strangers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        mute.bind(str(workers.run_dir / "worker-3-00000000"))  # accepts, and never answers
        mute.listen()
        own = [path for path in sockets(workers.run_dir) if "-00000000" not in path.name]
        links = []
        for path in own:
            visit(path).close()
            for words in (b"GET / HTTP/1.1\r\n\r\n", b"[" * 50_000, b'{"relay-gevent": {}}', b"\x00" * 100):
                link = strangers.enter_context(visit(path))
                link.send(words)
                links.append(link)
            links.append(strangers.enter_context(visit(path)))  # says nothing
            garbage = strangers.enter_context(visit(path))  # greets well, and then makes no sense
            garbage.send(Greeting("worker-9-00000009", 9, "1.0.0").encode())
            assert json.loads(garbage.recv(1000))["relay-gevent"]["language"] == LANGUAGE
            for words in (b"H", b"P" + bytes(200), b"C", b"?"):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    garbage.send(words)
            links.append(garbage)
        began = time.monotonic()
        assert_the_relay_works(crowd)
        for link in links:
            with contextlib.suppress(ConnectionResetError):
                while link.recv(1000):
                    pass  # the worker ends the link
        assert time.monotonic() - began < 12
        crowd.run_beside(workers.start_one)
        crowd.run_beside(lambda: workers.stop_one(0))
        assert_the_relay_works(crowd)
        assert "does not speak like a worker" in workers.workers[0].log_text()
        assert (workers.run_dir / "worker-1-00000000").read_text() == "no socket at all"


def test_a_run_directory_that_is_deleted_is_made_again_and_found_by_newcomers(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        transfers = [crowd.transfer(100_000, 100_000) for _ in range(10)]
        crowd.begin(transfers)
        shutil.rmtree(workers.run_dir.rename(tmp_path / "old"))  # in one go: its workers look after it
        crowd.run_until(lambda: workers.run_dir.exists() and len(sockets(workers.run_dir)) == 2, 10, "it is back")
        assert workers.run_dir.stat().st_mode & 0o777 == 0o700
        crowd.run_beside(workers.start_one)
        for number in (0, 1):
            crowd.run_beside(lambda number=number: workers.stop_one(number))  # type: ignore[misc]
        assert_the_relay_works(crowd)
        crowd.end(transfers)


def test_workers_that_could_not_find_each_other_when_one_of_them_joined_find_each_other_later(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        hidden = workers.workers[0]
        (path,) = workers.run_dir.glob(f"worker-{hidden.pid}-*")
        with stopped(hidden):  # it would be found again within a second
            path.rename(tmp_path / "elsewhere")
            newcomer = crowd.run_beside(workers.start_one)
        siblings = f"siblings {workers.workers[1].pid}\n"
        crowd.run_until(lambda: siblings in newcomer.log_text(), what="the newcomer has found only one of them")
        crowd.run_until(lambda: path.exists(), 10, "it can be found again")
        said = f"worker {hidden.pid} has joined"
        crowd.run_until(lambda: said in newcomer.log_text(), 10, "they know each other")
        assert_the_relay_works(crowd, 200)
        crowd.run_beside(lambda: workers.stop_one(1))
        assert_the_relay_works(crowd, 200)


def test_a_worker_that_is_home_to_somebody_and_that_nobody_knows_is_looked_for(tmp_path: Path) -> None:
    # We play it: a link that could not be made, or broke off, when we joined.
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd, contextlib.ExitStack() as stack:
        own = Greeting(f"worker-{os.getpid()}-00000000", os.getpid(), "1.0.0")
        with visit(sockets(workers.run_dir)[0]) as link:
            link.send(own.encode())
            _, fds, _, _ = socket.recv_fds(link, 10_000, FILES + 1)
        homes = stack.enter_context(contextlib.closing(Homes(fds[:FILES])))
        os.close(fds[FILES])
        door = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        door.bind(str(workers.run_dir / own.name))
        door.listen()
        door.settimeout(5)
        token = new_token()
        assert homes.settle(token.encode(), lambda _: False) == (os.getpid(), True)
        crowd.call(token, new_side())
        link, _ = crowd.run_beside(door.accept)
        with link:
            greeting = Greeting.decode(link.recv(10_000))
            assert greeting.pid in workers.pids
        assert_the_relay_works(crowd)


def test_two_meet_while_somebody_stands_still_in_the_middle_of_changing_where_their_token_is_kept(
    tmp_path: Path,
) -> None:
    # We play it.
    with Workers(tmp_path, count=3) as workers, Crowd(workers.port) as crowd, contextlib.ExitStack() as stack:
        with visit(sockets(workers.run_dir)[0]) as link:
            link.send(Greeting(f"worker-{os.getpid()}-00000000", os.getpid(), "1.0.0").encode())
            _, fds, _, _ = socket.recv_fds(link, 10_000, FILES + 1)
        homes = stack.enter_context(contextlib.closing(Homes(fds[:FILES])))
        os.close(fds[FILES])
        sides = {new_token(): (new_side(), new_side()) for _ in range(40)}
        roots = [root_of(homes._first_place_of(token.encode())) for token in sides]
        for root in roots:
            fcntl.lockf(homes.fds[0], fcntl.LOCK_EX, 1, root)
        meet = dict([*sides.items()][:20])
        callers = []
        for token, side in random.sample([(token, side) for token, pair in meet.items() for side in pair], 40):
            callers.append(crowd.call(token, side, head=side.encode()))
            crowd.run_for(TURN_SECONDS / 6)  # so they come to all workers
        crowd.run_until(lambda: all(caller.first_words for caller in callers), 5, "all have met")
        assert_each_met_its_own_partner(callers, meet)
        waiting = [crowd.call(token, one, head=b"there") for token, (one, _) in [*sides.items()][20:]]
        crowd.run_until(lambda: current(workers) == (20, 20), 10, "others wait")
        for root in roots:
            fcntl.lockf(homes.fds[0], fcntl.LOCK_UN, 1, root)
        crowd.run_until(lambda: not any(homes_for_the_time_being(homes, token) for token in sides), 5, "all is well")
        crowd.begin([Transfer(one, crowd.call(one.token, new_side(), head=b"here")) for one in waiting])


def homes_for_the_time_being(homes: Homes, token: str) -> bool:
    """Whether somebody waits for a token where it is at home only until its first place can be had."""
    first = homes._first_place_of(token.encode())
    return homes.holder(token.encode()) is not None and not homes._buckets.look(first)


def test_of_two_homes_of_one_token_the_one_without_the_match_closes_its_spares(tmp_path: Path) -> None:
    # We play a worker that cannot be home, since it does not say that it is ready, but has the token's first place.
    with Workers(tmp_path, count=1) as workers, Crowd(workers.port) as crowd, contextlib.ExitStack() as stack:
        own = Greeting(f"worker-{os.getpid()}-00000000", os.getpid(), "1.0.0")
        link = stack.enter_context(visit(sockets(workers.run_dir)[0]))
        link.send(own.encode())
        _, fds, _, _ = socket.recv_fds(link, 10_000, FILES + 1)
        homes = stack.enter_context(contextlib.closing(Homes(fds[:FILES])))
        os.close(fds[FILES])
        ours, theirs = new_token(), new_token()
        assert homes.settle(ours.encode(), lambda _: False) == (os.getpid(), True)
        pair = crowd.transfer(head=b"there", answer=b"and back")
        matched = [Transfer(crowd.call(ours, new_side()), crowd.call(ours, new_side())), pair]
        crowd.begin(matched)
        assert homes.last_match(ours.encode()) > 0
        words = [link.recv(100)]
        while words[-1][:1] != b"." or len(words) < 3:  # which comes each second
            words.append(link.recv(100))
        # And nothing about the pair that is no business of ours.
        assert [word for word in words if word[:1] != b"."] == [b"M" + ours.encode()]
        side = new_side()
        spares = [crowd.call(theirs, side) for _ in range(3)]
        crowd.run_until(lambda: current(workers) == (2, 3), 10, "they wait")
        homes.match(theirs.encode(), time.monotonic())
        link.send(b"M" + theirs.encode())
        crowd.run_until(lambda: all(spare.closed for spare in spares), 10, "they are closed")
        assert [(spare.answer, spare.error) for spare in spares] == [(b"", None)] * 3
        assert tokens_of(workers.workers[0]) == 0
        crowd.end(matched)


def test_a_worker_on_its_own_is_home_to_those_who_wait_before_somebody_joins_it(tmp_path: Path) -> None:
    with Workers(tmp_path, count=1) as workers, Crowd(workers.port) as crowd:
        tokens_and_sides = [(new_token(), new_side()) for _ in range(5)]
        spares = [crowd.call(token, side) for token, side in tokens_and_sides[:2]]
        crowd.run_until(lambda: current(workers) == (0, 2), 10, "the spares wait")
        waiting = [crowd.call(token, side, head=b"there") for token, side in tokens_and_sides]
        crowd.run_until(lambda: current(workers) == (0, 7), 10, "all wait")
        assert tokens_of(workers.workers[0]) == 5
        newcomer = crowd.run_beside(workers.start_one)
        assert [tokens_of(worker) for worker in (workers.workers[0], newcomer)] == [5, 0]
        crowd.begin([Transfer(caller, crowd.call(caller.token, new_side(), head=b"here")) for caller in waiting])
        crowd.run_until(lambda: all(spare.closed for spare in spares), 10, "the spares are closed")
        assert [tokens_of(worker) for worker in (workers.workers[0], newcomer)] == [0, 0]


@pytest.mark.parametrize("other", ["port", "interface"])
def test_a_second_relay_cannot_join_by_mistake(tmp_path: Path, other: str) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        port = free_port() if other == "port" else workers.port
        interface = "127.0.0.2" if other == "interface" else "127.0.0.1"
        command = [sys.executable, "-m", "relay", "--port", str(port), "--interface", interface]
        done = subprocess.run(
            [*command, "--run-dir", str(workers.run_dir)],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line == (
            f"relay-gevent: error: --run-dir {workers.run_dir}: its relay listens on 127.0.0.1 port {workers.port}, "
            f"not on {interface} port {port}; give each relay a run directory of its own"
        )
        assert len(sockets(workers.run_dir)) == 2
        assert_the_relay_works(crowd)


def test_a_newcomer_of_another_language_gets_the_listening_socket_and_a_polite_refusal(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        for path in sockets(workers.run_dir):
            with visit(path) as link:
                link.send(FOREIGN.encode())
                packet, fds, _, _ = socket.recv_fds(link, 10_000, 4)
                assert Greeting.decode(packet).name == path.name
                (fd,) = fds
                with socket.socket(fileno=fd) as listener:
                    assert listener.getsockname() == ("127.0.0.1", workers.port)
                    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                assert link.recv(100) == b""
        said = f"is relay-gevent {FOREIGN.version}, which speaks another language"
        wait_until(lambda: workers.log_text().count(said) == 2, what="both say so")
        assert_the_relay_works(crowd)


@contextlib.contextmanager
def foreign_worker(run_dir: Path, greeting: Greeting) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A worker of another program: what it listens on in the run directory, and the relay's port, which it holds."""
    run_dir.mkdir(mode=0o700)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door,
        socket.create_server(("127.0.0.1", 0), backlog=100) as port,
    ):
        port.setblocking(False)
        door.bind(str(run_dir / greeting.name))
        door.listen()
        door.settimeout(10)
        yield door, port


def welcome(door: socket.socket, port: socket.socket, greeting: Greeting) -> tuple[Greeting, bytes]:
    """Answer one newcomer; return how it greeted, and what it said last."""
    link, _ = door.accept()
    with link:
        link.settimeout(10)
        hello = Greeting.decode(link.recv(10_000))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [port.fileno()]))]
        link.sendmsg([greeting.encode()], rights)
        return hello, link.recv(10_000)


def test_a_worker_that_finds_one_of_another_language_takes_the_listening_socket_and_works_on_its_own(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    with foreign_worker(run_dir, FOREIGN) as (door, port), contextlib.ExitStack() as stack:
        number = port.getsockname()[1]
        relay = Relay(tmp_path, "--run-dir", str(run_dir), port=number)
        crowd = Crowd(number)
        stack.enter_context(crowd)
        starting = crowd._aside.submit(relay.start)
        hello, last = welcome(door, port, FOREIGN)
        assert (hello.pid, hello.language) == (relay.pid, LANGUAGE)
        assert last == b""
        starting.result()
        stack.callback(relay.stop)
        port.close()
        assert_the_relay_works(crowd)
        assert f"is relay-gevent {FOREIGN.version}, which speaks another language" in relay.log_text()
        # It has nobody to hand anything to, so it finishes what it holds.
        transfer = crowd.transfer(head=b"until the end")
        crowd.begin([transfer])
        stopping = crowd._aside.submit(relay.stop)
        crowd.run_until(lambda: "1 transfers have 7 seconds to finish" in relay.log_text(), 5, "it gives grace")
        crowd.end([transfer])
        crowd.run_until(stopping.done, 5, "it ends")
        assert stopping.result() == 0


def test_workers_of_two_languages_share_the_port_and_each_gives_its_own_transfers_grace(tmp_path: Path) -> None:
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "sitecustomize.py").write_text(
        "import relay.workers.language as language\nlanguage.LANGUAGE += 1\n"
    )
    with Workers(tmp_path, count=2) as workers, Crowd(workers.port) as crowd:
        held = [crowd.transfer(50_000, 50_000) for _ in range(10)]
        crowd.begin(held)
        workers.env = {"PYTHONPATH": f"{tmp_path / 'newer'}:{CHECKOUT}"}
        for _ in range(2):
            crowd.run_beside(workers.start_one)
        older, newer = workers.workers[:2], workers.workers[2:]
        wait_until(lambda: all("speaks another language" in worker.log_text() for worker in older))
        wait_until(lambda: f"siblings {newer[0].pid}\n" in newer[1].log_text())
        # The older ones hand on to each other as long as there are two, and then finish what they hold.
        crowd.run_beside(lambda: workers.stop_one(0))
        assert not any(transfer.cut for transfer in held)
        stopping = crowd._aside.submit(workers.stop_one, 1)
        crowd.run_until(lambda: "transfers have 7 seconds" in older[1].log_text(), 5, "it gives grace")
        crowd.end(held)
        crowd.run_until(stopping.done, 5, "it ends")
        assert stopping.result() == 0
        waiting = crowd.call(new_token(), new_side())
        later = Transfer(waiting, crowd.call(waiting.token, new_side()))
        crowd.begin([later])
        assert_the_relay_works(crowd)
        crowd.end([later])


@pytest.mark.parametrize("newcomers", [1, 2])
def test_workers_that_took_themselves_for_the_first_adopt_the_homes_of_one_that_slept_while_they_joined(
    tmp_path: Path, newcomers: int
) -> None:
    workers = Workers(tmp_path, count=0)
    with contextlib.ExitStack() as stack:
        door, port = stack.enter_context(foreign_worker(workers.run_dir, FOREIGN))
        stack.enter_context(workers)
        workers.port = port.getsockname()[1]
        crowd = stack.enter_context(Crowd(workers.port))

        def start_one_that_gets_the_port() -> Relay:
            starting = crowd._aside.submit(workers.start_one)
            welcome(door, port, FOREIGN)
            return starting.result()

        def call_partners_of(callers: list[Caller]) -> list[Transfer]:
            order = random.sample(callers, len(callers))
            return [Transfer(caller, crowd.call(caller.token, new_side())) for caller in order]

        sleeper = start_one_that_gets_the_port()
        before = [crowd.call(new_token(), new_side()) for _ in range(60)]
        wait_until(lambda: share(workers, sleeper) == (0, 60), 10, "60 wait at the one that is about to sleep")
        with stopped(sleeper):
            joined = [start_one_that_gets_the_port() for _ in range(newcomers)]
            wait_until(lambda: "the first worker" in joined[0].log_text(), 10, "it takes itself for the first")
            assert_the_relay_works(crowd)
            meanwhile = [crowd.call(new_token(), new_side()) for _ in range(60)]
            met = call_partners_of(before[:20])
            wait_until(lambda: current(workers) == (0, 140), 10, "140 wait, of whom 20 should have met")
        met += call_partners_of(before[20:40] + meanwhile[:30])  # before they all know, or just then
        at_once = {new_token(): (new_side(), new_side()) for _ in range(100)}
        callers = call_in_random_order(crowd, at_once)
        for worker in joined:
            said = f"worker {worker.pid} has joined"
            crowd.run_until(lambda said=said: said in sleeper.log_text(), 5, said)  # type: ignore[misc]
        met += call_partners_of(before[40:] + meanwhile[30:])
        later = {new_token(): (new_side(), new_side()) for _ in range(300)}
        callers += call_in_random_order(crowd, later, among=lambda: crowd.run_for(0.04))
        crowd.begin(met)
        crowd.run_until(lambda: all(caller.first_words for caller in callers), 10, "everybody has met somebody")
        assert_each_met_its_own_partner(callers, at_once | later)
        wait_until(lambda: current(workers) == (len(met) + 400, 0), 10, "nobody waits any more")
        assert all(share(workers, worker)[0] > 0 for worker in workers.workers)
        for caller in callers:
            caller.finish()
        crowd.run_until(lambda: all(caller.closed for caller in callers), 10, "they part")
        crowd.end(met)
        assert {row["result"] for row in workers.wait_for_rows("usage", len(met) + 430)} == {"happy"}

"""--health: a port that answers health checks however full the relay is, takes no place and leaves no record."""

from __future__ import annotations

import contextlib
import re
import resource
import socket
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from relay.clients.health_port import MOST_CHECKS
from tests.support.harness import (
    Relay,
    Service,
    Workers,
    connect,
    free_port,
    handshake,
    met,
    new_side,
    new_token,
    read_to_end,
    stopped,
    wait_until,
)
from tests.support.hostile import beside, honest_transfer, is_open, move
from tests.support.web import dial_web, web_options, web_port

HEALTH = ("--health", "0")


def health_port(service: Service) -> int:
    """Where a relay answers health checks, as its log says."""
    said = re.compile(r"health checks on \S+ port (\d+)")
    found = wait_until(lambda: said.search(service.log_text()), what="it says where")
    assert found is not None
    return int(found[1])


def status(port: int) -> int:
    """What a GET is answered with; OSError when it is not."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        return int(answer.status)


def test_a_relay_that_is_full_answers_there_and_nowhere_else(tmp_path: Path) -> None:
    full = ("--max-connections", "4", "--max-per-source", "4")
    with Relay(tmp_path, *HEALTH, *full, recording=True) as relay, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(beside(partial(move, *met(relay.port, stack=stack))))
        newcomer = stack.enter_context(connect(relay.port))
        newcomer.sendall(handshake(new_token(), new_side())[:-1] + b"!")  # refused at once, where it is heard
        for _ in range(3):
            assert status(health_port(relay)) == 200
            connect(health_port(relay)).close()
        assert is_open(newcomer)
        assert relay.records() == []


def test_it_serves_while_one_of_its_workers_lives(tmp_path: Path) -> None:
    health = free_port()
    with Workers(tmp_path, "--health", str(health), count=2) as relay:
        assert status(health) == 200
        assert relay.stop_one(0) == 0
        relay.start_one()
        assert relay.stop_one(1) == 0
        assert status(health) == 200
        honest_transfer(relay.port)
        relay.stop()
        with pytest.raises(ConnectionRefusedError):
            connect(health)


@pytest.mark.parametrize("web", [False, True], ids=["plain", "with WebSocket"])
def test_a_worker_that_stands_still_leaves_all_checks_to_those_that_run(tmp_path: Path, web: bool) -> None:
    health = free_port()
    options = ("--health", str(health), *(web_options() if web else ()))
    with Workers(tmp_path, *options, count=3) as relay, stopped(*relay.living()[:2]):
        assert [status(health) for _ in range(24)] == [200] * 24
        if web:
            with dial_web(web_port(relay)):
                pass


def test_another_port_for_checks_comes_with_a_rolling_restart(tmp_path: Path) -> None:
    health, other = free_port(), free_port()
    with Workers(tmp_path, "--health", str(health), count=1, recording=False) as relay:
        for options in (("--health", str(other)), ()):
            name = f"newcomer-{len(options)}"
            newcomer = Relay(tmp_path, "--run-dir", str(relay.run_dir), *options, port=relay.port, name=name)
            with newcomer:
                assert status(health) == 200
                if options:
                    assert status(other) == 200
                relay.stop_one(-1)
                with pytest.raises(ConnectionRefusedError):
                    connect(health)
                relay.start_one()


def test_checks_that_ask_nothing_are_ended_and_others_are_answered_then(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(*HEALTH, recording=True)
    silent = [stack.enter_context(connect(health_port(relay))) for _ in range(MOST_CHECKS)]
    assert status(health_port(relay)) == 200
    assert [read_to_end(sock) for sock in silent] == [b""] * MOST_CHECKS
    honest_transfer(relay.port)
    assert [record["mood"] for record in relay.wait_for_records(1)] == ["happy"]


def test_without_a_descriptor_it_rests_and_answers_when_there_is_one(relay_factory: Callable[..., Relay]) -> None:
    relay = relay_factory(*HEALTH)
    assert status(health_port(relay)) == 200
    before = resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    with connect(health_port(relay)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, before)
        sock.settimeout(10)
        assert sock.recv(15) == b"HTTP/1.1 200 OK"


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AssertionError, match=f"error: --health {port}: another program listens there already"):
            Relay(tmp_path, "--health", str(port)).start()

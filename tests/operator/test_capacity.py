"""What a relay costs by itself, and thousands at a time: a waiting client, and idle pairs, which disturb nobody.

The figures are properties of the tests (`pytest --junit-xml=…`) and shown by `pytest -rP`.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.current import wait_for_current
from tests.support.harness import (
    Relay,
    Service,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    pss,
    read_exactly,
)

NOFILE = 20_000
WAITING = 8000
IDLE_PAIRS = 2000
BYTES_EACH = 1536
PATTERN = bytes(range(256)) * 8192  # 2 MiB

Note = Callable[[str, object], None]


@pytest.fixture
def note(record_property: Note) -> Note:
    """Keep a figure for whoever reads the test's output."""

    def keep(name: str, figure: object) -> None:
        record_property(name, figure)
        print(f"{name}: {figure}")

    return keep


@pytest.fixture
def room_for_clients() -> Iterator[None]:
    """Raise this process's own limit: each client takes a file descriptor here, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(WAITING, 2 * IDLE_PAIRS) + 500
    if hard != resource.RLIM_INFINITY and hard < max(NOFILE, needed):
        pytest.skip(f"the hard limit of file descriptors is {hard}; raise it to {max(NOFILE, needed)} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def service(any_relay_factory: Callable[..., Service], room_for_clients: None) -> Service:
    """A recording relay whose workers may have 20 000 file descriptors each."""
    return any_relay_factory(nofile=NOFILE)


def memory(service: Service) -> int:
    """What all workers take, in bytes (PSS)."""
    return sum(pss(pid) for pid in service.pids)


def seconds_for_a_transfer(port: int) -> float:
    """The best of ten transfers of 2 MiB, from the first connection to the last byte."""
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            sender, receiver = met(port, stack=stack)
            for start in range(0, len(PATTERN), 1 << 18):
                sender.sendall(PATTERN[start : start + (1 << 18)])
                assert read_exactly(receiver, 1 << 18) == PATTERN[start : start + (1 << 18)]
        best = min(best, time.perf_counter() - began)
    return best


def test_a_relay_without_a_database_does_without_sqlite(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay, contextlib.ExitStack() as stack:
        met(relay.port, stack=stack)
        (pid,) = relay.pids
        assert "sqlite" not in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.alone  # a part of its memory is that of libraries that neighbours use as well
def test_eight_thousand_waiting_clients_cost_little(service: Service, note: Note) -> None:
    seconds_for_a_transfer(service.port)  # what is needed once is there
    wait_for_current(service, 0, 0, 30)
    before = memory(service)
    finished = len(service.rows("usage"))
    with contextlib.ExitStack() as stack:
        tokens = [new_token() for _ in range(WAITING)]
        clients = []
        for token in tokens:  # each says at once what it wants, as clients do: the relay bounds those that do not
            clients.append(stack.enter_context(connect(service.port)))
            clients[-1].sendall(handshake(token, new_side()))
        wait_for_current(service, 0, WAITING, 30)
        each = (memory(service) - before) / WAITING
        note("bytes of PSS for a waiting client", round(each))
        for number in range(0, WAITING, 400):  # they are really waiting
            with connect(service.port) as partner:
                partner.sendall(handshake(tokens[number]))
                assert read_exactly(partner, 3) == read_exactly(clients[number], 3) == b"ok\n"
            assert clients[number].recv(1) == b""
            clients[number].close()
    service.wait_for_rows("usage", finished + WAITING, 30)
    assert each <= BYTES_EACH


@pytest.mark.alone  # it compares times
def test_a_pair_beside_two_thousand_idle_ones_is_served_as_before(service: Service, note: Note) -> None:
    alone = seconds_for_a_transfer(service.port)
    wait_for_current(service, 0, 0, 30)
    before = memory(service)
    with contextlib.ExitStack() as stack:
        pairs = [met(service.port, stack=stack) for _ in range(IDLE_PAIRS)]
        wait_for_current(service, IDLE_PAIRS, 0, 30)
        note("bytes of PSS for an idle pair", round((memory(service) - before) / IDLE_PAIRS))
        beside = seconds_for_a_transfer(service.port)
        note("ms for 2 MiB alone", round(alone * 1000, 2))
        note("ms for 2 MiB beside idle pairs", round(beside * 1000, 2))
        assert beside < 10 * alone  # generous: the machine may do other things meanwhile
        for number, (first, second) in enumerate(pairs):  # and each of them still works
            first.sendall(number.to_bytes(2, "big"))
            second.sendall(number.to_bytes(2, "big"))
        for number, (first, second) in enumerate(pairs):
            assert read_exactly(first, 2) == read_exactly(second, 2) == number.to_bytes(2, "big")
    wait_for_current(service, 0, 0, 30)

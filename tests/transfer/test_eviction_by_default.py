"""When few sources, or one with many networks, have taken all places of a relay as it is by default, and say a byte now
and then: newcomers are let in, and honest transfers that move go on.

The relays have few file descriptors, so that their places can be taken in a moment; clients are whom a proxy names.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.support.harness import Relay, handshake, new_side, new_token, read_exactly
from tests.support.hostile import is_open
from tests.transfer.test_eviction import ENDED, SOME, trickling
from tests.transfer.test_eviction_behind_proxies import HONEST, TRUSTING, called

Sides: TypeAlias = tuple[socket.socket, socket.socket]

TAKEN: dict[str, tuple[int, bool, int, Callable[[int], str]]] = {
    "200 descriptors of one of several workers, by four sources": (200, True, 32, lambda n: f"198.51.100.{n % 4}"),
    "200 descriptors, by sources that have a few each": (200, False, 64, lambda n: f"198.51.100.{n // 3}"),
    "1000 descriptors of one of several workers, by one machine's 65 536 networks": (
        1000,
        True,
        382,
        lambda n: f"2001:db8:0:{n * 97 % 65536:x}::{n:x}",
    ),
    "1000 descriptors, by sources that have 28 each": (1000, False, 764, lambda n: f"198.51.100.{n // 14}"),
}
"""The limit of file descriptors, whether there is a run directory, how many places there are, and where both
sides of the pair with a number come from."""


@pytest.mark.parametrize("taken", TAKEN)
def test_a_byte_now_and_then_keeps_no_place_of_a_relay_as_it_is_by_default(
    taken: str, tmp_path: Path, relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    nofile, in_company, places, source = TAKEN[taken]
    options = ("--run-dir", str(tmp_path / "run")) if in_company else ()
    relay = relay_factory(*options, *TRUSTING, "--grace", "0", nofile=nofile)
    moving = [meet(relay, HONEST.format(number + 1), stack) for number in range(3)]
    with trickling(moving, 0.2, SOME):
        greedy: list[Sides] = []
        while 2 * (len(greedy) + len(moving)) < places:
            greedy.append(meet(relay, source(len(greedy)), stack))
        with trickling(greedy, 1.0):
            for number in range(3):
                meet(relay, HONEST.format(number + 100), stack)
    assert all(is_open(sock) for pair in moving for sock in pair)
    relay.stop()
    assert ENDED in relay.log_text(), "or not all places were taken"


def meet(relay: Relay, host: str, stack: contextlib.ExitStack) -> Sides:
    """Two sides at `host`, who have met; AssertionError or OSError if they do not."""
    token = new_token()
    first, second = (stack.enter_context(called(relay, host, handshake(token, new_side()))) for _ in range(2))
    for sock in (first, second):
        sock.settimeout(25)
        assert read_exactly(sock, 3) == b"ok\n"
    return first, second

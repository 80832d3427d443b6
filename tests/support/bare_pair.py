"""A pair in the test's own process, with no relay around it."""

from __future__ import annotations

import socket
import time

from relay.transfer.limits import Limits
from relay.transfer.pair import Pair, Readers
from relay.transfer.pipes import PipePool
from relay.transfer.rest import Rest
from relay.transfer.turns import Turns


def new_pair(
    first: socket.socket,
    second: socket.socket,
    turns: Turns,
    rest: Rest,
    readers: Readers = (None, None),
    limits: Limits | None = None,
) -> Pair:
    """A pair of these two, which has just begun, and of whose end nobody hears."""
    return Pair(
        first,
        second,
        started=0.0,
        arrived=time.monotonic(),
        waiting_time=0.0,
        pipes=PipePool(),
        turns=turns,
        rest=rest,
        on_over=lambda pair: None,
        limits=limits,
        readers=readers,
    )

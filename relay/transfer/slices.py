"""Long work in the event loop, a little at a time.

When workers come, go or wake, and when a relay stops, there is something to be done for each of tens of thousands of
clients. That takes a second or so, and those who move bytes can spare milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import gevent

SLICE_SECONDS = 0.001
"""How long such work goes on before the event loop looks after everybody else."""

REST_SECONDS = 0.001
"""How long it rests then: whoever is busy has half of the time."""

T = TypeVar("T")


def in_slices(things: Iterable[T]) -> Iterator[T]:
    """The same things, for a greenlet that does something for each of them; while it rests, everything may change."""
    until = time.monotonic() + SLICE_SECONDS
    for thing in things:
        yield thing
        if time.monotonic() >= until:
            gevent.sleep(REST_SECONDS)
            until = time.monotonic() + SLICE_SECONDS

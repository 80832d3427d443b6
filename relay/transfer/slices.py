"""Long work in the event loop, a little at a time.

When workers come, go or wake, and when a relay stops, there is something to be done for each of tens of thousands of
clients. That takes a second or so, and those who move bytes can spare milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import gevent

from relay.process import log

SLICE_SECONDS = 0.001
"""How long such work goes on before the event loop looks after everybody else."""

REST_SECONDS = 0.001
"""How long it rests then: whoever is busy has half of the time."""

MOST_MISTAKES = 100
"""After so many mistakes of ours, each with one of many, the others are left alone."""

T = TypeVar("T")


def in_slices(things: Iterable[T]) -> Iterator[T]:
    """The same things, for a greenlet that does something for each of them; while it rests, everything may change."""
    until = time.monotonic() + SLICE_SECONDS
    for thing in things:
        yield thing
        if time.monotonic() >= until:
            gevent.sleep(REST_SECONDS)
            until = time.monotonic() + SLICE_SECONDS


def see_to_all(begin: Callable[[], Iterator[None]], what: str) -> None:
    """Do something for everybody, in slices and one with each step, from a greenlet. `begin` begins with those for whom
    it is still to be done; after a mistake it is asked again, `MOST_MISTAKES` times at the most: a mistake with one is
    no other's. The log tells of each; `what` says with whom it was, as in "with one who waits"."""
    mistakes = 0
    while not _went_well(begin(), what) and mistakes < MOST_MISTAKES:
        mistakes += 1


def _went_well(steps: Iterator[None], what: str) -> bool:
    try:
        for _ in in_slices(steps):
            pass
    except Exception:  # whatever it is, all the others would wait for their ends, or for a ping, until it is mended
        log.tell_mistake(f"a mistake {what}; going on with the others")
        return False
    return True

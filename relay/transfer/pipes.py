"""Kernel pipes, borrowed by a pump only while it has bytes in flight.

A pipe is worth having only when it is large: a copy through 64 KiB is several times cheaper than splicing through two
pages. An ordinary user gets 64 MiB of pipe memory in all (``fs.pipe-user-pages-soft``, see pipe(7)); past it, enlarging
a pipe fails with EPERM. When one cannot be had, for that or any other reason, there is none to borrow, and the pump
copies; after `TRY_AGAIN_SECONDS` it is tried again. Nothing that is smaller than wanted is ever kept.

File descriptors, too, are used only as far as they are left over: what connections were promised is theirs, and the
last ones are for what cannot do without, such as a new sibling, or a log that is opened again.
"""

from __future__ import annotations

import fcntl
import os
import time

from relay.process.dataclass import dataclass
from relay.process.fd_limit import fd_limit

PIPE_BYTES = 1 << 20
"""What a pipe holds; also the most that ever rests in the relay in one direction of a pair."""

MOST_PIPES = 1000
"""How many pipes a pool has at the most, unless its owner says otherwise."""

SPARE_PIPES = 16
"""How many unused pipes are kept for the next turn, instead of being made anew for each."""

FDS_LEFT_FREE = 48
"""File descriptors below the process's limit that pipes leave alone: what comes with a new sibling is the most."""

TRY_AGAIN_SECONDS = 0.25
"""How long no further pipe is asked for when one could not be had: asking costs as much as copying 64 KiB."""


@dataclass(frozen=True, slots=True, eq=False)
class Pipe:
    """A non-blocking pipe: bytes go in at the file descriptor `inlet` and come out at `outlet`."""

    inlet: int
    outlet: int

    def close(self) -> None:
        """Close both ends; bytes still in the pipe are gone."""
        os.close(self.inlet)
        os.close(self.outlet)


class PipePool:
    """Empty pipes, lent and taken back."""

    def __init__(self, spare: int = SPARE_PIPES, most: int = MOST_PIPES) -> None:
        self._spare = spare
        self._most = most
        self._open = 0
        self._pipes: list[Pipe] = []
        self._scarce_until = 0.0

    def borrow(self) -> Pipe | None:
        """An empty pipe that holds `PIPE_BYTES`, or None when it cannot be had."""
        if self._pipes:
            return self._pipes.pop()
        if self._scarce_until:
            if time.monotonic() < self._scarce_until:
                return None
            self._scarce_until = 0.0
        pipe = _new_pipe() if self._open < self._most else None
        if pipe is None:
            self._scarce_until = time.monotonic() + TRY_AGAIN_SECONDS
        else:
            self._open += 1
        return pipe

    def adopt(self, inlet: int, outlet: int) -> Pipe:
        """A pipe that has come from another process, and counts here now; it may hold bytes."""
        self._open += 1
        return Pipe(inlet, outlet)

    @property
    def is_overdrawn(self) -> bool:
        """Whether there are more pipes than there should be: siblings have handed them on."""
        return self._open > self._most

    def give_back(self, pipe: Pipe) -> None:
        """Take back `pipe`, which is empty."""
        if len(self._pipes) < self._spare and not self.is_overdrawn:
            self._pipes.append(pipe)
        else:
            self.throw_away(pipe)

    def throw_away(self, pipe: Pipe) -> None:
        """Take back `pipe`, whatever is in it."""
        self._open -= 1
        pipe.close()

    def close(self) -> None:
        """Close the pipes that nobody has borrowed."""
        while self._pipes:
            self.throw_away(self._pipes.pop())


def _new_pipe() -> Pipe | None:
    try:
        outlet, inlet = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    pipe = Pipe(inlet, outlet)
    try:
        if inlet < fd_limit() - FDS_LEFT_FREE:  # the kernel gives the lowest number that is free
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            return pipe
    except OSError:
        pass  # EPERM: this user's pipe memory is used up; or whatever a sandbox says
    pipe.close()
    return None

"""Kernel pipes, borrowed by a pump only while it has bytes in flight.

An ordinary user gets 64 MiB of pipe memory in all (``fs.pipe-user-pages-soft``, see pipe(7)); past it, enlarging a
pipe fails with EPERM and a new one has two pages. Both still work, so both are survived. When there is no file
descriptor left for a pipe there is none to borrow, and the pump copies. The last descriptors are not for pipes: they
are for what cannot do without, such as a new sibling, or a log that is opened again.
"""

from __future__ import annotations

import fcntl
import os
import resource
from dataclasses import dataclass

PIPE_BYTES = 1 << 20
"""What a pipe is asked to hold; also the most that ever rests in the relay in one direction of a pair."""

SPARE_PIPES = 32
"""How many unused pipes are kept for the next turn, instead of being made anew for each."""

FDS_LEFT_FREE = 48
"""File descriptors below the process's limit that pipes leave alone: what comes with a new sibling is the most."""


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

    def __init__(self, spare: int = SPARE_PIPES) -> None:
        self._spare = spare
        self._pipes: list[Pipe] = []

    def borrow(self) -> Pipe | None:
        """An empty pipe, or None when the process or the machine has no file descriptor left for one."""
        if self._pipes:
            return self._pipes.pop()
        try:
            outlet, inlet = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        fds, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if inlet >= fds - FDS_LEFT_FREE:  # the kernel gives the lowest number that is free
            os.close(inlet)
            os.close(outlet)
            return None
        try:
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # EPERM: this user's pipe memory is used up. A smaller pipe only takes more turns.
        return Pipe(inlet, outlet)

    def give_back(self, pipe: Pipe) -> None:
        """Take back `pipe`, which is empty."""
        if len(self._pipes) < self._spare:
            self._pipes.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Close the pipes that nobody has borrowed."""
        while self._pipes:
            self._pipes.pop().close()

"""One direction of bytes: from a source socket, through a pipe, into a sink socket, without entering Python.

A pump never waits. Its `turn` moves what can be moved now and leaves in `waits` what has to happen before the next
one; the greenlet of its pair does the waiting (see `pair`). Bytes go from socket to pipe to socket with splice(2),
which moves references to pages instead of bytes. Where splicing cannot be had (EINVAL from the kernel, no pipe left to
borrow, a platform without it) the same turn copies through a small buffer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from select import POLLIN, POLLOUT

from relay.transfer.pipes import Pipe, PipePool
from relay.transfer.state import PumpState
from relay.transfer.turns import Turns

# What a pump waits for. The first two are poll(2)'s own, since that is where they go.
INPUT = POLLIN
"""The source has nothing more to read."""
ROOM = POLLOUT
"""The sink takes nothing more, and bytes rest in the pipe: backpressure."""
TURN = 0
"""Nothing: there is more to move, and it is somebody else's turn."""
OVER = -1
"""The source has ended its stream, all of it was delivered, and the sink was told."""

COPY_BYTES = 64 << 10
"""The most that rests in a pump that copies, in bytes."""

FEW_BYTES = 16 << 10
"""A read below this has most likely emptied the source, and asking again would only cost a system call."""

_SPLICE = getattr(os, "splice", None)
_FLAGS = getattr(os, "SPLICE_F_MOVE", 1) | getattr(os, "SPLICE_F_NONBLOCK", 2)


class Pump:
    """Moves bytes from `source` to `sink`, both non-blocking stream sockets.

    `moved` counts the bytes that the sink has taken, `held` those that rest here; `waits` is one of `INPUT`, `ROOM`,
    `TURN` and `OVER`. `held` is never above `turns.LARGEST_TURN`, and nothing is read while anything is held.

    `discards` says that the sink's peer has ended its own stream and then gone. What still comes from the source is
    thrown away, for what that peer had sent may be on its way in the other direction, and closing a socket with unread
    input would destroy it.
    """

    __slots__ = (
        "_pipe",
        "_pipes",
        "_rest",
        "_turns",
        "discards",
        "held",
        "moved",
        "sink",
        "source",
        "splices",
        "waits",
    )

    def __init__(self, source: socket.socket, sink: socket.socket, pipes: PipePool, turns: Turns) -> None:
        self.source = source
        self.sink = sink
        self.waits = INPUT
        self.held = 0
        self.moved = 0
        self.discards = False
        self.splices = _SPLICE is not None
        self._pipes = pipes
        self._turns = turns
        self._pipe: Pipe | None = None
        self._rest = b""

    def turn(self, most: int) -> None:
        """Move what is held and up to `most` bytes more, and set `waits`.

        Raises OSError when either socket was reset, unless its peer had ended its stream before: see `discards`.
        """
        left = most
        try:
            while True:
                if self.held:
                    self._drain()
                elif left <= 0:
                    self.waits = TURN
                    return
                else:
                    got = self._fill(left, first=left == most)
                    if got == 0:
                        self._end()
                        return
                    left -= got
                    self._drain()
                    if got < FEW_BYTES and not self.held:
                        if left + got == most:
                            self._turns.moved_little()
                        self.waits = INPUT
                        return
        except BlockingIOError:
            self.waits = ROOM if self.held else INPUT
        except BrokenPipeError:
            # The kernel says EPIPE, and not ECONNRESET, of a reset that follows the peer's end of stream: tcp_reset()
            # in net/ipv4/tcp_input.c.
            self._drop()
            self.discards = True
            self.waits = INPUT
        finally:
            if self._pipe is not None and (self._rest or not self.held):
                self._pipes.give_back(self._pipe)
                self._pipe = None

    def _fill(self, most: int, *, first: bool) -> int:
        """Read up to `most` bytes from the source, `first` in this turn; 0 means that it has ended its stream."""
        if self.discards:
            return len(self.source.recv(min(most, COPY_BYTES)))
        if self.splices and self._pipe is None:
            self._pipe = self._pipes.borrow()
        if self.splices and self._pipe is not None:
            try:
                self.held = os.splice(self.source.fileno(), self._pipe.inlet, most, flags=_FLAGS)
            except BlockingIOError:
                if not first:
                    raise
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.splices = False
            if self.held:
                return self.held
            # Splicing stops at urgent data (tcp_read_sock() in net/ipv4/tcp.c) for good, and says that nothing is there
            # or that the stream has ended. Receiving steps over it, as the copying relays do.
        self._rest = self.source.recv(min(most, COPY_BYTES))
        self.held = len(self._rest)
        return self.held

    def _drain(self) -> None:
        """Write what is held to the sink, as much as it takes at once."""
        if self.discards:
            return  # nothing is held
        if self._rest:
            taken = self.sink.send(self._rest)
            self._rest = self._rest[taken:]
        else:
            assert self._pipe is not None
            taken = os.splice(self._pipe.outlet, self.sink.fileno(), self.held, flags=_FLAGS)
        self.held -= taken
        self.moved += taken
        self._turns.moved += taken

    def _end(self) -> None:
        """Pass the source's end of stream on to the sink."""
        self.waits = OVER
        with contextlib.suppress(OSError):  # the sink has gone; reading from it tells how
            self.sink.shutdown(socket.SHUT_WR)

    def pack(self) -> tuple[PumpState, list[int]]:
        """This pump as it is, for another process, and the file descriptors of its pipe if that holds anything."""
        state = PumpState(self.moved, self.held, self.waits == OVER, self.splices, self._rest)
        return state, [] if self._pipe is None else [self._pipe.inlet, self._pipe.outlet]

    def unpack(self, state: PumpState, pipe: Pipe | None) -> None:
        """Go on where a pump in another process was."""
        self.moved, self.held, self.splices, self._rest = state.moved, state.held, state.splices, state.rest
        self._pipe = pipe
        self.resume()
        if state.over:
            self.waits = OVER

    def resume(self) -> None:
        """Begin anew to wait, after the pump was let go of between two turns."""
        if self.waits != OVER:
            self.waits = ROOM if self.held else INPUT

    def abandon(self) -> None:
        """Give up what is held; for a pair that is over."""
        self._drop()
        self.waits = OVER

    def _drop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()  # it may hold bytes, so it cannot go back
            self._pipe = None
        self._rest = b""
        self.held = 0

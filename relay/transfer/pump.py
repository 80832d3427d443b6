"""One direction of bytes: from a source socket, through a pipe, into a sink socket, without entering Python.

A pump never waits. Its `turn` moves what can be moved now and leaves in `waits` what has to happen before the next
one; its pair does the waiting (see `pair`). Bytes go from socket to pipe to socket with splice(2), which moves
references to pages instead of bytes. Where splicing cannot be had (whatever the kernel or a sandbox says, no pipe to
borrow, a platform without it) the same turn copies through one small buffer that all pumps share.

Memory may be refused (``ulimit -v``, ``vm.overcommit_memory=2``), and what was read has to be kept when the sink does
not take it. So nothing is read without a `reserve` for that: who needs it uses it up, and then nobody reads before it
can be had again. That is told with `NoMemory`: nothing is lost, and it is tried again later.

A `sip` is the turn of who has only a little to move: one read and one write, copied, since a pipe costs more than that.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
from collections.abc import Sequence
from select import POLLIN, POLLOUT

from relay.transfer.pipes import Pipe, PipePool
from relay.transfer.state import PIPE_FDS, PumpState
from relay.transfer.turns import LARGEST_TURN, NoMemory, Turns
from relay.transfer.turns import TURN as TURN

# What a pump waits for, besides `TURN`: there is more to move, and it is somebody else's turn. The first two are
# poll(2)'s own, since that is where they go.
INPUT = POLLIN
"""The source has nothing more to read."""
ROOM = POLLOUT
"""The sink takes nothing more, and bytes rest in the pipe: backpressure."""
OVER = -1
"""The source has ended its stream, all of it was delivered, and the sink was told."""

COPY_BYTES = 64 << 10
"""What is copied at a time, in bytes, and the most that rests in a pump that copies."""

FEW_BYTES = 16 << 10
"""A read below this has most likely emptied the source, and asking again would only cost a system call."""

RESET = (
    errno.ECONNRESET,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ENETUNREACH,
    errno.ENETDOWN,
)
"""What the kernel says when a connection is broken. Anything else that it says of splice(2) means that there is no
splicing, for whatever reason; then copying shows what it is about the connection, if it is."""

_SPLICE = getattr(os, "splice", None)
_FLAGS = getattr(os, "SPLICE_F_MOVE", 1) | getattr(os, "SPLICE_F_NONBLOCK", 2)

_buffer = memoryview(mmap.mmap(-1, COPY_BYTES, mmap.MAP_PRIVATE))  # empty between two turns; takes memory as it fills
_NOTHING = memoryview(b"")


class Reserve:
    """Address space for `size` bytes, which is given up when memory for something else cannot be had."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.kept: mmap.mmap | None = None

    def renew(self) -> None:
        """Have it again; raises NoMemory."""
        try:
            self.kept = mmap.mmap(-1, self._size, mmap.MAP_PRIVATE)
        except (OSError, MemoryError):
            raise NoMemory from None

    def give_up(self) -> None:
        """Let somebody else have it."""
        if self.kept is not None:
            self.kept.close()
            self.kept = None


reserve = Reserve(LARGEST_TURN + (512 << 10))  # what is read in a turn, and what an allocator takes besides
"""That of all pumps."""


class Pump:
    """Moves bytes from `source` to `sink`, both non-blocking stream sockets.

    `moved` counts the bytes that the sink has taken, `held` those that rest here; `waits` is one of `INPUT`, `ROOM`,
    `TURN` and `OVER`. `held` is never above `turns.LARGEST_TURN`, and nothing is read while anything is held. What is
    held is in a pipe while it is in flight, and in memory once it was put away.

    `discards` says that the sink's peer has ended its own stream and then gone. What still comes from the source is
    thrown away, for what that peer had sent may be on its way in the other direction, and closing a socket with unread
    input would destroy it.
    """

    reader = None
    frames_out = False
    """No frames are read here, and none written."""
    is_dear = False
    unread = 0
    """Bytes that have come from the source and were not looked at yet."""

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
        self._rest = _NOTHING

    def turn(self, most: int) -> None:
        """Move what is held and up to `most` bytes more, and set `waits`.

        Raises OSError when either socket was reset, unless its peer had ended its stream before: see `discards`; and
        NoMemory.
        """
        try:
            self._move(most)
        except BlockingIOError:
            self.waits = ROOM if self.held else INPUT
        except NoMemory:
            self.waits = TURN
            raise
        except BrokenPipeError:
            self.begin_to_discard()
        finally:
            if self._pipe is not None and (self._rest or not self.held):
                self._pipes.give_back(self._pipe)
                self._pipe = None

    def sip(self, most: int = COPY_BYTES) -> bool:
        """Move what is held or what one small read of up to `most` bytes brings, and set `waits`.

        Returns whether there may be more than that to move at once. Raises OSError and NoMemory as `turn` does.
        """
        try:
            if self.held:
                self._drain()
                if self._pipe is not None and not self.held:  # there was no memory to put it away
                    self._pipes.give_back(self._pipe)
                    self._pipe = None
                self.waits = ROOM if self.held else INPUT
                return False
            got = self._copy_in(most)
            if not got:
                self._end()
                return False
            self.waits = INPUT
            return got == most
        except BlockingIOError:
            self.waits = ROOM if self.held else INPUT
        except BrokenPipeError:
            self.begin_to_discard()
        return False

    def _move(self, most: int) -> None:
        left = most
        while True:
            if self.held:
                self._drain()
            elif left <= 0:
                self.waits = TURN
                return
            else:
                asked = left
                got = self._fill(asked, first=asked == most)
                if got == 0:
                    self._end()
                    return
                left = 0 if self._turns.busy() else left - got
                self._drain()
                if got < FEW_BYTES and got < asked and not self.held:
                    self.waits = INPUT
                    return

    def _fill(self, most: int, *, first: bool) -> int:
        """Read up to `most` bytes from the source, `first` in this turn; 0 means that it has ended its stream."""
        if self.splices and self._pipe is None and not self.discards:
            self._pipe = self._pipes.borrow()
        if self._pipe is not None:
            try:
                self.held = os.splice(self.source.fileno(), self._pipe.inlet, most, flags=_FLAGS)
            except BlockingIOError:
                if not first:
                    raise
            except OSError as error:
                if error.errno in RESET:
                    raise
                self.splices = False
            if self.held:
                return self.held
            # Splicing stops at urgent data (tcp_read_sock() in net/ipv4/tcp.c) for good, and says that nothing is there
            # or that the stream has ended. Receiving steps over it, as the copying relays do.
        return self._copy_in(min(most, COPY_BYTES))

    def _copy_in(self, most: int) -> int:
        """Read up to `most` bytes, and write them as far as the sink takes them; returns how many were read.

        Raises BlockingIOError when nothing was read, or when something is held now.
        """
        if reserve.kept is None:
            reserve.renew()
        got = self.source.recv_into(_buffer, most)
        if self.discards:
            self._throw_away(got)
        elif got:
            try:
                self._write_out(_buffer[:got])
            except BrokenPipeError:
                self._throw_away(got)
                raise
        return got

    def _throw_away(self, size: int) -> None:
        """So many bytes were read that nobody gets: for a pump that counts them."""

    def _write_out(self, chunk: memoryview) -> None:
        try:
            taken = self.sink.send(chunk)
        except BlockingIOError:
            taken = 0
        self.moved += taken
        self._turns.moved += taken
        if taken < len(chunk):
            self._keep(memoryview(copy_of(chunk[taken:])))
            raise BlockingIOError

    def _drain(self) -> None:
        """Write what is held to the sink, if there is anything, as much as it takes at once."""
        if self._rest:
            taken = self.sink.send(self._rest)
            self._rest = what_is_left(self._rest, taken)
            self._turns.held -= taken
        elif self.held and self._pipe is not None:
            taken = self._splice_out(self._pipe)
        else:
            return
        self.held -= taken
        self.moved += taken
        self._turns.moved += taken

    def _splice_out(self, pipe: Pipe) -> int:
        try:
            return os.splice(pipe.outlet, self.sink.fileno(), self.held, flags=_FLAGS)
        except OSError as error:
            if isinstance(error, BlockingIOError) or error.errno in RESET:
                raise
        # Refused in the middle of a transfer: what is in the pipe is still to be delivered.
        self.splices = False
        self._put_away()
        return 0

    def _keep(self, rest: memoryview) -> None:
        """Hold `rest` in memory."""
        self._rest = rest
        self.held = len(rest)
        self._turns.held += self.held

    def put_away(self) -> None:
        """Hold in memory what rests in a pipe, and give the pipe to who moves something; without memory it stays."""
        try:
            self._put_away()
        except NoMemory:
            pass

    def _put_away(self) -> None:
        if self._pipe is None:
            return
        try:
            rest = memoryview(bytearray(self.held))
        except MemoryError:
            raise NoMemory from None
        left = rest
        while left:
            left = left[os.readv(self._pipe.outlet, [left]) :]
        self._keep(rest)
        self._pipes.give_back(self._pipe)
        self._pipe = None

    @property
    def has_ended(self) -> bool:
        """Whether the source has ended its stream, so that nothing more is to be expected of it."""
        return self.waits == OVER

    def begin_to_discard(self) -> None:
        """The sink has gone, whose own stream is over: see `discards`."""
        # The kernel says EPIPE, and not ECONNRESET, of a reset that follows the peer's end of stream: tcp_reset()
        # in net/ipv4/tcp_input.c.
        self._throw_away(self.held)
        self._drop()
        self.discards = True
        self.waits = INPUT

    def _end(self) -> None:
        """Pass the source's end of stream on to the sink."""
        self.waits = OVER
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the sink has gone; reading from it tells how

    def pack(self, files: contextlib.ExitStack) -> tuple[PumpState, list[int]]:
        """This pump as it is, for another process, and the file descriptors of what it holds if that is much: of its
        pipe, or of a file in memory that `files` closes here.

        Raises OSError when there can be no such file.
        """
        fds = []
        rest = bytes(self._rest)
        if self._pipe is not None and self.held:
            fds = [self._pipe.inlet, self._pipe.outlet]
        elif len(rest) > COPY_BYTES:
            fds = [file_of(rest)]
            files.callback(os.close, fds[0])
            rest = b""
        return PumpState(self.moved, self.held, self.waits == OVER, self.splices, rest, len(fds)), fds

    def unpack(self, state: PumpState, fds: Sequence[int]) -> None:
        """Go on where a pump in another process was; `fds` are those that came with it."""
        self.moved, self.splices = state.moved, state.splices
        if len(fds) == PIPE_FDS:
            self._pipe = self._pipes.adopt(*fds)
            self.held = state.held
            if self._pipes.is_overdrawn:
                self.put_away()
        elif fds:
            with open(fds[0], "rb", buffering=0) as file:
                self._keep(memoryview(os.pread(file.fileno(), state.held, 0)))
        elif state.rest:
            self._keep(memoryview(state.rest))
        self.resume()
        if state.over:
            self.waits = OVER

    @property
    def untaken(self) -> int:
        """Bytes that the sink has not taken yet."""
        return self.held

    @property
    def taken(self) -> int:
        """Bytes that have come from the source and are the sink's, or are to be."""
        return self.moved + self.held

    def without_payload(self) -> int | None:
        """How many bytes can be read from the source now without anything that would be passed on: its end, if
        nothing else; None if there is something."""
        try:
            return None if self.source.recv(1, socket.MSG_PEEK) else 1
        except BlockingIOError:
            return 1

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
            self._pipes.throw_away(self._pipe)  # it may hold bytes, so it cannot go back
            self._pipe = None
        self._turns.held -= len(self._rest)
        self._rest = _NOTHING
        self.held = 0


def what_is_left(rest: memoryview, taken: int) -> memoryview:
    """`rest` without the first `taken` bytes, in memory of its own once the most of what it is a part of is gone: a
    part keeps the whole, and what rests here is bounded by what it is counted as."""
    left = rest[taken:]
    try:
        return memoryview(bytes(left)) if 2 * len(left) < memoryview(left.obj).nbytes else left
    except MemoryError:
        return left


def copy_of(chunk: memoryview) -> bytes:
    """What was read and has to be kept, in memory of its own: the reserve, if there is no other."""
    try:
        return bytes(chunk)
    except MemoryError:
        reserve.give_up()
        return bytes(chunk)


def file_of(content: bytes) -> int:
    """A file in memory with that content; the number of its descriptor."""
    fd = os.memfd_create("relay-rest", os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        os.close(fd)
        raise
    return fd

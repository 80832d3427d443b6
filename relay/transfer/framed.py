"""One direction of bytes with a WebSocket client at either end, or at both: a pump that reads and writes frames.

It is used as `relay.transfer.pump.Pump` is, and never waits either. Payload passes as it comes, wherever frames and
messages begin and end; of a frame nothing is kept, whatever it says of its length. What comes off the wire is read into
one buffer that all these pumps share; what is not dealt with in a turn is copied out of it.

What is said to a WebSocket client besides payload (the answer to a ping, a ping, a Close) may only come between two
frames. So it is the pump towards that client that says it, behind what is left of the frames before it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

from relay.clients import frames
from relay.clients.frames import NORMAL, Close, FrameReader, Payload, Taken
from relay.clients.handshake import OK
from relay.clients.masks import mask_function
from relay.transfer.pump import COPY_BYTES, INPUT, OVER, ROOM, TURN, copy_of, file_of, reserve, what_is_left
from relay.transfer.state import PumpState
from relay.transfer.turns import LARGEST_TURN, NoMemory, Turns

_NOTHING = memoryview(b"")
_buffer = bytearray(LARGEST_TURN)  # empty between two turns
_view = memoryview(_buffer)

MOST_FRAMES = 256
"""Frames in a turn, however short they are: about as much work as moving a megabyte."""

DEAR_BYTES = 64 << 10
"""A turn of so many frames that takes less than this off the wire is dear."""

_PEEKED_BYTES = 4096


def get_ready() -> None:
    """Load what the first WebSocket client would otherwise have the event loop load, which may take a tenth of a second
    on a busy machine."""
    mask_function()


class FramedPump:
    """Moves payload from `source` to `sink`, both non-blocking.

    `reader` is where the frames of the source are, None if it speaks plainly; `frames_out` is whether the sink wants
    frames. `other` is the pump in the other direction, and `is_dear` whether the last turn had as many frames as there
    may be in one, and short ones. For the rest see `Pump`; what it counts is payload.
    """

    __slots__ = (
        "_control",
        "_ends",
        "_moved_at_ping",
        "_owed",
        "_rest",
        "_turns",
        "_unread",
        "_unread_at",
        "discards",
        "due",
        "frames_out",
        "is_dear",
        "moved",
        "other",
        "reader",
        "sink",
        "source",
        "splices",
        "waits",
    )

    def __init__(
        self, source: socket.socket, sink: socket.socket, turns: Turns, reader: FrameReader | None, *, frames_out: bool
    ) -> None:
        self.source = source
        self.sink = sink
        self.reader = reader
        self.frames_out = frames_out
        self.other: FramedPump | None = None
        self.waits = INPUT
        self.moved = 0
        self.discards = False
        self.is_dear = False
        self.splices = False
        self.due = 0
        self._turns = turns
        self._rest = _NOTHING  # what the sink has not taken, as it goes over the wire
        self._owed = 0  # payload in there that is not counted yet
        self._unread = b""  # what has come from the source, from `_unread_at` on, and is not looked at yet
        self._unread_at = 0
        self._control = b""  # what is to be said to the sink once there is no rest
        self._ends = False  # nothing more is to be passed on but the end
        self._moved_at_ping = 0

    @property
    def held(self) -> int:
        """Bytes that rest here, on either side."""
        return len(self._rest) + self.unread

    def turn(self, most: int) -> None:
        """As `Pump.turn`; `most` counts what comes off the wire."""
        self._move(most)

    def sip(self, most: int = COPY_BYTES) -> bool:
        """As `Pump.sip`."""
        self._move(most)
        return self.waits == TURN

    def _move(self, most: int) -> None:
        left = most
        try:
            while True:
                self._drain()
                if self._ends:
                    self._finish()
                    return
                if left <= 0:
                    self.waits = TURN
                    return
                asked = left
                got = self._take(asked)
                if not got:
                    self._end()
                    continue
                left = 0 if self._unread else left - got  # more frames than are for one turn
                if got < min(COPY_BYTES // 4, asked) and not self._unread and not self._rest and not self._ends:
                    self.waits = INPUT
                    return
        except BlockingIOError:
            self.waits = ROOM if self._rest else INPUT
        except NoMemory:
            self.waits = TURN
            raise
        except BrokenPipeError:
            self.begin_to_discard()

    def _take(self, most: int) -> int:
        """Take up to `most` bytes off the wire and pass their payload on; returns how many, 0 at the end of the stream.

        Raises BlockingIOError when there are none, or when something rests now; and NoMemory, with nothing passed on.
        """
        if reserve.kept is None:
            reserve.renew()
        if self._unread:
            buffer: bytes | bytearray = self._unread
            begin, end = self._unread_at, len(self._unread)
        else:
            if not self.moved and self.reader is None and self._has_ok():
                most = len(OK)
            buffer, begin, end = _buffer, 0, self.source.recv_into(_view, min(most, LARGEST_TURN))
            if not end:
                return 0
        if self.reader is None:
            if self.discards:
                self._throw_away(end)
            else:
                self._send([_view[:end]])
            return end
        try:
            taken = self.reader.read(buffer, begin, end, MOST_FRAMES)
        except MemoryError:
            if buffer is not self._unread:
                self._keep_unread(copy_of(_view[:end]))
            raise NoMemory from None
        self._leave_unread(buffer, taken, end)
        self._note_frames(taken, begin, end)
        self.is_dear = taken.consumed - begin < DEAR_BYTES and bool(self._unread)
        self._hear(taken)
        return max(1, taken.consumed - begin)

    def _throw_away(self, size: int) -> None:
        """As `Pump._throw_away`; payload."""

    def _note_frames(self, taken: Taken, begin: int, end: int) -> None:
        """That was in the bytes from `begin` to `end`: for a pump that counts what is no payload."""

    def _has_ok(self) -> bool:
        """Whether a source that speaks plainly begins with another relay's ``ok``: clients of a gateway get that as a
        message of its own."""
        return self.source.recv(len(OK), socket.MSG_PEEK) == OK

    def _leave_unread(self, buffer: bytes | bytearray, taken: Taken, end: int) -> None:
        """Keep what the reader has not looked at; what follows a Close or a fault is nothing."""
        if taken.consumed >= end or taken.closed is not None or taken.fault is not None:
            self._keep_unread(b"")
        elif buffer is self._unread:
            self._keep_unread(self._unread, taken.consumed)
        else:
            self._keep_unread(copy_of(_view[taken.consumed : end]))

    def _keep_unread(self, unread: bytes, begin: int = 0) -> None:
        """Keep `unread`, from `begin` on."""
        if 2 * begin > len(unread):
            try:
                unread, begin = unread[begin:], 0
            except MemoryError:
                pass  # then it is kept whole for a while longer
        self._turns.held += len(unread) - len(self._unread)
        self._unread, self._unread_at = unread, begin

    def _hear(self, taken: Taken) -> None:
        """Pass on what the source has said, and answer what it has said to the relay."""
        if taken.ping is not None and self.other is not None:
            self.other.say(frames.pong(taken.ping))
        over = taken.fault or taken.closed
        if over is not None:
            self._source_is_over(frames.close(over))
            self._begin_to_end()  # before there may be no room for what came with it
        if self.discards:
            self._throw_away(sum(map(len, taken.payload)))
        elif taken.payload:
            self._send(taken.payload)
        if over is not None:
            self._end()

    def _send(self, payload: Sequence[Payload]) -> None:
        """Write `payload`, as far as the sink takes it; raises BlockingIOError when something is left."""
        size = sum(map(len, payload))
        out = frames.messages(payload) if self.frames_out else list(payload)
        try:
            taken = self.sink.sendmsg(out)
        except BlockingIOError:
            taken = 0
        except BrokenPipeError:
            self._throw_away(size)
            raise
        wire = sum(map(len, out)) if self.frames_out else size
        if taken == wire:
            self._count(size)
            return
        if not self.frames_out:
            self._count(taken)
            size -= taken
        self._owed += size
        try:
            joined = b"".join(out)
        except MemoryError:
            reserve.give_up()
            joined = b"".join(out)
        self._keep(what_is_left(memoryview(joined), taken))
        raise BlockingIOError

    def _count(self, moved: int) -> None:
        self.moved += moved
        self._turns.moved += moved

    def _keep(self, rest: memoryview) -> None:
        self._turns.held += len(rest) - len(self._rest)
        self._rest = rest

    def _drain(self) -> None:
        """Write what rests, and what is to be said after it."""
        while self._rest or self._control:
            if not self._rest:
                self._keep(memoryview(self._control))
                self._control = b""
            try:
                taken = self.sink.send(self._rest)
            except ConnectionResetError:
                # The kernel knows of no end of stream before that, but there was one if it has said Close.
                if self.other is not None and self.other.has_ended:
                    raise BrokenPipeError from None
                raise
            self._keep(what_is_left(self._rest, taken))
            if not self.frames_out:
                self._count(taken)
                self._owed -= taken
        if self._owed:
            self._count(self._owed)
            self._owed = 0

    def say(self, control: bytes) -> None:
        """Say a control frame to the sink, before the next payload. Of several for which there is no room, the last
        one is said: that is enough for pings, and after a Close comes nothing."""
        if self.waits == OVER or self._ends:
            return
        self._control = control
        try:
            self._drain()
        except BlockingIOError:
            if self.waits == INPUT:
                self.waits = ROOM
        except OSError:
            pass  # reading from it tells

    def ping(self) -> bool:
        """Ping the sink, unless it was sent something since this was last asked; see `relay.clients.pings`."""
        if self.waits == OVER or self.discards or self.sink.fileno() < 0:
            return False
        if self.moved == self._moved_at_ping and not self._rest:
            with contextlib.suppress(OSError):  # no room: so it was sent enough; or it is gone, which reading tells
                self.sink.send(frames.ping())
        self._moved_at_ping = self.moved
        return True

    def _end(self) -> None:
        """The source has ended its stream: pass that on to the sink, behind what rests."""
        self._begin_to_end()
        self._drain()
        self._finish()

    def _begin_to_end(self) -> None:
        """Nothing more comes from the source."""
        if not self._ends:
            self._ends = True
            if self.reader is not None:
                self._source_is_over(b"")
            if self.frames_out and not self.discards:
                self._control = frames.close(Close(NORMAL))

    def _finish(self) -> None:
        self.waits = OVER
        if not self.frames_out:
            with contextlib.suppress(OSError):  # the sink has gone; reading from it tells how
                self.sink.shutdown(socket.SHUT_WR)

    def take_leave(self) -> None:
        """Tell a sink that has not been told yet that this is the end, before both are closed, whatever has become of
        the source. In the middle of a message there is no saying so."""
        is_told = self._ends or self.discards or self.waits == OVER
        if self.frames_out and not is_told and not self._rest:
            with contextlib.suppress(OSError):  # it has gone, or takes nothing
                self.sink.send(frames.close(Close(NORMAL)))

    def _source_is_over(self, words: bytes) -> None:
        """The source, which speaks WebSocket, has said its last, and hears nothing any more but these `words`."""
        other = self.other
        if other is not None and not other.discards and other.waits != OVER:
            if words:
                other.say(words)
            other.discards = True

    @property
    def has_ended(self) -> bool:
        """As `Pump.has_ended`; what has come of its stream may rest here still."""
        return self._ends or self.waits == OVER

    def begin_to_discard(self) -> None:
        """See `Pump`: the sink has ended its own stream and then gone. What is unread is still to be looked at, or the
        reader would take what follows for something else."""
        self._throw_away(self._owed)
        self._drop_rest()
        self.discards = True
        self.waits = OVER if self._ends else TURN if self._unread else INPUT

    @property
    def untaken(self) -> int:
        """Bytes that the sink has not taken yet."""
        return len(self._rest)

    @property
    def unread(self) -> int:
        """Bytes that have come from the source and were not looked at yet: more frames than are for one turn."""
        return len(self._unread) - self._unread_at

    @property
    def taken(self) -> int:
        """As `Pump.taken`; payload."""
        return self.moved + self._owed

    def without_payload(self) -> int | None:
        """As `Pump.without_payload`."""
        peeked = self._unread[self._unread_at :][:_PEEKED_BYTES]
        if not peeked:
            try:
                peeked = self.source.recv(_PEEKED_BYTES, socket.MSG_PEEK)
            except BlockingIOError:
                return 1
        if self.reader is None:
            return None if peeked else 1
        ahead = FrameReader(self.reader.state).read(peeked, 0, len(peeked), _PEEKED_BYTES)
        return None if ahead.payload else max(1, len(peeked))

    def put_away(self) -> None:
        """Nothing is in a pipe here."""

    def pack(self, files: contextlib.ExitStack) -> tuple[PumpState, list[int]]:
        """As `Pump.pack`."""
        unread = self._unread[self._unread_at :]
        rest = bytes(self._rest) + self._control
        content = rest + unread
        fds = [file_of(content)] if len(content) > COPY_BYTES else []
        for fd in fds:
            files.callback(os.close, fd)
        state = PumpState(
            self.moved,
            len(content),
            self.waits == OVER,
            False,
            b"" if fds else content,
            len(fds),
            unread=len(unread),
            owed=self._owed,
            ends=self._ends,
            discards=self.discards,
        )
        return state, fds

    def unpack(self, state: PumpState, fds: Sequence[int]) -> None:
        """As `Pump.unpack`."""
        self.moved, self._owed, self._ends, self.discards = state.moved, state.owed, state.ends, state.discards
        content = state.rest
        if fds:
            with open(fds[0], "rb", buffering=0) as file:
                content = os.pread(file.fileno(), state.held, 0)
        begins = len(content) - state.unread
        self._keep_unread(content[begins:])
        if begins:
            self._keep(memoryview(content)[:begins])
        self.resume()
        if state.over:
            self.waits = OVER

    def resume(self) -> None:
        """As `Pump.resume`."""
        if self.waits != OVER:
            self.waits = ROOM if self._rest else TURN if self._unread else INPUT

    def abandon(self) -> None:
        """As `Pump.abandon`."""
        self._drop_rest()
        self._keep_unread(b"")
        self.other = None
        self.waits = OVER

    def _drop_rest(self) -> None:
        self._keep(_NOTHING)
        self._control = b""
        self._owed = 0

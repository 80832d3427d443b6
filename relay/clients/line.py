"""The handshake line of a WebSocket client, out of its messages; pure.

The line is the one of `relay.clients.handshake`. Frames and messages are only how a stream of bytes travels, so it may
be spread over as many of them as one likes. But there are clients that send it as one message and without its newline
(the Twisted relay takes the first message, whole, for the line); therefore the end of a message also ends a line that
is all in it. It does not end one that began in an earlier message: else whoever sends byte by byte could never say its
side, since ``please relay TOKEN`` is already a line.
"""

from __future__ import annotations

from relay.clients.frames import FrameReader, Taken
from relay.clients.handshake import LONGEST, Handshake, read_handshake

MOST_IDLE_FRAMES = 64
"""How many frames without payload a client may send at a time before its ``ok``. It has nothing to say but its line,
and a ping now and then; and a frame of six bytes costs more to read than to send."""


class Line:
    """What a client has said before its ``ok``.

    Args:
        received: what it had said to somebody else, as `received` was there.
        split: as `split` was there.

    Attributes:
        received: its payload so far, for `read_handshake`, with the newline that the end of a message stood for; as
            much of it as decides.
        split: the line began in a message that is over.
    """

    __slots__ = ("received", "split")

    def __init__(self, received: bytes = b"", *, split: bool = False) -> None:
        self.received = received
        self.split = split

    def hear(self, frames: FrameReader, sent: bytes) -> Taken:
        """Read everything that the client has sent since, and take in its payload; where more than `MOST_IDLE_FRAMES`
        carry none, no further.

        Returns what else there was, that is, the latest ping, and the Close or the fault after which nothing was read.
        What is in `received` then came before those. A client that waits for its ``ok`` says nothing: when `received`
        has grown beyond a whole line, `read_handshake` says what that is.
        """
        heard = Taken()
        at = idle = 0
        while at < len(sent) and heard.closed is None and heard.fault is None and idle <= MOST_IDLE_FRAMES:
            taken = frames.read(sent, at, len(sent), most=1)
            at = taken.consumed
            idle += not taken.payload
            for piece in taken.payload:
                self.received += piece[: LONGEST + 1 - len(self.received)]
            if taken.message_over:
                self._end_message()
            heard.ping = heard.ping if taken.ping is None else taken.ping
            heard.closed, heard.fault = taken.closed, taken.fault
        heard.consumed = at
        return heard

    def _end_message(self) -> None:
        if not self.split and isinstance(read_handshake(self.received + b"\n"), Handshake):
            self.received += b"\n"
        self.split = self.received != b""

"""A WebSocket client before it has a partner: the upgrade, its handshake in frames, and what it says while it waits."""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING

from relay.clients import frames
from relay.clients.claim import Claim, pack_claim, split_claim
from relay.clients.frames import NORMAL, Close, FrameReader, FrameState, Taken
from relay.clients.handshake import OK, Handshake, Refusal, read_handshake
from relay.clients.line import MOST_IDLE_FRAMES, Line
from relay.clients.speech import UNDECIDED, Either, Ending, Speaker, Speech
from relay.clients.websocket import LONGEST_HEAD, Answer, Outcome, RequestHead
from relay.process.dataclass import replace

if TYPE_CHECKING:
    from relay.clients.pings import Pings

READ_BYTES = 4096
"""What is read at a time before there is a partner: whoever says more than a handshake is turned away anyway."""

PING_BYTES = 6 + frames.CONTROL_BYTES
IDLE_BYTES = 64 << 10
IDLE_RATE = 1 << 10
"""Bytes that a client may say before it has a partner, at once and for each second since it came. It has nothing to say
but its line, and a ping now and then. Of that no account is kept: what comes in pieces no longer than a ping is too
little."""

_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_PACKED = struct.Struct("!?B")  # whether the line is split, length of the frames' state
_HEAD, _FRAMES = b"H", b"F"


class Web:
    """What has to be known of a WebSocket client.

    `due` belongs to the deadlines of `pings`, `sock` is None unless it is to be pinged. Until the upgrade, `head` is
    what has come of the request, if anything has, and `claim` what a trusted proxy has said of the client; afterwards
    `reader` is where its frames are, and `line` what its messages say.
    """

    __slots__ = ("_answer", "_interrupted", "claim", "due", "head", "line", "reader", "sock")

    def __init__(self) -> None:
        self.due = 0
        self.sock: socket.socket | None = None
        self.head: RequestHead | None = None
        self.claim: Claim | None = None
        self.reader: FrameReader | None = None
        self.line = Line()
        self._answer: Answer | None = None  # that waits until the claim is settled
        self._interrupted: Ending | None = None

    def hear(self, client: Speaker) -> Handshake | Ending | None:
        """See `Speech`. What the client has sent is in `client.received`, for whoever asks whether it has said
        anything."""
        if self._answer is not None:
            settled, self._answer = self._answer, None
            return self._give(client.sock, settled)
        try:
            chunk = client.sock.recv(READ_BYTES)
        except BlockingIOError:
            raise
        except OSError:
            chunk = b""
        if not chunk:
            return Ending("errory", self.refusal(Refusal.BAD_HANDSHAKE).words, gone=True)
        if self.reader is not None:
            if _says_too_much(client, len(chunk)):
                return self.refusal(Refusal.BAD_HANDSHAKE)
            return self._hear_frames(client.sock, chunk)
        if self.head is None:
            self.head = RequestHead(client.received)  # what a proxy has left, which looked for something else
        client.received = b"."  # it has said something
        answer = self.head.hear(chunk)
        if answer is None:
            return None
        self.head = None
        if self.claim is not None:
            client.claim, self.claim = replace(self.claim, forwarded_for=answer.forwarded_for), None
            self._answer = answer
            return None
        return self._give(client.sock, answer)

    def _give(self, sock: socket.socket, answer: Answer) -> Handshake | Ending | None:
        if answer.outcome is not Outcome.UPGRADED:
            return Ending(None if answer.outcome is Outcome.ANSWERED else "errory", answer.response)
        self.reader = FrameReader()
        self._say(sock, answer.response)
        return self._hear_frames(sock, answer.rest)

    def keeps(self, claim: Claim) -> bool:
        """See `Speech`: there may be X-Forwarded-For."""
        if claim.forwarded_for is not None:
            return False
        self.claim = claim
        return True

    def _hear_frames(self, sock: socket.socket, sent: bytes) -> Handshake | Ending | None:
        assert self.reader is not None
        heard = self.line.hear(self.reader, sent)
        self._answer_ping(sock, heard)
        verdict = read_handshake(self.line.received) if self.line.received else None
        if isinstance(verdict, Refusal):
            return self.refusal(verdict)
        over = self._over(heard)
        if over is None and heard.consumed < len(sent):  # more frames than anybody needs to say nothing
            over = self.refusal(Refusal.IMPATIENT if isinstance(verdict, Handshake) else Refusal.BAD_HANDSHAKE)
        if over is None or not isinstance(verdict, Handshake):
            return verdict if over is None else Ending("errory", over.words, gone=over.gone)
        self._interrupted = over  # it has said what it wants, and left or broken the protocol in the same breath
        return verdict

    def _answer_ping(self, sock: socket.socket, heard: Taken) -> None:
        if heard.ping is not None:
            self._say(sock, frames.pong(heard.ping))

    def _over(self, heard: Taken) -> Ending | None:
        """How the connection ends by what it has just said, if it does."""
        if heard.fault is not None:
            return Ending("errory", frames.close(heard.fault))
        if heard.closed is not None:
            return Ending("lonely", frames.close(heard.closed))
        return None

    def interruption(self, client: Speaker) -> Ending | None:
        """See `Speech`. Pings are answered, and pongs are nothing."""
        sock = client.sock
        assert self.reader is not None
        if self._interrupted is None:
            try:
                chunk = sock.recv(READ_BYTES)
            except BlockingIOError:
                return None
            except OSError:
                chunk = b""
            if not chunk:
                self._interrupted = Ending("lonely", gone=True)
                return self._interrupted
            taken = self.reader.read(chunk, 0, len(chunk), MOST_IDLE_FRAMES)
            self._answer_ping(sock, taken)
            self._interrupted = self.refusal(Refusal.IMPATIENT) if taken.payload else self._over(taken)
            is_much = taken.consumed < len(chunk) or _says_too_much(client, len(chunk))
            if is_much and self._interrupted is None:
                self._interrupted = self.refusal(Refusal.IMPATIENT)  # more frames than anybody needs to say nothing
        return self._interrupted

    def refusal(self, refusal: Refusal) -> Ending:
        """See `Speech`: one message, and a Close; before the upgrade, in terms of HTTP."""
        if self.reader is None:
            return Ending("errory", _TIMED_OUT if self.head else b"")
        words = frames.message(refusal.value) + frames.close(Close(NORMAL))
        return Ending("errory", words, impatient=refusal is Refusal.IMPATIENT)

    def lonely(self) -> Ending:
        """See `Speech`."""
        return Ending("lonely", frames.close(Close(NORMAL)))

    def ok(self) -> bytes:
        """See `Speech`."""
        return frames.message(OK)

    def be_pinged(self, pings: Pings, sock: socket.socket) -> None:
        """See `Speech`."""
        self.sock = sock
        pings.add(self, time.monotonic())

    def be_silent(self) -> None:
        """See `Speech`."""
        self.sock = None

    def pack(self) -> bytes:
        """See `Speech`."""
        if self.reader is None:
            return _HEAD + pack_claim(self.claim) + (b"" if self.head is None else self.head.received)
        state = self.reader.state.encode()
        return _FRAMES + _PACKED.pack(self.line.split, len(state)) + state + self.line.received

    def ping(self) -> bool:
        """Say something, if nothing was said for a while; False when this client is somebody else's now."""
        if self.sock is None or self.sock.fileno() < 0:
            return False
        self._say(self.sock, frames.ping())
        return True

    def _say(self, sock: socket.socket, words: bytes) -> None:
        """Send what is so little that it fits, or the client does not read, and is none."""
        try:
            sock.send(words)
        except OSError:
            pass


def _says_too_much(client: Speaker, size: int) -> bool:
    """Whether a client that has just said so many bytes has said more than anybody needs who waits."""
    if size <= PING_BYTES:
        return False
    client.discarded += size
    return client.discarded > IDLE_BYTES + IDLE_RATE * (time.monotonic() - client.arrived)


def either(claim: Claim | None = None) -> Speech:
    """The speech of whoever has not said a first byte yet, on a port for both."""
    return Either(Web, claim)


def unpack(packed: bytes) -> Speech:
    """The speech of a WebSocket client that another worker has handed on; raises ValueError when it is none."""
    kind, rest = packed[:1], packed[1:]
    if kind == UNDECIDED:
        return either(split_claim(rest)[0])
    web = Web()
    if kind == _HEAD:
        web.claim, head = split_claim(rest)
        if len(head) <= LONGEST_HEAD:
            web.head = RequestHead(head) if head else None
            return web
    if kind != _FRAMES or len(rest) < _PACKED.size:
        raise ValueError("a client of no kind")
    split, length = _PACKED.unpack_from(rest)
    begins = _PACKED.size + length
    web.reader = FrameReader(FrameState.decode(rest[_PACKED.size : begins]))
    web.line = Line(rest[begins:], split=split)
    return web

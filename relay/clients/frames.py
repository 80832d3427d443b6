"""WebSocket frames (RFC 6455, section 5), the server's side, pure: a client's bytes to payload and events, and back.

Theory of operation. Transfers are a stream of bytes, and where a client ends its frames and messages means nothing to
its partner. So `FrameReader` never keeps a frame: it goes over the bytes that were received, wherever they happen to
begin and end, and gives out the payload that is in them. What it has to remember between two calls is its `FrameState`,
at most 143 bytes whatever a frame says of its length: how much of a frame is still to come and under which mask,
whether a message is open, and what there is of a header, or of a control frame, that is not yet whole. A transfer moves
to another process by moving these, and the bytes that were not yet read.

Cost decides the rest. Payload comes out as new `bytes`, because that is what the C function makes that takes the mask
off; writing it back over the masked bytes cost a tenth more of the whole transfer. Data frames that are all there, of
which thousands may come at once, are read in one loop that calls nothing but C.

In the other direction `messages` puts headers between slices of payload, all for one sendmsg(2).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from relay.clients.masks import mask_function
from relay.process.dataclass import dataclass, field

Buffer = bytes | bytearray | memoryview
Payload = bytes | memoryview

MOST_FRAMES = 1024
"""Frames read in one call, unless told otherwise: at most a millisecond or two, however short or strange they are."""

MOST_PIECES = 512
"""Pieces of payload that come out of one call at the most. With as many headers one sendmsg(2) takes them (IOV_MAX is
1024), as long as no more than 8 MiB are read in one call."""

MESSAGE_BYTES = 32768
"""The longest message sent to a client: some clients' libraries end the connection at a longer one
(nhooyr.io/websocket, up to 1.8.7)."""

CONTROL_BYTES = 125
"""The longest payload of a control frame (RFC 6455, 5.5)."""

NORMAL = 1000
PROTOCOL_ERROR = 1002
UNSUPPORTED = 1003
INVALID_TEXT = 1007
"""Codes of a Close that this relay sends (RFC 6455, 7.4.1)."""

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_OPCODES = (_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG)
_FINAL = 0x80  # first byte of a header
_MASKED = 0x80  # second byte

_LONGEST_PART = 6 + CONTROL_BYTES
_LONGEST_FRAME = 2**63 - 1
_LONGEST_HEADER = 14
_short_head = struct.Struct("!BB4s").unpack_from  # both bytes and the mask of a frame of up to 125 bytes
_medium_head = struct.Struct("!H4s").unpack_from  # length and mask of one of up to 65535, after the two bytes
_long_head = struct.Struct("!Q4s").unpack_from  # and of a longer one
_STATE = struct.Struct("!?Q4s")

# The first byte of a data frame that may come now, by whether a message is open. The first of each leaves it at that.
_EXPECTED = (bytes((_FINAL | _BINARY, _BINARY)), bytes((_CONTINUATION, _FINAL | _CONTINUATION)))

_JOINED_BELOW = 1024
"""Bytes. Pieces that are shorter on the average are joined: it costs less than showing each of them to the kernel."""


@dataclass(frozen=True, slots=True)
class Close:
    """A Close frame. `code` is None for one without any (RFC 6455 calls that 1005)."""

    code: int | None
    reason: str = ""


@dataclass(slots=True)
class Taken:
    """What one call of `FrameReader.read` found.

    Attributes:
        consumed: where it stopped; what follows, up to the end that was given, is still to be read.
        payload: what is to be passed on, at most `MOST_PIECES` pieces, none of them empty.
        message_over: the data frame read last was the end of a message.
        ping: the payload of the latest ping, to be answered with `pong`. Earlier ones need no answer (RFC 6455, 5.5.3).
        closed: the client's Close. Nothing after it is read.
        fault: what to tell a client that broke the protocol, or sent text. Nothing after it is read, and nothing of
            that frame is in `payload`; what came before it is.
    """

    consumed: int = 0
    payload: list[bytes] = field(default_factory=list)
    message_over: bool = False
    ping: bytes | None = None
    closed: Close | None = None
    fault: Close | None = None


@dataclass(frozen=True, slots=True)
class FrameState:
    """All that a `FrameReader` remembers.

    Attributes:
        fragmented: a message is open: the next data frame has to be a continuation.
        left: bytes of a data frame still to come.
        mask: its mask, turned so that its first byte belongs to the next of them.
        part: what there is of a header, or of a control frame, that is not yet whole.
    """

    fragmented: bool = False
    left: int = 0
    mask: bytes = bytes(4)
    part: bytes = b""

    def encode(self) -> bytes:
        """At most 143 bytes."""
        return _STATE.pack(self.fragmented, self.left, self.mask) + self.part

    @classmethod
    def decode(cls, encoded: bytes) -> FrameState:
        """The state that was encoded; raises ValueError when it is none."""
        try:
            fragmented, left, mask = _STATE.unpack_from(encoded)
        except struct.error as error:
            raise ValueError(str(error)) from error
        part = encoded[_STATE.size :]
        if left > _LONGEST_FRAME or (left and part) or (len(part) > 1 and len(part) >= _needed(part[0], part[1])):
            raise ValueError("a state in which no reader can be")
        return cls(fragmented, left, mask, part)


class _Fault(Exception):
    """The client has broken the protocol. `code` and `reason` are what it is told."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.close = Close(code, reason)


class FrameReader:
    """Reads the frames of one client.

    Args:
        state: where another reader was.
    """

    __slots__ = ("_apply_mask", "_fragmented", "_left", "_mask", "_part")

    def __init__(self, state: FrameState | None = None) -> None:
        state = state or FrameState()
        self._apply_mask = mask_function()
        self._fragmented = state.fragmented
        self._left = state.left
        self._mask = state.mask
        self._part = state.part

    @property
    def state(self) -> FrameState:
        """Where this reader is."""
        return FrameState(self._fragmented, self._left, self._mask if self._left else bytes(4), self._part)

    def read(self, buffer: Buffer, begin: int, end: int, most: int = MOST_FRAMES) -> Taken:
        """Read `buffer` from `begin` to `end`, which go on where the last call stopped, but no more than `most` frames.

        Everything is consumed unless there are more frames than that, or one of them ends it all: then the caller gives
        the rest again, or throws it away. The buffer is only looked at, and is the caller's again afterwards.

        Raises MemoryError, and then it has read nothing.
        """
        before = self._fragmented, self._left, self._mask, self._part
        try:
            return self._read(buffer, begin, end, most)
        except MemoryError:
            self._fragmented, self._left, self._mask, self._part = before
            raise

    def _read(self, buffer: Buffer, begin: int, end: int, most: int) -> Taken:
        taken = Taken()
        at = begin
        try:
            if self._part or self._left:
                most -= 1
                if self._part:
                    at = self._finish_part(buffer, at, end, taken)
                if self._left:
                    at = self._payload(buffer, at, end, taken)
            while at < end and most > 0 and taken.closed is None:
                read, at = self._whole_frames(buffer, at, end, most, taken)
                most -= read
                if at < end and most > 0:
                    most -= 1
                    at = self._frame(buffer, at, end, taken)
        except _Fault as fault:
            taken.fault = fault.close
        pieces = taken.payload
        count = len(pieces)
        if count > MOST_PIECES or (count > 1 and at - begin < count * _JOINED_BELOW):
            taken.payload = [b"".join(pieces)]
        taken.consumed = at
        return taken

    def _whole_frames(self, buffer: Buffer, at: int, end: int, most: int, taken: Taken) -> tuple[int, int]:
        """Read data frames as long as one follows the other, all there, and without a change of state.

        Returns how many there were, and where they end.
        """
        expected = _EXPECTED[self._fragmented][0]
        view = memoryview(buffer)
        apply_mask = self._apply_mask
        add = taken.payload.append
        last = end - _LONGEST_HEADER
        left = most
        while left and at <= last:
            first, second, mask = _short_head(buffer, at)
            if first != expected:
                break
            if second < _MASKED + 126:
                begins = at + 6
                after = begins + second - _MASKED
                if after > end or after <= begins:  # not all there; empty, or not masked
                    break
                add(apply_mask(buffer[begins:after], mask))
            else:
                if second == _MASKED + 126:
                    length, mask = _medium_head(buffer, at + 2)
                    begins = at + 8
                    shortest = 126
                else:
                    length, mask = _long_head(buffer, at + 2)
                    begins = at + 14
                    shortest = 1 << 16
                after = begins + length
                if after > end or length < shortest:
                    break
                add(apply_mask(view[begins:after], mask))
            at = after
            left -= 1
        if left < most:
            taken.message_over = not self._fragmented
        return most - left, at

    def _frame(self, buffer: Buffer, at: int, end: int, taken: Taken) -> int:
        """Read one frame of any kind, as much of it as there is; returns where to go on."""
        there = end - at
        if there < 2:
            return self._keep_part(buffer, at, end)
        first, second = buffer[at], buffer[at + 1]
        if second < _MASKED or first not in _EXPECTED[self._fragmented]:
            _check(first, second, self._fragmented)
        size = _header_size(second)
        if there < _needed(first, second):
            return self._keep_part(buffer, at, end)
        length = second - _MASKED
        if length > CONTROL_BYTES:
            length = _long_length(buffer[at + 2 : at + size - 4])
        at += size
        self._mask = bytes(buffer[at - 4 : at])
        if first & _CLOSE:
            payload = self._apply_mask(buffer[at : at + length], self._mask)
            at += length
            if first == _FINAL | _CLOSE:
                taken.closed = _read_close(payload)
            elif first == _FINAL | _PING:
                taken.ping = payload
            return at
        self._fragmented = first < _FINAL
        self._left = length
        return self._payload(buffer, at, end, taken)

    def _payload(self, buffer: Buffer, at: int, end: int, taken: Taken) -> int:
        """Take what there is of a data frame's payload; returns where to go on."""
        after = min(at + self._left, end)
        if after > at:
            taken.payload.append(self._apply_mask(memoryview(buffer)[at:after], self._mask))
            self._left -= after - at
            turned = after - at & 3
            if turned:
                self._mask = self._mask[turned:] + self._mask[:turned]
        taken.message_over = not (self._left or self._fragmented)
        return after

    def _keep_part(self, buffer: Buffer, at: int, end: int) -> int:
        self._part = bytes(buffer[at:end])
        return end

    def _finish_part(self, buffer: Buffer, at: int, end: int, taken: Taken) -> int:
        """Read the frame of which a part came earlier; returns where to go on."""
        part, self._part = self._part, b""
        whole = part + buffer[at : min(end, at + _LONGEST_PART - len(part))]
        return at + self._frame(whole, 0, len(whole), taken) - len(part)


def _check(first: int, second: int, fragmented: bool) -> None:
    """Raise _Fault unless a frame may begin with these two bytes; `fragmented`: a message is open."""
    opcode = first & 0x0F
    if first & 0x70:
        raise _Fault(PROTOCOL_ERROR, "a reserved bit is set")
    if opcode not in _OPCODES:
        raise _Fault(PROTOCOL_ERROR, "unknown opcode")
    if second < _MASKED:
        raise _Fault(PROTOCOL_ERROR, "a frame without a mask")
    if opcode & _CLOSE:
        if first < _FINAL:
            raise _Fault(PROTOCOL_ERROR, "a control frame in fragments")
        if second - _MASKED > CONTROL_BYTES:
            raise _Fault(PROTOCOL_ERROR, "a control frame of more than 125 bytes")
    elif opcode == _CONTINUATION and not fragmented:
        raise _Fault(PROTOCOL_ERROR, "nothing to continue")
    elif opcode != _CONTINUATION and fragmented:
        raise _Fault(PROTOCOL_ERROR, "a new message inside another")
    elif opcode == _TEXT:
        raise _Fault(UNSUPPORTED, "binary messages only")


def _header_size(second: int) -> int:
    """Bytes in a header, its mask included, that has this second byte."""
    return 6 if second < _MASKED + 126 else 8 if second == _MASKED + 126 else 14


def _needed(first: int, second: int) -> int:
    """Bytes without which a frame that begins with these two cannot be read: of a control frame, all."""
    return _header_size(second) + (second & 0x7F if first & _CLOSE else 0)


def _long_length(field: Buffer) -> int:
    """The length of a frame that says it in two or in eight bytes; raises _Fault."""
    length = int.from_bytes(field, "big")
    if length < (126 if len(field) == 2 else 1 << 16):
        raise _Fault(PROTOCOL_ERROR, "a length that is not in its shortest form")
    if length > _LONGEST_FRAME:
        raise _Fault(PROTOCOL_ERROR, "a length of 2**63 or more")
    return length


def _read_close(payload: bytes) -> Close:
    """What a Close frame says; raises _Fault."""
    if not payload:
        return Close(None)
    if len(payload) == 1:
        raise _Fault(PROTOCOL_ERROR, "a Close of one byte")
    code = int.from_bytes(payload[:2], "big")
    try:
        reason = payload[2:].decode()
    except UnicodeDecodeError:
        raise _Fault(INVALID_TEXT, "a reason that is not UTF-8") from None
    # RFC 6455, 7.4, and IANA's registry of close codes: 1004 to 1006 and 1015 are never sent.
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise _Fault(PROTOCOL_ERROR, "a Close with a code that must not be sent")
    return Close(code, reason)


def _header(length: int) -> bytes:
    """The header of a binary message of that many bytes, up to 65535."""
    if length <= CONTROL_BYTES:
        return bytes((_FINAL | _BINARY, length))
    return bytes((_FINAL | _BINARY, 126, length >> 8, length & 0xFF))


_FULL = _header(MESSAGE_BYTES)


def message(payload: bytes) -> bytes:
    """One binary message of up to `MESSAGE_BYTES`, whole."""
    return _header(len(payload)) + payload


def messages(payload: Iterable[Payload]) -> list[Payload]:
    """Binary messages of up to `MESSAGE_BYTES` that carry these pieces of payload, for one sendmsg(2).

    Headers and slices of the pieces, in turn; nothing is copied. Pieces that fit share a message. A megabyte becomes
    fewer than 100 buffers more than its pieces.
    """
    out: list[Payload] = []
    header_at = 0
    size = MESSAGE_BYTES  # of the message whose header is still to be written at `header_at`; none is
    for piece in payload:
        length = len(piece)
        if not length:
            continue
        if size + length > MESSAGE_BYTES:
            if out:
                out[header_at] = _header(size)
            if length > MESSAGE_BYTES:
                piece = memoryview(piece)
                while length > MESSAGE_BYTES:
                    out += (_FULL, piece[:MESSAGE_BYTES])
                    piece = piece[MESSAGE_BYTES:]
                    length -= MESSAGE_BYTES
            header_at = len(out)
            out.append(_FULL)
            size = 0
        out.append(piece)
        size += length
    if out:
        out[header_at] = _header(size)
    return out


def ping(payload: bytes = b"") -> bytes:
    """A ping with up to 125 bytes."""
    return bytes((_FINAL | _PING, len(payload))) + payload


def pong(payload: bytes) -> bytes:
    """The answer to a ping that said `payload`."""
    return bytes((_FINAL | _PONG, len(payload))) + payload


def close(told: Close) -> bytes:
    """A Close frame. The answer to a client's own is the same again (RFC 6455, 5.5.1)."""
    payload = b"" if told.code is None else told.code.to_bytes(2, "big") + told.reason.encode()
    return bytes((_FINAL | _CLOSE, len(payload))) + payload

"""WebSocket frames as a client sends them, good or not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from websockets.frames import Opcode
from websockets.speedups import apply_mask

CONT, TEXT, BINARY = Opcode.CONT, Opcode.TEXT, Opcode.BINARY
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG


@dataclass(frozen=True)
class Sent:
    """A frame as a client may send it, good or not. `form` is how its length is said: in 7, 16 or 64 bits."""

    opcode: int
    payload: bytes = b""
    final: bool = True
    reserved: int = 0
    mask: bytes | None = b"\x12\x34\x56\x78"
    form: int = 0

    @property
    def shortest(self) -> int:
        """The form in which the length has to be said."""
        length = len(self.payload)
        return 7 if length < 126 else 16 if length < 1 << 16 else 64

    @property
    def wire(self) -> bytes:
        """Its bytes, by RFC 6455, 5.2."""
        form = max(self.form, self.shortest)
        length = len(self.payload)
        masked = 0 if self.mask is None else 0x80
        head = bytes((self.final << 7 | self.reserved << 4 | self.opcode,))
        if form == 7:
            head += bytes((masked | length,))
        elif form == 16:
            head += bytes((masked | 126,)) + length.to_bytes(2, "big")
        else:
            head += bytes((masked | 127,)) + length.to_bytes(8, "big")
        return head + (self.payload if self.mask is None else self.mask + apply_mask(self.payload, self.mask))


def wire(sent: Iterable[Sent]) -> bytes:
    return b"".join(frame.wire for frame in sent)


def split(stream: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """The stream, cut at these places of it, which may lie beyond its end."""
    cuts = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    for begin, end in itertools.pairwise(cuts):
        yield stream[begin:end]

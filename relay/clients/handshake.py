"""The handshake, as a pure function of the bytes a client has sent so far.

A client's first and only words before the relay's ``ok`` are one line, in one of two forms::

    please relay TOKEN\\n
    please relay TOKEN for side SIDE\\n

TOKEN is 64 hexadecimal digits, SIDE is 16. (Source: the transit protocol of magic-wormhole,
``docs/transit.md`` of magic-wormhole-protocols, and what its clients send.)

No socket, no clock and no state lives here: whoever reads the bytes keeps them and asks again when there are more.
"""

from __future__ import annotations

import enum
import re

from relay.process.dataclass import dataclass

OK = b"ok\n"
"""What both sides read when they have met."""

TOKEN_DIGITS = 64
SIDE_DIGITS = 16

_LINE = re.compile(rb"please relay ([0-9a-fA-F]{64})(?: for side ([0-9a-fA-F]{16}))?\n")

# One whole handshake of each form. What a client has sent so far can still become a handshake exactly when filling it
# up with the rest of one of these makes it one.
_MODELS = (
    b"please relay " + b"0" * TOKEN_DIGITS + b"\n",
    b"please relay " + b"0" * TOKEN_DIGITS + b" for side " + b"0" * SIDE_DIGITS + b"\n",
)

LONGEST = max(len(model) for model in _MODELS)
"""Bytes in the longest handshake, its newline included."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """A whole, well-formed handshake.

    `token` is the 64 digits as they were sent (two clients match only when theirs are equal to the letter), `side` the
    16 digits, or None from a client that gave none.
    """

    token: bytes
    side: bytes | None


class Refusal(enum.Enum):
    """Why the relay turns a client away; the value is what the client reads."""

    BAD_HANDSHAKE = b"bad handshake\n"
    IMPATIENT = b"impatient\n"


def read_handshake(received: bytes) -> Handshake | Refusal | None:
    """Judge `received`, everything that a client has sent since it connected.

    Returns the `Handshake` when it is whole and nothing follows it; a `Refusal` when the bytes can no longer become
    one, at the first byte that makes it so, or when something follows the line (a client has to wait for ``ok``); and
    None while more bytes are needed.
    """
    line = _LINE.match(received)
    if line is not None:
        if line.end() < len(received):
            return Refusal.IMPATIENT
        return Handshake(line[1], line[2])
    for model in _MODELS:
        if len(received) < len(model) and _LINE.fullmatch(received + model[len(received) :]):
            return None
    return Refusal.BAD_HANDSHAKE

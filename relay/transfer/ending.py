"""How a pair ends: what its two pumps are about, and what the kernel knows of its sides.

A pair is over

- when both sides have ended their streams and all they sent was delivered;
- or when one has, and the other has acknowledged it all and then sends nothing for `HALF_CLOSED_SECONDS`;
- or when one has ended its stream and then gone altogether, as soon as the other has acknowledged all it sent, or has
  acknowledged nothing of it for `DEAD_SECONDS`, whatever it says meanwhile;
- at once when either side is reset before that, or turns out to be dead.

What is on its way then is what `arrears` see to.

A side that does not read stops its partner, and nothing else: that may last as long as it likes, as long as its host
still answers and its partner is there.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import socket
import struct
import sys
import termios
from typing import TYPE_CHECKING, TypeAlias

from relay.transfer.pump import INPUT, OVER, ROOM, Pump

if TYPE_CHECKING:
    from relay.transfer.framed import FramedPump

Pumps: TypeAlias = "tuple[Pump | FramedPump, Pump | FramedPump]"
"""Of a pair: from its first side to its second, and back."""

Standing: TypeAlias = tuple[int, int, float]
"""See `standing`."""

HALF_CLOSED_SECONDS = 10.0
"""How long the second side may say nothing once it has all of the first one's stream."""

GONE_CHECK_SECONDS = 1.0
"""How soon a pair of which one side has ended its stream and gone looks whether the other has acknowledged it all; and
then again, ever more seldom while nothing changes."""

DEAD_SECONDS = 300.0
"""A side that has not acknowledged anything for so long while it was owed bytes is gone. A living one that does not
read answers the kernel's zero-window probes, at least every two minutes (TCP_RTO_MAX). When its partner has gone that
is not enough: then it has to take something."""

DEAD_CHECKS = 15
"""How often, in that time, a pair of which a side is owed bytes looks whether that side is dead: keepalive does not,
being silent while anything is unacknowledged, and TCP itself tries for a quarter of an hour (tcp_retries2)."""

_NOTHING = bytes(4)  # an int of the kernel's
_TCP_CLOSE = 7  # tcpi_state, in include/net/tcp_states.h
_TCP_INFO_LAST_ACK_RECV = 56  # offset of tcpi_last_ack_recv, milliseconds, in struct tcp_info of linux/tcp.h


def patience(pumps: Pumps, stood: float) -> float | None:
    """In how many seconds to look again, when nothing happens until then; None if the kernel tells by itself.

    Where what is looked for may come at any moment, or never, since somebody does not read, it is the later the longer
    the pair has `stood` there already: thousands of pairs that stand still cost next to nothing, however they do it.
    """
    there, back = pumps
    if OVER in (there.waits, back.waits) or there.discards or back.discards:
        if is_one_gone(pumps):
            soon = GONE_CHECK_SECONDS
        else:
            soon = HALF_CLOSED_SECONDS / 4 if is_half_closed(pumps) and owes(pumps) else HALF_CLOSED_SECONDS
        return max(soon, min(stood / 2, 2 * until_dead_check()))
    if any(pump.waits == ROOM or unacknowledged(pump.sink) for pump in pumps):
        return until_dead_check()
    return None  # keepalive finds out


def standing(pumps: Pumps) -> Standing | None:
    """Where a pair stands of which one side has ended its stream or gone: what was moved, what is on its way if that
    counts, and for how many seconds both may stay as they are. Nothing that is thrown away changes them. None for any
    other pair, as nearly all are."""
    there, back = pumps
    if there.waits != OVER and back.waits != OVER and not (there.discards or back.discards):
        return None
    moved = there.moved + back.moved
    if is_half_closed(pumps) and not owes(pumps):
        return moved, 0, HALF_CLOSED_SECONDS  # it is the other's to say something
    on_its_way = sum(pump.untaken + unacknowledged(pump.sink) for pump in pumps)
    has_one_gone = any(pump.discards or (pump.waits == OVER and has_gone(pump.source)) for pump in pumps)
    return moved, on_its_way, DEAD_SECONDS if has_one_gone else math.inf


def until_dead_check() -> float:
    """In how many seconds to look whether a side that is owed bytes is dead."""
    return DEAD_SECONDS / DEAD_CHECKS


def is_over(pumps: Pumps) -> bool:
    """Whether nothing can be delivered any more, in either direction."""
    there, back = pumps
    if there.waits == OVER or back.waits == OVER:
        return there.waits == back.waits or (is_one_gone(pumps) and not owes(pumps))
    return False


def is_one_gone(pumps: Pumps) -> bool:
    """Whether one side hears nothing any more, so that the other's end of stream need not be waited for: unless it
    was sent a Close, since it answers that, and takes it amiss when nobody is there to hear it."""
    return any(pump.discards and not pump.untaken for pump in pumps) and not any(
        pump.waits == OVER and pump.frames_out for pump in pumps
    )


def is_half_closed(pumps: Pumps) -> bool:
    """Whether one stream is over, and of the other everything that came was delivered, or is for nobody."""
    there, back = pumps
    if (there.waits == OVER) == (back.waits == OVER):
        return False
    other = back if there.waits == OVER else there
    return other.waits == INPUT or (other.discards and not other.untaken)


def owes(pumps: Pumps) -> bool:
    """Whether the end of a stream that is over, or something before it, is still on its way."""
    return any(pump.waits == OVER and unacknowledged(pump.sink) for pump in pumps)


def look_for_the_dead(pumps: Pumps) -> None:
    """Find out about a side that is not watched for input, or whose host has gone while it was owed bytes.

    Raises OSError when there is one.
    """
    for pump in pumps:
        if pump.waits == ROOM and not pump.has_ended:
            raise_error_of(pump.source)
        if unacknowledged(pump.sink) and _silence(pump.sink) > DEAD_SECONDS:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


def raise_error_of(sock: socket.socket) -> None:
    """Raise the OSError that `sock` has come to, if it has."""
    try:
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except OSError:
        return  # where it is refused, reading or writing tells
    if error not in (0, errno.EPIPE):  # EPIPE: it had ended its stream before, and that is still delivered
        raise OSError(error, os.strerror(error))


def has_gone(sock: socket.socket) -> bool:
    """Whether the peer of `sock`, which has ended its stream, has gone altogether, as far as the kernel knows: by a
    reset, or by what keepalive has come to. Source: tcp(7), TCP_INFO."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
    except OSError:
        return False


def _silence(sock: socket.socket) -> float:
    """Seconds since the peer of `sock` last acknowledged anything, a keepalive probe too; 0 where the kernel does not
    tell. Source: tcp(7), TCP_INFO."""
    try:
        tcp_info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_LAST_ACK_RECV + 4)
    except OSError:
        return 0.0
    (milliseconds,) = struct.unpack_from("=I", tcp_info, _TCP_INFO_LAST_ACK_RECV)
    return float(milliseconds) / 1000


def unacknowledged(sock: socket.socket) -> int:
    """Bytes that were written to `sock` and have not arrived and still may, an end of stream being one; 0 where the
    kernel does not tell. Source: tcp(7), SIOCOUTQ."""
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, _NOTHING)
    except (OSError, ValueError):  # refused, or closed
        return 0
    if answer == _NOTHING or has_gone(sock):  # the kernel tells of a reset one what it had before
        return 0
    return int.from_bytes(answer, sys.byteorder)

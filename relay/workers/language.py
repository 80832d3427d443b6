"""What workers say to each other: messages to bytes and back, pure.

A link begins with one JSON object from each end, `Hello` from the worker that connects and `Welcome` from the other.
These two never change, so that workers of any two versions can find out whether they understand each other, and so
that even those that do not can pass the listening socket on, which comes last beside the `Welcome`. Everything else is
of the language `LANGUAGE`: the files of `homes`, which come before the listening socket, and one message a packet:

=========  ===========================================================================================
``R``      ready: I accept connections and can be home to tokens
``L``      leaving: send me nothing more, I am handing on what I have
``F``      farewell, the answer to ``L``: nothing more will come from me
``.``      still here: my transfers want so many equal parts of --relay-rate, such is my load, I have room for so
           many connections of yours, and places for so many newcomers; to be exact, so many sixteenths of a part;
           and I may have so many connections more, and so many who wait, or have too many
``D``      your turn at the door, which so many had no room to take (see `door`)
``M``      matched: two sides for that token, here, while somebody else was home to it, too
``H``      clients that have no partner yet, their sockets beside the packet
``P``      a pair in mid-transfer, its sockets, and what rests in it, beside the packet
``C``      confirmed: what came with that serial number is mine now
``N``      no: I could not take what came with that serial number, it remains yours
=========  ===========================================================================================

Sockets travel as SCM_RIGHTS (unix(7)); only their number is known here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from relay.process.dataclass import asdict, dataclass, field
from relay.transfer.pace import PARTS
from relay.transfer.state import PairState, Past, PumpState

LANGUAGE = 6
"""Raised whenever a message of before would be misunderstood."""

READY = b"R"
LEAVING = b"L"
FAREWELL = b"F"
STILL_HERE = b"."
TURN_AT_THE_DOOR = b"D"
MATCHED = b"M"
HANDED_CLIENTS = b"H"
HANDED_PAIR = b"P"
CONFIRMED = b"C"
REFUSED = b"N"

CLIENT_BYTES = 128 << 10
"""At most so much of what clients have sent travels in one packet, but for that of the last."""

CLIENTS_PER_PACKET = 64
"""At most this many clients travel in one packet; the kernel takes up to 253 sockets (SCM_MAX_FD)."""

LARGEST_PACKET = 192 << 10
"""Bytes; the two remainders of a pair that copies, and some more. The kernel's default send buffer takes it."""

_ENVELOPE = struct.Struct("!cQd")  # kind, serial number, when it was sent
OFFERS_CLAIM = 1 << 63
"""In a serial number: the last file descriptor beside this parcel is a claim (see `claim`)."""
_ANSWER = struct.Struct("!cQ")  # kind, serial number
_CLIENT = struct.Struct("!dddBBBBBHB")
"""Started, arrived, asked, hops, recorded; lengths of source, token, side, speech, what it has sent."""
_IS_GIVEN = 1 << 7
"""In the hops: it waits where it is handed because the sender has too many, or leaves, and not by what it asks for."""
_MOST_HOPS = _IS_GIVEN - 1
_STILL_HERE = struct.Struct("!cIfII")  # kind, equal parts, load, room, places
_PARTS = struct.Struct("!I")
"""Behind that: the same in `PARTS` of them, which workers of before neither say nor read."""
_READS_PAST = b"\1"
"""Behind that, from whoever reads a `_PAST`."""
_MAKES_CLAIMS = b"\1"
"""Behind that, from whoever makes the claims that go with parcels."""
_SPARE = struct.Struct("!ii")
"""Behind that, from whoever gives away what it has too many of: how many connections, and how many who wait, it has
less than it may have."""
_TURN = struct.Struct("!cI")  # kind, how many had no room
_PAIR = struct.Struct("!dddBBBB")
"""Started, arrived, waiting time; lengths of where the frames of each side are, and of the source of each."""
_PUMP = struct.Struct("!QI??IBII??")
"""Moved, held, over, splices, length of what rests in it, file descriptors beside it; unread, owed, ends, discards."""
_PAST = struct.Struct("!qdqq")
"""At the end of a pair, for whoever reads it: how much had moved, idle since when, wasted, framing."""


class Misunderstood(Exception):
    """A packet that no worker of this language would send."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """A `Hello` or a `Welcome`: who speaks. `leaving` is whether it is about to end, `terms` are those of `terms`."""

    name: str
    pid: int
    version: str
    language: int = LANGUAGE
    leaving: bool = False
    terms: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """As one packet."""
        return json.dumps({"relay-gevent": asdict(self)}).encode()

    @classmethod
    def decode(cls, packet: bytes) -> Greeting:
        """Read a greeting of any version: what is unknown is passed over, what is missing raises Misunderstood."""
        try:
            said = json.loads(packet)["relay-gevent"]
            return cls(
                name=str(said["name"]),
                pid=int(said["pid"]),
                version=str(said["version"]),
                language=int(said["language"]),
                leaving=bool(said.get("leaving", False)),
                terms={str(name): str(value) for name, value in said.get("terms", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Misunderstood(f"not a greeting: {packet[:40]!r}") from error


class ClientState(Protocol):
    """A client without a partner, but for its socket. Before its handshake is whole, `token` is empty and `received`
    holds what it has sent. `started` is in seconds since the epoch, `arrived` and `asked` (when its handshake was
    whole) in seconds of CLOCK_MONOTONIC, which all processes of a machine share; `hops` counts how often it was handed
    on, and `is_given` is whether the worker that does so has chosen where to, and not the client by its token; `source`
    is whom it counts for, and `recorded` a `relay.clients.client.Recorded`."""

    started: float
    arrived: float
    asked: float
    token: bytes
    side: bytes | None
    received: bytes
    hops: int
    is_given: bool
    source: bytes | None

    @property
    def recorded(self) -> int:
        """Whether it leaves a record."""

    @property
    def packed_speech(self) -> bytes:
        """How it speaks, as `relay.clients.speech` packs it; empty for plain TCP."""


@dataclass(slots=True)
class HandedClient:
    """A `ClientState` as it comes out of a packet."""

    started: float
    arrived: float
    asked: float
    token: bytes
    side: bytes | None
    received: bytes
    hops: int
    source: bytes | None = None
    recorded: int = 0
    packed_speech: bytes = b""
    is_given: bool = False


@dataclass(slots=True)  # not frozen: there are thousands a second, and freezing makes each three times as dear
class Envelope:
    """What is on every parcel: its serial number, and when it was sent, in seconds of CLOCK_MONOTONIC."""

    serial: int
    sent: float

    @property
    def offers_claim(self) -> bool:
        """Whether a claim goes with it."""
        return bool(self.serial & OFFERS_CLAIM)


def kind_of(packet: bytes) -> bytes:
    """The first byte of a packet, which tells what it is; empty for an empty packet."""
    return packet[:1]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a worker is: how many sixteenths of an equal part of --relay-rate its transfers want, its load (see `load`),
    for how many more connections that siblings hand on it has room, and for how many newcomers it has places; whether
    it reads the `Past` of a pair, and makes the claims that go with parcels, as workers of before do not; and how many
    connections, and how many who wait, it may have more, negative if it has too many (see `surplus`), None of a worker
    of before."""

    parts: int
    load: float
    room: int
    places: int
    reads_past: bool = True
    makes_claims: bool = True
    spare: tuple[int, int] | None = None


def encode_still_here(standing: Standing) -> bytes:
    """A ``.`` from a worker that is like this."""
    whole = -(-standing.parts // PARTS)
    common = _STILL_HERE.pack(STILL_HERE, whole, standing.load, standing.room, standing.places)
    more = (_READS_PAST if standing.reads_past else b"") + (_MAKES_CLAIMS if standing.makes_claims else b"")
    spare = b"" if standing.spare is None else _SPARE.pack(*standing.spare)
    return common + _PARTS.pack(standing.parts) + more + spare


def decode_still_here(packet: bytes) -> Standing:
    """How the sender of a ``.`` is."""
    _, whole, load, room, places = _unpack(_STILL_HERE, packet, 0)
    parts = whole * PARTS
    if len(packet) > _STILL_HERE.size:
        (parts,) = _unpack(_PARTS, packet, _STILL_HERE.size)
    more_at = _STILL_HERE.size + _PARTS.size
    more = len(packet) - more_at
    spare = None
    if more >= 2 + _SPARE.size:
        spare = _unpack(_SPARE, packet, more_at + 2)
    return Standing(
        int(parts), float(load), int(room), int(places), reads_past=more > 0, makes_claims=more > 1, spare=spare
    )


def encode_turn(passed_by: int) -> bytes:
    """A ``D`` that `passed_by` workers had no room to take."""
    return _TURN.pack(TURN_AT_THE_DOOR, passed_by)


def decode_turn(packet: bytes) -> int:
    """How many workers had no room to take a ``D``."""
    return int(_unpack(_TURN, packet, 0)[1])


def encode_matched(token: bytes) -> bytes:
    """An ``M`` for `token`."""
    return MATCHED + token


def decode_matched(packet: bytes) -> bytes:
    """The token of an ``M``."""
    return packet[1:]


def encode_answer(kind: bytes, serial: int) -> bytes:
    """``C`` or ``N`` for what came with `serial`."""
    return _ANSWER.pack(kind, serial)


def decode_answer(packet: bytes) -> int:
    """The serial number in a ``C`` or ``N``."""
    return int(_unpack(_ANSWER, packet, 0)[1])


def decode_envelope(packet: bytes) -> Envelope:
    """The envelope of an ``H`` or ``P``; raises Misunderstood."""
    _, serial, sent = _unpack(_ENVELOPE, packet, 0)
    return Envelope(serial, sent)


def encode_clients(envelope: Envelope, clients: Sequence[ClientState]) -> bytes:
    """An ``H`` with up to `CLIENTS_PER_PACKET` clients; their sockets go beside it in the same order."""
    parts = [_ENVELOPE.pack(HANDED_CLIENTS, envelope.serial, envelope.sent)]
    for client in clients:
        things = (client.source or b"", client.token, client.side or b"", client.packed_speech, client.received)
        hops = min(client.hops + 1, _MOST_HOPS) | (_IS_GIVEN if client.is_given else 0)
        parts.append(
            _CLIENT.pack(client.started, client.arrived, client.asked, hops, client.recorded, *map(len, things))
        )
        parts += things
    return b"".join(parts)


def decode_clients(packet: bytes) -> list[HandedClient]:
    """The clients of an ``H``, with their latest hop counted; raises Misunderstood."""
    clients = []
    at = _ENVELOPE.size
    while at < len(packet):
        started, arrived, asked, hops, recorded, *sizes = _unpack(_CLIENT, packet, at)
        at += _CLIENT.size
        (source, token, side, speech, received), at = _split(packet, at, sizes)
        handed = HandedClient(started, arrived, asked, token, side or None, received, hops & _MOST_HOPS)
        handed.source, handed.recorded, handed.packed_speech = source or None, recorded, speech
        handed.is_given = bool(hops & _IS_GIVEN)
        clients.append(handed)
    return clients


def _split(packet: bytes, at: int, sizes: Sequence[int]) -> tuple[list[bytes], int]:
    """Things of these sizes, one after the other from `at`, and where they end; raises Misunderstood."""
    things = []
    for size in sizes:
        things.append(packet[at : at + size])
        at += size
    if at > len(packet):
        raise Misunderstood("a packet that is cut short")
    return things, at


def encode_pair(envelope: Envelope, pair: PairState, *, with_past: bool = True) -> bytes:
    """A ``P``, with the pair's `Past` if whoever gets it reads that. Beside it go the sockets of both sides, then what
    each pump holds, if that is much: inlet and outlet of a pipe, or a file."""
    things = (pair.first_frames, pair.second_frames, pair.first_source or b"", pair.second_source or b"")
    return b"".join(
        (
            _ENVELOPE.pack(HANDED_PAIR, envelope.serial, envelope.sent),
            _PAIR.pack(pair.started, pair.arrived, pair.waiting_time, *map(len, things)),
            *map(_encode_pump, (pair.there, pair.back)),
            *things,
            pair.there.rest,
            pair.back.rest,
            _encode_past(pair.past) if with_past else b"",
        )
    )


def _encode_past(past: Past) -> bytes:
    return _PAST.pack(past.moved, past.idle_since, past.wasted, past.framing)


def _encode_pump(pump: PumpState) -> bytes:
    return _PUMP.pack(
        pump.moved,
        pump.held,
        pump.over,
        pump.splices,
        len(pump.rest),
        pump.fds,
        pump.unread,
        pump.owed,
        pump.ends,
        pump.discards,
    )


def decode_pair(packet: bytes) -> PairState:
    """The pair of a ``P``; raises Misunderstood."""
    at = _ENVELOPE.size
    started, arrived, waiting_time, *sizes = _unpack(_PAIR, packet, at)
    at += _PAIR.size
    (first_frames, second_frames, *sources), rest_at = _split(packet, at + 2 * _PUMP.size, sizes)
    pumps = []
    for _ in range(2):
        moved, held, over, splices, length, fds, *of_frames = _unpack(_PUMP, packet, at)
        at += _PUMP.size
        rest = packet[rest_at : rest_at + length]
        rest_at += length
        if length != (0 if fds else held) or (fds and not held):
            raise Misunderstood("a pair that holds more, or less, than it brings")
        pumps.append(PumpState(moved, held, over, splices, rest, fds, *of_frames))
    past = Past()
    if rest_at + _PAST.size == len(packet):
        past = Past(*_unpack(_PAST, packet, rest_at))
    elif rest_at != len(packet):
        raise Misunderstood("a pair of the wrong length")
    first_source, second_source = (source or None for source in sources)
    there, back = pumps
    return PairState(
        started, arrived, waiting_time, there, back, first_frames, second_frames, first_source, second_source, past
    )


def _unpack(layout: struct.Struct, packet: bytes, at: int) -> tuple[Any, ...]:
    try:
        return layout.unpack_from(packet, at)
    except struct.error as error:
        raise Misunderstood(str(error)) from error

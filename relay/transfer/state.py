"""What a pair packs of itself to move to another process: pure values, and how they look in a packet the workers'
language decides.
"""

from __future__ import annotations

from relay.process.dataclass import dataclass

PIPE_FDS = 2
"""File descriptors of a pipe."""


@dataclass(frozen=True, slots=True)
class PumpState:
    """One direction of a pair. `held` bytes rest in it: in `rest`, or in what travels along as so many `fds`, a pipe
    (inlet and outlet) or a file in memory. Of a pump with frames the last `unread` of these are still to be read, and
    `owed` is payload in the others that is not counted yet; `ends` and `discards` are as there."""

    moved: int
    held: int
    over: bool
    splices: bool
    rest: bytes
    fds: int = 0
    unread: int = 0
    owed: int = 0
    ends: bool = False
    discards: bool = False


@dataclass(frozen=True, slots=True)
class Past:
    """What some bounds ask of a pair besides: how much it had `moved` when it became idle, as far as is known, and when
    that was (monotonic seconds; 0 if nobody has asked); what was `wasted`, and what was `framing`, as its allowance has
    it."""

    moved: int = 0
    idle_since: float = 0.0
    wasted: int = 0
    framing: int = 0


@dataclass(frozen=True, slots=True)
class PairState:
    """A pair in mid-transfer, but for its sockets and pipes; the times are those of `relay.transfer.pair.Pair`.

    `first_frames` and `second_frames` are where the frames of a side that speaks WebSocket are, a
    `relay.clients.frames.FrameState` as it encodes itself; empty for one that does not. `first_source`
    and `second_source` are whom the sides count for, None for nobody.
    """

    started: float
    arrived: float
    waiting_time: float
    there: PumpState
    back: PumpState
    first_frames: bytes = b""
    second_frames: bytes = b""
    first_source: bytes | None = None
    second_source: bytes | None = None
    past: Past = Past()

    @property
    def fds(self) -> int:
        """How many file descriptors travel beside it."""
        return 2 + self.there.fds + self.back.fds

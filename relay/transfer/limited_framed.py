"""A pump that reads and writes frames, and keeps to what the operator allows."""

from __future__ import annotations

from relay.clients.frames import Taken
from relay.transfer import framed
from relay.transfer.framed import FramedPump
from relay.transfer.limits import Allowance
from relay.transfer.pump import COPY_BYTES


def get_ready() -> None:
    """As `relay.transfer.framed.get_ready`, and this file with it."""
    framed.get_ready()


class LimitedFramedPump(FramedPump):
    """As `relay.transfer.limits.LimitedPump`."""

    __slots__ = ("allowance",)

    allowance: Allowance

    def turn(self, most: int) -> None:
        """As `LimitedPump.turn`."""
        self.allowance.turn(self, super().turn, most)

    def sip(self, most: int = COPY_BYTES) -> bool:
        """As `LimitedPump.sip`."""
        return self.allowance.sip(self, super().sip)

    def _throw_away(self, size: int) -> None:
        self.allowance.wasted += size

    def _note_frames(self, taken: Taken, begin: int, end: int) -> None:
        is_over = taken.closed is not None or taken.fault is not None
        wire = (end if is_over else taken.consumed) - begin
        self.allowance.framing += wire - sum(map(len, taken.payload))

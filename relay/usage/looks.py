"""When all of the -wal is looked at, and copied into the database.

Both take the longer the longer it is, and it becomes long while a reader keeps it from being copied.
"""

from __future__ import annotations

import time
from typing import Final

from relay.usage.write_ahead_log import WriteAheadLog

LOOK_SECONDS: Final = 1.0
"""So often is all of the -wal looked at, which bounds what is written behind a hole in it, and lost. And before it is
copied into the file, which waits where the looks would take more of the time than they may."""

LOOKS_MAY_TAKE: Final = 0.01
"""This part of the time at most, however long the -wal becomes while a reader keeps it from being copied: without that,
records become dearer by the square of how many there are meanwhile."""


class Looks:
    """What one worker spends on them; asked in transactions, so that nobody else writes meanwhile."""

    def __init__(self) -> None:
        self._look_at = 0.0  # when all of the -wal is to be looked at next
        self._may_look_at = 0.0  # and when, at the earliest
        self._looked = False  # this has been done in this transaction
        self._copied = 0  # frames that had been copied into the file when that was tried last

    def find_broken(self, log: WriteAheadLog) -> bool:
        """Tell whether the log is broken, at the beginning of a transaction: look at all of it now and then, and
        otherwise at its ends."""
        self._looked = time.monotonic() >= self._look_at
        return self._is_any_frame_broken(log) if self._looked else log.is_broken(every_frame=False, locked=True)

    def find_broken_before_copying(self, log: WriteAheadLog) -> bool:
        """Look at all of it, unless that has just been done."""
        return not self._looked and self._is_any_frame_broken(log)

    def may_copy(self) -> bool:
        """Tell whether the log may be looked at now, and be copied."""
        return self._looked or time.monotonic() >= self._may_look_at

    def note_some_stay(self, copied: int, seconds: float) -> None:
        """Note how many frames are in the file after SQLite was asked to copy all, and how long that took."""
        if copied == self._copied:  # it has sorted all that is in the log, and could do nothing with it
            self._put_off(seconds)
        self._copied = copied

    def _is_any_frame_broken(self, log: WriteAheadLog) -> bool:
        began = time.monotonic()
        is_broken = log.is_broken(every_frame=True, locked=True)
        self._put_off(time.monotonic() - began)
        self._look_at = max(began + LOOK_SECONDS, self._may_look_at)
        return is_broken

    def _put_off(self, seconds: float) -> None:
        self._may_look_at = max(self._may_look_at, time.monotonic()) + seconds / LOOKS_MAY_TAKE

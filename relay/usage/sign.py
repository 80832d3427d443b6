"""The sign that a worker gives while it holds records back: its name, as the kernel tells it (comm, in proc(5)).

misc/rolling-restart and ps(1) see it there, from the first attempt to write that has failed until all is written. So it
may be there for a moment only, when another program's lock lasts longer than one attempt waits: who sees it should look
again. It is neither on a disk, which may be what is full, nor in the relay's log, which with `--blur-usage` tells of
trouble later; and nobody keeps it.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Final

HOLDS_RECORDS_BACK: Final = "records-kept"

_COMM: Final = "/proc/self/comm"


class Sign:
    """What the writers of one process give together. Each says whether it holds records back; on any thread."""

    def __init__(self) -> None:
        self._holding: set[str] = set()
        self._usual = ""
        self._lock = threading.Lock()

    def give(self, name: str) -> None:
        """The destination `name` holds records back."""
        with self._lock:
            if not self._holding:
                with contextlib.suppress(OSError):  # no /proc here, or not to be written: then nobody sees it
                    with open(_COMM, encoding="utf-8", errors="surrogateescape") as file:
                        self._usual = file.read().rstrip("\n")
                    _call(HOLDS_RECORDS_BACK)
            self._holding.add(name)

    def take_back(self, name: str) -> None:
        """It does no more."""
        with self._lock:
            self._holding.discard(name)
            if not self._holding and self._usual:
                with contextlib.suppress(OSError):
                    _call(self._usual)
                self._usual = ""


def _call(name: str) -> None:
    with open(_COMM, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(name)

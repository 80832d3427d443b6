"""Which file the path of the usage database names, looked at once a second from the event loop.

A relay with nothing to do would find out only when it has to write, minutes later, that another file was put in the
place of its own; and whoever opens that one meanwhile finds the -wal of the former beside it. SQLite takes that for the
new file's, and makes it the former database again.
"""

from __future__ import annotations

import os
from collections.abc import Callable


class Whereabouts:
    """Compares it with the file that was there before.

    Args:
        path: as the operator gave it; it may be a symbolic link.
        look: what the kernel says of a path.
    """

    def __init__(self, path: str, look: Callable[[str], os.stat_result] = os.stat) -> None:
        self._path = os.path.abspath(path)
        self._look = look
        self._named = self._seen = self._now()

    def is_another(self) -> bool:
        """Tell, once for each of them, whether another file is there: one that is not just being written, as it is the
        same as when this was asked last. A file that is missing or empty is none."""
        before, self._seen = self._seen, self._now()
        if not self._seen or self._seen != before or self._seen[:2] == self._named[:2]:
            return False
        self._named = self._seen
        return True

    def _now(self) -> tuple[int, ...]:
        try:
            status = self._look(self._path)
        except OSError:
            return ()
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) if status.st_size else ()

"""The relay's own log, to stderr, by a thread of its own: whoever reads it may stand still (a stopped terminal, a pipe
that nobody empties) for as long as they like, and nothing else waits for that.

What is logged is starting, stopping and what goes wrong, so a few lines; those that find `MOST_LINES` before them are
lost, and counted.
"""

from __future__ import annotations

import os
import threading
import time
from queue import SimpleQueue
from typing import Final

from relay.process import log

MOST_LINES: Final = 1000
"""Lines that are kept while the log's reader stands still; further ones are lost."""

STDERR: Final = 2


class OwnLog:
    """Queues what is told, and writes it to a file descriptor.

    Args:
        fd: where to; errors of writing are nobody's business, since there is nowhere to tell them.
    """

    def __init__(self, fd: int = STDERR) -> None:
        self._fd = fd
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._lost = 0
        self._thread = threading.Thread(target=self._write, name="writer of the log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Queue `text`: a line, a traceback, or what others print; never waits."""
        if self._queue.qsize() >= MOST_LINES:
            self._lost += 1
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            self._put(log.line(f"{lost} lines are lost: nobody read them"))
        self._put(text)

    def _put(self, text: str) -> None:
        self._queue.put(text.encode(errors="backslashreplace"))

    def _write(self) -> None:
        while (line := self._queue.get()) is not None:
            self._write_line(memoryview(line))

    def _write_line(self, line: memoryview) -> None:
        try:
            while line:
                line = line[self._write_some(line) :]
        except OSError:
            pass  # no space, or no reader: a full disk under the log must not become the relay's trouble

    def _write_some(self, line: memoryview) -> int:
        try:
            return os.write(self._fd, line)
        except BlockingIOError:  # somebody else has made it non-blocking
            time.sleep(0.05)
            return 0

    def finish(self, timeout: float) -> None:
        """Write what is queued, for `timeout` seconds at most; nothing is written after it."""
        self._queue.put(None)
        self._thread.join(timeout)

"""A folder for what a program needs for a moment: `relay-usage` and `misc/import-twisted-usage`, and no worker.

It goes with the program, also when that is told to end or loses its terminal: what is in it may be more exact than what
--blur-usage lets be kept. Only a program that is killed (SIGKILL) leaves it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

from relay.mistakes import Mistake

_ENDS: Final = (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT)
"""What ends a program that does not say otherwise, and is no exception to Python, as SIGINT is."""


@contextlib.contextmanager
def temporary_folder(program: str) -> Iterator[str]:
    """Return a new folder that is removed when it is left.

    Raises:
        Mistake: there is nowhere to make one (no /tmp, or a full one).
    """
    with _signals_as_exits():
        try:
            folder = tempfile.TemporaryDirectory(prefix=f"{program}-")
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise Mistake(f"no folder for temporary files can be made ({reason}); name one in TMPDIR") from None
        with folder as path:
            yield path


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """Let signals that would end this process raise SystemExit once, so that what is under way is cleared up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's, which clears up when it ends
        return
    owner = os.getpid()
    ends = [number for number in _ENDS if signal.getsignal(number) is signal.SIG_DFL]  # nohup(1) wants one ignored

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that counts rows for this one
            os._exit(128 + number)
        for each in ends:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in ends:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_DFL)

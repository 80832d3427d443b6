"""The log: what is told of starting, stopping and what goes wrong, a line each; on any thread, and to standard error
unless it is sent elsewhere.

The standard library's `logging` would take 0.3 MB of each worker, and have threads wait for each other.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from relay.process.discreet import discreet


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)


_write: Callable[[str], object] = _to_stderr


def send_to(write: Callable[[str], object]) -> None:
    """From now on have `write` called with what is told: whole lines, with the ends of lines."""
    global _write
    _write = write


def tell(text: str, *values: object) -> None:
    """Tell a line; `values` go into `text` as `%` has it."""
    _write(line(text, *values))


def tell_mistake(text: str, *values: object) -> None:
    """Tell a line, and the exception that is being handled, with its traceback."""
    _write(line(text, *values) + discreet(traceback.format_exc()))


def tell_uncaught(
    context: object, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Tell of an exception that nobody has caught.

    In place of `gevent.hub.Hub.print_exception`, which also prints what the greenlet or the watcher was for, and so the
    addresses of sockets.
    """
    with contextlib.suppress(Exception):  # the event loop calls this, and goes on whatever comes of it
        lines = traceback.format_exception(kind, error, trace)
        _write(line("a mistake, and the relay goes on") + discreet("".join(lines)))


def line(text: str, *values: object) -> str:
    """Return `text` as a line of the log."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} relay-gevent[{os.getpid()}] {text % values if values else text}\n"

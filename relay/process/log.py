"""The log: what is told of starting, stopping and what goes wrong, a line each; on any thread, and to standard error
unless it is sent elsewhere.

The standard library's `logging` would take 0.3 MB of each worker, and have threads wait for each other.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable


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
    _write(line(text, *values) + traceback.format_exc())


def line(text: str, *values: object) -> str:
    """Return `text` as a line of the log."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} relay-gevent[{os.getpid()}] {text % values if values else text}\n"

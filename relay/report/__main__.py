"""`python -m relay.report` is `relay-usage`; both begin here."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run `relay-usage` with the arguments of this process.

    An interrupt (Ctrl-C) ends it with status 130 and without a word: by an exception only where there is something to
    put in order. One that comes while modules are imported, or when the interpreter ends, would be told as a traceback.
    """
    as_exception = signal.getsignal(signal.SIGINT)
    if as_exception is signal.default_int_handler:  # it may be ignored, as with `&` in a script
        signal.signal(signal.SIGINT, _leave)
    from relay.report.cli import main as run

    try:
        signal.signal(signal.SIGINT, as_exception)
        run()
    except KeyboardInterrupt:
        os._exit(130)
    finally:
        if as_exception is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    main()

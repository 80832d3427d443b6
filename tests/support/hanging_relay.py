"""`relay-gevent` that hangs once it is told to: `python -m tests.support.hanging_relay [options of relay-gevent]`.

`HANG` in the environment names a folder. A worker in whose process id somebody has made a file there does nothing any
more, and to the kernel it sleeps as any other.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

VARIABLE = "HANG"


def _hang_when_told() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    told = Path(os.environ[VARIABLE]) / str(os.getpid())
    while not told.exists():
        time.sleep(0.1)
    while True:
        ctypes.PyDLL(None).sleep(1000)  # and keeps the interpreter's lock


if __name__ == "__main__":
    from relay.process.signals import be_ready_for_signals

    be_ready_for_signals()
    threading.Thread(target=_hang_when_told, daemon=True).start()
    from relay.cli import main

    main()

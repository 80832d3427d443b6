"""For how long what somebody has taken shows that it goes on taking.

Who is owed something and takes no more than `LITTLE_BYTES` in `IDLE_SECONDS` is idle. But a receiver whose buffer is
full takes in lumps, however steadily its program reads: Linux opens a window that was closed only when a sixteenth of
the buffer is free (__tcp_select_window() in net/ipv4/tcp_output.c), as a rule some hundred kilobytes; and in between
nobody can tell it from one that has stopped. So what it has taken pays for the time that it may have for that much,
though for no more than `MOST_SECONDS` ahead.
"""

from __future__ import annotations

LITTLE_BYTES = 4 << 10
IDLE_SECONDS = 5.0
MOST_SECONDS = 60.0


def paid_until(before: float, taken: int, now: float) -> float:
    """From when on somebody is idle that has just taken so many bytes more and takes nothing else; `before` is what
    this was before. In monotonic seconds."""
    if taken <= LITTLE_BYTES:
        return before
    return min(now + MOST_SECONDS, max(now, before) + taken * IDLE_SECONDS / LITTLE_BYTES - IDLE_SECONDS)

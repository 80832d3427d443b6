"""Columns as other hands may have left them: SQLite takes anything into any column, and so may whoever writes to it.

What is no number counts as none, so that one odd row keeps nobody from reading the others. Pure.
"""

from __future__ import annotations

from typing import Final

MOST: Final = (1 << 63) - 1
"""What fits into a column."""


def whole(value: object) -> int:
    """Return the whole number that a column holds; 0 for whatever is none, and the nearest that fits for infinity."""
    if not isinstance(value, int | float) or value != value:
        return 0
    return int(min(max(value, -MOST), MOST))


def whole_or_none(value: object) -> int | None:
    """Return the same, but None for what is no number."""
    return whole(value) if isinstance(value, int | float) else None


def as_text(value: bytes) -> str:
    """Return the text of a column, whatever bytes somebody has put there as text: for sqlite3's `text_factory`."""
    return value.decode("utf-8", "replace")

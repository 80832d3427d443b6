"""`sqlite3`: of the standard library's the part that is in C, where it is to be had, which is all that is used here.

The rest turns dates and times into values and back; for that it imports `datetime`, and a worker has 0.3 MB more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["sqlite3"]

if TYPE_CHECKING:
    import sqlite3
else:
    try:
        import _sqlite3 as sqlite3
    except ImportError:
        import sqlite3

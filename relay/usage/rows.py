"""The rows of `usage`: in the order in which connections end, or, where times are blurred, in no order.

SQLite gives each row a number (rowid) and keeps the table by it. Numbers in order, together with the durations, which
stay exact, would tell when each connection ended, far better than blur means to: each ended after all before it. So a
blurred row gets a number at random, of all that there are. It is written somewhere in the table and not at its end,
which costs 12 microseconds of a processor, and a third more room: pages are divided, and two thirds full as a rule.

The program that imports a Twisted relay's records numbers its rows in the same way.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Final

from relay.usage.sqlite import sqlite3

Row = tuple[float, float, "float | None", int, str]
"""started, total_time, waiting_time, bytes, result."""

NUMBERS: Final = 1 << 63
"""How many numbers there are for rows: those from 0 on."""

_COLUMNS: Final = "started, total_time, waiting_time, bytes, result"

# One statement for many rows, where executemany takes one for each: the thread lets go of the interpreter once in each
# statement, and each time has to get it back from an event loop that is busy. Few sizes, so that all stay prepared;
# six values a row at the most, and SQLite before 3.32 takes 999.
_MOST_ROWS: Final = 128
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, _MOST_ROWS)
_INSERT: Final = {
    size: f"INSERT INTO usage ({_COLUMNS}) VALUES {', '.join(['(?, ?, ?, ?, ?)'] * size)}" for size in _SIZES
}
_INSERT_NUMBERED: Final = {
    size: f"INSERT INTO usage (rowid, {_COLUMNS}) VALUES {', '.join(['(?, ?, ?, ?, ?, ?)'] * size)}" for size in _SIZES
}


class RowsRefused(Exception):
    """The table has taken fewer rows than it was given."""


def draw_numbers(count: int) -> list[int]:
    """Return so many different numbers for rows, at random. That one of them is another row's is as good as impossible;
    the insert fails then."""
    numbers = [number % NUMBERS for number in struct.unpack(f"={count}Q", os.urandom(8 * count))]
    return numbers if len(set(numbers)) == count else draw_numbers(count)


def insert(connection: sqlite3.Connection, rows: Sequence[Row], *, in_order: bool) -> dict[int, Row]:
    """Add rows to `usage`; return them by their numbers.

    Raises:
        RowsRefused: something in the database (a trigger) keeps rows out.
        sqlite3.IntegrityError: a number that was drawn is taken.
    """
    if in_order:
        last = _insert_all(connection, _INSERT, rows)
        return dict(zip(range(last - len(rows) + 1, last + 1), rows, strict=True))
    # By their numbers: then not even the places of the rows in the file's pages tell an order of these.
    numbered = dict(sorted(zip(draw_numbers(len(rows)), rows, strict=True)))
    _insert_all(connection, _INSERT_NUMBERED, [(number, *row) for number, row in numbered.items()])
    return numbered


def _insert_all(connection: sqlite3.Connection, statements: dict[int, str], rows: Sequence[Sequence[object]]) -> int:
    """Return the number of the row that came last."""
    begin = last = 0
    while begin < len(rows):
        size = min(_MOST_ROWS, 1 << (len(rows) - begin).bit_length() - 1)
        cursor = connection.execute(statements[size], tuple(chain.from_iterable(rows[begin : begin + size])))
        if cursor.rowcount != size:
            raise RowsRefused
        last = cursor.lastrowid or 0
        begin += size
    return last


def are_there(connection: sqlite3.Connection, rows: dict[int, Row]) -> bool:
    """Tell whether the table has these rows, by these numbers; of a transaction it has all or none."""
    return all(
        connection.execute(f"SELECT {_COLUMNS} FROM usage WHERE rowid = ?", (number,)).fetchone() == row
        for number, row in rows.items()
    )

"""The one-row tables, kept at one row: what is added to them, and how they are put right when somebody has broken them.

An UPDATE of a table without its row does nothing and reports nothing, and a number that is null stays null whatever is
added. So each UPDATE here is asked how many rows it has met. What can be made again is made again, and the operator is
told: `all_time` from the rows of `usage`, `current` from the workers' shares; `since_reboot` begins anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from relay.usage.record import Current
from relay.usage.rows import Row
from relay.usage.schema import ONE_ROW_TABLES
from relay.usage.sqlite import sqlite3

# The numbers of each table; that of `refreshed` may be null.
_SUMS: Final = ("bytes", "connections", "mood_happy", "mood_lonely", "mood_errory")
_NUMBERS: Final = {
    "current": ("connected", "waiting", "partal_bytes"),
    "since_reboot": _SUMS,
    "all_time": _SUMS,
    "refreshed": (),
}
_FROM_ROWS: Final = {
    "bytes": "(SELECT coalesce(sum(bytes), 0) FROM usage)",
    "connections": "(SELECT count(*) FROM usage)",
    "mood_happy": "(SELECT count(*) FROM usage WHERE result = 'happy')",
    "mood_lonely": "(SELECT count(*) FROM usage WHERE result = 'lonely')",
    "mood_errory": "(SELECT count(*) FROM usage WHERE result = 'errory')",
}
_AGAIN: Final = {
    "current": "it is written anew, and nothing is lost",
    "since_reboot": "it counts from zero again",
    "all_time": "it is made anew from the rows of usage",
    "refreshed": "it is written anew, and nothing is lost",
}


def _all_numbers(table: str) -> str:
    return " AND ".join(f"typeof({name}) = 'integer'" for name in _NUMBERS[table]) or "1"


_ADD: Final = {
    table: f"UPDATE {table} SET {', '.join(f'{name} = {name} + ?' for name in _SUMS)} WHERE {_all_numbers(table)}"
    for table in ("since_reboot", "all_time")
}
_BEGIN_ANEW: Final = f"UPDATE since_reboot SET {', '.join(f'{name} = 0' for name in _SUMS)}"
_COUNT: Final = {
    table: f"SELECT count(*), coalesce(sum({_all_numbers(table)}), 0) FROM {table}" for table in ONE_ROW_TABLES
}


class NotOneRow(Exception):
    """One of the tables has no row, or several, or one without numbers: `put_right`."""


def add(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Add rows of `usage` to both sums.

    Raises:
        NotOneRow: undo everything, put the tables right, and try again.
    """
    moods = [row[4] for row in rows]
    sums = (
        sum(row[3] for row in rows),
        len(rows),
        moods.count("happy"),
        moods.count("lonely"),
        moods.count("errory"),
    )
    for statement in _ADD.values():
        _met_one(connection.execute(statement, sums))


def set_current(connection: sqlite3.Connection, current: Current) -> None:
    """Say what the relay holds; raises NotOneRow."""
    values = (current.connected, current.waiting, current.partal_bytes)
    _met_one(connection.execute("UPDATE current SET connected = ?, waiting = ?, partal_bytes = ?", values))


def set_refreshed(connection: sqlite3.Connection, at: int, *, latest: bool = False) -> None:
    """Note the time of a tick, or, with `latest`, that unless a later one is noted; raises NotOneRow."""
    value = "max(coalesce(at, 0), ?)" if latest else "?"
    _met_one(connection.execute(f"UPDATE refreshed SET at = {value}", (at,)))


def begin_anew(connection: sqlite3.Connection) -> None:
    """Let `since_reboot` count from zero."""
    connection.execute(_BEGIN_ANEW)


def connections(connection: sqlite3.Connection) -> int:
    """Return how many connections the file has seen, 0 when it does not say."""
    row = connection.execute("SELECT connections FROM all_time").fetchone()
    return row[0] if row is not None and isinstance(row[0], int) else 0


def _met_one(update: sqlite3.Cursor) -> None:
    if update.rowcount != 1:
        raise NotOneRow


def check(connection: sqlite3.Connection) -> None:
    """Look at all of them; raises NotOneRow."""
    for statement in _COUNT.values():
        if connection.execute(statement).fetchone() != (1, 1):
            raise NotOneRow


def put_right(connection: sqlite3.Connection) -> list[str]:
    """Give each table its one row, in the transaction that is open; return a line for each that had lost it."""
    lines = []
    is_new = connection.execute("SELECT 1 FROM usage LIMIT 1").fetchone() is None
    for table in ONE_ROW_TABLES:
        count, whole = connection.execute(_COUNT[table]).fetchone()
        if count == whole == 1:
            continue
        happened = _put_one_right(connection, table, count)
        if count or not is_new:  # and not a file that was only just made
            lines.append(f"its table {table} {happened}")
    return lines


def _put_one_right(connection: sqlite3.Connection, table: str, count: int) -> str:
    if count == 0:
        values = ", ".join(_FROM_ROWS.values()) if table == "all_time" else ONE_ROW_TABLES[table]
        connection.execute(f"INSERT INTO {table} SELECT {values}")
        return f"had been emptied; {_AGAIN[table]}"
    # All readers take the first row.
    first = f"(SELECT min(rowid) FROM {table})"
    connection.execute(f"DELETE FROM {table} WHERE rowid > {first}")
    bad = []
    for name in _NUMBERS[table]:
        made = _FROM_ROWS[name] if table == "all_time" else "0"
        update = connection.execute(f"UPDATE {table} SET {name} = {made} WHERE typeof({name}) != 'integer'")
        bad += [name] * update.rowcount
    if bad:
        return f"held no number in {', '.join(bad)}; {_AGAIN[table]}"
    return f"had {count} rows; the first is kept"

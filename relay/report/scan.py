"""All rows of `usage`, counted by day.

The time goes into handing rows from SQLite to Python (0.4 microseconds each) and into sorting values for the
percentiles, so a large table is cut into blocks of row numbers, and the blocks are spread over the processors. An
index would not help, since every row is wanted, and each insert of the relay would pay for it.

Row numbers say nothing: those of a blurred database are random, of all that there are, and beside them there may be
older ones, in order. So where a block ends is found by counting rows, which takes a twentieth of reading them.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from itertools import chain

from relay.report.database import Database, ReportError
from relay.report.forked import ProcessDied, apply
from relay.report.periods import DAY, EPOCH_DAY, LATEST, Day, Offset, confined, confined_day, is_utc, offsets
from relay.report.tally import Tally, Values

BLOCK = 262144  # rows; bounds the memory that a block's values take on their way from one process to another

TOGETHER = 256  # rows; so many in a row are mostly of one day, and then need not be told apart

# A null is nothing that the relay writes, save as the waiting time of those who waited in vain. Nor is text, or a time
# as long as all that days are counted for; such a time is unknown. (To SQLite text is more than any number.)
STARTED = "coalesce(started, 0)"
SIZE = "CAST(coalesce(bytes, 0) AS INTEGER)"
WAITING = f"CASE WHEN waiting_time < {LATEST} AND waiting_time > -{LATEST} THEN waiting_time END"
KNOWN_TOTAL = "coalesce(total_time, 0.0)"
TOTAL = f"CASE WHEN {KNOWN_TOTAL} < {LATEST} AND {KNOWN_TOTAL} > -{LATEST} THEN {KNOWN_TOTAL} END"

MOODS = ("other", "lonely", "errory")  # of the connections that were no transfers, by MOOD
MOOD = "(result IS 'lonely') + 2 * (result IS 'errory')"

# {day} stands for the expression for a row's day; the two parameters are the numbers of the first and the last row.
END_OF_BLOCK = "SELECT rowid FROM usage WHERE rowid BETWEEN ? AND ? ORDER BY rowid LIMIT 1 OFFSET ?"
EXTENT = f"SELECT min({STARTED}), max({STARTED}) FROM usage WHERE rowid BETWEEN ? AND ?"
TRANSFERS = f"""
    SELECT {{day}}, {SIZE}, {WAITING}, {TOTAL} FROM usage
    WHERE rowid BETWEEN ? AND ? AND result = 'happy'
"""
# Day and mood as one number, since that is counted fastest; null for those with bytes, which only imported rows have.
UNPAIRED = f"""
    SELECT CASE {SIZE} WHEN 0 THEN ({{day}}) * 4 + {MOOD} END FROM usage
    WHERE rowid BETWEEN ? AND ? AND result IS NOT 'happy'
"""
UNPAIRED_WITH_BYTES = f"""
    SELECT {{day}}, {MOOD}, {SIZE} FROM usage
    WHERE rowid BETWEEN ? AND ? AND result IS NOT 'happy' AND {SIZE} != 0
"""

Tallies = dict[Day, Tally]
Block = tuple[int, int]  # row numbers, both included


class _ValuesByDay(dict[float, Values]):
    """From a day to where the values of its transfers go."""

    def __missing__(self, day: float) -> Values:
        self[day] = Values()
        return self[day]


def day_in_sql(changes: list[Offset]) -> str:
    """Return the SQL expression for a row's day, in a time zone with these offsets from UTC.

    The result is to be confined: it is some number for whatever `started` may be.
    """
    cases = "".join(f"WHEN started >= {change.since} THEN {change.seconds} " for change in reversed(changes[1:]))
    east = f"CASE {cases}ELSE {changes[0].seconds} END" if cases else str(changes[0].seconds)
    return f"CAST(({STARTED} + {east}) / {DAY} AS INTEGER) + {EPOCH_DAY}"


def count_block(database: Database, utc: bool, block: Block) -> Tallies:
    """Return the tallies of the rows of a block, by day, their values sorted."""
    tallies: Tallies = {}
    with database.connection() as connection:
        first, last = (0, 0) if utc else connection.execute(EXTENT, block).fetchone()
        day = day_in_sql(offsets(confined(first), confined(last), utc))
        _count_transfers(connection, day, block, tallies)
        _count_unpaired(connection, day, block, tallies)
    return tallies


def _count_transfers(connection: sqlite3.Connection, day_sql: str, block: Block, tallies: Tallies) -> None:
    by_day = _ValuesByDay()
    rows = connection.execute(TRANSFERS.format(day=day_sql), block)
    while some := rows.fetchmany(TOGETHER):
        days, sizes, waits, totals = zip(*some, strict=True)
        if days.count(days[0]) == len(days) and None not in waits and None not in totals:
            values = by_day[days[0]]
            values.sizes.extend(sizes)
            values.waits.extend(waits)
            values.totals.extend(totals)
            continue
        for day, size, wait, total in some:
            values = by_day[day]
            values.sizes.append(size)
            if total is not None:
                values.totals.append(total)
            if wait is not None:
                values.waits.append(wait)
    for day, values in by_day.items():
        _tally(tallies, day).values.extend(values)
    for tally in tallies.values():
        tally.settle()


def _tally(tallies: Tallies, day: float) -> Tally:
    return tallies.setdefault(confined_day(day), Tally())


def _count_unpaired(connection: sqlite3.Connection, day_sql: str, block: Block, tallies: Tallies) -> None:
    rows = connection.execute(UNPAIRED.format(day=day_sql), block)
    counted = Counter(chain.from_iterable(rows))
    if counted.pop(None, 0):
        for day, mood, size in connection.execute(UNPAIRED_WITH_BYTES.format(day=day_sql), block):
            _tally(tallies, day).add_unpaired(MOODS[mood], 1, size)
    for key, connections in counted.items():
        _tally(tallies, key // 4).add_unpaired(MOODS[int(key % 4)], connections, 0)


def count(database: Database, first: int, last: int, utc: bool) -> Tallies:
    """Return the tallies of the rows numbered `first` to `last`, by day.

    Raises:
        ReportError: the database cannot be read (any more).
    """
    tallies: Tallies = {}
    blocks = blocks_of(database, first, last)
    with closing(_counted(partial(count_block, database, utc or is_utc()), blocks)) as each:
        for counted in each:
            for day, tally in counted.items():
                if day in tallies:
                    tallies[day].extend(tally)
                else:
                    tallies[day] = tally
    return tallies


def blocks_of(database: Database, first: int, last: int) -> list[Block]:
    """Return the row numbers from `first` to `last`, cut into blocks of at most `BLOCK` rows."""
    blocks: list[Block] = []
    with database.connection() as connection:
        while last - first >= BLOCK:
            end = connection.execute(END_OF_BLOCK, (first, last, BLOCK - 1)).fetchone()
            if end is None:
                break
            blocks.append((first, end[0]))
            first = end[0] + 1
    if first <= last:
        blocks.append((first, last))
    return blocks


def _counted(counting: Callable[[Block], Tallies], blocks: list[Block]) -> Generator[Tallies, None, None]:
    processors = len(os.sched_getaffinity(0))
    if len(blocks) <= 1 or processors == 1:  # starting processes takes longer than counting so few
        yield from map(counting, blocks)
        return
    try:  # this process has no thread and no open connection here
        yield from apply(counting, blocks, min(processors, 4, len(blocks)))
    except OSError:  # no more processes are to be had
        yield from map(counting, blocks)
    except ProcessDied:
        raise ReportError(
            "a process that was counting has been killed, perhaps since memory is short; give it more, and try again"
        ) from None

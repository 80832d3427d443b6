"""Destination: the usage database, one immediate transaction for all that is queued.

Each transaction leaves all tables right for the whole relay: the rows of `usage`, both sums, this worker's share and,
from the shares of all workers that live, the row of `current`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from relay.usage import schema
from relay.usage.processes import is_living, process_start
from relay.usage.record import Current, Record, blur, blur_size
from relay.usage.trouble import Trouble, UsageError
from relay.usage.watched_file import WatchedFile
from relay.usage.writer import Request, Warn

MOST_AT_ONCE: Final = 1000
"""Records in one transaction. After a long outage the other workers get their turns in between, and the event loop gets
the interpreter back sooner: making so many rows takes about a millisecond of it."""

Row = tuple[float, float, float | None, int, str]
"""A row of the `usage` table."""

_NO_REQUESTS: Final[frozenset[Request]] = frozenset()


@dataclass(frozen=True, slots=True)
class _Doubt:
    """Rows whose COMMIT failed in a way that does not tell whether they are in the table; the last would be `last`."""

    last: int
    rows: list[Row]


class Database:
    """The tables, written by one thread; the connection is opened, used and closed on it.

    Args:
        path: the SQLite file.
        blur_seconds: as `--blur-usage` has it.
        current: returns this process's share of `current`.
        warn: writes a line to the relay's own log.

    Raises:
        UsageError: this system does not tell when a process started.
    """

    def __init__(self, path: str, blur_seconds: int | None, current: Callable[[], Current], warn: Warn) -> None:
        self.name = f"usage database {path}"
        self.option = f"--usage-db {path}"
        self._path = os.path.abspath(path)
        self._blur_seconds = blur_seconds
        self._current = current
        self._warn = warn
        self._pid = os.getpid()
        start = process_start(self._pid)
        if start is None:
            raise UsageError(f"{self.option}: this process is not in /proc; mount it")
        self._start = start
        self._file = WatchedFile(self._path)
        self._connection: sqlite3.Connection | None = None
        self._signed_on = False
        self._counted: int | None = None  # connections that the file held before another came in its place
        self._suspect = False  # the file was damaged when last used
        self._damaged_as: schema.Signature | None = None
        self._doubt: _Doubt | None = None

    def write(self, kept: deque[Record], requests: AbstractSet[Request]) -> None:
        """Write the records and the share, in as many transactions as it takes; what is committed leaves `kept`."""
        try:
            connection = self._reach()
            self._settle_doubt(connection, kept)
            while len(kept) > MOST_AT_ONCE:
                self._write_first(connection, kept, MOST_AT_ONCE, _NO_REQUESTS)
            self._write_first(connection, kept, len(kept), requests)
        except Trouble as trouble:
            self._recover(trouble)
            raise
        except (sqlite3.Error, OSError) as error:
            reason = schema.trouble_of(error, self._path)
            self._recover(reason)
            raise reason from error

    def close(self) -> None:
        """Close the file. When no other process has it open, SQLite also tidies up its -wal and -shm."""
        self._disconnect()
        self._file.forget()

    # The connection

    def _reach(self) -> sqlite3.Connection:
        """Return a connection to the file that the path names now, this worker being signed on in it."""
        if self._connection is not None:
            if not self._file.is_where_it_was():
                self._part(self._connection)
            elif not self._file.has_its_wal():
                self._part_from_wal(self._connection)
            else:
                self._file.check_header()
        if self._connection is None:
            self._connection = self._connect()
        if not self._signed_on:
            self._sign_on(self._connection)
            self._signed_on = True
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        if self._damaged_as is not None and self._damaged_as == schema.signature(self._path):
            raise schema.damaged("as before")
        connection, status = schema.connect(self._path, self._file.former())
        try:
            if self._suspect:
                schema.check_all(connection)
            fate = self._file.hold(status)
        except BaseException:
            connection.close()
            raise
        self._suspect = False
        self._damaged_as = None
        if fate is not None:
            held = "what it held" if self._counted is None else f"what it held ({self._counted} connections in all)"
            self._warn(f"{self.name}: {fate.what}; {held} {fate.rest}; the records go on in the file that is there now")
        self._counted = None
        return connection

    def _part(self, connection: sqlite3.Connection) -> None:
        """Let go of a file that is no longer the one that the path names."""
        self._file.put_away_if_empty()
        with contextlib.suppress(sqlite3.Error):
            (self._counted,) = connection.execute("SELECT connections FROM all_time").fetchone()
            # Someone may have moved the file and not its -wal: what is still in there belongs to the file.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._disconnect()

    def _part_from_wal(self, connection: sqlite3.Connection) -> None:
        """Bring what is in a -wal that was removed by its name into the file, which is still there; then begin anew."""
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise schema.trouble_of(sqlite3.OperationalError("database is locked"), self._path)
        self._disconnect()
        self._warn(f"{self.name}: its -wal was removed while the relay ran; nothing is lost, it is in the file now")

    def _recover(self, trouble: Trouble) -> None:
        """After a lock or a full disk the same connection goes on; after anything else a new one is the safer start."""
        if trouble.kind in ("locked", "full"):
            return
        self._disconnect()
        if trouble.kind == "damaged":
            if self._suspect:
                self._damaged_as = schema.signature(self._path)
            self._suspect = True

    def _disconnect(self) -> None:
        if self._connection is not None:
            is_there = self._file.is_where_it_was() and self._file.has_its_wal()
            with contextlib.suppress(sqlite3.Error), contextlib.nullcontext() if is_there else self._file.left_alone():
                self._connection.close()
        self._connection = None
        self._signed_on = False

    # Transactions

    def _sign_on(self, connection: sqlite3.Connection) -> None:
        """Begin this worker's share; if no other worker lives, the service starts, and `since_reboot` from zero."""
        with self._transaction(connection):
            for table, values in schema.ONE_ROW_TABLES.items():
                connection.execute(f"INSERT INTO {table} SELECT {values} WHERE NOT EXISTS (SELECT 1 FROM {table})")
            shares = connection.execute("SELECT pid, process_start FROM worker_share").fetchall()
            if not any(is_living(pid, start) for pid, start in shares):
                connection.execute(_BEGIN_ANEW)
            self._tell_current(connection, leaving=False)
            _tell_time(connection)
            connection.execute("COMMIT")
        self._file.note_wal()

    @contextlib.contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[None]:
        """Begin with the write lock in hand; undo everything unless the block gets as far as its COMMIT.

        Once the lock is held, the file must still be there, with its -wal: who finds it gone can then rely on it that
        no other worker writes to the old one any more.
        """
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._file.is_where_it_was() or not self._file.has_its_wal():
                raise Trouble("its file is just being replaced", kind="locked", passing=True, waited=True)
            yield
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _write_first(
        self, connection: sqlite3.Connection, kept: deque[Record], count: int, requests: AbstractSet[Request]
    ) -> None:
        """Write the oldest `count` records in one transaction, and take them out of `kept` when it is committed."""
        rows = [self._row(record) for record in islice(kept, count)]
        with self._transaction(connection):
            last = _insert(connection, rows) if rows else 0
            self._tell_current(connection, leaving=Request.LEAVE in requests)
            if Request.TICK in requests:
                _tell_time(connection)
            try:
                connection.execute("COMMIT")
            except sqlite3.Error:
                if rows and not connection.in_transaction:
                    self._doubt = _Doubt(last, rows)
                raise
        for _ in range(count):
            kept.popleft()

    def _settle_doubt(self, connection: sqlite3.Connection, kept: deque[Record]) -> None:
        """Find out whether the rows of a COMMIT that failed are there after all; they are the oldest ones kept."""
        if self._doubt is None:
            return
        rows, last = self._doubt.rows, self._doubt.last
        found = connection.execute(
            "SELECT started, total_time, waiting_time, bytes, result FROM usage "
            "WHERE rowid > ? AND rowid <= ? ORDER BY rowid",
            (last - len(rows), last),
        ).fetchall()
        self._doubt = None
        if found == rows:
            for _ in rows:
                kept.popleft()

    def _row(self, record: Record) -> Row:
        blurred = blur(record, self._blur_seconds)
        return (blurred.started, blurred.total_time, blurred.waiting_time, blurred.total_bytes, blurred.mood)

    def _tell_current(self, connection: sqlite3.Connection, *, leaving: bool) -> None:
        """Write this worker's share, drop those of processes that are gone, and make `current` the sum of the rest."""
        connected = waiting = moved = 0
        for pid, start, *share in connection.execute("SELECT * FROM worker_share").fetchall():
            if pid == self._pid and start == self._start:
                continue
            if is_living(pid, start):
                connected += share[0]
                waiting += share[1]
                moved += share[2]
            else:
                connection.execute("DELETE FROM worker_share WHERE pid = ? AND process_start = ?", (pid, start))
        if leaving:
            connection.execute("DELETE FROM worker_share WHERE pid = ? AND process_start = ?", (self._pid, self._start))
        else:
            own = self._current()
            own_moved = self._blurred(own.partal_bytes)
            connection.execute(
                "REPLACE INTO worker_share (pid, process_start, connected, waiting, partal_bytes) "
                "VALUES (?, ?, ?, ?, ?)",
                (self._pid, self._start, own.connected, own.waiting, own_moved),
            )
            connected += own.connected
            waiting += own.waiting
            moved += own_moved
        connection.execute(
            "UPDATE current SET connected = ?, waiting = ?, partal_bytes = ?",
            (connected, waiting, self._blurred(moved)),
        )

    def _blurred(self, size: int) -> int:
        return size if self._blur_seconds is None else blur_size(size)


def _tell_time(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE refreshed SET at = ?", (int(time.time()),))


def _insert(connection: sqlite3.Connection, rows: Sequence[Row]) -> int:
    """Add the rows to `usage` and to both sums; return the rowid of the last."""
    begin = last = 0
    while begin < len(rows):
        size = min(_MOST_ROWS, 1 << (len(rows) - begin).bit_length() - 1)
        cursor = connection.execute(_INSERT[size], tuple(chain.from_iterable(rows[begin : begin + size])))
        last = cursor.lastrowid or 0
        begin += size
    moods = [row[4] for row in rows]
    sums = (
        sum(row[3] for row in rows),
        len(rows),
        moods.count("happy"),
        moods.count("lonely"),
        moods.count("errory"),
    )
    for table in ("since_reboot", "all_time"):
        connection.execute(_ADD[table], sums)
    return last


# One statement for many rows, where executemany takes one for each: the thread lets go of the interpreter once in each
# statement, and each time has to get it back from an event loop that is busy. Few sizes, so that all stay prepared;
# five values a row, and SQLite before 3.32 takes 999.
_MOST_ROWS: Final = 128
_INSERT: Final = {
    size: "INSERT INTO usage (started, total_time, waiting_time, bytes, result) VALUES "
    + ", ".join(["(?, ?, ?, ?, ?)"] * size)
    for size in (1, 2, 4, 8, 16, 32, 64, _MOST_ROWS)
}
_BEGIN_ANEW: Final = (
    "UPDATE since_reboot SET bytes = 0, connections = 0, mood_happy = 0, mood_lonely = 0, mood_errory = 0"
)
_ADD: Final = {
    table: f"UPDATE {table} SET bytes = bytes + ?, connections = connections + ?, mood_happy = mood_happy + ?, "
    "mood_lonely = mood_lonely + ?, mood_errory = mood_errory + ?"
    for table in ("since_reboot", "all_time")
}

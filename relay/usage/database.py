"""Destination: the usage database, one immediate transaction for all that is queued.

Each transaction leaves all tables right for the whole relay: the rows of `usage`, both sums, this worker's share and,
from the shares of all workers that live, the row of `current`. If it is not possible to write, or somebody has spoiled
the file or what is beside it, this decides what becomes of the connection; the records are kept by the `writer`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Final

from relay.usage import one_row, rows, schema
from relay.usage.folder import alone_in, can_be_flushed
from relay.usage.looks import Looks
from relay.usage.record import Current, Record, blur, blur_size
from relay.usage.rows import Row
from relay.usage.shares import Shares
from relay.usage.sqlite import sqlite3
from relay.usage.sqlite_trouble import damaged, trouble_of
from relay.usage.told import BLUR, Description, Histograms
from relay.usage.trouble import LOCKED_PATIENCE, Trouble
from relay.usage.watched_file import WatchedFile, being_replaced
from relay.usage.write_ahead_log import StillInUse
from relay.usage.writer import Request, Warn

MOST_AT_ONCE: Final = 1000
"""Records in one transaction. After a long outage the other workers get their turns in between, and the event loop gets
the interpreter back sooner: making so many rows takes about a millisecond of it."""

_NO_REQUESTS: Final[frozenset[Request]] = frozenset()

_STAYS: Final = ("locked", "full", "drawn")
"""Kinds of trouble after which the same connection goes on."""


class Database:
    """The tables, written by one thread; the connection is opened, used and closed on it.

    Args:
        path: the SQLite file.
        blur_seconds: as `--blur-usage` has it.
        current: returns this process's share of `current`.
        describe: returns what else it tells of itself.
        warn: writes a line to the relay's own log.
    """

    def __init__(
        self,
        path: str,
        blur_seconds: int | None,
        current: Callable[[], Current],
        describe: Callable[[], Description],
        warn: Warn,
    ) -> None:
        self.name = f"usage database {path}"
        self.option = f"--usage-db {path}"
        self._path = os.path.abspath(path)
        self._blur_seconds = blur_seconds
        self._warn = warn
        self._histograms = Histograms()
        self._shares = Shares(lambda: self._blurred(current()), lambda: self._whole(describe()))
        self._file = WatchedFile(self._path)
        self._connection: sqlite3.Connection | None = None
        self._signed_on = False
        self._ticked = int(time.time())  # when the time was to be noted last; no event of a client's
        self._held: int | None = None  # connections that the file is known to have seen
        self._suspect = False  # the file was damaged when last used, or may be
        self._damaged_as: schema.Signature | None = None
        self._log_is_gone = False  # -wal or -shm do not belong to what has these names now
        self._lost = ""  # what happened to the -wal of the connection before, and what was in it
        self._looks = Looks()
        self._flush = True  # have SQLite see to it that the file is on the disk
        self._doubt: dict[int, Row] = {}  # the rows whose COMMIT failed, so that they may be there or not

    def write(self, kept: deque[Record], requests: AbstractSet[Request]) -> None:
        """Write the records and the share, in as many transactions as it takes; what is committed leaves `kept`."""
        if Request.TICK in requests:
            self._ticked = int(time.time())
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
            reason = self._reason(error)
            self._recover(reason)
            raise reason from error
        finally:
            if self._connection is not None:
                self._shares.hold_back(holds=bool(kept))

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
            elif self._log_is_gone:
                self._part_from_log(self._connection)
            else:
                self._file.check()
                self._file.log.mend_index()
        if self._connection is None:
            self._connect()
        assert self._connection is not None
        if not self._signed_on:
            self._sign_on(self._connection)
            self._signed_on = True
        return self._connection

    def _connect(self) -> None:
        if self._damaged_as is not None and self._damaged_as == schema.signature(self._path):
            raise damaged("as before")
        opened = schema.connect(
            self._path, self._file.former(), lambda line: self._warn(f"{self.name}: {line}"), flush=self._flush
        )
        try:
            if self._suspect:
                schema.check_all(opened.connection)
            if opened.log.can_be_read():  # SQLite would copy it by itself, but without looking whether it is whole
                opened.connection.execute("PRAGMA wal_autocheckpoint = 0")
            fate = self._file.hold(opened.status, opened.log)
        except BaseException:
            opened.close()
            raise
        self._connection = opened.connection
        if self._suspect:
            self._file.found_whole()
        self._suspect = False
        self._damaged_as = None
        if fate is not None:
            held = "what it held" if self._held is None else f"what it held ({self._held} connections in all)"
            self._warn(f"{self.name}: {fate.what}; {held} {fate.rest}; the records go on in the file that is there now")
            self._lost = ""
        self._file.check_end()
        self._shares.live(self._file.fd)

    def _part(self, connection: sqlite3.Connection) -> None:
        """Let go of a file that is no longer the one that the path names."""
        self._file.put_away_if_empty()
        if not self._file.log.is_broken(every_frame=True):
            with contextlib.suppress(sqlite3.Error):
                self._held = one_row.connections(connection)
                # Someone may have moved the file and not its -wal: what is still in there belongs to the file.
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._disconnect()

    def _part_from_log(self, connection: sqlite3.Connection) -> None:
        """Let go of a -wal or a -shm that was removed by its name, and begin anew with the file: it is still there."""
        if self._file.log.is_broken(every_frame=True):
            self._part_from_broken_log()
        elif self._file.log.has_wal():
            self._disconnect()  # who makes a new -shm finds everything in the -wal
            self._warn(f"{self.name}: its -shm was removed while the relay ran; nothing is lost")
        else:
            (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise trouble_of(sqlite3.OperationalError("database is locked"), self._path)
            self._disconnect()
            self._warn(f"{self.name}: its -wal was removed while the relay ran; nothing is lost, it is in the file now")

    def _part_from_broken_log(self) -> None:
        """Let go of a -wal that somebody has overwritten, before anything of that is taken for pages of the file."""
        with alone_in(os.path.dirname(os.path.realpath(self._path))):
            try:
                lost = self._file.log.put_away()
            except StillInUse:
                raise trouble_of(sqlite3.OperationalError("database is locked"), self._path) from None
            self._disconnect(leave_log_alone=True)
        self._suspect = True
        if lost is not None:
            self._lost = "what was in it is lost" if lost else "nothing is lost"

    def _reason(self, error: Exception) -> Trouble:
        """Say what is wrong, after looking at what SQLite does not tell."""
        trouble = trouble_of(error, self._path)
        if trouble.kind in _STAYS or self._connection is None:
            return trouble
        if self._file.log.is_broken(every_frame=True):
            return _overwritten()
        if self._flush and not can_be_flushed(self._file.fd):
            self._flush = False
            return Trouble(trouble.line, passing=True, patience=LOCKED_PATIENCE)
        return trouble

    def _recover(self, trouble: Trouble) -> None:
        """After a lock or a full disk the same connection goes on; after anything else a new one is the safer start."""
        if trouble.kind in _STAYS:
            return
        if trouble.kind == "log":
            with contextlib.suppress(Trouble, OSError):  # then the next attempt does it
                self._part_from_broken_log()
            return
        self._disconnect()
        if trouble.kind == "damaged":
            if self._suspect:
                self._damaged_as = schema.signature(self._path)
            self._suspect = True

    def _disconnect(self, *, leave_log_alone: bool = False) -> None:
        if self._connection is not None:
            is_there = self._file.is_where_it_was() and self._file.has_its_log() and not leave_log_alone
            is_whole = is_there and not self._file.log.is_broken(every_frame=True) and not self._file.is_cut_short()
            with contextlib.suppress(sqlite3.Error), contextlib.nullcontext() if is_whole else self._file.left_alone():
                self._connection.close()
            self._file.let_go_of_index()
        self._connection = None
        self._signed_on = self._log_is_gone = False

    # Transactions

    def _sign_on(self, connection: sqlite3.Connection) -> None:
        """Begin this worker's share; if no other that has done so lives, the service starts, `since_reboot` from 0."""
        with self._transaction(connection):
            lines = one_row.put_right(connection)
            if not self._shares.enter(connection, self._blur_seconds):
                one_row.begin_anew(connection)
                if self._held is None and self._file.log.has_left_over():
                    lines.append("its -wal is not whole (overwritten, or a power cut); what came last in it is lost")
            one_row.set_current(connection, self._blurred(self._shares.tell(connection, leaving=False)))
            one_row.set_refreshed(connection, self._ticked, latest=True)
            held = one_row.connections(connection)
            connection.execute("COMMIT")
        self._shares.entered()
        self._warn_all(lines)
        if self._lost:
            fewer = (self._held or 0) - held
            count = f", at least {fewer} connections" if fewer > 0 else ""
            self._warn(f"{self.name}: its -wal was overwritten or cut short while the relay ran; {self._lost}{count}")
            self._lost = ""
        self._held = held

    @contextlib.contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[None]:
        """Begin with the write lock in hand; undo everything unless the block gets as far as its COMMIT.

        Once the lock is held, the file must still be there, with its -wal: who finds it gone can then rely on it that
        no other worker writes to the old one any more.
        """
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._log_is_gone = not self._file.has_its_log()
            if self._log_is_gone or not self._file.is_where_it_was():
                raise being_replaced()
            if self._looks.find_broken(self._file.log):
                raise _overwritten()
            yield
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _write_first(
        self, connection: sqlite3.Connection, kept: deque[Record], count: int, requests: AbstractSet[Request]
    ) -> None:
        """Write the oldest `count` records in one transaction, and take them out of `kept` when it is committed."""
        new = [self._row(record) for record in islice(kept, count)]
        try:
            self._commit(connection, new, requests)
        except one_row.NotOneRow:
            self._put_right(connection)
            self._commit(connection, new, requests)
        for _ in range(count):
            kept.popleft()

    def _commit(self, connection: sqlite3.Connection, new: list[Row], requests: AbstractSet[Request]) -> None:
        with self._transaction(connection):
            numbered: dict[int, Row] = {}
            if new:
                try:
                    numbered = rows.insert(connection, new, in_order=self._blur_seconds is None)
                except rows.RowsRefused:
                    line = "its table usage does not take all rows; remove the trigger that keeps them out"
                    raise Trouble(line) from None
                one_row.add(connection, new)
            total = self._shares.tell(connection, leaving=Request.LEAVE in requests, whole=bool(requests))
            one_row.set_current(connection, self._blurred(total))
            if Request.TICK in requests:
                one_row.set_refreshed(connection, self._ticked)
                one_row.check(connection)
            is_due = self._looks.may_copy() and self._file.log.is_due()
            if is_due and self._looks.find_broken_before_copying(self._file.log):
                raise _overwritten()
            try:
                connection.execute("COMMIT")
            except sqlite3.Error:
                if not connection.in_transaction:
                    self._doubt = numbered
                raise
        self._held = (self._held or 0) + len(new)
        self._histograms.note(new)
        if is_due:
            self._copy_log_into_file(connection)

    def _copy_log_into_file(self, connection: sqlite3.Connection) -> None:
        """As far as that can be had now: the rows are safe in any case."""
        began = time.monotonic()
        try:
            _, frames, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error:
            frames, copied = 1, 0
        if copied < frames:
            self._file.log.some_stay()
            self._looks.note_some_stay(copied, time.monotonic() - began)

    def _put_right(self, connection: sqlite3.Connection) -> None:
        with self._transaction(connection):
            lines = one_row.put_right(connection)
            connection.execute("COMMIT")
        self._warn_all(lines)

    def _warn_all(self, lines: list[str]) -> None:
        for line in lines:
            self._warn(f"{self.name}: {line}")

    def _settle_doubt(self, connection: sqlite3.Connection, kept: deque[Record]) -> None:
        """Find out whether the rows of a COMMIT that failed are there after all; they are the oldest ones kept."""
        doubtful = self._doubt
        if doubtful and rows.are_there(connection, doubtful):
            for _ in doubtful:
                kept.popleft()
        self._doubt = {}

    def _row(self, record: Record) -> Row:
        blurred = blur(record, self._blur_seconds)
        return (blurred.started, blurred.total_time, blurred.waiting_time, blurred.total_bytes, blurred.mood)

    def _whole(self, description: Description) -> Description:
        """With what was counted here, and blurred."""
        gauges = {**description.gauges, BLUR: self._blur_seconds or 0}
        if self._blur_seconds is not None and "held_bytes" in gauges:
            gauges["held_bytes"] = blur_size(int(gauges["held_bytes"]))
        return Description(gauges, {**description.counters, **self._histograms.counters()})

    def _blurred(self, current: Current) -> Current:
        if self._blur_seconds is None:
            return current
        return Current(current.connected, current.waiting, blur_size(current.partal_bytes))


def _overwritten() -> Trouble:
    return Trouble("its -wal was overwritten", kind="log", passing=True, patience=LOCKED_PATIENCE)

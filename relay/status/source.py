"""One usage database, read for what it says of this moment: a few rows of the small tables, never a whole `usage`.

Which workers live the kernel tells: each holds a lock on a byte of the database file (`relay.usage.lifeline`). To ask
about it the file is opened beside SQLite, and closed only after SQLite's connection: closing any descriptor of a file
drops the locks that the process holds on it (fcntl(2)).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from relay.mistakes import Mistake
from relay.report.by_other_hands import whole, whole_or_none
from relay.report.counters import added, numbers_of
from relay.report.database import ReportError, has_shm, looks_of, opened, times_of
from relay.report.tally import Sums
from relay.status.reading import Reading, Worker
from relay.usage import lifeline
from relay.usage.processes import is_living

T = TypeVar("T")

_SUMS = "connections, bytes, mood_happy, mood_lonely, mood_errory"
CURRENT: Final = "SELECT connected, waiting, partal_bytes FROM current ORDER BY rowid LIMIT 1"
SINCE_START: Final = f"SELECT {_SUMS} FROM since_reboot ORDER BY rowid LIMIT 1"
ALL_TIME: Final = f"SELECT {_SUMS} FROM all_time ORDER BY rowid LIMIT 1"
REFRESHED: Final = "SELECT at FROM refreshed ORDER BY rowid LIMIT 1"
IMPORTED: Final = "SELECT source, rows, digest FROM imported ORDER BY source LIMIT 1000"
SHARES: Final = (
    "SELECT pid, process_start, connected, waiting, partal_bytes FROM worker_share "
    "WHERE typeof(pid) = 'integer' ORDER BY pid, process_start LIMIT 1000"
)
LIFELINES: Final = "SELECT pid, process_start, byte FROM lifeline LIMIT 1000"
TOLD: Final = "SELECT pid, process_start, gauges, counters FROM worker_status LIMIT 1000"
SERVICE: Final = "SELECT began, counters FROM service ORDER BY rowid LIMIT 1"

READINGS = 3
"""At most, of a database that a relay opens while it is read without locks."""

_Key = tuple[object, object]


class Unreadable(Exception):
    """The database cannot be read; the text is one line that says why, and what to do."""


class Source:
    """Reads one database, on one thread at a time.

    Args:
        path: as the operator gave it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._as_read: tuple[object, Reading] | None = None  # of one that nobody has open

    def read(self) -> Reading:
        """What it says now. Raises Unreadable."""
        try:
            looks = looks_of(self.path)
        except ReportError as error:
            raise self._unreadable(error) from error
        if self._as_read is not None and self._as_read[0] == looks and not has_shm(self.path):
            return _of_nobody(self._as_read[1])
        reading = self.ask(lambda connection, fd: _read(connection, fd, self.path))
        self._as_read = (looks, reading)
        return reading

    def ask(self, question: Callable[[sqlite3.Connection, int], T]) -> T:
        """The answer of `question`, which gets a connection, in a transaction, and a descriptor of the file.

        Raises Unreadable, also for what the question raises.
        """
        try:
            for _ in range(READINGS):
                with contextlib.ExitStack() as opening:
                    fd = _file(self.path, opening)
                    database = opening.enter_context(opened(self.path))
                    connection = opening.enter_context(database.connection())
                    connection.execute("PRAGMA cache_size = -256")  # KiB: there is little to read
                    connection.execute("BEGIN")
                    answer = question(connection, fd)
                    if not database.was_disturbed():
                        return answer
        except (ReportError, Mistake) as error:
            raise self._unreadable(error) from error
        except Exception as error:  # others may have written anything, and this thread is the only one to read it
            raise Unreadable(" ".join(str(error).split())) from error
        raise Unreadable("it changes too often to be read")

    def _unreadable(self, error: Exception) -> Unreadable:
        return Unreadable(str(error).removeprefix(f"{self.path}: "))


def _file(path: Path, opening: contextlib.ExitStack) -> int:
    """A descriptor of the file, closed with `opening`; -1 when there is none, which the next to open it will say."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
    opening.callback(os.close, fd)
    return fd


def _of_nobody(reading: Reading) -> Reading:
    """The same reading of a file that is as it was, and that nobody has open: so none of its workers lives."""
    workers = tuple(replace(worker, lives=False) for worker in reading.workers)
    return replace(reading, at=time.time(), workers=workers, unwritten=0, holding=None)


def _read(connection: sqlite3.Connection, fd: int, path: Path) -> Reading:
    written = times_of(path)  # before the first statement, which decides what is seen: nothing is missed
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}

    def rows(table: str, statement: str) -> list[Any]:
        return connection.execute(statement).fetchall() if table in tables else []

    told: dict[_Key, tuple[object, object]] = {
        (pid, start): (gauges, counters) for pid, start, gauges, counters in rows("worker_status", TOLD)
    }
    bytes_of: dict[_Key, object] = {(pid, start): byte for pid, start, byte in rows("lifeline", LIFELINES)}
    workers = []
    lifelines = 0  # of those workers
    for pid, start, connected, waiting, partial in rows("worker_share", SHARES):
        byte = bytes_of.get((pid, start))
        lives = _lives(fd, byte, pid, start)
        lifelines += lives and isinstance(byte, int)
        gauges, _ = told.get((pid, start), (None, None))
        shares = whole(connected), whole(waiting), whole(partial)
        workers.append(Worker(pid, _since_boot(start), lives, *shares, numbers_of(gauges)))
    began, counters = _first(rows("service", SERVICE), (None, None))
    connected, waiting, partial = map(whole, _first(rows("current", CURRENT), (0, 0, 0)))
    (refreshed,) = _first(rows("refreshed", REFRESHED), (None,))
    held = lifeline.count_held(fd) if fd >= 0 else 0
    status = os.statvfs(os.path.dirname(os.path.realpath(path)) or ".")
    return Reading(
        at=time.time(),
        connected=connected,
        waiting=waiting,
        partial_bytes=partial,
        refreshed=whole_or_none(refreshed),
        began=whole_or_none(began),
        since_start=Sums(*map(whole, _first(rows("since_reboot", SINCE_START), (0,) * 5))),
        all_time=Sums(*map(whole, _first(rows("all_time", ALL_TIME), (0,) * 5))),
        workers=tuple(workers),
        counters=added([numbers_of(counters), *(numbers_of(counted) for _, counted in told.values())]),
        written=written,
        origin=(_identity(fd), *rows("imported", IMPORTED)),
        disk_is_full=status.f_bavail == 0,
        unwritten=max(held - lifelines, 0),
        holding=lifeline.count_holding_back(fd) if held else None,
    )


def _first(rows: list[Any], otherwise: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(rows[0]) if rows else otherwise


def _identity(fd: int) -> object:
    """Which file that is."""
    if fd < 0:
        return None
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _since_boot(start: object) -> str:
    """When a process began, without which boot that was since: all that live are of one."""
    return start.partition("/")[2] if isinstance(start, str) else ""


def _lives(fd: int, byte: object, pid: int, start: str) -> bool:
    with contextlib.suppress(OSError):
        if isinstance(byte, int):
            return lifeline.is_held(fd, byte)
    return is_living(pid, start)

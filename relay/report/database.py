"""The usage database, opened so that nothing is ever written: not to the file, not beside it.

SQLite's read-only mode alone is not enough. A database under WAL that nobody has open has no `-wal` and `-shm` beside
it, and a read-only reader makes both, as files of its own user: the relay, started later as another user, could not
use them. In a folder where they cannot be made the reader fails instead. Hence four ways, by what lies there:

- `-wal` and `-shm`: a relay runs (or was killed). Read-only mode; SQLite's locks keep reader and writers apart.
- neither: nobody has the database open, and everything is in the one file. Immutable mode, which needs no locks. A
  relay may start meanwhile: `Database.was_disturbed` tells, and the caller reads again.
- a `-wal` that is another database's (`relay.usage.belonging`): the file was put there a moment ago, or while no relay
  runs. Immutable mode, as SQLite would read the other's pages for this one's; the relay puts that `-wal` aside.
- `-wal` without `-shm`: a copy of a database in use. The copy is copied to a temporary folder and read there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from relay.process.temporary import temporary_folder
from relay.report.by_other_hands import as_text, whole, whole_or_none
from relay.report.tally import Sums
from relay.usage.belonging import is_of_another

APPLICATION_ID = 0x52474556  # "RGEV"
SCHEMA_VERSION = 1
STALE_AFTER = 600  # seconds: a living relay notes the time every 300
PATIENCE = 5.0  # seconds to wait for a lock; readers wait only while a crashed writer's log is being recovered
NO_PERMISSION = "no permission to read it, its -wal or its -shm; run as the relay's user or in its group"


class ReportError(Exception):
    """The database cannot be read; the message is one line that names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Now:
    """The relay as it last described itself.

    Attributes:
        connected: pairs.
        waiting: connections with a good handshake and no partner yet.
        partial_bytes: bytes relayed so far by pairs that are not over.
        refreshed: seconds since the epoch of the last five-minute tick; None when there never was one.
    """

    connected: int
    waiting: int
    partial_bytes: int
    refreshed: int | None

    def is_stale(self, now: float) -> bool:
        """Return whether the relay has missed two ticks, so that nobody knows whether the numbers still hold. A time
        that is yet to come, from a clock that was wrong, says no more than an old one."""
        return self.refreshed is None or abs(now - self.refreshed) > STALE_AFTER


def add_now(parts: Iterable[Now]) -> Now:
    """Return several relays, or the machines of one, as one, as old as the one heard of longest ago."""
    each = list(parts)
    refreshed = [part.refreshed for part in each if part.refreshed is not None]
    return Now(
        connected=sum(part.connected for part in each),
        waiting=sum(part.waiting for part in each),
        partial_bytes=sum(part.partial_bytes for part in each),
        refreshed=min(refreshed) if len(refreshed) == len(each) else None,
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """All that the one-row tables say, and the first and last row number of `usage` at that same moment. Rows that a
    relay adds while it is being read come after the last, or, where times are blurred, anywhere."""

    now: Now
    since_start: Sums
    all_time: Sums
    first_row: int
    last_row: int


@dataclass(frozen=True, slots=True)
class Database:
    """A usage database to read from, as `opened` returns it. May be handed to other processes.

    Every method raises ReportError when the file cannot be read (any more).
    """

    path: Path
    uri: str
    seen: object

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Return a connection for one thread of one process, closed on exit."""
        try:
            connection = sqlite3.connect(self.uri, uri=True, timeout=PATIENCE, isolation_level=None)
            with contextlib.closing(connection):
                connection.text_factory = as_text
                yield connection
        except sqlite3.Error as error:
            raise ReportError(f"{self.path}: {_reason(self.path, error)}") from error

    def was_disturbed(self) -> bool:
        """Return whether the file was read without locks and somebody may have written to it since."""
        return "immutable=1" in self.uri and looks_of(self.path) != self.seen

    def summary(self) -> Summary:
        """Return the one-row tables and the extent of `usage`, all of one moment."""
        with self.connection() as connection:
            connection.execute("BEGIN")
            connected, waiting, partial = _one_row(connection, "connected, waiting, partal_bytes", "current")
            refreshed = connection.execute("SELECT max(at) FROM refreshed").fetchone()[0]
            first, last = connection.execute(
                "SELECT (SELECT min(rowid) FROM usage), (SELECT max(rowid) FROM usage)"
            ).fetchone()
            return Summary(
                now=Now(connected, waiting, partial, whole_or_none(refreshed)),
                since_start=_sums(connection, "since_reboot"),
                all_time=_sums(connection, "all_time"),
                first_row=first or 0,
                last_row=-1 if last is None else last,
            )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Database]:
    """Return the usage database at `path`, checked to be one.

    Raises:
        ReportError: the file is missing, cannot be read, or is something else.
        Mistake: it has to be copied, and there is nowhere to.
    """
    with contextlib.ExitStack() as cleanup:
        database = Database(path, _choose_uri(path, cleanup), looks_of(path))
        with database.connection() as connection:
            _check_schema(path, connection)
        yield database


def _choose_uri(path: Path, cleanup: contextlib.ExitStack) -> str:
    _check_there(path)
    if _has_wal_of_another(path):
        return _uri(path, "mode=ro&immutable=1")
    logged, indexed = _beside(path, "-wal"), _beside(path, "-shm")
    if not _is_under_wal(path):
        return _uri(path, "mode=ro")
    if not logged and not indexed:
        return _uri(path, "mode=ro&immutable=1")
    if not indexed:
        folder = cleanup.enter_context(temporary_folder("relay-usage"))
        return _uri(_copied(path, Path(folder)), "mode=ro")
    return _uri(path, "mode=ro")


def _has_wal_of_another(path: Path) -> bool:
    try:
        return is_of_another(os.path.realpath(path))
    except OSError:  # SQLite meets it as well
        return False


def _check_there(path: Path) -> None:
    """Raise ReportError unless there is a file; what may not be looked at is another matter than what is missing."""
    status = _status(path)
    if status is None:
        raise ReportError(f"{path}: no such file; give the path that the relay's --usage-db names")
    if not stat.S_ISREG(status.st_mode):
        raise ReportError(f"{path}: not a file; give the path that the relay's --usage-db names")


def _status(path: Path) -> os.stat_result | None:
    """Return what the kernel says of the file, None when there is none."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise ReportError(
            f"{path}: no permission to enter its folder; run as the relay's user or in its group"
        ) from error
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error


def _is_under_wal(path: Path) -> bool:
    """Return what the file's header says; the relay's always is, unless somebody changed that."""
    try:
        with path.open("rb") as file:
            return file.read(20)[18:] == b"\2\2"  # https://www.sqlite.org/fileformat2.html, section 1.3.3
    except PermissionError as error:
        raise ReportError(f"{path}: {NO_PERMISSION}") from error
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error


def _copied(path: Path, folder: Path) -> Path:
    copy = folder / "usage.sqlite"
    try:
        shutil.copyfile(path, copy)
        shutil.copyfile(_name_beside(path, "-wal"), f"{copy}-wal")
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror} while copying it and its -wal to {folder}") from error
    return copy


def _one_row(connection: sqlite3.Connection, columns: str, table: str) -> tuple[int, ...]:
    """Return the table's only row, zeros where it has none or a column no number."""
    row = connection.execute(f"SELECT {columns} FROM {table}").fetchone()
    return tuple(map(whole, row)) if row else (0,) * (columns.count(",") + 1)


def _sums(connection: sqlite3.Connection, table: str) -> Sums:
    return Sums(*_one_row(connection, "connections, bytes, mood_happy, mood_lonely, mood_errory", table))


def _beside(path: Path, suffix: str) -> bool:
    try:
        return os.stat(_name_beside(path, suffix)).st_size > 0
    except OSError:
        return False


def _name_beside(path: Path, suffix: str) -> str:
    """The name of what SQLite keeps beside the file: of a link, beside what it leads to."""
    return os.path.realpath(path) + suffix


def has_shm(path: Path) -> bool:
    """Return whether somebody has the database open under WAL, or has been killed while they had."""
    return _beside(path, "-shm")


def looks_of(path: Path) -> object:
    """Return what differs once somebody has written to the database or opened it for writing."""
    status = _status(path)
    return status and (status.st_mtime_ns, status.st_size, status.st_ino), _beside(path, "-wal"), _beside(path, "-shm")


def times_of(path: Path) -> object:
    """Return what differs once somebody has written to the database, whether it is in the file yet or in its -wal."""
    each = (_status(Path(_name_beside(path, suffix))) for suffix in ("", "-wal"))
    return tuple(status and (status.st_mtime_ns, status.st_size, status.st_ino) for status in each)


def _uri(path: Path, mode: str) -> str:
    return f"file:{quote(os.fsencode(path.absolute()))}?{mode}"  # a name is bytes, and need not be UTF-8


def _check_schema(path: Path, connection: sqlite3.Connection) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if application == APPLICATION_ID and version == SCHEMA_VERSION:
        return
    if application == APPLICATION_ID and version > SCHEMA_VERSION:
        raise ReportError(f"{path}: made by a newer relay-gevent (schema {version}); use that one's relay-usage")
    if {"version", "current", "usage"} <= tables:
        raise ReportError(f"{path}: the Twisted relay's database; misc/import-twisted-usage brings it into ours")
    raise ReportError(f"{path}: not a usage database of relay-gevent")


def _reason(path: Path, error: sqlite3.Error) -> str:
    text = str(error)
    if "unable to open" in text and not all(_readable(_name_beside(path, suffix)) for suffix in ("", "-wal", "-shm")):
        return NO_PERMISSION
    if "not a database" in text:
        return "not a database"
    if "malformed" in text:
        return f"it is damaged ({text}); sqlite3 {path} .recover saves what can be saved"
    return f"{text}; try again" if "locked" in text else text


def _readable(name: str) -> bool:
    return os.access(name, os.R_OK) or not os.path.exists(name)

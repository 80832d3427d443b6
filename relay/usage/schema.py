"""The database file: whose it is, its tables, how it is made and opened.

Nothing is written to a file before it is known to be the relay's, or empty.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable
from typing import Final, TypeVar

from relay.process.dataclass import dataclass
from relay.process.folders import READ_ONLY, is_read_only, why_fixed
from relay.usage.belonging import check_can_be_put_aside, note_owner, owner_of, put_aside
from relay.usage.folder import (
    BESIDE,
    AsItWas,
    alone_in,
    can_be_flushed,
    check_link,
    check_name,
    check_writable,
    why_refused,
)
from relay.usage.sqlite import sqlite3
from relay.usage.sqlite_trouble import damaged, trouble_of
from relay.usage.trouble import LOCKED_PATIENCE, Trouble, UsageError
from relay.usage.write_ahead_log import WriteAheadLog

T = TypeVar("T")

APPLICATION_ID: Final = 0x52474556
SCHEMA_VERSION: Final = 1
_MAGIC: Final = b"SQLite format 3\0"
_USER_VERSION_AT: Final = 60
_APPLICATION_ID_AT: Final = 68
"""Where both stand in the file's first page; https://www.sqlite.org/fileformat2.html, "The Database Header"."""

_LOOK_AGAIN: Final = 0.05

BUSY_SECONDS: Final = 0.25
"""How long one attempt waits for a lock; short, so that a relay that stops does not hang here."""

_SUMS = "bytes INTEGER, connections INTEGER, mood_happy INTEGER, mood_lonely INTEGER, mood_errory INTEGER"
TABLES: Final = {
    # What other people's tools read.
    "current": "connected INTEGER, waiting INTEGER, partal_bytes INTEGER",
    "since_reboot": _SUMS,
    "all_time": _SUMS,
    "usage": "started INTEGER, total_time REAL, waiting_time REAL, bytes INTEGER, result TEXT",
    # What the workers need among themselves, and the importer.
    "worker_share": "pid INTEGER, process_start TEXT, connected INTEGER, waiting INTEGER, partal_bytes INTEGER, "
    "PRIMARY KEY (pid, process_start)",
    "lifeline": "pid INTEGER, process_start TEXT, byte INTEGER, PRIMARY KEY (pid, process_start)",
    "worker_status": "pid INTEGER, process_start TEXT, gauges TEXT, counters TEXT, PRIMARY KEY (pid, process_start)",
    "service": "id INTEGER PRIMARY KEY, began INTEGER, counters TEXT",
    "refreshed": "at INTEGER",
    "imported": "source TEXT PRIMARY KEY, rows INTEGER, digest TEXT",
}
_YOUNGER: Final = ("lifeline", "worker_status", "service")
"""Tables that a database of an earlier version may lack; workers of that version go on beside them."""

ONE_ROW_TABLES: Final = {
    "current": "0, 0, 0",
    "since_reboot": "0, 0, 0, 0, 0",
    "all_time": "0, 0, 0, 0, 0",
    "refreshed": "NULL",
}


def open_database(path: str, tell: Callable[[str], None] = lambda line: None) -> sqlite3.Connection:
    """Open the relay's usage database, making it when it is missing; for programs that write to it besides the relay.

    The connection is in autocommit mode: begin each write with BEGIN IMMEDIATE. The file is under WAL.

    Args:
        path: the file.
        tell: takes what the operator should know of what was found there.

    Raises:
        UsageError: it is no usage database of this relay's, or cannot be opened; one line that begins with the path.
    """
    deadline = time.monotonic() + LOCKED_PATIENCE
    while True:
        trouble = None
        try:
            return _connect(path, None, lambda file: None, tell, flush=True)[0]
        except Trouble as trouble_itself:
            trouble = trouble_itself
        except (sqlite3.Error, OSError) as error:
            trouble = trouble_of(error, path)
        if trouble.kind != "locked" or time.monotonic() > deadline:
            raise UsageError(f"{path}: {trouble.line}")
        time.sleep(_LOOK_AGAIN)


def check_file(path: str) -> None:
    """Look whether `open_database` would take the file or make it, without touching anything. What is inside is not
    looked at, beyond whose database it is.

    Raises:
        UsageError: it would not; one line that begins with the path.
    """
    try:
        check_link(path)
        file = os.path.realpath(path)
        with alone_in(os.path.dirname(file)):
            if not _is_blank(file):
                check_can_be_put_aside(file)
        return
    except Trouble as trouble_itself:
        trouble = trouble_itself
    except (sqlite3.Error, OSError) as error:
        trouble = trouble_of(error, path)
    if not trouble.passing:
        raise UsageError(f"{path}: {trouble.line}")


@dataclass(frozen=True, slots=True)
class FormerFile:
    """A database file that had the path before, and the -wal that belongs to it and to no other."""

    file: os.stat_result
    wal: os.stat_result


@dataclass(frozen=True, slots=True)
class Opened:
    """An open database: the connection, the file's status, which tells it from one put in its place later, and what is
    beside it."""

    connection: sqlite3.Connection
    status: os.stat_result
    log: WriteAheadLog

    def close(self) -> None:
        """Close everything."""
        self.connection.close()
        self.log.close()


def connect(
    path: str, former: FormerFile | None = None, tell: Callable[[str], None] = lambda line: None, *, flush: bool = True
) -> Opened:
    """Do what `open_database` does, once, waiting for no lock on the file; and watch what is beside it.

    Args:
        path: the file.
        former: what was at this path before, if that is known.
        tell: takes what the operator should know of what was found there.
        flush: have SQLite see to it that what has to be is on the disk; not where that is refused.

    Raises:
        Trouble: the file cannot be used.
        OSError: the same; `trouble_of` says it in words.
    """
    return Opened(*_connect(path, former, WriteAheadLog, tell, flush=flush))


def _connect(
    path: str, former: FormerFile | None, watch: Callable[[str], T], tell: Callable[[str], None], *, flush: bool
) -> tuple[sqlite3.Connection, os.stat_result, T]:
    check_link(path)
    file = os.path.realpath(path)
    with alone_in(os.path.dirname(file)):
        blank = _is_blank(file)
        if os.path.exists(file) and os.path.getsize(file) == 0 and os.path.exists(file + "-wal"):
            os.unlink(file)  # emptied under other workers' connections, see put_away_if_empty
        as_it_was = AsItWas(file, blank=blank)
        if not os.path.exists(file):
            _remove_beside(file)
            _make(file)
        elif former is not None and not _is_same(file, former.file) and _is_same(file + "-wal", former.wal):
            _remove_beside(file)
        elif (line := put_aside(file)) is not None:
            tell(line)
        status, owner = os.stat(file), owner_of(file)
        flush = flush and (not blank or _may_be_flushed(file))
        # Whoever comes next waits for the folder, so nothing else is waited for here.
        connection = sqlite3.connect(_uri(file, "mode=rw"), uri=True, isolation_level=None, timeout=0.0)
        connection.text_factory = _text
        try:
            if not flush:
                connection.execute("PRAGMA synchronous = OFF")
            # Also when a kill in the middle of making it left a file that SQLite has just taken back.
            if blank or not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                _make_tables(connection)
            _check_tables(connection)
            _tune(connection)
            if blank:
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")  # once to the -wal, which may be refused
            note_owner(file, owner)
            watched = watch(file)
        except BaseException as error:
            connection.close()
            reason = _why_not(error, as_it_was) if isinstance(error, (sqlite3.Error, OSError)) else error
            if not (isinstance(reason, Trouble) and reason.kind == "locked"):
                as_it_was.restore()
            raise reason from error
    return connection, status, watched


def _text(value: bytes) -> str:
    """The text of a column, whatever bytes somebody has put there as text."""
    return value.decode("utf-8", "replace")


def _make(file: str) -> None:
    """Make the file, as the umask has it, but in any case so that its owner may use it."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & 0o600 != 0o600:
            os.fchmod(fd, mode | 0o600)
    finally:
        os.close(fd)


def _may_be_flushed(file: str) -> bool:
    with open(file, "rb") as opened:
        return can_be_flushed(opened.fileno())


def _why_not(error: Exception, as_it_was: AsItWas) -> Trouble:
    """Say why a database cannot be opened, after trying what SQLite does not tell."""
    trouble = trouble_of(error, as_it_was.file, waited=False)
    if trouble.kind == "damaged":
        return trouble
    in_use = trouble.kind == "locked"
    if not in_use:
        as_it_was.restore_beside()
    refused = why_refused(as_it_was.file, in_use=in_use)
    if refused is None:
        return trouble
    return Trouble(f"SQLite cannot keep its WAL there: {refused}; give a file on a local disk")


def put_away_if_empty(path: str, held: os.stat_result) -> None:
    """Remove a file that was emptied under its connections: they would fill it again with what they have left.

    Args:
        path: the file.
        held: the file that the connections are to; another one at this path is left alone.
    """
    file = os.path.realpath(path)
    with alone_in(os.path.dirname(file)):
        if _is_same(file, held) and os.path.getsize(file) == 0:
            os.unlink(file)


def _uri(file: str, parameters: str) -> str:
    """Name the file as https://www.sqlite.org/uri.html has it; only these three characters mean something there."""
    path = file.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return f"file:{path}?{parameters}"


def _is_same(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except FileNotFoundError:
        return False


def _remove_beside(file: str) -> None:
    """Remove what a file of this name left that was removed or moved alone; SQLite would take it for the new one's."""
    for end in BESIDE:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file + end)


Signature = tuple[int, int, int] | None
"""Inode, size and time of change of a file, None for one that is missing."""


def signature(path: str) -> Signature:
    """Return what changes when the file is repaired or replaced."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def check_all(connection: sqlite3.Connection) -> None:
    """Read the whole file, and raise Trouble if something is wrong in it."""
    (finding,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if finding != "ok":
        raise damaged(finding)


def bytes_told(beginning: bytes) -> int:
    """Return how long a database file is as its first 100 bytes have it; 0 where they do not say."""
    page_bytes = int.from_bytes(beginning[16:18], "big")
    if beginning[24:28] != beginning[92:96]:  # in-header size is not valid; https://www.sqlite.org/fileformat2.html
        return 0
    return int.from_bytes(beginning[28:32], "big") * (65536 if page_bytes == 1 else page_bytes)


def has_valid_header(beginning: bytes) -> bool:
    """Tell whether the first 100 bytes of a file are those of the relay's database."""
    application_id = beginning[_APPLICATION_ID_AT : _APPLICATION_ID_AT + 4]
    return beginning.startswith(_MAGIC) and application_id == APPLICATION_ID.to_bytes(4, "big")


def _is_blank(file: str) -> bool:
    """Look at the file without touching it: True when it is missing or has nothing in it, False when it is the relay's.

    Raises Trouble when it is something else, or may not be written.
    """
    folder = os.path.dirname(file)
    check_name(file)
    try:
        status = os.stat(file)
    except FileNotFoundError:
        check_writable(folder)
        return True
    if stat.S_ISDIR(status.st_mode):
        raise Trouble("it is a folder; name a file")
    if not stat.S_ISREG(status.st_mode):
        raise Trouble("it is not a regular file; name one, or a new one")
    for path in (file, *(file + end for end in BESIDE)):
        if (line := why_fixed(path)) is not None:
            raise Trouble(line)
    if not os.access(file, os.R_OK | os.W_OK):
        if os.access(file, os.R_OK) and is_read_only(file):
            raise Trouble(READ_ONLY)
        raise Trouble("it cannot be written; change its mode or owner")
    check_writable(folder)
    return status.st_size == 0 or _has_no_tables(file)


def _has_no_tables(file: str) -> bool:
    # Ours says so in its first bytes. SQLite must not be asked: without locks it may find the file in the middle of
    # another process's checkpoint, shorter than its header says, and call it malformed.
    with open(file, "rb") as opened:
        beginning = opened.read(100)
    if has_valid_header(beginning):
        _check_version(int.from_bytes(beginning[_USER_VERSION_AT : _USER_VERSION_AT + 4], "big"))
        return False
    # "immutable" makes SQLite read the bytes of the file and nothing else: no lock, no -wal, no -shm.
    look = sqlite3.connect(_uri(file, "mode=ro&immutable=1"), uri=True, isolation_level=None)
    with contextlib.closing(look):
        try:
            (application_id,) = look.execute("PRAGMA application_id").fetchone()
            (version,) = look.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            if "not a database" not in str(error):
                raise
            line = "it is not an SQLite database; give another file, or move this one away to have a new one made"
            raise Trouble(line, kind="damaged") from None
        tables = {name for (name,) in look.execute("SELECT name FROM sqlite_master")}
    if {"version", "current", "usage"} <= tables:
        raise Trouble(
            "it is the Twisted relay's usage database; give a new file, and bring this one in with "
            "misc/import-twisted-usage"
        )
    if tables or application_id or version:
        raise Trouble("it is another program's database; give another file")
    return True


def _check_version(version: int) -> None:
    if version > SCHEMA_VERSION:
        raise Trouble(
            f"a newer relay-gevent made it (schema {version}, this one knows {SCHEMA_VERSION}); "
            "upgrade relay-gevent or give another file"
        )


def _make_tables(connection: sqlite3.Connection) -> None:
    """All or nothing, and before the file is under WAL, so that its first page says whose it is from then on."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            for name, columns in TABLES.items():
                connection.execute(f"CREATE TABLE {name} ({columns})")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _check_tables(connection: sqlite3.Connection) -> None:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    if application_id != APPLICATION_ID:
        raise Trouble("it is another program's database; give another file")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    _check_version(version)
    for name, columns in TABLES.items():
        found = {column[1] for column in connection.execute(f"PRAGMA table_info({name})")}
        wanted = {column.split()[0] for column in columns.partition(", PRIMARY")[0].split(", ")}
        if name in _YOUNGER and not found:
            connection.execute(f"CREATE TABLE IF NOT EXISTS {name} ({columns})")
        elif not wanted <= found:
            raise damaged(f"its table {name} lacks {', '.join(sorted(wanted - found))}")


def _tune(connection: sqlite3.Connection) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise sqlite3.OperationalError("its file system cannot share a WAL between processes")
    # Under WAL this costs no fsync for a transaction. A power cut may take back the last ones, kill -9 takes none.
    if connection.execute("PRAGMA synchronous").fetchone() != (0,):
        connection.execute("PRAGMA synchronous = NORMAL")
    # What is written goes to the ends of the tables: a cache that grows with them would only keep what nobody reads.
    connection.execute("PRAGMA cache_size = -256")  # KiB
    # A reader that stays for long makes the WAL grow; this gives the disk back afterwards. In bytes.
    connection.execute("PRAGMA journal_size_limit = 16777216")
    connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # now both files beside it are there
    connection.execute(f"PRAGMA busy_timeout = {round(BUSY_SECONDS * 1000)}")

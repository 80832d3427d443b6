"""The database file: whose it is, its tables, how it is made and opened.

Nothing is written to a file before it is known to be the relay's, or empty.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from relay.usage.trouble import LOCKED_PATIENCE, Trouble, UsageError

APPLICATION_ID: Final = 0x52474556
SCHEMA_VERSION: Final = 1
_MAGIC: Final = b"SQLite format 3\0"
_USER_VERSION_AT: Final = 60
_APPLICATION_ID_AT: Final = 68
"""Where both stand in the file's first page; https://www.sqlite.org/fileformat2.html, "The Database Header"."""

_LOOK_AGAIN: Final = 0.005

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
    "refreshed": "at INTEGER",
    "imported": "source TEXT PRIMARY KEY, rows INTEGER, digest TEXT",
}
ONE_ROW_TABLES: Final = {
    "current": "0, 0, 0",
    "since_reboot": "0, 0, 0, 0, 0",
    "all_time": "0, 0, 0, 0, 0",
    "refreshed": "NULL",
}


def open_database(path: str) -> sqlite3.Connection:
    """Open the relay's usage database, making it when it is missing; for programs that write to it besides the relay.

    The connection is in autocommit mode: begin each write with BEGIN IMMEDIATE. The file is under WAL.

    Raises:
        UsageError: it is no usage database of this relay's, or cannot be opened; one line that begins with the path.
    """
    try:
        return connect(path)[0]
    except Trouble as trouble:
        raise UsageError(f"{path}: {trouble.line}") from None
    except (sqlite3.Error, OSError) as error:
        raise UsageError(f"{path}: {trouble_of(error, path).line}") from None


@dataclass(frozen=True, slots=True)
class FormerFile:
    """A database file that had the path before, and the -wal that belongs to it and to no other."""

    file: os.stat_result
    wal: os.stat_result


def connect(path: str, former: FormerFile | None = None) -> tuple[sqlite3.Connection, os.stat_result]:
    """Do what `open_database` does, and return the file's status too, which tells it from one put in its place later.

    Args:
        path: the file.
        former: what was at this path before, if that is known.

    Raises:
        Trouble: the file cannot be used.
        sqlite3.Error, OSError: the same; `trouble_of` says it in words.
    """
    file = os.path.realpath(path)
    with _alone_in(os.path.dirname(file)):
        blank = _is_blank(file)
        if os.path.exists(file) and os.path.getsize(file) == 0 and os.path.exists(file + "-wal"):
            os.unlink(file)  # emptied under other workers' connections, see put_away_if_empty
        if not os.path.exists(file):
            _remove_beside(file)
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
        elif former is not None and not _is_same(file, former.file) and _is_same(file + "-wal", former.wal):
            _remove_beside(file)
        status = os.stat(file)
        connection = sqlite3.connect(_uri(file, "mode=rw"), uri=True, isolation_level=None, timeout=BUSY_SECONDS)
        try:
            # Also when a kill in the middle of making it left a file that SQLite has just taken back.
            if blank or not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                _make_tables(connection)
            _check_tables(connection)
            _tune(connection)
        except BaseException:
            connection.close()
            raise
    return connection, status


def put_away_if_empty(path: str, held: os.stat_result) -> None:
    """Remove a file that was emptied under its connections: they would fill it again with what they have left.

    Args:
        path: the file.
        held: the file that the connections are to; another one at this path is left alone.
    """
    file = os.path.realpath(path)
    with _alone_in(os.path.dirname(file)):
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
    for beside in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file + beside)


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


def has_valid_header(beginning: bytes) -> bool:
    """Tell whether the first 100 bytes of a file are those of the relay's database."""
    application_id = beginning[_APPLICATION_ID_AT : _APPLICATION_ID_AT + 4]
    return beginning.startswith(_MAGIC) and application_id == APPLICATION_ID.to_bytes(4, "big")


def trouble_of(error: Exception, path: str) -> Trouble:
    """Say in words what SQLite or the system has against writing to the database."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return Trouble(f"cannot be used ({error.strerror or text})")
    # By their texts, which have not changed in many years: Python 3.10 does not tell the codes.
    if "locked" in text or text == "locking protocol":
        line = "another program holds its lock"
        return Trouble(line, kind="locked", passing=True, patience=LOCKED_PATIENCE, waited="locked" in text)
    if "disk is full" in text or _disk_is_full(path):
        return Trouble("no space is left on its disk", kind="full", passing=True)
    if "malformed" in text or "not a database" in text:
        return damaged(text)
    if "readonly" in text:
        return Trouble("it cannot be written; change its mode or owner, or those of its folder")
    return Trouble(f"cannot be used ({text})")


def damaged(reason: str) -> Trouble:
    """Return the trouble of a file that is broken."""
    remedy = "repair it, or move it away together with its -wal and -shm to have a new one made"
    return Trouble(f"it is damaged ({reason}); {remedy}", kind="damaged")


def _disk_is_full(path: str) -> bool:
    """SQLite says "disk I/O error" too when there is no space for its -shm file."""
    try:
        status = os.statvfs(os.path.dirname(os.path.realpath(path)))
    except OSError:
        return False
    return status.f_bavail == 0


@contextlib.contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """Let one process at a time look at the file and make it, by a lock on its folder that leaves nothing behind."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Trouble(f"its folder {folder} does not exist; make it") from None
    except NotADirectoryError:
        raise Trouble(f"{folder} is not a folder; name a file in one") from None
    except PermissionError:
        raise Trouble(f"its folder {folder} cannot be read; change its mode or owner") from None
    try:
        deadline = time.monotonic() + LOCKED_PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Trouble(f"another program holds a lock on its folder {folder}", passing=True) from None
                time.sleep(_LOOK_AGAIN)
        yield
    finally:
        os.close(fd)


def _is_blank(file: str) -> bool:
    """Look at the file without touching it: True when it is missing or has nothing in it, False when it is the relay's.

    Raises Trouble when it is something else, or may not be written.
    """
    folder = os.path.dirname(file)
    try:
        status = os.stat(file)
    except FileNotFoundError:
        _check_writable_folder(folder)
        return True
    if stat.S_ISDIR(status.st_mode):
        raise Trouble("it is a folder; name a file")
    if not stat.S_ISREG(status.st_mode):
        raise Trouble("it is not a regular file; name one, or a new one")
    if not os.access(file, os.R_OK | os.W_OK):
        raise Trouble("it cannot be written; change its mode or owner")
    _check_writable_folder(folder)
    return status.st_size == 0 or _has_no_tables(file)


def _check_writable_folder(folder: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Trouble(f"its folder {folder} cannot be written, and SQLite makes two files there; change mode or owner")


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
        if not wanted <= found:
            raise damaged(f"its table {name} lacks {', '.join(sorted(wanted - found))}")


def _tune(connection: sqlite3.Connection) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise Trouble("its file system cannot share a WAL between processes; give a file on a local disk")
    # Under WAL this costs no fsync for a transaction. A power cut may take back the last ones, kill -9 takes none.
    connection.execute("PRAGMA synchronous = NORMAL")
    # What is written goes to the ends of the tables: a cache that grows with them would only keep what nobody reads.
    connection.execute("PRAGMA cache_size = -256")  # KiB
    # A reader that stays for long makes the WAL grow; this gives the disk back afterwards. In bytes.
    connection.execute("PRAGMA journal_size_limit = 16777216")

"""The database file that the connection has open, watched from outside SQLite: is it still where it was, and whole?"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

from relay.process.dataclass import dataclass
from relay.usage import schema
from relay.usage.sqlite_trouble import damaged
from relay.usage.trouble import LOCKED_PATIENCE, Trouble
from relay.usage.write_ahead_log import Identity, WriteAheadLog, identity

_HEADER_BYTES: Final = 100

# Where SQLite's connections lock the file for reading (SHARED_FIRST and SHARED_SIZE of its os.h), as a struct flock.
_FLOCK: Final = struct.Struct("hhqqi")
_SHARED: Final = (os.SEEK_SET, 0x40000002, 510, 0)


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a file in whose place another one is: what happened to it, and to what it held."""

    what: str
    rest: str


def being_replaced() -> Trouble:
    """Return the trouble of a file that is not the one that it was a moment ago; the next attempt finds out more."""
    line = "its file is just being replaced"
    return Trouble(line, kind="locked", passing=True, patience=LOCKED_PATIENCE, waited=True)


class WatchedFile:
    """Holds the file open beside SQLite's own connection, and its -wal and -shm (`log`) as well.

    While it is held its inode number is not given to another file, so comparing numbers is safe. Closing any descriptor
    of a file drops all locks that the process has on it (fcntl(2)), SQLite's too: so it is let go of only when there is
    no connection to it.

    Args:
        path: as the operator gave it; it may be a symbolic link.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd: int | None = None
        self._is: Identity | None = None
        self._log: WriteAheadLog | None = None
        self._found_whole_at: int | None = None  # so short, in bytes, and nothing was missing all the same

    @property
    def fd(self) -> int:
        """The file, open for reading."""
        assert self._fd is not None
        return self._fd

    @property
    def log(self) -> WriteAheadLog:
        """Its -wal and -shm."""
        assert self._log is not None
        return self._log

    def former(self) -> schema.FormerFile | None:
        """Return which file and which -wal belong together, for when the path names another file."""
        if self._fd is None or self._log is None:
            return None
        return schema.FormerFile(os.fstat(self._fd), os.fstat(self._log.wal_fd))

    def hold(self, status: os.stat_result, log: WriteAheadLog) -> Fate | None:
        """Watch the file that was just opened, which had this `status`, and what is beside it.

        Returns:
            what became of the one that was held before, None if it is the same or the first.

        Raises:
            Trouble: someone put another file there in between; then `log` is still the caller's.
        """
        if self._fd is not None and os.path.samestat(os.fstat(self._fd), status):
            self._forget_log()
            self._log = log
            return None
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        if not os.path.samestat(os.fstat(fd), status):
            os.close(fd)
            raise being_replaced()
        fate = self._fate()
        self.forget()
        self._fd = fd
        self._is = identity(status)
        self._log = log
        return fate

    def _fate(self) -> Fate | None:
        if self._fd is None:
            return None
        if os.fstat(self._fd).st_nlink == 0:
            return Fate("the file was deleted while the relay ran", "is lost")
        return Fate("the file was moved away while the relay ran", "stays in it")

    def is_where_it_was(self) -> bool:
        """Tell whether the path still names the held file, and something is in it."""
        try:
            named = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return named.st_size > 0 and identity(named) == self._is

    def put_away_if_empty(self) -> None:
        """Remove the file when it was emptied, which is then no different from its having been removed."""
        if self._fd is not None and os.fstat(self._fd).st_size == 0:
            schema.put_away_if_empty(self._path, os.fstat(self._fd))

    def has_its_log(self) -> bool:
        """Tell whether the -wal and the -shm that belong to the held file are still there by their names."""
        return self._log is None or (self._log.has_wal() and self._log.has_index())

    @contextlib.contextmanager
    def left_alone(self) -> Iterator[None]:
        """Meanwhile the last connection to the held file may be closed without more ado.

        SQLite would remove the -wal and the -shm with it, by their names; these may be those of a new file, in which
        another worker has begun to record. It does not when it finds the file in use: a lock of the open file
        description's (fcntl_locking(2)) counts as somebody else's even here.
        """
        if self._fd is None:
            yield
            return
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, *_SHARED))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, *_SHARED))

    def check(self) -> None:
        """Raise Trouble when the beginning of the held file was overwritten, or its end cut off; SQLite may not notice
        for a long time, and fills the hole with zeros when it writes behind it."""
        if self._fd is None:
            return
        if not schema.has_valid_header(os.pread(self._fd, _HEADER_BYTES, 0)):
            raise damaged("its first bytes were overwritten")
        self.check_end()

    def check_end(self) -> None:
        """Raise Trouble when the end was cut off."""
        if self.is_cut_short():
            raise damaged("it was cut short")

    def is_cut_short(self) -> bool:
        """Tell whether pages are missing at the end of the held file that are not in its log either.

        Somebody who copies the log into the file begins with the first page, which tells the new length.
        """
        if self._fd is None or self._log is None:
            return False
        beginning = os.pread(self._fd, _HEADER_BYTES, 0)
        told, size = schema.bytes_told(beginning), os.fstat(self._fd).st_size
        if size >= told or size == self._found_whole_at:
            return False
        page_bytes = told // int.from_bytes(beginning[28:32], "big")
        logged = self._log.pages()
        missing = range(size // page_bytes + 1, told // page_bytes + 1)
        return logged is not None and not logged.issuperset(missing) and os.fstat(self._fd).st_size == size

    def found_whole(self) -> None:
        """Note that SQLite has read all of the held file, and missed nothing."""
        if self._fd is not None:
            self._found_whole_at = os.fstat(self._fd).st_size

    def let_go_of_index(self) -> None:
        """To be called when a connection was closed, before there is another."""
        if self._log is not None:
            self._log.let_go_of_index()

    def forget(self) -> None:
        """Let go of the file and of what is beside it; there must be no connection to it."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = self._is = None
        self._forget_log()

    def _forget_log(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log = None

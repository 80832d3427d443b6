"""The folder that the database is in: one process at a time makes files there, if any may, and if they will do; and if
nothing comes of it, all is as it was."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Final

from relay.process.folders import READ_ONLY, can_make_files_in, why_fixed
from relay.usage.trouble import LOCKED_PATIENCE, Trouble

BESIDE: Final = ("-wal", "-shm")
"""What SQLite keeps beside a database that is open, by the ends of the names."""

FORMER: Final = "-wal.former"
"""By which name the relay keeps a -wal that another database has left."""

JOURNAL: Final = "-journal"
"""What SQLite keeps beside one that is not under WAL, and deletes beside any if it finds something else in it."""

ENDS: Final = (*BESIDE, JOURNAL, FORMER)
"""The ends of all names that are SQLite's or the relay's beside a database."""

_LOOK_AGAIN: Final = 0.005
_TRIAL_BYTES: Final = 32768
"""As much as SQLite shares between processes at first."""

_NOBODYS_BYTE: Final = (1 << 62) - 1
"""Neither SQLite's nor that of a lifeline."""

_OF_THE_DISK: Final = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""What says that flushing was tried, and has failed."""


_OF_THE_MOMENT: Final = (*_OF_THE_DISK, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What says nothing of the folder."""


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Let one process at a time look at the file and make it, by a lock on its folder that leaves nothing behind.

    Nobody waits for anything else while holding it. Where there are no such locks the relay does without: two workers
    that make the database in the same instant may then take turns in finding it half made.

    Raises:
        Trouble: the folder cannot be used, or somebody else keeps the lock.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Trouble(f"its folder {folder} does not exist; make it") from None
    except NotADirectoryError:
        raise Trouble(f"{folder} is not a folder; name a file in one") from None
    except PermissionError:
        raise Trouble(f"its folder {folder} cannot be read; change its mode or owner") from None
    try:
        _lock(fd, folder)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, folder: str) -> None:
    deadline = time.monotonic() + LOCKED_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Trouble(f"another program holds a lock on its folder {folder}", passing=True) from None
            time.sleep(_LOOK_AGAIN)
        except OSError:
            break


def check_writable(folder: str) -> None:
    """Raise Trouble unless files can be made in the folder; on a full disk they can, for a start may have to wait."""
    if (line := why_fixed(folder)) is not None:  # append-only is too little, too: files are removed as well
        raise Trouble(line)
    if can_make_files_in(folder):
        return
    try:
        with _trial_file(folder):
            pass
    except PermissionError:
        raise Trouble(
            f"its folder {folder} cannot be written, and SQLite makes two files there; change mode or owner"
        ) from None
    except OSError as error:
        if error.errno == errno.EROFS:
            raise Trouble(READ_ONLY) from None
        if error.errno not in _OF_THE_MOMENT:
            raise Trouble(
                f"no file can be made in its folder {folder} ({error.strerror}); give one elsewhere"
            ) from None


def check_name(file: str) -> None:
    """Raise Trouble for a name that leaves no room for the names of what SQLite makes beside the file."""
    if any(_is_too_long(file + end) for end in ("", *BESIDE, JOURNAL)):
        raise Trouble("its name is too long, with what SQLite adds to it; give a shorter one")


def _is_too_long(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


@contextlib.contextmanager
def _trial_file(folder: str) -> Iterator[int]:
    """A file that is there only as long as this looks at what can be done with one; raises OSError."""
    path = os.path.join(folder, f".relay-gevent-trial-{os.getpid()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.unlink(path)
        yield fd
    finally:
        os.close(fd)


def check_link(path: str) -> None:
    """Raise Trouble for a link by which another user than root decides which file is used, or made."""
    if os.path.islink(path) and os.lstat(path).st_uid not in (0, os.geteuid()):
        raise Trouble("it is a link that belongs to another user; name the file itself")


class AsItWas:
    """What there was of a database that is to be made or opened, so that a failure leaves nothing else behind."""

    def __init__(self, file: str, *, blank: bool) -> None:
        self.file = file
        self._is_new = not os.path.exists(file)
        self._before = b""
        self._blank = blank
        self._beside = [file + end for end in BESIDE if not os.path.exists(file + end)]
        if blank and not self._is_new:
            with open(file, "rb") as opened:
                self._before = opened.read()  # a few pages, since there is no table

    def restore(self) -> None:
        """To be called without a connection, before anybody else may look at the folder."""
        with contextlib.suppress(OSError):
            if self._is_new:
                os.unlink(self.file)
            elif self._blank:
                with open(self.file, "r+b") as opened:
                    opened.write(self._before)
                    opened.truncate()
        self.restore_beside()

    def restore_beside(self) -> None:
        """The same, but leave the file itself."""
        for path in self._beside:
            with contextlib.suppress(OSError):
                if self._blank or not path.endswith("-wal") or os.path.getsize(path) == 0:
                    os.unlink(path)


def can_be_flushed(fd: int) -> bool:
    """Tell whether an open file can be made to be on the disk; False where even trying is refused."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        return error.errno in _OF_THE_DISK
    return True


def why_refused(file: str, *, in_use: bool) -> str | None:
    """Try what SQLite needs to share the database `file` between processes: return what the file system, or a sandbox,
    refuses of it, None if nothing is found. To be called without a connection, alone in the folder.

    SQLite itself says no more than "disk I/O error", or that somebody else holds a lock.

    Args:
        file: its path.
        in_use: whether another program may have it open.
    """
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        lack = _why_not_locked(opened.fileno())
        if lack is not None or in_use:
            return lack
    shared = file + "-shm"
    is_new = not os.path.exists(shared)
    with contextlib.suppress(OSError):
        fd = os.open(shared, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if is_new:
                os.ftruncate(fd, _TRIAL_BYTES)
            return _why_not_locked(fd) or _why_not_shared(fd)
        finally:
            os.close(fd)
            if is_new:
                os.unlink(shared)
    return None


def _why_not_locked(fd: int) -> str | None:
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _NOBODYS_BYTE)
    except BlockingIOError:
        return None
    except OSError as error:
        return f"files cannot be locked there ({error.strerror})"
    return None


def _why_not_shared(fd: int) -> str | None:
    import mmap  # not before: it is needed when something is wrong

    try:
        mmap.mmap(fd, _TRIAL_BYTES, mmap.MAP_SHARED).close()
    except ValueError:
        return None  # shorter than it should be
    except OSError as error:
        return f"processes cannot share memory through a file there (mmap: {error.strerror})"
    return None

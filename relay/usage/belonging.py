"""Which database file a -wal belongs to: not the one that an operator has put there while a killed worker's -wal lay
beside it.

SQLite takes a -wal for that of whatever file has the name that goes with it, copies its pages into that one, and so
makes a backup that was put in place the old database again, or a mixture of both. Two things tell that it is not so:

- The file's own header. One that was in use under WAL says so from before its -wal is made until after that is gone
  (https://www.sqlite.org/fileformat2.html, "File format version numbers"); a copy by VACUUM INTO or .dump does not.
- What is noted on the -wal itself when a database is opened: which inodes both are. In a copy of the whole folder,
  where they belong together, both are others. Where a file system takes no such notes, the header has to do.

Neither sees a copy of a file under WAL that was written over the file itself (cp), which docs/usage-logs.md tells.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Final

from relay.usage.folder import FORMER
from relay.usage.trouble import Trouble

_NOTE: Final = "user.relay-gevent.database"

_GET_GENERATION: Final = 0x80087601
"""FS_IOC_GETVERSION (linux/fs.h). ext4, XFS and btrfs answer, with a number at random for each inode that is made."""

_VERSIONS_AT: Final = 18
_NO_WAL: Final = b"\1\1"


def owner_of(file: str) -> bytes:
    """Return what tells a database file from others of its name. To be called while there is no connection to it:
    SQLite's locks would go with the descriptor that is closed here (fcntl(2)).

    Raises:
        OSError: it cannot be opened.
    """
    return _identity(file)


def note_owner(file: str, owner: bytes) -> None:
    """Note on the -wal of a database that is open which file it belongs to, where that can be done."""
    wal = file + "-wal"
    with contextlib.suppress(OSError):
        note = owner + b" " + _identity(wal)  # closed again, too: SQLite has no locks on a -wal
        if _noted(wal) != note:
            os.setxattr(wal, _NOTE, note)


def is_of_another(file: str) -> bool:
    """Tell whether there is something in the -wal beside `file`, and that is another database's. To be called while
    there is no connection to it, as `owner_of`.

    Raises:
        OSError: this cannot be told.
    """
    try:
        return os.path.getsize(file + "-wal") > 0 and (_has_never_had_one(file) or _is_noted_of_another(file))
    except FileNotFoundError:
        return False


def check_can_be_put_aside(file: str) -> None:
    """Raise Trouble for what `put_aside` would end with, as far as that can be told without trying it."""
    kept = _kept(file)
    if os.path.isdir(kept) and not os.path.islink(kept) and is_of_another(file):
        raise Trouble(
            f"there is a folder by the name of {kept}, where the -wal has to go that another database has left beside "
            "it; rename that folder, or remove that -wal"
        )


def put_aside(file: str) -> str | None:
    """Take the name from a -wal that is beside `file` and of another database, before SQLite is asked to open it.

    It is kept, as nobody but the operator can tell whether that database is missed. To be called on a folder that
    nobody else opens a database in meanwhile.

    Returns:
        what to tell the operator; None when there is no such -wal.

    Raises:
        Trouble: the name cannot be taken away; the line says why.
        OSError: the -wal cannot be looked at.
    """
    if not is_of_another(file):
        return None
    check_can_be_put_aside(file)
    kept = _kept(file)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file + "-shm")
        os.replace(file + "-wal", kept)
    except OSError as error:
        raise Trouble(
            f"the -wal that another database has left beside it cannot be renamed to {kept} ({error.strerror}); "
            "rename or remove it"
        ) from None
    return (
        "another file was put in its place, beside the -wal of the one before, which SQLite would have copied into it; "
        f"that is {kept} now, and the records go on in the file that is there"
    )


def _kept(file: str) -> str:
    return file + FORMER


def _has_never_had_one(file: str) -> bool:
    """To be asked when there is a -wal: a first worker makes it when the header has told of it."""
    with open(file, "rb") as opened:
        return opened.read(_VERSIONS_AT + 2)[_VERSIONS_AT:] == _NO_WAL


def _is_noted_of_another(file: str) -> bool:
    of, _, itself = _noted(file + "-wal").partition(b" ")
    return itself == _identity(file + "-wal") and of != _identity(file)


def _noted(wal: str) -> bytes:
    try:
        return os.getxattr(wal, _NOTE)
    except OSError:
        return b""


def _identity(path: str) -> bytes:
    """The inode number, and what tells an inode from others that had the number before."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        generation = b"-"
        with contextlib.suppress(OSError):
            generation = fcntl.ioctl(fd, _GET_GENERATION, bytes(8)).hex().encode()
        return b"%d:%s" % (os.fstat(fd).st_ino, generation)
    finally:
        os.close(fd)

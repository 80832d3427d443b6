"""The -wal and the -shm of the open database, watched from outside SQLite: still there by their names, still whole?

SQLite trusts them while they are open: it takes pages from the -wal as they are, and in the end copies them into the
database. Checksums are compared only by who opens the database after a crash, and whatever follows the first wrong one
is dropped without a word. So whoever overwrites a -wal breaks the database, and nobody is told. Here is looked at, in a
few reads, whether the log still is the one that the -shm describes.

The layout of both is in https://www.sqlite.org/walformat.html.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from typing import Final

from relay.process.dataclass import dataclass

_WAL_HEADER: Final = struct.Struct(">III4x8s8x")  # magic, version, page size, salts; then a checksum
_WAL_MAGIC: Final = (0x377F0682, 0x377F0683)
_FRAME_HEADER: Final = struct.Struct(">8x8sII")  # salts, checksum
_INDEX_HEADER: Final = struct.Struct("=12xBxHII2I8s8x")  # is set up, page size, last frame, pages, its checksum, salts
_INDEX_BYTES: Final = 100
"""Two copies of the header, and how many frames have been copied into the database."""

_INDEX_BLOCK: Final = 32768
"""The -shm has one of these at least, and processes map it; bytes."""

_WRITE_LOCK: Final = (os.SEEK_SET, 120, 1, 0)
_FLOCK: Final = struct.Struct("hhqqi")
_LOCK_SECONDS: Final = 1.0
_LOOK_AGAIN: Final = 0.005

_AT_ONCE: Final = 64  # frames

CHECKPOINT_FRAMES: Final = 1000
"""Pages in the log from which on they are copied into the database, as SQLite would by itself."""

AGAIN_FRAMES: Final = 100
"""After how many more it is tried again when somebody kept some of them from being copied: the log begins anew only
when all are."""


class StillInUse(Exception):
    """Another worker writes to the log at the moment."""


@dataclass(frozen=True, slots=True)
class _Index:
    """What the -shm says of the log: its frames, the checksum of the last of them, the salts that all of them have."""

    page_size: int
    frames: int
    copied: int
    checksum: tuple[int, int]
    salts: bytes


class WriteAheadLog:
    """Both files, held open beside SQLite's own descriptors, so that their inode numbers are given to no others.

    Args:
        database: path of the database file, without links. SQLite must have both files open by now.

    Raises:
        OSError: one of them cannot be opened.
    """

    def __init__(self, database: str) -> None:
        self.wal = database + "-wal"
        self._shm = database + "-shm"
        self.wal_fd = os.open(self.wal, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._shm_fd = os.open(self._shm, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            os.close(self.wal_fd)
            raise
        self._shm_bytes = _INDEX_BLOCK
        self._are = (identity(os.fstat(self.wal_fd)), identity(os.fstat(self._shm_fd)))
        self._frames = 0  # when the log was looked at last
        self._copied_at = 0  # how many there were when it was due

    def let_go_of_index(self) -> None:
        """Close the -shm. Closing it drops all locks that the process has on it (fcntl(2)), SQLite's too: so there must
        be no connection any more, and no new one yet."""
        if self._shm_fd >= 0:
            os.close(self._shm_fd)
        self._shm_fd = -1

    def close(self) -> None:
        """Let go of both; there must be no connection."""
        self.let_go_of_index()
        os.close(self.wal_fd)  # SQLite has no locks on a -wal that this would drop

    # Are they there?

    def has_wal(self) -> bool:
        """Tell whether the -wal is still there by its name."""
        return is_named(self.wal, self._are[0])

    def has_index(self) -> bool:
        """Tell whether the -shm is still there by its name. Who comes without one makes another, and then neither sees
        the other's locks."""
        return self._shm_fd < 0 or is_named(self._shm, self._are[1])

    def mend_index(self) -> bool:
        """Make a -shm that was cut short as long as it was, before SQLite looks at it and the process dies of SIGBUS.

        SQLite finds zeros in it then, and fills it again from the -wal. Returns whether there was something to do.
        """
        size = os.fstat(self._shm_fd).st_size
        if size >= self._shm_bytes:
            self._shm_bytes = size
            return False
        os.ftruncate(self._shm_fd, self._shm_bytes)
        return True

    # Are they whole?

    def can_be_read(self) -> bool:
        """Tell whether this process may look into the -shm; a sandbox may refuse it."""
        try:
            return len(os.pread(self._shm_fd, 1, 0)) == 1
        except OSError:
            return False

    def is_broken(self, *, every_frame: bool, locked: bool = False) -> bool:
        """Tell whether the log is not the one that the -shm describes.

        Args:
            every_frame: look at all that is not in the database yet, and not only at the beginning and the end.
            locked: nobody else can write meanwhile.
        """
        with contextlib.suppress(OSError):  # it cannot be read, as SQLite will say if it is so for it, too
            return self._is_broken(every_frame=every_frame, locked=locked)
        return False

    def _is_broken(self, *, every_frame: bool, locked: bool) -> bool:
        for _ in range(1 if locked else 10):
            index = self._index()
            self._frames = 0 if index is None else index.frames
            if index is None or not index.frames:
                return False
            broken = not self._fits(index, every_frame=every_frame)
            if not broken or locked or self._index() == index:
                return broken  # and not because the log has begun anew meanwhile
        return False

    def has_left_over(self) -> bool:
        """Tell whether SQLite has left something out when it read the log anew. Asked when nobody else has it open, in
        the first transaction after that.

        It stops at the first checksum that is wrong. When a worker was killed there is nothing behind, or the
        beginning of a transaction; the end of one says that there was more.
        """
        try:
            index = self._index()
            header = os.pread(self.wal_fd, _WAL_HEADER.size, 0)
        except OSError:
            return False
        if index is None or len(header) < _WAL_HEADER.size:
            return False
        magic, _, _, salts = _WAL_HEADER.unpack(header)
        if magic not in _WAL_MAGIC:
            return index.frames == 0
        if salts != index.salts:
            return False  # to be begun anew
        frame_bytes = _FRAME_HEADER.size + index.page_size
        at = _WAL_HEADER.size + index.frames * frame_bytes
        while len(frame := os.pread(self.wal_fd, _FRAME_HEADER.size, at)) == _FRAME_HEADER.size:
            if frame[8:16] == salts and frame[4:8] != bytes(4):
                return True
            at += frame_bytes
        return False

    def is_due(self) -> bool:
        """Tell whether so much was in the log, when it was looked at last, that it is to be copied into the database.

        Once for each thousand frames, unless it is told that `some_stay`.
        """
        if self._frames < self._copied_at:
            self._copied_at = 0
        if self._frames < self._copied_at + CHECKPOINT_FRAMES:
            return False
        self._copied_at = self._frames
        return True

    def some_stay(self) -> None:
        """When they were due, not all could be copied: another worker wrote, or a reader still needs them."""
        self._copied_at += AGAIN_FRAMES - CHECKPOINT_FRAMES

    def _index(self) -> _Index | None:
        """Return None for one that is not set up, or is being written this moment."""
        if self._shm_fd < 0:
            return None
        both = os.pread(self._shm_fd, _INDEX_BYTES, 0)
        size = _INDEX_HEADER.size
        if len(both) < _INDEX_BYTES or both[:size] != both[size : 2 * size]:
            return None
        is_set_up, page_size, frames, _, *checksum, salts = _INDEX_HEADER.unpack(both[:size])
        if not is_set_up:
            return None
        (copied,) = struct.unpack_from("=I", both, 2 * size)
        page_bytes = (page_size & 0xFE00) + ((page_size & 1) << 16)
        return _Index(page_bytes, frames, copied, (checksum[0], checksum[1]), salts)

    def _fits(self, index: _Index, *, every_frame: bool) -> bool:
        header = os.pread(self.wal_fd, _WAL_HEADER.size, 0)
        if len(header) < _WAL_HEADER.size:
            return False
        magic, _, page_size, salts = _WAL_HEADER.unpack(header)
        if magic not in _WAL_MAGIC or page_size != index.page_size or salts != index.salts:
            return False
        frame_bytes = _FRAME_HEADER.size + index.page_size
        last = os.pread(self.wal_fd, _FRAME_HEADER.size, _WAL_HEADER.size + (index.frames - 1) * frame_bytes)
        if len(last) < _FRAME_HEADER.size or _FRAME_HEADER.unpack(last) != (index.salts, *index.checksum):
            return False
        return not every_frame or self._all_have_salts(index, frame_bytes)

    def _all_have_salts(self, index: _Index, frame_bytes: int) -> bool:
        for first in range(index.copied, index.frames, _AT_ONCE):
            count = min(_AT_ONCE, index.frames - first)
            frames = os.pread(self.wal_fd, count * frame_bytes, _WAL_HEADER.size + first * frame_bytes)
            salts = [frames[begin + 8 : begin + 16] for begin in range(0, count * frame_bytes, frame_bytes)]
            if salts != [index.salts] * count:
                return False
        return True

    def pages(self) -> set[int] | None:
        """Return the numbers of the database's pages that are in the log; None when that cannot be told this moment."""
        index = self._index()
        if index is None:
            return None
        frame_bytes = _FRAME_HEADER.size + index.page_size
        starts = range(_WAL_HEADER.size, _WAL_HEADER.size + index.frames * frame_bytes, frame_bytes)
        return {int.from_bytes(os.pread(self.wal_fd, 4, start), "big") for start in starts}

    # When they are not

    def put_away(self) -> bool | None:
        """Have everybody begin anew with what is good in a broken log, which SQLite finds when it opens the database.

        Both names are taken from the files: whoever has these open finds them gone, sees that the log is broken, and
        lets go of it. To be called on a folder that nobody else opens a database in meanwhile.

        Returns:
            whether something that was in it is not in the database; None if somebody else has done it.

        Raises:
            StillInUse: another worker writes this moment.
            OSError: the names cannot be taken away.
        """
        if not self.has_wal():
            return None
        index = self._index()
        if self.has_index():
            self._keep_writers_out()
            try:
                self._replace_by_copy()
            except OSError:  # as when no space is left: then what was good in it is lost, too
                os.unlink(self.wal)
            os.unlink(self._shm)
        return index is None or index.copied < index.frames

    def _replace_by_copy(self) -> None:
        import shutil  # not before: it is hardly ever needed, and takes as much memory as SQLite

        copy = f"{self.wal}.{os.getpid()}"
        owner = os.fstat(self.wal_fd)
        try:
            shutil.copyfile(self.wal, copy)
            shutil.copymode(self.wal, copy)
            with contextlib.suppress(PermissionError):
                os.chown(copy, owner.st_uid, owner.st_gid)
            os.replace(copy, self.wal)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(copy)
            raise

    def _keep_writers_out(self) -> None:
        """Take the lock that SQLite's writers take. It goes when the -shm is closed; nobody needs it any more then."""
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.fcntl(self._shm_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, *_WRITE_LOCK))
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StillInUse from None
                time.sleep(_LOOK_AGAIN)


Identity = tuple[int, int]


def identity(status: os.stat_result) -> Identity:
    """Return what tells a file from all others, as long as somebody has it open."""
    return (status.st_dev, status.st_ino)


def is_named(path: str, file: Identity) -> bool:
    """Tell whether the path names that file."""
    try:
        return identity(os.stat(path)) == file
    except FileNotFoundError:
        return False

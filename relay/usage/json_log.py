"""Destination: one JSON line for each record, to a file descriptor that the relay was started with.

What is written at a time is whole lines of 4096 bytes at the most, so that the lines of several workers on one pipe or
file never mix: pipe(7), PIPE_BUF. The descriptor may be a file, a pipe, a socket or a terminal, blocking or not; it is
never closed. A file is written at its end, however it was opened.

Of a FIFO that was opened for both reading and writing, so that a shell did not wait for its reader, only the end for
writing is kept: with the other one in this process's own hands nobody would notice that there is no reader.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Set as AbstractSet

from relay.usage.folder import ENDS
from relay.usage.record import Record, blur
from relay.usage.reopen import FollowedFile, hindrance, other_name
from relay.usage.trouble import LOCKED_PATIENCE, Trouble, UsageError
from relay.usage.writer import Request, Warn

_STALL_MS = 250
"""How long one attempt waits for the log's reader, in milliseconds."""

_NO_LINES = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a disk"}
"""What may be open, but takes no lines."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def check_log_fd(fd: int, usage_db: str | None = None, opened_as: str | None = None) -> None:
    """Raise UsageError unless JSON lines can go to `fd`, and, once that is renamed, to `opened_as`; or where either is
    of a database at `usage_db`.

    Best asked before the process opens anything itself: a number that the operator forgot to open may be something of
    the relay's own by then, such as the socket it listens on.
    """
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
    except (OSError, OverflowError, ValueError):
        raise UsageError(not_open(fd)) from None
    flags = _flags(fd)
    if kind in _NO_LINES:
        raise UsageError(f"--log-fd {fd}: it is {_NO_LINES[kind]}; open a file, as in {fd}>>usage.json")
    if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR) or _is_listening(fd, kind):
        raise UsageError(not_open(fd))
    if flags is not None and flags & os.O_ACCMODE == os.O_RDONLY:
        raise UsageError(f"--log-fd {fd}: it is open for reading only; open it for writing, as in {fd}>>usage.json")
    if usage_db is not None:
        _check_apart(fd, usage_db)
        if opened_as is not None and os.path.realpath(opened_as) in _files_of(usage_db):
            raise UsageError(
                f"--log-path {opened_as}: it is of the database that --usage-db names, {usage_db}; "
                "give each a file of its own"
            )
    if opened_as is not None and kind == stat.S_IFREG:
        reason = hindrance(opened_as)
        if reason is not None:
            raise UsageError(f"--log-path {opened_as}: {reason}; name the file that --log-fd {fd} was opened as")


def renamed_or_mistaken(fd: int, opened_as: str) -> str | None:
    """What to tell the operator where `fd` writes to a file of another path than `opened_as`. That is right when the
    file was renamed a moment ago, and otherwise takes the lines to where nobody looks for them."""
    path = other_name(fd, opened_as)
    if path is None:
        return None
    return (
        f"--log-path {opened_as}: the lines go there, and not to {path}, which fd {fd} is open for; "
        "if that was not renamed just now, name the file that the shell opens"
    )


def _files_of(usage_db: str) -> list[str]:
    return [os.path.realpath(usage_db) + beside for beside in ("", *ENDS)]


def _check_apart(fd: int, usage_db: str) -> None:
    """Raise UsageError where the lines would go into the database, or into what SQLite keeps beside it."""
    status = os.fstat(fd)
    for beside, path in zip(("", *ENDS), _files_of(usage_db), strict=True):
        try:
            is_same = os.path.samestat(status, os.stat(path))
        except (OSError, ValueError):
            continue  # the shell has made the file of the lines already, so this is none
        if is_same:
            what = f"the {beside} of the file" if beside else "the file"
            raise UsageError(
                f"--log-fd {fd}: it is {what} that --usage-db names, {usage_db}; give each a file of its own"
            )


def _flags(fd: int) -> int | None:
    """How it was opened; None where the kernel or a sandbox does not tell."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError:
        return None


def not_open(fd: int) -> str:
    """What there is to say of a number that is not open, or something of this process's own."""
    return f"--log-fd {fd}: it is not open; have the shell open it, as in {fd}>>usage.json"


def _is_listening(fd: int, kind: int) -> bool:
    """Tell a listening socket, on which nobody means to read lines: it is the relay's own."""
    if kind != stat.S_IFSOCK:
        return False
    try:
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            return bool(duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False  # not told; writing to it will


def _append(fd: int) -> None:
    """Have each line go to the end of a file, also one that the shell opened with > and not with >>: otherwise workers
    that opened it each by themselves write over each other's. Where that is refused it stays as it was opened."""
    flags = _flags(fd)
    if flags is None or flags & os.O_APPEND or not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_APPEND)


def _be_no_reader(fd: int) -> None:
    """Let go of a FIFO's end for reading; where that cannot be, lines go into it until it is full."""
    flags = _flags(fd)
    if flags is None or flags & os.O_ACCMODE != os.O_RDWR or not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return
    try:
        # Open as long as `fd` is, so there is nothing to wait for.
        writing = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.dup2(writing, fd, inheritable=os.get_inheritable(fd))
    finally:
        os.close(writing)


def encode(record: Record) -> bytes:
    """Return the record as a line of JSON: its five keys, in the order in which the relay has always had them."""
    waiting = "null" if record.waiting_time is None else repr(record.waiting_time)
    return (
        f'{{"started": {record.started!r}, "total_time": {record.total_time!r}, "waiting_time": {waiting}, '
        f'"total_bytes": {record.total_bytes}, "mood": "{record.mood}"}}\n'
    ).encode("ascii")


class JsonLog:
    """The JSON lines on one file descriptor; used by one thread.

    Args:
        fd: open for writing (`check_log_fd`).
        blur_seconds: as `--blur-usage` has it.
        warn: writes a line to the relay's own log.
        opened_as: the path that `fd` was opened as, as far as that is known.
    """

    def __init__(self, fd: int, blur_seconds: int | None, warn: Warn, opened_as: str | None = None) -> None:
        self.name = f"JSON lines on fd {fd}"
        self.option = f"--log-fd {fd}"
        self._fd = fd
        self._blur_seconds = blur_seconds
        self._warn = warn
        self._file = FollowedFile(fd, opened_as)
        _be_no_reader(fd)
        _append(fd)
        self._told_of_rotation = False
        self._rest = b""  # of the line of the oldest kept record, when part of it is written
        self._poll: select.poll | None = None
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        self._joins_lines = kind in (stat.S_IFREG, stat.S_IFIFO)
        if kind != stat.S_IFREG:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLOUT)

    def write(self, kept: deque[Record], requests: AbstractSet[Request]) -> None:
        """Write the kept records, oldest first, taking out each whose line is whole.

        Raises:
            Trouble: the next line cannot be written now, or not whole.
        """
        if not self._rest:
            self._follow_rotation()
        while kept:
            lines = [self._rest] if self._rest else self._next_lines(kept)
            written = self._write_some(b"".join(lines))
            for line in lines:
                written -= len(line)
                if written < 0:
                    self._keep_rest(line, written + len(line))
                    break
                self._rest = b""
                kept.popleft()

    def close(self) -> None:
        """Leave the descriptor to whoever opened it."""

    def _follow_rotation(self) -> None:
        try:
            self._file.follow()
        except OSError as error:
            if not self._told_of_rotation:
                self._told_of_rotation = True
                reason = f"its file was renamed and a new one cannot be made ({error.strerror})"
                self._warn(f"{self.name}: {reason}; the lines go on into the old one until it can")
        else:
            self._told_of_rotation = False

    def _next_lines(self, kept: deque[Record]) -> list[bytes]:
        """The lines of the oldest records that may go out in one piece: of one, where that may be a datagram."""
        lines: list[bytes] = []
        size = 0
        for record in kept:
            line = encode(blur(record, self._blur_seconds))
            size += len(line)
            if lines and (size > select.PIPE_BUF or not self._joins_lines):
                break
            lines.append(line)
        return lines

    def _write_some(self, lines: bytes) -> int:
        try:
            self._wait_for_reader()
            return os.write(self._fd, lines)
        except BlockingIOError:
            raise _stalled(waited=False) from None
        except OSError as error:
            raise _trouble(error) from error

    def _keep_rest(self, line: bytes, written: int) -> None:
        """Only so many bytes of `line` were written."""
        if written and self._take_back(written):
            self._rest = b""
            raise _full()
        self._rest = line[written:] if written else self._rest  # if there is no space for it, the next attempt says so

    def _wait_for_reader(self) -> None:
        # Asked before each line, also when the descriptor blocks: a thread inside write() could not tell anybody.
        if self._poll is not None and not self._poll.poll(_STALL_MS):
            raise _stalled(waited=True)

    def _take_back(self, written: int) -> bool:
        """Remove the part of a line for whose rest the disk had no space; False: it has to be completed later.

        Otherwise another worker's line, when that comes first once there is space, would end up in the middle of ours.
        """
        flags = _flags(self._fd)
        if self._poll is not None or flags is None or not flags & os.O_APPEND:
            return False
        try:
            end = os.lseek(self._fd, 0, os.SEEK_CUR)
            if os.fstat(self._fd).st_size != end:
                return False
            os.ftruncate(self._fd, end - written)
        except OSError:
            return False
        return True


def _stalled(*, waited: bool) -> Trouble:
    line = "its reader does not keep up"
    return Trouble(line, kind="stalled", passing=True, patience=LOCKED_PATIENCE, waited=waited)


def _full() -> Trouble:
    return Trouble("no space is left on its disk", kind="full", passing=True)


def _trouble(error: OSError) -> Trouble:
    if error.errno in _NO_SPACE:
        return _full()
    if error.errno == errno.EFBIG:
        return Trouble("its file is as large as it may be; raise the limit (ulimit -f), or rotate it", passing=True)
    if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN):
        return Trouble("its reader is gone; start it again", kind="gone", passing=True)
    return Trouble(f"cannot be written ({error.strerror})", passing=True)

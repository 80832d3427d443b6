"""The JSON log's file after it was rotated: notice that the path names another file now, and write there.

The shell opens the log (`3>>usage.jsonl`) and the relay only inherits the descriptor, so a renamed file would be
written to for ever. Truncating it in place instead (logrotate's `copytruncate`) loses the lines that come between the
copy and the cut. So the relay asks, between two lines, whether the path still names the file it writes to. No signal
and no process id is needed, and every worker finds out by itself.

Nothing here knows about lines: the caller asks at a line's boundary, never between the parts of one.
"""

from __future__ import annotations

import errno
import os
import stat

# O_NONBLOCK means nothing to a file; it keeps a FIFO that was put in its place from holding up the writer.
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


def path_of(fd: int) -> str | None:
    """Return the path of the regular file that `fd` writes to; None for a pipe, a socket, a terminal or a file that
    has no name any more."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink == 0:
            return None
        path = os.readlink(f"/proc/self/fd/{fd}")
        named = os.stat(path)
    except OSError:  # no /proc here, or the file is in a folder that this process cannot see
        return None
    return path if os.path.samestat(status, named) else None


def hindrance(opened_as: str) -> str | None:
    """Why no file of this path could ever be made or written to; None where it could, whatever is there now."""
    path = os.path.realpath(opened_as)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        folder = os.path.dirname(path)
        return None if os.path.isdir(folder) else f"there is no folder {folder}"
    except OSError as error:
        return f"it cannot be looked at ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    return "it is a folder" if stat.S_ISDIR(mode) else "it is no file"


def other_name(fd: int, opened_as: str) -> str | None:
    """The path of the file that `fd` writes to, when that is none that `opened_as` names: it was renamed, or never
    opened as that."""
    path = path_of(fd)
    try:
        return None if path is None or os.path.samefile(path, opened_as) else path
    except OSError:
        return path  # nothing is there


class FollowedFile:
    """A descriptor that goes where its path goes.

    Args:
        fd: the descriptor of the log, open for writing. Its path is asked for once, now.
        opened_as: the path that it was opened as, where that is known: what the kernel calls it may be another one by
            now, as when the file was renamed before this program had started.
    """

    def __init__(self, fd: int, opened_as: str | None = None) -> None:
        self.fd = fd
        if opened_as is not None and stat.S_ISREG(os.fstat(fd).st_mode):
            self.path: str | None = os.path.realpath(opened_as)
        else:
            self.path = path_of(fd)

    def follow(self) -> bool:
        """Let the descriptor write to the file that the path names, making that file when there is none.

        Returns:
            True when that is another file than before.

        Raises:
            OSError: the new file cannot be opened. The descriptor still writes to the old one; ask again later.
        """
        if self.path is None:
            return False
        current = os.fstat(self.fd)
        try:
            if os.path.samestat(os.stat(self.path), current):
                return False
        except FileNotFoundError:
            pass  # renamed, and nobody has made the next one yet
        opened = os.open(self.path, APPEND | _nofollow(self.path), stat.S_IMODE(current.st_mode))
        try:
            _refuse_another_users_choice(opened)
            # One step for whoever writes at the same time: the descriptor is the old file, then it is the new one.
            os.dup2(opened, self.fd, inheritable=os.get_inheritable(self.fd))
        finally:
            os.close(opened)
        return True


def _nofollow(path: str) -> int:
    """Return O_NOFOLLOW, unless the path is a link that this user or root has made: anybody else who may write in the
    folder could otherwise have the lines appended to a file of their choice."""
    try:
        status = os.lstat(path)
    except OSError:
        return os.O_NOFOLLOW
    is_trusted = stat.S_ISLNK(status.st_mode) and status.st_uid in (0, os.geteuid())
    return 0 if is_trusted else os.O_NOFOLLOW


def _refuse_another_users_choice(fd: int) -> None:
    """Raise OSError when root would write to a file that has another name besides, which somebody may have linked."""
    status = os.fstat(fd)
    if os.geteuid() == 0 and stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

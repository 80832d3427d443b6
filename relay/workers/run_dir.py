"""The run directory: where the workers of one relay find each other.

Each worker listens there on a Unix SEQPACKET socket of its own. There is no list and no numbering: the files are the
list, and a file that refuses connections was left by a worker that died. Joining happens under a lock, one worker at a
time, so that two that start together cannot miss each other, nor both take themselves for the first.

Sockets are reached through ``/proc/self/fd/N/NAME``: a Unix socket's path may have 107 bytes (unix(7)), the operator's
may have more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Collection

from relay.mistakes import Mistake
from relay.process.folders import can_make_files_in, why_refused

_SOCKET_NAME = re.compile(r"worker-[0-9]+-[0-9a-f]{8}")
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED

LOCK_SECONDS = 15.0
"""How long a worker waits for another one that is joining; that takes a fraction of a second unless it hangs."""


class RunDir:
    """The directory at `path`, made with mode 0700 when it is missing.

    Raises Mistake when it cannot be made or used, or when others than this user may enter it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.own_name = f"worker-{os.getpid()}-{os.urandom(4).hex()}"
        self._fd = self._open()
        self._lock_fd = -1

    def _open(self) -> int:
        try:
            os.mkdir(self.path, 0o700)
            os.chmod(self.path, 0o700)  # a umask may have taken something off
        except FileExistsError:
            pass
        except OSError as error:
            raise _cannot_be_made(self.path, error) from None
        return _opened(self.path)

    def lock(self) -> None:
        """Wait for our turn to join; raises Mistake when it does not come within `LOCK_SECONDS`, or cannot."""
        try:
            self._lock_fd = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
            os.fchmod(self._lock_fd, 0o600)  # the next worker opens it, too
        except OSError as error:
            raise _cannot_be_locked(self.path, error) from None
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > deadline:
                raise Mistake(f"--run-dir {self.path}: another worker has been joining for too long")
            time.sleep(0.01)

    def unlock(self) -> None:
        """Let the next worker join; nothing happens without the lock."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def listen(self) -> socket.socket:
        """Our own socket, non-blocking, listening under `own_name`.

        Raises Mistake where its file system has no room for it, or refuses it; OSError where something else does.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            listener.bind(self._reach(self.own_name))
            os.chmod(self.own_name, 0o600, dir_fd=self._fd)  # who connects has to be allowed to write, umask or not
            listener.listen(128)
        except OSError as error:
            listener.close()
            reason = why_refused(error, self.path)
            if reason is None:
                raise
            raise Mistake(f"--run-dir {self.path}: {reason}") from None
        return listener

    def connect_to_all(self, known: Collection[str] = (), *, patience: float, tidy: bool = True) -> list[socket.socket]:
        """A connection to every other worker but those `known`; files that dead ones have left are removed, if `tidy`.

        One that does not answer within `patience` seconds (its queue is full) is left out; 0 waits for nobody.
        """
        links = []
        for name in sorted(os.listdir(self._fd)):
            if not _SOCKET_NAME.fullmatch(name) or name == self.own_name or name in known:
                continue
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                link.settimeout(patience)
                link.connect(self._reach(name))
            except OSError as error:
                link.close()
                if tidy and error.errno == errno.ECONNREFUSED and self._is_socket(name):
                    self._remove(name)
                continue
            if same_user(link) is None:
                link.close()
                continue
            links.append(link)
        return links

    def lost_own_socket(self) -> bool:
        """Whether somebody has removed our socket, or the directory, so that newcomers cannot find us."""
        try:
            return not stat.S_ISSOCK(os.stat(os.path.join(self.path, self.own_name)).st_mode)
        except FileNotFoundError:
            return True
        except OSError:
            return False  # not to be seen at the moment, which is no reason to make another

    def renew(self) -> socket.socket:
        """Make the directory anew, if it is gone, and listen in it again.

        Raises Mistake or OSError when that is not possible.
        """
        fd = self._open()
        os.close(self._fd)
        self._fd = fd
        return self.listen()

    def remove_own_socket(self) -> None:
        """Leave the directory."""
        self._remove(self.own_name)

    def _is_socket(self, name: str) -> bool:
        try:
            return stat.S_ISSOCK(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode)
        except OSError:
            return False

    def _remove(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._fd)
        except OSError:
            pass  # somebody else was quicker, or the whole directory is gone

    def _reach(self, name: str) -> str:
        return f"/proc/self/fd/{self._fd}/{name}"


def check_run_dir(path: str) -> None:
    """Look whether `RunDir` would take the directory, or make it, without making it.

    Raises Mistake when it would not.
    """
    try:
        os.lstat(path)
        is_there = True
    except FileNotFoundError:
        is_there = False
    except OSError as error:
        raise _cannot_be_made(path, error) from None
    if is_there:
        os.close(_opened(path))
    try:
        _try_to_make_one_in(path if is_there else os.path.dirname(path.rstrip("/")) or ".")
    except OSError as error:
        if is_there and error.errno == errno.ENOSPC and _dead_have_left_some(path):
            return  # whoever joins tidies up first
        raise (_cannot_be_locked(path, error) if is_there else _cannot_be_made(path, error)) from None


def _dead_have_left_some(path: str) -> bool:
    """Whether there are sockets of workers that are no longer there, as far as their names tell."""
    pids = [name.split("-")[1] for name in os.listdir(path) if _SOCKET_NAME.fullmatch(name)]
    return not all(os.path.exists(f"/proc/{pid}") for pid in pids)


def _try_to_make_one_in(folder: str) -> None:
    """Raise OSError where no folder can be made in `folder`."""
    if can_make_files_in(folder):
        return
    trial = os.path.join(folder, f".relay-gevent-trial-{os.getpid()}")
    os.mkdir(trial, 0o700)
    os.rmdir(trial)


def _opened(path: str) -> int:
    """A descriptor of the run directory, which is there; raises Mistake when it will not do."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Mistake(f"--run-dir {path}: {os.strerror(error.errno or 0)}; name a folder of its own") from None
    why_not = _why_not(fd)
    if why_not:
        os.close(fd)
        raise Mistake(f"--run-dir {path}: {why_not}")
    return fd


def _why_not(fd: int) -> str:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        return "belongs to another user; name a folder of its own"
    if stat.S_IMODE(status.st_mode) & 0o077:
        return "others may enter it; chmod 700 it, or name one that is not there yet"
    if not os.path.exists(f"/proc/self/fd/{fd}"):
        return "workers find each other with the help of /proc; mount it, or run one alone"
    return ""


def _cannot_be_locked(path: str, error: OSError) -> Mistake:
    if (why := why_refused(error, path, os.path.join(path, "lock"))) is not None:
        return Mistake(f"--run-dir {path}: {why}")
    reason = os.strerror(error.errno or 0)
    return Mistake(f"--run-dir {path}: {reason} when opening its lock; chmod 700 it, or name another folder")


def _cannot_be_made(path: str, error: OSError) -> Mistake:
    folder = os.path.dirname(path.rstrip("/")) or "."
    if error.errno == errno.ENOENT and not os.path.isdir(folder):
        return Mistake(f"--run-dir {path}: its folder {folder} does not exist; make it")
    if error.errno == errno.ENOTDIR:
        return Mistake(f"--run-dir {path}: {folder} is not a folder; name one in a folder")
    if (why := why_refused(error, folder)) is not None:
        return Mistake(f"--run-dir {path}: {why}")
    reason = os.strerror(error.errno or 0)
    if error.errno in (errno.ENAMETOOLONG, errno.ENOENT, errno.EPERM):
        return Mistake(f"--run-dir {path}: {reason} when making it; name another one")
    return Mistake(f"--run-dir {path}: {reason} when making it; make it, mode 700, for the user that this runs as")


def same_user(link: socket.socket) -> int | None:
    """The process id at the other end of `link`, or None when it runs as another user."""
    pid, uid, _ = _UCRED.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid if uid == os.geteuid() else None

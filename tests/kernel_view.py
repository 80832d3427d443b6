"""What the kernel knows of a relay's sockets and pipes, read from the file descriptors that the relay really holds.

pidfd_getfd(2) duplicates a file descriptor out of another process; it needs the right to trace that process, which its
parent has on an ordinary machine. Sizes are bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.harness import wait_until

_PIDFD_GETFD = 438  # the same number on every architecture, see pidfd_getfd(2)
_SIOCOUTQ = 0x5411  # linux/sockios.h: bytes in the send queue that the peer has not acknowledged
_F_GETPIPE_SZ = 1032
_libc = ctypes.CDLL(None, use_errno=True)


def _duplicate(pid: int, fd: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        duplicate = int(_libc.syscall(_PIDFD_GETFD, pidfd, fd, 0))
    finally:
        os.close(pidfd)
    if duplicate < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return duplicate


def _fds(pid: int, kind: str) -> Iterator[tuple[int, str]]:
    """File descriptors of a process whose /proc link begins with `kind`, each with that link."""
    for entry in list(Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            link = entry.readlink().name
            if link.startswith(kind):
                yield int(entry.name), link


def relays_end(pids: Iterable[int], client: socket.socket) -> socket.socket:
    """Return the relay's own end of the test's connection `client`, duplicated out of whichever worker holds it.

    The caller closes it. Waits until it was accepted; AssertionError when that takes too long. Skips the test where
    another process may not be looked into.
    """
    name = client.getsockname()
    held = list(pids)
    end = wait_until(lambda: _end_towards(held, name), what=f"a worker holds the connection from {name}")
    assert end is not None
    return end


def _end_towards(pids: list[int], wanted: object) -> socket.socket | None:
    for pid in pids:
        for fd, _ in _fds(pid, "socket:"):
            try:
                duplicate = _duplicate(pid, fd)
            except PermissionError:
                pytest.skip("pidfd_getfd(2) on the relay is not allowed here (needs kernel.yama.ptrace_scope <= 1)")
            except OSError:
                continue  # closed meanwhile
            found = socket.socket(fileno=duplicate)
            with contextlib.suppress(OSError):
                if found.getpeername() == wanted:
                    return found
            found.close()
    return None


def unread(sock: socket.socket) -> int:
    """Bytes that have arrived at `sock` and were not read yet."""
    return _ask(sock.fileno(), termios.FIONREAD)


def unacknowledged(sock: socket.socket) -> int:
    """Bytes written to `sock` that its peer's kernel has not taken yet."""
    return _ask(sock.fileno(), _SIOCOUTQ)


def _ask(fd: int, request: int) -> int:
    answer = fcntl.ioctl(fd, request, struct.pack("=i", 0))
    return int(struct.unpack("=i", answer)[0])


def bytes_in_pipes(pid: int) -> int:
    """Bytes that rest in all pipes of a process together, its stdin, stdout and stderr left out."""
    return sum(_in_each_pipe(pid, lambda fd: _ask(fd, termios.FIONREAD)))


def largest_pipe(pid: int) -> int:
    """What the largest pipe of a process can hold; 0 when it has none."""
    return max(_in_each_pipe(pid, lambda fd: fcntl.fcntl(fd, _F_GETPIPE_SZ)), default=0)


def _in_each_pipe(pid: int, question: Callable[[int], int]) -> list[int]:
    answers = {}
    for fd, link in _fds(pid, "pipe:"):
        if fd <= 2 or link in answers:
            continue
        try:
            duplicate = _duplicate(pid, fd)
        except PermissionError:
            pytest.skip("pidfd_getfd(2) on the relay is not allowed here (needs kernel.yama.ptrace_scope <= 1)")
        except OSError:
            continue  # closed meanwhile
        try:
            answers[link] = question(duplicate)
        finally:
            os.close(duplicate)
    return list(answers.values())

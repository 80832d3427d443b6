"""What the kernel knows of a relay's sockets and pipes, read from the file descriptors that the relay really holds.

pidfd_getfd(2) duplicates a file descriptor out of another process; it needs the right to trace that process, which its
parent has on an ordinary machine. Sizes are bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import select
import socket
import struct
import termios
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gevent
import pytest

from relay.clients.client import Watcher
from tests.support.harness import Relay, Service, wait_until

_LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp, see proc_net_tcp(5)
_PIDFD_GETFD = 438  # the same number on every architecture, see pidfd_getfd(2)
_SIOCOUTQ = 0x5411  # linux/sockios.h: bytes in the send queue that the peer has not acknowledged
_F_GETPIPE_SZ = 1032
_libc = ctypes.CDLL(None, use_errno=True)


def _duplicate(pid: int, fd: int) -> int | None:
    """Our own duplicate of a process's file descriptor; None when that, or the process, is gone meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        duplicate = int(_libc.syscall(_PIDFD_GETFD, pidfd, fd, 0))
    finally:
        os.close(pidfd)
    if duplicate >= 0:
        return duplicate
    if ctypes.get_errno() == errno.EPERM:
        pytest.skip("pidfd_getfd(2) on the relay is not allowed here (needs kernel.yama.ptrace_scope <= 1)")
    return None


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


def holder(pids: Iterable[int], client: socket.socket) -> int:
    """Return which of these processes holds the relay's own end of `client`; waits and skips like `relays_end`."""
    name = client.getsockname()

    def held_by(pid: int) -> bool:
        end = _end_towards([pid], name)
        if end is not None:
            end.close()
        return end is not None

    candidates = list(pids)
    return wait_until(lambda: next(filter(held_by, candidates), 0), what=f"a worker holds the connection from {name}")


def _end_towards(pids: list[int], wanted: object) -> socket.socket | None:
    for pid in pids:
        for fd, _ in _fds(pid, "socket:"):
            duplicate = _duplicate(pid, fd)
            if duplicate is None:
                continue
            try:
                found = socket.socket(fileno=duplicate)
            except OSError:
                os.close(duplicate)
                continue  # closed meanwhile, and its number is something else's by now
            with contextlib.suppress(OSError):
                if found.getpeername() == wanted:
                    return found
            found.close()
    return None


def unread(sock: socket.socket) -> int:
    """Bytes that have arrived at `sock` and were not read yet."""
    return _ask(sock.fileno(), termios.FIONREAD)


def wait_until_read(service: Service, client: socket.socket) -> None:
    """Return when the relay has read everything that `client` sent."""
    with relays_end(service.pids, client) as end:
        wait_until(lambda: unread(end) == 0, what="the relay reads what was sent")


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
        duplicate = _duplicate(pid, fd)
        if duplicate is None:
            continue
        try:
            answers[link] = question(duplicate)
        finally:
            os.close(duplicate)
    return list(answers.values())


def listener_inode(port: int) -> int:
    """The inode of the socket that listens on `port` of an IPv4 address, by which the kernel knows it everywhere."""
    return int(_listener(port)[9])


def in_listen_queue(port: int) -> int:
    """How many connections wait at `port` of an IPv4 address until somebody accepts them."""
    return int(_listener(port)[4].partition(":")[2], 16)


def _listener(port: int) -> list[str]:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTENING and int(fields[1].partition(":")[2], 16) == port:
            return fields
    raise AssertionError(f"nobody listens on port {port}")


def watches(pid: int, inode: int) -> bool:
    """Whether an epoll of a process watches the socket with that inode: epoll's ``tfd`` lines, see proc_pid_fdinfo(5).

    libev takes a socket that it watches no longer out of epoll when that has something to say the next time.
    """
    return any(line.startswith("tfd:") and f" ino:{inode:x} " in line for line in _fdinfo(pid))


def locks(pid: int, fd: int) -> int:
    """How many ranges of the file behind a file descriptor of a process are locked by it: see proc_pid_fdinfo(5)."""
    return sum(line.startswith("lock:") for line in _read_lines(Path(f"/proc/{pid}/fdinfo/{fd}")))


def _fdinfo(pid: int) -> Iterator[str]:
    for path in list(Path(f"/proc/{pid}/fdinfo").iterdir()):
        yield from _read_lines(path)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:  # closed meanwhile
        return []


@contextlib.contextmanager
def without_descriptors(worker: Relay) -> Iterator[None]:
    """Let `worker` have no further file descriptor, whatever it closes meanwhile."""
    soft, hard = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{worker.pid}/fd")) // 2, hard))
    try:
        yield
    finally:
        if worker.pids:
            resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (soft, hard))


def refuse_to_watch(fd: int, watcher: Watcher) -> None:
    """Have it as when the kernel has refused to watch a descriptor, in this process: libev has stopped the watcher, and
    takes it to be watched until it looks again."""
    with select.epoll.fromfd(os.dup(gevent.get_hub().loop.fileno())) as epoll:
        epoll.unregister(fd)
    watcher.stop()

"""How workers find each other in the run directory: joining, being visited, and staying to be found."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Collection
from typing import Any

import gevent

from relay.mistakes import Mistake
from relay.process import log
from relay.workers.language import Greeting
from relay.workers.link import Link
from relay.workers.run_dir import RunDir, same_user

JOIN_SECONDS = 2.0
"""How long a newcomer waits for its siblings to welcome it."""

KNOCK_SECONDS = 0.5
"""The same before that, when it only lets them know that it is about to come."""

VISIT_SECONDS = 1.0
"""How long it waits at the door of each."""


class Gathering:
    """This worker's socket in the run directory, and the links that begin there.

    Args:
        run_dir: where.
        new_link: makes a link of a connection to the process of that id; the last argument is whether it has come to
            us.
        greeting: says who we are.
        warn: writes a line to the log, each only once.
    """

    def __init__(
        self,
        run_dir: RunDir,
        new_link: Callable[[socket.socket, int, bool], Link],
        greeting: Callable[[], Greeting],
        warn: Callable[..., None],
    ) -> None:
        self._run_dir = run_dir
        self._new_link = new_link
        self._greeting = greeting
        self._warn = warn
        self._visits: Any = None
        self._own_socket: socket.socket | None = None

    @property
    def is_open(self) -> bool:
        """Whether newcomers are answered."""
        return self._visits is not None

    def knock(self) -> list[Link]:
        """Visit everybody and hear their welcomes, without joining: nobody can visit us yet, and no lock is needed.

        Raises OSError, too, where no socket can be handed from one process to another.

        Blocks for up to `KNOCK_SECONDS`; raises OSError. Returns the links to those who did not answer in time.
        """
        _hand_one_on()
        return self._hear_welcomes(self._visit(patience=0, tidy=False), KNOCK_SECONDS)

    def join(self, known: Collection[str]) -> int:
        """Visit everybody but those `known` and hear their welcomes, under the run directory's lock, which is kept.

        Blocks for up to `JOIN_SECONDS`, and for the lock; raises Mistake. Returns how many did not answer in time.
        """
        self._run_dir.lock()
        visited = self._visit(known, patience=VISIT_SECONDS)
        self._own_socket = self._run_dir.listen()  # now: where no inode is left, what a dead worker has left had one
        return len(self._hear_welcomes(visited, JOIN_SECONDS))

    def _hear_welcomes(self, visited: list[tuple[socket.socket, Link]], seconds: float) -> list[Link]:
        waiting = select.poll()
        unanswered = {}
        for sock, link in visited:
            waiting.register(sock, select.POLLIN)
            unanswered[sock.fileno()] = link
        deadline = time.monotonic() + seconds
        while unanswered and (left := deadline - time.monotonic()) > 0:
            for fd, _ in waiting.poll(left * 1000):
                waiting.unregister(fd)
                unanswered.pop(fd).read()
        return list(unanswered.values())

    def _visit(
        self, known: Collection[str] = (), *, patience: float, tidy: bool = True
    ) -> list[tuple[socket.socket, Link]]:
        """Link to every worker but those `known`, and introduce ourselves; raises OSError."""
        visited = [
            (sock, self._new_link(sock, same_user(sock) or 0, False))
            for sock in self._run_dir.connect_to_all(known, patience=patience, tidy=tidy)
        ]
        for sock, _ in visited:
            self._introduce(sock)
        return visited

    def _introduce(self, sock: socket.socket) -> None:
        try:
            sock.send(self._greeting().encode())
        except OSError:
            pass  # it has just gone, which reading finds out

    def open(self) -> None:
        """Let newcomers visit us."""
        assert self._own_socket is not None
        self._visits = gevent.get_hub().loop.io(self._own_socket.fileno(), 1)
        self._visits.start(self._visited)

    def unlock(self) -> None:
        """Let the next worker join."""
        self._run_dir.unlock()

    def _visited(self) -> None:
        assert self._own_socket is not None
        try:
            sock, _ = self._own_socket.accept()
        except OSError:
            self._visits.stop()  # without a file descriptor left it would be called all the time, until the next second
            return
        pid = same_user(sock)
        if pid is None:
            sock.close()
            self._warn("somebody of another user has knocked at %s and was not let in", self._run_dir.path)
            return
        self._new_link(sock, pid, True)

    def meet_strangers(self, known: Collection[str]) -> bool:
        """Link to workers that we have not met: one of us could not be found, or not be answered, when we joined.
        False when no file descriptor is left for that."""
        try:
            self._visit(known, patience=0)  # the event loop waits for nobody
        except OSError:
            return False
        return True

    def keep_to_be_found(self) -> bool:
        """Make our socket again when somebody has removed it, or the run directory; True when that was done, and
        somebody may have come meanwhile who has not found us."""
        if self._visits is None:
            return False
        if not self._run_dir.lost_own_socket():
            if not self._visits.active:
                self._stop_visits()
                self.open()
            return False
        try:
            own_socket = self._run_dir.renew()
        except (OSError, Mistake) as error:
            self._warn("the run directory is gone, and cannot be made again: %s", error)
            return False
        self._stop_visits()
        assert self._own_socket is not None
        self._own_socket.close()
        self._own_socket = own_socket
        self.open()
        log.tell("made our socket in %s again; somebody had removed it", self._run_dir.path)
        return True

    def _stop_visits(self) -> None:
        if self._visits is not None:
            self._visits.stop()
            self._visits.close()
            self._visits = None

    def close(self) -> None:
        """Leave the directory."""
        self._run_dir.remove_own_socket()
        self._run_dir.unlock()
        self._stop_visits()
        if self._own_socket is not None:
            self._own_socket.close()


def _hand_one_on() -> None:
    """Hand a socket to ourselves; raises OSError with the system call that is refused."""
    call = "socketpair"
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            call = "sendmsg"
            socket.send_fds(ours, [b"."], [theirs.fileno()])
            call = "recvmsg"
            for fd in socket.recv_fds(theirs, 1, 1)[1]:
                call = "getsockname or getsockopt"
                socket.socket(fileno=fd).close()
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), call) from None

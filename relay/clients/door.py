"""The TCP port: the listening socket, and the server that accepts from it.

Everything that all connections have in common is set once on the listening socket; on Linux an accepted one inherits
it (tcp(7), socket(7)), which saves the system calls on each.

Several workers share the listening socket, and accept by turns. All could accept all the time, but then each connection
wakes every worker that has nothing to do, and the two sides of a transfer, which often come one right after the other,
arrive at different workers. So one worker has the door for a while and then passes it on, at once when it is busy
moving bytes. Nobody keeps account of whose turn it is: a worker that cannot know accepts, a worker that finds somebody
else to be quicker stops, and every now and then each looks whether somebody stands at a door that nobody opens.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from gevent.server import StreamServer

from relay.clients.bounds import Bound
from relay.clients.congestion import choose_congestion_control
from relay.clients.listening import prepare, set_option
from relay.process import log
from relay.process.addresses import bind, resolve, why_not

BACKLOG = 4096
"""Connections that may wait to be accepted; the kernel cuts it to ``net.core.somaxconn``."""

ACCEPTS_PER_WAKE = 64
"""Connections taken in a row before the pumps and everybody else get their turn."""

TURN_CONNECTIONS = 128
TURN_SECONDS = 0.25
"""How many connections a worker accepts, and for how long from the first of them, before the next one's turn comes. So
the two sides of a transfer arrive at the same worker as a rule, and transfers go to one after the other."""

LOOK_SECONDS = 0.1
SECOND_LOOK_SECONDS = 0.02
"""How often to look whether somebody waits while it is another worker's turn, and how soon to look again if so: the
other may not be able to accept, or may just be about to."""

FULL_PAUSE_SECONDS = 1.0
"""How long accepting rests when the process or the machine has no file descriptor or memory for another connection,
unless one of ours is closed before."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def open_port(
    interface: str,
    port: int,
    congestion_control: str | None = None,
    *,
    option: str = "--port",
    named_by: str = "--interface",
    by_each_worker: bool = False,
) -> socket.socket:
    """Listen on `port` of the address `interface`, in any spelling (``::`` means every address, IPv6 and IPv4; port 0 a
    free one).

    Its connections have `congestion_control`, or what is this machine's default. Where each worker listens
    `by_each_worker`, others of this user may listen there at the same time.

    Raises Mistake when that cannot be had, which names the `option` that the port, or the one that the interface is
    `named_by`.
    """
    family, address = resolve(interface, port, named_by)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        prepare(listener)
        set_option(listener, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if by_each_worker:
            set_option(listener, socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            set_option(listener, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address[0] == "::" else 1)
        if congestion_control is not None:
            choose_congestion_control(listener, congestion_control)
        try:
            bind(listener, address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise why_not(error, interface, port, option, named_by) from None
    except BaseException:
        listener.close()
        raise
    return listener


def is_at(listener: socket.socket, interface: str, port: int) -> bool:
    """Whether `listener` is what `open_port` makes of the same arguments; any port will do for port 0."""
    _, address = resolve(interface, port)
    here = listener.getsockname()
    # Of an IPv6 address there is the zone, too: fe80::1 may be on several links.
    return bool((here[0], here[2:]) == (address[0], address[2:]) and port in (0, here[1]))


class Door(StreamServer):  # type: ignore[misc]  # gevent has no types
    """Accepts connections and gives each to `admit`, in the hub: `admit` must not wait.

    At `is_full` it stops accepting, so that new connections wait in the kernel's listen queue; `reopen` is to be
    called whenever there may be room again. While it is `shared` with other workers, it accepts by turns: at the end
    of one, which `is_busy` makes an early one, it calls `pass_on`, and stops if that found somebody.
    """

    max_accept = ACCEPTS_PER_WAKE
    _timer: Any
    _watcher: Any

    def __init__(
        self,
        listener: socket.socket,
        admit: Callable[[socket.socket, tuple[Any, ...]], None],
        is_full: Callable[[], bool],
        is_busy: Callable[[], bool],
        pass_on: Callable[[], bool],
        note: Callable[[Bound], None],
    ) -> None:
        super().__init__(listener, handle=admit, spawn=None)
        self.twin: Door | None = None
        """The relay's other port, if there is one: the turn at one is the turn at both."""
        self._shared = False
        self._is_full = is_full
        self._is_busy = is_busy
        self._pass_on = pass_on
        self._note = note
        self._is_retired = False
        self._has_turn = True
        self._accepted = 0  # in this turn
        self._turn_ends = 0.0
        self._found_nobody = False  # when we last looked
        self._is_refused = False  # and that has been said
        self._second_look = self.loop.timer(SECOND_LOOK_SECONDS)
        self._kind = int(listener.family), int(listener.type), listener.proto

    @property
    def shared(self) -> bool:
        """Whether other workers accept here, too, by turns."""
        return self._shared

    @shared.setter
    def shared(self, shared: bool) -> None:
        self._shared = shared
        if self.twin is not None:
            self.twin._shared = shared

    def retire(self) -> None:
        """Stop accepting for good; the listening sockets stay open."""
        for door in self._both():
            door._is_retired = True
            door.stop_accepting()

    def _both(self) -> list[Door]:
        return [self] if self.twin is None else [self, self.twin]

    def start_accepting(self) -> None:
        """Accept whatever comes, unless this door was retired or it is not our turn; gevent and `reopen` call it."""
        if self._has_turn and not self._is_retired:
            try:
                super().start_accepting()
            except OSError as error:  # the port cannot be watched now
                self._rest(error)

    def keep_open(self) -> None:
        """Accept again where the port is no longer watched although we should; to be called once a second.

        Where the kernel refuses to watch a socket (epoll_ctl(2): ENOMEM, ENOSPC), libev tells nobody, and stops its
        watcher for good.
        """
        for door in self._both():
            if door._watcher is not None and not door._watcher.active:
                door.stop_accepting()
            if not door._rests():
                door._reopen()

    def take_turn(self) -> None:
        """It is our turn, or may be."""
        for door in self._both():
            door._begin_turn()

    def _begin_turn(self) -> None:
        self._accepted = 0
        self._found_nobody = False
        if not self._has_turn:
            self._has_turn = True
            if not self._rests():
                self._reopen()

    def has_room(self) -> bool:
        """Whether another connection could be accepted, as far as we know."""
        return not self._is_full() and not self._rests()

    def look_after_it(self) -> None:
        """Take the turn of a worker that does not use it; to be called every `LOOK_SECONDS`."""
        if not self._has_turn and self.is_awaited():
            self._second_look.start(self._look_again)

    def _look_again(self) -> None:
        self._second_look.stop()
        if not self._has_turn and self.is_awaited():
            self.take_turn()

    def is_awaited(self) -> bool:
        """Whether somebody waits to be accepted."""
        if self.twin is not None and self.twin.is_awaited_here():
            return True
        return self.is_awaited_here()

    def is_awaited_here(self) -> bool:
        """The same, for this port alone."""
        if not self.started:
            return False
        queue = select.poll()
        queue.register(self.socket, select.POLLIN)
        try:
            return bool(queue.poll(0))
        except OSError:
            return False  # as far as one knows

    def _end_turn(self) -> None:
        for door in self._both():
            door._has_turn = False
            door.stop_accepting()

    def full(self) -> bool:
        """Whether no further connection is to be accepted now; asked by gevent before each."""
        if not self._is_full():
            return False
        if self.shared and self._pass_on():
            for door in self._both():
                door._has_turn = False
        else:
            self._note(Bound.CONNECTIONS)
        return True

    def do_read(self) -> tuple[socket.socket, object] | None:
        """Accept one connection; None when there is none, or nothing to accept it with, or our turn is over."""
        if self.shared and self._accepted and self._is_turn_over() and self._pass_on():
            self._end_turn()
            return None
        try:
            # As `accept` does, but for asking each time what kind of socket this is: that costs as much as accepting.
            fd, address = self.socket._accept()
            connection = socket.socket(*self._kind, fileno=fd)
            connection.setblocking(False)
        except BlockingIOError:
            if self.shared and self._found_nobody:
                self._end_turn()  # twice in a row, so somebody has woken us: another worker was quicker
            self._found_nobody = True
            return None
        except ConnectionError:
            return None  # it was gone before it was accepted
        except OSError as error:
            self._rest(error)
            return None
        self._is_refused = False
        if not self._accepted:
            self._turn_ends = time.monotonic() + TURN_SECONDS
        self._accepted += 1
        self._found_nobody = False
        return connection, address

    def _is_turn_over(self) -> bool:
        return self._accepted >= TURN_CONNECTIONS or self._is_busy() or time.monotonic() > self._turn_ends

    def do_handle(self, *connection: Any) -> None:  # noqa: ANN401  # gevent has no types
        """Give it to `admit`. Of a mistake in there gevent would print the address, and let nobody in for a while."""
        try:
            self._handle(*connection)
        except Exception:  # whatever it is, the next one wants to come in
            log.tell_mistake("a mistake with somebody who has just connected, and is sent away")
            connection[0].close()

    def do_close(self, *_: object) -> None:
        """Nothing: an accepted connection lives on after `admit` has returned."""

    def reopen(self) -> None:
        """Accept again, if accepting rests and there is room."""
        for door in self._both():
            door._reopen()

    def _reopen(self) -> None:
        if self._watcher is None and self.started and not self._is_full():
            if self._timer is not None:
                self._timer.stop()
                self._timer.close()
                self._timer = None
            self.start_accepting()

    def _rests(self) -> bool:
        return self._watcher is None and self._timer is not None and bool(self._timer.active)

    def _rest(self, error: OSError) -> None:
        """Stop accepting for a while: trying on would find the same again at once, and keep a core busy."""
        if error.errno in _EXHAUSTED:
            self._note(Bound.EXHAUSTED)
        elif not self._is_refused:
            self._is_refused = True
            log.tell("the system lets nobody in (%s); new connections wait until it does", error.strerror)
        self.stop_accepting()
        if self.shared and self._pass_on():
            self._has_turn = False
        self._timer = self.loop.timer(FULL_PAUSE_SECONDS)
        self._timer.start(self._reopen)

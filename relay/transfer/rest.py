"""Pairs at rest: one epoll for all of them, and no greenlet.

Most pairs do little most of the time: they are quiet, or pass a small message now and then, or stand still since one
side does not read. Each of these is known here by the file descriptors of its two sides, and costs nothing until the
kernel has something to say about one. A small message is moved right where it is found; a pair that has more to move
than that leaves, and gets a greenlet (see `pair`).

Rules:

- A side is watched for input where a pump waits for it, and for room where a pump waits for that. A side that is
  watched for neither, since its partner does not read, still tells of an error (epoll_ctl(2): EPOLLERR and EPOLLHUP are
  always reported), edge-triggered: both ends of stream together would be reported for ever.
- One call serves for `SLICE_SECONDS` at the most; who is still to be served then comes first the next time, since the
  kernel puts those that it has reported last (ep_send_events() in fs/eventpoll.c).
- Who has to be looked at without anything happening, by the clock, has a deadline; and these are looked at in slices,
  too.
- The kernel may refuse to watch somebody (epoll_ctl(2): ENOSPC at ``fs.epoll.max_user_watches``, which all processes of
  a user share; ENOMEM). Who is refused rests like everybody, and is looked at once a second until it is watched.
- A fault of one pair ends that pair, and is nobody else's. gevent stops a watcher of a descriptor for good when its
  callback raises, so none here does.
"""

from __future__ import annotations

import select
import sys
import time
from collections import deque
from typing import Protocol

import gevent

from relay.clients.deadlines import Deadlines
from relay.process import log
from relay.transfer.turns import Turns

BATCH = 16
"""How many descriptors to ask the kernel for at a time."""

A_FEW = 4
"""How many to serve between two turns of those who move much."""

SLICE_SECONDS = 0.001
"""How long a call may serve before everybody else gets their turn."""


class Resting(Protocol):
    """A pair, as far as its rest is concerned. The two slots belong to `Rest`."""

    due: int
    watched: tuple[int, int] | None

    @property
    def fds(self) -> tuple[int, int]:
        """The file descriptors of its sides."""

    @property
    def events(self) -> tuple[int, int]:
        """What to watch each of them for, as epoll_ctl(2) has it."""

    def attend(self, fd: int, events: int) -> None:
        """Something has happened to the side with that descriptor."""

    def settle(self) -> None:
        """Look what there is to wait for now; see `Rest.settle_soon`."""

    def look_around(self, now: float) -> None:
        """A deadline has come; `now` in monotonic seconds."""

    def give_up(self) -> None:
        """End, after a fault; nothing happens when it is over."""


class Rest:
    """The pairs at rest."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._pairs: dict[int, Resting] = {}
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._deadlines: Deadlines[Resting] = Deadlines()
        self._due: deque[Resting] = deque()
        self._refused: dict[Resting, None] = {}  # whom the kernel does not watch
        self._to_try: deque[Resting] = deque()  # of those, who has to be looked at in this second
        self._has_told = False
        self._unsettled: list[Resting] = []
        self._hub = gevent.get_hub()
        loop = self._hub.loop
        self._timer = loop.timer(0.0)
        self._new_watcher = loop.io
        self._watcher = loop.io(self._epoll.fileno(), 1)
        self._watcher.start(self.serve)
        turns.look_at_others = self.serve_a_few

    def __len__(self) -> int:
        """How many sides are watched."""
        return len(self._pairs)

    def watch(self, pair: Resting) -> None:
        """Let `pair` rest, or go on resting; what it wants to be watched for may have changed."""
        wanted = pair.events
        watched = pair.watched
        if wanted == watched:
            return
        fds = pair.fds
        pair.watched = wanted
        try:
            if watched is None:
                for fd, events in zip(fds, wanted, strict=True):
                    self._pairs[fd] = pair
                    self._epoll.register(fd, events)
            else:
                for fd, events, before in zip(fds, wanted, watched, strict=True):
                    if events != before:
                        self._epoll.modify(fd, events)
        except OSError as error:
            for fd in fds:
                self._pairs[fd] = pair
            self._is_refused(pair, error)

    def forget(self, pair: Resting) -> None:
        """`pair` rests no more, and its sockets may be closed, or go to another process."""
        if pair.due:
            self._deadlines.clear(pair)
            pair.due = 0
        if pair.watched is None:
            return
        pair.watched = None
        for fd in pair.fds:
            self._pairs.pop(fd, None)
            self._stop_watching(fd)
        if self._refused:
            self._refused.pop(pair, None)

    def _stop_watching(self, fd: int) -> None:
        try:
            self._epoll.unregister(fd)
        except OSError:
            pass  # it never was; or this is refused, too, and then it is tried again as soon as something is heard

    def _is_refused(self, pair: Resting, error: OSError) -> None:
        self._refused[pair] = None
        if not self._has_told:
            self._has_told = True
            log.tell(
                "the kernel refuses to watch a transfer that rests: %s; such ones are looked at once a second "
                "(sysctl fs.epoll.max_user_watches)",
                error.strerror,
            )

    def look_at(self, pair: Resting, when: float) -> None:
        """Have `pair` look around at `when` (monotonic seconds, to the next whole one), if it still rests then."""
        if pair.due:
            self._deadlines.clear(pair)
        self._deadlines.set(pair, when)

    def serve(self) -> None:
        """Somebody has something to say, or may have."""
        self._turns.moved_little()
        until = time.monotonic() + SLICE_SECONDS
        try:
            while True:
                ready = self._poll(0, BATCH)
                self._attend(ready)
                if len(ready) < BATCH or time.monotonic() > until:
                    return
        except Exception:  # gevent would call here no more
            self._hub.handle_error(self, *sys.exc_info())

    def serve_a_few(self) -> bool:
        """Serve those whom the kernel tells of first, between the turns of those who move much; returns whether there
        was anybody."""
        if not self._pairs:
            return False
        ready = self._poll(0, A_FEW)
        if ready:
            self._turns.moved_little()
            self._attend(ready)
        return bool(ready)

    def _attend(self, ready: list[tuple[int, int]]) -> None:
        pairs = self._pairs
        for fd, events in ready:
            pair = pairs.get(fd)
            if pair is None:  # it may have ended since the kernel was asked
                self._stop_watching(fd)
                continue
            try:
                pair.attend(fd, events)
            except Exception:  # of one pair, and the others are still to be served
                self._fault_of(pair)
        while self._unsettled:
            pair = self._unsettled.pop()
            if pair.watched is not None:
                try:
                    pair.settle()
                except Exception:  # as above
                    self._fault_of(pair)

    def _fault_of(self, pair: Resting) -> None:
        """Report the exception that is being handled, and end the pair: it would only come to the same again."""
        self._hub.handle_error(self, *sys.exc_info())
        try:
            pair.give_up()
        except Exception:
            self._hub.handle_error(self, *sys.exc_info())

    def settle_soon(self, pair: Resting) -> None:
        """Have `pair`, which attends to something, settle when what was told with that is served: as a rule both sides
        leave one right after the other, and then there is nothing to settle."""
        self._unsettled.append(pair)

    def every_second(self, now: float) -> None:
        """Have those look around whose deadline has come; `now` in monotonic seconds."""
        self._due.extend(self._deadlines.take_due(now))
        if self._refused and not self._to_try:
            self._to_try.extend(self._refused)
        self._has_told = bool(self._refused)
        if not self._watcher.active:  # the kernel refuses to watch our epoll, too: see `relay.clients.client.Watcher`
            self._watcher.close()
            self._watcher = self._new_watcher(self._epoll.fileno(), 1)
            self._watcher.start(self.serve)
        if (self._due or self._to_try) and not self._timer.active:
            self._timer.start(self._look_around, update=False)

    def _look_around(self) -> None:
        self._timer.stop()
        now = time.monotonic()
        until = now + SLICE_SECONDS
        while (self._due or self._to_try) and time.monotonic() < until:
            is_due = bool(self._due)
            pair = (self._due if is_due else self._to_try).popleft()
            try:
                if not is_due:
                    self._try_to_watch(pair)
                elif pair.watched is not None:
                    pair.look_around(now)
            except Exception:  # of one pair, and the others are still to be looked at
                self._fault_of(pair)
        if self._due or self._to_try:
            self._timer.start(self._look_around, update=False)

    def _try_to_watch(self, pair: Resting) -> None:
        """Have the kernel watch a pair that it has refused to watch. If it still does, ask it what there is to do."""
        if pair.watched is None or pair not in self._refused:
            return
        sides = [*zip(pair.fds, pair.watched, strict=True)]
        try:
            for fd, events in sides:
                self._watch_anew(fd, events)
            del self._refused[pair]
        except OSError:
            asked = select.poll()
            for fd, events in sides:
                asked.register(fd, events & (select.POLLIN | select.POLLOUT))
            self._attend(asked.poll(0))

    def _watch_anew(self, fd: int, events: int) -> None:
        try:
            self._epoll.modify(fd, events)
        except FileNotFoundError:
            self._epoll.register(fd, events)

    def close(self) -> None:
        """Let go of the epoll; nobody rests here any more."""
        for watcher in (self._timer, self._watcher):
            watcher.stop()
            watcher.close()
        self._epoll.close()

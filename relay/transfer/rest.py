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
"""

from __future__ import annotations

import select
import sys
import time
from collections import deque
from typing import Protocol

import gevent

from relay.clients.deadlines import Deadlines
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


class Rest:
    """The pairs at rest."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._pairs: dict[int, Resting] = {}
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._deadlines: Deadlines[Resting] = Deadlines()
        self._due: deque[Resting] = deque()
        self._unsettled: list[Resting] = []
        self._hub = gevent.get_hub()
        loop = self._hub.loop
        self._timer = loop.timer(0.0)
        self._watcher = loop.io(self._epoll.fileno(), 1)
        self._watcher.start(self._serve)
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
        if watched is None:
            for fd, events in zip(fds, wanted, strict=True):
                self._pairs[fd] = pair
                self._epoll.register(fd, events)
        else:
            for fd, events, before in zip(fds, wanted, watched, strict=True):
                if events != before:
                    self._epoll.modify(fd, events)
        pair.watched = wanted

    def forget(self, pair: Resting) -> None:
        """`pair` rests no more, and its sockets may be closed, or go to another process."""
        if pair.due:
            self._deadlines.clear(pair)
            pair.due = 0
        if pair.watched is None:
            return
        pair.watched = None
        for fd in pair.fds:
            del self._pairs[fd]
            self._epoll.unregister(fd)

    def look_at(self, pair: Resting, when: float) -> None:
        """Have `pair` look around at `when` (monotonic seconds, to the next whole one), if it still rests then."""
        if pair.due:
            self._deadlines.clear(pair)
        self._deadlines.set(pair, when)

    def _serve(self) -> None:
        """Somebody has something to say."""
        self._turns.moved_little()
        until = time.monotonic() + SLICE_SECONDS
        while True:
            ready = self._poll(0, BATCH)
            self._attend(ready)
            if len(ready) < BATCH or time.monotonic() > until:
                return

    def serve_a_few(self) -> None:
        """Serve those whom the kernel tells of first; called between the turns of those who move much."""
        if not self._pairs:
            return
        ready = self._poll(0, A_FEW)
        if ready:
            self._turns.moved_little()
            try:
                self._attend(ready)
            except Exception:  # of one pair, and this is the turn of another
                self._hub.handle_error(self, *sys.exc_info())

    def _attend(self, ready: list[tuple[int, int]]) -> None:
        pairs = self._pairs
        for fd, events in ready:
            pair = pairs.get(fd)
            if pair is not None:  # it may have ended since the kernel was asked
                pair.attend(fd, events)
        while self._unsettled:
            pair = self._unsettled.pop()
            if pair.watched is not None:
                pair.settle()

    def settle_soon(self, pair: Resting) -> None:
        """Have `pair`, which attends to something, settle when what was told with that is served: as a rule both sides
        leave one right after the other, and then there is nothing to settle."""
        self._unsettled.append(pair)

    def every_second(self, now: float) -> None:
        """Have those look around whose deadline has come; `now` in monotonic seconds."""
        due = self._deadlines.take_due(now)
        if due and not self._due:
            self._timer.start(self._look_around, update=False)
        self._due.extend(due)

    def _look_around(self) -> None:
        now = time.monotonic()
        until = now + SLICE_SECONDS
        while self._due and time.monotonic() < until:
            pair = self._due.popleft()
            if pair.watched is not None:
                pair.look_around(now)
        self._timer.stop()
        if self._due:
            self._timer.start(self._look_around, update=False)

    def close(self) -> None:
        """Let go of the epoll; nobody rests here any more."""
        for watcher in (self._timer, self._watcher):
            watcher.stop()
            watcher.close()
        self._epoll.close()

"""Let one worker wake for a connection, and not all of them.

All workers wait for the same listening socket. The kernel wakes every one that does, and all but the quickest find
nothing to accept; with four workers that was a tenth of what a short transfer costs. Registered with EPOLLEXCLUSIVE
(epoll_ctl(2)) only one wakes. libev has no way to say so, but its epoll is a file descriptor like any other: what it
has registered is taken out and put in again with that flag, and with the cookie that libev expects back with each
event, which Linux shows in ``/proc/self/fdinfo`` (proc(5)).

Where any of this fails, all workers wake, as before. A worker that was woken may also die before it accepts, and then
nobody else was told; so everybody has to look at the listen queue now and then besides.
"""

from __future__ import annotations

import ctypes
import os
import re

_EPOLL_CTL_ADD = 1
_EPOLL_CTL_DEL = 2
_EPOLLIN = 1
_EPOLLEXCLUSIVE = 1 << 28


class _EpollEvent(ctypes.Structure):
    """struct epoll_event of sys/epoll.h, which is packed on x86-64 only."""

    _pack_ = 1 if os.uname().machine == "x86_64" else 0
    _layout_ = "ms"
    _fields_ = (("events", ctypes.c_uint32), ("cookie", ctypes.c_uint64))


def wake_one(epoll_fd: int, listener_fd: int) -> bool:
    """Make `epoll_fd`, in which `listener_fd` is registered for reading, wake for it alone; whether that worked."""
    try:
        with open(f"/proc/self/fdinfo/{epoll_fd}") as registered:
            found = re.search(rf"^tfd: +{listener_fd} events: +\w+ data: +(\w+)", registered.read(), re.MULTILINE)
    except OSError:
        return False
    if found is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    event = _EpollEvent(_EPOLLIN | _EPOLLEXCLUSIVE, int(found[1], 16))
    if libc.epoll_ctl(epoll_fd, _EPOLL_CTL_DEL, listener_fd, ctypes.byref(event)) != 0:
        return False
    if libc.epoll_ctl(epoll_fd, _EPOLL_CTL_ADD, listener_fd, ctypes.byref(event)) == 0:
        return True
    event.events = _EPOLLIN  # a kernel before 4.5
    libc.epoll_ctl(epoll_fd, _EPOLL_CTL_ADD, listener_fd, ctypes.byref(event))
    return False

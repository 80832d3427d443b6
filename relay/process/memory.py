"""Memory that this process may not have: what to say to the operator, who otherwise raises the wrong limit."""

from __future__ import annotations

import errno
import os
import resource

_STACK_BYTES = 8 << 20
"""Of a thread, where the limit of stacks is none: more than the C library takes then."""


def no_memory() -> str:
    """Why there is no memory, and what to do."""
    limit = _limit()
    if limit is None:
        return "there is not enough memory on this machine, or in this container; give it more"
    return f"there is not enough memory: its limit is {limit >> 20} MB; raise it (ulimit -v, LimitAS=)"


def no_thread() -> str:
    """Why the system lets this process have no further thread, and what to do.

    It says the same (EAGAIN) whether there are too many threads, or there is no memory for the stack of one.
    """
    limit = _limit()
    if limit is not None and _in_use() + _stack_bytes() > limit:
        return no_memory()
    return (
        "the system lets this process have no further thread; raise its limit of processes (ulimit -u, or pids.max of "
        "its cgroup)"
    )


def lack_behind(error: Exception) -> str | None:
    """What to say of an error behind which there is a lack of memory, or of threads; None where there is another."""
    text = str(error)
    if isinstance(error, RuntimeError) and "start new thread" in text:
        return no_thread()
    is_of_a_library = isinstance(error, ImportError) and ("failed to map" in text or "annot allocate memory" in text)
    is_of_the_kernel = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return no_memory() if isinstance(error, MemoryError) or is_of_a_library or is_of_the_kernel else None


def _limit() -> int | None:
    """How large this process may be, in bytes of its address space; None where that is not limited."""
    try:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    except OSError:
        return None
    return None if limit == resource.RLIM_INFINITY else limit


def _in_use() -> int:
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0  # not known


def _stack_bytes() -> int:
    try:
        stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    except OSError:
        return _STACK_BYTES
    return _STACK_BYTES if stack == resource.RLIM_INFINITY else stack

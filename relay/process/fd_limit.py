"""How many file descriptors this process may have.

A system may refuse to say so, or to allow more (a sandbox, a container: any error number), or set no limit at all.
"""

from __future__ import annotations

import resource

ASSUMED_FDS = 1024
"""Where the limit cannot be asked for; what Linux gives who asks for nothing."""

NR_OPEN = 1 << 20
"""What no limit may exceed where /proc/sys/fs/nr_open cannot be read: the kernel's default."""

MOST_FDS = (1 << 31) - 1
"""What a limit that is none amounts to: descriptors are ints."""


def fd_limit() -> int:
    """The limit as it is now."""
    try:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError:
        return ASSUMED_FDS
    return MOST_FDS if soft == resource.RLIM_INFINITY else soft


def raise_fd_limit() -> str:
    """Raise the soft limit to the hard one: each connection takes a descriptor.

    Returns what to tell the operator when that is refused; the relay does with what it has.
    """
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError:
        return f"the limit of file descriptors is not to be known here; it is taken for {ASSUMED_FDS}"
    most = _most_of_any_process()
    if hard == resource.RLIM_INFINITY or hard > most:
        hard = most  # the kernel refuses to set more, even when it is set already: its own limit was lowered since
    if soft == hard:
        return ""
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # Python's words for EPERM and EINVAL are ValueError
        return f"the limit of file descriptors stays at {soft}: this system refuses to raise it to {hard}"
    return ""


def _most_of_any_process() -> int:
    try:
        with open("/proc/sys/fs/nr_open", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return NR_OPEN

"""How the kernel sends what a long or lossy path has to carry: congestion control and pacing of the connections.

Both are said to the listening socket; an accepted connection inherits them and keeps them, wherever it moves later.

What congestion controls there are is the kernel's affair, and so is which of them an ordinary user may have (tcp(7)).
Setting one says best whether it can be had: a kernel loads a module that root asks for, and its lists name only what is
loaded.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys

from relay.mistakes import Mistake

SETTINGS = "/proc/sys/net/ipv4"
"""``tcp_congestion_control`` is the default there, ``tcp_available_congestion_control`` what is loaded, and
``tcp_allowed_congestion_control`` what of that anybody may choose."""

LONGEST_NAME = 15
"""TCP_CA_NAME_MAX in net/tcp.h, without its final zero. Of a longer name the kernel would read the beginning only."""

NO_CEILING = 0xFFFF_FFFE_FFFF_FFFE
"""Bytes a second. A kernel before 5.0, or of 32 bits, reads either half; each of them is next to its own “none”."""

_SO_MAX_PACING_RATE = getattr(socket, "SO_MAX_PACING_RATE", 47)  # asm-generic/socket.h; Python has no name for it

_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}")


def choose_congestion_control(listener: socket.socket, name: str) -> None:
    """Let the connections that come to `listener` from now on have congestion control `name`.

    Raises Mistake when this kernel has none of that name, or does not let this user choose it.
    """
    if not _NAME.fullmatch(name):
        raise Mistake(f"--congestion-control {name}: {_has()}; give one of these names")
    try:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode("ascii"))
    except OSError as error:
        raise _mistake(name, error) from None


def check_congestion_control(name: str) -> None:
    """Raise Mistake as `choose_congestion_control` does, for a listening socket that this process would have."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        choose_congestion_control(sock, name)


def pace(listener: socket.socket) -> None:
    """Let the connections that come to `listener` spread over a round trip what they may send in it.

    Without that, Linux sends a whole window as fast as the first link takes it, and on a path with short queues most of
    that is lost: 200 Mbit/s, 80 ms and a queue of 5 ms carried 41 Mbit/s with cubic, and 137 when it was paced
    (docs/tuning.md). bbr paces always, and all do on a host whose queueing discipline is fq; any ceiling on the rate
    that is not the kernel's “none” makes TCP pace by itself (SO_MAX_PACING_RATE in socket(7), Linux 4.13).
    """
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, NO_CEILING.to_bytes(8, sys.byteorder))
    except OSError:
        pass  # it goes on in bursts, as everybody's connections do


def take_over(listener: socket.socket, name: str | None) -> None:
    """Let a `listener` that came from another worker be as if this one, told `name` or nothing, had opened it.

    Raises Mistake as `choose_congestion_control` does.
    """
    pace(listener)  # an earlier version may have opened it
    if name is None:
        _return_to_default(listener)
    else:
        choose_congestion_control(listener, name)


def _return_to_default(listener: socket.socket) -> None:
    """Undo the choice that another worker has made, if it has made one."""
    default = _names("tcp_congestion_control")
    try:
        has = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, LONGEST_NAME + 1)
        if default and os.fsdecode(has.rstrip(b"\0")) != default[0]:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, default[0].encode("ascii"))
    except OSError:
        pass  # nobody asked for anything, so the relay goes on with what it has


def _mistake(name: str, error: OSError) -> Mistake:
    option = f"--congestion-control {name}"
    if error.errno == errno.ENOENT:
        return Mistake(f"{option}: {_has()}; where it comes with this one too, root adds it by: modprobe tcp_{name}")
    if error.errno in (errno.EPERM, errno.EACCES):
        allowed = _names("tcp_allowed_congestion_control")
        return Mistake(
            f"{option}: {_has()}, and lets this user choose {_listed(allowed) or 'none'}; root allows it by: "
            f"sysctl -w net.ipv4.tcp_allowed_congestion_control='{' '.join([*allowed, name])}'"
        )
    return Mistake(f"{option}: {os.strerror(error.errno or 0)}; {_has()}; leave the option out to have its default")


def _has() -> str:
    there = _names("tcp_available_congestion_control")
    return f"this kernel has {_listed(there)}" if there else "this kernel does not say what it has"


def _names(setting: str) -> list[str]:
    try:
        with open(f"{SETTINGS}/{setting}") as told:  # pathlib would be a third of a megabyte, for this one file
            return told.read().split()
    except OSError:
        return []  # there is no /proc/sys to read, as in some sandboxes


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

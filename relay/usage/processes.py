"""Which process is which: a process id alone is used again by others, together with its start it is not.

This is how workers knew each other before there were lifelines, and how one that cannot have a lifeline is known. It
holds only for processes that see each other in /proc: in one PID namespace, and not hidden by hidepid.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Final

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
UNKNOWN_BOOT: Final = "unknown-boot"

_STATE, _FLAGS, _START = 0, 6, 19
"""Places in /proc/PID/stat behind the command's name; see proc(5), where they are fields 3, 9 and 22."""

_PF_EXITING = 0x4
"""Set before a process that dies closes its files (include/linux/sched.h): who learns of a death by the end of a
connection finds it set, when the state may for a moment still be that of a running process."""


@lru_cache(maxsize=1)
def _boot_id() -> str:
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        # Hidden by systemd's ProcSubset=pid. Then the ticks since boot must do to tell two processes apart.
        return UNKNOWN_BOOT


def _look(pid: int) -> tuple[str, bool] | None:
    """Return "BOOT_ID/TICKS" of a process, and whether it is about to end, or has ended and was not waited for.

    None when there is no such process to be seen; PermissionError when there is, of which this one may know nothing.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            status = file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name is in brackets, and may itself hold brackets and spaces.
    fields = status[status.rfind(b")") + 2 :].split(maxsplit=_START + 1)
    ends = fields[_STATE] in (b"Z", b"X") or bool(int(fields[_FLAGS]) & _PF_EXITING)
    return f"{_boot_id()}/{fields[_START].decode('ascii')}", ends


def process_start(pid: int) -> str | None:
    """Return "BOOT_ID/TICKS", which tells this process from all that had or will have its number.

    Returns:
        None when there is no such process, or when it is about to end, or has ended and was not waited for.

    Raises:
        PermissionError: when there is one, of which this process may know nothing.
    """
    seen = _look(pid)
    return None if seen is None or seen[1] else seen[0]


def is_living(pid: int, start: str) -> bool:
    """Tell whether the process that had this number and this start still runs, as far as can be seen."""
    try:
        seen = _look(pid)
    except OSError:
        return True
    return _is_hidden(pid) if seen is None else seen == (start, False)


def _is_hidden(pid: int) -> bool:
    """Tell whether a process of another user has this number (hidepid), or any, where there is no /proc."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return not os.path.exists("/proc/self")


def is_ending(pid: int, start: str) -> bool:
    """Tell whether this process can be seen to be about to end, or to have ended; it may have files open yet."""
    try:
        return _look(pid) == (start, True)
    except OSError:
        return False


def is_of_another_boot(start: str) -> bool:
    """Tell whether a process with this start belongs to another run of a kernel: an earlier one, or another machine."""
    boot, own = start.partition("/")[0], _boot_id()
    return UNKNOWN_BOOT not in (boot, own) and boot != own

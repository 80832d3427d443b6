"""Which process is which: a process id alone is used again by others, together with its start it is not.

All workers of one database must see each other in /proc, so they belong in one PID namespace (one container).
"""

from __future__ import annotations

from functools import lru_cache

_BOOT_ID = "/proc/sys/kernel/random/boot_id"

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
        return "unknown-boot"


def process_start(pid: int) -> str | None:
    """Return "BOOT_ID/TICKS", which tells this process from all that had or will have its number.

    Returns:
        None when there is no such process, or when it is about to end, or has ended and was not waited for.

    Raises:
        PermissionError: when there is one, of which this process may know nothing.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            status = file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name is in brackets, and may itself hold brackets and spaces.
    fields = status[status.rfind(b")") + 2 :].split(maxsplit=_START + 1)
    if fields[_STATE] in (b"Z", b"X") or int(fields[_FLAGS]) & _PF_EXITING:
        return None
    return f"{_boot_id()}/{fields[_START].decode('ascii')}"


def is_living(pid: int, start: str) -> bool:
    """Tell whether the process that had this number and this start still runs."""
    try:
        return process_start(pid) == start
    except PermissionError:
        return True

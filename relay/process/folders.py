"""Whether something can be made in a folder: asked without making anything that anybody could see, and why not."""

from __future__ import annotations

import os
from typing import Final

READ_ONLY: Final = (
    "its file system is mounted read-only; name a place that may be written, or let this one be (under systemd, "
    "ReadWritePaths=)"
)
"""What to say where a mode and an owner have nothing to do with it."""


def can_make_files_in(folder: str) -> bool:
    """Make a file without a name there, which leaves no trace: not even in the folder's time of change.

    False says little: some file systems know no such files, and where they do, something may refuse them. Then only
    trying tells, and what there is against it.
    """
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError:
        return False
    return True


def is_read_only(path: str) -> bool:
    """Whether the file system of what is at `path` is mounted so, for this process at least; False if nobody tells."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False

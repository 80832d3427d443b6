"""Whether something can be made in a folder, asked without making anything that anybody could see."""

from __future__ import annotations

import os


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

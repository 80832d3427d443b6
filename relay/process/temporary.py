"""A folder for what a program needs for a moment: `relay-usage` and `misc/import-twisted-usage`, and no worker."""

from __future__ import annotations

import os
import tempfile

from relay.mistakes import Mistake


def temporary_folder(program: str) -> tempfile.TemporaryDirectory[str]:
    """Return a new folder that is removed when it is left; to be used in a `with`.

    Raises:
        Mistake: there is nowhere to make one (no /tmp, or a full one).
    """
    try:
        return tempfile.TemporaryDirectory(prefix=f"{program}-")
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise Mistake(f"no folder for temporary files can be made ({reason}); name one in TMPDIR") from None

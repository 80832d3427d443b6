"""The name of a file for people and programs to read. Pure."""

from __future__ import annotations

import os


def shown(path: str | os.PathLike[str]) -> str:
    r"""Return the path as text of any encoding: a name is bytes, and those that are no UTF-8 are told as in ``\xff``.

    In Python such bytes are lone surrogates (PEP 383), which open the file, but can neither be printed nor sent.
    """
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

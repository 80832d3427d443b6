"""What the log tells of an exception: where it came from and what kind it is, and nothing about whom it was with.

What an exception says of itself may hold what it was raised for: a KeyError its key, which is a token or a source here,
a ValueError the address that is none. And whoever prints one may add what it was called with, as gevent does. The relay
writes down neither addresses nor tokens (docs/security.md), also when it is wrong.
"""

from __future__ import annotations

import re

_TELLING = re.compile(
    r"""
    b?"(?:[^"\\]|\\.)*" | b?'(?:[^'\\]|\\.)*'                          # what is quoted, or are bytes
    | \d{1,3}(?:\.\d{1,3}){3}                                          # addresses
    | [0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:[.%]\S+)?
    | [0-9A-Fa-f]{8,}                                                  # tokens and sides, which may begin like a port
    | \d{4,}                                                           # ports
    """,
    re.VERBOSE,
)

_NAME = re.compile(r"'(?![0-9A-Fa-f]{8})[A-Za-z_]\w{0,40}'")
"""Something in the code, as Python quotes it."""


def discreet(traceback: str) -> str:
    """Return a traceback without anything that may be an address or a token in what its exceptions say."""
    lines = traceback.split("\n")
    return "\n".join(line if line.startswith("  ") else _discreet(line) for line in lines)  # indented is the code


def _discreet(said: str) -> str:
    return _TELLING.sub(lambda found: found[0] if _NAME.fullmatch(found[0]) else "…", said)

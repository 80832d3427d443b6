"""Whose a parcel is, decided in one step of the kernel's: by whoever comes first, its receiver or the sender who takes
it back, wherever the other one stands still meanwhile.

A claim is a file descriptor of which both have a copy, an event counter of one (eventfd(2)); whoever reads that has it.
"""

from __future__ import annotations

import os

_COUNTER_BYTES = 8


def offer() -> int:
    """A claim that is nobody's yet.

    Raises OSError where there can be none.
    """
    try:
        return os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except AttributeError as error:  # built for a system without
        raise OSError(str(error)) from None


def make(claim: int) -> bool:
    """Whether the parcel with this `claim` is ours from here on; False if it is the other one's."""
    try:
        return len(os.read(claim, _COUNTER_BYTES)) == _COUNTER_BYTES
    except OSError:
        return False

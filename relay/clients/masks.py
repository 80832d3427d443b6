"""Taking the mask off a WebSocket payload (RFC 6455, section 5.3), pure.

A client masks each frame with four bytes of its own; byte `i` of the payload is XORed with byte `i % 4` of the mask. In
C this costs 0.03 to 0.1 s/GiB, so the C function of `websockets` does it. Without it the same is done in Python, which
costs 1.2 to 1.7 s/GiB, and for a short frame four to eight times what C does (misc/bench/frames.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from types import ModuleType

Mask = Callable[[bytes | bytearray | memoryview, bytes], bytes]
"""Takes a payload and its four bytes of mask, and returns the other form of the payload as new bytes."""

_FEW_BYTES = 1000
"""Up to here one long XOR is quicker than four translations."""

_KEPT_BYTES = 16 << 20


@functools.cache
def mask_function() -> Mask:
    """The quickest there is. What is imported for it is imported now, and not when this module is."""
    # glibc gives the top of the heap back whenever 128 KiB of it are free, so that the bytes that each turn makes anew
    # would be paged in anew. A large block that is freed makes it keep twice as much: mallopt(3), M_TRIM_THRESHOLD.
    bytes(_KEPT_BYTES)
    try:
        mask: Mask = _speedups().apply_mask
    except (ImportError, AttributeError):
        return apply_mask_slowly
    return mask


def _speedups() -> ModuleType:
    """The C module of `websockets`, by itself: the package around it would import sixty modules, 2.6 MB in each worker.

    Raises ImportError or AttributeError when there is none.
    """
    package = PathFinder.find_spec("websockets")
    if package is None:
        raise ImportError("there is no websockets")
    spec = PathFinder.find_spec("websockets.speedups", package.submodule_search_locations)
    if spec is None or spec.loader is None:
        raise ImportError("there is no websockets.speedups")
    module = spec.loader.create_module(spec)
    if module is None:
        raise ImportError("websockets.speedups is not an extension")
    spec.loader.exec_module(module)
    return module


def apply_mask_slowly(payload: bytes | bytearray | memoryview, mask: bytes) -> bytes:
    """What the C function does; `mask` has four bytes."""
    length = len(payload)
    if length > _FEW_BYTES:
        turned = bytearray(payload)
        for place in range(4):
            turned[place::4] = turned[place::4].translate(_xor_table(mask[place]))
        return bytes(turned)
    order = sys.byteorder
    repeated = (mask * (length // 4 + 1))[:length]
    return (int.from_bytes(payload, order) ^ int.from_bytes(repeated, order)).to_bytes(length, order)


@functools.cache
def _xor_table(by: int) -> bytes:
    return bytes(byte ^ by for byte in range(256))

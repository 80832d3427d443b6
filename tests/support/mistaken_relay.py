"""`relay-gevent` with mistakes in it: `python -m tests.support.mistaken_relay [options of relay-gevent]`.

`MISTAKES` in the environment names functions, as in ``relay.clients.matching:Matching.dismiss=2``, separated by blanks:
each of the first so many calls of one raises something that tells in its text, as an error may, whom it was with.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator

VARIABLE = "MISTAKES"


def mistakes(*functions: str, calls: int = 1) -> dict[str, str]:
    """The variable for mistakes in these functions."""
    return {VARIABLE: " ".join(f"{function}={calls}" for function in functions)}


def _wrong(function: Callable[..., object], calls: int) -> Callable[..., object]:
    left = iter(range(calls))

    @functools.wraps(function)
    def call(*arguments: object, **named: object) -> object:
        if next(left, None) is None:
            return function(*arguments, **named)
        raise RuntimeError(f"a mistake with {[*_told(arguments)]}")

    return call


def _told(arguments: tuple[object, ...]) -> Iterator[object]:
    for argument in arguments:
        yield argument
        yield from (getattr(argument, name, None) for name in ("sock", "token", "source", "first", "second"))


def _put_in(mistake: str) -> None:
    place, _, calls = mistake.partition("=")
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, _wrong(getattr(owner, name), int(calls)))


if __name__ == "__main__":
    from relay.process.signals import be_ready_for_signals

    be_ready_for_signals()
    for mistake in os.environ[VARIABLE].split():
        _put_in(mistake)
    from relay.cli import main

    main()

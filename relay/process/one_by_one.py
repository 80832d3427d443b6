"""Something is done for each of many, and a mistake with one of them is no other's trouble."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from relay.process import log

T = TypeVar("T")


def one_by_one(things: Iterable[T], do: Callable[[T], object], what: str) -> bool:
    """Call `do` with each of these `things`; it ends early when that returns False.

    The log tells of the first mistake only: as a rule there is one, or it is the same each time. `what` says where it
    was made, as in "in handing on a transfer".

    Returns whether `do` was done with all of them, and well.
    """
    went_well = True
    for thing in things:
        try:
            if do(thing) is False:
                return False
        except Exception:  # noqa: PERF203  # whatever it is, the others are not to blame
            if went_well:
                log.tell_mistake(f"a mistake {what}; going on with the others")
            went_well = False
    return went_well


def do_it(step: Callable[[], object]) -> None:
    """For steps of which each has to be taken, whatever has become of the ones before."""
    step()

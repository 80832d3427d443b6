"""How a worker ends in good order: everything goes into other hands, or, as far as there are none, gets its time.

- Who has room is asked again each second, and gets what fits; the rest is served meanwhile.
- From the moment at which somebody found no room, or nobody was there, `--grace` runs. A sibling that may soon be ready
  stops that clock when it has taken everything; one that was there before does not.
- When the time is over, nothing more is handed on, and what is under way has time to arrive. Then what is still here is
  cut off and recorded, by whoever has this; and so is what has not arrived, however this ends (`Siblings.close`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gevent.event import Event

from relay.clients.matching import Matching
from relay.clients.places import Places
from relay.clients.reception import Reception
from relay.process import log
from relay.process.one_by_one import do_it, one_by_one
from relay.transfer.pairs import Pairs
from relay.transfer.slices import see_to_all

if TYPE_CHECKING:
    from relay.workers.household import Household

HANDING_SECONDS = 2.5
"""How long a worker goes on after its grace if by then the others have room for everything."""


class Departure:
    """The end of this worker.

    Args:
        household: hands things on; None for a worker that is alone.
        places, reception, matching, pairs: the rooms to be cleared.
        grace: seconds that transfers have, when nobody takes them over.
        changed: is set whenever there is a reason to look again.
        close_door: closes the port.
    """

    def __init__(
        self,
        household: Household | None,
        *,
        places: Places,
        reception: Reception,
        matching: Matching,
        pairs: Pairs,
        grace: float,
        changed: Event,
        close_door: Callable[[], None],
    ) -> None:
        self._household = household
        self._places = places
        self._reception = reception
        self._matching = matching
        self._pairs = pairs
        self._grace = grace
        self._changed = changed
        self._close_door = close_door
        self._ended = Event()
        self._grace_ends: float | None = None
        self._found_no_room = False  # from then on the grace runs, whoever may have room later
        self._given_up = False

    def wait(self) -> None:
        """Block the calling greenlet until this is over."""
        self._ended.wait()

    def end_at_once(self) -> None:
        """Do not wait for anything any more."""
        self._ended.set()

    def depart(self) -> None:
        """Clear the rooms, in the calling greenlet; no connection is accepted any more."""
        try:
            if self._household is not None:
                one_by_one([self._household.leave], do_it, "in telling the siblings that this worker leaves")
            while not self._ended.is_set():
                self._changed.clear()
                extra = HANDING_SECONDS if self._goes_on_clearing_out() else 0.0
                if self._is_cleared_out():
                    break
                patience = None if self._grace_ends is None else self._grace_ends + extra - time.monotonic()
                if patience is not None and patience <= 0:
                    if self._household is not None:
                        self._household.siblings.settle()
                    break
                self._changed.wait(patience)
        finally:
            self._ended.set()

    def _goes_on_clearing_out(self) -> bool:
        try:
            return self._clear_out()
        except Exception:  # whatever it is, those who are here have their time
            log.tell_mistake("a mistake in clearing out; the transfers have %g seconds to finish", self._grace)
            if self._grace_ends is None:
                self._grace_ends = time.monotonic() + self._grace
            return False

    def _clear_out(self) -> bool:
        """Give everything that is here into other hands, or, as far as there are none, begin to end it. Returns whether
        there were."""
        if self._moves_on() and self._household is not None and self._household.hand_everything_on():
            if not self._found_no_room:
                self._grace_ends = None
            return True
        if self._ended.is_set():  # meanwhile
            return False
        has_siblings = self._moves_on()
        self._pairs.begin_all()
        self._found_no_room = self._found_no_room or has_siblings
        if self._grace_ends is None:
            self._grace_ends = time.monotonic() + self._grace
            lack = "; the other workers have no room for them" if has_siblings else ""
            log.tell("stopping: %d transfers have %g seconds to finish%s", len(self._pairs), self._grace, lack)
        if not has_siblings and not self._given_up and not self._hopes():
            self._give_up()
        return False

    def _moves_on(self) -> bool:
        return self._household is not None and self._household.moves_on()

    def _hopes(self) -> bool:
        return self._household is not None and self._household.siblings.hopes

    def _give_up(self) -> None:
        """Nobody will take over: close the port, and send those away who have no partner."""
        self._given_up = True
        one_by_one([self._close_door], do_it, "in closing the port")
        see_to_all(self._matching.close, "with one who waits")
        see_to_all(self._reception.close, "with one whose handshake is not whole")

    def _is_cleared_out(self) -> bool:
        return self._places.taken == 0 and (self._household is None or self._household.siblings.left)

"""Which worker a token lives with, as this one has to know it: `homes` and who is there, put together."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from itertools import islice

from relay.workers.estate import Estate
from relay.workers.language import encode_matched
from relay.workers.link import Link, readiest

LOOKS = 100
"""How many of those who are uncertain, and whom nobody has doubted, are looked at again in a second: thousands may be,
for as long as a worker stands still, and whoever comes or goes or wakes has all looked at anyway."""


class Tokens:
    """The homes of tokens among the workers that are there.

    Args:
        estate: has the `homes`, once this worker takes part.
        links: all siblings; kept up to date by whoever has them, as is
        live: those that can be home, by their process ids.
    """

    def __init__(self, estate: Estate, links: Collection[Link], live: Mapping[int, Link]) -> None:
        self.leaving = False
        """Whether this worker can be home to nothing any more."""
        self.uncertain: dict[bytes, None] = {}
        """For which of those who wait here it is not certain that they belong here; those that were looked at last come
        last. All others do, whoever comes and goes: a home that is certain stays with its worker until `give_up`."""
        self._doubted: dict[bytes, None] = {}
        self.saw_stranger = False
        """Whether some token's home is a worker that we have not met."""
        self._estate = estate
        self._links = links
        self._live = live

    def home(self, token: bytes) -> Link | None:
        """The sibling that is home to `token`, or None when we are, or when nobody else could be.

        Unless we leave, asking makes us its home when nobody is: until `give_up`. So it does a worker on its own, since
        somebody may have come of whom it has not heard yet.
        """
        if self.leaving:
            return self.heir(token)
        assert self._estate.homes is not None
        pid, certain = self._estate.homes.settle(token, self._can_be_home)
        if certain:
            self.uncertain.pop(token, None)
        else:
            self.uncertain[token] = None
        return self._live.get(pid)

    def are_ours(self, token: bytes) -> bool:
        """Whether those who wait here for `token` belong here for certain."""
        if self.leaving or self._estate.homes is None or not self._estate.homes.is_ours(token):
            return False
        self.uncertain.pop(token, None)
        return True

    def _can_be_home(self, pid: int) -> bool:
        if pid in self._live:
            return True
        if all(link.pid != pid for link in self._links):
            self.saw_stranger = True
        return False

    def heir(self, token: bytes) -> Link | None:
        """The live sibling with room to which those who wait for `token` go when we leave: the one that is home to it
        by now, or else the readiest; None if there is none."""
        assert self._estate.homes is not None
        holder = self._estate.homes.holder(token)
        home = None if holder is None else self._live.get(holder)
        if home is not None and home.has_room(1):
            return home  # where its partner is
        return readiest(self._live.values(), 1)

    def give_up(self, token: bytes) -> None:
        """Be home to `token` no longer: nobody waits for it here."""
        self.uncertain.pop(token, None)
        if self._estate.homes is not None:
            self._estate.homes.give_up(token)

    def matched(self, token: bytes) -> None:
        """Two sides have just been matched for `token` here, and nobody waits for it any more. While workers come and
        go another one can be home to it, too; who waits there is a spare."""
        homes = self._estate.homes
        assert homes is not None
        self.uncertain.pop(token, None)
        if homes.match(token, time.monotonic()) is not None:
            for link in self._links:
                if link.greeting is not None:
                    link.say(encode_matched(token))

    def last_match(self, token: bytes) -> float:
        """When a worker last matched two sides for `token`, in monotonic seconds; 0 if that is forgotten."""
        return 0.0 if self._estate.homes is None else self._estate.homes.last_match(token)

    def doubt(self, token: bytes) -> None:
        """Those who wait here for `token` may belong elsewhere: ask again within a second."""
        self.uncertain[token] = self._doubted[token] = None

    def to_look_at(self) -> dict[bytes, None]:
        """For which tokens to ask again in this second: all that were doubted, and of the others for which it is not
        certain a few, so that it comes to each."""
        chosen, self._doubted = self._doubted, {}
        for token in list(islice(self.uncertain, LOOKS)):
            chosen[token] = None
            self.uncertain[token] = self.uncertain.pop(token)
        return chosen

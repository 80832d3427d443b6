"""Who comes too late to its own match: pure, no sockets, the clock is the caller's.

When two sides are matched, the spare connections that wait for the same token are closed. With several workers one of
these may be on its way to the token's home at that moment. So a home remembers for a while whom it has matched, and a
client that comes from a sibling but had asked for its partner before that is a spare.
"""

from __future__ import annotations

REMEMBERED_SECONDS = 5.0
"""For at least so long, and at most twice; longer than a client is under way, even when a sibling falls silent."""


class LateSpares:
    """The tokens that were matched of late, and when, in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._matched: dict[bytes, float] = {}
        self._matched_before: dict[bytes, float] = {}
        self._turned = 0.0

    def matched(self, token: bytes, now: float) -> None:
        """Remember that two sides have been matched for `token`."""
        self._matched[token] = now

    def is_late(self, token: bytes, asked: float) -> bool:
        """Whether a match for `token` was made after somebody had `asked` for it."""
        when = self._matched.get(token) or self._matched_before.get(token)
        return when is not None and asked < when

    def forget(self, now: float) -> None:
        """Forget what is long past; to be called every now and then."""
        if now - self._turned > REMEMBERED_SECONDS:
            self._turned = now
            self._matched_before, self._matched = self._matched, {}

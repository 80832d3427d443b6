"""When tokens were last matched, by any worker: a table in the memory that all workers share.

Two sides that wait for one token are matched once; whoever had asked for its partner before that, and is not one of
the two, is a spare. This is how all workers can tell.

The table needs no locks. A place holds a moment, and the token's number mixed with it; what is half written, or was
written by two at the same time, is no match of any token.
"""

from __future__ import annotations

import mmap
import struct

MATCHES = 1 << 16
PLACES_OF_A_TOKEN = 4
"""Places for matches, and in how many of them a token's may be. A new one takes the oldest of its four, which is then
forgotten: with a thousand pairs a second, of those matched a second ago not one in a million."""

_MATCH = struct.Struct("=QQ")  # the token's number XOR the next; when, in nanoseconds of CLOCK_MONOTONIC
_PLACES = struct.Struct(f"={2 * PLACES_OF_A_TOKEN}Q")  # so many of those
_WORD = 8
_FIRST_WORDS = range(0, 2 * PLACES_OF_A_TOKEN, 2)  # of the places, where each begins

SIZE = MATCHES * _MATCH.size
"""Bytes of the table; all zeros is an empty one."""


class Matches:
    """The table that begins at the byte `start` of `memory`. Tokens are known by their numbers, of up to 64 bits."""

    def __init__(self, memory: mmap.mmap, start: int) -> None:
        self._memory = memory
        self._start = start

    def note(self, number: int, when: float) -> None:
        """Two sides were matched for a token, at `when` in seconds of CLOCK_MONOTONIC."""
        nanoseconds = int(when * 1e9)
        first = self.first_place_of(number)
        held = _PLACES.unpack_from(self._memory, first)
        place = 0
        for word in _FIRST_WORDS:
            if held[word] ^ held[word + 1] == number:
                place = word
                break
            if held[word + 1] < held[place + 1]:
                place = word
        _MATCH.pack_into(self._memory, first + place * _WORD, number ^ nanoseconds, nanoseconds)

    def last(self, number: int) -> float:
        """When any worker last matched two sides for a token, as far as that is not forgotten; 0 if it is."""
        held = _PLACES.unpack_from(self._memory, self.first_place_of(number))
        latest = 0  # of several that workers have written at the same time
        for word in _FIRST_WORDS:
            if held[word] ^ held[word + 1] == number and held[word + 1] > latest:
                latest = held[word + 1]
        return latest / 1e9

    def first_place_of(self, number: int) -> int:
        """Where in the memory a token's places begin."""
        return self._start + number % (MATCHES // PLACES_OF_A_TOKEN) * _PLACES.size

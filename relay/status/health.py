"""Is all well? Pure: from what was read to words for a person, and a name for a program."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from relay.status.observer import NOT_ASKED_YET, Seen
from relay.status.rates import FINE_SECONDS
from relay.status.reading import Reading, together

OVERDUE: Final = 3 * FINE_SECONDS
"""Seconds after which a reading that has not come is worth a word."""

REMEMBERED: Final = 600.0
"""For so many seconds it is remembered how many workers there were; after that, fewer are what the operator wants."""

MISSING_FOR: Final = 15.0
"""Seconds that a worker may take to come back: supervisor starts one at once, and a restart takes a second."""

HELD_BACK_FOR: Final = 2.0
"""Seconds that records may be held back: another program's lock often lasts for a moment only."""

NOT_YET_WRITTEN: Final = (
    "a worker lives, and could not write into the database since it began, as when another program keeps that locked; "
    "the relay's log says why"
)

SILENT: Final = (
    "a worker lives and does not answer the others: what it holds stands still until it is ended; "
    "the relay's log says which one"
)

Kind = Literal["unreadable", "unheard", "missing", "silent", "full", "kept"]


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something that an operator should look after."""

    kind: Kind
    words: str


@dataclass(frozen=True, slots=True)
class Health:
    """`state` is a sentence, or several; with a complaint, /healthz says 503."""

    state: str
    complaints: tuple[Complaint, ...]

    @property
    def is_well(self) -> bool:
        """Whether there is nothing to complain of."""
        return not self.complaints


class Staff:
    """How many workers a relay has, and lately had: fewer than that for a while is a complaint.

    Args:
        wanted: how many there should be, if the operator has said so.
    """

    def __init__(self, wanted: int | None = None) -> None:
        self._wanted = wanted
        self._counts: deque[tuple[float, int]] = deque()
        self._short_since: float | None = None
        self._unwritten_since: float | None = None
        self._holding_since: float | None = None
        self._silent_since: float | None = None

    def note(self, now: float, living: int, unwritten: int = 0, holding: int = 0, silent: int = 0) -> None:
        """There are so many at `now`, in monotonic seconds; so many of them have not written into the database yet, so
        many hold records back, and so many do not answer the others."""
        self._silent_since = _since(self._silent_since, now, silent)
        self._unwritten_since = _since(self._unwritten_since, now, unwritten)
        self._holding_since = _since(self._holding_since, now, holding)
        while self._counts and now - self._counts[0][0] > REMEMBERED:
            self._counts.popleft()
        while self._counts and self._counts[-1][1] <= living:  # only the most of any time on matters
            self._counts.pop()
        self._counts.append((now, living))
        if living >= self.expected:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now

    @property
    def expected(self) -> int:
        """How many there should be."""
        if self._wanted is not None:
            return self._wanted
        return self._counts[0][1] if self._counts else 0

    def are_missing(self, now: float) -> bool:
        """Whether there have been too few for longer than a restart takes."""
        return self._short_since is not None and now - self._short_since >= MISSING_FOR

    def cannot_write(self, now: float) -> bool:
        """Whether one has not written for longer than a start takes."""
        return self._unwritten_since is not None and now - self._unwritten_since >= MISSING_FOR

    def is_silent(self, now: float) -> bool:
        """Whether one has not answered for longer than a machine that is overwhelmed keeps it from that."""
        return self._silent_since is not None and now - self._silent_since >= MISSING_FOR

    def hold_back(self, now: float) -> bool:
        """Whether records have been held back for longer than a moment."""
        return self._holding_since is not None and now - self._holding_since >= HELD_BACK_FOR


def _since(before: float | None, now: float, count: int) -> float | None:
    if not count:
        return None
    return now if before is None else before


def judge(seen: Sequence[Seen], staffs: Sequence[Staff], now: float) -> Health:
    """What to say of these databases; `now` is in monotonic seconds."""
    complaints = []
    for one, staff in zip(seen, staffs, strict=True):
        name = f" ({one.path})" if len(seen) > 1 else ""
        complaints += [Complaint(kind, words + name) for kind, words in _of_one(one, staff, now)]
    reading = together([one.reading for one in seen if one.reading is not None])
    return Health(_state(reading, complaints), tuple(complaints))


def _of_one(seen: Seen, staff: Staff, now: float) -> list[tuple[Kind, str]]:
    reading = seen.reading
    if now - seen.at > OVERDUE:
        reason = NOT_ASKED_YET if seen.trouble == NOT_ASKED_YET else f"it was last read {now - seen.at:.0f} s ago"
        return [("unreadable", f"the database cannot be read at the moment: {reason}")]
    if reading is None:
        return [("unreadable", f"the database cannot be read: {seen.trouble}")]
    if reading.unwritten and not reading.living:
        return [("kept", NOT_YET_WRITTEN)]
    complaints = _unheard(reading)
    if not complaints and staff.are_missing(now):
        running = reading.workers_running
        complaints = [("missing", f"workers are missing: {running} run, there should be {staff.expected}")]
    if not _unheard(reading) and staff.is_silent(now):
        complaints.append(("silent", SILENT))
    if _is_full(reading):
        complaints.append(("full", "the relay is full: each worker has as many connections as it may have"))
    kept = reading.gauge("kept_records") or 0
    if staff.cannot_write(now):
        complaints.append(("kept", NOT_YET_WRITTEN))
    elif kept:
        complaints.append(("kept", f"{kept:.0f} records are held back; the relay's log says why"))
    elif staff.hold_back(now) and not reading.disk_is_full:
        complaints.append(("kept", "records are held back, they cannot be written into the database; the log says why"))
    elif reading.disk_is_full and (staff.hold_back(now) or (reading.living and reading.holding is None)):
        complaints.append(("kept", "records are held back: no space is left on the database's disk"))
    return complaints


def _unheard(reading: Reading) -> list[tuple[Kind, str]]:
    if reading.refreshed is None and not reading.living:
        return [("unheard", "the relay was not heard of yet: no worker has written into the database")]
    if not reading.living:
        return [("unheard", "the relay does not run: none of its workers lives")]
    if reading.is_stale():
        return [("unheard", "the relay was not heard of for more than ten minutes, though its workers live")]
    return []


def _is_full(reading: Reading) -> bool:
    limits = [worker.gauges for worker in reading.living if worker.gauges.get("connections_limit")]
    return bool(limits) and all(each.get("connections", 0) >= each["connections_limit"] for each in limits)


def _state(reading: Reading | None, complaints: Sequence[Complaint]) -> str:
    says = [_sentence(complaint.words) for complaint in complaints]
    if reading is not None and reading.living and not any(complaint.kind == "unheard" for complaint in complaints):
        says.append(_running(reading))
    return " ".join(says)


def _running(reading: Reading) -> str:
    workers = reading.workers_running
    runs = f"The relay runs with {workers} worker{'s' if workers != 1 else ''}"
    if not reading.connected and not reading.waiting:
        return f"{runs} and is idle."
    pairs = f"{reading.connected} transfer{'s' if reading.connected != 1 else ''}"
    waits = f"{reading.waiting} client{'s wait' if reading.waiting != 1 else ' waits'} for a partner"
    return f"{runs}: {pairs}, and {waits}."


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."

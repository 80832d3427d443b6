"""What each worker holds, and which of them live: `worker_share`, and `current`, which is the sum over it.

Whoever writes drops the shares of workers that are gone. Who has a `lifeline` lives as long as it is held. A share
without one is of a worker of an earlier version, or of one that cannot have one: /proc tells of that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final

from relay.process.dataclass import dataclass
from relay.usage import lifeline, told
from relay.usage.processes import UNKNOWN_BOOT, is_ending, is_living, is_of_another_boot, process_start
from relay.usage.record import Current
from relay.usage.sqlite import sqlite3
from relay.usage.told import Description
from relay.usage.trouble import Trouble


def _whole(column: str, otherwise: str) -> str:
    return f"CASE typeof({column}) WHEN 'integer' THEN {column} ELSE {otherwise} END"


# Others may have put anything into any column; what is no worker's is nobody's share.
_OF_A_WORKER: Final = "typeof(pid) = 'integer' AND typeof(process_start) = 'text'"
_OTHERS: Final = (
    f"SELECT pid, process_start, {_whole('byte', 'NULL')}, {_whole('connected', '0')}, {_whole('waiting', '0')}, "
    f"{_whole('partal_bytes', '0')} FROM worker_share LEFT JOIN lifeline USING (pid, process_start) "
    f"WHERE {_OF_A_WORKER} AND NOT (pid = ? AND process_start = ?)"
)
_ENTERED: Final = (
    f"SELECT pid, process_start, {_whole('byte', 'NULL')} FROM (SELECT pid, process_start FROM worker_status UNION "
    "SELECT pid, process_start FROM worker_share UNION SELECT pid, process_start FROM lifeline) "
    f"LEFT JOIN lifeline USING (pid, process_start) WHERE {_OF_A_WORKER}"
)
_LIFELINES: Final = f"SELECT pid, process_start, {_whole('byte', 'NULL')} FROM lifeline WHERE {_OF_A_WORKER}"
_ENTER: Final = "REPLACE INTO lifeline (pid, process_start, byte) VALUES (?, ?, ?)"
_TELL: Final = "REPLACE INTO worker_share (pid, process_start, connected, waiting, partal_bytes) VALUES (?, ?, ?, ?, ?)"
_DROP_SHARE: Final = "DELETE FROM worker_share WHERE pid = ? AND process_start = ?"
_DROP_LIFELINE: Final = "DELETE FROM lifeline WHERE pid = ? AND process_start = ?"


class NotEntered(Exception):
    """A worker lives that has the file open and is not entered in it: one that has only begun, or is just ending."""


def blurs(connection: sqlite3.Connection, fd: int) -> set[int]:
    """Return by how many seconds the workers that live round what they record, as far as they say; 0 is not at all.

    For programs that write besides the relay. A worker that begins afterwards has held its lifeline by the time at
    which it is entered, and waits for the transaction.

    Args:
        connection: in a transaction that writes; or to a copy of the file.
        fd: the file itself, open for reading, until the connection is closed.

    Raises:
        NotEntered: nobody can tell how one of them rounds.
    """
    entered = connection.execute(_ENTERED).fetchall()
    if not lifeline.held(fd) <= {byte for _, _, byte in entered}:
        raise NotEntered
    living = ((pid, start) for pid, start, byte in entered if _lives(fd, pid, start, byte))
    said = {told.blur_of(connection, worker) for worker in living}
    return {seconds for seconds in said if seconds is not None}


@dataclass(frozen=True, slots=True)
class _Share:
    """What another worker holds, and how it is known."""

    pid: int
    start: str
    byte: int | None
    held: Current


class Shares:
    """The share of this worker, among those of the others.

    Args:
        current: returns what this worker holds; sizes are to be blurred already.
        describe: returns what else it tells of itself, blurred as well.
    """

    def __init__(self, current: Callable[[], Current], describe: Callable[[], Description] = Description) -> None:
        self._current = current
        self._describe = describe
        self._pid = os.getpid()
        self._byte = lifeline.new_byte()
        self._seen_start = _own_start()
        self._start = self._seen_start or f"{UNKNOWN_BOOT}/{self._byte}"
        self._fd = -1
        self._has_lifeline = False
        self._holds_back = False
        self._refused = ""
        """Why this worker must not record here, once that is known: for good. Otherwise it would write, beside rows
        that are rounded otherwise, in the moment in which those that wrote them leave."""
        self._service_began: int | None = None  # that this worker belongs to; when it did
        self._entering: int | None = None  # the same of the one that it is about to belong to

    def live(self, fd: int) -> None:
        """Hold a lifeline, from now on, until the database file that `fd` is open to is closed.

        Raises:
            Trouble: nobody could tell that this worker lives.
        """
        self._fd = fd
        self._holds_back = False
        self._has_lifeline = lifeline.hold(fd, self._byte)
        if not self._has_lifeline and self._seen_start is None:
            raise Trouble("nobody could tell that this worker lives: there is no /proc, and no lock; mount /proc")

    def hold_back(self, *, holds: bool) -> None:
        """Let others see whether this worker holds records back, as long as the file is open."""
        if holds != self._holds_back and self._has_lifeline:
            self._holds_back = holds
            (lifeline.hold_back if holds else lifeline.hold_nothing_back)(self._fd, self._byte)

    def enter(self, connection: sqlite3.Connection, blur_seconds: int | None = None) -> bool:
        """Say how this worker is known; return whether the service goes on: another one that has signed on lives, or it
        is the service that this worker belonged to before it had to open the file again. If not, it begins anew.

        Args:
            connection: in a transaction.
            blur_seconds: by how much this worker rounds what it records.

        Raises:
            Trouble: one of them is on another machine, or knows the file by another name, or rounds otherwise, or has
                done so at an earlier attempt.
        """
        if self._refused:
            raise Trouble(self._refused)
        if self._has_lifeline:
            self._enter_among(connection)
        shares = self._others(connection)
        living = [share for share in shares if self._lives(share)]
        for share in living:
            self._check_blur(blur_seconds or 0, told.blur_of(connection, (share.pid, share.start)))
        if not living:
            self._check_names()
        began = told.service_began(connection)
        goes_on = (
            bool(living) or self._serves_unlisted(shares) or (began is not None and began == self._service_began)
        )
        if not goes_on:
            told.begin_anew(connection)
        self._entering = told.service_began(connection)
        return goes_on

    def entered(self) -> None:
        """To be called when what `enter` has written is committed: from now on this worker is of the service."""
        self._service_began = self._entering
        if self._has_lifeline:
            lifeline.sign_on(self._fd, self._byte)

    def _serves_unlisted(self, shares: list[_Share]) -> bool:
        """Whether somebody has signed on whose row somebody else has taken away.

        A lifeline alone does not say so: of those that begin at the same time, the others have theirs already when the
        first one enters itself. And who is listed is judged by its row: it may be about to end.
        """
        return self._has_lifeline and not lifeline.signed_on(self._fd) <= {share.byte for share in shares}

    def _check_names(self) -> None:
        """Raise Trouble when those that live may be entered in a -wal of their own, beside another name of the file."""
        if self._has_lifeline and lifeline.is_any_held(self._fd) and os.fstat(self._fd).st_nlink > 1:
            raise Trouble(
                "another relay records into it under another of its names (hard links), and each would lose what "
                "the other writes; give both the same path"
            )

    def _check_blur(self, own: int, others: int | None) -> None:
        """Raise Trouble, now and from now on, when rows of another worker are rounded otherwise: exact ones would stay
        beside them for good."""
        if others in (None, own):
            return
        has, have = (f"--blur-usage {seconds}" if seconds else "no --blur-usage" for seconds in (own, others))
        self._refused = (
            f"another relay records into it with {have}, and this one has {has}: exact times would stay beside rounded "
            "ones for good; give both the same (to change it, stop all of them first), or each a file of its own, and "
            "start this one anew"
        )
        raise Trouble(self._refused)

    def _enter_among(self, connection: sqlite3.Connection) -> None:
        for pid, start, byte in connection.execute(_LIFELINES).fetchall():
            if byte is None or not self._holds(byte):
                connection.execute(_DROP_LIFELINE, (pid, start))
            elif is_of_another_boot(start):
                raise Trouble(
                    "a worker on another machine (or in another virtual one) records into it, which SQLite's WAL "
                    "cannot take; give each machine a file of its own, on a local disk"
                )
            elif (pid, start) == (self._pid, self._start):
                # In another PID namespace, of the same number, and begun in the same hundredth of a second.
                self._start = f"{start}/{self._byte}"
        connection.execute(_ENTER, (self._pid, self._start, self._byte))

    def tell(self, connection: sqlite3.Connection, *, leaving: bool, whole: bool = True) -> Current:
        """Write this worker's share, or take it away, and drop those of workers that are gone; return the sum.

        With `whole`, write all that it tells of itself.
        """
        held = []
        for share in self._others(connection):
            if self._lives(share):
                held.append(share.held)
            else:
                _drop(connection, share.pid, share.start)
        if whole or leaving:
            told.tell(connection, (self._pid, self._start), self._describe())
        if leaving:
            # Before this is committed: until then nobody else enters, and who does so afterwards finds nothing of it.
            lifeline.sign_off(self._fd, self._byte)
            _drop(connection, self._pid, self._start)
        else:
            own = self._current()
            connection.execute(_TELL, (self._pid, self._start, own.connected, own.waiting, own.partal_bytes))
            held.append(own)
        if whole:
            told.settle_orphans(connection)
        return Current(
            sum(one.connected for one in held), sum(one.waiting for one in held), sum(one.partal_bytes for one in held)
        )

    def _others(self, connection: sqlite3.Connection) -> list[_Share]:
        rows = connection.execute(_OTHERS, (self._pid, self._start)).fetchall()
        return [_Share(pid, start, byte, Current(*numbers)) for pid, start, byte, *numbers in rows]

    def _lives(self, share: _Share) -> bool:
        return _lives(self._fd, share.pid, share.start, share.byte if self._has_lifeline else None)

    def _holds(self, byte: int) -> bool:
        try:
            return lifeline.is_held(self._fd, byte)
        except OSError:
            return False


def _lives(fd: int, pid: int, start: str, byte: int | None) -> bool:
    """Whether a worker does, by its lifeline if it has one, and this process can ask about it."""
    with contextlib.suppress(OSError):
        if byte is not None:
            return lifeline.is_held(fd, byte) and not is_ending(pid, start)
    return is_living(pid, start)


def _drop(connection: sqlite3.Connection, pid: int, start: str) -> None:
    connection.execute(_DROP_SHARE, (pid, start))
    connection.execute(_DROP_LIFELINE, (pid, start))
    told.settle(connection, (pid, start))


def _own_start() -> str | None:
    try:
        return process_start(os.getpid())
    except OSError:
        return None

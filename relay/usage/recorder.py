"""What the relay calls to have a finished connection recorded: it queues, and threads of their own write.

recorder = open_recorder(usage_db="usage.sqlite", log_fd=3, blur_seconds=600, current=relay.current, warn=warn)
recorder.record(Record(started, total_time, waiting_time, total_bytes, "happy"))
...
recorder.close(timeout=10)
"""

from __future__ import annotations

import time
from collections.abc import Callable

from relay.usage.json_log import JsonLog, check_log_fd
from relay.usage.record import Current, Record
from relay.usage.sign import Sign
from relay.usage.told import Description
from relay.usage.trouble import UsageError
from relay.usage.unhurried import Unhurried
from relay.usage.writer import Request, Warn, Writer

__all__ = ["Recorder", "UsageError", "check_log_fd", "open_recorder"]


class Recorder:
    """Queues what is to be recorded; made by `open_recorder`.

    Args:
        database: the writer of the usage database, if there is one.
        log: the writer of the JSON lines, if there are any.
        unhurried: what holds back their lines for the relay's log, if something does.
    """

    def __init__(self, database: Writer | None, log: Writer | None, unhurried: Unhurried | None = None) -> None:
        self._writers = [writer for writer in (database, log) if writer is not None]
        self._queues = [writer.record for writer in self._writers]
        self._database = database
        self._log = log
        self._unhurried = unhurried

    def record(self, record: Record) -> None:
        """Queue one finished connection; never waits. It is written within about 10 ms when nothing is in the way.

        Call it when the connection is out of what `current` counts: both are written together.
        """
        for queue in self._queues:
            queue(record)

    def refresh_current(self, *, tick: bool = False) -> None:
        """Queue a refresh of the `current` table; `tick` notes the time too, so no event of a client may cause it."""
        if self._database is not None:
            self._database.request(Request.TICK if tick else Request.REFRESH)

    def kept_lines(self) -> int:
        """How many records have no JSON line yet, since these are in trouble, and have been for longer than a moment.

        Of those that are not in the database nothing can be told in there, until they are; a lock tells of them
        (`lifeline`).
        """
        return 0 if self._log is None else self._log.kept_for_long

    def held_back(self) -> list[str]:
        """What is lost if the process ends now, a line for each destination that does not work."""
        return [line for writer in self._writers if (line := writer.held_back())]

    def hurry(self) -> None:
        """Have `close` wait for nothing that is in the way; before it or meanwhile, as in a signal's handler."""
        for writer in self._writers:
            writer.hurry()

    def close(self, timeout: float) -> int:
        """Write all that is queued, sign this process off from the database, and end the threads.

        Blocks the calling thread, for `timeout` seconds at most. Nothing may be recorded after it.

        Returns:
            how many records are missing from the database, the JSON lines or both; a line in the log says why.
        """
        deadline = time.monotonic() + timeout
        for writer in self._writers:
            writer.leave(deadline)
        unwritten = max([writer.wait() for writer in self._writers], default=0)
        if self._unhurried is not None:
            self._unhurried.close()
        return unwritten


def open_recorder(
    *,
    usage_db: str | None,
    log_fd: int | None,
    blur_seconds: int | None,
    current: Callable[[], Current],
    warn: Warn,
    describe: Callable[[], Description] = Description,
    log_path: str | None = None,
) -> Recorder:
    """Check where usage is to be recorded, start the threads that write it, and sign this process on in the database.

    A process has at most one recorder of a database at a time. A database that is locked at the moment, or a full disk,
    does not keep the relay from starting: after a second it goes on, and the records are kept.

    Args:
        usage_db: path of the SQLite file, made when missing; None for no database.
        log_fd: file descriptor for JSON lines; None for none.
        blur_seconds: round times down to a multiple of this, and sizes up; None records both exactly.
        current: returns what this process holds at the moment; called on another thread, so it must only read.
        describe: returns what it tells of itself beside that; called like `current`.
        log_path: what file `log_fd` was opened as, where it may have been renamed since; None where that is not known.
        warn: writes one line to the relay's log; called on other threads. With `blur_seconds`, at moments that have
            nothing to do with what it is about.

    Raises:
        UsageError: one of them cannot be used; a file that is not the relay's is left byte for byte as it was.
    """
    unhurried = None if blur_seconds is None else Unhurried(warn, blur_seconds)
    try:
        return _open(
            usage_db,
            log_fd,
            log_path,
            blur_seconds,
            current,
            describe,
            warn if unhurried is None else unhurried,
            unhurried,
        )
    except UsageError:
        if unhurried is not None:
            unhurried.close()
        raise


def _open(
    usage_db: str | None,
    log_fd: int | None,
    log_path: str | None,
    blur_seconds: int | None,
    current: Callable[[], Current],
    describe: Callable[[], Description],
    warn: Warn,
    unhurried: Unhurried | None,
) -> Recorder:
    log = database = None
    sign = Sign()
    if log_fd is not None:
        check_log_fd(log_fd, usage_db, log_path)
        log = Writer(JsonLog(log_fd, blur_seconds, warn, log_path), warn, sign, tells_how_long=blur_seconds is None)
    if usage_db is not None:
        from relay.usage.database import Database  # not before: SQLite takes 1.5 MB

        destination = Database(usage_db, blur_seconds, current, describe, warn)
        database = Writer(destination, warn, sign, tells_how_long=blur_seconds is None)
        database.start()
    if log is not None:
        log.start()
    return Recorder(database, log, unhurried)

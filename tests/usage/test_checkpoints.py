"""When what is in the -wal is copied into the database."""

from __future__ import annotations

import os
import sqlite3
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from relay.usage.database import Database
from relay.usage.looks import LOOKS_MAY_TAKE
from relay.usage.record import Current, Record
from relay.usage.told import Description
from relay.usage.write_ahead_log import AGAIN_FRAMES, CHECKPOINT_FRAMES, WriteAheadLog


class Growing:
    """A database, its log, and somebody who writes a page with each transaction."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.connection = connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("CREATE TABLE number (value)")
        connection.execute("INSERT INTO number VALUES (0)")
        self.log = WriteAheadLog(str(path))

    def grow(self, frames: int) -> None:
        """By so many frames; the log is looked at in the end."""
        for _ in range(frames):
            self.connection.execute("UPDATE number SET value = value + 1")
        assert not self.log.is_broken(every_frame=False)

    def copied(self) -> bool:
        """Have the log copied; whether that was all of it."""
        _, frames, copied = self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return bool(frames == copied)


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Growing]:
    """One of them."""
    path = tmp_path / "db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        database = Growing(path, connection)
        yield database
        connection.close()
        database.log.close()


def test_it_is_once_for_each_thousand_frames(growing: Growing) -> None:
    growing.grow(CHECKPOINT_FRAMES - 100)
    assert not growing.log.is_due()
    growing.grow(100)
    assert growing.log.is_due()
    assert growing.copied()
    assert not growing.log.is_due()
    growing.grow(100)
    assert not growing.log.is_due(), "the log has begun anew"
    growing.grow(CHECKPOINT_FRAMES)
    assert growing.log.is_due()


def test_where_a_reader_kept_some_of_them_it_is_tried_again_soon(growing: Growing, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT value FROM number").fetchone()
        growing.grow(CHECKPOINT_FRAMES)
        assert growing.log.is_due()
        assert not growing.copied()
        growing.log.some_stay()
        assert not growing.log.is_due()
        growing.grow(AGAIN_FRAMES - 10)
        assert not growing.log.is_due()
    growing.grow(10)
    assert growing.log.is_due()
    assert growing.copied()


TURN_SECONDS = 0.01
FRAME_SECONDS = 10e-6


def test_while_somebody_reads_for_long_a_record_costs_no_more_however_long_the_log_becomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a turn takes 10 ms, and each frame that is looked at 10 µs."""
    path = tmp_path / "db"
    now, looks = 0.0, list[float]()
    fits = WriteAheadLog._fits

    def fits_in_that_time(self: WriteAheadLog, index: object, *, every_frame: bool) -> bool:
        nonlocal now
        if every_frame:
            looks.append((index.frames - index.copied) * FRAME_SECONDS)  # type: ignore[attr-defined]
            now += looks[-1]
        return fits(self, index, every_frame=every_frame)  # type: ignore[arg-type]

    monkeypatch.setattr(WriteAheadLog, "_fits", fits_in_that_time)
    monkeypatch.setattr("relay.usage.looks.time", SimpleNamespace(monotonic=lambda: now))
    database = Database(str(path), 600, lambda: Current(0, 0, 0), Description, lambda line: None)

    def write(count: int) -> None:
        nonlocal now
        for _ in range(count):
            database.write(deque([Record(1e9, 0.5, None, 0, "errory")]), frozenset())
            now += TURN_SECONDS

    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        write(1)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM usage").fetchone()
        write(2000)
        assert os.path.getsize(f"{path}-wal") > 8 * CHECKPOINT_FRAMES * 4096
        assert len(looks) > 5, "it is looked at all the same"
        assert sum(looks) - max(looks) < LOOKS_MAY_TAKE * now
    write(int(2 * max(looks) / LOOKS_MAY_TAKE / TURN_SECONDS) + AGAIN_FRAMES)
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as file:
        ((copied,),) = file.execute("SELECT count(*) FROM usage")
    assert copied > 2000, "what the reader has kept from being copied is in the file when it has gone"
    database.close()

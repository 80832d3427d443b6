"""When what is in the -wal is copied into the database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

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

"""Records that the tests of usage make, the recorder that takes them, and what of them has come to be written.

    with recording(tmp_path / "db") as recorder:        # or a file descriptor, for JSON lines
        record_numbers(recorder, 1, 2, 3)
        wait_for_rows(tmp_path / "db", 3)
        assert numbers(tmp_path / "db") == [1, 2, 3]

A record is told by its number, which is how many bytes its transfer moved.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from relay.usage.record import Current, Mood, Record
from relay.usage.recorder import Recorder, open_recorder
from tests.support.harness import query, wait_until

MOODS: tuple[Mood, ...] = ("happy", "lonely", "errory")

sizes = st.integers(min_value=0, max_value=2**50) | st.sampled_from([10**n + d for n in range(16) for d in (-1, 0, 1)])
records = st.builds(
    Record,
    started=st.floats(min_value=0, max_value=4e9),
    total_time=st.floats(min_value=0, max_value=1e7),
    waiting_time=st.none() | st.floats(min_value=0, max_value=1e5),
    total_bytes=sizes,
    mood=st.sampled_from(MOODS),
)


def nobody() -> Current:
    """What a relay holds that nobody is connected to."""
    return Current(0, 0, 0)


def recorder_of(
    path: Path | None,
    fd: int | None,
    warnings: list[str],
    blur: int | None = None,
    current: Callable[[], Current] = nobody,
) -> Recorder:
    """Open a recorder into the database `path` and as JSON lines into `fd`; what it warns of goes to `warnings`."""
    return open_recorder(
        usage_db=None if path is None else str(path),
        log_fd=fd,
        blur_seconds=blur,
        current=current,
        warn=warnings.append,
    )


@contextmanager
def recording(
    to: Path | int,
    warnings: list[str] | None = None,
    blur: int | None = None,
    current: Callable[[], Current] = nobody,
) -> Iterator[Recorder]:
    """Have a recorder into one database, or as JSON lines into one file descriptor; it is closed at the end."""
    path, fd = (None, to) if isinstance(to, int) else (to, None)
    recorder = recorder_of(path, fd, [] if warnings is None else warnings, blur, current)
    try:
        yield recorder
    finally:
        recorder.close(5 if fd is None else 0.5)  # a log that nobody reads is full for ever


def numbered(number: int, mood: Mood = "happy") -> Record:
    """A record that its number tells from others."""
    return Record(1_800_000_000.25, 1.5, 0.25, number, mood)


def record_numbers(recorder: Recorder, *numbers: int) -> None:
    """Record connections with these numbers."""
    for number in numbers:
        recorder.record(numbered(number))


def rows(path: Path, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
    """The rows of a table in the database `path`."""
    return [tuple(row) for row in query(path, f"SELECT {columns} FROM {table}")]


def numbers(path: Path) -> list[int]:
    """The numbers of the records in a database, in their order."""
    return [number for (number,) in rows(path, "usage", "bytes")]


def numbers_of_lines(lines: bytes) -> list[int]:
    """The numbers of the records in these lines, each of which must be a whole JSON object."""
    assert lines == b"" or lines.endswith(b"}\n")
    return [json.loads(line)["total_bytes"] for line in lines.splitlines()]


def wait_for_rows(path: Path, count: int) -> None:
    """Return when a database has so many records."""
    wait_until(lambda: len(numbers(path)) >= count, what=f"{count} rows")


def assert_sums_agree(path: Path) -> None:
    """`all_time` says what the rows add up to."""
    expected = rows(
        path,
        "usage",
        "coalesce(sum(bytes), 0), count(*), count(*) FILTER (WHERE result = 'happy'), "
        "count(*) FILTER (WHERE result = 'lonely'), count(*) FILTER (WHERE result = 'errory')",
    )
    assert rows(path, "all_time") == expected


@contextmanager
def holding_the_lock(path: Path) -> Iterator[None]:
    """Let nobody else write to a database meanwhile."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def delete_database(path: Path) -> None:
    """Delete a database; its own file last, so that none of those is of a new one that is begun meanwhile."""
    for end in ("-shm", "-wal", ""):
        Path(f"{path}{end}").unlink(missing_ok=True)


def append_to(path: Path) -> int:
    """Open a log as the shell's `>>` does."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

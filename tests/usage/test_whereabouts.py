"""The relay sees by itself, with nothing to record, that another file was put in the place of its database."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
from pathlib import Path

import pytest

from relay.report.database import opened
from relay.usage.whereabouts import Whereabouts
from tests.support.harness import Relay, Service, connect, query, read_to_end, wait_until

DOCS = Path(__file__).parents[2] / "docs"


def refused(relay: Service, count: int) -> None:
    """Have the relay record so many connections."""
    before = query(relay.usage_db, "SELECT connections FROM all_time")[0][0]
    for _ in range(count):
        with connect(relay.port) as sock:
            sock.sendall(b"hello\n")
            read_to_end(sock)
    wait_until(lambda: counted(relay.usage_db) == (before + count,) * 2, what=f"{count} more records")


def counted(path: Path) -> tuple[int, int]:
    """How many connections there are by `all_time`, and by the rows."""
    ((connections, rows),) = query(path, "SELECT (SELECT connections FROM all_time), (SELECT count(*) FROM usage)")
    return connections, rows


def back_up(path: Path, copy: Path) -> None:
    """As docs/usage-logs.md has it."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        database.execute("VACUUM INTO ?", [str(copy)])


def delete_some(path: Path, count: int) -> None:
    """As somebody does who throws old rows away, and is the only one who has the file open."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as database:
        database.execute("DELETE FROM usage WHERE rowid IN (SELECT rowid FROM usage LIMIT ?)", [count])


def printed(page: str, pattern: str) -> str:
    """The only command of a page that this is found in."""
    (command,) = re.findall(rf"^ *(.*{pattern}.*)$", (DOCS / page).read_text(), re.MULTILINE)
    return str(command)


def test_an_idle_relay_goes_on_in_the_file_that_was_put_there_before_anybody_asks_it_to_record(
    any_relay: Service, tmp_path: Path
) -> None:
    path, backup = any_relay.usage_db, tmp_path / "backup"
    refused(any_relay, 12)
    back_up(path, backup)
    refused(any_relay, 5)
    os.replace(backup, path)
    workers = len(any_relay.living())
    told = "the records go on in the file that is there now"
    wait_until(lambda: any_relay.log_text().count(told) == workers, 20, "all workers to notice")
    delete_some(path, 2)
    assert counted(path) == (12, 10)
    refused_after = (13, 11)
    with connect(any_relay.port) as sock:
        sock.sendall(b"hello\n")
        read_to_end(sock)
    wait_until(lambda: counted(path) == refused_after, what="the next record")
    assert any_relay.stop() == 0
    assert counted(path) == refused_after


@pytest.mark.parametrize("state", ["idle", "busy", "killed"])
def test_the_printed_command_puts_a_copy_there_whoever_opens_it_next(relay: Relay, tmp_path: Path, state: str) -> None:
    command = printed("usage-logs.md", "mv copy.sqlite usage.sqlite")
    path = relay.usage_db
    refused(relay, 12)
    back_up(path, tmp_path / "copy.sqlite")
    refused(relay, 5)
    if state == "killed":
        relay.kill()
    if state == "busy":
        with connect(relay.port) as sock:
            sock.sendall(b"hello\n")
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=True)
    delete_some(path, 2)
    if state == "busy":
        wait_until(lambda: "go on in the file that is there now" in relay.log_text(), 20, "the relay to notice")
        assert counted(path) in ((12, 10), (13, 11))
    else:
        assert counted(path) == (12, 10)
        with opened(path) as database:
            assert database.summary().all_time.connections == 12


def test_the_first_hour_restores_in_the_same_way(tmp_path: Path) -> None:
    command = printed("first-hour.md", "restored.sqlite").removeprefix("runuser -u relay-gevent -- ")
    folder = tmp_path / "relay"
    folder.mkdir()
    for name in ("usage.sqlite", "usage.sqlite-wal", "usage.sqlite-shm"):
        (folder / name).write_text("former")
    (tmp_path / "backup.sqlite").write_text("backup")
    command = command.replace("/var/lib/relay-gevent/var", str(tmp_path))
    subprocess.run(["/bin/sh", "-c", command], cwd="/", check=True)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("usage.sqlite", "backup")]
    assert (tmp_path / "backup.sqlite").read_text() == "backup"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file."""
    (tmp_path / "db").write_text("one")
    return tmp_path / "db"


def put(path: Path, text: str) -> None:
    """Put another file there."""
    other = path.with_name("other")
    other.write_text(text)
    os.replace(other, path)


def test_another_file_is_seen_once_and_not_before_it_rests(path: Path) -> None:
    whereabouts = Whereabouts(str(path))
    assert [whereabouts.is_another() for _ in range(3)] == [False] * 3
    with path.open():  # so that its number is given to no other
        put(path, "two")
        assert not whereabouts.is_another()
        path.write_text("two and more")
        assert not whereabouts.is_another()
        assert [whereabouts.is_another() for _ in range(3)] == [True, False, False]


def test_neither_what_is_written_to_the_file_nor_a_missing_or_empty_one_is_another(path: Path) -> None:
    whereabouts = Whereabouts(str(path))
    path.write_text("one and more")
    assert not any(whereabouts.is_another() for _ in range(3))
    with path.open():
        path.unlink()
        assert not any(whereabouts.is_another() for _ in range(3))
        path.touch()
        assert not any(whereabouts.is_another() for _ in range(3))
        path.write_text("two")
        assert [whereabouts.is_another() for _ in range(3)] == [False, True, False]

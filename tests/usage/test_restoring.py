"""A backup is put in the place of the database, while the -wal of a relay that was killed lies beside it.

The relay that starts then goes on from the backup, whatever that -wal holds; and after a mere kill, or in a copy of the
whole folder, from the last record.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.report.database import opened
from relay.usage.belonging import owner_of
from relay.usage.schema import check_file, open_database
from relay.usage.trouble import UsageError
from tests.support.harness import wait_until
from tests.support.usage_records import assert_sums_agree, rows
from tests.support.usage_worker import UsageWorker

PUT_IN_PLACE = "another file was put in its place, beside the -wal of the one before"


def record(worker: UsageWorker, path: Path, count: int, then: int) -> None:
    """Record so many connections, and wait until there are `then` in all."""
    worker.ask(f"record {count} 10 happy")
    wait_until(lambda: counted(path) == then, what=f"{then} rows")


def counted(path: Path) -> int:
    """Return how many rows there are."""
    ((count,),) = rows(path, "usage", "count(*)")
    return int(count)


def vacuum_into(path: Path, copy: Path) -> None:
    """As docs/usage-logs.md has it."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        database.execute("VACUUM INTO ?", [str(copy)])


def dump(path: Path, copy: Path) -> None:
    """As `sqlite3 .dump` does, which also is how a damaged one is saved (.recover)."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database,
        contextlib.closing(sqlite3.connect(copy)) as made,
    ):
        made.executescript("\n".join(database.iterdump()))
        for pragma in ("application_id", "user_version"):
            ((value,),) = database.execute(f"PRAGMA {pragma}")
            made.execute(f"PRAGMA {pragma} = {value}")


def back_up(path: Path, copy: Path) -> None:
    """As `sqlite3 .backup` does; the copy is under WAL as the database is."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database,
        contextlib.closing(sqlite3.connect(copy)) as made,
    ):
        database.backup(made)


def move(backup: Path, path: Path) -> None:
    """As `mv` does."""
    os.replace(backup, path)


def copy_over(backup: Path, path: Path) -> None:
    """As `cp` does: into the file that is there."""
    shutil.copyfile(backup, path)


def remove_and_copy(backup: Path, path: Path) -> None:
    """As `rm` and `cp` do; the new file may get the old one's number."""
    path.unlink()
    shutil.copyfile(backup, path)


def notes_are_taken(folder: Path) -> bool:
    """Whether the file system keeps what a user notes on a file."""
    try:
        os.setxattr(folder, "user.relay-gevent.test", b"")
    except OSError:
        return False
    return True


def generation_is_told(path: Path) -> bool:
    """Whether the file system tells inodes of one number from each other."""
    return not owner_of(str(path)).endswith(b":-")


# Nothing tells a copy by .backup from the file itself when it is written over that one: docs/usage-logs.md says so.
@pytest.mark.parametrize(
    ("made", "put"),
    [
        *((made, put) for made in (vacuum_into, dump) for put in (move, copy_over, remove_and_copy)),
        (back_up, move),
        (back_up, remove_and_copy),
    ],
)
@pytest.mark.parametrize("more", [50, 3000])
def test_a_backup_is_what_the_relay_goes_on_from_though_a_killed_ones_wal_is_beside_it(
    tmp_path: Path, made: Callable[[Path, Path], None], put: Callable[[Path, Path], None], more: int
) -> None:
    if made is back_up and not notes_are_taken(tmp_path):
        pytest.skip("the temporary folder has to be on a file system with extended attributes, such as ext4")
    path, backup = tmp_path / "db", tmp_path / "backup"
    with UsageWorker("--usage-db", str(path)) as worker:
        record(worker, path, 1500, 1500)
        made(path, backup)
        record(worker, path, more, 1500 + more)
        worker.kill()
    left = Path(f"{path}-wal").read_bytes()
    assert left
    number = path.stat().st_ino
    put(backup, path)
    if made is back_up and put is remove_and_copy and path.stat().st_ino == number and not generation_is_told(path):
        return  # a file system that gives the number again, and does not say that it has
    with UsageWorker("--usage-db", str(path)) as worker:
        record(worker, path, 30, 1530)
        assert worker.ask("close 30") == "0"
        worker.kill()
        assert worker.warnings.count(PUT_IN_PLACE) == worker.warnings.count("\n") == 1
    assert Path(f"{path}-wal.former").read_bytes() == left
    assert_sums_agree(path)
    assert rows(path, "pragma_integrity_check") == [("ok",)]


@pytest.mark.parametrize("made", [vacuum_into, back_up])
def test_who_only_reads_reads_the_backup_while_a_killed_relays_wal_is_beside_it(
    tmp_path: Path, made: Callable[[Path, Path], None]
) -> None:
    if made is back_up and not notes_are_taken(tmp_path):
        pytest.skip("the temporary folder has to be on a file system with extended attributes, such as ext4")
    path, backup = tmp_path / "db", tmp_path / "backup"
    with UsageWorker("--usage-db", str(path)) as worker:
        record(worker, path, 20, 20)
        made(path, backup)
        record(worker, path, 10, 30)
        with opened(path) as database:
            assert database.summary().all_time.connections == 30
        worker.kill()
    with opened(path) as database:
        assert database.summary().all_time.connections == 30
    files = {name: (tmp_path / name).read_bytes() for name in ("backup", "db-wal")}
    move(backup, path)
    with opened(path) as database:
        assert database.summary().all_time.connections == 20
        assert not database.was_disturbed()
    assert path.read_bytes() == files["backup"]
    assert Path(f"{path}-wal").read_bytes() == files["db-wal"]


def test_a_folder_where_the_former_wal_has_to_go_is_told_of_by_its_name(tmp_path: Path) -> None:
    path, backup = tmp_path / "db", tmp_path / "backup"
    in_the_way = Path(f"{path}-wal.former")
    with UsageWorker("--usage-db", str(path)) as worker:
        record(worker, path, 20, 20)
        vacuum_into(path, backup)
        in_the_way.mkdir()
        worker.kill()
    check_file(str(path))
    move(backup, path)
    left = Path(f"{path}-wal").read_bytes()
    told = f"there is a folder by the name of {in_the_way}, .*; rename that folder, or remove that -wal"
    with pytest.raises(UsageError, match=told):
        check_file(str(path))
    with pytest.raises(UsageError, match=told):
        open_database(str(path))
    assert Path(f"{path}-wal").read_bytes() == left
    in_the_way.rename(tmp_path / "elsewhere")
    check_file(str(path))
    open_database(str(path)).close()
    assert in_the_way.read_bytes() == left


def test_a_worker_that_comes_while_another_still_has_the_former_file_open_does_not_mix_them(tmp_path: Path) -> None:
    path, backup = tmp_path / "db", tmp_path / "backup"
    with UsageWorker("--usage-db", str(path)) as worker:
        record(worker, path, 100, 100)
        vacuum_into(path, backup)
        record(worker, path, 50, 150)
        os.replace(backup, path)
        with UsageWorker("--usage-db", str(path)) as other:
            record(other, path, 7, 107)
            record(worker, path, 3, 110)
            assert worker.ask("close 30") == other.ask("close 30") == "0"
    assert_sums_agree(path)
    assert rows(path, "pragma_integrity_check") == [("ok",)]


@pytest.mark.parametrize("more", [0, 1, 50, 3000])
def test_after_a_kill_nothing_is_put_aside_and_nothing_is_missing(tmp_path: Path, more: int) -> None:
    path = tmp_path / "db"
    for run in (1, 2):
        with UsageWorker("--usage-db", str(path)) as worker:
            record(worker, path, more, more * run)
            worker.kill()
            assert worker.warnings == ""
    with UsageWorker("--usage-db", str(path)) as worker:
        record(worker, path, 1, 2 * more + 1)
        assert worker.ask("close 30") == "0"
    assert not Path(f"{path}-wal.former").exists()


def test_in_a_copy_of_the_whole_folder_nothing_is_put_aside_and_nothing_is_missing(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    with UsageWorker("--usage-db", str(before / "db")) as worker:
        record(worker, before / "db", 200, 200)
        worker.kill()
    after.mkdir()
    subprocess.run(["cp", "-a", f"{before}/.", after], check=True)  # with all that is noted on the files
    with UsageWorker("--usage-db", str(after / "db")) as worker:
        record(worker, after / "db", 1, 201)
        assert worker.ask("close 30") == "0"
        worker.kill()
        assert worker.warnings == ""
    assert sorted(path.name for path in after.iterdir()) == ["db"]

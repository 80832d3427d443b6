"""Another user may write in the folder of the database or of the JSON lines, and puts links there.

A relay that runs as root must not write to, nor make, a file of that user's choice.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.usage.recorder import UsageError
from relay.usage.reopen import FollowedFile
from tests.support.harness import CHECKOUT, Relay, met
from tests.support.usage_records import append_to, numbers_of_lines, record_numbers, recording, wait_for_rows

SOMEBODY = 4321


@pytest.fixture(autouse=True)
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may make files of others; run the tests as root, in a VM or a container")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of somebody else's."""
    path = tmp_path / "theirs"
    path.mkdir()
    os.chown(path, SOMEBODY, SOMEBODY)
    return path


def link(path: Path, target: Path, owner: int) -> None:
    path.symlink_to(target)
    os.lchown(path, owner, owner)


@pytest.fixture
def lines(folder: Path) -> Iterator[int]:
    fd = append_to(folder / "log")
    yield fd
    os.close(fd)


@pytest.mark.parametrize("exists", [True, False], ids=["a file of root's", "no file yet"])
def test_a_link_in_place_of_a_rotated_log_is_not_followed_and_no_line_is_lost(
    tmp_path: Path, folder: Path, lines: int, exists: bool
) -> None:
    precious = tmp_path / "precious"
    if exists:
        precious.write_text("root's own\n")
    warnings: list[str] = []
    with recording(lines, warnings) as recorder:
        (folder / "log").rename(folder / "log.1")
        link(folder / "log", precious, SOMEBODY)
        record_numbers(recorder, 1, 2, 3)
    assert numbers_of_lines((folder / "log.1").read_bytes()) == [1, 2, 3]
    assert precious.exists() == exists
    assert not exists or precious.read_text() == "root's own\n"
    assert len(warnings) == 1
    assert "a new one cannot be made" in warnings[0]


def test_a_further_name_of_a_file_in_place_of_a_rotated_log_is_not_written_to(
    tmp_path: Path, folder: Path, lines: int
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("root's own\n")
    with recording(lines) as recorder:
        (folder / "log").rename(folder / "log.1")
        os.link(precious, folder / "log")
        record_numbers(recorder, 1)
    assert numbers_of_lines((folder / "log.1").read_bytes()) == [1]
    assert precious.read_text() == "root's own\n"


def test_a_link_of_roots_own_is_followed(tmp_path: Path, folder: Path, lines: int) -> None:
    (folder / "log").rename(folder / "log.1")
    link(folder / "log", tmp_path / "elsewhere", os.geteuid())
    followed = FollowedFile(lines)
    followed.path = str(folder / "log")
    assert followed.follow()
    os.write(lines, b"a line\n")
    assert (tmp_path / "elsewhere").read_bytes() == b"a line\n"


def test_a_database_that_is_a_link_of_another_users_is_refused(tmp_path: Path, folder: Path) -> None:
    link(folder / "db", tmp_path / "new", SOMEBODY)
    with (
        pytest.raises(UsageError, match="it is a link that belongs to another user; name the file itself"),
        recording(folder / "db"),
    ):
        pass
    assert not (tmp_path / "new").exists()


def test_a_database_whose_place_is_taken_by_a_link_is_not_made_where_that_leads(tmp_path: Path, folder: Path) -> None:
    warnings: list[str] = []
    path = folder / "db"
    with recording(path, warnings) as recorder:
        record_numbers(recorder, 1)
        wait_for_rows(path, 1)
        for end in ("-shm", "-wal", ""):
            os.unlink(f"{path}{end}")
        link(path, tmp_path / "new", SOMEBODY)
        record_numbers(recorder, 2)
    assert not (tmp_path / "new").exists()
    assert "it is a link that belongs to another user" in warnings[0]


def test_a_database_into_which_another_relay_records_under_another_name_is_refused(tmp_path: Path) -> None:
    with Relay(tmp_path, recording=True) as relay:
        other = tmp_path / "elsewhere"
        other.mkdir()
        os.link(relay.usage_db, other / "usage.sqlite")
        command = [sys.executable, "-m", "relay", "--port", "0", "--usage-db", str(other / "usage.sqlite")]
        found = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=30)
        assert found.returncode == 2
        assert "records into it under another of its names (hard links)" in found.stderr
        for sock in met(relay.port):
            sock.close()
        assert len(relay.wait_for_rows("usage", 1)) == 1

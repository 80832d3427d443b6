"""What a worker does when the file that it writes its JSON lines to was renamed."""

from __future__ import annotations

import os
import re
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.usage.reopen import FollowedFile, other_name, path_of
from tests.support.harness import CHECKOUT, Relay, connect, handshake, new_side, new_token, running, wait_until


@pytest.fixture
def log(tmp_path: Path) -> Iterator[FollowedFile]:
    """A log opened as the shell does it, `3>>usage.jsonl`."""
    fd = os.open(tmp_path / "usage.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, b"first\n")
    yield FollowedFile(fd)
    os.close(fd)


def test_nothing_happens_while_the_path_names_the_file(log: FollowedFile, tmp_path: Path) -> None:
    assert not log.follow()
    os.write(log.fd, b"second\n")
    assert (tmp_path / "usage.jsonl").read_text() == "first\nsecond\n"


def test_after_a_rename_a_new_file_is_made_and_the_same_descriptor_writes_to_it(
    log: FollowedFile, tmp_path: Path
) -> None:
    os.fchmod(log.fd, 0o640)
    (tmp_path / "usage.jsonl").rename(tmp_path / "usage.1")
    assert log.follow()
    assert not log.follow()
    os.write(log.fd, b"second\n")
    assert (tmp_path / "usage.1").read_text() == "first\n"
    assert (tmp_path / "usage.jsonl").read_text() == "second\n"
    assert stat.S_IMODE((tmp_path / "usage.jsonl").stat().st_mode) == 0o640


def test_a_file_that_was_renamed_before_it_was_asked_for_its_path_is_made_anew_where_it_was(
    log: FollowedFile, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("usage.jsonl")
    (tmp_path / "usage.jsonl").rename(tmp_path / "usage.1")
    for name in ("usage.jsonl", "link"):
        late = FollowedFile(log.fd, str(tmp_path / name))
        assert late.follow() == (name == "usage.jsonl")
        os.write(late.fd, b"second\n")
    assert (tmp_path / "usage.1").read_text() == "first\n"
    assert (tmp_path / "usage.jsonl").read_text() == "second\nsecond\n"


def test_a_file_that_was_deleted_before_that_is_made_anew_as_well(log: FollowedFile, tmp_path: Path) -> None:
    (tmp_path / "usage.jsonl").unlink()
    assert FollowedFile(log.fd, str(tmp_path / "usage.jsonl")).follow()
    os.write(log.fd, b"second\n")
    assert (tmp_path / "usage.jsonl").read_text() == "second\n"


def test_a_path_that_the_descriptor_was_not_opened_as_is_told_from_links_to_it_and_from_a_file_that_is_gone(
    log: FollowedFile, tmp_path: Path
) -> None:
    path = tmp_path / "usage.jsonl"
    (tmp_path / "link").symlink_to("usage.jsonl")
    (tmp_path / "other.jsonl").touch()
    assert other_name(log.fd, str(path)) is None
    assert other_name(log.fd, str(tmp_path / "link")) is None
    for other in ("other.jsonl", "none.jsonl"):
        assert other_name(log.fd, str(tmp_path / other)) == str(path)
    path.unlink()
    assert other_name(log.fd, str(path)) is None


def test_what_is_no_file_goes_nowhere_whatever_it_was_opened_as(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    assert not FollowedFile(writing, str(tmp_path / "usage.jsonl")).follow()
    os.close(reading)
    os.close(writing)
    assert os.listdir(tmp_path) == []


def test_two_workers_agree_on_the_new_file(log: FollowedFile, tmp_path: Path) -> None:
    other = FollowedFile(os.open(tmp_path / "usage.jsonl", os.O_WRONLY | os.O_APPEND))
    (tmp_path / "usage.jsonl").rename(tmp_path / "usage.1")
    for worker in (log, other, log, other):
        worker.follow()
        os.write(worker.fd, b"x\n")
    os.close(other.fd)
    assert (tmp_path / "usage.jsonl").read_text() == "x\n" * 4


def test_a_file_that_was_put_in_its_place_is_appended_to(log: FollowedFile, tmp_path: Path) -> None:
    (tmp_path / "usage.jsonl").rename(tmp_path / "usage.1")
    (tmp_path / "usage.jsonl").write_text("made by logrotate's create\n")
    assert log.follow()
    os.write(log.fd, b"second\n")
    assert (tmp_path / "usage.jsonl").read_text() == "made by logrotate's create\nsecond\n"


def test_where_no_new_file_can_be_made_the_old_one_is_written_to(log: FollowedFile, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    moved = FollowedFile(os.open(folder / "usage.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    folder.rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            moved.follow()
    os.write(moved.fd, b"kept\n")
    assert (tmp_path / "elsewhere" / "usage.jsonl").read_text() == "kept\n"
    folder.mkdir()
    assert moved.follow()
    os.close(moved.fd)


def test_the_descriptor_is_inherited_or_not_as_before(log: FollowedFile, tmp_path: Path) -> None:
    for inheritable in (True, False):
        os.set_inheritable(log.fd, inheritable)
        (tmp_path / "usage.jsonl").rename(tmp_path / "usage.1")
        assert log.follow()
        assert os.get_inheritable(log.fd) == inheritable


def test_what_is_no_file_or_has_no_name_is_left_alone(log: FollowedFile, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    left, right = socket.socketpair()
    terminal, end = os.openpty()
    (tmp_path / "usage.jsonl").unlink()
    for fd in (writing, left.fileno(), end, log.fd):
        assert path_of(fd) is None
        assert not FollowedFile(fd).follow()
    for fd in (reading, writing, terminal, end):
        os.close(fd)
    left.close()
    right.close()
    assert os.listdir(tmp_path) == []


def test_a_fifo_put_in_its_place_does_not_hold_anybody_up(log: FollowedFile, tmp_path: Path) -> None:
    (tmp_path / "usage.jsonl").unlink()
    os.mkfifo(tmp_path / "usage.jsonl")
    with pytest.raises(OSError, match="No such device"):
        log.follow()


@pytest.mark.parametrize("meanwhile", ["mv usage.jsonl usage-1.jsonl", "rm usage.jsonl"])
def test_a_relay_whose_file_is_renamed_while_it_starts_writes_to_where_it_was(tmp_path: Path, meanwhile: str) -> None:
    options = "--port 0 --interface 127.0.0.1 --log-fd 3 --log-path usage.jsonl"
    script = f'exec 3>>usage.jsonl; {meanwhile}; exec "$0" -m relay {options}'
    log, lines = tmp_path / "log", tmp_path / "usage.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}

    def port() -> int:
        found = re.search(r"listening on \S+ port (\d+)", log.read_text())
        return int(found[1]) if found else 0

    with running(["/bin/sh", "-c", script, sys.executable], log, env=environment, cwd=tmp_path):
        with connect(wait_until(port, 20, "its port")) as client:
            client.sendall(handshake(new_token(), new_side()))
        wait_until(lambda: lines.exists() and lines.read_text().count("\n") == 1, 20, "the line")
    assert not (tmp_path / "usage-1.jsonl").exists() or (tmp_path / "usage-1.jsonl").read_text() == ""


def test_the_relay_goes_on_in_a_new_file_after_a_rotation(relay: Relay) -> None:
    def leave_alone() -> None:
        with connect(relay.port) as client:
            client.sendall(handshake(new_token(), new_side()))

    leave_alone()
    relay.wait_for_records(1)
    relay.json_lines.rename(relay.folder / "usage-1.jsonl")
    leave_alone()
    relay.wait_for_records(1)
    leave_alone()
    relay.wait_for_records(2)
    assert len((relay.folder / "usage-1.jsonl").read_text().splitlines()) == 1

"""The run directory: who may use it, who is in it, and what becomes of it."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from relay.mistakes import Mistake
from relay.workers import run_dir
from relay.workers.run_dir import RunDir, check_run_dir, same_user
from tests.support.harness import Relay, wait_until
from tests.support.usage_disk import disk_of


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A run directory that is not there yet."""
    return tmp_path / "run"


def test_it_is_made_for_this_user_alone_whatever_the_umask(place: Path) -> None:
    before = os.umask(0)
    try:
        RunDir(str(place))
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777, 0o1777])
def test_one_that_others_may_enter_is_refused(place: Path, mode: int) -> None:
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(Mistake, match=r"--run-dir .*others may enter it; chmod 700"):
        RunDir(str(place))


def test_one_that_belongs_to_another_user_is_refused(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    place.mkdir(mode=0o700)
    os.chown(place, 65534, 65534)
    with pytest.raises(Mistake, match=r"--run-dir .*belongs to another user"):
        RunDir(str(place))


def test_a_file_is_no_run_directory(place: Path) -> None:
    place.write_text("")
    with pytest.raises(Mistake, match=r"--run-dir .*Not a directory"):
        RunDir(str(place))


def test_its_parent_must_exist(place: Path) -> None:
    with pytest.raises(Mistake, match=r"--run-dir .*run does not exist; make it"):
        RunDir(str(place / "below"))


def test_two_workers_find_each_other_also_at_the_end_of_a_long_path(tmp_path: Path) -> None:
    long = tmp_path / ("a" * 120) / ("b" * 120)
    long.mkdir(parents=True)
    first, second = RunDir(str(long / "run")), RunDir(str(long / "run"))
    with first.listen() as listener:
        (link,) = second.connect_to_all(patience=1)
        accepted, _ = listener.accept()
        with link, accepted:
            assert same_user(link) == same_user(accepted) == os.getpid()
            link.send(b"hello")
            assert accepted.recv(100) == b"hello"


def test_a_worker_does_not_find_itself(place: Path) -> None:
    directory = RunDir(str(place))
    with directory.listen():
        assert directory.connect_to_all(patience=1) == []


def test_the_socket_that_a_dead_worker_left_is_removed(place: Path) -> None:
    dead, alive = RunDir(str(place)), RunDir(str(place))
    dead.listen().close()
    assert (place / dead.own_name).exists()
    assert alive.connect_to_all(patience=1) == []
    assert not (place / dead.own_name).exists()


def test_a_newcomer_finds_room_for_its_socket_where_a_dead_worker_had_the_last_inode(tmp_path: Path) -> None:
    with disk_of("1m,nr_inodes=4", tmp_path) as disk:  # its root, the run directory, the lock, a socket
        place = disk / "run"
        dead = Relay(tmp_path, "--run-dir", str(place), name="dead").start()
        with pytest.raises(Mistake, match=r"no inode is left on its disk \(df -i\)"):
            check_run_dir(str(place))
        dead.kill()
        check_run_dir(str(place))
        with Relay(tmp_path, "--run-dir", str(place)) as newcomer:
            wait_until(lambda: "the first worker" in newcomer.log_text(), what="that it has joined")
            assert len(list(place.glob("worker-*"))) == 1


def test_what_is_no_workers_socket_is_left_alone(place: Path) -> None:
    directory = RunDir(str(place))
    names = ["notes", "worker-1-00000000", "worker-x-00000000", "lock"]
    for name in names:
        (place / name).write_text("mine")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:  # a stream is not how workers speak
        other.bind(str(place / "worker-2-00000000"))
        other.listen()
        assert directory.connect_to_all(patience=1) == []
    assert [(place / name).read_text() for name in names] == ["mine"] * len(names)
    assert (place / "worker-2-00000000").exists()


def test_one_worker_joins_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "LOCK_SECONDS", 0.05)
    first, second = RunDir(str(place)), RunDir(str(place))
    first.lock()
    with pytest.raises(Mistake, match=r"--run-dir .*another worker has been joining for too long"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()
    second.unlock()


def test_a_worker_notices_that_its_socket_is_gone_and_makes_it_again(place: Path) -> None:
    directory = RunDir(str(place))
    with directory.listen():
        assert not directory.lost_own_socket()
        (place / directory.own_name).unlink()
        assert directory.lost_own_socket()
        with directory.renew():
            assert not directory.lost_own_socket()
            shutil.rmtree(place)
            assert directory.lost_own_socket()
            with directory.renew():
                assert stat.S_IMODE(place.stat().st_mode) == 0o700
                (link,) = RunDir(str(place)).connect_to_all(patience=1)
                link.close()


def test_a_worker_that_leaves_takes_its_socket_along(place: Path) -> None:
    directory = RunDir(str(place))
    with directory.listen():
        directory.remove_own_socket()
        assert list(place.iterdir()) == []
        directory.remove_own_socket()
